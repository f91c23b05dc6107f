//! `doctor`: what a sandbox needs of this computer, checked one by one, each with its remedy.

use std::path::{Path, PathBuf};

use cubbyhole::{Error, check_host};
use rustix::fs::{Access, access, statvfs};
use rustix::process::{Resource, getrlimit};
use serde_json::json;

use crate::amount::bytes;
use crate::failure::{Failure, clean, explain};
use crate::output::{self, Colour, paint};

/// Less free space than this, in bytes, is no room for an image.
const ROOM: u64 = 1 << 30;

/// A program with a few sandboxes opens more files than some systems allow: two for each, and some for a pull.
const FILES: u64 = 256;

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
    checks.extend(of_the_home());
    checks.push(open_files(getrlimit(Resource::Nofile).current));
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
        Err(error) => Check::bad(
            WHAT,
            format!("you may not open it: {error}"),
            "add yourself to its group (sudo usermod -aG kvm $USER) and log in again",
        ),
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

fn of_the_home() -> Vec<Check> {
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
    vec![writable, space]
}

fn free_space(free: u64) -> Check {
    let found = format!("{} free", bytes(free));
    if free >= ROOM {
        return Check::good("disk space", found);
    }
    Check::bad(
        "disk space",
        found,
        "remove sandboxes (cubby rm), or set CUBBY_HOME to a directory on a larger disk",
    )
}

fn open_files(limit: Option<u64>) -> Check {
    match limit {
        None => Check::good("open files", "no limit"),
        Some(limit) if limit >= FILES => Check::good("open files", format!("{limit} at once")),
        Some(limit) => Check::bad(
            "open files",
            format!("{limit} at once"),
            format!("raise the limit: ulimit -n {}", FILES * 4),
        ),
    }
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
        assert_eq!(open_files(None).remedy, None);
        assert_eq!(open_files(Some(FILES)).remedy, None);
        assert!(open_files(Some(FILES - 1)).remedy.unwrap().contains("ulimit -n 1024"));
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
