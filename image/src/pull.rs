//! One pull, on its own threads: find the image, and unless the store has it, download its layers in parallel
//! and convert them as they come, in order.
//!
//! ```text
//!  download ×4 ──file──→ read, decompress ──pieces──→ parse, hash, merge, write ──→ disk.erofs
//! ```
//!
//! Nothing is published before all of it was checked: downloads as they come, local layers beside the
//! conversion, and every layer's content again against the image's configuration.
use std::{
    fs::File,
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crate::{
    Digest, Error, Image, Progress, PullOptions, PullPolicy, Reference, Store, erofs,
    layer::{apply::Applier, stream},
    manifest::{Context, LayerInfo, Plan},
    source::{Downloads, Found, Layers},
    store::PullStamp,
};

/// See [`Store::resolve`].
pub(crate) fn resolve(
    store: &Store,
    reference: &Reference,
    policy: PullPolicy,
    options: &PullOptions,
    stop: &Arc<AtomicBool>,
) -> Result<Image, Error> {
    if policy != PullPolicy::Always
        && let Some(image) = store.find_for(reference, &options.platform)?
    {
        options.report(Progress::Done);
        return Ok(image);
    }
    let name = reference.to_string();
    if policy == PullPolicy::Never {
        return Err(Error::NotPresent { reference: name });
    }
    options.report(Progress::Resolving);
    let context = Context { reference: &name, platform: &options.platform, limits: &options.limits };
    // Taken before the file is read: if it changes meanwhile, the image will be looked at again.
    let stamp = PullStamp::take(reference);
    let found = Found::find(reference, &context, options)?;
    let image = make(store, found, &context, options, stop)?;
    store.point(reference, &options.platform, &image.digest, stamp)?;
    options.report(Progress::Done);
    Ok(image)
}

/// The image that was found, made unless the store has it.
fn make(
    store: &Store,
    found: Found,
    context: &Context<'_>,
    options: &PullOptions,
    stop: &Arc<AtomicBool>,
) -> Result<Image, Error> {
    let digest = found.digest().clone();
    if let Some(image) = store.image(&digest)? {
        return Ok(image);
    }
    let _lock = store.lock(&digest, stop, || options.report(Progress::Waiting))?;
    if let Some(image) = store.image(&digest)? {
        return Ok(image);
    }
    store.sweep();
    let (plan, layers) = found.plan(context)?;
    let dir = store.workshop(&digest)?;
    let made = convert(store, &dir, &digest, &plan, &layers, options, stop);
    match made.and_then(|size| store.publish(&dir, &digest, size, plan.config)) {
        Ok(image) => Ok(image),
        Err(error) => {
            // The next pull would do it; the disk may be full now.
            let _ = std::fs::remove_dir_all(&dir);
            Err(error)
        }
    }
}

/// Downloads and converts; returns the disk's bytes.
fn convert(
    store: &Store,
    dir: &std::path::Path,
    digest: &Digest,
    plan: &Plan,
    layers: &Layers,
    options: &PullOptions,
    stop: &Arc<AtomicBool>,
) -> Result<u64, Error> {
    let path = Store::disk_in(dir);
    let file = File::create_new(&path).map_err(Error::io("create", &path))?;
    let downloads = match layers {
        Layers::Registry(registry) => {
            Some(Downloads::new(registry, store.blobs(), &plan.layers, options, Arc::clone(stop)))
        }
        _ => None,
    };
    let (unpacker, stream) = stream::channel(&options.limits, Arc::clone(stop));
    let disk = erofs::Disk::new(file, path.clone(), options.limits.min_free)?;
    let size = thread::scope(|scope| {
        // Threads that cannot be had end the pull, and what was started already ends with it.
        let named = |name: &str| thread::Builder::new().name(name.to_owned());
        for _ in 0..downloads.as_ref().map_or(0, Downloads::workers) {
            let downloads = downloads.as_ref();
            let started = named("image-download").spawn_scoped(scope, move || downloads.map(Downloads::work));
            started
                .map_err(Error::io("start a thread for", &path))
                .inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        }
        let inputs = plan
            .layers
            .iter()
            .enumerate()
            .map(|(at, layer)| input(at, layer, layers, downloads.as_ref()))
            .collect();
        let started = named("image-unpack").spawn_scoped(scope, move || unpacker.run(inputs));
        started
            .map_err(Error::io("start a thread for", &path))
            .inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        let verifier = named("image-verify").spawn_scoped(scope, || verify(plan, layers, stop));
        let verifier = verifier
            .map_err(Error::io("start a thread for", &path))
            .inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        // Whatever went wrong here, the others have nothing left to do.
        let size = apply(stream, disk, digest, plan, options)
            .inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        verifier.join().unwrap_or(Err(Error::Cancelled)).map(|()| size)
    })?;
    if let Some(downloads) = downloads.filter(|_| !options.keep_blobs) {
        downloads.remove();
    }
    Ok(size)
}

/// Checks the layers that are on this machine already; downloads are checked as they come. A plain layer is
/// checked once it is unpacked: that is the same bytes.
fn verify(plan: &Plan, layers: &Layers, stop: &AtomicBool) -> Result<(), Error> {
    let mut buffer = vec![0; 256 << 10];
    for (at, layer) in plan.layers.iter().enumerate() {
        if layer.diff_id.as_ref() == Some(&layer.digest) {
            continue;
        }
        let Some(section) = layers.open(at, layer) else { return Ok(()) };
        let (mut section, mut hasher) = (section?, layer.digest.hasher());
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            match section.read(&mut buffer).map_err(Error::io("read", "a layer"))? {
                0 => break,
                length => hasher.update(buffer.get(..length).unwrap_or_default()),
            }
        }
        layer.digest.verify_hash(hasher, "a layer")?;
    }
    Ok(())
}

/// A layer for the unpacker.
fn input<'a>(
    at: usize,
    layer: &'a LayerInfo,
    layers: &'a Layers,
    downloads: Option<&'a Downloads<'a>>,
) -> stream::Layer<'a> {
    let boxed = |section| Box::new(section) as Box<dyn Read + Send>;
    let open = move || match (layers.open(at, layer), downloads) {
        (Some(section), _) => section.map(boxed),
        (None, Some(downloads)) => downloads.wait(&layer.digest).map(boxed),
        (None, None) => Err(Error::Cancelled),
    };
    stream::Layer { digest: layer.digest.clone(), size: layer.size, open: Box::new(open) }
}

fn apply(
    mut stream: stream::Stream,
    disk: erofs::Disk,
    digest: &Digest,
    plan: &Plan,
    options: &PullOptions,
) -> Result<u64, Error> {
    let mut applier = Applier::new(disk, options);
    for layer in &plan.layers {
        applier.layer(&mut stream, &layer.digest, layer.diff_id.as_ref())?;
    }
    erofs::finish(&applier.tree, applier.disk, digest.prefix())
}
