//! One vCPU: a thread that is parked or in `KVM_RUN`. It is born parked, takes commands over a bounded
//! channel, and is brought out of the guest by a kick.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::config::Error;
use crate::exit::{Exit, ExitSlot};
use crate::sys;
use crate::thread::{ThreadKind, Threads};

/// What the owner asks of a vCPU. A closed channel asks it to end.
enum Command {
    /// Go on; the guest does not see the so many ticks of the time stamp counter for which it was parked.
    Run { unseen: u64 },
    /// Stop and say so by dropping the sender.
    Park(SyncSender<()>),
}

/// The owner's side of a vCPU thread.
pub(crate) struct VcpuThread {
    thread: JoinHandle<()>,
    commands: SyncSender<Command>,
}

impl VcpuThread {
    /// Starts the thread of vCPU `index`, parked.
    pub(crate) fn spawn(
        index: u8,
        fd: VcpuFd,
        bus: Arc<Bus>,
        exit: Arc<ExitSlot>,
        threads: &mut Threads,
    ) -> Result<Self, Error> {
        let (commands, receiver) = sync_channel(1);
        let mut vcpu = Vcpu { index, fd, bus, commands: receiver };
        let thread = threads
            .spawn(ThreadKind::Vcpu, format!("vcpu{index}"), move || {
                let kicks = sys::KickTarget::new(&mut vcpu.fd);
                if let Some(how) = vcpu.live() {
                    exit.set(how);
                }
                drop(kicks);
            })
            .map_err(Error::resource("a vCPU thread"))?;
        Ok(Self { thread, commands })
    }

    /// Lets the vCPU run, `unseen` ticks of its counter before where it would be. One that has ended stays ended.
    pub(crate) fn resume(&self, unseen: u64) {
        let _ = self.commands.send(Command::Run { unseen });
    }

    /// Asks the vCPU to park; the receiver reports an error (a closed channel) once it has, or has ended.
    pub(crate) fn park(&self) -> Receiver<()> {
        let (parked, receiver) = sync_channel(0);
        let _ = self.commands.send(Command::Park(parked));
        sys::kick(&self.thread);
        receiver
    }

    /// Ends the thread and waits for it.
    pub(crate) fn end(self) {
        let Self { thread, commands } = self;
        drop(commands);
        sys::kick(&thread);
        let _ = thread.join();
    }
}

struct Vcpu {
    index: u8,
    fd: VcpuFd,
    bus: Arc<Bus>,
    commands: Receiver<Command>,
}

/// What to do after one stay in the guest.
enum Next {
    /// Go back in.
    Enter,
    /// Look at the commands first.
    Interrupted,
    /// The VM is over.
    End(Exit),
}

impl Vcpu {
    /// Parked and running in turns, until the owner closes the channel (`None`) or the guest ends the VM.
    fn live(&mut self) -> Option<Exit> {
        loop {
            match self.commands.recv() {
                Ok(Command::Run { unseen }) => {
                    if unseen > 0 {
                        // A kernel that cannot do it lets the guest's monotonic time move: no reason to end it.
                        let _ = sys::hold_back_tsc(&self.fd, unseen);
                    }
                    if let Some(exit) = self.run_until_parked()? {
                        return Some(exit);
                    }
                }
                Ok(Command::Park(parked)) => drop(parked),
                Err(_) => return None,
            }
        }
    }

    /// `Some(None)` when parked again, `None` when the channel was closed. It looks at the commands before it enters: a
    /// kick may have come when this thread had no [`sys::KickTarget`] yet.
    fn run_until_parked(&mut self) -> Option<Option<Exit>> {
        loop {
            self.fd.set_kvm_immediate_exit(0);
            match self.commands.try_recv() {
                Ok(Command::Park(parked)) => {
                    drop(parked);
                    return Some(None);
                }
                Ok(Command::Run { .. }) | Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return None,
            }
            loop {
                match self.enter() {
                    Next::Enter => {}
                    Next::Interrupted => break,
                    Next::End(exit) => return Some(Some(exit)),
                }
            }
        }
    }

    /// One stay in the guest, and the answer to why it ended.
    fn enter(&mut self) -> Next {
        let failed = |vcpu, reason| Next::End(Exit::KvmFailure { vcpu, reason });
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Next::Interrupted,
            Err(error) => return failed(self.index, format!("KVM_RUN: {error}")),
        };
        match exit {
            VcpuExit::IoOut(port, data) => match self.bus.port_out(port, data) {
                None => Next::Enter,
                Some(exit) => Next::End(exit),
            },
            VcpuExit::IoIn(port, data) => {
                self.bus.port_in(port, data);
                Next::Enter
            }
            VcpuExit::MmioRead(address, data) => {
                self.bus.mmio_read(address, data);
                Next::Enter
            }
            VcpuExit::MmioWrite(address, data) => {
                self.bus.mmio_write(address, data);
                Next::Enter
            }
            VcpuExit::Intr => Next::Interrupted,
            VcpuExit::Hlt | VcpuExit::IrqWindowOpen => Next::Enter,
            VcpuExit::Shutdown => Next::End(Exit::TripleFault),
            VcpuExit::FailEntry(reason, cpu) => {
                failed(self.index, format!("entry failed on processor {cpu}, hardware reason {reason:#x}"))
            }
            other => failed(self.index, format!("{other:?}")),
        }
    }
}
