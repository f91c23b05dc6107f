//! The image that demo and tests run: a small Debian with Python, made from Debian's packages, as an OCI layout, and the
//! storage of a registry that has it. Both are made once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::process::{self, command};
use crate::registry::Registry;
use crate::{packages, progress};

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

fn make(scratch: &Path) -> Result<PathBuf> {
    let made = scratch.join("made");
    if made.exists() {
        fs::remove_dir_all(&made)?;
    }
    fs::create_dir_all(&made)?;
    let (tar, layout, storage) = (scratch.join("root.tar"), made.join("layout"), made.join("storage"));

    progress::note(format!("{SUITE}, minimal, with {PACKAGES} (mmdebstrap)"));
    let mut debian = process::as_root("mmdebstrap");
    debian.args(["--quiet", "--variant=minbase", "--format=tar"]).arg(format!("--include={PACKAGES}"));
    debian.arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr");
    for unread in ["doc", "man", "locale"] {
        debian.arg(format!("--dpkgopt=path-exclude=/usr/share/{unread}/*"));
    }
    process::run(debian.args([SUITE, "-"]).stdout(File::create(&tar)?))?;

    let name = format!("python:{}", python_version(&tar)?);
    progress::note(format!("as an OCI image, {name}"));
    let image = format!("{}:latest", layout.display());
    process::run_quietly(command("umoci", ["init", "--layout"]).arg(&layout))?;
    process::run_quietly(&mut command("umoci", ["new", "--image", &image]))?;
    process::run_quietly(command("umoci", ["raw", "add-layer", "--image", &image]).arg(&tar))?;
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
    process::run_quietly(command("umoci", ["gc", "--layout"]).arg(&layout))?;

    progress::note("into a registry's storage");
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
