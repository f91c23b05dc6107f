//! The boot's part of the supervisor: how far it has come, and how it ends, well or not.

use std::time::Instant;

use cubby_protocol::message::Mark;
use cubby_state::{Event, ExitReason, LaunchReport};
use cubby_vmm::devices::vsock::Vsock;

use super::Supervisor;
use crate::machine;

impl Supervisor<'_> {
    pub(super) fn on_ready(&mut self, vsock: &mut Vsock) {
        if !self.policies.is_booting() || self.apply(Event::Ready).is_err() {
            return;
        }
        self.policies.ready(Instant::now());
        self.relay.set_agent_ready(vsock);
        self.pipes.set_ready();
        self.launch.report(&LaunchReport::Ready { boot: self.boot_phases() });
        // The guest goes this way for the first time while nobody waits for it, and not at its first resume.
        self.control.set_clock(machine::realtime_ns(), vsock);
    }

    /// The steps of the boot, each with its end in nanoseconds after the process began.
    fn boot_phases(&self) -> Vec<(String, u64)> {
        let since = |instant: Instant| {
            u64::try_from(instant.saturating_duration_since(self.began).as_nanos()).unwrap_or(u64::MAX)
        };
        let mut phases =
            self.vm.phases().iter().map(|(name, at)| ((*name).into(), since(*at))).collect::<Vec<_>>();
        phases.extend(self.marked.all().into_iter().map(|(mark, at)| (mark.name().into(), since(at))));
        phases.push(("ready".into(), since(Instant::now())));
        phases
    }

    pub(super) fn boot_failed(&mut self, stage: &str, message: &str) {
        self.launch.fail(
            ExitReason::BootFailed { stage: stage.into() },
            message.into(),
            None,
            Some(self.console()),
        );
        self.policies.end(ExitReason::BootFailed { stage: stage.into() });
        self.vm.cut_power();
    }

    /// What the guest was doing when it came no further: the step after its last mark.
    pub(super) fn boot_stage(&self) -> &'static str {
        match self.marked.all().last() {
            None => Mark::AgentStarted.name(),
            Some((Mark::AgentStarted, _)) => Mark::Configured.name(),
            Some((Mark::Configured, _)) => Mark::RootMounted.name(),
            Some(_) => Mark::Ready.name(),
        }
    }
}
