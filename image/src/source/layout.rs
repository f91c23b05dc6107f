//! Images in directories: OCI image layouts (OCI image-spec, image-layout.md) and skopeo's `dir:`, which has
//! `manifest.json` and blobs named by the hexadecimal part of their digest.
use std::{
    fs::File,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Section, read_small};
use crate::{
    Digest, Error,
    manifest::{Context, Descriptor, Picked},
};

/// The annotation that names an image in a layout.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A directory with an image.
pub(crate) struct Layout {
    kind: &'static str,
    path: PathBuf,
    blobs: Blobs,
    max_document: u64,
}

/// Where a blob is.
#[derive(Clone, Copy)]
enum Blobs {
    /// `blobs/sha256/<hex>`
    ByAlgorithm,
    /// `<hex>`
    Flat,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

fn name(entry: &Descriptor) -> Option<&str> {
    entry.annotations.get(REF_NAME).map(String::as_str)
}

impl Layout {
    /// The image in the OCI layout at `path` that has `tag`, or the only one.
    pub(crate) fn oci(
        path: &Path,
        tag: Option<&str>,
        context: &Context<'_>,
    ) -> Result<(Self, Picked), Error> {
        let layout = Self::new("oci layout", path, Blobs::ByAlgorithm, context);
        let index = layout.file("index.json", context)?;
        let index: Index =
            serde_json::from_slice(&index).map_err(|e| layout.unusable(format!("index.json: {e}")))?;
        let fitting: Vec<&Descriptor> = match tag {
            Some(_) => index.manifests.iter().filter(|entry| name(entry) == tag).collect(),
            None => index.manifests.iter().collect(),
        };
        let names = || index.manifests.iter().filter_map(name).collect::<Vec<_>>().join(", ");
        let entry = match fitting.as_slice() {
            [entry] => *entry,
            [] => {
                let what = format!("{} (it has the tags: {})", path.display(), names());
                return Err(Error::NotFound { reference: context.reference.to_owned(), registry: what });
            }
            // One image for several platforms, without an index between.
            [first, rest @ ..] if rest.iter().all(|entry| name(entry) == name(first)) => {
                context.select(&fitting)?
            }
            _ => {
                return Err(
                    layout.unusable(format!("it has several images; add one of its tags: {}", names()))
                );
            }
        };
        let bytes = context.document(entry, &|descriptor| layout.document(descriptor))?;
        let picked = context.pick(bytes, entry.digest.clone(), &|descriptor| layout.document(descriptor))?;
        Ok((layout, picked))
    }

    /// The image that skopeo wrote to `path`.
    pub(crate) fn dir(path: &Path, context: &Context<'_>) -> Result<(Self, Picked), Error> {
        let layout = Self::new("image directory", path, Blobs::Flat, context);
        let bytes = layout.file("manifest.json", context)?;
        let digest = Digest::sha256(&bytes);
        let picked = context.pick(bytes, digest, &|descriptor| {
            // The manifests of an index have a suffix of their own.
            let name = format!("{}.manifest.json", descriptor.digest.hex());
            layout.file(&name, context).or_else(|_| layout.document(descriptor))
        })?;
        Ok((layout, picked))
    }

    fn new(kind: &'static str, path: &Path, blobs: Blobs, context: &Context<'_>) -> Self {
        Self { kind, path: path.to_owned(), blobs, max_document: context.limits.max_manifest }
    }

    fn unusable(&self, why: String) -> Error {
        Error::Local { path: self.path.clone(), kind: self.kind, why }
    }

    fn file(&self, name: &str, context: &Context<'_>) -> Result<Vec<u8>, Error> {
        let path = self.path.join(name);
        let file = File::open(&path).map_err(|e| self.unusable(format!("{name}: {e}")))?;
        read_small(Section::whole(file, &path)?, context.limits.max_manifest)
    }

    /// A manifest or configuration; its digest is not checked here.
    pub(crate) fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        read_small(self.open(&descriptor.digest)?, self.max_document)
    }

    /// A blob; its digest is not checked here.
    pub(crate) fn open(&self, digest: &Digest) -> Result<Section, Error> {
        let path = match self.blobs {
            Blobs::ByAlgorithm => self.path.join("blobs").join(digest.algorithm()).join(digest.hex()),
            Blobs::Flat => self.path.join(digest.hex()),
        };
        let file = File::open(&path).map_err(|e| self.unusable(format!("blob {digest}: {e}")))?;
        Section::whole(file, &path)
    }
}
