//! From a launch's specification to a VM: disks, kernel command line, the agent's configuration.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use cubby_protocol::MARK_IO_PORT;
use cubby_protocol::message::{GuestConfig, Mark, RootDisks};
use cubby_state::{LaunchSpec, SandboxConfig};
use cubby_vmm::{Disk, DiskCache, Flow, Initramfs, Marks, VmConfig};

use crate::assets::Assets;
use crate::network;

/// Guests are told apart by their processes: each has a context id of its own in its own VM.
const GUEST_CID: u32 = 3;

/// The console is there for panics; what a healthy guest prints would only cost boot time. A panic and a
/// reboot reset the machine through the keyboard controller, which the VMM sees. The random pool takes the
/// processor's word at boot and the host's entropy from the agent. The initramfs is not freed: the kernel would
/// overwrite it first, and each of its pages, which all sandboxes share, would be copied for that. Without `erms` the kernel
/// clears pages by words: kernel-config/README.md says why.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 reboot=k panic=-1 random.trust_cpu=on \
                       cryptomgr.notests rcupdate.rcu_expedited=1 no_timer_check noreplace-smp \
                       8250.nr_uarts=1 percpu_alloc=page retain_initrd clearcpuid=erms \
                       initcall_blacklist=blake2s_mod_init,slab_late_init rdinit=/init";

/// The kernel's command line for a guest of so much memory. Linux makes its directory and inode caches' hash tables for
/// a machine that does nothing but serve files, 768 KiB of 512 MiB, and writes all of both at boot. A quarter of it does:
/// one chain for each 32 and 64 KiB of memory.
fn command_line(memory_mib: u32) -> String {
    let mib = u64::from(memory_mib);
    format!("{CMDLINE} dhash_entries={} ihash_entries={}", mib * 32, mib * 16)
}

/// When the guest came how far, as its marks say.
#[derive(Clone, Default)]
pub(crate) struct Marked(Arc<Mutex<Vec<(Mark, Instant)>>>);

impl Marked {
    pub(crate) fn all(&self) -> Vec<(Mark, Instant)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, mark: Mark) {
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A guest can repeat itself without end; the first of each is what counts.
        if marks.iter().all(|(earlier, _)| *earlier != mark) {
            marks.push((mark, Instant::now()));
        }
    }
}

/// The VM that `spec` describes.
pub(crate) fn config(
    spec: &LaunchSpec,
    assets: &Assets,
    marked: Marked,
    console: Box<dyn io::Write + Send>,
) -> Result<VmConfig, String> {
    let initramfs = Initramfs::with_init(&assets.agent)
        .map_err(|error| format!("{}: {error}", assets.agent.display()))?;
    let disks = vec![disk(&spec.image_disk, true)?, disk(&spec.writable_disk, false)?];
    let on_mark = Box::new(move |byte| {
        let Ok(mark) = Mark::try_from(byte) else { return Flow::Continue };
        marked.add(mark);
        if mark == Mark::PowerOff { Flow::PowerOff } else { Flow::Continue }
    });
    Ok(VmConfig {
        vcpus: spec.config.cpus,
        memory_mib: spec.config.memory_mib,
        kernel: assets.kernel.clone(),
        initramfs: Some(initramfs),
        cmdline: command_line(spec.config.memory_mib),
        disks,
        vsock_cid: Some(GUEST_CID),
        // Plugged in once its ports are known to be free.
        network: None,
        console: Some(console),
        marks: Some(Marks { port: MARK_IO_PORT, on_mark }),
        on_thread: None,
    })
}

fn disk(path: &Path, read_only: bool) -> Result<Disk, String> {
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(Disk { file, read_only, serial: String::new(), cache: DiskCache::Writeback })
}

/// What the guest learns about itself.
pub(crate) fn guest_config(spec: &LaunchSpec) -> io::Result<GuestConfig> {
    let mut entropy = [0; 32];
    fill_random(&mut entropy)?;
    let config = &spec.config;
    let image = &config.image.defaults;
    let network = config.has_network().then(network::addresses);
    Ok(GuestConfig {
        hostname: config.hostname.clone().unwrap_or_else(|| hostname(spec.name.as_str())),
        // Told when the agent asks.
        realtime_ns: 0,
        entropy,
        env: environment(config),
        workdir: config.workdir.clone().or_else(|| image.workdir.clone()).unwrap_or_default(),
        user: config.user.clone().or_else(|| image.user.clone()).unwrap_or_default(),
        nameservers: network.iter().map(|_| network::resolver()).collect(),
        root: RootDisks { image: "/dev/vda".into(), disk: Some("/dev/vdb".into()) },
        network,
    })
}

/// The image's environment, and the sandbox's over it.
fn environment(config: &SandboxConfig) -> Vec<(String, String)> {
    let image = config.image.defaults.env.iter().filter_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        (!config.env.contains_key(name)).then(|| (name.to_owned(), value.to_owned()))
    });
    image.chain(config.env.clone()).collect()
}

/// The host's wall clock in nanoseconds since the Unix epoch.
pub(crate) fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A sandbox's name as a host name: at most 63 letters, digits and hyphens (RFC 1123 §2.1).
fn hostname(name: &str) -> String {
    name.chars().take(63).map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}

fn fill_random(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}
