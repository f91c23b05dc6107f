//! `cargo xtask test`: what CI runs, and all of it, in two lanes side by side, because a KVM test machine has one
//! processor. The first builds what sandboxes are made of and boots them, and shows what it does. The second checks and
//! tests what needs no KVM, takes its share of the end-to-end tests, and shows each check when it is over.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Result, bail};

use crate::progress::{step, step_apart};
use crate::{assets, deny, images, kvm, packages, process, runner, workspace};

/// The packages whose tests boot guests; `runner.sh` names the same. The last one's are the end-to-end tests.
const ON_KVM: [&str; 4] = ["cubby-vmm", "cubbyhole", "cubby-benches", "cubby-tests"];

/// Modules of the end-to-end tests that are the second lane's.
const SHARE: [&str; 14] = [
    "chaos::",
    "cli::",
    "clients::",
    "connections::",
    "endurance::",
    "flow::",
    "guide::",
    "image::",
    "many::",
    "network::",
    "network_live::",
    "policies::",
    "soak::",
    "vsock_ports::",
];

/// Runs every check, the later ones too when one has failed, and says at the end which did.
pub fn run() -> Result<()> {
    let mut needs = vec![packages::KERNEL, packages::LINKER, packages::IMAGES, packages::TESTS];
    needs.extend((!kvm::works()).then_some(packages::MACHINE));
    step("packages", || packages::ensure("testing", &needs))?;
    let checks = Checks::default();
    thread::scope(|scope| {
        let second = thread::Builder::new().name("second lane".into());
        second.spawn_scoped(scope, || checks.second_lane())?;
        checks.first_lane();
        anyhow::Ok(())
    })?;
    let failed = checks.failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failed.is_empty() {
        eprintln!("==> all checks passed");
        return Ok(());
    }
    bail!("failed: {}", failed.join("; "))
}

/// What failed so far.
#[derive(Default)]
struct Checks {
    failed: Mutex<Vec<&'static str>>,
}

impl Checks {
    fn first_lane(&self) {
        self.shown("dependencies: bans, licences, sources", deny::check);
        self.shown("guest kernel, guest agent, sandbox process", || {
            assets::build(assets::Cargo::Shows).map(drop)
        });
        self.shown("images", || {
            images::PythonImage::ensure()?;
            images::clients().map(drop)
        });
        self.shown("tests on KVM", || {
            let mut test = cargo("test", ["--no-fail-fast"])?;
            test.args(ON_KVM.iter().flat_map(|package| ["--package", package]));
            // The modules' names are no other package's: nothing else is left out.
            process::run(test.arg("--").args(SHARE.iter().flat_map(|module| ["--skip", module])))
        });
    }

    fn second_lane(&self) {
        self.apart("format", || cargo("fmt", ["--all", "--check"]));
        self.apart("clippy", || cargo("clippy", ["--workspace", "--all-targets", "--", "-D", "warnings"]));
        self.apart("documentation", || {
            let mut doc = cargo("doc", ["--workspace", "--no-deps"])?;
            doc.env("RUSTDOCFLAGS", "-D warnings");
            Ok(doc)
        });
        self.apart("unit and doc tests, here", || {
            let mut test = cargo("test", ["--workspace", "--no-fail-fast"])?;
            test.args(ON_KVM.iter().flat_map(|package| ["--exclude", package]));
            Ok(test)
        });
        self.apart("the second lane's tests on KVM", || {
            let mut test = cargo("test", ["--package", "cubby-tests", "--test", "promises", "--"])?;
            test.args(SHARE).env(runner::MODE, "alone");
            Ok(test)
        });
    }

    /// A check that shows what it does.
    fn shown(&self, title: &'static str, work: impl FnOnce() -> Result<()>) {
        self.note(title, step(title, work));
    }

    /// A check whose output comes in one piece at its end, and is in a file of the target directory until then.
    fn apart(&self, title: &'static str, command: impl FnOnce() -> Result<Command>) {
        let result = step_apart(title, |text| {
            let directory = workspace::target()?.join("checks");
            fs::create_dir_all(&directory)?;
            let path = directory.join(title);
            let output = File::create(&path)?;
            let mut command = command()?;
            command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
            let result = process::run(&mut command);
            *text = fs::read(&path)?;
            result
        });
        self.note(title, result);
    }

    fn note(&self, title: &'static str, result: Result<()>) {
        if let Err(error) = result {
            eprintln!("{error:#}");
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).push(title);
        }
    }
}

fn cargo<const N: usize>(command: &str, arguments: [&str; N]) -> Result<Command> {
    let mut cargo = workspace::cargo()?;
    cargo.arg(command).args(arguments);
    Ok(cargo)
}
