//! Starting a sandbox process and hearing how its boot went.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cubby_state::launch::{MAX_LINE, from_line, to_line};
use cubby_state::{ExitReason, LaunchReport, LaunchSpec};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use crate::children;
use crate::error::{Error, R};

/// The sandbox process's binary.
const BINARY: &str = "cubby-sandbox";

/// Finds the sandbox process's binary: the builder's, `CUBBY_RUNTIME`, beside this program, `PATH`.
pub(crate) fn find_runtime(own: Option<&Path>) -> R<PathBuf> {
    let named = own.map(Path::to_owned).or_else(|| std::env::var_os("CUBBY_RUNTIME").map(PathBuf::from));
    let candidates: Vec<PathBuf> = match named {
        // A name that was given is meant; another binary in its place would be a surprise.
        Some(path) => vec![path],
        None => {
            let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(BINARY)));
            let path = std::env::var_os("PATH").unwrap_or_default();
            beside.into_iter().chain(std::env::split_paths(&path).map(|dir| dir.join(BINARY))).collect()
        }
    };
    match candidates.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => Err(Error::RuntimeNotFound { looked_at: candidates }),
    }
}

/// One step of a boot and how long it took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootPhase {
    /// What was done: `spawn`, `kvm`, `load`, `devices`, `kernel`, `configuration`, `root`, `agent`, `ready`.
    pub name: String,
    /// How long it took.
    pub duration: Duration,
}

/// Starts the sandbox process for `spec` and waits until its guest is ready.
pub(crate) async fn launch(runtime: &Path, spec: &LaunchSpec) -> R<Vec<BootPhase>> {
    let failed = |why: String| Error::Process { name: spec.name.to_string(), why };
    let begin = Instant::now();
    let (ours, theirs) = UnixStream::pair().map_err(|error| failed(format!("its socket: {error}")))?;
    let line = to_line(spec).map_err(|error| failed(error.to_string()))?;
    let log = spec.home.sandbox(&spec.name).join("process.log");
    let log_file =
        OpenOptions::new().create(true).read(true).write(true).truncate(true).mode(0o600).open(&log);
    let log_failed = |source| Error::File { path: log.clone(), source };
    let log_file = log_file.map_err(log_failed)?;
    let log_copy = log_file.try_clone().map_err(log_failed)?;
    let child = Command::new(runtime)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::from(log_file))
        .current_dir("/")
        // A terminal's Ctrl-C is the application's to handle.
        .process_group(0)
        .spawn()
        .map_err(|error| failed(format!("{}: {error}", runtime.display())))?;
    let reported = exchange(&ours, &line).await;
    let held = ours.set_nonblocking(false).and_then(|()| children::watch(child, ours));
    held.map_err(|error| failed(format!("watching it: {error}")))?;
    match reported {
        Ok(LaunchReport::Ready { boot }) => Ok(phases(&boot, begin.elapsed())),
        Ok(LaunchReport::Failed { reason, message, remedy, console_tail }) => {
            Err(boot_failed(spec, reason, message, remedy, console_tail))
        }
        Err(error) => {
            let wrote = last_of(&log_copy);
            Err(failed(format!("it ended before it reported ({error}); it wrote: {}", wrote.trim_end())))
        }
    }
}

/// The last of what a sandbox process wrote. By now its file may have no name any more.
fn last_of(log: &File) -> String {
    const MOST: u64 = 4096;
    let length = log.metadata().map_or(0, |meta| meta.len());
    let mut bytes = vec![0; usize::try_from(length.min(MOST)).unwrap_or(0)];
    match log.read_exact_at(&mut bytes, length.saturating_sub(MOST)) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}

async fn exchange(socket: &UnixStream, line: &[u8]) -> std::io::Result<LaunchReport> {
    let socket = socket.try_clone()?;
    socket.set_nonblocking(true)?;
    let mut socket = tokio::net::UnixStream::from_std(socket)?;
    socket.write_all(line).await?;
    let mut socket = BufReader::new(socket).take(MAX_LINE as u64);
    let mut line = Vec::new();
    socket.read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let report = from_line(&line).map_err(std::io::Error::other)?;
    if matches!(report, LaunchReport::Failed { .. }) {
        // It still writes how it ended, in better words than ours, and closes the socket by ending.
        let ended = socket.read_to_end(&mut line);
        let _ = tokio::time::timeout(Duration::from_secs(5), ended).await;
    }
    Ok(report)
}

/// Ends of steps, counted from the process's begin, as durations; what came before is `spawn`.
fn phases(ends: &[(String, u64)], total: Duration) -> Vec<BootPhase> {
    let inside = Duration::from_nanos(ends.last().map_or(0, |(_, end)| *end));
    let spawn = BootPhase { name: "spawn".into(), duration: total.saturating_sub(inside) };
    let starts = std::iter::once(0).chain(ends.iter().map(|(_, end)| *end));
    let steps = ends.iter().zip(starts).map(|((name, end), start)| BootPhase {
        name: name.clone(),
        duration: Duration::from_nanos(end.saturating_sub(start)),
    });
    std::iter::once(spawn).chain(steps).collect()
}

fn boot_failed(
    spec: &LaunchSpec,
    reason: ExitReason,
    message: String,
    remedy: Option<String>,
    console_tail: Option<String>,
) -> Error {
    match reason {
        ExitReason::HostUnsupported => {
            Error::HostUnsupported { why: message, remedy: remedy.unwrap_or_default() }
        }
        ExitReason::BootFailed { stage } => {
            let message = match remedy {
                Some(remedy) => format!("{message}; {remedy}"),
                None => message,
            };
            Error::BootFailed { name: spec.name.to_string(), stage, message, console_tail }
        }
        reason => Error::Process { name: spec.name.to_string(), why: format!("{message} ({reason:?})") },
    }
}
