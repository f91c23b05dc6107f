//! The command line: its commands, their options, and what `--help` says of them.

mod bandwidth;
mod env;
mod kept;
mod network;
mod ports;
mod unsupported;
mod vsock;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use cubbyhole::{Bandwidth, NetworkPolicy, Port, VsockPort};

use crate::amount::{duration, mebibytes, seconds};
use crate::keys::DetachKeys;
use crate::sessions::{Tail, since};

pub use env::{Variable, VariableFile};
pub use kept::{Filter, Images, List, Prune, PullImage};
pub use network::Network;
use unsupported::Unsupported;

/// Run code nobody trusts in microVMs of its own
#[derive(Debug, Parser)]
#[command(name = "cubby", bin_name = "cubby", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = "Examples:\n  cubby run -it python:3.12\n  cubby run --rm alpine:3 echo hello\n  \
                  cubby create --name box python:3.12 && cubby exec box python3 -V\n\nDoes it not work? cubby doctor")]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a sandbox, run a command in it, and stop it
    Run(Run),
    /// Create a sandbox that goes on by itself, and print its name
    Create(Create),
    /// Boot sandboxes that have stopped, with their disks as they were
    #[command(after_help = "Example:\n  cubby start box")]
    Start {
        /// The sandboxes
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Stop sandboxes: their processes get TERM, then KILL; disks are kept
    #[command(after_help = "Example:\n  cubby stop --timeout 30s box")]
    Stop {
        /// The sandboxes
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// How long one may take before it is killed
        #[arg(short, long, default_value = "10s", value_name = "DURATION", value_parser = duration)]
        timeout: Duration,
    },
    /// End sandboxes at once, as if their power were cut
    Kill {
        /// The sandboxes
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Freeze sandboxes; they use no processor time until they are resumed
    Pause {
        /// The sandboxes
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Let frozen sandboxes go on
    #[command(visible_alias = "unpause")]
    Resume {
        /// The sandboxes
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Take no new commands, let those that run finish, then stop
    #[command(after_help = "Example:\n  cubby drain --deadline 1m box")]
    Drain {
        /// The sandboxes
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// End what still runs after this
        #[arg(long, value_name = "DURATION", value_parser = duration)]
        deadline: Option<Duration>,
    },
    /// Remove sandboxes that have stopped, disks and all
    #[command(after_help = "Example:\n  cubby rm -f box")]
    Rm {
        /// The sandboxes
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// Kill those that run
        #[arg(short, long)]
        force: bool,
    },
    /// Run a command in a sandbox that runs
    Exec(Exec),
    /// Copy files and directories between this computer and a sandbox that runs
    Cp(Cp),
    /// Open a shell in a sandbox that runs
    #[command(after_help = "Example:\n  cubby shell box")]
    Shell {
        /// The sandbox; may be left out if only one runs
        name: Option<String>,
    },
    /// List sandboxes that run
    #[command(
        after_help = "Examples:\n  cubby ps\n  cubby ps -a --filter status=crashed\n  cubby stop $(cubby ps -q)"
    )]
    Ps(List),
    /// List all sandboxes: as ps -a
    #[command(visible_alias = "list")]
    Ls(List),
    /// List the commands that run in a sandbox, and detached ones that have ended
    Sessions {
        /// The sandbox
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Join a detached command: its output, its input, its end
    Attach(Attach),
    /// Print what the commands and the console of a sandbox have written
    Logs(Logs),
    /// Print all that is kept about sandboxes, as JSON
    Inspect {
        /// The sandboxes
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// Accepted: it is always JSON
        #[arg(long, hide = true)]
        json: bool,
    },
    /// Print the events that programs in a sandbox send, one line of JSON each
    #[command(after_help = "Example:\n  cubby events box progress | jq .data.percent")]
    Events {
        /// The sandbox
        name: String,
        /// Only events of this name
        event: Option<String>,
        /// Accepted: it is always JSON
        #[arg(long, hide = true)]
        json: bool,
    },
    /// Send an event to the programs in a sandbox that listen
    #[command(after_help = "Example:\n  cubby emit box reload '{\"file\": \"a.conf\"}'")]
    Emit {
        /// The sandbox
        name: String,
        /// The event's name
        event: String,
        /// What belongs to it, as JSON
        #[arg(default_value = "null", hide_default_value = true)]
        data: String,
    },
    /// Change whom a sandbox may talk to, and watch it talk
    Network {
        /// What to do
        #[command(subcommand)]
        what: Network,
    },
    /// Connect standard input and output to a vsock port in a sandbox
    #[command(after_help = "Example:\n  echo question | cubby connect box 5000")]
    Connect {
        /// The sandbox
        name: String,
        /// The port at which a program in it listens
        port: u32,
    },
    /// Show what sandboxes use: again each second on a terminal, else once
    #[command(after_help = "Examples:\n  cubby stats\n  cubby stats --json box | jq '.[].memory.used'")]
    Stats {
        /// The sandboxes (default: all that run)
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Show it once
        #[arg(long)]
        no_stream: bool,
        /// Print JSON, once
        #[arg(long)]
        json: bool,
        /// Print OpenMetrics text, once
        #[arg(long, conflicts_with = "json")]
        openmetrics: bool,
    },
    /// Check whether sandboxes can run here, and say what to do if not
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Fetch an image, or what its tag stands for now
    Pull(PullImage),
    /// List the images that are here
    #[command(after_help = "Example:\n  cubby images")]
    Images(Images),
    /// Remove images that no sandbox needs
    #[command(after_help = "Example:\n  cubby rmi python:3.12")]
    Rmi {
        /// The images: references, digests, or the first 12 digits of one
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Remove all sandboxes that have ended and all images that no sandbox needs
    Prune(Prune),
    /// Write the man pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Print a shell's completion script
    #[command(
        after_help = "Example:\n  cubby completion bash > ~/.local/share/bash-completion/completions/cubby"
    )]
    Completion {
        /// The shell
        #[arg(value_parser = shell, value_name = "bash|zsh|fish")]
        shell: Shell,
    },
}

/// `cubby run`
#[derive(Debug, Args)]
#[command(
    override_usage = "cubby run [OPTIONS] IMAGE [COMMAND [ARG]...]",
    after_help = "Examples:\n  cubby run -it python:3.12\n  cubby run --rm -i python:3.12 python3 - < program.py\n  \
                  cubby run --rm --timeout 10s alpine:3 sh -c 'echo hello'"
)]
pub struct Run {
    #[command(flatten)]
    pub streams: StreamOptions,
    /// Remove the sandbox when it ends
    #[arg(long)]
    pub rm: bool,
    /// Leave the sandbox running, print its name, and run no command
    #[arg(short, long, conflicts_with_all = ["interactive", "tty", "timeout"])]
    pub detach: bool,
    /// End the command when it runs longer than this
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub timeout: Option<Duration>,
    #[command(flatten)]
    pub settings: Settings,
    /// Run this in place of the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// The image, and the command with its arguments (default: the image's)
    #[arg(required = true, trailing_var_arg = true, hide = true, value_name = "IMAGE")]
    pub words: Vec<String>,
}

