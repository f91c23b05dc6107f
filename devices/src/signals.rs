//! What a device says to its driver outside the rings: interrupts, and that it needs a reset.
//!
//! A transport and its queues share one [`Signals`]. Everything in it is atomic, so that a vCPU reads and
//! acknowledges an interrupt without the device's lock, which a worker may hold during disk I/O.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// A device's interrupt line. The owner writes an irqfd.
pub trait Interrupt: Send + Sync {
    /// Raises the line once (an edge).
    fn raise(&self);
}

/// The interrupt status bits of virtio 1.2 §4.2.2: a buffer was used.
const USED_BUFFER: u32 = 1;
/// The configuration, or the device status, changed.
const CONFIG_CHANGE: u32 = 2;

/// The interrupt status, DEVICE_NEEDS_RESET and the configuration generation of one device.
pub struct Signals {
    line: Arc<dyn Interrupt>,
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    failures: AtomicU64,
}

impl Signals {
    /// Quiet signals on a line.
    pub fn new(line: Arc<dyn Interrupt>) -> Arc<Self> {
        Arc::new(Self {
            line,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            failures: AtomicU64::new(0),
        })
    }

    /// Tells the driver that a queue has used buffers.
    pub fn used_buffer(&self) {
        self.status.fetch_or(USED_BUFFER, Ordering::Release);
        self.line.raise();
    }

    /// Tells the driver that the configuration space changed (virtio 1.2 §2.5).
    pub fn config_change(&self) {
        self.generation.fetch_add(1, Ordering::Release);
        self.status.fetch_or(CONFIG_CHANGE, Ordering::Release);
        self.line.raise();
    }

    /// Sets DEVICE_NEEDS_RESET, tells the driver so and counts it (virtio 1.2 §2.1.2).
    pub fn fail(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.status.fetch_or(CONFIG_CHANGE, Ordering::Release);
            self.line.raise();
        }
    }

    /// Whether the device waits for its driver to reset it.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// How often the driver broke a rule in a queue, over the device's whole life.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The INTERRUPT_STATUS register (§4.2.2). With [`Signals::acknowledge`], an owner may answer the two accesses
    /// of every interrupt before it takes any lock.
    pub fn interrupt_status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The INTERRUPT_ACK register: clears bits of the status.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    pub(crate) fn restore(&self, status: u32, generation: u32, needs_reset: bool) {
        self.status.store(status & (USED_BUFFER | CONFIG_CHANGE), Ordering::Release);
        self.generation.store(generation, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    pub(crate) fn raise_pending(&self) {
        if self.interrupt_status() != 0 {
            self.line.raise();
        }
    }
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signals")
            .field("status", &self.status)
            .field("generation", &self.generation)
            .field("needs_reset", &self.needs_reset)
            .field("failures", &self.failures)
            .finish_non_exhaustive()
    }
}
