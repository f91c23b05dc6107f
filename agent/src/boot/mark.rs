//! Milestones for the VMM: one byte written to an I/O port, seen without any driver. They are best effort: a kernel
//! without `/dev/port` boots as well.

use std::os::fd::OwnedFd;

use cubby_protocol::MARK_IO_PORT;
use cubby_protocol::message::Mark;
use rustix::fs::{Mode, OFlags};

/// The port, if the kernel has it.
#[derive(Debug)]
pub struct Marks(Option<OwnedFd>);

impl Marks {
    /// Opens the port. `/dev` has to be there.
    pub fn open() -> Self {
        Self(rustix::fs::open(c"/dev/port", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).ok())
    }

    /// Writes a milestone.
    pub fn set(&self, mark: Mark) {
        if let Some(port) = &self.0 {
            let _ = rustix::io::pwrite(port, &[mark as u8], u64::from(MARK_IO_PORT));
        }
    }
}
