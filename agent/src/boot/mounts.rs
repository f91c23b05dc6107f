//! The kernel's own file systems. They are mounted in the initramfs while the host takes the connection, and
//! moved into the root when there is one.

use rustix::fs::{Mode, mkdir, symlink};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};

use super::{SetupError, at};
use std::ffi::CStr;

struct Mount {
    target: &'static CStr,
    kind: &'static CStr,
    flags: MountFlags,
    data: Option<&'static CStr>,
}

const QUIET: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
const CLOSED: MountFlags = QUIET.union(MountFlags::NODEV);

/// What a container's user expects under `/proc`, `/sys` and `/dev`, in the order of mounting.
const MOUNTS: &[Mount] = &[
    Mount { target: c"/proc", kind: c"proc", flags: CLOSED, data: None },
    Mount { target: c"/sys", kind: c"sysfs", flags: CLOSED, data: None },
    Mount { target: c"/sys/fs/cgroup", kind: c"cgroup2", flags: CLOSED, data: None },
    Mount { target: c"/dev/pts", kind: c"devpts", flags: QUIET, data: Some(c"gid=5,mode=620,ptmxmode=666") },
    Mount { target: c"/dev/shm", kind: c"tmpfs", flags: CLOSED, data: Some(c"mode=1777") },
];

const LINKS: &[(&CStr, &CStr)] = &[
    (c"/proc/self/fd", c"/dev/fd"),
    (c"/proc/self/fd/0", c"/dev/stdin"),
    (c"/proc/self/fd/1", c"/dev/stdout"),
    (c"/proc/self/fd/2", c"/dev/stderr"),
];

/// `/dev` alone: the device nodes that the rest of the set-up needs.
pub fn devices() -> Result<(), SetupError> {
    mount_at(&Mount {
        target: c"/dev",
        kind: c"devtmpfs",
        flags: MountFlags::NOSUID,
        data: Some(c"mode=755"),
    })
}

/// Everything else.
pub fn pseudo() -> Result<(), SetupError> {
    MOUNTS.iter().try_for_each(mount_at)?;
    for (target, link) in LINKS {
        match symlink(*target, *link) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(at(*link)(errno)),
        }
    }
    Ok(())
}

fn mount_at(what: &Mount) -> Result<(), SetupError> {
    directory(what.target, 0o755)?;
    mount(what.kind, what.target, what.kind, what.flags, what.data).map_err(at(what.target))
}

/// Moves them below `/newroot`, the current directory.
pub fn move_in() -> Result<(), SetupError> {
    for (from, to) in [(c"/dev", c"dev"), (c"/proc", c"proc"), (c"/sys", c"sys")] {
        let moved = match mount_move(from, to) {
            Err(Errno::NOENT) => {
                directory(to, 0o755)?;
                mount_move(from, to)
            }
            moved => moved,
        };
        moved.map_err(at(from))?;
    }
    Ok(())
}

/// Makes a directory unless something of that name is there.
pub fn directory(path: &CStr, mode: u32) -> Result<(), SetupError> {
    match mkdir(path, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(at(path)(errno)),
    }
}
