//! What time does to a sandbox: how long its boot may take, when nobody has used it for too long, when it has lived
//! long enough, and how an end that has begun goes on: a drain becomes a stop, a stop a kill.
//!
//! [`Policies`] holds deadlines and no machine. The supervisor tells it what happens and does what falls
//! [`Due`]; the lifecycle's table still decides whether that is legal.

use std::time::{Duration, Instant};

use cubby_state::{ExitReason, SandboxConfig, Status};

/// How long a stop has that nobody gave a time: of a drain that has finished, or has come to its deadline.
pub(crate) const STOP: Duration = Duration::from_secs(10);

/// How long the sessions of a sandbox may finish whose time is up.
pub(crate) const LAST_SESSIONS: Duration = Duration::from_secs(5);

/// How long the VM has to say what happened once the agent is gone: a panic resets it at once.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What has to be done now, because its time has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// Give up the boot.
    Boot,
    /// Drain: nobody has used the sandbox for its idle timeout.
    Idle,
    /// Drain, with [`LAST_SESSIONS`] as the deadline: the sandbox has lived for its maximum duration.
    Lifetime,
    /// Ask the agent to power off within [`STOP`]: the drain is over, or has taken long enough.
    Stop,
    /// Kill: the stop has taken too long.
    Kill,
}

/// An end that has begun.
struct Ending {
    reason: ExitReason,
    /// Whether it still waits for sessions to finish.
    draining: bool,
    /// When waiting ends.
    deadline: Option<Instant>,
}

/// The deadlines of one sandbox.
pub(crate) struct Policies {
    idle: Option<Duration>,
    longest: Option<Duration>,
    /// Until when the agent must be ready.
    boot: Option<Instant>,
    last_use: Instant,
    /// Until when the sandbox may live.
    lifetime: Option<Instant>,
    ending: Option<Ending>,
}

impl Policies {
    /// Those of a sandbox whose boot begins now.
    pub(crate) fn new(config: &SandboxConfig, boot_timeout: Duration, now: Instant) -> Self {
        Self {
            idle: config.idle_timeout_s.map(Duration::from_secs),
            longest: config.max_duration_s.map(Duration::from_secs),
            boot: now.checked_add(boot_timeout),
            last_use: now,
            lifetime: None,
            ending: None,
        }
    }

    /// The agent is ready: the other clocks begin.
    pub(crate) fn ready(&mut self, now: Instant) {
        self.boot = None;
        self.last_use = now;
        self.lifetime = self.longest.and_then(|longest| now.checked_add(longest));
    }

    /// Whether the agent has not been ready yet.
    pub(crate) fn is_booting(&self) -> bool {
        self.boot.is_some()
    }

    /// Somebody uses the sandbox.
    pub(crate) fn used(&mut self, now: Instant) {
        self.last_use = now;
    }

    /// Sessions may finish, until `deadline` if there is one. A second drain can only hurry the first, and a stop
    /// goes on as it is.
    pub(crate) fn drain(&mut self, reason: ExitReason, deadline: Option<Instant>) {
        match &mut self.ending {
            Some(ending) if ending.draining => ending.deadline = earlier(ending.deadline, deadline),
            Some(_) => {}
            None => self.ending = Some(Ending { reason, draining: true, deadline }),
        }
    }

    /// The guest's processes are being ended, and must be until `deadline`.
    pub(crate) fn stop(&mut self, reason: ExitReason, deadline: Option<Instant>) {
        let ending = self.ending.get_or_insert(Ending { reason, draining: false, deadline });
        ending.draining = false;
        ending.deadline = earlier(ending.deadline, deadline);
    }

    /// The agent is gone and had not announced that.
    pub(crate) fn agent_lost(&mut self, now: Instant) {
        self.stop(ExitReason::AgentDied, now.checked_add(LAST_WORDS));
    }

