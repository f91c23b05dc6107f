//! A virtio disk (virtio 1.2 §5.2) over any [`Backend`].
//!
//! Data moves between guest memory and the backend directly; only the 16-byte request headers and the
//! discard ranges are copied, once each. What one request can make the host do is bounded: [`MAX_DATA`]
//! bytes of data, [`MAX_RANGES`] ranges to discard or zero, each of at most a fixed length.
//!
//! A request outside the disk, misaligned, or refused by the backend ends in VIRTIO_BLK_S_IOERR; an unknown one
//! in VIRTIO_BLK_S_UNSUPP. A chain that has no room for header and status breaks the device.

use std::io;

use serde::{Deserialize, Serialize};

use crate::device::read_config_bytes;
use crate::mmio::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1};
use crate::{Batch, Chain, Device, DeviceKind, Progress, Queue, QueueError, QueueState, Slice};

/// Bytes of a sector, the unit of addresses whatever the block size (§5.2.4).
pub const SECTOR: u64 = 512;
/// Descriptors of the request queue.
pub const QUEUE_SIZE: u16 = 256;
/// Data segments of one request: the queue's size less header and status.
const SEGMENTS: u32 = 254;
/// Bytes of one data segment.
const SEGMENT_SIZE: u32 = 256 << 10;
/// Bytes of data in one request: more is VIRTIO_BLK_S_IOERR.
pub const MAX_DATA: usize = SEGMENTS as usize * SEGMENT_SIZE as usize;
/// Ranges of one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 16;
/// Sectors of one range to discard: 4 GiB.
const DISCARD_SECTORS: u32 = 8 << 20;
/// Sectors of one range to zero: 128 MiB, for a backend may have to write them.
const ZERO_SECTORS: u32 = 256 << 10;
/// Completions after which a long batch interrupts the driver without waiting for its end.
const FLUSH_EVERY: u32 = 16;

/// Bytes moved after which a kick lets others have the device: a pause must not wait for a queue full of I/O.
const ROUND: usize = 2 << 20;

/// Feature bits (§5.2.3).
mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types (§5.2.6).
mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// The unmap bit of a write-zeroes range.
const UNMAP: u32 = 1;

/// Where a disk's bytes are. Every range a backend is asked for lies inside [`Backend::len`].
///
/// The slices are guest memory: the guest may change them at any time, and a backend gives them to
/// `preadv`/`pwritev` or vm-memory's volatile readers and writers.
pub trait Backend: Send {
    /// Size in bytes. Asked once, when the device is made; what exceeds a whole sector is not used.
    fn len(&self) -> u64;

