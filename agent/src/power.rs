//! The end of the guest: every process, then the disks, then the machine.

use std::time::{Duration, Instant};

use cubby_protocol::message::Mark;
use rustix::system::{RebootCommand, reboot};

use crate::boot::mark::Marks;
use crate::control::Control;
use crate::sys;

const EVERYBODY: i32 = 1;
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;
const SIGCONT: i32 = 18;

/// How long processes that were killed may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(2);

/// How far the end of all processes has come.
#[derive(Debug)]
pub struct Progress {
    deadline: Instant,
    killing: bool,
    over: bool,
}

impl Progress {
    /// Asks every process but PID 1 to end. Only PID 1 of a guest may call this.
    pub fn start(grace: Duration) -> Self {
        // Nobody there is no failure. A stopped process can only act on TERM once it goes on.
        let _ = sys::kill_group(EVERYBODY, SIGTERM);
        let _ = sys::kill_group(EVERYBODY, SIGCONT);
        Self { deadline: Instant::now() + grace, killing: false, over: false }
    }

    /// When [`Self::pass_time`] wants to be called.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Every process but this one is gone: all are descendants of PID 1, and it has no child left.
    pub fn nobody_left(&mut self) {
        self.over = true;
    }

    /// Kills those that did not go in time, and then gives up on those that cannot be killed.
    pub fn pass_time(&mut self, now: Instant) {
        if now < self.deadline {
            return;
        }
        if self.killing {
            self.over = true;
            return;
        }
        let _ = sys::kill_group(EVERYBODY, SIGKILL);
        self.killing = true;
        self.deadline = now + KILL_WAIT;
    }

    /// Whether the guest may be powered off.
    pub fn is_over(&self) -> bool {
        self.over
    }
}

/// Writes the disks, tells the host, and ends the machine.
///
/// Everything written is on the disk after `sync`; the journal is replayed at the next mount. Making the file system
/// read-only first would spare that, but reconfiguring ext4 below an overlay blocked for ever when tried on 6.12.
pub fn off(control: Option<Control>, marks: &Marks) -> ! {
    rustix::fs::sync();
    if let Some(control) = control {
        control.announce_power_off();
    }
    marks.set(Mark::PowerOff);
    halt()
}

/// Ends the machine without a word to the host, for which this is a crash. A reset always leaves the guest, while
/// a kernel without ACPI knows no power-off and would stand still for ever.
pub fn halt() -> ! {
    loop {
        // PID 1 has the right, so this does not return.
        let _ = reboot(RebootCommand::Restart);
        std::thread::park();
    }
}
