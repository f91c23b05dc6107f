//! What `docker save` writes: a tar archive with `manifest.json`, a configuration and uncompressed layers
//! (Docker's image specification v1.2, "Combined Image JSON + Filesystem Changeset Format"). Newer Dockers put
//! an OCI layout beside it; the same file names lead to the same content.
//!
//! Such an image has no manifest to take a digest of; its identity is its configuration's, which names the
//! content of every layer.
use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Seek},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Section, read_small};
use crate::{
    Digest, Error,
    layer::{
        tar::{self, Kind},
        tree::parts,
    },
    manifest::{Context, LayerInfo, Plan},
};

const KIND: &str = "docker archive";
/// Entries that an archive of layers may have; a layer takes three.
const MAX_MEMBERS: usize = 100_000;
/// Symbolic links from one layer to an equal one that are followed.
const MAX_LINKS: usize = 8;

/// An image in a file.
pub(crate) struct Archive {
    digest: Digest,
    config: Vec<u8>,
    layers: Vec<Section>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

enum Member {
    /// Offset and length.
    File(u64, u64),
    Symlink(Vec<u8>),
}

impl Archive {
    /// The image in the file at `path` that has `tag`, or the only one.
    pub(crate) fn open(path: &Path, tag: Option<&str>, context: &Context<'_>) -> Result<Self, Error> {
        let unusable = |why: String| Error::Local { path: path.to_owned(), kind: KIND, why };
        let file = File::open(path).map_err(|e| unusable(e.to_string()))?;
        let whole = Section::whole(file, path)?;
        let members = list(whole.clone()).map_err(|e| match e.to_string() {
            why if why.contains("checksum") => {
                unusable("it is not a tar archive; if it is compressed, decompress it".to_owned())
            }
            why => unusable(why),
        })?;
        let member = |name: &str| {
            let (at, length) = find(&members, name).ok_or_else(|| unusable(format!("it has no {name}")))?;
            whole.part(at, length).ok_or_else(|| unusable(format!("it ends inside {name}")))
        };
        let limit = context.limits.max_manifest;
        let entries: Vec<Entry> = serde_json::from_slice(&read_small(member("manifest.json")?, limit)?)
            .map_err(|e| unusable(format!("manifest.json: {e}")))?;
        let tags = |entry: &Entry| entry.repo_tags.clone().unwrap_or_default();
        let mut fitting =
            entries.iter().filter(|entry| tag.is_none_or(|tag| tags(entry).iter().any(|t| same_tag(t, tag))));
        let all = || entries.iter().flat_map(tags).collect::<Vec<_>>().join(", ");
        let Some(entry) = fitting.next() else {
            let what = format!("{} (it has: {})", path.display(), all());
            return Err(Error::NotFound { reference: context.reference.to_owned(), registry: what });
        };
        if fitting.next().is_some() {
            return Err(unusable(format!("it has several images; add one of its tags: {}", all())));
        }
        let config = read_small(member(&entry.config)?, limit)?;
        let layers = entry.layers.iter().flatten().map(|name| member(name)).collect::<Result<_, _>>()?;
        Ok(Self { digest: Digest::sha256(&config), config, layers })
    }

    /// The configuration's digest.
    pub(crate) fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The layers with their `diff_id`s, which are also the digests of what is stored.
    pub(crate) fn plan(&self, context: &Context<'_>) -> Result<Plan, Error> {
        let placeholder = |section: &Section| LayerInfo {
            digest: self.digest.clone(),
            size: Some(section.length()),
            diff_id: None,
        };
        let mut plan = context.configure(&self.config, self.layers.iter().map(placeholder).collect())?;
        for layer in &mut plan.layers {
            if let Some(diff_id) = &layer.diff_id {
                layer.digest = diff_id.clone();
            }
        }
        Ok(plan)
    }

    /// The layer's bytes.
    pub(crate) fn layer(&self, index: usize) -> Result<Section, Error> {
        let missing =
            || Error::Local { path: PathBuf::new(), kind: KIND, why: format!("layer {index} is missing") };
        self.layers.get(index).cloned().ok_or_else(missing)
    }
}

/// `python:3.12` is `docker.io/library/python:3.12`; a bare tag fits any name.
fn same_tag(have: &str, want: &str) -> bool {
    let normal = |text: &str| text.parse::<crate::Reference>().map(|reference| reference.to_string()).ok();
    have == want
        || have.rsplit_once(':').is_some_and(|(_, tag)| tag == want)
        || (normal(have).is_some() && normal(have) == normal(want))
}

/// The archive's members by their normal path; their contents are passed over, not read.
fn list(section: Section) -> io::Result<HashMap<Vec<u8>, Member>> {
    let mut members = HashMap::new();
    let mut archive = tar::Archive::new(BufReader::new(section), 1 << 20);
    while let Some(entry) = archive.next_entry()? {
        let at = archive.reader().stream_position()?;
        let skip = archive.leave_data();
        archive.reader().seek_relative(i64::try_from(skip).unwrap_or(i64::MAX))?;
        let member = match entry.kind {
            Kind::File if entry.segments.is_none() => Member::File(at, entry.size),
            Kind::Symlink => Member::Symlink(entry.link),
            _ => continue,
        };
        members.insert(parts(&entry.path).join(&b'/'), member);
        if members.len() > MAX_MEMBERS {
            return Err(tar::Malformed("it has too many members".into()).into());
        }
    }
    Ok(members)
}

/// The member of that name; links between members are followed inside the archive.
fn find(members: &HashMap<Vec<u8>, Member>, name: &str) -> Option<(u64, u64)> {
    let mut path = parts(name.as_bytes()).join(&b'/');
    for _ in 0..MAX_LINKS {
        match members.get(&path)? {
            Member::File(at, length) => return Some((*at, *length)),
            Member::Symlink(target) => {
                let mut at: Vec<&[u8]> = parts(&path);
                at.pop();
                for part in parts(target) {
                    if part == b".." {
                        at.pop()?;
                    } else {
                        at.push(part);
                    }
                }
                path = at.join(&b'/');
            }
        }
    }
    None
}
