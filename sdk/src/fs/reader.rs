//! A guest's file as it is read.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use cubby_protocol::message::{FileHole, FileMetadata, FileRequest};
use cubby_protocol::{CHUNK, Kind, decode};

use super::call::{Call, Said, nonsense};
use super::pieces::Piece;
use super::{EFBIG, Metadata, bytes};
use crate::error::R;
use crate::link::Link;

/// A file that is being read. The guest sends at most 512 KiB ahead of what is taken. Dropping it ends the reading.
pub struct FileReader {
    call: Call,
    metadata: Metadata,
    /// Zeroes still to be given.
    zeroes: u64,
    over: bool,
}

impl FileReader {
    pub(super) async fn open(link: &Arc<Link>, path: &Path, offset: u64, length: Option<u64>) -> R<Self> {
        let request = FileRequest::Read { path: bytes(path), offset, length };
        let mut call = Call::begin(link, "read", path, &request, |_, _| Ok(())).await?;
        match call.next().await? {
            Said::Frame(Kind::FileOpened, payload) => {
                let metadata = decode::<FileMetadata>(&payload)?.into();
                Ok(Self { call, metadata, zeroes: 0, over: false })
            }
            _ => Err(nonsense()),
        }
    }

    /// What was known of the file when it was opened.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The next bytes, never none; `None` at the end of the file. Nothing is lost when the future is dropped before it is
    /// ready.
    pub async fn next(&mut self) -> Option<R<Bytes>> {
        static ZEROES: [u8; CHUNK] = [0; CHUNK];
        while self.zeroes == 0 {
            match self.next_piece().await? {
                Ok(Piece::Data(bytes)) => return Some(Ok(bytes)),
                Ok(Piece::Hole(size)) => self.zeroes = size,
                Err(error) => return Some(Err(error)),
            }
        }
        let size = usize::try_from(self.zeroes).unwrap_or(CHUNK).min(CHUNK);
        self.zeroes -= size as u64;
        Some(Ok(Bytes::from_static(ZEROES.get(..size).unwrap_or_default())))
    }

    /// The next piece, holes as such.
    pub(super) async fn next_piece(&mut self) -> Option<R<Piece>> {
        if self.over {
            return None;
        }
        let piece = match self.call.next().await {
            Ok(Said::Done(_)) => None,
            Ok(said) => Some(self.piece(said)),
            Err(error) => Some(Err(error)),
        };
        self.over = !matches!(piece, Some(Ok(_)));
        piece
    }

    fn piece(&mut self, said: Said) -> R<Piece> {
        match said {
            Said::Frame(Kind::FileData, bytes) if !bytes.is_empty() => {
                self.call.give_back(bytes.len());
                Ok(Piece::Data(bytes))
            }
            Said::Frame(Kind::FileHole, payload) => {
                self.call.give_back(FileHole::COST as usize);
                Ok(Piece::Hole(decode::<FileHole>(&payload)?.bytes))
            }
            _ => Err(nonsense()),
        }
    }

    /// All of it, if it is not more than `limit` bytes.
    pub(super) async fn collect(mut self, limit: u64) -> R<Vec<u8>> {
        let expected = self.metadata.size.min(limit).min(1 << 20);
        let mut all = Vec::with_capacity(usize::try_from(expected).unwrap_or_default());
        while let Some(piece) = self.next_piece().await {
            if !add(&mut all, &piece?, limit) {
                return Err(self.call.refused(EFBIG));
            }
        }
        Ok(all)
    }
}

impl std::fmt::Debug for FileReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileReader").field("path", &self.call.path()).finish_non_exhaustive()
    }
}

/// Adds a piece, unless that makes it more than `limit` bytes.
fn add(all: &mut Vec<u8>, piece: &Piece, limit: u64) -> bool {
    let size = (all.len() as u64).saturating_add(piece.size());
    let Some(size) = usize::try_from(size).ok().filter(|_| size <= limit) else { return false };
    match piece {
        Piece::Data(bytes) => all.extend_from_slice(bytes),
        Piece::Hole(_) => all.resize(size, 0),
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_end_is_not_taken_into_memory() {
        let mut all = Vec::new();
        assert!(add(&mut all, &Piece::Data("ab".into()), 6));
        assert!(add(&mut all, &Piece::Hole(3), 6));
        for more in
            [Piece::Hole(2), Piece::Hole(u64::MAX), Piece::Hole(u64::MAX - 4), Piece::Data("cd".into())]
        {
            assert!(!add(&mut all, &more, 6), "{more:?}");
        }
        assert!(add(&mut all, &Piece::Data("c".into()), 6));
        assert_eq!(all, b"ab\0\0\0c");
    }
}
