//! The KVM test machine as a QEMU command: a software-emulated SVM processor with nested paging, so that its
//! `/dev/kvm` is what a user's computer has, and this computer's file system over virtiofs.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::machine::Mode;
use super::{VIRTIOFSD, initramfs};
use crate::process;

/// Memory in MiB. The host gives it as it is used.
const MEMORY: u32 = 6144;

/// Files are kept in the machine's page cache, and looked at again after this many seconds: a program that was built
/// on the host a moment ago is the new one, and one that did not change is not read again.
const REVALIDATE: &str = "0.2";

/// The processes of one machine. They end when this is dropped.
pub struct Machine(Vec<Child>);

impl Machine {
    /// Starts it. Everything of it is in `dir`; the server's port in it becomes `port` of this computer's loopback.
    pub fn start(mode: Mode, kernel: &Path, dir: &Path, port: u16) -> Result<Self> {
        let mut machine = Self(vec![]);
        let socket = dir.join("files.sock");
        let mut files = Command::new(VIRTIOFSD);
        files
            .arg(format!("--socket-path={}", socket.display()))
            .args(["-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always", "-o"])
            .arg(format!("timeout={REVALIDATE}"));
        machine.spawn(&files, dir, "files.log")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            if Instant::now() > deadline {
                bail!("virtiofsd made no socket in 10 s");
            }
            machine.check(dir)?;
            sleep(Duration::from_millis(10));
        }
        machine.spawn(&command(mode, kernel, dir, port), dir, "qemu.log")?;
        Ok(machine)
    }

    fn spawn(&mut self, program: &Command, dir: &Path, log: &str) -> Result<()> {
        let log = File::create(dir.join(log))?;
        // Nothing of a machine outlives its keeper, however that ends. (The signal comes when the thread that started
        // the process ends: the keeper's main thread.)
        let mut command = process::command("setpriv", ["--pdeathsig", "KILL"]);
        command.arg(program.get_program()).args(program.get_args());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.0.push(command.spawn().with_context(|| format!("cannot run {}", process::line(&command)))?);
        Ok(())
    }

    /// An error, with all that was said, if one of the processes has ended.
    pub fn check(&mut self, dir: &Path) -> Result<()> {
        for child in &mut self.0 {
            if let Some(status) = child.try_wait()? {
                let said = ["files.log", "qemu.log", "console.log"].map(|log| {
                    String::from_utf8_lossy(&fs::read(dir.join(log)).unwrap_or_default()).into_owned()
                });
                bail!("the KVM test machine ended ({status})\n{}", said.concat());
            }
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in self.0.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn command(mode: Mode, kernel: &Path, dir: &Path, port: u16) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    // One processor: with two, each on a thread, the emulation now and then missed what one did to the other's code or
    // page tables, and a guest or the machine itself crashed (ADR 8).
    match mode {
        Mode::Normal => qemu.args(["-accel", "tcg,tb-size=512", "-smp", "1"]),
        // One instruction is one nanosecond; a processor that waits skips to its next timer.
        Mode::Icount => qemu.args([
            "-accel",
            "tcg,thread=single,tb-size=512",
            "-smp",
            "1",
            "-icount",
            "shift=0,sleep=off,align=off",
        ]),
    };
    // No XSAVE: QEMU's SVM lets a guest's XSETBV through, of which KVM then knows nothing. It sets XCR0 back at the next
    // entry, and from there on the guest's kernel switches its processes' XMM registers no more. FXSAVE has no such switch.
    qemu.args(["-cpu", "max,+svm,+npt,-xsave", "-nodefaults", "-display", "none", "-no-reboot", "-m"])
        .arg(MEMORY.to_string())
        .args(["-numa", "node,memdev=memory", "-object"])
        .arg(format!("memory-backend-memfd,id=memory,size={MEMORY}M,share=on"))
        .args(["-device", "vhost-user-fs-pci,chardev=files,tag=host", "-chardev"])
        .arg(format!("socket,id=files,path={}", dir.join("files.sock").display()))
        .args(["-device", "virtio-rng-pci", "-device", "virtio-net-pci,netdev=user,romfile=", "-netdev"])
        .arg(format!("user,id=user,hostfwd=tcp:127.0.0.1:{port}-:{}", initramfs::ADDRESS.1))
        .arg("-serial")
        .arg(format!("file:{}", dir.join("console.log").display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", dir.join("qmp.sock").display()))
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(dir.join("initramfs"))
        // Booted on a busy computer, the kernel measures its TSC a little wrong at first and better later. KVM has kept the
        // first figure for its guests, finds it out of tolerance and, without TSC scaling, gives them a TSC whose timers
        // never fire; in 5 % it takes the two for the same.
        .args([
            "-append",
            "console=ttyS0 panic=-1 quiet nokaslr mitigations=off kvm.tsc_tolerance_ppm=50000",
        ]);
    qemu
}
