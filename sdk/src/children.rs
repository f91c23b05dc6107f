//! The sandbox processes that this process started: one thread waits for their ends, takes their exit statuses,
//! and holds the sockets whose end tells an attached sandbox that its application is gone.
//!
//! What was started is the keeper of a sandbox process, which ends right after it. If somebody kills the keeper
//! alone, the sandbox goes on: the keeper is waited for, and the socket held as before.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::{io, thread};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A keeper and the launch socket of its sandbox; both are waited for, and then `None`.
struct Watched {
    child: Option<(Child, OwnedFd)>,
    /// The sandbox process and its keeper close their ends only by ending.
    socket: Option<UnixStream>,
}

/// The thread's inbox, and how to wake it.
struct Watcher {
    arrived: Mutex<Vec<Watched>>,
    wake: UnixStream,
}

/// Holds `socket`, if there is one, open until its other end is closed, and waits for `child`, so that no zombie stays.
///
/// # Errors
/// What the system says when it has no descriptor or thread left.
pub(crate) fn watch(child: Child, socket: Option<UnixStream>) -> io::Result<()> {
    let watcher = watcher()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let watched = Watched { child: Some((child, ended)), socket };
    watcher.arrived.lock().unwrap_or_else(PoisonError::into_inner).push(watched);
    // A full socket means that the thread is about to look anyway.
    let _ = io::Write::write(&mut &watcher.wake, &[0]);
    Ok(())
}

fn watcher() -> io::Result<&'static Watcher> {
    static WATCHER: OnceLock<Watcher> = OnceLock::new();
    static STARTING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(watcher) = WATCHER.get() {
        return Ok(watcher);
    }
    let (wake, woken) = UnixStream::pair()?;
    wake.set_nonblocking(true)?;
    woken.set_nonblocking(true)?;
    let watcher = WATCHER.get_or_init(|| Watcher { arrived: Mutex::new(Vec::new()), wake });
    thread::Builder::new().name("cubbyhole-children".into()).spawn(move || live(watcher, &woken))?;
    Ok(watcher)
}

/// Waits for ends, for as long as the process lives.
fn live(watcher: &Watcher, woken: &UnixStream) {
    let mut watched: Vec<Watched> = Vec::new();
    loop {
        watched.append(&mut watcher.arrived.lock().unwrap_or_else(PoisonError::into_inner));
        let sources = watched.iter().flat_map(|one| {
            let ended = one.child.as_ref().map(|(_, ended)| ended.as_fd());
            [ended, one.socket.as_ref().map(AsFd::as_fd)]
        });
        let mut descriptors: Vec<PollFd<'_>> = std::iter::once(woken.as_fd())
            .chain(sources.flatten())
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        if poll(&mut descriptors, None).is_err() {
            continue;
        }
        let happened: Vec<bool> = descriptors.iter().skip(1).map(|fd| !fd.revents().is_empty()).collect();
        drop(descriptors);
        let _ = io::Read::read(&mut &*woken, &mut [0; 64]);
        let mut happened = happened.into_iter();
        for one in &mut watched {
            // In the order in which they were asked about.
            if one.child.is_some()
                && happened.next() == Some(true)
                && let Some((mut child, _)) = one.child.take()
            {
                let _ = child.wait();
            }
            if one.socket.is_some() && happened.next() == Some(true) {
                one.socket = None;
            }
        }
        watched.retain(|one| one.child.is_some() || one.socket.is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    /// Waits until the zombie of a child, and with it its entry in /proc, is gone.
    fn reaped(pid: u32) {
        while std::path::Path::new(&format!("/proc/{pid}")).exists() {
            thread::yield_now();
        }
    }

    #[test]
    fn a_keeper_that_is_killed_leaves_no_zombie_and_its_sandbox_the_socket() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // The sandbox process in this play is the test itself: it holds the other end.
        let mut child = Command::new("cat")
            .stdin(Stdio::from(OwnedFd::from(theirs.try_clone().unwrap())))
            .spawn()
            .unwrap();
        let pid = child.id();
        child.kill().unwrap();
        watch(child, Some(ours)).unwrap();
        reaped(pid);
        (&theirs).write_all(b"still there").unwrap();
        theirs.shutdown(std::net::Shutdown::Both).unwrap();
    }

    #[test]
    fn a_child_that_ends_leaves_no_zombie_and_no_open_socket() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new("cat").stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
        let pid = child.id();
        let mut other_end = ours.try_clone().unwrap();
        watch(child, Some(ours)).unwrap();
        // `cat` ends at the end of its input.
        other_end.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(other_end.read(&mut [0; 1]).unwrap(), 0);
        reaped(pid);
    }
}
