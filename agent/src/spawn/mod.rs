//! From an [`Open`] message to a running child: program, environment, user, directory, limits and streams.
//!
//! What a command finds is what `docker exec` gives it: the guest's environment with the command's own over it,
//! `PATH`, `HOME`, `HOSTNAME` and (with a terminal) `TERM` filled in where missing. Lookup in `PATH` happens in
//! the child, after it went to its directory and became its user, so that it sees what the command would see.
//! Unless it says otherwise it may have 1,024 open files and raise that itself, as commands of systemd and docker may:
//! there are programs that close every number that they could have, and others whose `select` has room for no more.

pub mod accounts;

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use cubby_protocol::message::{ExecFailed, ExecFailure, GuestConfig, Open, TtySize};
use rustix::fs::{Mode, OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Resource, getrlimit};
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};

use self::accounts::Accounts;
use crate::sys::{Credentials, Launcher, Plan, Step};

/// `RLIMIT_NOFILE`.
const NOFILE: u8 = 7;

/// Open files that a command may have until it says otherwise; how many it may say is what the agent may have.
const OPEN_FILES: u64 = 1 << 10;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The agent's ends of a command's streams, all non-blocking.
#[derive(Debug)]
pub enum Streams {
    /// Separate streams. Without standard input the command reads `/dev/null`.
    Pipes {
        /// To the command.
        stdin: Option<OwnedFd>,
        /// From it.
        stdout: OwnedFd,
        /// From it.
        stderr: OwnedFd,
    },
    /// A terminal's master side.
    Terminal(OwnedFd),
}

/// A command that runs.
#[derive(Debug)]
pub struct Child {
    /// Its process, session and process group.
    pub pid: i32,
    /// The agent's ends.
    pub streams: Streams,
}

/// Starts commands.
#[derive(Debug)]
pub struct Spawner {
    config: GuestConfig,
    accounts: Accounts,
    launcher: Launcher,
    null: OwnedFd,
    /// Soft and hard.
    open_files: (u64, u64),
}

impl Spawner {
    /// A spawner for a guest that was set up with `config`.
    pub fn new(config: GuestConfig) -> Result<Self, Errno> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        let open_files = (hard.min(OPEN_FILES), hard);
        Ok(Self { config, accounts: Accounts::default(), launcher: Launcher::default(), null, open_files })
    }

    /// Starts the command, or says which step failed.
    pub fn spawn(&mut self, open: &Open) -> Result<Child, ExecFailed> {
        let user = open.user.as_deref().unwrap_or(&self.config.user);
        let account =
            self.accounts.find(user).map_err(|unknown| failed(ExecFailure::UnknownUser, None, &unknown.0))?;
        let env = environment(&self.config, open, &account.home);
        let cwd = open.cwd.as_deref().unwrap_or(&self.config.workdir);
        let (streams, ends) = streams(open, &account.credentials)
            .map_err(|errno| failed(by_resource(errno), Some(errno), "standard streams"))?;
        let null = self.null.as_fd();
        let stdio = match &ends {
            Ends::Pipes { stdin, stdout, stderr } => {
                [stdin.as_ref().map_or(null, AsFd::as_fd), stdout.as_fd(), stderr.as_fd()]
            }
            Ends::Terminal(slave) => [slave.as_fd(); 3],
        };
        let plan = Plan {
            candidates: candidates(&open.program, &env)?,
            argv: std::iter::once(&open.program)
                .chain(&open.args)
                .map(|text| string([text]))
                .collect::<Result<_, _>>()?,
            env: env.iter().map(|(name, value)| string([name, "=", value])).collect::<Result<_, _>>()?,
            cwd: if cwd.is_empty() || cwd == "/" { None } else { Some(string([cwd])?) },
            credentials: Some(account.credentials).filter(|who| *who != Credentials::default()),
            rlimits: self.rlimits(open),
            stdio,
            tty: open.tty.is_some(),
        };
        match self.launcher.launch(&plan) {
            Ok(pid) => Ok(Child { pid, streams }),
            Err((step, errno)) => Err(explain(step, errno, open, user, cwd)),
        }
    }

    /// The command's own, at their places, and then what it does not say.
    fn rlimits(&self, open: &Open) -> Vec<(u8, u64, u64)> {
        let (soft, hard) = self.open_files;
        let own = open.rlimits.iter().map(|limit| (limit.resource, limit.soft, limit.hard));
        let default = open.rlimits.iter().all(|limit| limit.resource != NOFILE);
        own.chain(default.then_some((NOFILE, soft, hard))).collect()
    }
}

enum Ends {
    Pipes { stdin: Option<OwnedFd>, stdout: OwnedFd, stderr: OwnedFd },
    Terminal(OwnedFd),
}

fn streams(open: &Open, who: &Credentials) -> Result<(Streams, Ends), Errno> {
    if let Some(size) = open.tty {
        let (master, slave) = terminal(size, who)?;
        return Ok((Streams::Terminal(master), Ends::Terminal(slave)));
    }
    let pipe = || pipe_with(PipeFlags::CLOEXEC);
    let (stdin, child_stdin) = if open.stdin {
        let (read, write) = pipe()?;
        fcntl_setfl(&write, OFlags::NONBLOCK)?;
        (Some(write), Some(read))
    } else {
        (None, None)
    };
    let (stdout, child_stdout) = pipe()?;
    let (stderr, child_stderr) = pipe()?;
    fcntl_setfl(&stdout, OFlags::NONBLOCK)?;
    fcntl_setfl(&stderr, OFlags::NONBLOCK)?;
    Ok((
        Streams::Pipes { stdin, stdout, stderr },
        Ends::Pipes { stdin: child_stdin, stdout: child_stdout, stderr: child_stderr },
    ))
}