/// `cubby create`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  cubby create --name box --memory 1g python:3.12")]
pub struct Create {
    /// Remove the sandbox when it ends
    #[arg(long)]
    pub rm: bool,
    #[command(flatten)]
    pub settings: Settings,
    /// The image
    pub image: String,
}

/// `cubby exec`
#[derive(Debug, Args)]
#[command(
    override_usage = "cubby exec [OPTIONS] NAME COMMAND [ARG]...",
    after_help = "Examples:\n  cubby exec -it box bash\n  cubby exec box cat /etc/hostname"
)]
pub struct Exec {
    #[command(flatten)]
    pub streams: StreamOptions,
    /// Let the command go on by itself, and print the number of its session
    #[arg(short, long)]
    pub detach: bool,
    #[command(flatten)]
    pub own: CommandOptions,
    /// End the command when it runs longer than this
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// The sandbox, and the command with its arguments
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, hide = true, value_name = "NAME COMMAND")]
    pub words: Vec<String>,
}

/// `cubby cp`
#[derive(Debug, Args)]
#[command(
    override_usage = "cubby cp [OPTIONS] PATH|- NAME:PATH\n       cubby cp [OPTIONS] NAME:PATH PATH|-",
    after_help = "Examples:\n  cubby cp program.py box:/root/\n  cubby cp box:/var/log ./logs\n  \
                  cubby cp site/. box:/srv/www\n  tar -c site | cubby cp - box:/srv\n  \
                  cubby cp box:/var/log - | tar -t\n\nA directory goes with all that is in it: into DST if that is \
                  a directory, else as DST.\nDIR/. is what is in DIR. Paths in a sandbox begin at its root.\n\n- is a tar \
                  archive, unpacked from standard input into a directory that is there, or written to standard output."
)]
pub struct Cp {
    /// Keep users and groups; otherwise copies belong to root there, and to you here
    #[arg(short, long)]
    pub archive: bool,
    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
    /// From; - is a tar archive on standard input
    #[arg(value_name = "SRC")]
    pub from: OsString,
    /// To; - is a tar archive on standard output
    #[arg(value_name = "DST")]
    pub to: OsString,
}

