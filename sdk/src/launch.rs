//! Starting a sandbox process and hearing how its boot went.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cubby_state::launch::{MAX_LINE, from_line, to_line};
use cubby_state::{ExitReason, LaunchReport, LaunchSpec, RunLock, liveness};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::{sleep, timeout};

use crate::children;
use crate::error::{Error, R};

/// The sandbox process's binary.
const BINARY: &str = "cubby-sandbox";

/// How long a sandbox process may be silent after its boot's own time-out, and after its wait for the lock.
const SILENCE: Duration = Duration::from_secs(5);

/// How often it is looked whether somebody is there who could answer: more rarely than most boots take.
const LOOK: Duration = Duration::from_secs(1);

/// How long an answer may be on its way when nobody is left who could give one.
const LAST_ANSWER: Duration = Duration::from_millis(100);

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
    let mut started = Started(Some(child));
    let bound = Duration::from_millis(spec.boot_timeout_ms) + RunLock::PATIENCE + SILENCE;
    let reported = answer(&ours, &line, started.pid(), &spec.lock, bound).await;
    if reported.is_err()
        && let Some(group) = started.pid()
    {
        // It is its own group's leader and nobody has waited for it: the group is no other. What is of no use to
        // this application must not be left to it, and to nobody else.
        let _ = kill_process_group(group, Signal::KILL);
    }
    let held = ours.set_nonblocking(false).and_then(|()| match started.0.take() {
        Some(child) => children::watch(child, Some(ours)),
        None => Ok(()),
    });
    held.map_err(|error| failed(format!("watching it: {error}")))?;
    match reported {
        Ok(LaunchReport::Ready { boot }) => Ok(phases(&boot, begin.elapsed())),
        Ok(LaunchReport::Failed { port: Some(address), message: why, .. }) => {
            Err(Error::PortUnavailable { name: spec.name.to_string(), address, why })
        }
        Ok(LaunchReport::Failed { reason, message, remedy, console_tail, .. }) => {
            Err(boot_failed(spec, reason, message, remedy, console_tail))
        }
        Err(error) => {
            let wrote = last_of(&log_copy);
            Err(failed(format!("it did not report ({error}); it wrote: {}", wrote.trim_end())))
        }
    }
}

/// A process that was started and is nobody's yet. If its launch is called off, somebody still waits for it; the socket
/// that closes with the launch ends it.
struct Started(Option<Child>);

impl Started {
    fn pid(&self) -> Option<Pid> {
        self.0.as_ref().and_then(|child| i32::try_from(child.id()).ok()).and_then(Pid::from_raw)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = self.0.take() {
            // Without a descriptor or thread left, a zombie stays until this program ends.
            let _ = children::watch(child, None);
        }
    }
}

/// What the process answers to the specification in `line`, or why it will not.
///
/// The end of `socket` says that nobody answers any more, but it may not come: whatever the process has started can hold
/// the other end as well. So its own end counts, and if it does not end either, `bound`.
async fn answer(
    socket: &UnixStream,
    line: &[u8],
    process: Option<Pid>,
    lock: &Path,
    bound: Duration,
) -> std::io::Result<LaunchReport> {
    let mut exchange = std::pin::pin!(timeout(bound, exchange(socket, line)));
    let answered = tokio::select! {
        answered = &mut exchange => answered,
        () = abandoned(process, lock) => match timeout(LAST_ANSWER, &mut exchange).await {
            Ok(answered) => answered,
            Err(_) => return Err(std::io::Error::other("it is gone, and what it has started is not")),
        },
    };
    answered.unwrap_or_else(|_| Err(std::io::Error::other(format!("nothing came for {} s", bound.as_secs()))))
}

/// Waits until neither what was started is there nor a sandbox process, which goes on if its keeper alone is killed.
async fn abandoned(process: Option<Pid>, lock: &Path) {
    let Some(process) = process else { return std::future::pending().await };
    // It is not waited for: its number stays its own.
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    loop {
        sleep(LOOK).await;
        let ended = !matches!(waitid(WaitId::Pid(process), look), Ok(None));
        if ended && liveness::is_held(lock).is_ok_and(|held| !held) {
            return;
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
        let _ = timeout(Duration::from_secs(5), ended).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers of a shell script that gets the socket as its standard input, and how long that took.
    async fn answer_of(script: &str, bound: Duration) -> (std::io::Result<LaunchReport>, Duration) {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new("sh");
        let child =
            command.args(["-c", script]).stdin(OwnedFd::from(theirs)).process_group(0).spawn().unwrap();
        drop(command);
        let started = Started(Some(child));
        let begin = Instant::now();
        let answered = answer(&ours, b"{}\n", started.pid(), &dir.path().join("lock"), bound).await;
        let took = begin.elapsed();
        let _ = kill_process_group(started.pid().unwrap(), Signal::KILL);
        (answered, took)
    }

    const LONG: Duration = Duration::from_secs(60);
    const READY: &str = r#"read line; echo '{"result":"ready","boot":[]}' >&0;"#;

    #[tokio::test]
    async fn a_process_that_ends_while_others_hold_its_socket_is_not_waited_for() {
        let (answered, took) = answer_of("exec 3<&0; sleep 100 <&3 & exit 3", LONG).await;
        assert!(answered.unwrap_err().to_string().contains("is gone"));
        assert!(took < LONG / 2, "it took {took:?}");
    }

    #[tokio::test]
    async fn a_process_that_says_nothing_has_its_time() {
        let (answered, took) = answer_of("sleep 100", Duration::from_millis(300)).await;
        assert!(answered.unwrap_err().to_string().contains("nothing came"));
        assert!(took < LONG / 2, "it took {took:?}");
    }

    #[tokio::test]
    async fn what_a_process_says_last_is_heard_although_others_hold_its_socket() {
        let (answered, _) = answer_of(&format!("exec 3<&0; sleep 100 <&3 & {READY} exit 3"), LONG).await;
        assert_eq!(answered.unwrap(), LaunchReport::Ready { boot: Vec::new() });
    }
}
