//! Blobs from a registry to the store: several at once, each checked while it streams. What an interrupted
//! download brought stays in `<digest>.part`, and the next attempt, of this process or another, goes on from
//! there.
use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use ureq::{
    Body,
    http::{Response, StatusCode, header},
};

use super::{Registry, Section};
use crate::{Digest, Error, Progress, PullOptions, manifest::LayerInfo, space::Space, store};

/// Attempts in a row that may bring nothing.
const ATTEMPTS: u32 = 5;
/// The pause after the first of them; it doubles.
const PAUSE: Duration = Duration::from_millis(100);
/// How finely progress is reported, in bytes.
const REPORT: u64 = 1 << 20;

/// The downloads of one pull. Layers that are the same blob share one.
pub(crate) struct Downloads<'a> {
    registry: &'a Registry,
    dir: PathBuf,
    options: &'a PullOptions,
    stop: Arc<AtomicBool>,
    blobs: Vec<(LayerInfo, Arc<Slot>)>,
    next: AtomicUsize,
}

/// Where a download leaves its result.
#[derive(Default)]
struct Slot {
    result: Mutex<Option<Result<Section, Error>>>,
    ready: Condvar,
}

impl Slot {
    fn set(&self, result: Result<Section, Error>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.ready.notify_all();
    }