/// `cubby attach`
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  cubby attach box 17\n\nThe keys ctrl-p ctrl-q leave a terminal, and its command runs on."
)]
pub struct Attach {
    /// The sandbox
    pub name: String,
    /// The session; may be left out if only one is detached
    pub session: Option<u32>,
    /// Do not pass standard input on
    #[arg(long)]
    pub no_stdin: bool,
    /// The keys that leave a terminal
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: DetachKeys,
}

/// `cubby logs`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cubby logs -f box\n  cubby logs --tail 20 --since 10m --timestamps box\n  \
                            cubby logs --source console box\n  cubby logs --json box | jq -r .text"
)]
pub struct Logs {
    /// The sandbox
    pub name: String,
    /// Go on with what is written from now on, until the sandbox ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only so many of the newest lines
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all")]
    pub tail: Tail,
    /// Only what is newer: how long ago (10m), a moment (2026-01-31T12:00:00Z), or seconds since 1970
    #[arg(long, value_name = "TIME", value_parser = since)]
    pub since: Option<SystemTime>,
    /// Print the time before each line
    #[arg(short, long)]
    pub timestamps: bool,
    /// Only what this session has written
    #[arg(long)]
    pub session: Option<u32>,
    /// Only what comes from there; may be given more than once
    #[arg(long, value_name = "SOURCE", value_enum)]
    pub source: Vec<Source>,
    /// Print JSON, an object on each line
    #[arg(long, conflicts_with = "timestamps")]
    pub json: bool,
}

/// Where a line of a log comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// Standard output of commands without a terminal
    Stdout,
    /// Standard error of commands without a terminal
    Stderr,
    /// Terminals of commands
    Terminal,
    /// The guest's console
    Console,
}

/// Which of our streams the command gets.
#[derive(Clone, Copy, Debug, Args)]
pub struct StreamOptions {
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// The keys that leave a terminal, while its command runs on
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: DetachKeys,
}

/// What both a sandbox and a single command can have.
#[derive(Clone, Debug, Default, Args)]
pub struct CommandOptions {
    /// Set an environment variable; NAME alone takes the value from here
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = env::variable)]
    pub env: Vec<Variable>,
    /// Set those in a file, one on each line
    #[arg(long, value_name = "FILE", value_parser = env::file)]
    pub env_file: Vec<VariableFile>,
    /// Start in this directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// Run as this user: name or id, with :group if you like
    #[arg(short, long)]
    pub user: Option<String>,
}

impl CommandOptions {
    /// The variables that have a value, those of files first, so that the command line goes over them.
    pub fn variables(&self) -> impl Iterator<Item = (String, String)> {
        let of_files = self.env_file.iter().flat_map(|file| &file.0);
        of_files.chain(&self.env).filter_map(Variable::resolve)
    }
}

/// What a sandbox is made of.
#[derive(Debug, Args)]
pub struct Settings {
    /// The sandbox's name; one is made up otherwise
    #[arg(long)]
    pub name: Option<String>,
    #[command(flatten)]
    pub command: CommandOptions,
    /// Virtual processors
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// Memory, such as 512m or 2g
    #[arg(short, long, value_name = "SIZE", value_parser = mebibytes)]
    pub memory: Option<u32>,
    /// The disk's size; only what is written takes space
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    pub disk: Option<u32>,
    /// The host name it has inside
    #[arg(long)]
    pub hostname: Option<String>,
    /// Let a port of this computer lead into it: [IP:]HOST:GUEST[/udp]; on 127.0.0.1 unless IP is given
    #[arg(short, long, value_name = "PORTS", value_parser = ports::publish)]
    pub publish: Vec<Port>,
    /// Whom it may talk to: none, public, all, or @FILE with rules in JSON (default: public)
    #[arg(long, visible_alias = "net", value_name = "WHOM", value_parser = ports::network)]
    pub network: Option<NetworkPolicy>,
    /// Ask this server for names, and not those that this computer asks
    #[arg(long, value_name = "IP[:PORT]", value_parser = ports::resolver)]
    pub dns: Vec<SocketAddr>,
    /// How much it may send and receive in a second: 10mbit, or up=10mbit,down=1gbit
    #[arg(long, value_name = "RATE", value_parser = bandwidth::bandwidth)]
    pub bandwidth: Option<Bandwidth>,
    /// Keep a record of its frames in this file, for tcpdump or Wireshark
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,
    /// Let a vsock port of the host lead from inside to a Unix socket here
    #[arg(long, value_name = "PORT:PATH", value_parser = vsock::vsock)]
    pub vsock: Vec<VsockPort>,
    /// Set a label
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = label)]
    pub label: Vec<(String, String)>,
    /// End the sandbox after this long
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    pub max_duration: Option<u64>,
    /// End the sandbox when nobody has used it for this long
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    pub idle_timeout: Option<u64>,
    /// When to ask the registry: missing, always or never
    #[arg(long, value_enum, default_value_t, value_name = "WHEN", hide_possible_values = true)]
    pub pull: Pull,
    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub unsupported: Unsupported,
}

