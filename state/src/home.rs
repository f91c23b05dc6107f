//! Where things lie: `CUBBY_HOME`, or `~/.microsandbox`.
//!
//! ```text
//! HOME/db/cubby.db                 the store
//! HOME/cubby/images/               read-only disks, shared by all sandboxes
//! HOME/cubby/sandboxes/NAME/       disk.ext4, lock: one sandbox's own files
//! HOME/cubby/run/HASH.sock         one socket for each live sandbox
//! HOME/cubby/lib/                  guest kernel and agent
//! ```
//!
//! Another product may keep files under the same directory. Only the names above are ours: nothing else is
//! read, listed, changed or removed, and a directory that is already there keeps its mode. What is under
//! `cubby/` must belong to this user and be closed to all others, or it is refused.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::SandboxName;

/// The longest path a Unix socket can have, in bytes: `sun_path` holds 108 with the closing NUL (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// What [`Home::socket`] adds to the home's own path: `/cubby/run/`, 16 digits, `.sock`.
const SOCKET_SUFFIX: usize = "/cubby/run/".len() + 16 + ".sock".len();

/// The directory that holds all that this library keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PathBuf", into = "PathBuf")]
pub struct Home {
    root: PathBuf,
}

/// Why a directory cannot be the home.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HomeError {
    /// Neither variable says where the home is.
    #[error("neither CUBBY_HOME nor HOME is set; set CUBBY_HOME to a directory of yours")]
    Unset,
    /// The path is not absolute.
    #[error("the home {} is not an absolute path", path.display())]
    Relative {
        /// The path as given.
        path: PathBuf,
    },
    /// A socket under the path would not fit an address.
    #[error("the home {} has {} bytes, and a socket's path leaves room for {max}; set CUBBY_HOME to a shorter one",
        path.display(), path.as_os_str().len())]
    TooLong {
        /// The path as given.
        path: PathBuf,
        /// The most bytes it may have.
        max: usize,
    },
    /// Others could read or change what is in a directory of ours.
    #[error("{} belongs to user {owner} with mode {mode:o}; it must be yours, and closed to others (chmod 700)",
        path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// Its owner's user id.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// A directory cannot be made or looked at.
    #[error("cannot make or use the directory {}; make it writable, or set CUBBY_HOME to one that is", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Home {
    /// The home that the environment names: `CUBBY_HOME`, else `.microsandbox` in `HOME`.
    ///
    /// # Errors
    /// [`HomeError::Unset`] if neither is set, and those of [`Home::at`].
    pub fn from_env() -> Result<Self, HomeError> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        match (set("CUBBY_HOME"), set("HOME")) {
            (Some(home), _) => Self::at(home),
            (None, Some(user)) => Self::at(user.join(".microsandbox")),
            (None, None) => Err(HomeError::Unset),
        }
    }

    /// The home at an absolute path of at most 75 bytes. Nothing is made yet.
    ///
    /// # Errors
    /// [`HomeError::Relative`] and [`HomeError::TooLong`].
    pub fn at(path: impl Into<PathBuf>) -> Result<Self, HomeError> {
        let path = path.into();
        let max = MAX_SOCKET_PATH - SOCKET_SUFFIX;
        if !path.is_absolute() {
            return Err(HomeError::Relative { path });
        }
        if path.as_os_str().len() > max {
            return Err(HomeError::TooLong { path, max });
        }
        Ok(Home { root: path })
    }

    /// Makes the directories that are missing, with mode 0700.
    ///
    /// # Errors
    /// [`HomeError::Io`] where that is impossible; [`HomeError::Open`] if a directory under `cubby/` is
    /// another user's or open to others.
    pub fn create(&self) -> Result<(), HomeError> {
        let run = self.run();
        // The last one to be made: where it is, all are.
        if !run.is_dir() {
            make(&self.root)?;
            for path in
                [self.root.join("db"), self.cubby(), self.images(), self.lib(), self.sandboxes(), run.clone()]
            {
                make(&path)?;
            }
        }
        closed(&self.cubby())?;
        closed(&run)
    }

    /// Makes the directory of one sandbox, with mode 0700.
    ///
    /// # Errors
    /// [`HomeError::Io`] where that is impossible, [`HomeError::Open`] if it is there and not ours alone.
    pub fn create_sandbox(&self, name: &SandboxName) -> Result<PathBuf, HomeError> {
        let path = self.sandbox(name);
        make(&path)?;
        closed(&path)?;
        Ok(path)
    }

    /// The home's own path.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The store's file.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.root.join("db/cubby.db")
    }

    /// The directory of read-only disks.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.cubby().join("images")
    }

    /// The directory of guest kernel and agent.
    #[must_use]
    pub fn lib(&self) -> PathBuf {
        self.cubby().join("lib")
    }

    /// The directory of sockets.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.cubby().join("run")
    }

    /// The directory that holds one directory for each sandbox.
    #[must_use]
    pub fn sandboxes(&self) -> PathBuf {
        self.cubby().join("sandboxes")
    }

    /// The directory of one sandbox.
    #[must_use]
    pub fn sandbox(&self, name: &SandboxName) -> PathBuf {
        self.sandboxes().join(name.as_str())
    }

    /// The sandbox's own disk.
    #[must_use]
    pub fn disk(&self, name: &SandboxName) -> PathBuf {
        self.sandbox(name).join("disk.ext4")
    }

    /// The files of what the sandbox has written ([`crate::log`]), which take turns.
    #[must_use]
    pub fn logs(&self, name: &SandboxName) -> [PathBuf; 2] {
        ["log.0", "log.1"].map(|file| self.sandbox(name).join(file))
    }

    /// The file that the sandbox's process holds locked while it lives.
    #[must_use]
    pub fn lock(&self, name: &SandboxName) -> PathBuf {
        self.sandbox(name).join("lock")
    }

    /// The socket of a sandbox: [`MAX_SOCKET_PATH`] bytes at most, whatever the name. It carries the first 64
    /// bits of the name's SHA-256.
    #[must_use]
    pub fn socket(&self, name: &SandboxName) -> PathBuf {
        let digest = Sha256::digest(name.as_str().as_bytes());
        let hash = digest.iter().take(8).fold(0_u64, |hash, byte| (hash << 8) | u64::from(*byte));
        self.run().join(format!("{hash:016x}.sock"))
    }

    /// The socket of a sandbox at which its guest's vsock ports can be reached; its path is as long as the other's.
    #[must_use]
    pub fn port_socket(&self, name: &SandboxName) -> PathBuf {
        self.socket(name).with_extension("port")
    }

    /// The file whose lock makes its holder the one reaper of this home.
    #[must_use]
    pub fn reaper_lock(&self) -> PathBuf {
        self.run().join("reaper.lock")
    }

    fn cubby(&self) -> PathBuf {
        self.root.join("cubby")
    }
}

