//! The way into a running command, apart from its output: what one task reads, another may feed.
//!
//! How much the command takes is its guest's to say, and arrives with its output; [`Room`] is what both sides of a
//! handle share of it.

use std::sync::Arc;

use cubby_protocol::message::{Signal, TtySize};
use cubby_protocol::{CHUNK, Kind};
use tokio::sync::Semaphore;

use crate::connection::{ConnectionError, SessionOut};
use crate::error::{Error, R};
use crate::link::Link;

/// How much standard input a command takes now, in bytes. Clones share it.
#[derive(Clone)]
pub(crate) struct Room(Arc<Semaphore>);

impl Room {
    /// More than any window: what a guest grants beyond it is of no use, and must not overflow.
    const MOST: usize = u32::MAX as usize;

    pub(crate) fn new(bytes: u32) -> Self {
        Self(Arc::new(Semaphore::new(bytes as usize)))
    }

    /// How much there is.
    pub(crate) fn now(&self) -> usize {
        self.0.available_permits()
    }

    pub(crate) fn add(&self, bytes: u32) {
        self.0.add_permits((bytes as usize).min(Self::MOST - self.now().min(Self::MOST)));
    }

    /// Takes what there is, `most` at most.
    pub(crate) fn take(&self, most: usize) -> usize {
        self.0.forget_permits(most)
    }

    /// Takes 1 to `most`, and waits for the first; `None` once the command has ended.
    async fn wait(&self, most: usize) -> Option<usize> {
        self.0.acquire().await.ok()?.forget();
        Some(1 + self.take(most.saturating_sub(1)))
    }

    /// Nobody will take anything any more.
    pub(crate) fn close(&self) {
        self.0.close();
    }
}

/// The way into a running command ([`ExecHandle::input`](crate::ExecHandle::input)). Clones lead to the same command.
/// Dropping them ends nothing: the command's input ends with [`ExecInput::close`].
#[derive(Clone)]
pub struct ExecInput {
    pub(crate) out: SessionOut,
    pub(crate) room: Room,
    pub(crate) program: Arc<str>,
    pub(crate) link: Arc<Link>,
}

impl ExecInput {
    /// Writes to the command's standard input; waits while the command does not read, which goes on only while somebody
    /// reads its output. Fails with [`Error::ExecEnded`] once the command has ended.
    ///
    /// A write that is called off has written some of its bytes, or none.
    pub async fn write(&self, bytes: impl AsRef<[u8]>) -> R<()> {
        let mut rest = bytes.as_ref();
        while !rest.is_empty() {
            let Some(room) = self.room.wait(rest.len().min(CHUNK)).await else {
                return Err(Error::ExecEnded { program: self.program.to_string() });
            };
            let (now, later) = rest.split_at(room);
            self.or_lost(self.out.send_raw(Kind::Stdin, now).await).await?;
            rest = later;
        }
        Ok(())
    }

    /// Ends the command's standard input.
    pub async fn close(&self) -> R<()> {
        self.or_lost(self.out.send_raw(Kind::StdinClose, &[]).await).await
    }

    /// Sends a signal to the command's process group.
    pub async fn signal(&self, number: i32) -> R<()> {
        self.or_lost(self.out.send(Kind::Signal, &Signal { number }).await).await
    }

    /// Tells the command's terminal its new size.
    pub async fn resize(&self, rows: u16, cols: u16) -> R<()> {
        self.or_lost(self.out.send(Kind::Resize, &TtySize { rows, cols }).await).await
    }

    async fn or_lost(&self, result: Result<(), ConnectionError>) -> R<()> {
        match result {
            Ok(()) => Ok(()),
            Err(error) => Err(self.link.lost(error, &format!("exec {:?}", self.program)).await),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn room_is_taken_once_waited_for_and_bounded() {
        let room = Room::new(5);
        assert_eq!(room.take(3), 3);
        assert_eq!(room.wait(9).await, Some(2));
        let waiting = tokio::spawn({
            let room = room.clone();
            async move { room.wait(100).await }
        });
        tokio::task::yield_now().await;
        room.add(7);
        let taken = waiting.await.unwrap().unwrap();
        assert_eq!(taken + room.now(), 7);
        // A guest may grant whatever it likes.
        for _ in 0..3 {
            room.add(u32::MAX);
        }
        assert_eq!(room.now(), Room::MOST);
        room.take(usize::MAX);
        room.close();
        assert_eq!(room.wait(1).await, None);
    }
}
