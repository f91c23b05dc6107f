//! Options that people know from docker and that have no meaning here: each says what to use instead.

use clap::Args;

/// None of these can be given.
#[derive(Debug, Args)]
pub struct Unsupported {
    #[arg(short, long, visible_alias = "mount", hide = true, value_name = "VOLUME", value_parser = volume)]
    volume: Vec<String>,
    #[arg(long, hide = true, num_args = 0, default_missing_value = "true", value_parser = privileged)]
    privileged: Option<String>,
}

fn volume(_: &str) -> Result<String, String> {
    Err("a sandbox shares no directory with this computer: pass data on its standard input (-i) and output"
        .into())
}

fn privileged(_: &str) -> Result<String, String> {
    Err("there is no need: root in a sandbox is root of a computer of its own".into())
}
