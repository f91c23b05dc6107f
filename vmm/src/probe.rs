//! Can this host run guests? Answered in a few milliseconds, with the remedy if it cannot.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::sys;

/// Why no guest runs here, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this host cannot run virtual machines: {why}; {remedy}")]
pub struct HostUnsupported {
    /// What stood in the way.
    pub why: String,
    /// What to do about it.
    pub remedy: String,
}

fn unsupported<T>(why: impl Into<String>, remedy: &str) -> Result<T, HostUnsupported> {
    Err(HostUnsupported { why: why.into(), remedy: remedy.into() })
}

const NO_DEVICE: &str = "load its module (modprobe kvm_intel or kvm_amd), enable virtualization in the firmware, or, in a \
                         virtual machine, ask for nested virtualization";
const NO_PERMISSION: &str = "add yourself to its group (sudo usermod -aG kvm $USER) and log in again";
const OTHER_HOST: &str =
    "use a machine with Intel VT-x or AMD-V: bare metal, or a virtual machine with nested virtualization";

/// KVM's API version, the same since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Opens KVM and makes sure that it can run a kernel. Takes well under 1 ms where it can, and about 25 ms where
/// guest ring 0 is emulated instruction by instruction.
pub fn probe() -> Result<Kvm, HostUnsupported> {
    let kvm = open()?;
    if !processor_has_virtualization() {
        ring_zero_is_fast(&kvm)?;
    }
    Ok(kvm)
}

fn open() -> Result<Kvm, HostUnsupported> {
    let kvm = Kvm::new().or_else(|error| {
        let error = io::Error::from_raw_os_error(error.errno());
        let remedy = match error.kind() {
            ErrorKind::NotFound => NO_DEVICE,
            ErrorKind::PermissionDenied => NO_PERMISSION,
            _ => OTHER_HOST,
        };
        unsupported(format!("/dev/kvm: {error}"), remedy)
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        version => {
            unsupported(format!("/dev/kvm: its API version is {version}, not {API_VERSION}"), OTHER_HOST)
        }
    }
}

/// Whether the processor itself says so. Where it does not, KVM may still be there, with an emulator in the
/// place of hardware.
fn processor_has_virtualization() -> bool {
    // The flags are in the first entry; the whole file can be large.
    let mut start = Vec::new();
    let Ok(file) = File::open("/proc/cpuinfo") else { return false };
    if file.take(8192).read_to_end(&mut start).is_err() {
        return false;
    }
    String::from_utf8_lossy(&start).split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm")
}

/// `mov cx, 20000; again: dec cx; jnz again; hlt` in real mode.
const LOOP: [u8; 7] = [0xb9, 0x20, 0x4e, 0x49, 0x75, 0xfd, 0xf4];

/// Hardware runs the loop in 20 µs; an emulator of ring 0 takes a thousand times as long, and would give up on an
/// ordinary kernel later.
const SLOWEST: Duration = Duration::from_millis(5);

fn ring_zero_is_fast(kvm: &Kvm) -> Result<(), HostUnsupported> {
    match run_loop(kvm) {
        Ok(time) if time <= SLOWEST => Ok(()),
        Ok(time) => unsupported(
            format!(
                "its KVM emulates the guest kernel instead of running it ({} ns an instruction)",
                time.as_nanos() / 40_000
            ),
            OTHER_HOST,
        ),
        Err(why) => unsupported(format!("its KVM cannot run a trivial guest ({why})"), OTHER_HOST),
    }
}

fn run_loop(kvm: &Kvm) -> Result<Duration, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).map_err(|e| text(&e))?;
    memory.write_slice(&LOOP, GuestAddress(0)).map_err(|e| text(&e))?;
    let vm = kvm.create_vm().map_err(|e| text(&e))?;
    for region in memory.iter() {
        sys::set_memory_slot(&vm, 0, region).map_err(|e| text(&e))?;
    }
    let mut vcpu = vm.create_vcpu(0).map_err(|e| text(&e))?;
    let mut sregs = vcpu.get_sregs().map_err(|e| text(&e))?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).map_err(|e| text(&e))?;
    let mut regs = vcpu.get_regs().map_err(|e| text(&e))?;
    regs.rip = 0;
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(|e| text(&e))?;
    let start = Instant::now();
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => Ok(start.elapsed()),
        Ok(other) => Err(format!("it ended with {other:?}")),
        Err(error) => Err(text(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_comes_within_50_ms_either_way() {
        let start = Instant::now();
        let answer = probe();
        let time = start.elapsed();
        if let Err(error) = &answer {
            assert!(!error.why.is_empty() && !error.remedy.is_empty());
        }
        assert!(time < Duration::from_millis(50), "{answer:?} took {time:?}");
    }
}
