//! What an embedder asks for, and why it may not get it.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use crate::bus::Marks;
use crate::initramfs::Initramfs;
use crate::net::Network;
use crate::thread::OnThread;

/// A virtual machine to boot.
pub struct VmConfig {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB, at least 32.
    pub memory_mib: u32,
    /// An uncompressed x86_64 kernel: `vmlinux`, ELF.
    pub kernel: PathBuf,
    /// What the kernel unpacks as its first root.
    pub initramfs: Option<Initramfs>,
    /// Kernel command line; what the devices need is added to it.
    pub cmdline: String,
    /// Disks in the order of their names, `/dev/vda` first.
    pub disks: Vec<Disk>,
    /// The guest's vsock context id, 3 or more; no vsock without one.
    pub vsock_cid: Option<u32>,
    /// The guest's network card, `eth0`; without one it has the loopback interface alone.
    pub network: Option<Network>,
    /// Where the guest's console goes, besides the newest 64 KiB that [`crate::Vm::console_tail`] has. It is
    /// written on a vCPU's thread, byte by byte.
    pub console: Option<Box<dyn io::Write + Send>>,
    /// An I/O port through which the guest tells the embedder how far it has come.
    pub marks: Option<Marks>,
    /// Called at the start of each thread. [`crate::Vm::boot`] returns once it has been on all of them.
    pub on_thread: Option<OnThread>,
}

/// A disk backed by a raw file. Its size is the file's, in whole sectors of 512 bytes.
pub struct Disk {
    /// Opened for reading, and for writing unless `read_only`.
    pub file: File,
    /// Refuse writes.
    pub read_only: bool,
    /// What VIRTIO_BLK_T_GET_ID answers; up to 20 bytes count.
    pub serial: String,
    /// Whether the host's page cache takes part.
    pub cache: DiskCache,
}

/// How a disk's bytes reach the host's storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskCache {
    /// Through the page cache; a guest's flush is an `fdatasync`. Right for images, which many sandboxes
    /// share, and for small disks: reads that hit are a copy.
    #[default]
    Writeback,
    /// Past the page cache (`O_DIRECT`): the guest has its own cache and nothing is kept twice. Right for large
    /// disks with large requests. The file system must support it, and requests that are not aligned to
    /// 512 bytes in guest memory fail.
    Direct,
}

/// Why a VM did not come up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This host runs no guests.
    #[error(transparent)]
    Host(#[from] crate::probe::HostUnsupported),
    /// A KVM call failed.
    #[error("kvm: {call} failed")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The configuration asks for more or less than there can be.
    #[error("{field} is {given}, but {allowed}")]
    Config {
        /// The field of [`VmConfig`].
        field: &'static str,
        /// Its value.
        given: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// Guest memory could not be had.
    #[error("cannot map {mib} MiB of guest memory")]
    Memory {
        /// How much was asked for.
        mib: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel could not be loaded.
    #[error("cannot load kernel {path}: {why}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel, the initramfs and the boot data do not fit.
    #[error(
        "{what} needs {needed} bytes, but guest memory of {mib} MiB has no room for it: give the VM more memory"
    )]
    DoesNotFit {
        /// What was to be placed.
        what: &'static str,
        /// Its size.
        needed: u64,
        /// Size of guest memory.
        mib: u32,
    },
    /// A disk's file cannot be used.
    #[error("cannot use disk {index}")]
    Disk {
        /// Its place in [`VmConfig::disks`].
        index: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// A descriptor or thread of the host could not be had.
    #[error("cannot create {what}")]
    Resource {
        /// What it was for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { call, source: io::Error::from_raw_os_error(error.errno()) }
    }

    pub(crate) fn resource(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Resource { what, source }
    }
}
