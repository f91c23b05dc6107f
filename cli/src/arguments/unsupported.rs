//! Options that people know from docker and that have no meaning here: each says what to use instead.

use clap::Args;

/// None of these can be given.
#[derive(Debug, Args)]
pub struct Unsupported {
    #[arg(short, long, visible_alias = "mount", hide = true, value_name = "VOLUME", value_parser = volume)]
    volume: Vec<String>,
    #[arg(short, long, hide = true, value_name = "PORT", value_parser = publish)]
    publish: Vec<String>,
    #[arg(long, visible_alias = "net", hide = true, value_name = "NETWORK", value_parser = network)]
    network: Option<String>,
    #[arg(long, hide = true, num_args = 0, default_missing_value = "true", value_parser = privileged)]
    privileged: Option<String>,
}

fn volume(_: &str) -> Result<String, String> {
    Err("a sandbox shares no directory with this computer: pass data on its standard input (-i) and output"
        .into())
}

fn publish(_: &str) -> Result<String, String> {
    Err("a sandbox has no network yet: talk to what runs in it with cubby exec".into())
}

/// What there is can be asked for.
fn network(text: &str) -> Result<String, String> {
    match text {
        "none" => Ok(text.into()),
        _ => Err("a sandbox has no network yet: only none can be asked for".into()),
    }
}

fn privileged(_: &str) -> Result<String, String> {
    Err("there is no need: root in a sandbox is root of a computer of its own".into())
}
