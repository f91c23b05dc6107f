//! The two kernels, built from Debian's source package with a fragment each from `kernel-config/`: `guest`, an
//! uncompressed `vmlinux` that sandboxes boot, and `testhost`, a bzImage for the KVM test machine.
//!
//! The base is allnoconfig with the kernel's tiny.config (what `make tinyconfig` is) and the fragment laid over it in
//! the same pass, so that an option which only the fragment makes visible is off too, unless the fragment names it. A line of the
//! fragment that Kconfig did not keep is an error. The result is cached by source, fragment, compiler and recipe.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::cache::{self, Key};
use crate::process::{self, command};
use crate::progress::{self, Ticker};
use crate::{packages, workspace};

/// What the source package installs.
pub const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Raised when this file builds something else from the same ingredients.
const RECIPE: &str = "1";

/// Which kernel.
#[derive(Clone, Copy)]
pub enum Kernel {
    /// What a sandbox boots.
    Guest,
    /// What the KVM test machine boots.
    TestHost,
}

impl Kernel {
    fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::TestHost => "testhost",
        }
    }

    fn make_target(self) -> &'static str {
        match self {
            Self::Guest => "vmlinux",
            Self::TestHost => "bzImage",
        }
    }
}

/// The kernel's file, built if it is not in the cache.
pub fn ensure(kernel: Kernel) -> Result<PathBuf> {
    packages::ensure("building a kernel", &[packages::KERNEL])?;
    let fragment_path = workspace::root()?.join("kernel-config").join(format!("{}.config", kernel.name()));
    let fragment = fs::read_to_string(&fragment_path)
        .with_context(|| format!("cannot read {}", fragment_path.display()))?;
    let key = Key::default()
        .with(RECIPE)
        .with(kernel.name())
        .with_file(Path::new(SOURCE))?
        .with(options(&fragment).map(|(name, value)| format!("{name}={value}\n")).collect::<String>())
        .with(process::output(&mut command("gcc", ["-v"]))?)
        .with(process::output(&mut command("gcc", ["--version"]))?)
        .with(process::output(&mut command("ld", ["--version"]))?)
        .finish();
    cache::entry("kernel", &format!("{}-{key}", kernel.name()), |scratch| {
        let title = format!("building the {} kernel (once; a few minutes)", kernel.name());
        progress::step(&title, || build(kernel, &fragment, scratch))
    })
}

fn build(kernel: Kernel, fragment: &str, scratch: &Path) -> Result<PathBuf> {
    let source = unpacked(scratch)?;
    let out = scratch.join("build");
    fs::create_dir_all(&out)?;
    configure(&source, &out, fragment)?;
    make(&source, &out, kernel.make_target(), scratch)?;
    let made = scratch.join("made");
    match kernel {
        // Symbols and debug sections are never loaded; the panic trace's names are in kallsyms.
        Kernel::Guest => process::run(
            command("objcopy", ["--strip-all", "--remove-section=.comment"])
                .arg(out.join("vmlinux"))
                .arg(&made),
        )?,
        Kernel::TestHost => drop(fs::copy(out.join("arch/x86/boot/bzImage"), &made)?),
    }
    Ok(made)
}

/// The source tree; a marker says that it was unpacked to the end.
fn unpacked(scratch: &Path) -> Result<PathBuf> {
    let (tree, whole) = (scratch.join("source"), scratch.join("source.whole"));
    if !whole.exists() {
        progress::note(format!("unpacking {SOURCE}"));
        if tree.exists() {
            fs::remove_dir_all(&tree)?;
        }
        fs::create_dir_all(&tree)?;
        let mut tar = command("tar", ["--extract", "--strip-components=1", "--file", SOURCE, "--directory"]);
        process::run(tar.arg(&tree))?;
        File::create(whole)?;
    }
    Ok(tree)
}

fn configure(source: &Path, out: &Path, fragment: &str) -> Result<()> {
    let mut wanted = String::new();
    for base in ["kernel/configs/tiny.config", "arch/x86/configs/tiny.config"] {
        wanted += &fs::read_to_string(source.join(base))?;
    }
    wanted += fragment;
    let all = out.with_file_name("wanted.config");
    fs::write(&all, wanted)?;
    process::run_quietly(
        command("make", ["-s", "allnoconfig"])
            .current_dir(source)
            .arg(format!("O={}", out.display()))
            .env("KCONFIG_ALLCONFIG", &all),
    )?;
    let lost = lost(fragment, &fs::read_to_string(out.join(".config"))?);
    if !lost.is_empty() {
        bail!(
            "Kconfig did not keep these lines of the fragment (a dependency is missing):\n{}",
            lost.join("\n")
        );
    }
    Ok(())
}

fn make(source: &Path, out: &Path, target: &str, scratch: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism()?;
    let log = scratch.join("errors.log");
    let mut make = command("make", [target])
        .current_dir(source)
        .arg(format!("O={}", out.display()))
        .arg(format!("-j{jobs}"))
        // The same ingredients give the same bytes.
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
        .env("KBUILD_BUILD_USER", "xtask")
        .env("KBUILD_BUILD_HOST", "cubbyhole")
        // Cargo's own make flags are for cargo's own children.
        .env_remove("MAKEFLAGS")
        .env_remove("CARGO_MAKEFLAGS")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&log)?)
        .spawn()
        .context("cannot run make")?;
    let stdout = make.stdout.take().context("make has no output")?;
    let (mut ticker, mut compiled) = (Ticker::new(), 0);
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        compiled += usize::from(line.starts_with("  CC ") || line.starts_with("  AS "));
        ticker.tick(|| format!("{compiled} files compiled, now {}", line.trim()));
    }
    drop(ticker);
    let status = make.wait()?;
    if !status.success() {
        bail!("make {target} ended with {status}\n{}", fs::read_to_string(&log)?);
    }
    progress::note(format!("{compiled} files compiled"));
    Ok(())
}

/// The options that a fragment or a `.config` sets, in order.
fn options(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter(|line| line.starts_with("CONFIG_")).filter_map(|line| line.trim_end().split_once('='))
}

/// The fragment's lines that are not so in `config`, with what is so instead. Not set and `n` are the same.
fn lost(fragment: &str, config: &str) -> Vec<String> {
    let have: std::collections::HashMap<_, _> = options(config).collect();
    options(fragment)
        .map(|(name, want)| (name, want, have.get(name).copied().unwrap_or("n")))
        .filter(|(_, want, have)| want != have)
        .map(|(name, want, have)| format!("  {name}={want} is {have}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_kconfig_dropped_are_named() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S=\"text\"\nCONFIG_N=4\n";
        assert_eq!(lost("CONFIG_A=y\n# why\nCONFIG_B=n\nCONFIG_S=\"text\"\nCONFIG_N=4\n", config), [""; 0]);
        assert_eq!(
            lost("CONFIG_B=y\nCONFIG_A=n\nCONFIG_C=y\n", config),
            ["  CONFIG_B=y is n", "  CONFIG_A=n is y", "  CONFIG_C=y is n"]
        );
    }

    #[test]
    fn both_fragments_set_each_option_once() {
        for kernel in [Kernel::Guest, Kernel::TestHost] {
            let path = workspace::root().unwrap().join(format!("kernel-config/{}.config", kernel.name()));
            let text = fs::read_to_string(path).unwrap();
            let mut names: Vec<_> = options(&text).map(|(name, _)| name).collect();
            names.sort_unstable();
            let all = names.len();
            names.dedup();
            assert_eq!(names.len(), all, "{} names an option twice", kernel.name());
        }
    }
}
