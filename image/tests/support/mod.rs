//! What the tests share: archives byte by byte, OCI layouts, a reader of EROFS that knows nothing of the
//! writer, and a way to compare file systems.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)]

pub mod erofs;
pub mod files;
pub mod http;
pub mod tar;

use std::{collections::BTreeMap, fs, future::Future, io::Write, path::Path, path::PathBuf};

use cubby_image::{Digest, Error, Image, PullOptions, PullPolicy, Reference, Store};

/// How a layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Plain,
    Gzip,
    Zstd,
}

pub fn compress(tar: &[u8], how: Compression) -> Vec<u8> {
    match how {
        Compression::Plain => tar.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => zstd::encode_all(tar, 1).unwrap(),
    }
}

/// An image as documents and blobs.
#[derive(Debug, Default, Clone)]
pub struct Content {
    pub blobs: BTreeMap<String, Vec<u8>>,
    pub manifest: Vec<u8>,
}

impl Content {
    pub fn add(&mut self, bytes: Vec<u8>) -> String {
        let digest = Digest::sha256(&bytes).to_string();
        self.blobs.insert(digest.clone(), bytes);
        digest
    }

    /// An image of these layers for linux/amd64.
    pub fn new(layers: &[Vec<u8>], how: Compression) -> Self {
        let mut image = Self::default();
        let mut descriptors = Vec::new();
        let diff_ids: Vec<String> = layers.iter().map(|tar| format!("\"{}\"", Digest::sha256(tar))).collect();
        for tar in layers {
            let stored = compress(tar, how);
            let size = stored.len();
            let media = match how {
                Compression::Plain => "tar",
                Compression::Gzip => "tar+gzip",
                Compression::Zstd => "tar+zstd",
            };
            let digest = image.add(stored);
            descriptors.push(format!(
                r#"{{"mediaType":"application/vnd.oci.image.layer.v1.{media}","digest":"{digest}","size":{size}}}"#
            ));
        }
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/bin/x"],"Env":["A=b"]}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            diff_ids.join(",")
        );
        let size = config.len();
        let config = image.add(config.into_bytes());
        image.manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":{size}}},"layers":[{}]}}"#,
            descriptors.join(",")
        )
        .into_bytes();
        image.add(image.manifest.clone());
        image
    }

    /// Writes an OCI layout with the tag `t`.
    pub fn write(&self, dir: &Path) {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        for (digest, bytes) in &self.blobs {
            fs::write(dir.join("blobs").join(digest.replace(':', "/")), bytes).unwrap();
        }
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let (digest, size) = (Digest::sha256(&self.manifest), self.manifest.len());
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":{size},"annotations":{{"org.opencontainers.image.ref.name":"t"}}}}]}}"#
        );
        fs::write(dir.join("index.json"), index).unwrap();
    }
}

/// Runs a future; it waits for other threads only.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// A store in a directory that goes away with it.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub store: Store,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        Self { dir, store }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn pull(&self, reference: &str, options: &PullOptions) -> Result<Image, Error> {
        let reference: Reference = reference.parse()?;
        wait(self.store.resolve(&reference, PullPolicy::IfMissing, options))
    }

    /// Converts layers by way of an OCI layout.
    pub fn convert(
        &self,
        layers: &[Vec<u8>],
        how: Compression,
        options: &PullOptions,
    ) -> Result<Image, Error> {
        let layout = self.path("layout");
        let _ = fs::remove_dir_all(&layout);
        Content::new(layers, how).write(&layout);
        self.pull(&format!("oci:{}:t", layout.display()), options)
    }

    /// What is left in `tmp` and `blobs`.
    pub fn litter(&self) -> Vec<String> {
        let mut all = Vec::new();
        for dir in ["tmp", "blobs"] {
            for entry in fs::read_dir(self.path("store").join(dir)).unwrap() {
                all.push(entry.unwrap().file_name().into_string().unwrap());
            }
        }
        all
    }
}

/// Runs a program that must succeed, and returns what it prints.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("{program} is needed by this test: {e}"));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// `fsck.erofs` finds nothing wrong.
pub fn fsck(image: &Image) {
    let text = run("fsck.erofs", &["--extract", image.disk.to_str().unwrap()]);
    assert!(!text.contains("<E>") && !text.contains("<W>"), "{text}");
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What umoci makes of the layout's image `t`.
pub fn umoci(layout: &Path, bundle: &Path) -> files::Files {
    let image = format!("{}:t", layout.display());
    let mut arguments = vec!["unpack", "--image", &image];
    if !is_root() {
        arguments.push("--rootless");
    }
    arguments.push(bundle.to_str().unwrap());
    run("umoci", &arguments);
    files::read(&bundle.join("rootfs"))
}
