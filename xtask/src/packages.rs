//! The Debian packages that each command needs. A package counts as installed when the file that is wanted of it is
//! there, so another distribution's build of the same program will do. What is missing is installed (apt, through sudo
//! where this is not root), after saying what and why; where there is no apt it is only said.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process;

/// A package and the file that shows that it is there: a program on `PATH`, or an absolute path.
type Need = (&'static str, &'static str);

/// Building a kernel.
pub const KERNEL: &[Need] = &[
    ("linux-source-6.12", crate::kernel::SOURCE),
    ("gcc", "gcc"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("xz-utils", "xz"),
    ("binutils", "objcopy"),
    ("libelf-dev", "/usr/include/gelf.h"),
    ("libssl-dev", "/usr/include/openssl/ssl.h"),
    ("libc6-dev", "/usr/include/stdio.h"),
];

/// Running the KVM test machine.
pub const MACHINE: &[Need] = &[
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("qemu-system-common", crate::kvm::VIRTIOFSD),
    ("seabios", "/usr/share/seabios/bios-256k.bin"),
    ("busybox-static", "/bin/busybox"),
    ("util-linux", "setpriv"),
    ("binutils", "objcopy"),
];

/// Making an image and serving it.
pub const IMAGES: &[Need] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("debian-archive-keyring", "/usr/share/keyrings/debian-archive-keyring.gpg"),
    ("umoci", "umoci"),
    ("skopeo", "skopeo"),
    ("docker-registry", "docker-registry"),
];

/// Running a container to hold a sandbox against.
pub const CONTAINER: &[Need] = &[("runc", "runc")];

/// Running another virtual machine monitor to hold ours against.
pub const PEERS: &[Need] = &[
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("qemu-system-data", "/usr/share/qemu/bios-microvm.bin"),
    ("busybox-static", "/bin/busybox"),
    ("cpio", "cpio"),
];

/// Linking programs, statically too.
pub const LINKER: &[Need] = &[("gcc", "gcc"), ("libc6-dev", "/usr/include/stdio.h")];

/// Fetching a prebuilt tool.
pub const PIP: &[Need] = &[("python3-pip", "pip3"), ("python3", "python3")];

/// What the tests hold our work against.
pub const TESTS: &[Need] = &[
    ("cpio", "cpio"),
    ("erofs-utils", "fsck.erofs"),
    ("e2fsprogs", "fsck.ext4"),
    ("iproute2", "ip"),
    ("umoci", "umoci"),
    ("skopeo", "skopeo"),
];

/// Installs what is missing of `needs`.
pub fn ensure(why: &str, needs: &[&[Need]]) -> Result<()> {
    let mut missing: Vec<&str> = needs
        .iter()
        .flat_map(|group| group.iter())
        .filter(|(_, file)| !is_there(file))
        .map(|&(package, _)| package)
        .collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("==> {why} needs: {}", missing.join(" "));
    if !is_there("apt-get") {
        bail!("this is not a Debian: install what these packages hold by hand: {}", missing.join(" "));
    }
    if !process::is_root() {
        eprintln!("    installed with sudo (this is not root)");
        if !is_there("sudo") {
            bail!("there is no sudo here; as root, run: apt-get install {}", missing.join(" "));
        }
    }
    apt(&["update", "-qq"])?;
    let mut install = vec!["install", "-y", "-qq", "--no-install-recommends"];
    install.extend(&missing);
    apt(&install)?;
    match needs.iter().flat_map(|group| group.iter()).find(|(_, file)| !is_there(file)) {
        Some((package, file)) => bail!("{package} is installed, but there is no {file}"),
        None => Ok(()),
    }
}

/// Another apt may hold the lock (a machine that updates itself after boot): worth five minutes of patience.
fn apt(args: &[&str]) -> Result<()> {
    for attempt in 1..=60 {
        let mut command = process::as_root("env");
        command.args([
            "DEBIAN_FRONTEND=noninteractive",
            "LC_ALL=C",
            "apt-get",
            "-o",
            "DPkg::Lock::Timeout=300",
        ]);
        command.args(args);
        let output = command.output().with_context(|| format!("cannot run {}", process::line(&command)))?;
        if output.status.success() {
            return Ok(());
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        if !errors.contains("Could not get lock") || attempt == 60 {
            bail!("{} ended with {}\n{errors}", process::line(&command), output.status);
        }
        if attempt == 1 {
            eprintln!("    another apt is at work; waiting for it");
        }
        sleep(Duration::from_secs(5));
    }
    Ok(())
}

/// Whether a program is on `PATH` (sbin included, which a user's `PATH` may lack), or a file is there.
pub fn is_there(file: &str) -> bool {
    if file.starts_with('/') {
        return Path::new(file).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .any(|dir| dir.join(file).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_files_are_found_where_they_are() {
        assert!(is_there("sh"));
        assert!(is_there("/bin/sh"));
        assert!(!is_there("/no/such/file"));
        assert!(!is_there("no-such-program"));
    }
}
