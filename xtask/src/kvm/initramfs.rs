//! What the KVM test machine starts from: an initramfs of busybox, this very program, the connection's secret, and
//! the script below, which makes this computer's file system the machine's own and starts the server.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Where the machine keeps the host's file system as it is, writable: what is shared is bound from there.
pub const HOST: &str = "/run/cubby-host";

/// Where the machine keeps the secret.
pub const TOKEN: &str = "/run/cubby-token";

/// Where the server listens, and the machine's address on QEMU's user network.
pub const ADDRESS: (&str, u16) = ("10.0.2.15", 7000);

/// First the root: the host's, over virtiofs, under an overlay in memory. /tmp and /run are memory, /dev/kvm is
/// everybody's, and descriptors as many as other systems let programs ask for (the kernel by itself: 4,096). Then busybox
/// stays PID 1 and reaps; the server is its child and the machine ends with it.
pub const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin; export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
mount -t virtiofs host /host
mount -t tmpfs -o size=80%,mode=755 memory /memory && mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /new
for dir in proc sys dev; do mount --move /$dir /new/$dir; done
cd /new
mkdir -p dev/pts dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts dev/pts; mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run; mount -t tmpfs -o mode=1777,size=80% tmpfs tmp
mount -t cgroup2 cgroup2 sys/fs/cgroup
chmod 666 dev/kvm dev/fuse dev/net/tun dev/vhost-vsock dev/vhost-net
ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
rm -f etc/resolv.conf; echo nameserver 10.0.2.3 > etc/resolv.conf
mkdir run/cubby-host && mount --move /host run/cubby-host
cp /bin/busybox /xtask run/; (umask 077; cat /token > run/cubby-token)
ulimit -Hn 524288
exec switch_root /new /run/busybox sh -c '/run/xtask kvm-server; /run/busybox poweroff -f'
"#;

/// The archive (format "newc", Linux Documentation/driver-api/early-userspace/buffer-format.rst).
pub fn archive(program: &Path, token: &[u8]) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "host", "memory", "new"] {
        archive.add(dir, 0o040_755, &[])?;
    }
    archive.add("bin/busybox", 0o100_755, &read(Path::new("/bin/busybox"))?)?;
    archive.add("xtask", 0o100_755, &read(program)?)?;
    archive.add("token", 0o100_600, token)?;
    archive.add("init", 0o100_755, INIT.as_bytes())?;
    archive.add("TRAILER!!!", 0, &[])?;
    Ok(archive.bytes)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.files += 1;
        let size = u32::try_from(content.len())?;
        let name_size = u32::try_from(name.len() + 1)?;
        // ino, mode, uid, gid, nlink, mtime, filesize, device twice, special device twice, namesize, checksum.
        let fields = [self.files, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{command, output};

    #[test]
    fn another_program_reads_the_archive_back() {
        let dir = std::env::temp_dir().join(format!("xtask-initramfs-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let program = dir.join("program");
        fs::write(&program, "odd").unwrap();
        if crate::packages::is_there("/bin/busybox") {
            fs::write(dir.join("archive"), archive(&program, b"secret").unwrap()).unwrap();
            let unpack =
                "mkdir out && cd out && busybox cpio -i < ../archive && cat xtask token && test -x init";
            let read = output(command("sh", ["-c", unpack]).current_dir(&dir)).unwrap();
            assert_eq!(read, "oddsecret");
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
