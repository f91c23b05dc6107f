//! What a sandbox is made of, laid out as an installation: `bin/cubby-sandbox`, `lib/cubby/vmlinux` and
//! `lib/cubby/cubby-agent`. In the checkout that is `target/assets`, with what tests take into their guests beside it;
//! `install` copies it to a prefix, without that.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kernel::{self, Kernel};
use crate::process::{self, command};
use crate::{packages, progress, workspace};

/// A file of the installation, where it goes, and what its mode is.
struct File {
    from: PathBuf,
    to: &'static str,
    mode: u32,
}

/// Whether cargo shows what it does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Cargo {
    /// As always.
    Shows,
    /// Only what went wrong.
    IsQuiet,
}

/// Builds everything into `target/assets` and returns that directory.
pub fn build(cargo: Cargo) -> Result<PathBuf> {
    let files = [guest_agent(cargo)?, sandbox_process(cargo)?, guest_kernel()?, traffic(cargo)?];
    let assets = workspace::target()?.join("assets");
    for file in &files {
        place(file, &assets)?;
    }
    Ok(assets)
}

/// Builds everything and puts it under `prefix`.
pub fn install(prefix: &Path) -> Result<()> {
    let mut files = vec![guest_agent(Cargo::Shows)?, sandbox_process(Cargo::Shows)?, guest_kernel()?];
    let from = static_binary("cubby-cli", "cubby", "release", "static", Cargo::Shows)?;
    files.push(File { from: from.clone(), to: "bin/cubby", mode: 0o755 });
    let scratch = workspace::target()?.join("installed");
    files.extend(completions(&from, &scratch)?);
    for file in &files {
        place(file, prefix)?;
        progress::note(prefix.join(file.to).display().to_string());
    }
    let manual = prefix.join("share/man/man1");
    process::run(command(&from, ["man"]).arg(&manual))?;
    progress::note(manual.display().to_string());
    Ok(())
}

/// What shells complete the command line of `cubby` with, where each looks for it.
fn completions(cubby: &Path, scratch: &Path) -> Result<[File; 3]> {
    fs::create_dir_all(scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    let script = |shell: &str, to| {
        let from = scratch.join(shell);
        fs::write(&from, process::output(&mut command(cubby, ["completion", shell]))?)?;
        anyhow::Ok(File { from, to, mode: 0o644 })
    };
    Ok([
        script("bash", "share/bash-completion/completions/cubby")?,
        script("zsh", "share/zsh/site-functions/_cubby")?,
        script("fish", "share/fish/vendor_completions.d/cubby.fish")?,
    ])
}

/// The environment in which a program finds what was built.
pub fn environment(assets: &Path) -> [(&'static str, PathBuf); 3] {
    [
        ("CUBBY_ASSETS", assets.join("lib/cubby")),
        ("CUBBY_RUNTIME", assets.join("bin/cubby-sandbox")),
        ("CUBBY_TEST_TRAFFIC", assets.join(TRAFFIC)),
    ]
}

/// Where the program is that makes traffic in guests, for tests and benchmarks.
const TRAFFIC: &str = "tests/cubby-traffic";

fn traffic(cargo: Cargo) -> Result<File> {
    let from = static_binary("cubby-traffic", "cubby-traffic", "release", "static", cargo)?;
    Ok(File { from, to: TRAFFIC, mode: 0o755 })
}

fn guest_agent(cargo: Cargo) -> Result<File> {
    let from = static_binary("cubby-agent", "cubby-agent", "agent", "agent", cargo)?;
    Ok(File { from, to: "lib/cubby/cubby-agent", mode: 0o755 })
}

/// Static as well: a dynamic linker's work would be part of every create.
fn sandbox_process(cargo: Cargo) -> Result<File> {
    let from = static_binary("cubby-runtime", "cubby-sandbox", "release", "static", cargo)?;
    Ok(File { from, to: "bin/cubby-sandbox", mode: 0o755 })
}

fn guest_kernel() -> Result<File> {
    Ok(File { from: kernel::ensure(Kernel::Guest)?, to: "lib/cubby/vmlinux", mode: 0o644 })
}

/// Builds one binary statically, in a target directory of its own: other flags in the common one would make cargo build
/// everything again at each change between them. The target is named, so that the flags do not reach build scripts.
fn static_binary(
    package: &str,
    binary: &str,
    profile: &str,
    directory: &str,
    output: Cargo,
) -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    packages::ensure("building a static program", &[packages::LINKER])?;
    let target = workspace::target()?.join(directory);
    let mut cargo = workspace::cargo()?;
    cargo
        .args(["build", "--package", package, "--bin", binary, "--profile", profile, "--target", TARGET])
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    if output == Cargo::IsQuiet {
        cargo.arg("--quiet");
    }
    process::run(&mut cargo)?;
    Ok(target.join(TARGET).join(profile).join(binary))
}

/// Puts a file in place whole: a program that starts meanwhile sees the old one or the new one. A file that is the same
/// already is left alone, so that a running machine's page cache keeps it.
fn place(file: &File, prefix: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let to = prefix.join(file.to);
    let content = fs::read(&file.from).with_context(|| format!("cannot read {}", file.from.display()))?;
    if fs::read(&to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let dir = to.parent().context("a file without a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let new = dir.join(format!(".{}.new", std::process::id()));
    let written = fs::write(&new, content)
        .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(file.mode)))
        .and_then(|()| fs::rename(&new, &to));
    written
        .inspect_err(|_| drop(fs::remove_file(&new)))
        .with_context(|| format!("cannot write {}", to.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_only_when_it_differs() {
        let dir = std::env::temp_dir().join(format!("xtask-place-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let from = dir.join("from");
        let file = File { from: from.clone(), to: "bin/tool", mode: 0o755 };
        let inode = || fs::metadata(dir.join("bin/tool")).unwrap().ino();
        fs::write(&from, "one").unwrap();
        place(&file, &dir).unwrap();
        let first = inode();
        place(&file, &dir).unwrap();
        assert_eq!(inode(), first);
        fs::write(&from, "two").unwrap();
        place(&file, &dir).unwrap();
        assert_ne!(inode(), first);
        assert_eq!(fs::read_to_string(dir.join("bin/tool")).unwrap(), "two");
        assert_eq!(fs::metadata(dir.join("bin/tool")).unwrap().permissions().mode() & 0o777, 0o755);
        assert_eq!(fs::read_dir(dir.join("bin")).unwrap().count(), 1);
        fs::remove_dir_all(dir).unwrap();
    }
}
