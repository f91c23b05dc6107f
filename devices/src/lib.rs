//! The devices of a microVM as pure logic over guest memory: the virtio-mmio transport, split virtqueues,
//! block, network, vsock, entropy, and the serial console.
//!
//! Nothing here opens a file, a socket or `/dev/kvm`, starts a thread or waits. What a device needs of the
//! host comes as a trait: [`Interrupt`] for its line, [`blk::Backend`] for a disk, [`net::Backend`]
//! for a network, [`rng::EntropySource`] for random bytes. The owner decides which thread calls [`Device::kick`] and when.
//!
//! The guest is taken for hostile. It may write anything anywhere at any time, so that every rule of the
//! specification that protects the host is checked once, on a private copy, before the value is used:
//!
//! - Queue registers freeze at DRIVER_OK, and a queue's rings lie inside guest memory ([`mmio`]).
//! - A descriptor chain is bounded by the queue's size, by 2³² bytes and by one level of indirection, and
//!   every one of its buffers lies inside guest memory ([`Chain`]).
//! - A broken rule sets DEVICE_NEEDS_RESET and is counted ([`Signals`]); nothing panics and nothing loops.
//! - One kick does bounded work ([`Progress`]), and what a guest can make the host keep is bounded.
#![forbid(unsafe_code)]

pub mod blk;
mod chain;
pub mod console;
mod device;
pub mod mmio;
pub mod net;
mod queue;
pub mod reset;
pub mod rng;
mod signals;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;

pub use chain::{Chain, ChainError};
pub use device::{Device, DeviceKind, Progress};
pub use mmio::{Event, Transport, TransportState};
pub use queue::{Batch, LayoutError, Queue, QueueError, QueueState};
pub use signals::{Interrupt, Signals};

/// The guest's memory. A clone is cheap: it shares the mappings.
pub type Memory = vm_memory::GuestMemoryMmap<()>;

/// Bytes of guest memory, valid while the [`Memory`] they were taken from is borrowed.
pub type Slice<'m> = vm_memory::VolatileSlice<'m, ()>;
