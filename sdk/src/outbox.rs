//! What goes out on a connection: whole frames, one after another, whoever gives up waiting. A frame is either taken
//! as a whole or not at all, so that a future that is dropped while it waits leaves no half of one behind.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// Bytes that wait for the socket after which senders wait as well.
const FULL: usize = 256 << 10;

/// The sending end of a connection.
pub(crate) struct Outbox {
    shared: Arc<Shared>,
    runtime: Handle,
}

struct Shared {
    socket: Arc<UnixStream>,
    queue: Mutex<Queue>,
    /// The queue was emptied, or the socket has failed.
    changed: Notify,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<u8>,
    /// How much of `waiting` the socket has taken.
    done: usize,
    /// What moves `waiting` on; there is one while something waits.
    flusher: Option<AbortHandle>,
    broken: bool,
}

/// The socket takes nothing any more. Why is the reader's to say.
#[derive(Debug)]
pub(crate) struct Broken;

impl Outbox {
    /// Of a socket that does not block; in a runtime.
    pub(crate) fn new(socket: Arc<UnixStream>) -> Self {
        let shared = Shared { socket, queue: Mutex::default(), changed: Notify::new() };
        Self { shared: Arc::new(shared), runtime: Handle::current() }
    }

    /// Sends a frame, when those before it have left room.
    pub(crate) async fn send(&self, frame: &[u8]) -> Result<(), Broken> {
        loop {
            let changed = self.shared.changed.notified();
            if self.shared.queue().waiting.len() < FULL {
                return self.push(frame);
            }
            changed.await;
        }
    }

    /// Sends a small frame that nobody waits for, whatever else is waiting.
    pub(crate) fn push(&self, frame: &[u8]) -> Result<(), Broken> {
        let mut queue = self.shared.queue();
        if queue.broken {
            return Err(Broken);
        }
        let taken = if queue.flusher.is_none() { self.shared.write(&mut queue, frame)? } else { 0 };
        let rest = frame.get(taken..).unwrap_or_default();
        queue.waiting.extend_from_slice(rest);
        if queue.flusher.is_none() && !rest.is_empty() {
            let shared = self.shared.clone();
            queue.flusher = Some(self.runtime.spawn(async move { shared.flush().await }).abort_handle());
        }
        Ok(())
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        if let Some(flusher) = &self.shared.queue().flusher {
            flusher.abort();
        }
        // The reader may hold the socket a little longer. One that has failed is shut already.
        let _ = self.shared.socket.shutdown(Shutdown::Write);
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes as much of `bytes` as the socket takes now.
    fn write(&self, queue: &mut Queue, bytes: &[u8]) -> Result<usize, Broken> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match (&*self.socket).write(rest) {
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(queue.fail()),
            }
        }
        Ok(done)
    }

    /// Moves on what waits, until nothing does.
    async fn flush(&self) {
        // The socket is watched for room only while it is full, and by a descriptor of its own: each read of the other
        // end makes more room, and to be told of that would wake the runtime once for each frame that it sends.
        let room = self.socket.try_clone().and_then(|socket| watch(Arc::new(socket), Interest::WRITABLE));
        loop {
            let writable = match &room {
                Ok(room) => room.writable().await.map_err(|_| Broken),
                Err(_) => Err(Broken),
            };
            let mut queue = self.queue();
            let waiting = std::mem::take(&mut queue.waiting);
            let rest = waiting.get(queue.done..).unwrap_or_default();
            let written = match writable {
                Ok(mut writable) => self.write(&mut queue, rest).inspect(|count| {
                    if *count < rest.len() {
                        writable.clear_ready();
                    }
                }),
                Err(Broken) => Err(queue.fail()),
            };
            if let Ok(count) = written
                && count < rest.len()
            {
                queue.done += count;
                queue.waiting = waiting;
                continue;
            }
            queue.done = 0;
            queue.flusher = None;
            self.changed.notify_waiters();
            return;
        }
    }
}

/// Has the runtime watch a socket for one thing alone. The types of `tokio::net` for sockets are watched for both.
#[expect(
    deprecated,
    reason = "sound for what owns its descriptor; what takes its place is unsafe for the others' sake"
)]
pub(crate) fn watch(socket: Arc<UnixStream>, interest: Interest) -> io::Result<AsyncFd<Arc<UnixStream>>> {
    AsyncFd::with_interest(socket, interest)
}

impl Queue {
    fn fail(&mut self) -> Broken {
        self.broken = true;
        Broken
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cubby_protocol::{Decoder, Kind, SessionId, encode_raw};
    use tokio::io::AsyncReadExt;
    use tokio::time::timeout;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(20);

    fn frame(session: u32, size: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode_raw(Kind::Stdin, SessionId(session), &vec![7; size], &mut bytes).unwrap();
        bytes
    }

    /// An outbox, and the socket's other end.
    fn outbox() -> (Outbox, tokio::net::UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        for socket in [&ours, &theirs] {
            socket.set_nonblocking(true).unwrap();
        }
        (Outbox::new(Arc::new(ours)), tokio::net::UnixStream::from_std(theirs).unwrap())
    }

    #[tokio::test]
    async fn who_gives_up_waiting_leaves_no_half_of_a_frame() {
        let (outbox, mut theirs) = outbox();
        let mut sent = 0;
        // Nobody reads: sooner or later one has to wait, and is called off.
        while timeout(MOMENT, outbox.send(&frame(sent + 1, 60_000))).await.is_ok() {
            sent += 1;
        }
        assert!(sent > 0);
        // What nobody waits for goes out nevertheless, and in its turn.
        outbox.push(&frame(sent + 1, 10)).unwrap();
        let (mut decoder, mut next) = (Decoder::default(), 1);
        while next <= sent + 1 {
            let count =
                timeout(Duration::from_secs(60), theirs.read(decoder.space())).await.unwrap().unwrap();
            assert!(count > 0);
            decoder.filled(count);
            while let Some(frame) = decoder.next_frame().unwrap() {
                assert_eq!(frame.header.session, SessionId(next));
                assert_eq!(frame.payload().len(), if next <= sent { 60_000 } else { 10 });
                next += 1;
            }
        }
        // And there is room again.
        timeout(Duration::from_secs(60), outbox.send(&frame(1, 1))).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_fails_fails_everybody_who_waits_for_it() {
        let (outbox, theirs) = outbox();
        let outbox = Arc::new(outbox);
        while timeout(MOMENT, outbox.send(&frame(1, 60_000))).await.is_ok() {}
        let waiting = tokio::spawn({
            let outbox = outbox.clone();
            async move { outbox.send(&frame(2, 10)).await.is_err() }
        });
        tokio::task::yield_now().await;
        drop(theirs);
        assert!(timeout(Duration::from_secs(60), waiting).await.unwrap().unwrap());
        assert!(outbox.push(&frame(3, 10)).is_err());
    }
}
