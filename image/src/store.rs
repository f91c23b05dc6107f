//! A directory of images that are ready to use, shared by all processes of a user.
//!
//! ```text
//! refs/<hash of reference and platform>.json     which image a reference stands for
//! images/<digest>/disk.erofs, image.json         an image: appears whole, by one rename
//! blobs/<digest>[.part]                          layers on their way, or kept
//! locks/<digest>                                 who makes an image holds its lock
//! locks/removal                                  held shared while images are relied on, alone while one goes
//! tmp/                                           images being made
//! ```
//!
//! Promises: what [`Store::find`] gives is complete and was on the disk before it could be found. Several
//! pulls of one image, in one process or several, do the work once. A pull that dies leaves nothing but
//! what the next one uses or sweeps away.
use std::{
    fmt, fs,
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{Digest, Error, ImageConfig, Platform, PullOptions, PullPolicy, Reference, pull, source};

mod inventory;

pub use inventory::{Hold, Removal, Stored};

const DISK: &str = "disk.erofs";
const DESCRIPTION: &str = "image.json";
/// A download that nobody has gone on with for this long is not waited for any more.
const ABANDONED: Duration = Duration::from_secs(7 * 24 * 3600);
/// How often a lock that another holds is tried.
const POLL: Duration = Duration::from_millis(20);

/// An image in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Image {
    /// The manifest's digest; for a `docker-archive:`, which has none, the configuration's.
    pub digest: Digest,
    /// The file system, read-only EROFS, which every Linux since 5.4 mounts.
    pub disk: PathBuf,
    /// How the image wants to be run.
    pub config: ImageConfig,
    /// Bytes of the disk.
    pub size: u64,
}

/// What `image.json` holds.
#[derive(Serialize, Deserialize)]
struct Description {
    digest: Digest,
    size: u64,
    config: ImageConfig,
}

/// What a file in `refs/` holds.
#[derive(Serialize, Deserialize)]
struct Pointer {
    reference: String,
    platform: Platform,
    digest: Digest,
    /// For a local reference, what its witness file was like.
    stamp: Option<Stamp>,
}

/// Tells whether a file is still the one it was.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    inode: u64,
    size: u64,
    seconds: i64,
    nanos: i64,
}

/// A directory of images. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    root: Arc<Path>,
}