    /// The VM is being ended at once; whatever was the reason before, it is `reason` now.
    pub(crate) fn end(&mut self, reason: ExitReason) {
        self.ending = Some(Ending { reason, draining: false, deadline: None });
    }

    /// Why the sandbox is about to end, if it is.
    pub(crate) fn cause(&self) -> Option<&ExitReason> {
        self.ending.as_ref().map(|ending| &ending.reason)
    }

    /// What is due, for a sandbox with `status` and open `sessions`. Each thing is told once.
    pub(crate) fn due(&mut self, status: Status, sessions: usize, now: Instant) -> Option<Due> {
        let passed = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        if sessions > 0 {
            self.last_use = now;
        }
        if passed(self.boot) {
            self.boot = None;
            return Some(Due::Boot);
        }
        if passed(self.lifetime) {
            self.lifetime = None;
            return Some(Due::Lifetime);
        }
        if passed(self.idle_until(status, sessions)) {
            return Some(Due::Idle);
        }
        let ending = self.ending.as_mut()?;
        if ending.draining && (sessions == 0 || passed(ending.deadline)) {
            ending.draining = false;
            ending.deadline = now.checked_add(STOP);
            return Some(Due::Stop);
        }
        if !ending.draining && passed(ending.deadline) {
            ending.deadline = None;
            return Some(Due::Kill);
        }
        None
    }

    /// How long until something may be due if nothing happens before.
    pub(crate) fn wait(&self, status: Status, sessions: usize, now: Instant) -> Option<Duration> {
        let ending = self.ending.as_ref().and_then(|ending| ending.deadline);
        [self.boot, self.lifetime, self.idle_until(status, sessions), ending]
            .into_iter()
            .flatten()
            .min()
            .map(|deadline| deadline.saturating_duration_since(now))
    }

