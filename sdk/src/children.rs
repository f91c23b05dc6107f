//! The sandbox processes that this process started: one thread waits for their ends, takes their exit statuses,
//! and holds the sockets whose end tells an attached sandbox that its application is gone.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::{io, thread};

use rustix::event::{PollFd, PollFlags, poll};

/// A sandbox process and its launch socket, held until it ends.
struct Watched {
    child: Child,
    socket: UnixStream,
}

/// The thread's inbox, and how to wake it.
struct Watcher {
    arrived: Mutex<Vec<Watched>>,
    wake: UnixStream,
}

/// Holds `socket` open until `child` ends, and then waits for it, so that no zombie stays.
///
/// # Errors
/// What the system says when it has no descriptor or thread left.
pub(crate) fn watch(child: Child, socket: UnixStream) -> io::Result<()> {
    let watcher = watcher()?;
    watcher.arrived.lock().unwrap_or_else(PoisonError::into_inner).push(Watched { child, socket });
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
        let mut descriptors: Vec<PollFd<'_>> = std::iter::once(woken.as_fd())
            .chain(watched.iter().map(|one| one.socket.as_fd()))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        if poll(&mut descriptors, None).is_err() {
            continue;
        }
        let mut ended =
            descriptors.iter().skip(1).map(|fd| !fd.revents().is_empty()).collect::<Vec<_>>().into_iter();
        drop(descriptors);
        let _ = io::Read::read(&mut &*woken, &mut [0; 64]);
        let (gone, stay): (Vec<_>, Vec<_>) = watched.into_iter().partition(|_| ended.next().unwrap_or(false));
        watched = stay;
        for Watched { mut child, socket } in gone {
            // The sandbox process closes its end only by ending.
            drop(socket);
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::{Command, Stdio};

    #[test]
    fn a_child_that_ends_leaves_no_zombie_and_no_open_socket() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child =
            Command::new("cat").stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs))).spawn().unwrap();
        let pid = child.id();
        let mut other_end = ours.try_clone().unwrap();
        watch(child, ours).unwrap();
        // `cat` ends at the end of its input.
        other_end.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(other_end.read(&mut [0; 1]).unwrap(), 0);
        // Its zombie, and with it its entry in /proc, goes once the thread has waited for it.
        while std::path::Path::new(&format!("/proc/{pid}")).exists() {
            thread::yield_now();
        }
    }
}
