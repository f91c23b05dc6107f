//! The threads of a VM: how they start, and the embedder's say in it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use crate::config::Error;

/// What a thread of a VM does. What it may have to call of the host's kernel follows from that, unless noted here:
/// memory, futexes, and what ends a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// Runs one vCPU: `KVM_RUN`, writes to eventfds, the kick signal and its return.
    Vcpu,
    /// Runs one disk: waits on epoll, reads, writes, syncs and punches its file, writes to eventfds.
    Worker,
    /// Works the network card and the network behind it: waits on epoll, writes to eventfds, and whatever
    /// [`crate::NetBackend`] calls.
    Network,
}

/// What an embedder does at the start of each thread, on it and before anything else: confine it, pin it, name it
/// to a profiler. An error fails the boot.
pub type OnThread = Arc<dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync>;

/// Starts the threads of one VM.
pub(crate) struct Threads {
    on_thread: Option<OnThread>,
    report: Sender<io::Result<()>>,
    reports: Receiver<io::Result<()>>,
    awaited: usize,
}

impl Threads {
    pub(crate) fn new(on_thread: Option<OnThread>) -> Self {
        let (report, reports) = channel();
        Self { on_thread, report, reports, awaited: 0 }
    }

    /// Starts a thread, which does nothing if the embedder's part of it fails.
    pub(crate) fn spawn(
        &mut self,
        kind: ThreadKind,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let builder = Builder::new().name(name);
        let Some(on_thread) = self.on_thread.clone() else { return builder.spawn(body) };
        let report = self.report.clone();
        let thread = builder.spawn(move || {
            let outcome = on_thread(kind);
            let goes_on = outcome.is_ok();
            // Whatever the embedder's function holds goes before the boot does.
            drop(on_thread);
            // Nobody listens any more if the boot has failed for another reason.
            let _ = report.send(outcome);
            drop(report);
            if goes_on {
                body();
            }
        })?;
        self.awaited += 1;
        Ok(thread)
    }

    /// Waits until the embedder's part is done on every thread, and says whether it went well.
    pub(crate) fn wait(self) -> Result<(), Error> {
        for _ in 0..self.awaited {
            let outcome = self.reports.recv().unwrap_or_else(|closed| Err(io::Error::other(closed)));
            outcome.map_err(Error::resource("a thread as the embedder wants it"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn the_embedder_is_called_on_each_thread_before_its_work() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let note = {
            let seen = seen.clone();
            move |what: String| seen.lock().unwrap().push((std::thread::current().id(), what))
        };
        let hook = note.clone();
        let mut threads = Threads::new(Some(Arc::new(move |kind| {
            hook(format!("{kind:?}"));
            Ok(())
        })));
        let mut ids = Vec::new();
        for (kind, name) in [(ThreadKind::Vcpu, "vcpu0"), (ThreadKind::Worker, "disk0")] {
            let note = note.clone();
            let thread = threads.spawn(kind, name.into(), move || note("work".into())).unwrap();
            ids.push((thread.thread().id(), kind));
            thread.join().unwrap();
        }
        threads.wait().unwrap();
        let expected: Vec<_> =
            ids.iter().flat_map(|(id, kind)| [(*id, format!("{kind:?}")), (*id, "work".into())]).collect();
        assert_eq!(*seen.lock().unwrap(), expected);
    }

    #[test]
    fn a_thread_that_the_embedder_refuses_does_nothing_and_fails_the_boot() {
        let worked = Arc::new(AtomicBool::new(false));
        let mut threads = Threads::new(Some(Arc::new(|kind| match kind {
            ThreadKind::Vcpu => Err(io::Error::other("refused")),
            ThreadKind::Worker | ThreadKind::Network => Ok(()),
        })));
        threads.spawn(ThreadKind::Worker, "disk0".into(), || {}).unwrap().join().unwrap();
        let flag = worked.clone();
        let thread =
            threads.spawn(ThreadKind::Vcpu, "vcpu0".into(), move || flag.store(true, Ordering::SeqCst));
        thread.unwrap().join().unwrap();
        let error = threads.wait().unwrap_err();
        assert!(
            matches!(&error, Error::Resource { source, .. } if source.to_string() == "refused"),
            "{error:?}"
        );
        assert!(!worked.load(Ordering::SeqCst));
    }
}