    /// Until when the sandbox may be idle. The clock stands still in every status but Running, and once it ends.
    fn idle_until(&self, status: Status, sessions: usize) -> Option<Instant> {
        let idle =
            self.idle.filter(|_| status == Status::Running && sessions == 0 && self.ending.is_none())?;
        self.last_use.checked_add(idle)
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    [one, other].into_iter().flatten().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: Duration = Duration::from_secs(100);

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// Policies with both limits, booted at the instant that is returned.
    fn running() -> (Policies, Instant) {
        let mut config = SandboxConfig::new("python:3.12");
        (config.idle_timeout_s, config.max_duration_s) = (Some(10), Some(60));
        let now = Instant::now();
        let mut policies = Policies::new(&config, BOOT, now);
        policies.ready(now);
        (policies, now)
    }

    #[test]
    fn a_boot_has_its_time_and_nothing_else_runs_meanwhile() {
        let mut config = SandboxConfig::new("python:3.12");
        (config.idle_timeout_s, config.max_duration_s) = (Some(1), Some(1));
        let now = Instant::now();
        let mut policies = Policies::new(&config, BOOT, now);
        assert!(policies.is_booting());
        assert_eq!(policies.due(Status::Creating, 0, now + BOOT - seconds(1)), None);
        assert_eq!(policies.wait(Status::Creating, 0, now + seconds(1)), Some(BOOT - seconds(1)));
        assert_eq!(policies.due(Status::Creating, 0, now + BOOT), Some(Due::Boot));
        assert_eq!(policies.due(Status::Creating, 0, now + BOOT), None);
    }

    #[test]
    fn only_a_running_sandbox_without_sessions_is_idle() {
        let (mut policies, now) = running();
        assert_eq!(policies.due(Status::Running, 0, now + seconds(9)), None);
        policies.used(now + seconds(9));
        assert_eq!(policies.due(Status::Running, 1, now + seconds(30)), None);
        assert_eq!(
            policies.wait(Status::Running, 1, now + seconds(30)),
            Some(seconds(30)),
            "only its lifetime"
        );
        // An open session is use.
        assert_eq!(policies.due(Status::Running, 0, now + seconds(39)), None);
        assert_eq!(policies.due(Status::Paused, 0, now + seconds(45)), None);
        assert_eq!(policies.wait(Status::Running, 0, now + seconds(35)), Some(seconds(5)));
        assert_eq!(policies.due(Status::Running, 0, now + seconds(40)), Some(Due::Idle));
        policies.drain(ExitReason::IdleTimeout, None);
        assert_eq!(policies.due(Status::Draining, 0, now + seconds(40)), Some(Due::Stop));
        assert_eq!(policies.cause(), Some(&ExitReason::IdleTimeout));
    }

    #[test]
    fn a_lifetime_ends_in_a_drain_then_a_stop_then_a_kill() {
        let (mut policies, now) = running();
        let up = now + seconds(60);
        assert_eq!(policies.due(Status::Running, 1, up), Some(Due::Lifetime));
        policies.drain(ExitReason::MaxDuration, Some(up + LAST_SESSIONS));
        assert_eq!(policies.due(Status::Draining, 1, up), None);
        assert_eq!(policies.wait(Status::Draining, 1, up), Some(LAST_SESSIONS));
        let late = up + LAST_SESSIONS;
        assert_eq!(policies.due(Status::Draining, 1, late), Some(Due::Stop));
        assert_eq!(policies.due(Status::Draining, 1, late), None);
        assert_eq!(policies.wait(Status::Draining, 1, late), Some(STOP));
        assert_eq!(policies.due(Status::Draining, 1, late + STOP), Some(Due::Kill));
        assert_eq!(policies.due(Status::Draining, 1, late + STOP), None);
        assert_eq!(policies.cause(), Some(&ExitReason::MaxDuration));
    }

    #[test]
    fn a_drain_ends_with_the_last_session_or_at_its_deadline() {
        let (mut policies, now) = running();
        policies.drain(ExitReason::Drained, None);
        assert_eq!(policies.due(Status::Draining, 1, now + seconds(50)), None);
        // The second hurries the first, and a third with more time does not slow it.
        policies.drain(ExitReason::Requested, Some(now + seconds(51)));
        policies.drain(ExitReason::Requested, Some(now + seconds(59)));
        assert_eq!(policies.due(Status::Draining, 1, now + seconds(50)), None);
        assert_eq!(policies.due(Status::Draining, 1, now + seconds(51)), Some(Due::Stop));
        assert_eq!(policies.cause(), Some(&ExitReason::Drained), "who began has the word");
    }

    #[test]
    fn a_stop_hurries_a_drain_and_a_drain_does_not_undo_a_stop() {
        let (mut policies, now) = running();
        policies.drain(ExitReason::Drained, None);
        policies.stop(ExitReason::Requested, Some(now + seconds(2)));
        policies.drain(ExitReason::IdleTimeout, Some(now + seconds(1)));
        assert_eq!(policies.due(Status::Draining, 1, now + seconds(1)), None);
        assert_eq!(policies.due(Status::Draining, 1, now + seconds(2)), Some(Due::Kill));
        // A lifetime that is up in the middle of a drain gives it a deadline.
        let (mut policies, now) = running();
        policies.drain(ExitReason::Drained, None);
        assert_eq!(policies.due(Status::Draining, 1, now + seconds(60)), Some(Due::Lifetime));
    }

    #[test]
    fn a_kill_has_the_last_word_and_a_lost_agent_little_time() {
        let (mut policies, now) = running();
        policies.agent_lost(now);
        assert_eq!(policies.due(Status::Running, 0, now), None);
        assert_eq!(policies.due(Status::Running, 0, now + LAST_WORDS), Some(Due::Kill));
        assert_eq!(policies.cause(), Some(&ExitReason::AgentDied));
        policies.end(ExitReason::Killed);
        assert_eq!(policies.cause(), Some(&ExitReason::Killed));
    }
}
