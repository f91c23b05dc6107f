//! The reset line of the keyboard controller (i8042): how an x86 guest without ACPI reboots.
//!
//! There is no keyboard. A guest that asks for the reset gets nothing done to it here; the caller is told.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::{I8042Device, Trigger};

/// The first I/O port of the controller; it answers to [`PORTS`] ports.
pub const BASE: u16 = 0x60;
/// Data at 0x60 to command at 0x64.
pub const PORTS: u16 = 5;

struct Asked(AtomicBool);

impl Trigger for Asked {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Release);
        Ok(())
    }
}

/// An i8042 that knows the reset command alone.
pub struct ResetLine(I8042Device<Asked>);

impl ResetLine {
    /// A controller that was not asked for anything.
    pub fn new() -> Self {
        Self(I8042Device::new(Asked(AtomicBool::new(false))))
    }

    /// Reads the byte at `offset` from [`BASE`].
    pub fn read(&mut self, offset: u8) -> u8 {
        self.0.read(offset)
    }

    /// Writes the byte at `offset` from [`BASE`]. Returns whether the guest asks to be reset.
    #[must_use]
    pub fn write(&mut self, offset: u8, value: u8) -> bool {
        let Ok(()) = self.0.write(offset, value);
        self.0.reset_evt().0.swap(false, Ordering::AcqRel)
    }
}

impl Default for ResetLine {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for ResetLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResetLine").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let mut line = ResetLine::new();
        for offset in 0..8 {
            for value in 0..=255 {
                assert_eq!(line.write(offset, value), (offset, value) == (4, 0xfe), "{offset} {value:#x}");
            }
        }
    }
}
