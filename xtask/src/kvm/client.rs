//! One command on the KVM test machine, as if it ran here: same directory and environment, its output as it comes, its
//! exit status. When this process ends, by Ctrl-C for one, the connection closes and the command is ended.

use std::ffi::OsString;
use std::io::{IsTerminal, Read, Write, stderr, stdin, stdout};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::machine::{self, Mode};
use super::wire::{Frame, Request, receive, send};
use crate::{cache, workspace};

/// What [`run`] is asked for.
pub struct Options {
    /// Which machine.
    pub mode: Mode,
    /// Directories to share writable, besides the checkout, the target directory and the cache.
    pub writable: Vec<PathBuf>,
    /// When to give up.
    pub timeout: Option<Duration>,
    /// A machine for this command alone.
    pub fresh: bool,
}

impl Options {
    /// Nothing special.
    pub fn new(mode: Mode) -> Self {
        Self { mode, writable: vec![], timeout: None, fresh: false }
    }
}

/// The exit status of a command that was given up.
const TIMED_OUT: u8 = 124;

/// Runs the command and returns its exit status.
pub fn run(options: &Options, command: &[OsString]) -> Result<u8> {
    let request = request(options, command)?;
    // A machine that was about to end may have closed the connection before the server said hello.
    for _ in 0..3 {
        let mut server = machine::connect(options.mode, options.fresh)?;
        if let Ok(Some(Frame::Hello)) = receive(&mut server) {
            send(&mut server, &Frame::Request(request))?;
            return converse(server, options.timeout);
        }
    }
    bail!("the KVM test machine closes every connection");
}

fn request(options: &Options, command: &[OsString]) -> Result<Request> {
    let bytes = |text: OsString| text.into_vec();
    let mut shared = vec![workspace::root()?, workspace::target()?, cache::root()?];
    for dir in &options.writable {
        shared.push(dir.canonicalize()?);
    }
    // What the machine has of its own: its memory disks, and the names of this computer's sessions.
    let own = ["TMPDIR", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "SSH_AUTH_SOCK"];
    let environment = std::env::vars_os().filter(|(name, _)| !own.iter().any(|own| name == own));
    // The instruction clock counts a repeated string instruction once for each byte, which no processor's clock does.
    // Without AVX the C library clears 2 KiB and more with one; with AVX it did not on this machine.
    let tunables = ("GLIBC_TUNABLES".into(), "glibc.cpu.x86_rep_stosb_threshold=1000000".into());
    let environment = environment.chain((options.mode == Mode::Icount).then_some(tunables));
    Ok(Request {
        arguments: command.iter().cloned().map(bytes).collect(),
        environment: environment.map(|(name, value)| (bytes(name), bytes(value))).collect(),
        directory: std::env::current_dir()?.into_os_string().into_vec(),
        shared: shared.iter().map(|dir| dir.as_os_str().as_bytes().to_vec()).collect(),
        user: rustix::process::getuid().as_raw(),
        group: rustix::process::getgid().as_raw(),
    })
}

fn converse(mut server: UnixStream, timeout: Option<Duration>) -> Result<u8> {
    let to_server = server.try_clone()?;
    // A terminal's input stays with the shell: the machine offers none.
    if stdin().is_terminal() {
        send(&mut &to_server, &Frame::Stdin(vec![]))?;
    } else {
        thread::spawn(move || forward_stdin(&to_server));
    }
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            // A timeout of zero would mean none.
            server.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        }
        match receive(&mut server) {
            Ok(Some(Frame::Stdout(bytes))) => show(stdout(), &bytes)?,
            Ok(Some(Frame::Stderr(bytes))) => show(stderr(), &bytes)?,
            Ok(Some(Frame::Exit(code))) => return Ok(code),
            Ok(Some(Frame::Failed(why))) => bail!("{why}"),
            Ok(Some(other)) => bail!("the KVM test machine sent {other:?}"),
            Ok(None) => bail!("the KVM test machine ended before the command"),
            Err(_) if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                eprintln!("xtask: no end within the time given; the command is ended");
                return Ok(TIMED_OUT);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn show(mut to: impl Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes)?;
    Ok(to.flush()?)
}

fn forward_stdin(mut server: &UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = stdin().read(&mut buffer).unwrap_or(0);
        let bytes = buffer.get(..count).unwrap_or_default().to_vec();
        if send(&mut server, &Frame::Stdin(bytes)).is_err() || count == 0 {
            return;
        }
    }
}
