//! KVM, wherever it is: on this computer if it can run guests, else on the KVM test machine, which is this computer
//! again, emulated by QEMU with a processor that has SVM. A machine is booted once and takes many commands.

mod client;
mod initramfs;
mod keeper;
mod machine;
mod qemu;
mod server;
mod wire;

use std::ffi::OsString;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

pub use client::Options;
pub use keeper::keep;
pub use machine::Mode;
pub use server::serve;

/// The file server of the KVM test machine.
pub const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// Whether this computer's KVM boots an ordinary guest: `/dev/kvm` opens, and the processor shows the virtualisation
/// that KVM builds on. A `/dev/kvm` without it only emulates the guest's kernel mode, and gives up on some instructions.
pub fn works() -> bool {
    let opens = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    opens && processor_virtualises(&processor)
}

fn processor_virtualises(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// Runs a command where KVM works: here if it does here and nothing else is asked for, else on the KVM test machine.
pub fn run(options: &Options, command: &[OsString]) -> Result<u8> {
    let special = options.mode == Mode::Icount || options.fresh || options.timeout.is_some();
    if special || !works() {
        return client::run(options, command);
    }
    let (program, arguments) = command.split_first().context("no command was given")?;
    let status = process::status(Command::new(program).args(arguments))?;
    Ok(process::code(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_a_whole_word_of_the_flags_line() {
        assert!(processor_virtualises("model name : x\nflags\t\t: fpu svm lm\n"));
        assert!(processor_virtualises("flags\t\t: vmx\n"));
        assert!(!processor_virtualises("flags\t\t: fpu svm_lock lm\nvmx flags\t: vnmi\nbugs : svm\n"));
    }
}
