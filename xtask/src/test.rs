//! `cargo xtask test`: what CI runs, and all of it.

use anyhow::{Result, bail};

use crate::progress::step;
use crate::{assets, deny, images, kvm, packages, process, workspace};

/// The packages whose tests boot guests; `runner.sh` names the same.
const ON_KVM: [&str; 4] = ["cubby-vmm", "cubbyhole", "cubby-tests", "cubby-benches"];

/// Runs every check, the later ones too when one has failed, and says at the end which did.
pub fn run() -> Result<()> {
    let mut needs = vec![packages::KERNEL, packages::LINKER, packages::IMAGES, packages::TESTS];
    needs.extend((!kvm::works()).then_some(packages::MACHINE));
    step("packages", || packages::ensure("testing", &needs))?;
    let mut failed = Vec::new();
    let mut check = |title: &'static str, work: &dyn Fn() -> Result<()>| {
        if let Err(error) = step(title, work) {
            eprintln!("{error:#}");
            failed.push(title);
        }
    };
    check("format", &|| cargo(&["fmt", "--all", "--check"]));
    check("clippy", &|| cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]));
    check("dependencies: bans, licences, sources", &deny::check);
    check("unit and doc tests, here", &|| {
        let mut arguments = vec!["test", "--workspace", "--no-fail-fast"];
        arguments.extend(ON_KVM.iter().flat_map(|package| ["--exclude", package]));
        cargo(&arguments)
    });
    check("guest kernel, guest agent, sandbox process", &|| assets::build(assets::Cargo::Shows).map(drop));
    check("image", &|| images::PythonImage::ensure().map(drop));
    check("tests on KVM", &|| {
        let mut arguments = vec!["test", "--no-fail-fast"];
        arguments.extend(ON_KVM.iter().flat_map(|package| ["--package", package]));
        cargo(&arguments)
    });
    if failed.is_empty() {
        eprintln!("==> all checks passed");
        return Ok(());
    }
    bail!("failed: {}", failed.join("; "))
}

fn cargo(arguments: &[&str]) -> Result<()> {
    process::run(workspace::cargo()?.args(arguments))
}
