//! The console's way to the log: a vCPU's thread leaves here what the guest writes, and the main thread takes it.
//!
//! The guest writes byte by byte, each for an exit of its virtual machine. The main thread is woken for whole lines, and
//! for what has no end; more than [`MAX_WAITING`] bytes are counted and lost.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Bytes that may wait for the main thread.
const MAX_WAITING: usize = 64 << 10;

/// Bytes without the end of a line after which it is woken nevertheless.
const LINE: usize = 1 << 10;

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    missing: u64,
    /// The main thread knows.
    told: bool,
}

/// Where console output waits.
#[derive(Clone)]
pub(crate) struct ConsoleTap {
    waiting: Arc<Mutex<Waiting>>,
    wake: Arc<EventFd>,
}

impl ConsoleTap {
    pub(crate) fn new() -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        Ok(Self { waiting: Arc::default(), wake })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is readable when there is something to take.
    pub(crate) fn event(&self) -> &EventFd {
        &self.wake
    }

    /// What the guest has written since the last time, and how many bytes of it were lost.
    pub(crate) fn take(&self) -> (Vec<u8>, u64) {
        let mut waiting = self.lock();
        if std::mem::take(&mut waiting.told) {
            // It was written before, so it does not block.
            let _ = self.wake.read();
        }
        (std::mem::take(&mut waiting.bytes), std::mem::take(&mut waiting.missing))
    }

    /// A writer for the console that gives everything to `other` as well, as long as that takes it.
    pub(crate) fn with(&self, other: Box<dyn Write + Send>) -> Box<dyn Write + Send> {
        Box::new(Tee { tap: self.clone(), other: Some(other) })
    }

    fn put(&self, bytes: &[u8]) {
        let mut waiting = self.lock();
        let room = MAX_WAITING - waiting.bytes.len().min(MAX_WAITING);
        let (now, lost) = bytes.split_at(bytes.len().min(room));
        waiting.bytes.extend_from_slice(now);
        waiting.missing = waiting.missing.saturating_add(lost.len() as u64);
        if !waiting.told && (bytes.contains(&b'\n') || waiting.bytes.len() >= LINE) {
            waiting.told = self.wake.write(1).is_ok();
        }
    }
}

struct Tee {
    tap: ConsoleTap,
    other: Option<Box<dyn Write + Send>>,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tap.put(bytes);
        if let Some(other) = &mut self.other
            && other.write_all(bytes).is_err()
        {
            self.other = None;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_wake_and_what_is_too_much_is_counted() {
        let tap = ConsoleTap::new().unwrap();
        let mut console = tap.with(Box::new(io::sink()));
        console.write_all(b"no end").unwrap();
        assert!(tap.event().read().is_err(), "nobody is woken for it");
        console.write_all(b"\nmore").unwrap();
        assert_eq!(tap.take(), (b"no end\nmore".to_vec(), 0));
        assert!(tap.event().read().is_err(), "what was taken wakes nobody");
        for _ in 0..2 {
            console.write_all(&[b'x'; MAX_WAITING]).unwrap();
        }
        assert_eq!(tap.event().read().unwrap(), 1);
        let (bytes, missing) = tap.take();
        assert_eq!((bytes.len(), missing), (MAX_WAITING, MAX_WAITING as u64));
    }

    #[test]
    fn the_other_listener_may_fail() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::Error::other("full"))
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let tap = ConsoleTap::new().unwrap();
        let mut console = tap.with(Box::new(Full));
        console.write_all(b"one\n").unwrap();
        console.write_all(b"two\n").unwrap();
        assert_eq!(tap.take().0, b"one\ntwo\n");
    }
}
