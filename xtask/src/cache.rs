//! What is built once: entries named by the hash of what they were made from, outside the checkout, so that a
//! second clone finds them. `CUBBY_CACHE`, else `$XDG_CACHE_HOME/cubbyhole`, else `~/.cache/cubbyhole`.
//!
//! An entry appears whole (renamed into place) or not at all. Two builders of one entry take turns, and
//! the second finds it made. What an interrupted builder leaves is found by the next one, which may go on from it.

use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::progress;

/// The cache's directory.
pub fn root() -> Result<PathBuf> {
    let from = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = from("CUBBY_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("cubbyhole")))
        .or_else(|| from("HOME").map(|dir| dir.join(".cache/cubbyhole")))
        .context("none of CUBBY_CACHE, XDG_CACHE_HOME and HOME is set")?;
    fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
    Ok(root.canonicalize()?)
}

/// Collects what an entry is made from.
#[derive(Clone, Default)]
pub struct Key(Sha256);

impl Key {
    /// Adds one ingredient; its length goes in as well, so that no two lists give one key.
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    /// Adds a file's content.
    pub fn with_file(self, path: &Path) -> Result<Self> {
        Ok(self.with(hash_file(path)?))
    }

    /// The key in 32 hexadecimal digits.
    pub fn finish(self) -> String {
        self.0.finalize().iter().take(16).fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

fn hash_file(path: &Path) -> Result<Vec<u8>> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().to_vec()),
            count => hash.update(buffer.get(..count).unwrap_or_default()),
        }
    }
}

/// The path of the entry `kind/key`. If it is not there, `build` makes it: it is given a scratch directory (that
/// of an interrupted run, if there was one) and returns the path in it of the file or directory that is the entry.
pub fn entry(kind: &str, key: &str, build: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<PathBuf> {
    let root = root()?;
    let entry = root.join(kind).join(key);
    if entry.exists() {
        return Ok(entry);
    }
    let _lock = lock(&format!("{kind}-{key}"))?;
    if entry.exists() {
        return Ok(entry);
    }
    let scratch = root.join("scratch").join(format!("{kind}-{key}"));
    fs::create_dir_all(&scratch)?;
    let made = build(&scratch)?;
    fs::create_dir_all(root.join(kind))?;
    fs::rename(&made, &entry)
        .with_context(|| format!("cannot move {} to {}", made.display(), entry.display()))?;
    fs::remove_dir_all(&scratch)?;
    Ok(entry)
}

/// Waits for a lock that is held until the returned file is dropped or its process ends.
pub fn lock(name: &str) -> Result<File> {
    let dir = root()?.join("locks");
    fs::create_dir_all(&dir)?;
    let file = File::options().create(true).truncate(false).write(true).open(dir.join(name))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => progress::note(format!("waiting for another xtask ({name})")),
        Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("cannot lock {name}")),
    }
    file.lock().with_context(|| format!("cannot lock {name}"))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_every_part_and_on_where_parts_end() {
        let key = |parts: &[&str]| parts.iter().fold(Key::default(), |key, part| key.with(part)).finish();
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab"]));
        assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
        assert_eq!(key(&[]).len(), 32);
    }
}
