//! `cargo xtask demo`: from nothing to a sandbox that has run Python, with the time of each step.

use std::ffi::OsString;

use anyhow::Result;

use crate::images::PythonImage;
use crate::progress::step;
use crate::within::{Around, PYTHON};
use crate::{assets, kvm, packages, process, workspace};

/// Runs `sdk/examples/demo.rs` with `image` (the Python image made here, from a registry, if there is none) and returns
/// its exit status.
pub fn run(image: Option<String>, command: Vec<OsString>) -> Result<u8> {
    let mut needs = vec![packages::KERNEL, packages::LINKER];
    needs.extend((image.is_none()).then_some(packages::IMAGES));
    needs.extend((!kvm::works()).then_some(packages::MACHINE));
    step("packages", || packages::ensure("the demo", &needs))?;
    let assets = step("guest kernel, guest agent, sandbox process", || assets::build(assets::Cargo::Shows))?;
    let python = match &image {
        Some(_) => None,
        None => Some(step("image", PythonImage::ensure)?),
    };
    // In the profile of the tests, so that neither builds the SDK again after the other.
    step("the demo program", || {
        let mut cargo = workspace::cargo()?;
        process::run(cargo.args(["build", "--package", "cubbyhole", "--example", "demo"]))
    })?;
    let program = workspace::target()?.join("debug/examples/demo");
    let mut demo: Vec<OsString> = vec![program.into(), "--image".into()];
    demo.push(image.map_or_else(|| PYTHON.into(), OsString::from));
    if !command.is_empty() {
        demo.push("--".into());
        demo.extend(command);
    }
    let around = Around {
        assets: &assets,
        image: python.as_ref().map(PythonImage::dir),
        registry: python.is_some(),
        clients: None,
        in_memory: false,
    };
    let options = kvm::Options::new(kvm::Mode::Normal);
    if !kvm::works() {
        step("KVM test machine (this computer's KVM cannot run guests)", || {
            kvm::run(&options, &["true".into()])
        })?;
    }
    step("demo", || kvm::run(&options, &around.command(&demo)?))
}
