//! `xtask within`: runs one program with all that sandboxes need around it: a fresh `CUBBY_HOME` in memory, the
//! assets, the Python image, and, when asked for, a registry that serves it. It runs where the program runs, so it is the
//! same on this computer and on the KVM test machine.
//!
//! The program finds in its environment: `CUBBY_HOME`, `CUBBY_ASSETS`, `CUBBY_RUNTIME`, `CUBBY_TEST_TRAFFIC` (a program for
//! guests, of `tests/traffic`); `CUBBY_TEST_IMAGE` (an `oci:` reference); with a registry `CUBBY_TEST_REGISTRY`
//! (`localhost:PORT`) and `CUBBY_TEST_REFERENCE` (the image in it); and `CUBBY_TEST_CLIENTS`, the directory of
//! [`crate::images::clients`], if there is one.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::images::PythonImage;
use crate::process::{self, command};
use crate::registry::Registry;
use crate::{assets, workspace};

/// An argument that stands for the Python image in the registry, whose port is not known before.
pub const PYTHON: &str = "{python}";

/// What is to be around the program.
pub struct Around<'a> {
    /// As [`assets::build`] made it.
    pub assets: &'a Path,
    /// The Python image, if it is needed.
    pub image: Option<&'a Path>,
    /// Whether to serve it.
    pub registry: bool,
    /// Network clients and servers, if they are needed.
    pub clients: Option<&'a Path>,
    /// Whether the program and the assets are copied to memory first. For measuring: a look at a file of the KVM test
    /// machine's host is a wait, and a wait lets the instruction clock jump.
    pub in_memory: bool,
}

impl Around<'_> {
    /// The command that runs `program` so, here or on the KVM test machine.
    pub fn command(&self, program: &[OsString]) -> Result<Vec<OsString>> {
        let mut command: Vec<OsString> = vec![workspace::program()?.into(), "within".into()];
        command.extend(["--assets".into(), self.assets.into()]);
        if let Some(image) = self.image {
            command.extend(["--image".into(), image.into()]);
        }
        if self.registry {
            command.push("--registry".into());
        }
        if let Some(clients) = self.clients {
            command.extend(["--clients".into(), clients.into()]);
        }
        if self.in_memory {
            command.push("--in-memory".into());
        }
        command.push("--".into());
        command.extend_from_slice(program);
        Ok(command)
    }

    /// Runs `program` and returns its exit status.
    pub fn run(&self, program: &[OsString]) -> Result<u8> {
        let (name, arguments) = program.split_first().context("no program was given")?;
        let memory = Memory::new()?;
        let (mut name, mut assets) = (PathBuf::from(name), self.assets.to_owned());
        if self.in_memory {
            name = memory.copy(&name, "program")?;
            assets = memory.copy(&assets, "assets")?;
        }
        let mut command = Command::new(name);
        command.env("CUBBY_HOME", memory.0.join("home")).envs(assets::environment(&assets));
        let image = self.image.map(PythonImage::at);
        let (mut registry, mut reference) = (None, None);
        if let Some(image) = &image {
            command.env("CUBBY_TEST_IMAGE", image.layout());
            if self.registry {
                let started = registry.insert(served(image, &memory)?);
                command.env("CUBBY_TEST_REGISTRY", started.address());
                let reference = reference.insert(format!("{}/{}", started.address(), image.name()?));
                command.env("CUBBY_TEST_REFERENCE", reference);
            }
        }
        if let Some(clients) = self.clients {
            command.env("CUBBY_TEST_CLIENTS", clients);
        }
        command.args(arguments.iter().map(|argument| match &reference {
            Some(reference) if argument == PYTHON => OsStr::new(reference),
            _ => argument.as_os_str(),
        }));
        let status = process::status(&mut command)?;
        drop(registry);
        Ok(process::code(status))
    }
}

/// A registry on a copy, so that a test may push to it.
fn served(image: &PythonImage, memory: &Memory) -> Result<Registry> {
    Registry::start(&memory.copy(&image.storage(), "registry")?)
}

/// A directory in memory that goes when this does.
struct Memory(PathBuf);

impl Memory {
    fn new() -> Result<Self> {
        let base = Path::new("/dev/shm");
        let base = if base.is_dir() { base.to_owned() } else { std::env::temp_dir() };
        remove_abandoned(&base);
        let dir = base.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// A copy of a file or directory.
    fn copy(&self, from: &Path, name: &str) -> Result<PathBuf> {
        let to = self.0.join(name);
        process::run_quietly(command("cp", ["--recursive"]).arg(from).arg(&to))?;
        Ok(to)
    }
}

const PREFIX: &str = "cubby-within-";

/// What an interrupted run could not remove would stay in memory until the next boot.
fn remove_abandoned(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner =
            name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
