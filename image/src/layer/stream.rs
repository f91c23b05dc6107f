//! From compressed layers to one stream of tar bytes: a thread of its own reads and decompresses, so that this work and the writing of the disk overlap, and layers follow each other without a pause.
//!
//! Promises: what ends without an error had the size that its descriptor says, and stayed within the limits;
//! what [`Stream::verify`] says yes to had its digest. Held in memory: [`BUFFERS`] pieces of [`PIECE`] bytes and the decompressor's window, which is bounded.
use std::{
    io::{self, BufRead, BufReader, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use crate::{Digest, Error, Limits, digest::Hasher};

/// Unpacked bytes that travel together.
const PIECE: usize = 512 << 10;
/// Pieces on their way.
const BUFFERS: usize = 8;
/// Largest zstd window accepted, as a power of two: 128 MiB, what `zstd --long` makes.
const ZSTD_WINDOW: u32 = 27;
/// A layer may unpack this far before its ratio counts.
const RATIO_FREE: u64 = 64 << 20;

/// Opens one layer's bytes; may wait until they are there.
pub(crate) type Open<'a> = Box<dyn FnOnce() -> Result<Box<dyn Read + Send>, Error> + Send + 'a>;

/// One layer to be unpacked.
pub(crate) struct Layer<'a> {
    /// Of the bytes as stored; also the layer's name in errors.
    pub(crate) digest: Digest,
    /// Bytes as stored; `None` where no descriptor says it.
    pub(crate) size: Option<u64>,
    pub(crate) open: Open<'a>,
}

enum Message {
    Piece(Vec<u8>),
    /// The layer is over, and was what its digest says.
    End,
    Failed(Error),
}

/// The unpacking end, for a thread of its own.
pub(crate) struct Unpacker {
    send: SyncSender<Message>,
    empty: Receiver<Vec<u8>>,
    limits: Limits,
    cancelled: Arc<AtomicBool>,
    total: u64,
}

/// The reading end: one layer after the other. A layer reads to its end-of-file, then
/// [`Self::next_layer`] goes on.
pub(crate) struct Stream {
    pieces: Receiver<Message>,
    empty: SyncSender<Vec<u8>>,
    piece: Vec<u8>,
    used: usize,
    ended: bool,
    hash: Option<Hasher>,
    bytes: u64,
}

/// A pair of ends; dropping one ends the other.
pub(crate) fn channel(limits: &Limits, cancelled: Arc<AtomicBool>) -> (Unpacker, Stream) {
    let (send, pieces) = sync_channel(BUFFERS);
    let (return_empty, empty) = sync_channel(BUFFERS + 2);
    let unpacker = Unpacker { send, empty, limits: limits.clone(), cancelled, total: 0 };
    let stream =
        Stream { pieces, empty: return_empty, piece: Vec::new(), used: 0, ended: true, hash: None, bytes: 0 };
    (unpacker, stream)
}

impl Unpacker {
    /// Unpacks all `layers` in turn, until the end, an error, or nobody reads on.
    pub(crate) fn run(mut self, layers: Vec<Layer<'_>>) {
        for layer in layers {
            let message = match self.layer(layer) {
                Ok(true) => Message::End,
                Ok(false) => return,
                Err(error) => Message::Failed(error),
            };
            let failed = matches!(message, Message::Failed(_));
            if self.send.send(message).is_err() || failed {
                return;
            }
        }
    }

    /// Whether somebody still reads.
    fn layer(&mut self, layer: Layer<'_>) -> Result<bool, Error> {
        let name = layer.digest.to_string();
        let limit = layer.size.unwrap_or(self.limits.max_layer);
        let mut stored =
            BufReader::with_capacity(256 << 10, Stored { inner: (layer.open)()?, read: 0, limit });
        let broken = |e: io::Error| Error::io("read", "layer")(e).in_layer(&name);
        let magic = stored.fill_buf().map_err(broken)?;
        let mut reader: Box<dyn Read> = if magic.starts_with(&[0x1f, 0x8b]) {
            Box::new(flate2::bufread::MultiGzDecoder::new(&mut stored))
        } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_zstd_skippable(magic) {
            let mut decoder = zstd::Decoder::with_buffer(&mut stored).map_err(broken)?;
            decoder.window_log_max(ZSTD_WINDOW).map_err(broken)?;
            Box::new(decoder)
        } else {
            Box::new(&mut stored)
        };
        let mut unpacked = 0_u64;
        // A size that lies is found out when the layer is read.
        let size = layer.size.unwrap_or(u64::MAX / self.limits.max_ratio.max(1));
        let most = size.saturating_mul(self.limits.max_ratio).saturating_add(RATIO_FREE);
        loop {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let mut piece = self.empty.try_recv().unwrap_or_default();
            piece.resize(PIECE, 0);
            let length = fill(&mut reader, &mut piece).map_err(broken)?;
            if length == 0 {
                break;
            }
            piece.truncate(length);
            unpacked += length as u64;
            self.total += length as u64;
            let over = |what: &str, limit, option| {
                Err(Error::Limit { what: format!("{what} of layer {name}"), limit, option })
            };
            if self.total > self.limits.max_unpacked {
                return over("the unpacked size, at the end", self.limits.max_unpacked, "max_unpacked");
            }
            if unpacked > most {
                return over("the compression ratio", self.limits.max_ratio, "max_ratio");
            }
            if self.send.send(Message::Piece(piece)).is_err() {
                return Ok(false);
            }
        }
        drop(reader);
        // The decoder may have stopped before the end of what the size counts.
        io::copy(&mut stored, &mut io::sink()).map_err(broken)?;
        let read = stored.into_inner().read;
        if let Some(expected) = layer.size.filter(|&size| size != read) {
            return Err(Error::SizeMismatch { what: format!("layer {name}"), expected, actual: read });
        }
        Ok(true)
    }
}

impl Error {
    /// A failed read inside a layer is the layer's fault, unless it carries an error of its own.
    fn in_layer(self, layer: &str) -> Self {
        match self {
            Self::Io { source, .. } => Self::Layer { layer: layer.to_owned(), why: source.to_string() },
            other => other,
        }
    }
}

/// Skippable frames may precede the first zstd frame (RFC 8878 § 3.1.2); `zstd:chunked` writers use them.
fn is_zstd_skippable(magic: &[u8]) -> bool {
    matches!(magic, [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50)
}

/// Reads until `buffer` is full or the end.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// A layer as stored: counted and bounded on its way to the decompressor.
struct Stored {
    inner: Box<dyn Read + Send>,
    read: u64,
    limit: u64,
}

impl Read for Stored {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.read += length as u64;
        if self.read > self.limit {
            let what = "a layer".to_owned();
            return Err(io::Error::other(Error::SizeMismatch {
                what,
                expected: self.limit,
                actual: self.read,
            }));
        }
        Ok(length)
    }
}

impl Stream {
    /// Goes on to the next layer; its unpacked bytes will be hashed if `diff_id` is to be checked.
    pub(crate) fn next_layer(&mut self, diff_id: Option<&Digest>) {
        self.ended = false;
        self.hash = diff_id.map(Digest::hasher);
    }

    /// After the end of a layer: fails unless its unpacked bytes have the digest.
    pub(crate) fn verify(&mut self, diff_id: Option<&Digest>) -> Result<(), Error> {
        match (diff_id, self.hash.take()) {
            (Some(diff_id), Some(hash)) => diff_id.verify_hash(hash, "an unpacked layer"),
            _ => Ok(()),
        }
    }

    /// Unpacked bytes of all layers so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = {
            let mut piece = self.fill_buf()?;
            piece.read(buffer)?
        };
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Stream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.used == self.piece.len() && !self.ended {
            match self.pieces.recv() {
                Ok(Message::Piece(piece)) => {
                    self.bytes += piece.len() as u64;
                    if let Some(hash) = &mut self.hash {
                        hash.update(&piece);
                    }
                    let used = std::mem::replace(&mut self.piece, piece);
                    self.used = 0;
                    // The unpacker makes a new one if this one does not fit.
                    let _ = self.empty.try_send(used);
                }
                Ok(Message::End) => self.ended = true,
                Ok(Message::Failed(error)) => return Err(io::Error::other(error)),
                Err(_) => return Err(io::Error::other(Error::Cancelled)),
            }
        }
        Ok(self.piece.get(self.used..).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        self.used = (self.used + amount).min(self.piece.len());
    }
}
