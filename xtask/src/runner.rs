//! `xtask runner`: what cargo runs the binaries of this workspace with (`.cargo/config.toml`, `runner.sh`), so that plain
//! `cargo test`, `cargo bench` and `cargo run --example` work wherever they are typed: a binary that needs KVM runs
//! where KVM works, with everything that sandboxes need built and around it.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::images::PythonImage;
use crate::within::Around;
use crate::{assets, images, kvm};

/// Set to `icount`, it sends everything to the machine on the instruction clock; set to `alone`, each binary has a machine
/// of its own.
pub const MODE: &str = "CUBBY_KVM_MODE";

/// Runs a binary that cargo has built for the package `CARGO_PKG_NAME`, and returns its exit status.
pub fn run(program: &[OsString]) -> Result<u8> {
    let package = std::env::var("CARGO_PKG_NAME").unwrap_or_default();
    let assets = assets::build(assets::Cargo::IsQuiet)?;
    // The VMM knows no images.
    let image = if package == "cubby-vmm" { None } else { Some(PythonImage::ensure()?) };
    let end_to_end = package == "cubby-tests";
    let clients = if end_to_end { Some(images::clients()?) } else { None };
    let options = machine()?;
    let around = Around {
        assets: &assets,
        image: image.as_ref().map(PythonImage::dir),
        registry: end_to_end,
        clients: clients.as_deref(),
        in_memory: package == "cubby-benches" || options.mode == kvm::Mode::Icount,
    };
    let binary = program.first().context("no program was given")?;
    // Cargo's own are in the target directory; rustdoc's are in a temporary one.
    let directory = Path::new(binary).parent().filter(|dir| dir.is_absolute()).map(Path::to_owned);
    let writable = directory.into_iter().collect();
    kvm::run(&kvm::Options { writable, ..options }, &around.command(program)?)
}

/// The machine that [`MODE`] asks for.
fn machine() -> Result<kvm::Options> {
    let normal = kvm::Options::new(kvm::Mode::Normal);
    match std::env::var(MODE).as_deref() {
        Err(_) | Ok("") => Ok(normal),
        Ok("icount") => Ok(kvm::Options::new(kvm::Mode::Icount)),
        // Where KVM works there is no machine, and nothing to be alone on.
        Ok("alone") => Ok(kvm::Options { fresh: !kvm::works(), ..normal }),
        Ok(other) => bail!("{MODE} is {other:?}: it can be `icount`, `alone`, or not set"),
    }
}