/// When to ask the registry for an image, in docker's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// If the image is not here
    #[default]
    Missing,
    /// Every time
    Always,
    /// Never
    Never,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=').unwrap_or((text, "")) {
        ("", _) => Err("a label needs a name: NAME=VALUE".into()),
        (name, value) => Ok((name.into(), value.into())),
    }
}

fn shell(text: &str) -> Result<Shell, String> {
    match text {
        "bash" => Ok(Shell::Bash),
        "zsh" => Ok(Shell::Zsh),
        "fish" => Ok(Shell::Fish),
        _ => Err("there is one for bash, zsh and fish".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &[&str]) -> Result<Command, clap::Error> {
        Arguments::try_parse_from(std::iter::once(&"cubby").chain(line)).map(|parsed| parsed.command)
    }

    #[test]
    fn the_description_holds_together() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_follows_the_image_is_the_commands_own() {
        let Command::Run(run) =
            parse(&["run", "-it", "--rm", "alpine", "--rm", "-e", "A=1", "--", "-x"]).unwrap()
        else {
            panic!("not run")
        };
        assert!(run.rm && run.streams.interactive && run.streams.tty);
        assert_eq!(run.words, ["alpine", "--rm", "-e", "A=1", "--", "-x"]);
        assert!(run.settings.command.env.is_empty());
        let Command::Exec(exec) = parse(&["exec", "-w", "/tmp", "box", "ls", "-i", "-t"]).unwrap() else {
            panic!("not exec")
        };
        assert!(!exec.streams.interactive && !exec.streams.tty);
        assert_eq!(exec.words, ["box", "ls", "-i", "-t"]);
        // An option of ours that does not exist is no image.
        assert!(parse(&["run", "--bogus", "alpine"]).is_err());
        assert!(parse(&["exec", "box"]).is_err());
        assert!(parse(&["run"]).is_err());
    }

    #[test]
    fn options_become_values() {
        let line = [
            "run", "-m", "1g", "--disk", "100m", "-e", "A=b=c", "-e", "EMPTY=", "-l", "mark", "--pull",
            "never",
        ];
        let Command::Run(run) = parse(&[&line[..], &["--timeout", "1m30s", "x"]].concat()).unwrap() else {
            panic!("not run")
        };
        let settings = run.settings;
        assert_eq!((settings.memory, settings.disk), (Some(1024), Some(100)));
        let env: Vec<_> = settings.command.variables().collect();
        assert_eq!(env, [("A".into(), "b=c".into()), ("EMPTY".into(), String::new())]);
        assert_eq!(settings.label, [("mark".into(), String::new())]);
        assert_eq!(settings.pull, Pull::Never);
        assert_eq!(run.timeout, Some(Duration::from_secs(90)));
        for (instead, wrong) in [
            ("standard input", ["-v", "/a:/b"]),
            ("standard input", ["--mount", "type=bind"]),
            ("HOST:GUEST", ["-p", "80:http"]),
            ("none, public, all", ["--net", "host"]),
            ("its address", ["--dns", "localhost"]),
            ("no need", ["--privileged", "--rm"]),
        ] {
            let error = parse(&["run", wrong[0], wrong[1], "x"]).unwrap_err().to_string();
            assert!(error.contains(instead), "{error}");
        }
        let line = ["create", "-p", "8080:80", "-p", "53/udp", "--net", "all", "--dns", "1.1.1.1", "x"];
        let Command::Create(create) = parse(&line).unwrap() else { panic!("not create") };
        assert_eq!(create.settings.publish, [Port::new(8080, 80), Port::new(0, 53).udp()]);
        assert_eq!(create.settings.network, Some(NetworkPolicy::all()));
        assert_eq!(create.settings.dns, [SocketAddr::from(([1, 1, 1, 1], 53))]);
        for wrong in [["-m", "512"], ["-m", "1x"], ["-e", "=1"], ["--timeout", "soon"], ["--cpus", "many"]] {
            assert!(parse(&["run", wrong[0], wrong[1], "x"]).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn habits_of_docker_are_understood() {
        for line in [
            &["ps", "-a", "-q"][..],
            &["ps", "-aq", "-f", "status=exited", "--filter", "label=a=b"],
            &["list"],
            &["images", "-q"],
            &["rmi", "a", "b"],
            &["prune", "-f"],
            &["rm", "-f", "a", "b"],
            &["unpause", "a"],
            &["stop", "-t", "3", "a"],
        ] {
            parse(line).unwrap();
        }
        assert!(
            matches!(parse(&["stop", "-t", "3", "a"]), Ok(Command::Stop { timeout, .. }) if timeout.as_secs() == 3)
        );
    }
}
