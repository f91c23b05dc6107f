//! The virtio-mmio transport, version 2 (virtio 1.2 §4.2.2): the registers by which a driver finds a device,
//! negotiates features, sets up queues and takes interrupts.
//!
//! The register file is strict. The status goes ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, one at a time;
//! FEATURES_OK is refused unless the driver took VIRTIO_F_VERSION_1 and nothing that was not offered; queue
//! registers are frozen from QUEUE_READY and DRIVER_OK on. An access that is misaligned, of another width, to
//! no register, or out of order has no effect and is counted ([`Transport::rejected`]).
//!
//! INTERRUPT_STATUS and INTERRUPT_ACK, which a vCPU touches for every interrupt, do not take the device's lock. The
//! configuration space, features and queues do: a worker that holds it during disk I/O makes that access wait.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::{Device, Interrupt, Memory, Queue, QueueState, Signals};

/// Bytes of address space that a transport answers to.
pub const WINDOW: u64 = 0x1000;

/// VIRTIO_F_VERSION_1, without which no driver is accepted.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_EVENT_IDX.
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_RING_INDIRECT_DESC.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;

mod state;

pub use state::{RestoreError, TransportState};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"cuby");

/// Where the device's configuration space begins.
const CONFIG: u64 = 0x100;

/// Device status bits (§2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Register offsets (§4.2.2).
mod register {
    pub const MAGIC_VALUE: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
}

/// The offset a driver writes a queue's index to: where the owner puts its ioeventfds.
pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

/// What a register write asks of the transport's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver is ready and the device's queues are started: begin to wait for notifications.
    Activated,
    /// The driver reset the device, whose queues are stopped.
    Reset,
    /// The driver notified this queue by a write that no ioeventfd caught: kick it.
    Notified(usize),
}

/// A driver's view of one queue, as its registers hold it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    /// Zero when the driver wrote a size that cannot be.
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// One device behind its registers.
pub struct Transport {
    device: Arc<Mutex<dyn Device>>,
    memory: Memory,
    signals: Arc<Signals>,
    kind: u32,
    features: u64,
    sizes: Vec<u16>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    started: Vec<bool>,
    rejected: u64,
}

impl Transport {
    /// A device in its reset state.
    pub fn new(device: Arc<Mutex<dyn Device>>, memory: Memory, line: Arc<dyn Interrupt>) -> Self {
        let (kind, features, sizes) = {
            let device = lock(&device);
            (device.kind().id(), device.features(), device.queue_sizes().to_vec())
        };
        let queues = sizes.iter().map(|size| fresh(*size)).collect();
        let started = vec![false; sizes.len()];
        Self {
            device,
            memory,
            signals: Signals::new(line),
            kind,
            features,
            sizes,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            started,
            rejected: 0,
        }
    }

    /// The device behind these registers.
    pub fn device(&self) -> &Arc<Mutex<dyn Device>> {
        &self.device
    }

