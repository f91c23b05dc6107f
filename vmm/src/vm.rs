//! One virtual machine, from nothing to its last thread.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use cubby_devices::console::{Console, ConsoleLog};
use cubby_devices::net::{Counters, Net};
use cubby_devices::rng::Rng;
use cubby_devices::vsock::{GuestCid, Vsock};
use cubby_devices::{Device, Interrupt, Memory, Transport};
use event_manager::SubscriberOps;
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::{self, cpu, layout};
use crate::bus::{Bus, lock};
use crate::config::{Error, VmConfig};
use crate::exit::{Exit, ExitSlot};
use crate::net::NetWorker;
use crate::thread::Threads;
use crate::vcpu::VcpuThread;
use crate::worker::{DeviceLoop, EventLoop, Worker, new_loop};
use crate::{disk, kernel, memory, probe, sys};

/// A virtual machine. Dropping it ends its threads and frees its memory.
pub struct Vm {
    vcpus: Vec<VcpuThread>,
    exit: Arc<ExitSlot>,
    vsock: Option<Arc<Mutex<Vsock>>>,
    phases: [(&'static str, Instant); 3],
    console: ConsoleLog,
    disks: Vec<Worker>,
    net: Option<NetWorker>,
    paused: Mutex<Option<PausedClock>>,
    /// Closing it would take the interrupt lines away from running vCPUs.
    vm: VmFd,
    /// Held so that the guest's memory outlives everything that knows its address.
    _memory: Memory,
}

impl Vm {
    /// Makes a VM with everything in place and its vCPUs parked: [`Vm::resume`] lets it run. The vsock
    /// and the source of entropy go onto `events`, which the caller runs; disks and the network have threads of their own.
    pub fn boot(config: VmConfig, events: &mut EventLoop) -> Result<Self, Error> {
        check(&config)?;
        let kvm = probe::probe()?;
        let vm = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
        let memory = memory::map(config.memory_mib)?;
        // Slots come first: adding one behind an interrupt controller costs 70 times as much.
        for (slot, region) in (0..).zip(memory.iter()) {
            sys::set_memory_slot(&vm, slot, region)
                .map_err(|source| Error::Kvm { call: "KVM_SET_USER_MEMORY_REGION", source })?;
        }
        vm.set_tss_address(layout::KVM_TSS).map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
        let kvm_done = Instant::now();

        let loaded = kernel::load(&memory, &config.kernel)?;
        let disks = config.disks.len();
        let windows =
            disks + 1 + usize::from(config.vsock_cid.is_some()) + usize::from(config.network.is_some());
        let boot = arch::Boot {
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            kernel_end: loaded.end,
            cmdline: &command_line(&config.cmdline, windows),
            initramfs: config.initramfs.as_ref(),
        };
        arch::place(&memory, &boot)?;
        let load_done = Instant::now();

        let mut devices = Devices { vm: &vm, memory: &memory, transports: Vec::new() };
        let mut threads = Threads::new(config.on_thread);
        let mut workers = Vec::with_capacity(disks);
        for (index, disk) in config.disks.into_iter().enumerate() {
            let blk = disk::open(index, disk)?;
            let device = devices.add(Arc::new(Mutex::new(blk)))?;
            workers.push(Worker::spawn(format!("disk{index}"), device, &mut threads)?);
        }
        events.add_subscriber(Box::new(devices.add(Arc::new(Mutex::new(Rng::new(sys::OsEntropy))))?));
        let vsock = config.vsock_cid.map(GuestCid::try_from).transpose().map_err(|_| Error::Config {
            field: "vsock_cid",
            given: "a reserved context id".into(),
            allowed: "guests have 3 to 4294967294",
        })?;
        let vsock = vsock.map(|cid| Arc::new(Mutex::new(Vsock::new(cid))));
        if let Some(vsock) = &vsock {
            events.add_subscriber(Box::new(devices.add(vsock.clone())?));
        }
        let net = match config.network {
            Some(network) => {
                let card = Arc::new(Mutex::new(Net::new(network.backend, network.mac, network.mtu)));
                let kicks = devices.add(card.clone())?.into_kicks();
                Some(NetWorker::spawn(card, kicks, &mut threads)?)
            }
            None => None,
        };
        let serial = Console::new(line(&vm, layout::SERIAL_GSI)?, config.console);
        let console = serial.log().clone();
        let bus = Arc::new(Bus {
            console: Mutex::new(serial),
            marks: config.marks.map(Mutex::new),
            virtio: devices.transports.into_iter().map(Mutex::new).collect(),
        });
        let exit = Arc::new(ExitSlot::new().map_err(Error::resource("the exit event"))?);
        let vcpus = start_vcpus(&kvm, &vm, config.vcpus, loaded.entry, &bus, &exit, &mut threads)?;
        threads.wait()?;
        let phases = [("kvm", kvm_done), ("load", load_done), ("devices", Instant::now())];
        Ok(Self {
            vcpus,
            exit,
            vsock,
            phases,
            console,
            disks: workers,
            net,
            paused: Mutex::default(),
            vm,
            _memory: memory,
        })
    }

    /// Lets every vCPU run. After a pause, the guest's monotonic time goes on where it was: kvm-clock and the time
    /// stamp counter have stood still. (Linux before 5.16 cannot hold the counter back; there a guest that uses it as
    /// its clock sees the pause pass.) Its wall clock is the embedder's to set right.
    pub fn resume(&self) {
        if let Some(net) = &self.net {
            net.unpark();
        }
        let unseen = lock(&self.paused).take().map_or(0, |paused| paused.go_on(&self.vm));
        self.vcpus.iter().for_each(|vcpu| vcpu.resume(unseen));
    }

    /// Takes every vCPU out of the guest and waits until they are, and until the disks have answered what they
    /// had begun and the network stands still. Then nobody kicks any device. Those on the embedder's loop are quiet as
    /// long as it is here.
    pub fn pause(&self) {
        let parked: Vec<_> = self.vcpus.iter().map(VcpuThread::park).collect();
        for vcpu in parked {
            // The answer is the channel's end.
            let _ = vcpu.recv();
        }
        *lock(&self.paused) = Some(PausedClock::now(&self.vm));
        self.disks.iter().for_each(Worker::finish_round);
        if let Some(net) = &self.net {
            net.park();
        }
    }

    /// How the VM ended, once it has.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.get()
    }

    /// Readable once the VM has ended.
    pub fn exit_event(&self) -> &EventFd {
        self.exit.event()
    }

    /// Ends the VM as if its power were cut, unless it has ended already, and waits for nothing: what the guest still
    /// does until [`Vm::kill`] is nobody's any more.
    pub fn cut_power(&self) {
        self.exit.set(Exit::Killed);
    }

    /// As [`Vm::cut_power`], and waits for its threads. One of them may be waiting for a device: whoever holds the lock
    /// of one, as that of [`Vm::vsock`], would wait for ever.
    pub fn kill(&mut self) {
        self.cut_power();
        for vcpu in self.vcpus.drain(..) {
            vcpu.end();
        }
        self.disks.clear();
        self.net = None;
    }

    /// Runs `events` until the VM ends. An embedder with an event loop of its own watches
    /// [`Vm::exit_event`] instead.
    pub fn run(mut self, events: &mut EventLoop) -> Exit {
        self.resume();
        loop {
            if let Some(exit) = self.exit() {
                self.kill();
                return exit;
            }
            if events.run_with_timeout(100).is_err() {
                self.kill();
            }
        }
    }

    /// The vsock, if the configuration has one.
    pub fn vsock(&self) -> Option<&Arc<Mutex<Vsock>>> {
        self.vsock.as_ref()
    }

    /// What went through the network card, if the configuration has one. Waits for the card's thread to finish a round.
    pub fn network_counters(&self) -> Option<Counters> {
        self.net.as_ref().map(NetWorker::counters)
    }

    /// Plugs the network card's cable in or out, if there is a card; it is in at first. The guest is told.
    pub fn set_link(&self, up: bool) {
        if let Some(net) = &self.net {
            net.set_link(up);
        }
    }

    /// The newest 64 KiB that the guest wrote to its console.
    pub fn console_tail(&self) -> Vec<u8> {
        self.console.tail()
    }

    /// When each step of [`Vm::boot`] was done: `kvm` (probed, VM, memory slots and interrupt controllers made),
    /// `load` (kernel, initramfs and boot tables in guest memory), `devices` (devices and vCPUs made).
    pub fn phases(&self) -> &[(&'static str, Instant)] {
        &self.phases
    }

    /// An event loop to give to [`Vm::boot`].
    pub fn event_loop() -> Result<EventLoop, Error> {
        new_loop()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The guest's clocks as they were when its vCPUs had stopped.
struct PausedClock {
    kvm_clock: Option<kvm_clock_data>,
    host_tsc: u64,
}

impl PausedClock {
    fn now(vm: &VmFd) -> Self {
        Self { kvm_clock: vm.get_clock().ok(), host_tsc: sys::host_tsc() }
    }

    /// Sets kvm-clock back, and gives the ticks of the time stamp counter that the vCPUs are to be held back by.
    fn go_on(self, vm: &VmFd) -> u64 {
        if let Some(kvm_clock) = self.kvm_clock {
            // Without its flags: they would ask for the time of the pause to be added.
            let _ = vm.set_clock(&kvm_clock_data { clock: kvm_clock.clock, ..Default::default() });
        }
        sys::host_tsc().wrapping_sub(self.host_tsc)
    }
}

fn check(config: &VmConfig) -> Result<(), Error> {
    if config.vcpus == 0 || config.vcpus > layout::MAX_VCPUS {
        return Err(Error::Config {
            field: "vcpus",
            given: config.vcpus.to_string(),
            allowed: "a VM has 1 to 32",
        });
    }
    if config.memory_mib < 32 {
        return Err(Error::Config {
            field: "memory_mib",
            given: config.memory_mib.to_string(),
            allowed: "a VM needs 32 or more",
        });
    }
    if config.disks.len() > MAX_DISKS {
        return Err(Error::Config {
            field: "disks",
            given: config.disks.len().to_string(),
            allowed: "there are interrupt lines for 16",
        });
    }
    Ok(())
}

/// Interrupt lines that are left once the source of entropy, the vsock and the network card have theirs.
const MAX_DISKS: usize = (layout::GSI_END - layout::VIRTIO_GSI) as usize - 3;

/// The embedder's command line, and where the virtio windows are.
fn command_line(given: &str, windows: usize) -> String {
    let mut line = given.to_owned();
    for (window, gsi) in (0..windows as u64).zip(layout::virtio_gsis()) {
        let address = layout::VIRTIO_MMIO + window * layout::VIRTIO_MMIO_SIZE;
        line.push_str(&format!(" virtio_mmio.device=4K@{address:#x}:{gsi}"));
    }
    line
}

/// Gives devices their windows, interrupt lines and kicks, in the order they are added.
struct Devices<'a> {
    vm: &'a VmFd,
    memory: &'a Memory,
    transports: Vec<Transport>,
}

impl Devices<'_> {
    fn add(&mut self, device: Arc<Mutex<dyn Device>>) -> Result<DeviceLoop, Error> {
        const QUEUE_NOTIFY: u64 = 0x50;
        let (window, gsi) =
            (0u64..).zip(layout::virtio_gsis()).nth(self.transports.len()).unwrap_or((0, layout::GSI_END));
        let line = line(self.vm, gsi)?;
        let notify = layout::VIRTIO_MMIO + window * layout::VIRTIO_MMIO_SIZE + QUEUE_NOTIFY;
        let queues = u32::try_from(lock(&device).queue_sizes().len()).unwrap_or(u32::MAX);
        let mut kicks = Vec::new();
        for queue in 0..queues {
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::resource("a queue's kick"))?;
            self.vm
                .register_ioevent(&kick, &IoEventAddress::Mmio(notify), queue)
                .map_err(Error::kvm("KVM_IOEVENTFD"))?;
            kicks.push(kick);
        }
        self.transports.push(Transport::new(device.clone(), self.memory.clone(), line));
        Ok(DeviceLoop::new(device, kicks))
    }
}

/// An interrupt line: an irqfd.
struct Line(EventFd);

impl Interrupt for Line {
    fn raise(&self) {
        // It can fail only if the counter is full, and then the line is raised already.
        let _ = self.0.write(1);
    }
}

fn line(vm: &VmFd, gsi: u32) -> Result<Arc<dyn Interrupt>, Error> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::resource("an interrupt line"))?;
    vm.register_irqfd(&event, gsi).map_err(Error::kvm("KVM_IRQFD"))?;
    Ok(Arc::new(Line(event)))
}

fn start_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    entry: u64,
    bus: &Arc<Bus>,
    exit: &Arc<ExitSlot>,
    threads: &mut Threads,
) -> Result<Vec<VcpuThread>, Error> {
    sys::install_kick_handler().map_err(Error::resource("the kick signal"))?;
    let template = cpu::CpuTemplate::new(kvm)?;
    (0..count)
        .map(|index| {
            let fd = vm.create_vcpu(u64::from(index)).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
            cpu::set_up(&fd, &template, index, count, entry)?;
            VcpuThread::spawn(index, fd, bus.clone(), exit.clone(), threads)
        })
        .collect()
}
