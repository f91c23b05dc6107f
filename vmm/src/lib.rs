//! A virtual machine monitor to embed: one call boots a Linux kernel on KVM with virtio devices, and how
//! the machine ended is a value.
//!
//! ```text
//!  embedder's thread          one thread a vCPU               one thread a disk, one for the network
//!  ───────────────────        ────────────────────────        ─────────────────────────────────────
//!  Vm::boot                   parked ⇄ KVM_RUN                 kick → requests → irq
//!  EventManager ⇄ devices     Exit → bus → Entry
//!  Vm::exit_event → Exit      ends with an Exit
//! ```
//!
//! The guest sees no PCI, no ACPI and no firmware: an uncompressed kernel is entered at its 64-bit entry
//! point, processors come from an MP table and devices (virtio-mmio) from the kernel's command line.
//! `examples/boot.rs` is the whole of what an embedding host writes.
//!
//! What this crate promises: no guest input panics, aborts or blocks it; every thread it started has ended
//! when [`Vm`] is dropped; a host that cannot run guests is told apart before anything is created
//! ([`probe::probe`]). What it does not know: sandboxes, images, async runtimes.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

mod arch;
mod bus;
mod config;
mod disk;
mod exit;
mod initramfs;
mod kernel;
mod memory;
mod net;
pub mod probe;
mod sys;
mod thread;
mod vcpu;
mod vm;
mod worker;

pub use bus::{Flow, Marks};
pub use config::{Disk, DiskCache, Error, VmConfig};
pub use exit::Exit;
pub use initramfs::Initramfs;
pub use net::{NetBackend, Network, Watch};
pub use thread::{OnThread, ThreadKind};
pub use vm::Vm;
pub use worker::{DeviceLoop, EventLoop};

pub use cubby_devices as devices;
pub use vmm_sys_util::epoll::EventSet;
