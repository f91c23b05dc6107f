//! `xtask runner`: what cargo runs the binaries of this workspace with (`.cargo/config.toml`, `runner.sh`), so that plain
//! `cargo test`, `cargo bench` and `cargo run --example` work wherever they are typed: a binary that needs KVM runs
//! where KVM works, with everything that sandboxes need built and around it.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result};

use crate::images::PythonImage;
use crate::within::Around;
use crate::{assets, kvm};

/// Set to `icount`, it sends everything to the machine on the instruction clock.
pub const MODE: &str = "CUBBY_KVM_MODE";

/// Runs a binary that cargo has built for the package `CARGO_PKG_NAME`, and returns its exit status.
pub fn run(program: &[OsString]) -> Result<u8> {
    let package = std::env::var("CARGO_PKG_NAME").unwrap_or_default();
    let assets = assets::build(assets::Cargo::IsQuiet)?;
    // The VMM knows no images.
    let image = if package == "cubby-vmm" { None } else { Some(PythonImage::ensure()?) };
    let around = Around {
        assets: &assets,
        image: image.as_ref().map(PythonImage::dir),
        registry: package == "cubby-tests",
        in_memory: package == "cubby-benches" || mode() == kvm::Mode::Icount,
    };
    let binary = program.first().context("no program was given")?;
    // Cargo's own are in the target directory; rustdoc's are in a temporary one.
    let directory = Path::new(binary).parent().filter(|dir| dir.is_absolute()).map(Path::to_owned);
    let options = kvm::Options { writable: directory.into_iter().collect(), ..kvm::Options::new(mode()) };
    kvm::run(&options, &around.command(program)?)
}

fn mode() -> kvm::Mode {
    if std::env::var_os(MODE).is_some_and(|mode| mode == "icount") {
        kvm::Mode::Icount
    } else {
        kvm::Mode::Normal
    }
}
