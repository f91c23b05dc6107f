//! How a VM's end is reported: from what the VMM saw, what the agent announced and what was asked for.

use cubby_state::ExitReason;
use cubby_vmm::Exit;

/// What was known when the VM ended.
pub(crate) struct Evidence<'a> {
    /// What the VMM saw.
    pub(crate) exit: &'a Exit,
    /// The agent had announced its power-off.
    pub(crate) announced: bool,
    /// Why the sandbox was about to end, if it was.
    pub(crate) cause: Option<&'a ExitReason>,
    /// How far the boot had come, if the agent was never ready.
    pub(crate) boot_stage: Option<&'a str>,
    /// What the guest wrote to its console.
    pub(crate) console: &'a str,
}

/// The reason to record.
pub(crate) fn reason(evidence: &Evidence<'_>) -> ExitReason {
    match (evidence.exit, evidence.cause) {
        // Somebody wanted it gone, and the way it went does not matter any more.
        (Exit::Killed, Some(cause)) => cause.clone(),
        (Exit::PowerOff, Some(cause)) if evidence.announced => cause.clone(),
        // The agent has said which step of the boot failed; how it ended after that says less.
        (_, Some(cause @ ExitReason::BootFailed { .. })) => cause.clone(),
        _ => match evidence.boot_stage {
            Some(stage) => ExitReason::BootFailed { stage: stage.into() },
            None => crash(evidence),
        },
    }
}

fn crash(evidence: &Evidence<'_>) -> ExitReason {
    let panicked = evidence.console.contains("Kernel panic - not syncing");
    let init_died = evidence.console.contains("Attempted to kill init");
    match evidence.exit {
        Exit::Reset | Exit::TripleFault if init_died => ExitReason::AgentDied,
        Exit::Reset | Exit::TripleFault if panicked => ExitReason::GuestPanic,
        Exit::Reset | Exit::TripleFault => ExitReason::GuestReset,
        // Nobody had asked the agent to power off, or it forgot to say so first.
        Exit::PowerOff => ExitReason::AgentDied,
        Exit::KvmFailure { .. } => ExitReason::GuestReset,
        Exit::Killed => ExitReason::Killed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence(exit: &Exit) -> Evidence<'_> {
        Evidence { exit, announced: false, cause: None, boot_stage: None, console: "" }
    }

    #[test]
    fn a_power_off_counts_only_when_asked_for_and_announced() {
        let drained = ExitReason::Drained;
        let asked = Evidence { announced: true, cause: Some(&drained), ..evidence(&Exit::PowerOff) };
        assert_eq!(reason(&asked), ExitReason::Drained);
        assert_eq!(reason(&Evidence { announced: false, ..asked }), ExitReason::AgentDied);
        assert_eq!(reason(&evidence(&Exit::PowerOff)), ExitReason::AgentDied);
    }

    #[test]
    fn crashes_are_told_apart_by_what_the_guest_said_last() {
        let panic = Evidence { console: "Kernel panic - not syncing: sysrq", ..evidence(&Exit::Reset) };
        assert_eq!(reason(&panic), ExitReason::GuestPanic);
        let init = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x9";
        assert_eq!(reason(&Evidence { console: init, ..evidence(&Exit::Reset) }), ExitReason::AgentDied);
        assert_eq!(reason(&evidence(&Exit::Reset)), ExitReason::GuestReset);
        assert_eq!(reason(&evidence(&Exit::TripleFault)), ExitReason::GuestReset);
    }

    #[test]
    fn an_end_before_ready_is_a_failed_boot_unless_somebody_wanted_it() {
        let booting = Evidence { boot_stage: Some("kernel"), ..evidence(&Exit::Reset) };
        assert_eq!(reason(&booting), ExitReason::BootFailed { stage: "kernel".into() });
        let told = ExitReason::BootFailed { stage: "image mount".into() };
        assert_eq!(reason(&Evidence { cause: Some(&told), ..booting }), told);
        let killed = ExitReason::Killed;
        let wanted = Evidence { boot_stage: Some("kernel"), cause: Some(&killed), ..evidence(&Exit::Killed) };
        assert_eq!(reason(&wanted), ExitReason::Killed);
    }
}
