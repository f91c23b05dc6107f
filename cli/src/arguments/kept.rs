//! Arguments of the commands about what is kept: sandboxes in lists, images, and what can go.

use clap::Args;

/// `cubby ps`, `cubby ls`
#[derive(Debug, Args)]
pub struct List {
    /// Those that have stopped too
    #[arg(short, long)]
    pub all: bool,
    /// Only those for which this holds: name=TEXT, status=STATUS, image=IMAGE, label=NAME[=VALUE]
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = filter)]
    pub filter: Vec<Filter>,
    /// Print names only
    #[arg(short, long)]
    pub quiet: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
}

/// What must hold of a sandbox to be listed. As docker has it, of several for a name, a status or an image one must hold,
/// of several labels all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Its name contains this.
    Name(String),
    /// This is its status, whatever the case of the letters.
    Status(String),
    /// It was created from this image.
    Image(String),
    /// It has this label, with this value if one is given.
    Label(String, Option<String>),
}

fn filter(text: &str) -> Result<Filter, String> {
    let (key, value) = text.split_once('=').ok_or("it has the form KEY=VALUE")?;
    let own = value.to_owned();
    match key {
        "name" => Ok(Filter::Name(own)),
        "status" => {
            let known = ["creating", "running", "paused", "draining", "stopped", "exited", "crashed"];
            match known.into_iter().find(|known| known.eq_ignore_ascii_case(value)) {
                // Docker's word for it.
                Some("exited") => Ok(Filter::Status("stopped".into())),
                Some(known) => Ok(Filter::Status(known.into())),
                None => Err(format!("a status is one of {}", known.join(", "))),
            }
        }
        "image" | "ancestor" => Ok(Filter::Image(own)),
        "label" => Ok(match value.split_once('=') {
            Some((name, value)) => Filter::Label(name.into(), Some(value.into())),
            None => Filter::Label(own, None),
        }),
        _ => Err("the keys are name, status, image and label".into()),
    }
}

/// `cubby pull`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  cubby pull python:3.12")]
pub struct PullImage {
    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The image
    pub image: String,
}

/// `cubby images`
#[derive(Debug, Args)]
pub struct Images {
    /// Print digests only
    #[arg(short, long)]
    pub quiet: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
}

/// `cubby prune`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  cubby prune --images\n  cubby prune -f --sandboxes\n\n\
                        Without --images and --sandboxes, both go. An image that a sandbox was created from stays.")]
pub struct Prune {
    /// Images from which no sandbox was created that is still there
    #[arg(long)]
    pub images: bool,
    /// Sandboxes that have stopped or crashed, disks and all
    #[arg(long)]
    pub sandboxes: bool,
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_as_docker_reads_them() {
        for (text, expected) in [
            ("name=bo", Filter::Name("bo".into())),
            ("status=Running", Filter::Status("running".into())),
            ("status=exited", Filter::Status("stopped".into())),
            ("ancestor=alpine", Filter::Image("alpine".into())),
            ("label=a", Filter::Label("a".into(), None)),
            ("label=a=b=c", Filter::Label("a".into(), Some("b=c".into()))),
        ] {
            assert_eq!(filter(text), Ok(expected), "{text}");
        }
        for text in ["name", "status=fine", "port=80", "=x", ""] {
            assert!(filter(text).is_err(), "{text}");
        }
    }
}