    /// Whether the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills all of `to` from `offset` on.
    ///
    /// # Errors
    /// What the host says; the guest sees an I/O error.
    fn read_at(&mut self, offset: u64, to: &[Slice<'_>]) -> io::Result<()>;

    /// Writes all of `from` at `offset`.
    ///
    /// # Errors
    /// What the host says; the guest sees an I/O error.
    fn write_at(&mut self, offset: u64, from: &[Slice<'_>]) -> io::Result<()>;

    /// Makes every finished write durable.
    ///
    /// # Errors
    /// What the host says; the guest sees an I/O error.
    fn flush(&mut self) -> io::Result<()>;

    /// The guest no longer needs these bytes.
    ///
    /// # Errors
    /// What the host says; the guest sees an I/O error.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes these bytes read as zero; with `unmap`, their space may be given up.
    ///
    /// # Errors
    /// What the host says; the guest sees an I/O error.
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}

/// How the guest sees a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Writes are refused, and the guest knows.
    pub read_only: bool,
    /// The logical block size in bytes: a power of two, at least 512. Requests are aligned to it.
    pub block_size: u32,
    /// The serial number, padded with zeros: `/sys/block/*/serial` in the guest.
    pub id: [u8; 20],
}

impl Default for Options {
    fn default() -> Self {
        Self { read_only: false, block_size: 512, id: [0; 20] }
    }
}

/// Requests that ended in an error, by what the guest was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// VIRTIO_BLK_S_IOERR: out of range, misaligned, read-only, or an error of the backend.
    pub io_errors: u64,
    /// VIRTIO_BLK_S_UNSUPP.
    pub unsupported: u64,
}

/// A virtio disk.
#[derive(Debug)]
pub struct Blk<B> {
    backend: B,
    options: Options,
    sectors: u64,
    config: [u8; 60],
    features: u64,
    accepted: u64,
    queue: Option<Queue>,
    refusals: Refusals,
}

/// How a request ends: the status byte of §5.2.6.
enum Refused {
    Io,
    Unsupported,
}

impl From<io::Error> for Refused {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

impl<B: Backend> Blk<B> {
    /// A disk over `backend`. A block size that is not a power of two of at least 512 counts as 512.
    pub fn new(backend: B, mut options: Options) -> Self {
        if !options.block_size.is_power_of_two() || options.block_size < 512 {
            options.block_size = 512;
        }
        let block = u64::from(options.block_size);
        let sectors = backend.len() / block * (block / SECTOR);
        let mut features = VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC;
        features |= feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE;
        features |= match options.read_only {
            true => feature::RO,
            false => feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES,
        };
        let config = config_space(sectors, &options);
        Self {
            backend,
            options,
            sectors,
            config,
            features,
            accepted: 0,
            queue: None,
            refusals: Refusals::default(),
        }
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The backend, for the owner to flush it when the machine ends.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// How many requests ended in an error.
    pub fn refusals(&self) -> Refusals {
        self.refusals
    }

    /// Serves one request. Returns the bytes written to the chain, status included.
    fn serve(&mut self, chain: &mut Chain<'_>) -> Result<u32, QueueError> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = chain.read_array::<16>()?;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let status = chain.take_last_writable().ok_or(QueueError::Malformed)?;
        let outcome = match kind {
            request::IN => self.read(u64::from_le_bytes(sector), chain),
            request::OUT => self.write(u64::from_le_bytes(sector), chain),
            request::FLUSH if self.features & feature::FLUSH != 0 => {
                self.backend.flush().map(|()| 0).map_err(Refused::from)
            }
            request::GET_ID => Ok(chain.write(&self.options.id)),
            request::DISCARD | request::WRITE_ZEROES => self.ranges(kind, chain).map(|()| 0),
            _ => Err(Refused::Unsupported),
        };
        let (code, written): (u8, usize) = match outcome {
            Ok(written) => (0, written),
            Err(Refused::Io) => {
                self.refusals.io_errors += 1;
                (1, 0)
            }
            Err(Refused::Unsupported) => {
                self.refusals.unsupported += 1;
                (2, 0)
            }
        };
        status.copy_from(&[code]);
        // At most MAX_DATA and the status.
        Ok(u32::try_from(written).unwrap_or(u32::MAX - 1) + 1)
    }

    fn read(&mut self, sector: u64, chain: &Chain<'_>) -> Result<usize, Refused> {
        let len = chain.writable_len();
        let offset = self.place(sector, len)?;
        self.backend.read_at(offset, chain.writable())?;
        Ok(len)
    }

    fn write(&mut self, sector: u64, chain: &Chain<'_>) -> Result<usize, Refused> {
        if self.options.read_only {
            return Err(Refused::Io);
        }
        let offset = self.place(sector, chain.readable_len())?;
        self.backend.write_at(offset, chain.readable())?;
        // A driver that cannot flush takes a finished write for a durable one (§5.2.6.2).
        if self.accepted & feature::FLUSH == 0 {
            self.backend.flush()?;
        }
        Ok(0)
    }

    /// The byte offset of a request for `len` bytes of data at `sector`.
    fn place(&self, sector: u64, len: usize) -> Result<u64, Refused> {
        if len == 0 || len > MAX_DATA {
            return Err(Refused::Io);
        }
        let len = u64::try_from(len).map_err(|_| Refused::Io)?;
        if !len.is_multiple_of(SECTOR) {
            return Err(Refused::Io);
        }
        self.range(sector, len / SECTOR)
    }

    /// The byte offset of `count` sectors from `sector` on, if they are blocks of the disk.
    fn range(&self, sector: u64, count: u64) -> Result<u64, Refused> {
        let block = u64::from(self.options.block_size) / SECTOR;
        let inside = sector.checked_add(count).is_some_and(|end| end <= self.sectors);
        if !inside || !sector.is_multiple_of(block) || !count.is_multiple_of(block) {
            return Err(Refused::Io);
        }
        sector.checked_mul(SECTOR).ok_or(Refused::Io)
    }

    fn ranges(&mut self, kind: u32, chain: &mut Chain<'_>) -> Result<(), Refused> {
        let (bit, most) = match kind {
            request::DISCARD => (feature::DISCARD, DISCARD_SECTORS),
            _ => (feature::WRITE_ZEROES, ZERO_SECTORS),
        };
        if self.features & bit == 0 {
            return Err(if self.options.read_only { Refused::Io } else { Refused::Unsupported });
        }
        let len = chain.readable_len();
        if len == 0 || !len.is_multiple_of(16) || len / 16 > MAX_RANGES as usize {
            return Err(Refused::Io);
        }
        while chain.readable_len() > 0 {
            let raw = chain.read_array::<16>().map_err(|_| Refused::Io)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = raw;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            // Reserved bits, and unmap on a discard, are unsupported (§5.2.6.2).
            if flags & !UNMAP != 0 || (kind == request::DISCARD && flags != 0) {
                return Err(Refused::Unsupported);
            }
            if count > most {
                return Err(Refused::Io);
            }
            let offset = self.range(sector, count.into())?;
            let len = u64::from(count) * SECTOR;
            match kind {
                _ if len == 0 => {}
                request::DISCARD => self.backend.discard(offset, len)?,
                _ => self.backend.write_zeroes(offset, len, flags & UNMAP != 0)?,
            }
        }
        if self.accepted & feature::FLUSH == 0 {
            self.backend.flush()?;
        }
        Ok(())
    }

    fn work(&mut self, batch: &mut Batch<'_>) -> Progress {
        let mut served = 0;
        let mut moved = 0usize;
        while let Some(mut chain) = batch.next() {
            moved = moved.saturating_add(chain.readable_len()).saturating_add(chain.writable_len());
            match self.serve(&mut chain) {
                Ok(written) => batch.complete(chain, written),
                Err(error) => batch.fail(error),
            }
            served += 1;
            if served % FLUSH_EVERY == 0 {
                batch.flush();
            }
            if moved >= ROUND {
                batch.rest();
            }
        }
        batch.progress()
    }
}

impl<B: Backend> Device for Blk<B> {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn acknowledge(&mut self, features: u64) {
        self.accepted = features;
    }

    fn start_queue(&mut self, index: usize, queue: Queue) {
        if index == 0 {
            self.queue = Some(queue);
        }
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        if index == 0 { self.queue.take().map(Queue::stop) } else { None }
    }

    fn kick(&mut self, index: usize) -> Progress {
        let Some(mut queue) = self.queue.take_if(|_| index == 0) else { return Progress::Idle };
        let progress = self.work(&mut queue.batch());
        self.queue = Some(queue);
        progress
    }
}

/// struct virtio_blk_config (§5.2.4), up to and with the write-zeroes fields.
fn config_space(sectors: u64, options: &Options) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |offset: usize, bytes: &[u8]| {
        for (to, byte) in config.iter_mut().skip(offset).zip(bytes) {
            *to = *byte;
        }
    };
    put(0, &sectors.to_le_bytes());
    put(8, &SEGMENT_SIZE.to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &options.block_size.to_le_bytes());
    if !options.read_only {
        put(36, &DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(options.block_size / 512).to_le_bytes());
        put(48, &ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
    }
    config
}

#[cfg(test)]
mod tests;
