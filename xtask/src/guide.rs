//! `cargo xtask guide`: the guide as HTML. Its commands and programs are tested without it (`tests/tests/guide.rs`).

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::cache::{self, Key};
use crate::{process, progress, workspace};

const VERSION: &str = "0.4.52";

/// Builds it into `target/guide`.
pub fn build() -> Result<()> {
    let (guide, target) = (workspace::root()?.join("docs/guide"), workspace::target()?.join("guide"));
    let mut mdbook = Command::new(binary()?);
    process::run(mdbook.arg("build").arg(guide).arg("--dest-dir").arg(&target))?;
    progress::note(target.join("index.html").display().to_string());
    Ok(())
}

/// mdBook, built once into the cache.
fn binary() -> Result<PathBuf> {
    let key = Key::default().with(VERSION).finish();
    cache::entry("mdbook", &key, |scratch| {
        progress::step("building mdBook (once)", || {
            let mut install = workspace::cargo()?;
            install.args(["install", "--quiet", "--locked", "--version", VERSION, "--no-default-features"]);
            process::run(install.args(["mdbook", "--root"]).arg(scratch))?;
            Ok(scratch.join("bin/mdbook"))
        })
    })
}
