//! A descriptor chain (virtio 1.2 §2.7.5), read from guest memory once and validated as a whole.
//!
//! Each descriptor is copied once; what the guest writes to the table afterwards changes nothing. A [`Chain`]
//! exists only if all of it obeys the rules: at most as many descriptors as the queue has (which ends loops),
//! at most 2³² - 1 bytes, no empty buffer, one level of indirection at most, every buffer inside one region of
//! guest memory, and nothing readable after something writable. The contents of the buffers stay the guest's:
//! copy a header out with [`Chain::read_array`] once, and use the copy.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::{Memory, Slice};

/// Bytes of one descriptor: address, length, flags, next.
const DESCRIPTOR: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Which rule a descriptor chain broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The head, or the next field, points outside its table.
    #[error("descriptor index {index} is outside a table of {entries}")]
    Index {
        /// The index.
        index: u16,
        /// How many descriptors the table has.
        entries: u16,
    },
    /// More descriptors than the queue has: too long, or a loop.
    #[error("descriptor chain is longer than the queue's {size} descriptors")]
    TooLong {
        /// The queue's size.
        size: u16,
    },
    /// 2³² bytes or more in total (§2.7.5.2).
    #[error("descriptor chain holds 2^32 bytes or more")]
    TooLarge,
    /// A descriptor of zero bytes.
    #[error("descriptor at {address:#x} has no bytes")]
    Empty {
        /// The buffer's guest-physical address.
        address: u64,
    },
    /// A buffer, or a descriptor table, that does not lie in one region of guest memory.
    #[error("{len} bytes at {address:#x} are not in guest memory")]
    OutsideMemory {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
    /// An indirect descriptor inside an indirect table (§2.7.5.3.1).
    #[error("an indirect table refers to an indirect table")]
    NestedIndirect,
    /// An indirect descriptor that also has a next descriptor (§2.7.5.3.1).
    #[error("an indirect descriptor has a next descriptor")]
    IndirectNext,
    /// An indirect table that is empty, not a multiple of 16 bytes, or larger than the queue (§2.7.5.3.1).
    #[error("an indirect table of {len} bytes does not fit a queue of {size}")]
    IndirectLength {
        /// The table's length in bytes.
        len: u32,
        /// The queue's size.
        size: u16,
    },
    /// A device-readable buffer after a device-writable one (§2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// The chain holds fewer bytes than the device's request format needs.
    #[error("descriptor chain is {missing} bytes short")]
    Short {
        /// How many bytes are missing.
        missing: usize,
    },
}

/// The driver's buffers for one request: first what the device reads, then what it writes.
///
/// Reading and writing advance through the chain; [`Chain::readable`] and [`Chain::writable`] give what is
/// left as guest memory, so that a backend can move bytes without a bounce copy.
///
/// A chain goes back to its queue by [`Batch::complete`](crate::Batch::complete). One that is dropped
/// instead is given back, with nothing written, when its batch moves on.
#[must_use = "a chain goes back to the driver by Batch::complete"]
#[derive(Debug)]
pub struct Chain<'m> {
    head: u16,
    segments: Vec<Slice<'m>>,
    /// Index of the first segment with bytes left to read.
    reading: usize,
    /// Index of the first segment with bytes left to write; also where the readable part ends at first.
    writing: usize,
    /// Where the readable part ends.
    boundary: usize,
    readable: usize,
    writable: usize,
}