    fn wait(&self) -> Result<Section, Error> {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &mut *result {
                Some(Ok(section)) => return Ok(section.clone()),
                // Whoever asks first hears what went wrong; it ends the pull.
                Some(failed @ Err(_)) => return std::mem::replace(failed, Err(Error::Cancelled)),
                None => result = self.ready.wait(result).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl<'a> Downloads<'a> {
    /// Plans the download of `layers` into `dir`; [`Self::work`] does it.
    pub(crate) fn new(
        registry: &'a Registry,
        dir: PathBuf,
        layers: &[LayerInfo],
        options: &'a PullOptions,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let mut blobs: Vec<(LayerInfo, Arc<Slot>)> = Vec::new();
        let mut seen = HashMap::new();
        for layer in layers {
            if seen.insert(layer.digest.clone(), ()).is_none() {
                blobs.push((layer.clone(), Arc::default()));
            }
        }
        Self { registry, dir, options, stop, blobs, next: AtomicUsize::new(0) }
    }

    /// How many threads have work.
    pub(crate) fn workers(&self) -> usize {
        let parallel = if self.options.parallel == 0 { 4 } else { self.options.parallel };
        parallel.min(self.blobs.len())
    }

    /// Downloads one blob after the other, until none is left.
    pub(crate) fn work(&self) {
        while let Some((layer, slot)) = self.blobs.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            slot.set(self.fetch(layer));
        }
    }

    /// Waits for a layer's blob.
    pub(crate) fn wait(&self, layer: &Digest) -> Result<Section, Error> {
        let slot = self.blobs.iter().find(|(blob, _)| blob.digest == *layer).map(|(_, slot)| slot);
        slot.map_or(Err(Error::Cancelled), |slot| slot.wait())
    }

    /// Removes the blobs; those who have them open keep them.
    pub(crate) fn remove(&self) {
        for (layer, _) in &self.blobs {
            // Another pull may have done it.
            let _ = fs::remove_file(self.dir.join(layer.digest.file_name()));
        }
    }

    fn fetch(&self, layer: &LayerInfo) -> Result<Section, Error> {
        let done = self.dir.join(layer.digest.file_name());
        let part = self.dir.join(format!("{}.part", layer.digest.file_name()));
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            if let Ok(file) = File::open(&done) {
                let section = Section::whole(file, &done)?;
                if self.intact(&section, layer)? {
                    return Ok(section);
                }
                fs::remove_file(&done).map_err(Error::io("remove", &done))?;
            }
            let file = OpenOptions::new()
                .read(true)
                .append(true)
                .create(true)
                .open(&part)
                .map_err(Error::io("open", &part))?;
            // Only one process writes a blob; the others find it done.
            store::lock(&file, &part, &self.stop)?;
            let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
            let mine = file.metadata().map_err(Error::io("measure", &part))?;
            if !fs::metadata(&part).is_ok_and(|found| same(&found, &mine)) {
                continue;
            }
            self.download(layer, &file, &part)?;
            fs::rename(&part, &done).map_err(Error::io("rename", &part))?;
            return Section::whole(file, &done);
        }
    }

    /// Whether a blob of an earlier pull is what its name says; a power failure may have hurt it.
    fn intact(&self, section: &Section, layer: &LayerInfo) -> Result<bool, Error> {
        let mut hasher = layer.digest.hasher();
        hash(&mut section.clone(), &mut hasher, &self.dir)?;
        Ok(hasher.finish() == layer.digest)
    }

    fn download(&self, layer: &LayerInfo, file: &File, path: &Path) -> Result<(), Error> {
        let total = layer.size.unwrap_or(self.options.limits.max_layer);
        let io = |doing| Error::io(doing, path);
        let mut hasher = layer.digest.hasher();
        let mut got = hash(&mut &*file, &mut hasher, path)?;
        let mut resumed = got > 0;
        let (mut fruitless, mut pause) = (0, PAUSE);
        loop {
            if got == total && hasher.clone().finish() == layer.digest {
                self.options.report(Progress::Downloading {
                    digest: layer.digest.clone(),
                    bytes: got,
                    total,
                });
                return Ok(());
            }
            if got >= total {
                // What an earlier pull left may be the damaged part; start over once.
                file.set_len(0).map_err(io("truncate"))?;
                if !resumed {
                    return layer.digest.verify_hash(hasher, "a layer");
                }
                (resumed, got, hasher) = (false, 0, layer.digest.hasher());
            }
            let before = got;
            match self.registry.blob(&layer.digest, got) {
                Ok(response) => {
                    let whole = response.status() == StatusCode::OK;
                    let rest = got > 0 && continues(&response, got);
                    if !rest {
                        file.set_len(0).map_err(io("truncate"))?;
                        (got, hasher) = (0, layer.digest.hasher());
                    }
                    // Anything else is no content of ours: start over, as an attempt that brought nothing.
                    if whole || rest {
                        self.receive(layer, response, file, path, &mut got, &mut hasher)?;
                    }
                }
                Err(Error::Network { .. }) if fruitless + 1 < ATTEMPTS => {}
                Err(Error::Registry { status: 429 | 500..=599, .. }) if fruitless + 1 < ATTEMPTS => {}
                Err(error) => return Err(error),
            }
            if got > before {
                (fruitless, pause) = (0, PAUSE);
            } else {
                fruitless += 1;
                if fruitless == ATTEMPTS {
                    return Err(Error::Interrupted {
                        digest: layer.digest.to_string(),
                        got,
                        total,
                        attempts: fruitless,
                    });
                }
                self.rest(pause)?;
                pause *= 2;
            }
        }
    }

    /// Takes what comes of a body. That it breaks off is no error here; that it is too long is.
    fn receive(
        &self,
        layer: &LayerInfo,
        response: Response<Body>,
        mut file: &File,
        path: &Path,
        got: &mut u64,
        hasher: &mut crate::digest::Hasher,
    ) -> Result<(), Error> {
        let total = layer.size.unwrap_or(self.options.limits.max_layer);
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 256 << 10];
        let mut space = Space::new(self.options.limits.min_free);
        let mut reported = None;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let Ok(length @ 1..) = body.read(&mut buffer) else {
                return Ok(());
            };
            let bytes = buffer.get(..length).unwrap_or_default();
            if *got + length as u64 > total {
                file.set_len(0).map_err(Error::io("truncate", path))?;
                let what = format!("layer {}", layer.digest);
                return Err(Error::SizeMismatch { what, expected: total, actual: *got + length as u64 });
            }
            space.about_to_write(file, path, length)?;
            file.write_all(bytes).map_err(Error::io("write", path))?;
            hasher.update(bytes);
            *got += length as u64;
            if reported.is_none_or(|at| *got - at >= REPORT) {
                reported = Some(*got);
                self.options.report(Progress::Downloading {
                    digest: layer.digest.clone(),
                    bytes: *got,
                    total,
                });
            }
        }
    }

    /// Waits a little, but not after the pull has ended.
    fn rest(&self, pause: Duration) -> Result<(), Error> {
        let step = Duration::from_millis(20);
        let mut left = pause;
        while !left.is_zero() {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            thread::sleep(step.min(left));
            left = left.saturating_sub(step);
        }
        Ok(())
    }
}

/// Whether a response is the rest from `start` on (RFC 9110 § 14.4).
fn continues(response: &Response<Body>, start: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| {
            range.strip_prefix("bytes ").is_some_and(|rest| rest.starts_with(&format!("{start}-")))
        })
}

/// Hashes what `reader` has from its start; returns its length.
fn hash<R: Read + Seek>(
    reader: &mut R,
    hasher: &mut crate::digest::Hasher,
    path: &Path,
) -> Result<u64, Error> {
    reader.seek(SeekFrom::Start(0)).map_err(Error::io("read", path))?;
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let length = reader.read(&mut buffer).map_err(Error::io("read", path))?;
        if length == 0 {
            return Ok(total);
        }
        hasher.update(buffer.get(..length).unwrap_or_default());
        total += length as u64;
    }
}
