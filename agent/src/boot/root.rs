//! The root file system: the image read-only below, the sandbox's own disk above it, an overlay of both on top.
//!
//! The mounts of the two disks stay in the initramfs, out of everybody's sight.

use cubby_protocol::message::{RootDisks, SetupStage};
use rustix::fs::{Mode, chmod, stat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};

use super::mounts::{self, directory};
use super::{Failed, SetupError, Stage, at};

const LOWER: &std::ffi::CStr = c"/image";
const UPPER: &std::ffi::CStr = c"/disk";
const ROOT: &std::ffi::CStr = c"/newroot";

/// Mounts the disks and makes the overlay the root.
pub fn enter(disks: &RootDisks) -> Result<(), Failed> {
    image(&disks.image).stage(SetupStage::ImageDisk)?;
    writable(disks.disk.as_deref()).stage(SetupStage::WritableDisk)?;
    overlay().stage(SetupStage::Root)
}

fn image(device: &str) -> Result<(), SetupError> {
    directory(LOWER, 0o755)?;
    mount(device, LOWER, c"erofs", MountFlags::RDONLY, None).map_err(at(&*format!("erofs on {device}")))
}

fn writable(device: Option<&str>) -> Result<(), SetupError> {
    directory(UPPER, 0o755)?;
    match device {
        Some(device) => {
            let mounted = mount(device, UPPER, c"ext4", MountFlags::NODEV, None);
            mounted.map_err(at(&*format!("ext4 on {device}")))?;
        }
        None => {
            mount(c"tmpfs", UPPER, c"tmpfs", MountFlags::empty(), c"mode=755").map_err(at(UPPER))?;
        }
    }
    let upper = c"/disk/upper";
    match rustix::fs::mkdir(upper, Mode::from_raw_mode(0o755)) {
        Ok(()) => {
            // A new disk: the root directory is the image's.
            let root = stat(LOWER).map_err(at(LOWER))?;
            let owner = (rustix::fs::Uid::from_raw(root.st_uid), rustix::fs::Gid::from_raw(root.st_gid));
            rustix::fs::chown(upper, Some(owner.0), Some(owner.1)).map_err(at(upper))?;
            chmod(upper, Mode::from_raw_mode(root.st_mode & 0o7777)).map_err(at(upper))?;
        }
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(at(upper)(errno)),
    }
    directory(c"/disk/work", 0o755)
}

fn overlay() -> Result<(), SetupError> {
    directory(ROOT, 0o755)?;
    // xino: one device number for the whole tree, and for each file one inode number, which `stat` and `readdir` agree on
    // and which stays (kernel doc filesystems/overlayfs, "Inode properties"). Without it `tar --one-file-system` leaves
    // out most of an image, and a directory's number changes when memory is short.
    let layers = c"lowerdir=/image,upperdir=/disk/upper,workdir=/disk/work,xino=on";
    mount(c"overlay", ROOT, c"overlay", MountFlags::empty(), layers).map_err(at(c"overlay"))?;
    chdir(ROOT).map_err(at(ROOT))?;
    mounts::move_in()?;
    // The initramfs cannot be pivoted away (kernel doc filesystems/ramfs-rootfs-initramfs), so it is covered.
    mount_move(c".", c"/").map_err(at(ROOT))?;
    chroot(c".").map_err(at(ROOT))?;
    chdir(c"/").map_err(at(c"/"))?;
    if directory_is_new(c"/tmp")? {
        chmod(c"/tmp", Mode::from_raw_mode(0o1777)).map_err(at(c"/tmp"))?;
    }
    directory_is_new(c"/run").map(drop)
}

fn directory_is_new(path: &std::ffi::CStr) -> Result<bool, SetupError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(errno) => Err(at(path)(errno)),
    }
}
