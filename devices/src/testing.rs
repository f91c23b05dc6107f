//! The other side, for tests: a driver that builds real rings in real guest memory, as well or as badly as a
//! test wants, and an interrupt line that counts. No KVM is needed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that goes wrong must stop")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress};

use crate::{Interrupt, Memory, QueueState, Signals, Transport, mmio};

/// VIRTQ_DESC_F_NEXT.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

/// An interrupt line that counts its edges.
#[derive(Debug, Default)]
pub struct Line(AtomicU64);

impl Line {
    /// How often the line was raised.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl Interrupt for Line {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A guest: memory, an allocator that never frees, and an interrupt line.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The guest's memory, from address zero.
    pub memory: Memory,
    /// Counts the interrupts of every device made with it.
    pub line: Arc<Line>,
    next: u64,
}

impl Guest {
    /// A guest with `bytes` of memory.
    pub fn new(bytes: usize) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        Self { memory, line: Arc::default(), next: 0x1000 }
    }

    /// Takes `len` bytes of memory, page-aligned.
    pub fn alloc(&mut self, len: usize) -> u64 {
        let address = self.next;
        self.next += (len as u64).next_multiple_of(0x1000).max(0x1000);
        address
    }

    /// Takes memory that holds `bytes`.
    pub fn alloc_with(&mut self, bytes: &[u8]) -> u64 {
        let address = self.alloc(bytes.len());
        self.write(address, bytes);
        address
    }

    /// Writes guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Signals on this guest's line.
    pub fn signals(&self) -> Arc<Signals> {
        Signals::new(self.line.clone())
    }
}

/// One buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn readable(address: u64, len: usize) -> Self {
        Self { address, len: u32::try_from(len).unwrap(), writable: false }
    }

    /// A buffer that the device writes.
    pub fn writable(address: u64, len: usize) -> Self {
        Self { address, len: u32::try_from(len).unwrap(), writable: true }
    }

    fn flags(self) -> u16 {
        if self.writable { WRITE } else { 0 }
    }
}

/// The driver's end of a split virtqueue. Descriptors are used in turn: a test keeps at most `size` in flight.
#[derive(Debug, Clone)]
pub struct Ring {
    guest: Guest,
    /// Number of descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    free: u16,
    next_available: u16,
    next_used: u16,
    event_idx: bool,
}

impl Ring {
    /// A ring in fresh memory of `guest`.
    pub fn new(guest: &mut Guest, size: u16, event_idx: bool) -> Self {
        let n = usize::from(size);
        let descriptors = guest.alloc(16 * n);
        let available = guest.alloc(6 + 2 * n);
        let used = guest.alloc(6 + 8 * n);
        let guest = guest.clone();
        Self {
            guest,
            size,
            descriptors,
            available,
            used,
            free: 0,
            next_available: 0,
            next_used: 0,
            event_idx,
        }
    }

    /// The state from which a queue starts on this ring.
    pub fn state(&self) -> QueueState {
        QueueState {
            size: self.size,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            next_available: 0,
            next_used: 0,
            event_idx: self.event_idx,
        }
    }

