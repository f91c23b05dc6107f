//! A guest's file as it is written.

use std::path::Path;
use std::sync::Arc;

use cubby_protocol::message::{Credit, FileHole, FileRequest};
use cubby_protocol::{CHUNK, INITIAL_WINDOW, Kind, decode, encode, encode_raw};

use super::call::{Call, Said, nonsense};
use super::{WriteOptions, bytes};
use crate::error::R;
use crate::link::Link;

/// A file that is being written. Call [`FileWriter::finish`] at the end, which tells whether all went well. Dropped before
/// that, a file has some of its bytes; one that is written atomically has the old ones.
pub struct FileWriter {
    call: Call,
    /// How much the guest takes now.
    room: u64,
}

fn request(path: &Path, options: &WriteOptions) -> FileRequest {
    let WriteOptions { how, attributes, sync } = *options;
    FileRequest::Write { path: bytes(path), how, attributes, sync }
}

impl FileWriter {
    pub(super) async fn open(link: &Arc<Link>, path: &Path, options: &WriteOptions) -> R<Self> {
        let call = Call::begin(link, "write", path, &request(path, options), |_, _| Ok(())).await?;
        Ok(Self { call, room: INITIAL_WINDOW.into() })
    }

    /// A file whose bytes are all here. A small one is one message.
    pub(super) async fn write_whole(
        link: &Arc<Link>,
        path: &Path,
        options: &WriteOptions,
        bytes: &[u8],
    ) -> R<()> {
        if bytes.len() > CHUNK {
            let mut writer = Self::open(link, path, options).await?;
            writer.write(bytes).await?;
            return writer.finish().await;
        }
        let more = |id, out: &mut Vec<u8>| {
            if !bytes.is_empty() {
                encode_raw(Kind::FileData, id, bytes, out)?;
            }
            encode_raw(Kind::FileEnd, id, &[], out)
        };
        Call::begin(link, "write", path, &request(path, options), more).await?.done().await.map(drop)
    }

    /// Writes the next bytes; waits while the guest does not take them. A failure may be one of earlier bytes. A write
    /// that is called off has written some of its bytes, or none.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) -> R<()> {
        let mut rest = bytes.as_ref();
        while !rest.is_empty() {
            self.wait_for_room(1).await?;
            let most = usize::try_from(self.room).unwrap_or(CHUNK).min(CHUNK);
            let (now, later) = rest.split_at(rest.len().min(most));
            self.room -= now.len() as u64;
            self.call.send(|id, out| encode_raw(Kind::FileData, id, now, out)).await?;
            rest = later;
        }
        Ok(())
    }

    /// Goes on so many bytes further, which then read as zeroes and take no room on the disk. A file that is added to
    /// can have none (`EINVAL`).
    pub async fn write_hole(&mut self, bytes: u64) -> R<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.wait_for_room(FileHole::COST.into()).await?;
        self.room -= u64::from(FileHole::COST);
        self.call.send(|id, out| encode(Kind::FileHole, id, &FileHole { bytes }, out)).await
    }

    /// Ends the file, and waits until the guest has written all of it.
    pub async fn finish(mut self) -> R<()> {
        self.call.send(|id, out| encode_raw(Kind::FileEnd, id, &[], out)).await?;
        self.call.done().await.map(drop)
    }

    /// Waits until the guest takes so many bytes. What it has said meanwhile is heard first.
    async fn wait_for_room(&mut self, least: u64) -> R<()> {
        while let Some(said) = self.call.try_next()? {
            self.on_said(said)?;
        }
        while self.room < least {
            let said = self.call.next().await?;
            self.on_said(said)?;
        }
        Ok(())
    }

    fn on_said(&mut self, said: Said) -> R<()> {
        match said {
            Said::Frame(Kind::Credit, payload) => {
                self.room = self.room.saturating_add(decode::<Credit>(&payload)?.bytes.into());
                Ok(())
            }
            _ => Err(nonsense()),
        }
    }
}

impl std::fmt::Debug for FileWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileWriter").field("path", &self.call.path()).finish_non_exhaustive()
    }
}