    /// The device's signals, to announce a configuration change or to read its failures.
    pub fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }

    /// Whether the driver has the device running.
    pub fn is_active(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// How many register accesses were refused.
    pub fn rejected(&self) -> u64 {
        self.rejected
    }

    /// The indices of the queues that are started.
    pub fn started_queues(&self) -> impl Iterator<Item = usize> + '_ {
        self.started.iter().enumerate().filter_map(|(index, started)| started.then_some(index))
    }

    /// Handles a read of `data.len()` bytes at `offset` from the transport's base.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            if aligned(offset, data.len()) {
                lock(&self.device).read_config(offset - CONFIG, data);
            } else {
                self.rejected += 1;
            }
            return;
        }
        let Ok(word) = <&mut [u8; 4]>::try_from(data) else {
            self.rejected += 1;
            return;
        };
        match self.read_register(offset) {
            Some(value) => *word = value.to_le_bytes(),
            None => self.rejected += 1,
        }
    }

    fn read_register(&self, offset: u64) -> Option<u32> {
        let index = usize::try_from(self.queue_select).ok();
        Some(match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.kind,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.features, self.device_features_select),
            register::QUEUE_NUM_MAX => index.and_then(|i| self.sizes.get(i)).copied().unwrap_or(0).into(),
            register::QUEUE_READY => index.and_then(|i| self.queues.get(i)).is_some_and(|q| q.ready).into(),
            register::INTERRUPT_STATUS => self.signals.interrupt_status(),
            register::STATUS if self.signals.needs_reset() => self.status | status::NEEDS_RESET,
            register::STATUS => self.status,
            // No shared memory region exists: its length and base read as all ones (§4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH if offset.is_multiple_of(4) => u32::MAX,
            register::CONFIG_GENERATION => self.signals.generation(),
            _ => return None,
        })
    }

    /// Handles a write at `offset` from the transport's base.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Event> {
        if offset >= CONFIG {
            if aligned(offset, data.len()) && self.status & status::DRIVER != 0 {
                lock(&self.device).write_config(offset - CONFIG, data);
            } else {
                self.rejected += 1;
            }
            return None;
        }
        let outcome = match <[u8; 4]>::try_from(data) {
            Ok(word) => self.write_register(offset, u32::from_le_bytes(word)),
            Err(_) => Err(Rejected),
        };
        outcome.unwrap_or_else(|Rejected| {
            self.rejected += 1;
            None
        })
    }

    fn write_register(&mut self, offset: u64, value: u32) -> Result<Option<Event>, Rejected> {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_select = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            register::DRIVER_FEATURES => self.write_features(value)?,
            register::QUEUE_SEL => self.queue_select = value,
            register::QUEUE_NUM => {
                let max = self.selected_size()?;
                let size = u16::try_from(value).ok().filter(|n| n.is_power_of_two() && *n <= max);
                self.selected()?.size = size.unwrap_or(0);
                size.ok_or(Rejected)?;
            }
            register::QUEUE_READY => self.write_ready(value)?,
            register::QUEUE_NOTIFY => {
                let index = usize::try_from(value).map_err(|_| Rejected)?;
                let started = self.started.get(index).copied().unwrap_or(false);
                return if started { Ok(Some(Event::Notified(index))) } else { Err(Rejected) };
            }
            register::INTERRUPT_ACK => self.signals.acknowledge(value),
            register::STATUS => return self.write_status(value),
            register::QUEUE_DESC_LOW => set_low(&mut self.selected()?.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut self.selected()?.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut self.selected()?.available, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut self.selected()?.available, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut self.selected()?.used, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut self.selected()?.used, value),
            _ => return Err(Rejected),
        }
        Ok(None)
    }

    fn write_features(&mut self, value: u32) -> Result<(), Rejected> {
        if self.status & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            return Err(Rejected);
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ if value == 0 => {}
            _ => return Err(Rejected),
        }
        Ok(())
    }

    /// The selected queue's registers, if they may be written now.
    fn selected(&mut self) -> Result<&mut QueueRegisters, Rejected> {
        let index = self.configurable()?;
        self.queues.get_mut(index).filter(|queue| !queue.ready).ok_or(Rejected)
    }

    fn selected_size(&self) -> Result<u16, Rejected> {
        let index = usize::try_from(self.queue_select).map_err(|_| Rejected)?;
        self.sizes.get(index).copied().ok_or(Rejected)
    }

    fn configurable(&self) -> Result<usize, Rejected> {
        if self.status & (status::FEATURES_OK | status::DRIVER_OK) != status::FEATURES_OK {
            return Err(Rejected);
        }
        usize::try_from(self.queue_select).map_err(|_| Rejected)
    }

    fn write_ready(&mut self, value: u32) -> Result<(), Rejected> {
        let index = self.configurable()?;
        let max = self.selected_size()?;
        let event_idx = self.driver_features & RING_EVENT_IDX != 0;
        let queue = self.queues.get_mut(index).ok_or(Rejected)?;
        match value {
            0 => queue.ready = false,
            1 => {
                let state = queue.initial(event_idx);
                if Queue::new(self.memory.clone(), self.signals.clone(), max, &state).is_err() {
                    self.signals.fail();
                    return Err(Rejected);
                }
                queue.ready = true;
            }
            _ => return Err(Rejected),
        }
        Ok(())
    }

    fn write_status(&mut self, value: u32) -> Result<Option<Event>, Rejected> {
        if value == 0 {
            self.reset();
            return Ok(Some(Event::Reset));
        }
        // A driver may write back the DEVICE_NEEDS_RESET it read; it cannot set or clear it.
        let value = value & !status::NEEDS_RESET;
        let added = value & !self.status;
        if self.status & !value != 0 || self.status & status::FAILED != 0 {
            return Err(Rejected);
        }
        let settled = self.status;
        match added {
            0 => {}
            status::FAILED => self.status |= status::FAILED,
            status::ACKNOWLEDGE if settled == 0 => self.status = value,
            status::DRIVER if settled == status::ACKNOWLEDGE => self.status = value,
            status::FEATURES_OK if settled == status::ACKNOWLEDGE | status::DRIVER => {
                let accepted = self.driver_features & !self.features == 0;
                if !accepted || self.driver_features & VERSION_1 == 0 {
                    return Err(Rejected);
                }
                lock(&self.device).acknowledge(self.driver_features);
                self.status = value;
            }
            status::DRIVER_OK
                if settled == status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK
                    && !self.signals.needs_reset() =>
            {
                let event_idx = self.driver_features & RING_EVENT_IDX != 0;
                let states: Vec<_> =
                    self.queues.iter().map(|queue| queue.ready.then(|| queue.initial(event_idx))).collect();
                if self.start_queues(&states).is_err() {
                    self.signals.fail();
                    return Err(Rejected);
                }
                self.status = value;
                return Ok(Some(Event::Activated));
            }
            _ => return Err(Rejected),
        }
        Ok(None)
    }

    /// Starts all of the given queues, or none.
    fn start_queues(&mut self, states: &[Option<QueueState>]) -> Result<(), RestoreError> {
        let mut queues = Vec::new();
        for (index, (state, max)) in states.iter().zip(&self.sizes).enumerate() {
            let Some(state) = state else { continue };
            let queue = Queue::new(self.memory.clone(), self.signals.clone(), *max, state)
                .map_err(|source| RestoreError::Queue { index, source })?;
            queues.push((index, queue));
        }
        let mut device = lock(&self.device);
        for (index, queue) in queues {
            device.start_queue(index, queue);
            if let Some(started) = self.started.get_mut(index) {
                *started = true;
            }
        }
        Ok(())
    }

    fn stop_queues(&mut self) -> Vec<Option<QueueState>> {
        let mut device = lock(&self.device);
        let stop = |(index, started): (usize, &mut bool)| {
            if std::mem::take(started) { device.stop_queue(index) } else { None }
        };
        self.started.iter_mut().enumerate().map(stop).collect()
    }

    /// Puts the device back to where it was before any driver. The guest does this by a write; the owner may,
    /// too.
    pub fn reset(&mut self) {
        self.stop_queues();
        lock(&self.device).driver_gone();
        self.signals.reset();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues = self.sizes.iter().map(|size| fresh(*size)).collect();
    }

    /// Raises the interrupt line if the driver has an interrupt it has not acknowledged.
    pub fn raise_pending(&self) {
        self.signals.raise_pending();
    }
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("kind", &self.kind)
            .field("status", &self.status)
            .field("queues", &self.queues)
            .field("rejected", &self.rejected)
            .finish_non_exhaustive()
    }
}

/// An access that has no effect.
struct Rejected;

impl QueueRegisters {
    fn initial(&self, event_idx: bool) -> QueueState {
        QueueState {
            size: self.size,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            next_available: 0,
            next_used: 0,
            event_idx,
        }
    }
}

fn fresh(size: u16) -> QueueRegisters {
    QueueRegisters { size, ..QueueRegisters::default() }
}

/// A panic in a device is a bug of ours that must not take the guest's other devices with it.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 1 | 2 | 4 | 8) && offset.is_multiple_of(len as u64)
}

fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = (*value & !u64::from(u32::MAX)) | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = (*value & u64::from(u32::MAX)) | (u64::from(high) << 32);
}

#[cfg(test)]
mod tests;
