//! Manifests and indices (OCI image-spec, manifest.md and image-index.md; Docker's schema 2 has the same
//! fields): from what a reference names to one image's configuration and layers.
//!
//! Every document is checked against the digest and size of the descriptor that led to it. Refused: Docker's
//! schema 1, documents that claim to be both kinds, artifacts that are no images, layers that are encrypted.
use std::collections::BTreeMap;

use serde::Deserialize;

use crate::{Digest, Error, ImageConfig, Limits, Platform, config::ConfigFile};

/// What to ask a registry for.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";
/// How deep indices may be nested.
const MAX_NESTING: usize = 4;

/// Points at content by its digest and size.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) platform: Option<PlatformField>,
    #[serde(default)]
    pub(crate) annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct PlatformField {
    os: String,
    architecture: String,
    variant: String,
}

/// Either kind of document; which one it is decides by its fields.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: Option<u64>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// One layer of an image.
#[derive(Debug, Clone)]
pub(crate) struct LayerInfo {
    pub(crate) digest: Digest,
    /// Bytes as stored, where a descriptor says it.
    pub(crate) size: Option<u64>,
    pub(crate) diff_id: Option<Digest>,
}

/// A manifest that was picked, not yet followed further.
#[derive(Debug)]
pub(crate) struct Picked {
    /// The image's identity.
    pub(crate) digest: Digest,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// An image whose layers are to be had.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) config: ImageConfig,
    pub(crate) layers: Vec<LayerInfo>,
}

/// What the functions here need to know about the pull.
pub(crate) struct Context<'a> {
    /// The image's name in errors.
    pub(crate) reference: &'a str,
    pub(crate) platform: &'a Platform,
    pub(crate) limits: &'a Limits,
}

/// Gets the bytes that a descriptor points at; they are checked here.
pub(crate) type Fetch<'a> = dyn Fn(&Descriptor) -> Result<Vec<u8>, Error> + 'a;

