//! `doctor`: what a sandbox needs of this computer, checked one by one, each with its remedy. It makes nothing.

mod limits;
mod permission;

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use cubbyhole::{Error, Sandbox, Status, check_host};
use rustix::fs::{Access, access, statvfs};
use serde_json::json;

use crate::amount::bytes;
use crate::failure::{Failure, clean, explain};
use crate::output::{self, Colour, paint};

/// Less free space than this, in bytes, is no room for an image.
const ROOM: u64 = 1 << 30;

/// Less memory than this, in bytes, is none for a sandbox of the usual size.
const MEMORY: u64 = 640 << 20;

/// One check.
#[derive(Debug, PartialEq, Eq)]
struct Check {
    what: &'static str,
    /// What was found.
    found: String,
    /// What to do, if it is not good enough.
    remedy: Option<String>,
}

impl Check {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, found: found.into(), remedy: None }
    }

    fn bad(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// `cubby doctor`: 0 if all is well, 1 if not.
pub async fn doctor(as_json: bool) -> Result<u8, Failure> {
    let mut checks = vec![device(Path::new("/dev/kvm"))];
    checks.extend(of_the_sandbox_process().await);
    checks.extend(of_the_home().await);
    checks.push(memory(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()));
    checks.extend(limits::check());
    let well = checks.iter().all(|check| check.remedy.is_none());
    if as_json {
        output::print_json(&json!({ "ok": well, "checks": checks.iter().map(value).collect::<Vec<_>>() }))?;
    } else {
        let colour = output::colour_on_stdout();
        let text: String = checks.iter().map(|check| text(check, colour)).collect();
        output::print(text.as_bytes())?;
    }
    Ok(if well { 0 } else { 1 })
}

fn device(path: &Path) -> Check {
    const WHAT: &str = "/dev/kvm";
    match access(path, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => Check::good(WHAT, "you may open it"),
        Err(rustix::io::Errno::NOENT) => Check::bad(
            WHAT,
            "it is not there",
            "load its module (sudo modprobe kvm_intel or kvm_amd), or enable virtualization in the firmware",
        ),
        Err(error) => Check::bad(WHAT, format!("you may not open it: {error}"), permission::remedy(path)),
    }
}

async fn of_the_sandbox_process() -> Vec<Check> {
    const INSTALL: &str = "install it: cargo xtask install --prefix DIR, and put DIR/bin on PATH";
    let report = match check_host().await {
        Ok(report) => report,
        Err(error @ Error::RuntimeNotFound { .. }) => {
            let found = "none beside this program, on PATH or in CUBBY_RUNTIME";
            drop(error);
            return vec![Check::bad("sandbox process", found, INSTALL)];
        }
        Err(error) => return vec![Check::bad("sandbox process", explain(&error), INSTALL)],
    };
    let virtualization = match report.unsupported {
        None => Check::good("virtualization", "guests can run"),
        Some((why, remedy)) => Check::bad("virtualization", why, remedy),
    };
    let assets = match report.assets {
        Ok(directory) => Check::good("kernel and agent", directory.display().to_string()),
        Err(why) => Check::bad("kernel and agent", why, INSTALL),
    };
    vec![virtualization, Check::good("sandbox process", report.runtime.display().to_string()), assets]
}

async fn of_the_home() -> Vec<Check> {
    let home = match cubbyhole::home() {
        Ok(home) => home,
        Err(error) => {
            return vec![Check::bad("home", explain(&error), "set CUBBY_HOME to a directory of yours")];
        }
    };
    // It is made when it is needed, in what is there of it.
    let there = home.ancestors().find(|path| path.exists()).map(PathBuf::from).unwrap_or_default();
    let writable = match access(&there, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Check::good("home", home.display().to_string()),
        Err(error) => Check::bad(
            "home",
            format!("{}: {error}", there.display()),
            "make it yours, or set CUBBY_HOME to a directory that is",
        ),
    };
    let space = match statvfs(&there) {
        Ok(system) => free_space(system.f_bavail.saturating_mul(system.f_frsize)),
        Err(error) => {
            Check::bad("disk space", error.to_string(), "set CUBBY_HOME to a directory on another disk")
        }
    };
    let mut checks = vec![writable, locks(&there), space];
    // What is not there yet is well.
    if home.join("db/cubby.db").exists() {
        checks.push(of_the_store().await);
    }
    checks
}

/// A sandbox that has lost its process is told from one that runs by a lock; not every network file system has them.
fn locks(directory: &Path) -> Check {
    const WHAT: &str = "file locks";
    match File::open(directory).map(|file| file.try_lock_shared()) {
        Ok(Ok(()) | Err(TryLockError::WouldBlock)) => Check::good(WHAT, "the home's file system has them"),
        Ok(Err(TryLockError::Error(error))) | Err(error) => Check::bad(
            WHAT,
            format!("{}: {error}", directory.display()),
            "set CUBBY_HOME to a directory on a local disk",
        ),
    }
}

/// Reading the store clears up after sandboxes that have lost their processes: no lock and no record stays stale.
async fn of_the_store() -> Check {
    const WHAT: &str = "sandboxes";
    match Sandbox::list().await {
        Ok(list) => {
            let live = list.iter().filter(|sandbox| sandbox.status().is_live()).count();
            let crashed = list.iter().filter(|sandbox| sandbox.status() == Status::Crashed).count();
            Check::good(WHAT, format!("{}, of which {live} run and {crashed} have crashed", list.len()))
        }
        Err(error) => {
            Check::bad(WHAT, explain(&error), "mend what it says, or set CUBBY_HOME to another directory")
        }
    }
}

/// `MemAvailable` (proc_meminfo(5)).
fn memory(meminfo: &str) -> Check {
    const WHAT: &str = "memory";
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    match kib.map(|kib| kib.saturating_mul(1024)) {
        None => Check::good(WHAT, "not known"),
        Some(free) if free >= MEMORY => Check::good(WHAT, format!("{} available", bytes(free))),
        Some(free) => Check::bad(
            WHAT,
            format!("{} available", bytes(free)),
            "end other programs, or give sandboxes less (-m 256m)",
        ),
    }
}

fn free_space(free: u64) -> Check {
    let found = format!("{} free", bytes(free));
    if free >= ROOM {
        return Check::good("disk space", found);
    }
    Check::bad(
        "disk space",
        found,
        "remove what is not needed (cubby prune), or set CUBBY_HOME to a directory on a larger disk",
    )
}

fn value(check: &Check) -> serde_json::Value {
    json!({
        "check": check.what,
        "ok": check.remedy.is_none(),
        "found": check.found,
        "remedy": check.remedy,
    })
}

fn text(check: &Check, colour: bool) -> String {
    let (mark, tone) = match check.remedy {
        None => ("ok  ", Colour::Green),
        Some(_) => ("FAIL", Colour::Red),
    };
    let remedy = check.remedy.as_ref().map(|remedy| format!("      → {}\n", clean(remedy)));
    let Check { what, found, .. } = check;
    format!("{}  {what}: {}\n{}", paint(mark, tone, colour), clean(found), remedy.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_good_enough_has_a_remedy() {
        assert_eq!(free_space(ROOM).remedy, None);
        assert!(free_space(ROOM - 1).remedy.is_some());
        let available = |kib: u64| memory(&format!("MemTotal: 1 kB\nMemAvailable:   {kib} kB\n"));
        assert_eq!(available(MEMORY / 1024).remedy, None);
        assert!(available(MEMORY / 1024 - 1).remedy.unwrap().contains("-m 256m"));
        assert_eq!(locks(Path::new("/tmp")).remedy, None);
        assert!(locks(Path::new("/no/such/directory")).remedy.is_some());
        assert!(device(Path::new("/dev/no-such-device")).remedy.unwrap().contains("modprobe"));
        assert_eq!(device(Path::new("/dev/null")).remedy, None);
    }

    #[test]
    fn a_failure_shows_its_remedy() {
        let bad = Check::bad("x", "broken", "mend it");
        assert_eq!(text(&bad, false), "FAIL  x: broken\n      → mend it\n");
        assert_eq!(text(&Check::good("x", "fine"), false), "ok    x: fine\n");
        assert_eq!(value(&bad)["ok"], false);
    }
}
