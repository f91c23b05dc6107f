//! The process locks itself in: once everything is open and before the guest's first instruction it gives up
//! what it will not need, so that who takes it over through the devices gains little by it.
//!
//! | what | where | how it refuses |
//! |---|---|---|
//! | descriptors that the application left open | first line of `main` | they are closed |
//! | privileges: `no_new_privs`, capabilities | every thread | `EPERM` |
//! | files: Landlock | every thread | `EACCES` |
//! | system calls: a seccomp filter for each kind of thread | every thread | the process is killed (SIGSYS) |
//! | limits: descriptors, file sizes, core dumps | the process | `EMFILE`, SIGXFSZ |
//!
//! The VMM's threads call [`LockIn::thread`] before anything else, the main thread [`LockIn::finish`] before it
//! lets the vCPUs run. A host whose kernel has no seccomp runs no sandbox. One without Landlock does, and says
//! so in the sandbox's `process.log`: seccomp still holds there, but the main thread may open what its user may.
//! `docs/adr/0011-lock-in.md` has the reasons.

mod calls;
mod files;
mod filter;
mod limits;
mod privileges;

use std::fmt::Display;
use std::io;
use std::sync::Arc;

use cubby_state::Home;
use cubby_vmm::{OnThread, ThreadKind};
use rustix::process::Pid;

pub(crate) use limits::Limits;

/// All that the process will be confined to, ready to be put on thread after thread.
pub(crate) struct LockIn {
    files: files::Files,
    vcpu: filter::Filter,
    worker: filter::Filter,
    main: filter::Filter,
    pid: Pid,
}

/// What stood in the way, and of which part.
fn refused(what: &'static str) -> impl Fn(&dyn Display) -> io::Error {
    move |why| io::Error::other(format!("{what}: {why}"))
}

impl LockIn {
    /// Prepares for the process that serves a sandbox of `home`. From here on it can lose privileges only, and so can the
    /// threads that it starts. `connects`: its main thread may connect to Unix sockets.
    pub(crate) fn prepare(home: &Home, connects: bool) -> io::Result<Arc<Self>> {
        // The usual report of a panic would look at files and memory maps for a backtrace.
        std::panic::set_hook(Box::new(|panic| crate::say(panic)));
        privileges::gain_none()?;
        let pid = rustix::process::getpid();
        let targets: &[_] = if connects { calls::TARGETS } else { &[] };
        Ok(Arc::new(Self {
            files: files::Files::of(home)?,
            vcpu: filter::compile(&[calls::EVERY_THREAD, calls::VCPU], pid)?,
            worker: filter::compile(&[calls::EVERY_THREAD, calls::WORKER], pid)?,
            main: filter::compile(&[calls::EVERY_THREAD, calls::MAIN, targets], pid)?,
            pid,
        }))
    }

    /// What the VMM does on each of its threads.
    pub(crate) fn on_thread(self: &Arc<Self>) -> OnThread {
        let lock_in = self.clone();
        Arc::new(move |kind| lock_in.thread(kind))
    }

    /// Confines a thread of the VMM, which is the calling one.
    pub(crate) fn thread(&self, kind: ThreadKind) -> io::Result<()> {
        match kind {
            ThreadKind::Vcpu => self.confine(&self.files, &self.vcpu),
            ThreadKind::Worker => self.confine(&self.files, &self.worker),
            // Not every sandbox has it, and none has two.
            ThreadKind::Network => {
                let filter = filter::compile(&[calls::EVERY_THREAD, calls::NETWORK], self.pid)?;
                self.confine(&files::Files::of_network()?, &filter)
            }
        }
        .map(drop)
    }

    /// Confines the process and the calling thread, its main one. All others have been by now, and there will
    /// be no more of them.
    pub(crate) fn finish(self: Arc<Self>, limits: &Limits) -> io::Result<()> {
        limits::set(limits)?;
        if !self.confine(&self.files, &self.main)? {
            crate::say("this host's kernel has no Landlock: files are not kept from this process");
        }
        Ok(())
    }

    /// Confines the calling thread, and says whether that goes for files as well. The filter is the last, since
    /// it takes away what the others need.
    fn confine(&self, files: &files::Files, filter: &filter::Filter) -> io::Result<bool> {
        privileges::drop_all()?;
        let files = files.confine()?;
        filter.install()?;
        Ok(files)
    }
}

#[cfg(test)]
mod tests;