struct Descriptor {
    address: GuestAddress,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &Memory, table: GuestAddress, entries: u16, index: u16) -> Result<Self, ChainError> {
        if index >= entries {
            return Err(ChainError::Index { index, entries });
        }
        let mut raw = [0; 16];
        let offset = DESCRIPTOR * u64::from(index);
        table
            .checked_add(offset)
            .and_then(|at| memory.read_slice(&mut raw, at).ok())
            .ok_or(ChainError::OutsideMemory { address: table.0.wrapping_add(offset), len: DESCRIPTOR })?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
        Ok(Self {
            address: GuestAddress(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

impl<'m> Chain<'m> {
    /// Reads the chain that starts at `head` in a table of `size` descriptors; `segments` is an empty
    /// vector whose capacity is used again.
    pub(crate) fn walk(
        memory: &'m Memory,
        table: GuestAddress,
        size: u16,
        head: u16,
        mut segments: Vec<Slice<'m>>,
    ) -> Result<Self, ChainError> {
        segments.clear();
        let (mut table, mut entries, mut index) = (table, size, head);
        let mut indirect = false;
        let mut total = 0u32;
        let mut boundary = None;
        let mut readable = 0;
        loop {
            let descriptor = Descriptor::read(memory, table, entries, index)?;
            if descriptor.flags & INDIRECT != 0 {
                if indirect {
                    return Err(ChainError::NestedIndirect);
                }
                if descriptor.flags & NEXT != 0 {
                    return Err(ChainError::IndirectNext);
                }
                let wrong = ChainError::IndirectLength { len: descriptor.len, size };
                if descriptor.len == 0 || !descriptor.len.is_multiple_of(16) {
                    return Err(wrong);
                }
                entries = u16::try_from(descriptor.len / 16).map_err(|_| wrong)?;
                if entries > size {
                    return Err(wrong);
                }
                (table, index, indirect) = (descriptor.address, 0, true);
                continue;
            }
            if segments.len() >= usize::from(size) {
                return Err(ChainError::TooLong { size });
            }
            if descriptor.len == 0 {
                return Err(ChainError::Empty { address: descriptor.address.0 });
            }
            total = total.checked_add(descriptor.len).ok_or(ChainError::TooLarge)?;
            let len = u64::from(descriptor.len);
            let outside = ChainError::OutsideMemory { address: descriptor.address.0, len };
            let bytes = usize::try_from(len).map_err(|_| outside)?;
            let slice = memory.get_slice(descriptor.address, bytes).map_err(|_| outside)?;
            if descriptor.flags & WRITE != 0 {
                boundary.get_or_insert(segments.len());
            } else if boundary.is_some() {
                return Err(ChainError::ReadableAfterWritable);
            } else {
                readable += bytes;
            }
            segments.push(slice);
            if descriptor.flags & NEXT == 0 {
                break;
            }
            index = descriptor.next;
        }
        let boundary = boundary.unwrap_or(segments.len());
        let writable = usize::try_from(total).unwrap_or(usize::MAX) - readable;
        Ok(Self { head, segments, reading: 0, writing: boundary, boundary, readable, writable })
    }

    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    pub(crate) fn into_segments(self) -> Vec<Slice<'m>> {
        self.segments
    }

    /// Bytes left to read.
    pub fn readable_len(&self) -> usize {
        self.readable
    }

    /// Bytes left to write.
    pub fn writable_len(&self) -> usize {
        self.writable
    }

    /// The memory that is left to read.
    pub fn readable(&self) -> &[Slice<'m>] {
        self.segments.get(self.reading..self.boundary).unwrap_or(&[])
    }

    /// The memory that is left to write.
    pub fn writable(&self) -> &[Slice<'m>] {
        self.segments.get(self.writing..).unwrap_or(&[])
    }

    /// Copies the next bytes out of guest memory.
    ///
    /// # Errors
    /// [`ChainError::Short`] if fewer are left; then nothing is read.
    pub fn read(&mut self, to: &mut [u8]) -> Result<(), ChainError> {
        if to.len() > self.readable {
            return Err(ChainError::Short { missing: to.len() - self.readable });
        }
        let mut done = 0;
        for slice in self.readable() {
            let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
            done += slice.copy_to(rest);
        }
        self.skip_readable(done);
        Ok(())
    }

    /// Copies the next `N` bytes out of guest memory: a header, in one access.
    ///
    /// # Errors
    /// [`ChainError::Short`] if fewer are left.
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], ChainError> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Copies bytes into guest memory. Returns how many fitted.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.writable() {
            let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) else { break };
            let n = rest.len().min(slice.len());
            slice.copy_from(rest.get(..n).unwrap_or(&[]));
            done += n;
        }
        self.skip_writable(done);
        done
    }

    /// Passes over bytes that were read through [`Chain::readable`].
    pub fn skip_readable(&mut self, n: usize) {
        let n = n.min(self.readable);
        self.readable -= n;
        let end = self.boundary;
        self.reading = skip(&mut self.segments, self.reading, end, n);
    }

    /// Passes over bytes that were written through [`Chain::writable`].
    pub fn skip_writable(&mut self, n: usize) {
        let n = n.min(self.writable);
        self.writable -= n;
        let end = self.segments.len();
        self.writing = skip(&mut self.segments, self.writing, end, n);
    }

    /// Takes the last writable byte off the chain: where a device puts its status.
    pub fn take_last_writable(&mut self) -> Option<Slice<'m>> {
        if self.writable == 0 {
            return None;
        }
        let last = self.segments.pop()?;
        let (rest, byte) = last.split_at(last.len().checked_sub(1)?).ok()?;
        if !rest.is_empty() {
            self.segments.push(rest);
        }
        self.writable -= 1;
        Some(byte)
    }
}

/// Moves the start of `segments[from..end]` by `n` bytes; returns the new index of the first segment.
fn skip(segments: &mut [Slice<'_>], mut from: usize, end: usize, mut n: usize) -> usize {
    while n > 0 && from < end {
        let Some(segment) = segments.get_mut(from) else { break };
        if n < segment.len() {
            if let Ok(rest) = segment.offset(n) {
                *segment = rest;
            }
            break;
        }
        n -= segment.len();
        from += 1;
    }
    from
}
