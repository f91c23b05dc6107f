//! What the store has, and taking an image out of it again.
//!
//! An image is relied on from the moment somebody decides for it until that is written down where a remover looks.
//! Meanwhile the one holds the store's lock shared ([`Hold`]), and a remover holds it alone ([`Removal`]) from its look
//! until the image is out of sight: neither comes between the other's two steps. Both are over in a moment; files are
//! deleted after the lock is free.
use std::{
    collections::BTreeMap,
    fs,
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    thread,
    time::{Duration, Instant, SystemTime},
};

use super::{DESCRIPTION, Image, POLL, Store, remove_dir, remove_file};
use crate::{Digest, Error, Platform, Reference};

/// How long the lock may be another's: many times what it is ever held for.
const PATIENCE: Duration = Duration::from_secs(10);

/// An image with what the store knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stored {
    /// The image.
    pub image: Image,
    /// The references that stand for it, sorted; none if all of them have moved on to other images.
    pub references: Vec<String>,
    /// Bytes that its files take on the disk.
    pub on_disk: u64,
    /// When it came into the store.
    pub pulled_at: SystemTime,
}

/// As long as this is there, no image is removed.
#[derive(Debug)]
#[must_use]
pub struct Hold(#[expect(dead_code, reason = "held, not read")] File);

/// The right to remove one image. As long as this is there, nobody has a [`Hold`].
#[derive(Debug)]
#[must_use]
pub struct Removal {
    store: Store,
    lock: File,
}

impl Store {
    /// All images, the one that came last first.
    ///
    /// # Errors
    /// [`Error::Io`] if the store cannot be read.
    pub fn list(&self) -> Result<Vec<Stored>, Error> {
        let mut references: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for (_, pointer) in self.pointers()? {
            references.entry(pointer.digest).or_default().push(pointer.reference);
        }
        let dir = self.images();
        let mut all = Vec::new();
        for entry in fs::read_dir(&dir).map_err(Error::io("list", &dir))? {
            let name = entry.map_err(Error::io("list", &dir))?.file_name();
            // What is not named after a digest is not ours.
            let Some(digest) = name.to_str().and_then(Digest::from_file_name) else { continue };
            // Removed since, perhaps.
            let Some(image) = self.image(&digest)? else { continue };
            let Ok(described) = fs::metadata(dir.join(&name).join(DESCRIPTION)) else { continue };
            let Ok(disk) = fs::metadata(&image.disk) else { continue };
            let mut references = references.remove(&digest).unwrap_or_default();
            references.sort_unstable();
            references.dedup();
            all.push(Stored {
                image,
                references,
                on_disk: disk.blocks().saturating_add(described.blocks()).saturating_mul(512),
                pulled_at: described.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            });
        }
        all.sort_by(|a, b| b.pulled_at.cmp(&a.pulled_at).then_with(|| a.image.digest.cmp(&b.image.digest)));
        Ok(all)
    }

    /// Keeps images from being removed. Waits for whoever removes one now, which takes a moment.
    ///
    /// # Errors
    /// [`Error::Busy`] if that one is stuck; [`Error::Io`] if the lock cannot be used.
    pub fn hold(&self) -> Result<Hold, Error> {
        self.holding(File::try_lock_shared).map(Hold)
    }

    /// The right to remove an image. Waits for all who rely on one now, which takes a moment.
    ///
    /// # Errors
    /// [`Error::Busy`] if one of them is stuck; [`Error::Io`] if the lock cannot be used.
    pub fn removal(&self) -> Result<Removal, Error> {
        Ok(Removal { lock: self.holding(File::try_lock)?, store: self.clone() })
    }

    fn holding(&self, attempt: impl Fn(&File) -> Result<(), TryLockError>) -> Result<File, Error> {
        let path = self.root.join("locks").join("removal");
        let open = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = open.map_err(Error::io("open", &path))?;
        let begin = Instant::now();
        loop {
            match attempt(&file) {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path)(e)),
                Err(TryLockError::WouldBlock) if begin.elapsed() > PATIENCE => {
                    return Err(Error::Busy { path });
                }
                Err(TryLockError::WouldBlock) => thread::sleep(POLL),
            }
        }
    }
}

impl Removal {
    /// Removes an image and the references to it. A sandbox that has the disk open keeps it. Returns whether the image
    /// was there.
    ///
    /// # Errors
    /// [`Error::Io`] if its files cannot be removed.
    pub fn remove(self, digest: &Digest) -> Result<bool, Error> {
        for (path, pointer) in self.store.pointers()? {
            if pointer.digest == *digest {
                remove_file(&path)?;
            }
        }
        let dir = self.store.images().join(digest.file_name());
        let grave = self.grave(digest);
        // Out of sight in one step, so that nobody finds half an image.
        match fs::rename(&dir, &grave) {
            Ok(()) => {
                drop(self.lock);
                remove_dir(&grave).map(|()| true)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io("remove", &dir)(e)),
        }
    }

    /// Lets `reference` stand for nothing; its image stays. Returns whether it stood for something.
    ///
    /// # Errors
    /// [`Error::Io`] if its file cannot be removed.
    pub fn forget(self, reference: &Reference) -> Result<bool, Error> {
        let path = self.store.pointer(reference, &Platform::default());
        let there = path.exists();
        remove_file(&path).map(|()| there)
    }

    /// A name of its own: what another remover has not deleted yet may lie beside it.
    fn grave(&self, digest: &Digest) -> PathBuf {
        let when = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let name = format!("removed-{}-{}-{when}", digest.file_name(), std::process::id());
        self.store.root.join("tmp").join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_removes_what_somebody_relies_on() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let holds = [store.hold().unwrap(), store.hold().unwrap()];
        let other = store.clone();
        let (said, heard) = std::sync::mpsc::channel();
        let remover = thread::spawn(move || {
            let removal = other.removal().unwrap();
            said.send(()).unwrap();
            removal.remove(&Digest::sha256(b"no image")).unwrap()
        });
        assert!(heard.recv_timeout(POLL * 5).is_err(), "it did not wait");
        drop(holds);
        heard.recv_timeout(PATIENCE).unwrap();
        assert!(!remover.join().unwrap());
        drop(store.hold().unwrap());
    }
}