impl Store {
    /// Opens the store in `dir`, which is created if need be, for its owner only.
    ///
    /// # Errors
    /// [`Error::Io`] if the directories cannot be made.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let dir = dir.as_ref();
        for name in ["refs", "images", "blobs", "locks", "tmp"] {
            let path = dir.join(name);
            let mut builder = fs::DirBuilder::new();
            std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
            builder.create(&path).map_err(Error::io("create", &path))?;
        }
        let root = fs::canonicalize(dir).map_err(Error::io("open", dir))?;
        Ok(Self { root: root.into() })
    }

    /// The image that `reference` stands for, if the store has it: no network, a fraction of a millisecond.
    /// A local reference whose file has changed since is not found.
    ///
    /// # Errors
    /// [`Error::Io`] if the store cannot be read.
    pub fn find(&self, reference: &Reference) -> Result<Option<Image>, Error> {
        self.find_for(reference, &Platform::default())
    }

    /// As [`Self::find`], for another platform than `linux/amd64`.
    ///
    /// # Errors
    /// [`Error::Io`] if the store cannot be read.
    pub fn find_for(&self, reference: &Reference, platform: &Platform) -> Result<Option<Image>, Error> {
        let Some(pointer) = read_json::<Pointer>(&self.pointer(reference, platform))? else {
            return Ok(None);
        };
        if pointer.stamp != stamp(reference) {
            return Ok(None);
        }
        self.image(&pointer.digest)
    }

    /// The image with this digest, if the store has it.
    ///
    /// # Errors
    /// [`Error::Io`] if the store cannot be read.
    pub fn image(&self, digest: &Digest) -> Result<Option<Image>, Error> {
        let dir = self.images().join(digest.file_name());
        let description: Option<Description> = read_json(&dir.join(DESCRIPTION))?;
        Ok(description.map(|Description { digest, size, config }| Image {
            digest,
            disk: dir.join(DISK),
            config,
            size,
        }))
    }

    /// Brings the image that `reference` stands for into the store, as far as `policy` asks for it, and
    /// returns it. Works on threads of its own, whatever the async runtime; dropping the future stops them soon.
    ///
    /// # Errors
    /// Everything that [`Error`] lists; what was downloaded is kept for the next attempt.
    pub async fn resolve(
        &self,
        reference: &Reference,
        policy: PullPolicy,
        options: &PullOptions,
    ) -> Result<Image, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let guard = StopOnDrop(Arc::clone(&stop));
        let (send, receive) = oneshot::channel();
        let (store, reference, options) = (self.clone(), reference.clone(), options.clone());
        let work = move || {
            // The receiver is gone if nobody waits any more.
            let _ = send.send(pull::resolve(&store, &reference, policy, &options, &stop));
        };
        thread::Builder::new()
            .name("image".to_owned())
            .spawn(work)
            .map_err(Error::io("start a thread for", &*self.root))?;
        let result = receive.await.unwrap_or(Err(Error::Cancelled));
        drop(guard);
        result
    }

    /// Locks an image's making; `waiting` is called if another has the lock.
    pub(crate) fn lock(
        &self,
        digest: &Digest,
        stop: &AtomicBool,
        waiting: impl FnOnce(),
    ) -> Result<File, Error> {
        let path = self.root.join("locks").join(digest.file_name());
        let open = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = open.map_err(Error::io("open", &path))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            waiting();
        }
        lock(&file, &path, stop)?;
        Ok(file)
    }

    /// A directory to make the image in, emptied of what a dead pull left. The image's lock must be held.
    pub(crate) fn workshop(&self, digest: &Digest) -> Result<PathBuf, Error> {
        let dir = self.root.join("tmp").join(digest.file_name());
        remove_dir(&dir)?;
        fs::create_dir(&dir).map_err(Error::io("create", &dir))?;
        Ok(dir)
    }

    /// Removes what pulls that died left and nobody asked for again: images half made, and parts of layers
    /// that have waited for a week. What cannot be removed is left to the next time.
    pub(crate) fn sweep(&self) {
        let list = |dir: &str| fs::read_dir(self.root.join(dir)).into_iter().flatten().flatten();
        for entry in list("tmp") {
            let lock = File::open(self.root.join("locks").join(entry.file_name()));
            // Held until the directory is gone, so that nobody begins to use it.
            if lock.as_ref().is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock))) {
                continue;
            }
            let _ = fs::remove_dir_all(entry.path());
        }
        for entry in list("blobs") {
            let age = entry
                .metadata()
                .and_then(|metadata| metadata.modified())
                .ok()
                .and_then(|at| at.elapsed().ok());
            if entry.path().extension().is_some_and(|extension| extension == "part")
                && age.is_some_and(|age| age > ABANDONED)
            {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Where the disk is made in a workshop.
    pub(crate) fn disk_in(dir: &Path) -> PathBuf {
        dir.join(DISK)
    }

    /// Makes a finished workshop an image.
    pub(crate) fn publish(
        &self,
        dir: &Path,
        digest: &Digest,
        size: u64,
        config: ImageConfig,
    ) -> Result<Image, Error> {
        let description = Description { digest: digest.clone(), size, config };
        write_json(&dir.join(DESCRIPTION), &description)?;
        sync_dir(dir)?;
        let images = self.images();
        let home = images.join(digest.file_name());
        fs::rename(dir, &home).map_err(Error::io("rename", dir))?;
        sync_dir(&images)?;
        Ok(Image { digest: digest.clone(), disk: home.join(DISK), config: description.config, size })
    }

    /// From now on `reference` stands for the image. `stamp` is what [`stamp`] gave before it was read.
    pub(crate) fn point(
        &self,
        reference: &Reference,
        platform: &Platform,
        digest: &Digest,
        stamp: Option<PullStamp>,
    ) -> Result<(), Error> {
        let pointer = Pointer {
            reference: reference.absolute().to_string(),
            platform: platform.clone(),
            digest: digest.clone(),
            stamp: stamp.map(|PullStamp(stamp)| stamp),
        };
        let path = self.pointer(reference, platform);
        let unique = format!("{}-{:?}.tmp", std::process::id(), thread::current().id());
        let temporary = path.with_extension(unique);
        write_json(&temporary, &pointer)?;
        fs::rename(&temporary, &path).map_err(Error::io("rename", &temporary))
    }

    /// Where layers are kept.
    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    fn pointer(&self, reference: &Reference, platform: &Platform) -> PathBuf {
        let reference = reference.absolute();
        let key = Digest::sha256(format!("{reference}\n{platform}").as_bytes());
        self.root.join("refs").join(format!("{}.json", key.hex()))
    }

    fn pointers(&self) -> Result<Vec<(PathBuf, Pointer)>, Error> {
        let dir = self.root.join("refs");
        let mut all = Vec::new();
        for entry in fs::read_dir(&dir).map_err(Error::io("list", &dir))? {
            let path = entry.map_err(Error::io("list", &dir))?.path();
            if path.extension().is_some_and(|extension| extension == "json")
                && let Some(pointer) = read_json(&path)?
            {
                all.push((path, pointer));
            }
        }
        Ok(all)
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.root.display().fmt(f)
    }
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A stamp taken before an image was read.
pub(crate) struct PullStamp(Stamp);

impl PullStamp {
    pub(crate) fn take(reference: &Reference) -> Option<Self> {
        stamp(reference).map(Self)
    }
}

fn stamp(reference: &Reference) -> Option<Stamp> {
    let metadata = fs::metadata(source::witness(reference)?).ok()?;
    Some(Stamp {
        inode: metadata.ino(),
        size: metadata.size(),
        seconds: metadata.mtime(),
        nanos: metadata.mtime_nsec(),
    })
}

/// Waits for a file's lock, as long as `stop` is not set.
pub(crate) fn lock(file: &File, path: &Path, stop: &AtomicBool) -> Result<(), Error> {
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(e)) => return Err(Error::io("lock", path)(e)),
            Err(TryLockError::WouldBlock) if stop.load(Ordering::Relaxed) => return Err(Error::Cancelled),
            Err(TryLockError::WouldBlock) => thread::sleep(POLL),
        }
    }
}

/// `None` for a file that is missing, or not what it should be: it will be written again.
fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path)(e)),
    }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let bytes = serde_json::to_vec(value).map_err(|e| Error::io("write", path)(e.into()))?;
    let mut file = File::create(path).map_err(Error::io("create", path))?;
    io::Write::write_all(&mut file, &bytes).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

fn remove_dir(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", path))
}