    /// Writes one descriptor, whatever it says.
    pub fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.write_descriptor(self.descriptors, index, address, len, flags, next);
    }

    /// Writes one descriptor of a table at `table`.
    pub fn write_descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.guest.write(table + 16 * u64::from(index), &raw);
    }

    fn take(&mut self) -> u16 {
        let index = self.free;
        self.free = (self.free + 1) % self.size;
        index
    }

    /// Makes `head` available, whatever it is.
    pub fn offer(&mut self, head: u16) {
        let slot = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        self.guest.write(slot, &head.to_le_bytes());
        self.set_available_index(self.next_available.wrapping_add(1));
    }

    /// Sets the available index, whatever it means.
    pub fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        self.guest.memory.store(index.to_le(), GuestAddress(self.available + 2), Ordering::Release).unwrap();
    }

    /// Makes a chain of descriptors available. Returns its head.
    pub fn submit(&mut self, buffers: &[Buffer]) -> u16 {
        let indices: Vec<u16> = buffers.iter().map(|_| self.take()).collect();
        for (i, buffer) in buffers.iter().enumerate() {
            let (flags, next) = indices.get(i + 1).map_or((0, 0), |next| (NEXT, *next));
            self.set_descriptor(indices[i], buffer.address, buffer.len, flags | buffer.flags(), next);
        }
        self.offer(indices[0]);
        indices[0]
    }

    /// Makes the same available through an indirect table. Returns the head.
    pub fn submit_indirect(&mut self, guest: &mut Guest, buffers: &[Buffer]) -> u16 {
        let table = guest.alloc(16 * buffers.len());
        for (i, buffer) in (0..).zip(buffers) {
            let last = usize::from(i) + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | buffer.flags();
            self.write_descriptor(table, i, buffer.address, buffer.len, flags, i + 1);
        }
        let head = self.take();
        self.set_descriptor(head, table, u32::try_from(16 * buffers.len()).unwrap(), INDIRECT, 0);
        self.offer(head);
        head
    }

    /// The next completion: head and bytes written.
    pub fn completion(&mut self) -> Option<(u16, u32)> {
        let index: u16 =
            self.guest.memory.load(GuestAddress(self.used + 2), Ordering::Acquire).map(u16::from_le).unwrap();
        if index == self.next_used {
            return None;
        }
        let raw = self.guest.read(self.used + 4 + 8 * u64::from(self.next_used % self.size), 8);
        self.next_used = self.next_used.wrapping_add(1);
        let head = u32::from_le_bytes(raw[..4].try_into().unwrap());
        Some((u16::try_from(head).unwrap(), u32::from_le_bytes(raw[4..].try_into().unwrap())))
    }

    /// Asks for an interrupt once the completion after the last taken one is there (EVENT_IDX).
    pub fn arm_interrupt(&self) {
        self.set_used_event(self.next_used);
    }

    /// Writes used_event (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.guest.write(self.available + 4 + 2 * u64::from(self.size), &index.to_le_bytes());
    }

    /// Writes the available ring's flags: 1 asks for no interrupts (without EVENT_IDX).
    pub fn set_available_flags(&self, flags: u16) {
        self.guest.write(self.available, &flags.to_le_bytes());
    }

    /// The available index at which the device wants a notification (EVENT_IDX).
    pub fn available_event(&self) -> u16 {
        let raw = self.guest.read(self.used + 4 + 8 * u64::from(self.size), 2);
        u16::from_le_bytes(raw.try_into().unwrap())
    }

    /// The used ring's flags: 1 says that the device wants no notifications (without EVENT_IDX).
    pub fn used_flags(&self) -> u16 {
        u16::from_le_bytes(self.guest.read(self.used, 2).try_into().unwrap())
    }
}

/// Reads a 32-bit register.
pub fn read_register(transport: &mut Transport, offset: u64) -> u32 {
    let mut word = [0; 4];
    transport.read(offset, &mut word);
    u32::from_le_bytes(word)
}

/// Writes a 32-bit register.
pub fn write_register(transport: &mut Transport, offset: u64, value: u32) -> Option<mmio::Event> {
    transport.write(offset, &value.to_le_bytes())
}

/// Negotiates every feature that the device offers and `features` has, up to FEATURES_OK.
pub fn negotiate(transport: &mut Transport, features: u64) -> u64 {
    for status in [0, 1, 3] {
        write_register(transport, 0x70, status);
    }
    let mut accepted = 0;
    for select in [0u32, 1] {
        write_register(transport, 0x14, select);
        let mine = u32::try_from((features >> (32 * select)) & u64::from(u32::MAX)).unwrap();
        let word = read_register(transport, 0x10) & mine;
        write_register(transport, 0x24, select);
        write_register(transport, 0x20, word);
        accepted |= u64::from(word) << (32 * select);
    }
    write_register(transport, 0x70, 0xb);
    accepted
}

/// Writes a ring's place to a queue's registers and makes it ready.
pub fn set_up_queue(transport: &mut Transport, index: u32, ring: &Ring) {
    write_register(transport, 0x30, index);
    write_register(transport, 0x38, ring.size.into());
    for (offset, address) in [(0x80, ring.descriptors), (0x90, ring.available), (0xa0, ring.used)] {
        write_register(transport, offset, u32::try_from(address & 0xffff_ffff).unwrap());
        write_register(transport, offset + 4, u32::try_from(address >> 32).unwrap());
    }
    write_register(transport, 0x44, 1);
}

/// Brings a device up as Linux does: reset, negotiate, queues, DRIVER_OK.
pub fn bring_up(transport: &mut Transport, features: u64, rings: &[&Ring]) -> Option<mmio::Event> {
    negotiate(transport, features);
    for (index, ring) in (0..).zip(rings) {
        set_up_queue(transport, index, ring);
    }
    write_register(transport, 0x70, 0xf)
}