fn terminal(size: TtySize, who: &Credentials) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    resize(&master, size)?;
    if who.uid != 0 {
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(who.uid)), None)?;
    }
    fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
    Ok((master, slave))
}

/// Sets a terminal's size; the kernel tells its foreground process group.
pub fn resize(master: impl AsFd, size: TtySize) -> Result<(), Errno> {
    tcsetwinsize(master, Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 })
}

fn failed(kind: ExecFailure, errno: Option<Errno>, subject: &str) -> ExecFailed {
    ExecFailed { kind, errno: errno.map_or(0, Errno::raw_os_error), subject: subject.into() }
}

/// The parts as one C string, in one allocation: most of a command's strings are its environment, and it has many.
fn string<const N: usize>(parts: [&str; N]) -> Result<CString, ExecFailed> {
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.len()).sum::<usize>() + 1);
    parts.iter().for_each(|part| bytes.extend_from_slice(part.as_bytes()));
    CString::new(bytes).map_err(|error| {
        let text = String::from_utf8_lossy(&error.into_vec()).replace('\0', "\\0");
        failed(ExecFailure::Other, Some(Errno::INVAL), &text)
    })
}

/// Names and values, every name once.
fn environment<'a>(config: &'a GuestConfig, open: &'a Open, home: &'a str) -> Vec<(&'a str, &'a str)> {
    let mut env: Vec<(&'a str, &'a str)> = Vec::with_capacity(config.env.len() + open.env.len() + 4);
    let mut set = |name, value| match env.iter_mut().find(|(known, _)| *known == name) {
        Some(entry) => entry.1 = value,
        None => env.push((name, value)),
    };
    set("PATH", DEFAULT_PATH);
    set("HOSTNAME", &config.hostname);
    if open.tty.is_some() {
        set("TERM", "xterm");
    }
    set("HOME", home);
    for (name, value) in config.env.iter().chain(&open.env) {
        set(name, value);
    }
    env
}

fn candidates(program: &str, env: &[(&str, &str)]) -> Result<Vec<CString>, ExecFailed> {
    if program.is_empty() {
        return Err(failed(ExecFailure::NotFound, None, program));
    }
    if program.contains(['/', '\0']) {
        return Ok(vec![string([program])?]);
    }
    let path = env.iter().find(|(name, _)| *name == "PATH").map_or(DEFAULT_PATH, |(_, value)| *value);
    let directories = path.split(':').map(|directory| if directory.is_empty() { "." } else { directory });
    directories.map(|directory| string([directory, "/", program])).collect()
}

fn by_resource(errno: Errno) -> ExecFailure {
    match errno {
        Errno::AGAIN => ExecFailure::TooManyProcesses,
        Errno::NOMEM => ExecFailure::OutOfMemory,
        _ => ExecFailure::Other,
    }
}

fn explain(step: Step, errno: Errno, open: &Open, user: &str, cwd: &str) -> ExecFailed {
    let (kind, subject) = match step {
        Step::Fork | Step::Prepare => (by_resource(errno), open.program.clone()),
        Step::Limit(place) => {
            let resource = open.rlimits.get(place).map_or(0, |limit| limit.resource);
            (ExecFailure::BadLimit, format!("rlimit {resource}"))
        }
        Step::Workdir => (ExecFailure::BadWorkdir, cwd.to_owned()),
        Step::Credentials => (by_resource(errno), user.to_owned()),
        Step::Exec => {
            let kind = match errno {
                Errno::NOENT | Errno::NOTDIR => ExecFailure::NotFound,
                Errno::ACCESS | Errno::PERM | Errno::ISDIR | Errno::TXTBSY => ExecFailure::NotExecutable,
                Errno::NOEXEC | Errno::LIBBAD | Errno::INVAL => ExecFailure::BadFormat,
                _ => by_resource(errno),
            };
            (kind, open.program.clone())
        }
    };
    failed(kind, Some(errno), &subject)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_takes_the_last_of_a_name_and_fills_in_what_is_missing() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let config = GuestConfig {
            hostname: "box".into(),
            env: vec![pair("LANG", "C"), pair("PATH", "/opt")],
            ..GuestConfig::default()
        };
        let open =
            Open { env: vec![pair("LANG", "de"), pair("HOME", "/h"), pair("LANG", "fr")], ..Open::default() };
        let env = environment(&config, &open, "/root");
        assert_eq!(env, [("PATH", "/opt"), ("HOSTNAME", "box"), ("HOME", "/h"), ("LANG", "fr")]);
        let open = Open { tty: Some(TtySize { rows: 1, cols: 1 }), ..Open::default() };
        let config = GuestConfig::default();
        let env = environment(&config, &open, "/root");
        assert_eq!(env, [("PATH", DEFAULT_PATH), ("HOSTNAME", ""), ("TERM", "xterm"), ("HOME", "/root")]);
    }

    #[test]
    fn programs_are_looked_up_in_the_commands_path() {
        let env = [("PATH", "/a::/b")];
        assert_eq!(candidates("x", &env).unwrap(), [c"/a/x".into(), c"./x".into(), CString::from(c"/b/x")]);
        assert_eq!(candidates("./x", &env).unwrap(), [CString::from(c"./x")]);
        assert_eq!(candidates("", &env).unwrap_err().kind, ExecFailure::NotFound);
        assert_eq!(candidates("a\0b", &env).unwrap_err().errno, Errno::INVAL.raw_os_error());
    }
}
