//! The end of a sandbox that its process could not record, because the store has no room for it: it is left to the
//! keeper in a file without a name, which a fork shares. What the process knows, and nobody else does, is lost with it
//! otherwise.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use cubby_state::{ExitReport, LaunchSpec, Status, Store, StoreError};
use rustix::fs::{MemfdFlags, memfd_create};

/// What a sandbox process leaves to its keeper.
pub(crate) struct Will(File);

impl Will {
    /// The most that is read, in bytes: a report with the whole of a console, each byte of it escaped, is shorter.
    const MOST: u64 = 1 << 20;

    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(File::from(memfd_create("will", MemfdFlags::CLOEXEC)?)))
    }

    /// Records how the run of `spec` ended, or leaves that to the keeper, and says why.
    ///
    /// # Errors
    /// Those of [`Store::record_end`].
    pub(crate) fn record(
        &self,
        store: &Store,
        spec: &LaunchSpec,
        report: &ExitReport,
    ) -> Result<Status, StoreError> {
        store.record_end(spec.run, report).inspect_err(|error| {
            if let (true, Ok(text)) = (error.may_pass(), serde_json::to_vec(report)) {
                // Without it the keeper says what it saw itself.
                let _ = self.0.write_all_at(&text, 0);
            }
        })
    }

    /// What was left.
    pub(crate) fn read(&self) -> Option<ExitReport> {
        let length = self.0.metadata().ok()?.len().min(Self::MOST);
        let mut text = vec![0; usize::try_from(length).ok()?];
        self.0.read_exact_at(&mut text, 0).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

#[cfg(test)]
mod tests {
    use cubby_state::ExitReason;

    use super::*;

    #[test]
    fn a_report_comes_back_whole_and_what_is_none_does_not() {
        let will = Will::new().unwrap();
        assert_eq!(will.read(), None);
        let console = "\u{1}".repeat(ExitReport::MAX_CONSOLE_TAIL);
        let report = ExitReport::now(ExitReason::GuestPanic).with_console(&console);
        let text = serde_json::to_vec(&report).unwrap();
        assert!(text.len() as u64 <= Will::MOST);
        will.0.write_all_at(&text, 0).unwrap();
        assert_eq!(will.read(), Some(report));
        // Whoever has taken over the sandbox process costs its keeper no more than this.
        will.0.set_len(1 << 40).unwrap();
        assert_eq!(will.read(), None);
    }
}
