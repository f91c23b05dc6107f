//! Who this guest is: its clock, random pool, name, and the files in `/etc` that say so, as Docker writes them.
//! Files are written only where they differ, since each is a change on the sandbox's disk.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{Read, Write as _};
use std::os::unix::fs::OpenOptionsExt;

use cubby_protocol::message::GuestConfig;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_settime};

use super::{SetupError, at};
use crate::sys;

const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n\
                     ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n";

/// Sets the wall clock to nanoseconds since the Unix epoch.
pub fn set_clock(realtime_ns: u64) -> Result<(), Errno> {
    let (seconds, nanoseconds) = (realtime_ns / 1_000_000_000, realtime_ns % 1_000_000_000);
    let time = Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanoseconds.cast_signed() };
    clock_settime(ClockId::Realtime, time)
}

/// Clock and random pool: what must be right before the first file is written.
pub fn moment(config: &GuestConfig) -> Result<(), SetupError> {
    set_clock(config.realtime_ns).map_err(at("clock"))?;
    let random = rustix::fs::open(c"/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    random.and_then(|random| sys::add_entropy(random, config.entropy)).map_err(at(c"/dev/urandom"))
}

/// Host name and `/etc`, in the new root.
pub fn name(config: &GuestConfig) -> Result<(), SetupError> {
    rustix::system::sethostname(config.hostname.as_bytes()).map_err(at("hostname"))?;
    super::mounts::directory(c"/etc", 0o755)?;
    let host = &config.hostname;
    write("/etc/hostname", &format!("{host}\n"))?;
    write("/etc/hosts", &format!("{HOSTS}127.0.1.1\t{host}\n"))?;
    if !config.nameservers.is_empty() {
        write("/etc/resolv.conf", &resolv_conf(&config.nameservers))?;
    }
    if !config.workdir.is_empty() {
        std::fs::create_dir_all(&config.workdir).map_err(|error| failed(&config.workdir, &error))?;
    }
    Ok(())
}

fn resolv_conf(servers: &[String]) -> String {
    servers.iter().fold(String::new(), |mut text, server| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "nameserver {server}");
        text
    })
}

fn failed(path: &str, error: &std::io::Error) -> SetupError {
    SetupError { what: path.into(), errno: Errno::from_io_error(error).unwrap_or(Errno::IO) }
}

/// Replaces a file, or a link of its name, unless it has this content already.
fn write(path: &str, content: &str) -> Result<(), SetupError> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    if let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(path) {
        let mut old = Vec::new();
        let limit = content.len() as u64 + 1;
        if file.take(limit).read_to_end(&mut old).is_ok() && old == content.as_bytes() {
            return Ok(());
        }
    }
    let create = || {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o644).custom_flags(flags);
        options.open(path)?.write_all(content.as_bytes())
    };
    match create() {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::LOOP) => {
            std::fs::remove_file(path).and_then(|()| create()).map_err(|error| failed(path, &error))
        }
        result => result.map_err(|error| failed(path, &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn files_and_links_are_replaced_and_link_targets_are_not_touched() {
        let directory = std::env::temp_dir().join(format!("cubby-identity-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("resolv.conf").to_str().unwrap().to_owned();
        let target = directory.join("target");
        std::fs::write(&target, "theirs").unwrap();
        symlink(&target, &path).unwrap();
        write(&path, &resolv_conf(&["10.0.0.1".into(), "::1".into()])).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "nameserver 10.0.0.1\nnameserver ::1\n");
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "theirs");
        write(&path, "short").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "short");
        let before = std::fs::metadata(&path).unwrap().modified().unwrap();
        write(&path, "short").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), before);
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_path_that_cannot_be_written_is_named() {
        let error = write("/proc/nowhere/file", "x").unwrap_err();
        assert_eq!(error.what, "/proc/nowhere/file");
        assert_eq!(error.errno, Errno::NOENT);
    }
}
