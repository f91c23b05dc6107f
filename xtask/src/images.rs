//! The images that demo and tests run, made from Debian's packages, once each: a small Debian with Python, as an OCI
//! layout and as the storage of a registry that has it; one with network clients and their servers ([`clients()`]); and, for
//! `xtask python-suite`, one with all of Python's own tests.

mod clients;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::process::{self, command};
use crate::registry::Registry;
use crate::{packages, progress};

pub use clients::clients;

/// Raised when this file makes something else.
const RECIPE: &str = "2";

/// The Debian release, the one that this project is developed on.
const SUITE: &str = "bookworm";

/// What is in it besides what every Debian has. Python with its line editor, and what people use at a terminal, because
/// the tests do. `usr-is-merged` says that there is nothing for `usrmerge` to do, which would bring all of Perl.
const PACKAGES: &str = "usr-is-merged,python3-minimal,libpython3-stdlib,procps,vim-tiny";

/// A Python image.
pub struct PythonImage(PathBuf);

impl PythonImage {
    /// Finds it in the cache or makes it.
    pub fn ensure() -> Result<Self> {
        packages::ensure("making a Python image and serving it", &[packages::IMAGES])?;
        let key = Key::default().with(RECIPE).with(SUITE).finish();
        let dir = cache::entry("python-image", &key, |scratch| {
            progress::step("making the Python image from Debian's packages (once)", || make(scratch))
        })?;
        Ok(Self(dir))
    }

    /// One that [`Self::ensure`] has made.
    pub fn at(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// The OCI layout, as an image reference.
    pub fn layout(&self) -> String {
        format!("oci:{}", self.0.join("layout").display())
    }

    /// What a registry's storage holds of it.
    pub fn storage(&self) -> PathBuf {
        self.0.join("storage")
    }

    /// Its name in a registry, with the tag: the version of the Python in it.
    pub fn name(&self) -> Result<String> {
        Ok(fs::read_to_string(self.0.join("name"))?)
    }
}

/// The image of Python's own tests: everything that the interpreter comes with, and the tests of its standard library.
/// Gives the OCI layout.
pub fn python_suite() -> Result<PathBuf> {
    packages::ensure("making the image of Python's tests", &[packages::IMAGES])?;
    // netbase: the names of services and protocols, which test_socket asks for.
    let packages = "python3,libpython3.11-testsuite,netbase";
    let key = Key::default().with(RECIPE).with(SUITE).with(packages).finish();
    cache::entry("python-suite", &key, |scratch| {
        progress::step("making the image of Python's tests from Debian's packages (once)", || {
            let (tar, layout) = (scratch.join("root.tar"), scratch.join("layout"));
            remove(&layout)?;
            debian(packages, &[], &tar)?;
            oci_layout(&tar, &layout)?;
            Ok(layout)
        })
    })
}

fn make(scratch: &Path) -> Result<PathBuf> {
    let made = scratch.join("made");
    remove(&made)?;
    fs::create_dir_all(&made)?;
    let (tar, layout, storage) = (scratch.join("root.tar"), made.join("layout"), made.join("storage"));
    debian(PACKAGES, &[], &tar)?;
    let name = format!("python:{}", python_version(&tar)?);
    let image = oci_layout(&tar, &layout)?;

    progress::note(format!("{name}, into a registry's storage"));
    fs::create_dir_all(&storage)?;
    let registry = Registry::start(&storage)?;
    process::run_quietly(
        command("skopeo", ["copy", "--quiet", "--dest-tls-verify=false"])
            .arg(format!("oci:{image}"))
            .arg(format!("docker://{}/{name}", registry.address())),
    )?;
    drop(registry);
    fs::write(made.join("name"), name)?;
    Ok(made)
}

/// What an interrupted run has left.
fn remove(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    Ok(())
}

/// A minimal Debian with some packages, as an archive; `more` is for mmdebstrap.
fn debian(packages: &str, more: &[String], tar: &Path) -> Result<()> {
    progress::note(format!("{SUITE}, minimal, with {packages} (mmdebstrap)"));
    let mut debian = process::as_root("mmdebstrap");
    debian.args(["--quiet", "--variant=minbase", "--format=tar"]).arg(format!("--include={packages}"));
    debian.arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr");
    for unread in ["doc", "man", "locale"] {
        debian.arg(format!("--dpkgopt=path-exclude=/usr/share/{unread}/*"));
    }
    debian.args(more);
    process::run(debian.args([SUITE, "-"]).stdout(File::create(tar)?))
}

/// Makes an image of one layer in a new directory, and gives it as umoci calls it.
fn oci_layout(tar: &Path, layout: &Path) -> Result<String> {
    progress::note("as an OCI image");
    let image = format!("{}:latest", layout.display());
    process::run_quietly(command("umoci", ["init", "--layout"]).arg(layout))?;
    process::run_quietly(&mut command("umoci", ["new", "--image", &image]))?;
    process::run_quietly(command("umoci", ["raw", "add-layer", "--image", &image]).arg(tar))?;
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    process::run_quietly(&mut command(
        "umoci",
        [
            "config",
            "--image",
            &image,
            "--architecture=amd64",
            "--os=linux",
            "--config.cmd=python3",
            "--config.workingdir=/",
            "--config.env",
            path,
            "--config.env",
            "LANG=C.UTF-8",
        ],
    ))?;
    process::run_quietly(command("umoci", ["gc", "--layout"]).arg(layout))?;
    Ok(image)
}

/// The version of the Python in the archive, such as `3.11`.
fn python_version(tar: &Path) -> Result<String> {
    let names = process::output(command("tar", ["--list", "--file"]).arg(tar))?;
    names
        .lines()
        .filter_map(|name| name.strip_prefix("./usr/bin/python"))
        .find(|version| version.contains('.') && version.chars().all(|c| c == '.' || c.is_ascii_digit()))
        .map(str::to_owned)
        .context("there is no Python in the image")
}