impl Context<'_> {
    fn unusable(&self, what: &'static str, why: impl ToString) -> Error {
        Error::Manifest { reference: self.reference.to_owned(), what, why: why.to_string() }
    }

    /// Follows `bytes`, a manifest or index with the given digest, to the manifest for the platform.
    pub(crate) fn pick(
        &self,
        mut bytes: Vec<u8>,
        mut digest: Digest,
        fetch: &Fetch<'_>,
    ) -> Result<Picked, Error> {
        for _ in 0..MAX_NESTING {
            let document: Document =
                serde_json::from_slice(&bytes).map_err(|e| self.unusable("manifest", e))?;
            match document {
                Document { schema_version: Some(1), .. } => {
                    return Err(self.unusable(
                        "manifest",
                        "it has Docker's schema 1, which was withdrawn; push the image again",
                    ));
                }
                Document { manifests: Some(_), layers: Some(_), .. } => {
                    return Err(self.unusable("manifest", "it claims to be a manifest and an index"));
                }
                Document { manifests: Some(entries), .. } => {
                    let next = self.select(&entries.iter().collect::<Vec<_>>())?;
                    bytes = self.document(next, fetch)?;
                    digest = next.digest.clone();
                }
                Document { config: Some(config), layers: Some(layers), .. } => {
                    return Ok(Picked { digest, config, layers });
                }
                _ => return Err(self.unusable("manifest", "it has neither layers nor manifests")),
            }
        }
        Err(self.unusable("index", "indices are nested too deep"))
    }

    /// Fetches and checks the picked image's configuration.
    pub(crate) fn plan(&self, picked: Picked, fetch: &Fetch<'_>) -> Result<Plan, Error> {
        let bytes = self.document(&picked.config, fetch)?;
        let mut layers = Vec::new();
        for layer in picked.layers {
            if layer.media_type.contains("+encrypted") {
                return Err(self.unusable("manifest", format!("its layer {} is encrypted", layer.digest)));
            }
            if layer.size > self.limits.max_layer {
                let what = format!("the size of layer {}", layer.digest);
                return Err(Error::Limit { what, limit: self.limits.max_layer, option: "max_layer" });
            }
            layers.push(LayerInfo { digest: layer.digest, size: Some(layer.size), diff_id: None });
        }
        self.configure(&bytes, layers)
    }

    /// Reads a configuration, checks the platform and gives the layers their `diff_id`s.
    pub(crate) fn configure(&self, bytes: &[u8], mut layers: Vec<LayerInfo>) -> Result<Plan, Error> {
        let file: ConfigFile =
            serde_json::from_slice(bytes).map_err(|e| self.unusable("configuration", e))?;
        if layers.len() as u64 > self.limits.max_layers {
            let what = "the number of layers".to_owned();
            return Err(Error::Limit { what, limit: self.limits.max_layers, option: "max_layers" });
        }
        let diff_ids = &file.rootfs.diff_ids;
        if diff_ids.len() != layers.len() {
            let why = format!("it lists {} layers and the manifest {}", diff_ids.len(), layers.len());
            return Err(self.unusable("configuration", why));
        }
        for (layer, diff_id) in layers.iter_mut().zip(diff_ids) {
            layer.diff_id = Some(diff_id.clone());
        }
        let config = file.into_config();
        let wanted = self.platform;
        if config.os != wanted.os || config.architecture != wanted.architecture {
            return Err(self.wrong_platform(vec![format!("{}/{}", config.os, config.architecture)]));
        }
        Ok(Plan { config, layers })
    }

    /// The entry for the platform; of several variants the plainest, which every processor can run.
    pub(crate) fn select<'d>(&self, entries: &[&'d Descriptor]) -> Result<&'d Descriptor, Error> {
        if let [only] = entries
            && only.platform.as_ref().is_none_or(|platform| platform.os.is_empty())
        {
            return Ok(only);
        }
        let fitting = entries.iter().filter_map(|&entry| {
            let platform = entry.platform.as_ref()?;
            let fits = platform.os == self.platform.os && platform.architecture == self.platform.architecture;
            fits.then_some((platform.variant.as_str(), entry))
        });
        let plainest = fitting.min_by_key(|(variant, _)| *variant).map(|(_, entry)| entry);
        plainest.ok_or_else(|| {
            let offered =
                entries.iter().filter_map(|entry| entry.platform.as_ref()).filter(|p| p.os != "unknown").map(
                    |p| {
                        let variant =
                            if p.variant.is_empty() { String::new() } else { format!("/{}", p.variant) };
                        format!("{}/{}{variant}", p.os, p.architecture)
                    },
                );
            self.wrong_platform(offered.collect())
        })
    }

    fn wrong_platform(&self, offered: Vec<String>) -> Error {
        Error::WrongPlatform {
            reference: self.reference.to_owned(),
            wanted: self.platform.to_string(),
            offered,
        }
    }

    /// The bytes behind `descriptor`, which must be what it says.
    pub(crate) fn document(&self, descriptor: &Descriptor, fetch: &Fetch<'_>) -> Result<Vec<u8>, Error> {
        if descriptor.size > self.limits.max_manifest {
            let what = format!("the size of {}", descriptor.digest);
            return Err(Error::Limit { what, limit: self.limits.max_manifest, option: "max_manifest" });
        }
        let bytes = fetch(descriptor)?;
        if bytes.len() as u64 != descriptor.size {
            let what = descriptor.digest.to_string();
            return Err(Error::SizeMismatch { what, expected: descriptor.size, actual: bytes.len() as u64 });
        }
        descriptor.digest.verify(&bytes, "a manifest or configuration")?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(bytes: &[u8], extra: &str) -> String {
        format!(r#"{{"digest":"{}","size":{}{extra}}}"#, Digest::sha256(bytes), bytes.len())
    }

    fn platform(os: &str, architecture: &str, variant: &str) -> String {
        format!(r#","platform":{{"os":"{os}","architecture":"{architecture}","variant":"{variant}"}}"#)
    }

    fn pick(index: String, documents: &[Vec<u8>]) -> Result<Picked, Error> {
        let context =
            Context { reference: "test", platform: &Platform::default(), limits: &Limits::default() };
        let digest = Digest::sha256(index.as_bytes());
        context.pick(index.into_bytes(), digest, &|descriptor| {
            Ok(documents.iter().find(|bytes| Digest::sha256(bytes) == descriptor.digest).cloned().unwrap())
        })
    }

    fn manifest(tag: &str) -> Vec<u8> {
        format!(r#"{{"schemaVersion":2,"config":{},"layers":[]}}"#, descriptor(tag.as_bytes(), ""))
            .into_bytes()
    }

    #[test]
    fn the_plainest_variant_for_the_platform_is_picked() {
        let (arm, v3, plain) = (manifest("arm"), manifest("v3"), manifest("plain"));
        let entries = [
            descriptor(&arm, &platform("linux", "arm64", "v8")),
            descriptor(&v3, &platform("linux", "amd64", "v3")),
            descriptor(&plain, &platform("linux", "amd64", "")),
            descriptor(b"attestation", &platform("unknown", "unknown", "")),
        ];
        let index =
            |entries: &[String]| format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        let documents = [arm, v3, plain.clone()];
        assert_eq!(pick(index(&entries), &documents).unwrap().digest, Digest::sha256(&plain));

        let outer = index(&[descriptor(index(&entries).as_bytes(), "")]);
        let nested = [&documents[..], &[index(&entries).into_bytes()]].concat();
        assert_eq!(pick(outer, &nested).unwrap().digest, Digest::sha256(&plain));

        let Err(Error::WrongPlatform { offered, .. }) = pick(index(&entries[..1]), &documents) else {
            panic!("an image for another platform was taken");
        };
        assert_eq!(offered, ["linux/arm64/v8"]);
    }

    #[test]
    fn ambiguous_old_and_lying_documents_are_refused() {
        let config = descriptor(b"c", "");
        for bad in [
            format!(r#"{{"schemaVersion":2,"manifests":[],"config":{config},"layers":[]}}"#),
            r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(),
            r#"{"schemaVersion":2}"#.to_owned(),
            "[]".to_owned(),
        ] {
            assert!(matches!(pick(bad.clone(), &[]), Err(Error::Manifest { .. })), "{bad}");
        }
        let lying = format!(r#"{{"manifests":[{{"digest":"{}","size":3}}]}}"#, Digest::sha256(b"abcd"));
        assert!(matches!(pick(lying, &[b"abcd".to_vec()]), Err(Error::SizeMismatch { .. })));
        let large = format!(r#"{{"manifests":[{{"digest":"{}","size":99999999}}]}}"#, Digest::sha256(b""));
        assert!(matches!(pick(large, &[]), Err(Error::Limit { option: "max_manifest", .. })));
    }
}
