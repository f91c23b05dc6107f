//! What every virtio device is to its transport and to the thread that works its queues.

use crate::{Queue, QueueState};

/// A virtio device type (virtio 1.2 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// A network card, id 1.
    Net,
    /// A disk, id 2.
    Block,
    /// A source of entropy, id 4.
    Entropy,
    /// A memory balloon, id 5.
    Balloon,
    /// A vsock, id 19.
    Vsock,
}

impl DeviceKind {
    /// The number by which a driver knows this type.
    pub const fn id(self) -> u32 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Entropy => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
        }
    }
}

/// Whether a kick emptied its queue.
///
/// A guest can make buffers available as fast as a device uses them, so that one kick does a bounded
/// amount of work. After [`Progress::More`] the driver will not notify again: the owner must call
/// [`Device::kick`] once more, after whatever else it has to do (a pending pause, for example).
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left; the driver notifies when there is more.
    Idle,
    /// There may be more; kick again.
    More,
}

/// A virtio device: logic without a thread.
///
/// The order of calls is a contract. [`Device::acknowledge`] comes once per activation, before any queue;
/// then one [`Device::start_queue`] for each queue the driver enabled; then any number of kicks; then one
/// [`Device::stop_queue`] for each queue. `stop_queue` returns exactly what continues in the next
/// `start_queue`, so that pause, save, restore and reset are one mechanism. [`Device::driver_gone`] follows the
/// last `stop_queue` when the driver resets the device.
pub trait Device: Send {
    /// The device's type.
    fn kind(&self) -> DeviceKind;

    /// Every feature bit the device offers, VIRTIO_F_VERSION_1 among them.
    fn features(&self) -> u64;

    /// The largest size of each queue: a power of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device's configuration space (virtio 1.2 §2.5). Bytes outside it read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space. Most devices have nothing writable.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Takes note of the features the driver accepted: a subset of [`Device::features`].
    fn acknowledge(&mut self, features: u64);

    /// Gives the device a queue to work on. Nothing is processed until the queue is kicked.
    fn start_queue(&mut self, index: usize, queue: Queue);

    /// Takes the queue back, with everything it completed already published. `None` if it was not started.
    fn stop_queue(&mut self, index: usize) -> Option<QueueState>;

    /// Processes what the driver made available in one queue, signalling as needed. A chain that breaks
    /// a rule sets DEVICE_NEEDS_RESET and stops the queue's processing until the reset.
    fn kick(&mut self, index: usize) -> Progress;

    /// Forgets whatever the device kept for this driver. Called on a reset, after the queues were stopped.
    fn driver_gone(&mut self) {}
}

/// Copies what `offset..offset + data.len()` covers of a configuration space; the rest reads as zero.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let from = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or(&[]);
    for (to, byte) in data.iter_mut().zip(from) {
        *to = *byte;
    }
}
