//! The sandbox's one authority: a loop that owns the VM, the relay, the agent's connection and the state, and
//! takes everything that happens one after another, so that races have an order.

mod boot;
mod rules;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cubby_protocol::SessionId;
use cubby_protocol::message::{Refused, Reply, Request, SandboxStatus};
use cubby_state::{Event, ExitReason, ExitReport, LaunchSpec, Next, Status, Store};
use cubby_vmm::devices::Device;
use cubby_vmm::devices::vsock::{How, Port, Vsock, VsockEvent};
use cubby_vmm::{EventLoop, Exit, Vm};
use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use vmm_sys_util::epoll::EventSet;

use crate::client::Gate;
use crate::console_tap::ConsoleTap;
use crate::control::{Control, Said};
use crate::ending::{self, Evidence};
use crate::launch::Launch;
use crate::machine::{self, Marked};
use crate::network::Exchange;
use crate::pipes::{self, Pipes};
use crate::policy::{self, Due, Policies};
use crate::relay::{Asked, Relay};
use crate::signals::{self, Signals, Wish};
use crate::will::Will;

use rules::NetworkOffice;

/// Event data of the descriptors that are no client's.
const EXIT: u32 = u32::MAX;
const LAUNCH: u32 = u32::MAX - 1;
const SIGNALS: u32 = u32::MAX - 2;
const CONSOLE: u32 = u32::MAX - 3;
const NETWORK: u32 = u32::MAX - 4;

/// How long an attached sandbox has to end once its application is gone.
const ORPHAN_TIMEOUT: Duration = Duration::from_millis(1500);

/// How long the guest waits for the news that its packets were taken, when it receives nothing; and a packet that it need
/// not announce for being seen, when no other follows.
const TELL_AFTER: Duration = Duration::from_millis(10);

/// What the guest's processes get of a stop's time-out between TERM and KILL; the rest is for sync.
fn grace(timeout: Duration) -> u32 {
    u32::try_from(timeout.as_millis() * 8 / 10).unwrap_or(u32::MAX)
}

/// All that a supervisor starts from.
pub(crate) struct Parts<'a> {
    pub(crate) spec: &'a LaunchSpec,
    pub(crate) launch: &'a mut Launch,
    pub(crate) store: &'a Store,
    pub(crate) will: &'a Will,
    pub(crate) relay: Relay,
    pub(crate) pipes: Pipes,
    pub(crate) tap: ConsoleTap,
    pub(crate) exchange: Option<Exchange>,
    pub(crate) vm: Vm,
    pub(crate) events: EventLoop,
    pub(crate) marked: Marked,
    pub(crate) signals: Signals,
    pub(crate) began: Instant,
}

struct Supervisor<'a> {
    spec: &'a LaunchSpec,
    status: Status,
    launch: &'a mut Launch,
    store: &'a Store,
    will: &'a Will,
    relay: Relay,
    pipes: Pipes,
    tap: ConsoleTap,
    network: Option<NetworkOffice>,
    control: Control,
    vm: Vm,
    vsock: Arc<Mutex<Vsock>>,
    marked: Marked,
    signals: Signals,
    began: Instant,
    attached: bool,
    policies: Policies,
    announced: bool,
    /// When the guest is told which of its packets were taken, if nothing else does before.
    tell: Option<Instant>,
    /// Who wants to know when it is over.
    waiters: Vec<Asked>,
}

/// The descriptors of the supervisor, as a subscriber that only notes what happened.
struct Inbox {
    sources: Vec<(i32, u32)>,
    happened: Arc<Mutex<Vec<Events>>>,
}

