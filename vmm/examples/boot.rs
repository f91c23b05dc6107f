//! Boots a kernel with an initramfs and disks, and shows its console until it ends: what an embedding host
//! writes.
//!
//! `cargo run -p cubby-vmm --example boot -- VMLINUX INIT [DISK…]`, where INIT is a static executable.
use std::fs::OpenOptions;
use std::process::ExitCode;

use cubby_vmm::{Disk, DiskCache, Initramfs, Vm, VmConfig};

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(kernel), Some(init)) = (arguments.next(), arguments.next()) else {
        return Err("usage: boot VMLINUX INIT [DISK…]".into());
    };
    let disks = arguments.map(|path| {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Disk { file, read_only: false, serial: String::new(), cache: DiskCache::Writeback })
    });
    let config = VmConfig {
        vcpus: 1,
        memory_mib: 256,
        kernel: kernel.into(),
        initramfs: Some(Initramfs::with_init(init.as_ref())?),
        cmdline: "console=ttyS0 reboot=k panic=-1".into(),
        disks: disks.collect::<std::io::Result<_>>()?,
        vsock_cid: Some(3),
        network: None,
        console: Some(Box::new(std::io::stdout())),
        marks: None,
        on_thread: None,
    };
    let mut events = Vm::event_loop()?;
    let vm = Vm::boot(config, &mut events)?;
    let exit = vm.run(&mut events);
    eprintln!("the VM ended: {exit:?}");
    Ok(ExitCode::SUCCESS)
}
