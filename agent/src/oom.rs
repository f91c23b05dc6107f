//! Tells a process that the kernel killed for memory from one that somebody killed.
//!
//! The kernel's log names every victim (`Out of memory: Killed process 42 (…)`, for the whole guest and for cgroups
//! alike), so that nothing has to be set up per command: the log is read only when a session's process died of
//! a KILL that did not come from here. Lines that user space wrote carry a facility and are passed over.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// The kernel's log, read up to where we last stopped.
#[derive(Debug, Default)]
pub struct OomLog {
    log: Option<OwnedFd>,
    victims: BTreeSet<i32>,
}

impl OomLog {
    /// Whether the kernel chose this process; each death is reported once.
    pub fn names(&mut self, pid: i32) -> bool {
        // Without a kernel log the answer is no: the signal is still reported.
        let _ = self.catch_up();
        self.victims.remove(&pid)
    }

    fn catch_up(&mut self) -> Result<(), Errno> {
        let log = match &self.log {
            Some(log) => log,
            None => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                self.log.insert(rustix::fs::open("/dev/kmsg", flags, Mode::empty())?)
            }
        };
        let mut record = vec![0; 8 << 10];
        loop {
            match rustix::io::read(log, &mut record[..]) {
                Ok(count) => self.victims.extend(victim(record.get(..count).unwrap_or_default())),
                Err(Errno::PIPE | Errno::INTR) => {} // Old records were overwritten.
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// A record is `priority,sequence,time,flags;text`, the priority below 8 for the kernel's own (kernel doc
/// `ABI/testing/dev-kmsg`).
fn victim(record: &[u8]) -> Option<i32> {
    let text = std::str::from_utf8(record).ok()?;
    let (prefix, text) = text.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    let (_, named) = text.split_once("Killed process ").filter(|_| priority < 8)?;
    named.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn victims_are_read_from_the_kernels_own_lines() {
        let line = |text: &str| victim(text.as_bytes());
        assert_eq!(line("3,512,9001,-;Out of memory: Killed process 42 (python3) total-vm:1kB\n"), Some(42));
        assert_eq!(line("3,1,2,-;Memory cgroup out of memory: Killed process 7 (a), UID 0\n"), Some(7));
        assert_eq!(line("12,1,2,-;Out of memory: Killed process 42 (python3)\n"), None);
        assert_eq!(line("6,1,2,-;NET: Registered protocol family\n"), None);
        assert_eq!(line(""), None);
    }
}