impl MutEventSubscriber for Inbox {
    fn init(&mut self, ops: &mut EventOps) {
        for (descriptor, data) in &self.sources {
            let _ = ops.add(Events::with_data_raw(*descriptor, *data, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        self.happened.lock().unwrap_or_else(PoisonError::into_inner).push(events);
    }
}

/// Carries the sandbox from its first instruction to its record in the store.
pub(crate) fn run(parts: Parts<'_>) -> Result<(), String> {
    use std::os::fd::AsRawFd;
    let Parts {
        spec,
        launch,
        store,
        will,
        mut relay,
        pipes,
        tap,
        exchange,
        vm,
        mut events,
        marked,
        signals,
        began,
    } = parts;
    let config = machine::guest_config(spec).map_err(|error| error.to_string())?;
    let vsock = vm.vsock().cloned().ok_or("the VM has no vsock")?;
    let happened = Arc::new(Mutex::new(Vec::new()));
    let mut sources = vec![
        (relay.listener().as_raw_fd(), Relay::LISTENER),
        (pipes.listener().as_raw_fd(), pipes::LISTENER),
        (vm.exit_event().as_raw_fd(), EXIT),
        (launch.socket().as_raw_fd(), LAUNCH),
        (signals.descriptor().as_raw_fd(), SIGNALS),
        (tap.event().as_raw_fd(), CONSOLE),
    ];
    if let Some(exchange) = &exchange {
        sources.push((exchange.news().as_raw_fd(), NETWORK));
        relay.set_network();
    }
    let inbox = events.add_subscriber(Box::new(Inbox { sources, happened: happened.clone() }));
    let boot_timeout = Duration::from_millis(spec.boot_timeout_ms);
    let mut supervisor = Supervisor {
        status: Status::Creating,
        attached: spec.attached,
        policies: Policies::new(&spec.config, boot_timeout, Instant::now()),
        control: Control::new(config),
        announced: false,
        tell: None,
        waiters: Vec::new(),
        spec,
        launch,
        store,
        will,
        relay,
        pipes,
        tap,
        network: exchange.map(NetworkOffice::new),
        vm,
        vsock,
        marked,
        signals,
        began,
    };
    supervisor.vsock().listen(Port(cubby_protocol::CONTROL_PORT));
    for port in supervisor.pipes.ports() {
        supervisor.vsock().listen(port);
    }
    supervisor.vsock().be_patient();
    supervisor.vm.resume();
    let mut again = false;
    while supervisor.vm.exit().is_none() {
        let timeout = if again { Some(Duration::ZERO) } else { supervisor.wait() };
        // Rounded up, or the loop would spin through the last millisecond.
        let timeout =
            timeout.map_or(-1, |time| i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        events.run_with_timeout(timeout).map_err(|error| format!("the event loop failed: {error:?}"))?;
        let happened = std::mem::take(&mut *happened.lock().unwrap_or_else(PoisonError::into_inner));
        again = supervisor.turn(happened, &mut events, inbox)?;
    }
    supervisor.finish(&mut events, inbox)
}

impl Supervisor<'_> {
    fn vsock(&self) -> MutexGuard<'_, Vsock> {
        self.vsock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that has happened, once. Whether there is more to do at once.
    fn turn(
        &mut self,
        happened: Vec<Events>,
        events: &mut EventLoop,
        inbox: SubscriberId,
    ) -> Result<bool, String> {
        let mut ops = events.event_ops(inbox).map_err(|error| format!("{error:?}"))?;
        let shared = self.vsock.clone();
        let mut vsock = shared.lock().unwrap_or_else(PoisonError::into_inner);
        for event in happened {
            match event.data() {
                EXIT => {}
                LAUNCH => self.on_launch_closed(&mut ops, &mut vsock),
                SIGNALS => self.on_signals(&mut vsock),
                CONSOLE => self.log_console(),
                NETWORK => self.on_network(),
                data if Pipes::is_ours(data) => self.pipes.on_socket(event, &mut ops),
                _ => self.relay.on_socket(event, &mut ops, &mut vsock),
            }
        }
        if self.tell.is_some_and(|tell| tell <= Instant::now()) {
            self.tell = None;
            vsock.tell();
        }
        let mut again = false;
        while let Some(event) = vsock.poll_event() {
            match event {
                VsockEvent::Again => {
                    again = true;
                    break;
                }
                VsockEvent::Accepted { id, port } if port != Port(cubby_protocol::CONTROL_PORT) => {
                    self.pipes.accept(id, port, &mut vsock, &mut ops);
                }
                VsockEvent::Accepted { id, .. } => {
                    if let Err(error) = self.control.accept(id, &mut vsock) {
                        self.boot_failed("configuration", &error.to_string());
                    }
                }
                VsockEvent::Readable(id) if self.control.is(id) => self.on_control(&mut vsock),
                VsockEvent::Writable(id) if self.control.is(id) => self.control.flush(&mut vsock),
                VsockEvent::Closed(id, _) if self.control.is(id) => self.on_agent_lost(),
                VsockEvent::PeerShutdown(id, How::Read) if self.control.is(id) => {}
                VsockEvent::PeerShutdown(id, _) if self.control.is(id) => self.on_agent_lost(),
                event if self.pipes.on_stream(event, &mut ops) => {}
                VsockEvent::Connected(id)
                | VsockEvent::Readable(id)
                | VsockEvent::Writable(id)
                | VsockEvent::PeerShutdown(id, _) => self.relay.on_stream(id),
                VsockEvent::Closed(id, _) => self.relay.on_stream_closed(id, &mut ops),
            }
        }
        let mut asked = Vec::new();
        self.relay.turn(&mut vsock, &self.gate(), &mut ops, &mut asked);
        if self.status != Status::Paused {
            self.pipes.turn(&mut vsock, &mut ops);
        }
        if let Some(network) = &self.network {
            network.exchange.listen(self.relay.listens());
        }
        if self.relay.take_use() {
            self.policies.used(Instant::now());
        }
        // A pause waits until no vCPU is in a device, and one may be waiting for this.
        drop(vsock);
        for asked in asked {
            self.on_request(asked);
        }
        self.on_time(&mut shared.lock().unwrap_or_else(PoisonError::into_inner));
        let pipes = self.status != Status::Paused && self.pipes.is_awake();
        Ok(again || self.relay.is_awake() || pipes)
    }

    fn gate(&self) -> Gate {
        match self.status {
            Status::Running => Gate::Open,
            Status::Draining => Gate::Closed(Refused::Draining),
            status => Gate::Closed(Refused::InvalidState {
                state: status.to_string(),
                operation: Event::Open.to_string(),
            }),
        }
    }

    /// Changes the state, in memory and in the store, if the table allows it.
    fn apply(&mut self, event: Event) -> Result<(), Reply> {
        match self.status.after(event) {
            Ok(Next::Status(next)) => {
                if next != self.status {
                    self.store
                        .transition(self.spec.run, self.status, event)
                        .map_err(|error| Reply::Failed(crate::chain(&error)))?;
                }
                self.status = next;
                Ok(())
            }
            Ok(Next::Gone) | Err(_) => Err(Reply::Refused(Refused::InvalidState {
                state: self.status.to_string(),
                operation: event.to_string(),
            })),
        }
    }

    fn on_request(&mut self, asked: Asked) {
        let shared = self.vsock.clone();
        let vsock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match &asked.call.request {
            Request::Status => Ok(Some(Reply::Status(SandboxStatus {
                state: self.status.to_string(),
                sessions: u32::try_from(self.relay.sessions()).unwrap_or(u32::MAX),
                clients: self.relay.clients(),
            }))),
            Request::Touch => Ok(Some(Reply::Done)),
            Request::Sessions => Ok(Some(Reply::Sessions(self.relay.list_sessions()))),
            Request::DetachSession { session } => {
                Ok(Some(self.relay.detach_session(asked.client, SessionId(*session))))
            }
            Request::Detach => self.apply(Event::Detach).map(|()| {
                self.attached = false;
                Some(Reply::Done)
            }),
            Request::Pause => self.apply(Event::Pause).map(|()| {
                self.vm.pause();
                self.on_rules();
                Some(Reply::Done)
            }),
            Request::Resume => match self.apply(Event::Resume) {
                Ok(()) => {
                    // What comes now cannot fail, and is done before anything else that is asked.
                    self.relay.reply(&asked, &Reply::Done);
                    return self.unfreeze(&mut vsock());
                }
                Err(refused) => Err(refused),
            },
            Request::Drain { deadline_ms } => {
                let deadline = deadline_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
                self.drain(Event::Drain, ExitReason::Drained, deadline, &mut vsock()).map(|()| None)
            }
            Request::Stop { timeout_ms } => {
                let timeout = Duration::from_millis(*timeout_ms);
                self.stop(Event::Stop, ExitReason::Requested, timeout, &mut vsock()).map(|()| None)
            }
            Request::Kill => match self.status.after(Event::Kill) {
                Ok(_) => {
                    self.kill();
                    Ok(None)
                }
                Err(_) => Ok(Some(Reply::Done)),
            },
            Request::SetNetwork { policy } => match self.set_network(policy) {
                Ok(ticket) => return self.await_rules(ticket, asked),
                Err(refused) => Err(refused),
            },
            Request::NetworkCounters => Ok(Some(self.network_counters())),
        };
        match answer.unwrap_or_else(Some) {
            Some(reply) => self.relay.reply(&asked, &reply),
            // The answer is the end.
            None => self.waiters.push(asked),
        }
    }

    fn unfreeze(&mut self, vsock: &mut Vsock) {
        self.vm.resume();
        self.control.set_clock(machine::realtime_ns(), vsock);
        self.policies.used(Instant::now());
    }

    fn drain(
        &mut self,
        event: Event,
        reason: ExitReason,
        deadline: Option<Instant>,
        vsock: &mut Vsock,
    ) -> Result<(), Reply> {
        let was_paused = self.status == Status::Paused;
        self.apply(event)?;
        if was_paused {
            self.unfreeze(vsock);
        }
        self.policies.drain(reason, deadline);
        Ok(())
    }

    fn stop(
        &mut self,
        event: Event,
        reason: ExitReason,
        timeout: Duration,
        vsock: &mut Vsock,
    ) -> Result<(), Reply> {
        let was = self.status;
        self.apply(event)?;
        self.begin_stop(was, reason, timeout, vsock);
        Ok(())
    }

    /// A stop that nobody is there to be refused: what cannot be written must not make the sandbox live on.
    fn stop_regardless(&mut self, timeout: Duration, vsock: &mut Vsock) {
        let was = self.status;
        let stopped = self.stop(Event::Stop, ExitReason::Requested, timeout, vsock);
        // Otherwise refused only if the sandbox is ending already.
        if let Err(Reply::Failed(_)) = stopped {
            self.begin_stop(was, ExitReason::Requested, timeout, vsock);
        }
    }

    /// The end of a sandbox that `was` in this state.
    fn begin_stop(&mut self, was: Status, reason: ExitReason, timeout: Duration, vsock: &mut Vsock) {
        if was == Status::Paused {
            self.unfreeze(vsock);
        }
        self.policies.stop(reason, Instant::now().checked_add(timeout));
        if was == Status::Creating {
            // There is no agent to ask and nothing to save.
            self.vm.cut_power();
        } else {
            self.control.shut_down(grace(timeout), vsock);
        }
    }

    fn kill(&mut self) {
        self.policies.end(ExitReason::Killed);
        self.vm.cut_power();
    }

    fn on_control(&mut self, vsock: &mut Vsock) {
        loop {
            match self.control.next(vsock) {
                Ok(None) => return,
                Ok(Some(Said::Ready)) => self.on_ready(vsock),
                Ok(Some(Said::PoweringOff)) => self.announced = true,
                Ok(Some(Said::SetupFailed(failed))) => {
                    self.boot_failed(failed.stage.name(), &failed.message);
                    return;
                }
                Err(error) => {
                    self.boot_failed("control-connection", &error.to_string());
                    return;
                }
            }
        }
    }

    /// The agent's connection is gone: unless its power-off follows, the sandbox is of no more use.
    fn on_agent_lost(&mut self) {
        if !self.announced {
            self.policies.agent_lost(Instant::now());
        }
    }

    fn on_launch_closed(&mut self, ops: &mut EventOps, vsock: &mut Vsock) {
        if !self.launch.is_closed() {
            return;
        }
        let _ = ops.remove(Events::empty(self.launch.socket()));
        if self.attached {
            self.stop_regardless(ORPHAN_TIMEOUT, vsock);
        }
    }

    fn on_signals(&mut self, vsock: &mut Vsock) {
        while let Some(signal) = self.signals.next() {
            match signals::wish(signal) {
                Wish::Stop => self.stop_regardless(policy::STOP, vsock),
                // Refused if the sandbox is ending already, or if that cannot be written: then it lives on.
                Wish::Drain => drop(self.drain(Event::Drain, ExitReason::Drained, None, vsock)),
            }
        }
    }

    /// What counts as use, and as work that a drain waits for: whoever only listens uses the sandbox, and has nothing
    /// to finish.
    fn busy(&self) -> usize {
        if self.status == Status::Draining { self.relay.working() } else { self.relay.sessions() }
    }

    /// How long to wait for something to happen until time alone makes it.
    fn wait(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let tell = self.tell.map(|tell| tell.saturating_duration_since(now));
        let policies = self.policies.wait(self.status, self.busy(), now);
        let log = self.relay.log().due().map(|due| due.saturating_duration_since(now));
        [tell, policies, log].into_iter().flatten().min()
    }

    fn on_time(&mut self, vsock: &mut Vsock) {
        self.tell = vsock.has_untold().then(|| self.tell.unwrap_or_else(|| Instant::now() + TELL_AFTER));
        self.relay.log().on_time(Instant::now());
        while let Some(due) = self.policies.due(self.status, self.busy(), Instant::now()) {
            match due {
                Due::Boot => {
                    let stage = self.boot_stage();
                    let message = format!("the agent was not ready after {} ms", self.spec.boot_timeout_ms);
                    return self.boot_failed(stage, &message);
                }
                Due::Idle => {
                    if self.drain(Event::IdleExpired, ExitReason::IdleTimeout, None, vsock).is_err() {
                        // The store cannot be written. It is tried again after another timeout.
                        self.policies.used(Instant::now());
                    }
                }
                Due::Lifetime => {
                    let deadline = Instant::now().checked_add(policy::LAST_SESSIONS);
                    let event = Event::LifetimeExpired;
                    if self.drain(event, ExitReason::MaxDuration, deadline, vsock).is_err() {
                        // What cannot be written must not make it live on.
                        self.policies.drain(ExitReason::MaxDuration, deadline);
                    }
                }
                Due::Stop => self.control.shut_down(grace(policy::STOP), vsock),
                Due::Kill => self.vm.cut_power(),
            }
        }
    }

    fn log_console(&mut self) {
        let (bytes, missing) = self.tap.take();
        self.relay.log().console(&bytes, missing);
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&self.vm.console_tail()).into_owned()
    }

    /// Records the end, tells everybody who waits for it, and lets their answers out.
    fn finish(mut self, events: &mut EventLoop, inbox: SubscriberId) -> Result<(), String> {
        let exit = self.vm.exit().unwrap_or(Exit::Killed);
        self.vm.kill();
        let console = self.console();
        self.log_console();
        // What the agent said last may have come with the exit.
        {
            let vsock = self.vsock.clone();
            let mut vsock = vsock.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = vsock.kick(TRANSMIT_QUEUE);
            while let Ok(Some(said)) = self.control.next(&mut vsock) {
                self.announced |= matches!(said, Said::PoweringOff);
            }
        }
        let reason = ending::reason(&Evidence {
            exit: &exit,
            announced: self.announced,
            cause: self.policies.cause(),
            boot_stage: (self.status == Status::Creating).then(|| self.boot_stage()),
            console: &console,
        });
        if self.policies.is_booting() {
            let message = format!("the VM ended before the agent was ready: {exit:?}");
            self.launch.fail(reason.clone(), message, None, Some(console.clone()));
        }
        let mut report = ExitReport::now(reason);
        if report.reason.status() == Status::Crashed {
            report = report.with_console(&console);
        }
        self.will.record(self.store, self.spec, &report).map_err(|error| crate::chain(&error))?;
        if let Ok(mut ops) = events.event_ops(inbox) {
            for asked in std::mem::take(&mut self.waiters) {
                self.relay.reply(&asked, &Reply::Done);
            }
            let vsock = self.vsock.clone();
            let mut vsock = vsock.lock().unwrap_or_else(PoisonError::into_inner);
            let gate = Gate::Closed(Refused::Draining);
            self.relay.turn(&mut vsock, &gate, &mut ops, &mut Vec::new());
        }
        self.relay.log().write();
        Ok(())
    }
}

/// The vsock's queue from the guest (virtio 1.2 §5.10.2).
const TRANSMIT_QUEUE: usize = 1;
