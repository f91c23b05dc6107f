//! QEMU's microvm (Debian's `qemu-system-x86`) with our guest kernel, a virtio-mmio network card on its user-mode network
//! (slirp), and an initramfs of busybox and the traffic program.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Addresses of slirp: the guest's, and the one that leads to the host's loopback.
const GUEST: &str = "10.0.2.15/24";
const HOST: &str = "10.0.2.2";

/// Boots it.
pub fn start(traffic: &Path, port: u16) -> io::Result<Child> {
    let home = PathBuf::from(super::system::variable("CUBBY_HOME"));
    let directory = home.with_file_name("qemu");
    let initramfs = initramfs(&directory, traffic, port)?;
    let assets = PathBuf::from(super::system::variable("CUBBY_ASSETS"));
    let console = directory.join("console.log");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "microvm,acpi=off,pic=off,pit=off,rtc=off", "-enable-kvm", "-cpu", "host", "-m", "512"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-name",
            "qemu,debug-threads=on",
        ])
        .arg("-kernel")
        .arg(assets.join("vmlinux"))
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-global", "virtio-mmio.force-legacy=off", "-netdev", "user,id=net"])
        .args(["-device", "virtio-net-device,netdev=net"])
        .stdin(Stdio::null());
    qemu.spawn().map_err(|error| io::Error::new(error.kind(), format!("qemu-system-x86_64: {error}")))
}

fn initramfs(directory: &Path, traffic: &Path, port: u16) -> io::Result<PathBuf> {
    let root = directory.join("root");
    fs::create_dir_all(root.join("bin"))?;
    fs::create_dir_all(root.join("dev"))?;
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    symlink("busybox", root.join("bin/sh"))?;
    fs::copy(traffic, root.join("traffic"))?;
    let init = format!(
        "#!/bin/sh\n\
         b=/bin/busybox\n\
         $b mount -t devtmpfs dev /dev\n\
         exec </dev/console >/dev/console 2>&1\n\
         $b ip link set lo up\n\
         $b ip address add {GUEST} dev eth0\n\
         $b ip link set eth0 up\n\
         $b ip route add default via {HOST}\n\
         /traffic run {HOST}:{port}\n\
         $b reboot -f\n"
    );
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let archive = directory.join("initramfs");
    let made = Command::new("sh")
        .arg("-c")
        .arg("find . | cpio --quiet -o -H newc")
        .current_dir(&root)
        .stdout(fs::File::create(&archive)?)
        .status()?;
    if made.success() { Ok(archive) } else { Err(io::Error::other(format!("cpio: {made}"))) }
}