impl TryFrom<PathBuf> for Home {
    type Error = HomeError;

    fn try_from(path: PathBuf) -> Result<Self, HomeError> {
        Home::at(path)
    }
}

impl From<Home> for PathBuf {
    fn from(home: Home) -> PathBuf {
        home.root
    }
}

fn make(path: &Path) -> Result<(), HomeError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        // Only the home's own parents may be missing as well (`CUBBY_HOME=/srv/new/home`).
        Err(e) if e.kind() == io::ErrorKind::NotFound && !path.as_os_str().as_bytes().is_empty() => {
            DirBuilder::new().recursive(true).mode(0o700).create(path)
        }
        other => other,
    }
    .map_err(|source| HomeError::Io { path: path.to_owned(), source })
}

fn closed(path: &Path) -> Result<(), HomeError> {
    let meta =
        fs::symlink_metadata(path).map_err(|source| HomeError::Io { path: path.to_owned(), source })?;
    let mode = meta.mode() & 0o7777;
    if meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw() && mode & 0o077 == 0 {
        Ok(())
    } else {
        Err(HomeError::Open { path: path.to_owned(), owner: meta.uid(), mode })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn directories_are_ours_alone_and_a_neighbour_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/home");
        fs::create_dir_all(root.join("db")).unwrap();
        fs::set_permissions(root.join("db"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(root.join("db/other.db"), "theirs").unwrap();
        let home = Home::at(&root).unwrap();
        home.create().unwrap();
        home.create().unwrap();
        for path in [home.images(), home.lib(), home.run(), home.sandboxes()] {
            assert_eq!(mode(&path), 0o700, "{}", path.display());
        }
        assert_eq!(mode(&root.join("db")), 0o755);
        assert_eq!(fs::read(root.join("db/other.db")).unwrap(), b"theirs");
        let name: SandboxName = "worker".parse().unwrap();
        assert_eq!(mode(&home.create_sandbox(&name).unwrap()), 0o700);
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path()).unwrap();
        home.create().unwrap();
        fs::set_permissions(home.run(), fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(home.create(), Err(HomeError::Open { mode: 0o750, .. })));

        let name: SandboxName = "worker".parse().unwrap();
        symlink("/tmp", home.sandbox(&name)).unwrap();
        assert!(matches!(home.create_sandbox(&name), Err(HomeError::Open { .. })));
    }

    #[test]
    fn a_home_that_cannot_be_made_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let Err(HomeError::Io { path, .. }) = Home::at(file.join("home")).unwrap().create() else {
            panic!("made a directory in a file")
        };
        assert!(path.starts_with(&file));
    }

    #[test]
    fn a_socket_fits_whatever_the_name() {
        let root = format!("/{}", "h".repeat(74));
        let home = Home::at(&root).unwrap();
        let long: SandboxName = "n".repeat(128).parse().unwrap();
        let short: SandboxName = "n".parse().unwrap();
        assert_eq!(home.socket(&long).as_os_str().len(), MAX_SOCKET_PATH);
        assert_ne!(home.socket(&long), home.socket(&short));
        assert_eq!(home.socket(&short), home.socket(&short.clone()));
        assert!(matches!(Home::at(format!("{root}h")), Err(HomeError::TooLong { max: 75, .. })));
        assert!(matches!(Home::at("relative"), Err(HomeError::Relative { .. })));
    }
}
