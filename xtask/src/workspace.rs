//! Where things are in this checkout.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// The checkout's top level.
pub fn root() -> Result<PathBuf> {
    // Cargo tells at run time; a binary that is run by hand falls back on where it was built.
    let xtask = std::env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .filter(|dir| dir.ends_with("xtask"))
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    let root = xtask.parent().context("xtask is not in a workspace")?;
    root.canonicalize().with_context(|| format!("{} is gone", root.display()))
}

/// Cargo's target directory.
pub fn target() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => Ok(std::path::absolute(Path::new(&dir))?),
        None => Ok(root()?.join("target")),
    }
}

/// The cargo that runs this, at the checkout's top level.
pub fn cargo() -> Result<Command> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()?);
    Ok(cargo)
}

/// This program. While it runs cargo may have built it anew; then it is the new one.
pub fn program() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let replaced = program.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map(PathBuf::from);
    Ok(replaced.unwrap_or(program))
}
