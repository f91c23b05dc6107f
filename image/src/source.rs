//! Where images come from. Each kind says which manifest a reference means, what configuration and layers it
//! has, and opens the layers; nothing it delivers is trusted before its digest was checked.
mod archive;
mod auth;
mod download;
mod layout;
mod registry;

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

pub(crate) use download::Downloads;
pub(crate) use registry::Registry;

use crate::{
    Digest, Error, Reference,
    manifest::{Context, LayerInfo, Picked, Plan},
};
use archive::Archive;
use layout::Layout;

/// An image that was found, up to its manifest.
pub(crate) enum Found {
    Registry(Registry, Picked),
    Layout(Layout, Picked),
    Archive(Archive),
}

impl Found {
    /// Asks for what `reference` names.
    pub(crate) fn find(
        reference: &Reference,
        context: &Context<'_>,
        options: &crate::PullOptions,
    ) -> Result<Self, Error> {
        match reference {
            Reference::Registry { registry, repository, tag, digest } => {
                let registry = Registry::new(registry, repository, options)?;
                let picked = registry.pick(tag.as_deref(), digest.as_ref(), context)?;
                Ok(Self::Registry(registry, picked))
            }
            Reference::Oci { path, tag } => {
                let (layout, picked) = Layout::oci(path, tag.as_deref(), context)?;
                Ok(Self::Layout(layout, picked))
            }
            Reference::Dir { path } => {
                let (layout, picked) = Layout::dir(path, context)?;
                Ok(Self::Layout(layout, picked))
            }
            Reference::DockerArchive { path, tag } => {
                Archive::open(path, tag.as_deref(), context).map(Self::Archive)
            }
        }
    }

    /// The image's identity: its manifest's digest, or its configuration's where there is no manifest.
    pub(crate) fn digest(&self) -> &Digest {
        match self {
            Self::Registry(_, picked) | Self::Layout(_, picked) => &picked.digest,
            Self::Archive(archive) => archive.digest(),
        }
    }

    /// What the image is made of, and how to get at it.
    pub(crate) fn plan(self, context: &Context<'_>) -> Result<(Plan, Layers), Error> {
        match self {
            Self::Registry(registry, picked) => {
                let plan = context.plan(picked, &|descriptor| registry.document(descriptor))?;
                Ok((plan, Layers::Registry(registry)))
            }
            Self::Layout(layout, picked) => {
                let plan = context.plan(picked, &|descriptor| layout.document(descriptor))?;
                Ok((plan, Layers::Layout(layout)))
            }
            Self::Archive(archive) => {
                let plan = archive.plan(context)?;
                Ok((plan, Layers::Archive(archive)))
            }
        }
    }
}

/// Where the layers of a plan are.
pub(crate) enum Layers {
    Registry(Registry),
    Layout(Layout),
    Archive(Archive),
}

impl Layers {
    /// Opens a layer that is on this machine; `None` for one that must be downloaded.
    pub(crate) fn open(&self, index: usize, layer: &LayerInfo) -> Option<Result<Section, Error>> {
        match self {
            Self::Registry(_) => None,
            Self::Layout(layout) => Some(layout.open(&layer.digest)),
            Self::Archive(archive) => Some(archive.layer(index)),
        }
    }
}

/// The file whose change means that a local reference may name another image.
pub(crate) fn witness(reference: &Reference) -> Option<PathBuf> {
    match reference {
        Reference::Registry { .. } => None,
        Reference::Oci { path, .. } => Some(path.join("index.json")),
        Reference::Dir { path } => Some(path.join("manifest.json")),
        Reference::DockerArchive { path, .. } => Some(path.clone()),
    }
}

/// A part of a file, read without a shared position.
#[derive(Debug, Clone)]
pub(crate) struct Section {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Section {
    /// All of `file`.
    pub(crate) fn whole(file: File, path: &Path) -> Result<Self, Error> {
        let end = file.metadata().map_err(Error::io("measure", path))?.len();
        Ok(Self { file: Arc::new(file), at: 0, end })
    }

    /// A part of this part, if it lies inside.
    fn part(&self, at: u64, length: u64) -> Option<Self> {
        let at = self.at.checked_add(at)?;
        let end = at.checked_add(length).filter(|&end| end <= self.end)?;
        Some(Self { file: Arc::clone(&self.file), at, end })
    }

    fn length(&self) -> u64 {
        self.end - self.at
    }
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(buffer.len());
        let got = self.file.read_at(buffer.get_mut(..length).unwrap_or_default(), self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

impl Seek for Section {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        // Beyond the end there is nothing to read, which is an error for whoever does.
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?.min(self.end);
        Ok(self.at)
    }
}

/// Reads a document that must be small.
fn read_small(mut section: Section, limit: u64) -> Result<Vec<u8>, Error> {
    if section.length() > limit {
        let what = "the size of a manifest or configuration".to_owned();
        return Err(Error::Limit { what, limit, option: "max_manifest" });
    }
    let mut bytes = Vec::new();
    section.read_to_end(&mut bytes).map_err(Error::io("read", "a manifest"))?;
    Ok(bytes)
}
