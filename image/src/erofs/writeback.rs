//! Has the system write the disk out while it is still being made, so that little is left for the sync at
//! the end. The thread holds the file until it has nothing to do.
use std::{
    fs::File,
    io,
    sync::mpsc::{SyncSender, sync_channel},
    thread::{self, JoinHandle},
};

/// Bytes written between two requests.
const EVERY: u64 = 32 << 20;

pub(super) struct Writeback {
    requests: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
    pending: u64,
}

impl Writeback {
    /// For `file`, whose position nobody uses.
    pub(super) fn start(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (requests, incoming) = sync_channel(1);
        let work = move || incoming.iter().try_for_each(|()| file.sync_data());
        let thread = thread::Builder::new().name("image-writeback".to_owned()).spawn(work)?;
        Ok(Self { requests, thread, pending: 0 })
    }

    /// So many bytes more have been written.
    pub(super) fn wrote(&mut self, bytes: usize) {
        self.pending += bytes as u64;
        if self.pending >= EVERY {
            self.pending = 0;
            // One request at a time is enough; it covers whatever was written before it starts.
            let _ = self.requests.try_send(());
        }
    }

    /// Waits for the thread, which reports an error if it met one: the system tells each only once.
    pub(super) fn finish(self) -> io::Result<()> {
        drop(self.requests);
        self.thread.join().unwrap_or(Ok(()))
    }
}
