//! Who calls the devices: an event loop that waits for the guest's kicks. A device lives on the embedder's
//! loop, or on a thread of its own if its backend blocks, as a disk's does. (A network card's thread waits for more than
//! kicks: `net.rs`.)

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use cubby_devices::{Device, Progress};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::lock;
use crate::config::Error;
use crate::thread::{ThreadKind, Threads};

/// An event loop that a [`crate::Vm`] puts its devices on. The embedder adds its own subscribers and
/// runs it.
pub type EventLoop = EventManager<Box<dyn MutEventSubscriber + Send>>;

/// A device and its queues' kicks, as a subscriber of an [`EventLoop`].
pub struct DeviceLoop {
    device: Arc<Mutex<dyn Device>>,
    kicks: Vec<EventFd>,
}

impl DeviceLoop {
    pub(crate) fn new(device: Arc<Mutex<dyn Device>>, kicks: Vec<EventFd>) -> Self {
        Self { device, kicks }
    }

    /// The kicks, for a thread that waits for them by itself.
    pub(crate) fn into_kicks(self) -> Vec<EventFd> {
        self.kicks
    }
}

impl MutEventSubscriber for DeviceLoop {
    fn init(&mut self, ops: &mut EventOps) {
        for (kick, queue) in self.kicks.iter().zip(0u32..) {
            // The descriptor is open and new to this epoll instance: adding it cannot fail.
            let _ = ops.add(Events::with_data(kick, queue, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let queue = events.data() as usize;
        if let Some(kick) = self.kicks.get(queue) {
            let _ = kick.read();
            if lock(&self.device).kick(queue) == Progress::More {
                // The guest will not say it again; others on this loop come first.
                let _ = kick.write(1);
            }
        }
    }
}

/// A thread that runs one device until it is dropped.
pub(crate) struct Worker {
    device: Arc<Mutex<dyn Device>>,
    thread: Option<JoinHandle<()>>,
    stop: EventFd,
}

/// The end of a worker, as a subscriber of its loop.
struct Stop {
    event: EventFd,
    stopped: Arc<Mutex<bool>>,
}

impl MutEventSubscriber for Stop {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&self.event, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        *lock(&self.stopped) = true;
    }
}

impl Worker {
    pub(crate) fn spawn(name: String, device: DeviceLoop, threads: &mut Threads) -> Result<Self, Error> {
        let failed = Error::resource("a device thread");
        let logic = device.device.clone();
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(&failed)?;
        let stopped = Arc::new(Mutex::new(false));
        let mut events = new_loop()?;
        events.add_subscriber(Box::new(device));
        events.add_subscriber(Box::new(Stop {
            event: stop.try_clone().map_err(&failed)?,
            stopped: stopped.clone(),
        }));
        let thread = threads
            .spawn(ThreadKind::Worker, name, move || while !*lock(&stopped) && events.run().is_ok() {})
            .map_err(&failed)?;
        Ok(Self { device: logic, thread: Some(thread), stop })
    }

    /// Waits until the device is between two rounds of requests.
    pub(crate) fn finish_round(&self) {
        drop(lock(&self.device));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An event loop with nothing on it.
pub(crate) fn new_loop() -> Result<EventLoop, Error> {
    EventManager::new().map_err(|error| Error::Resource {
        what: "an event loop",
        source: io::Error::other(format!("{error:?}")),
    })
}
