//! What a caller may choose about a pull: policy, platform, credentials, limits and who hears of progress.
use std::{fmt, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::Digest;

/// When the registry is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PullPolicy {
    /// Every time: a tag that has moved is followed. What is already in the store is not fetched again.
    Always,
    /// Only when the store does not have the reference.
    #[default]
    IfMissing,
    /// Never: what is not in the store is an error.
    Never,
}

/// An operating system and a processor architecture, in the words of the OCI image-spec (Go's).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// For example `linux`.
    pub os: String,
    /// For example `amd64`.
    pub architecture: String,
}

impl Default for Platform {
    /// `linux/amd64`.
    fn default() -> Self {
        Self { os: "linux".to_owned(), architecture: "amd64".to_owned() }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

/// A name and a password or access token. The password is not shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password, or a personal access token.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// How large an image may be. Each limit ends in an error that names its field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Layers of an image. Default 512; Docker builds at most 127.
    pub max_layers: u64,
    /// Bytes of a manifest, index or configuration. Default 4 MiB, as registries have it.
    pub max_manifest: u64,
    /// Bytes of one layer as downloaded. Default 16 GiB.
    pub max_layer: u64,
    /// Bytes of all layers unpacked. Default 64 GiB.
    pub max_unpacked: u64,
    /// How many times larger than its download a layer may unpack, counted beyond its first 64 MiB; it is what
    /// stops a decompression bomb. Default 100; real layers stay below 20.
    pub max_ratio: u64,
    /// Files, directories and other entries of all layers. Default 2,000,000 (about 300 bytes of memory each).
    pub max_entries: u64,
    /// Bytes of an entry's path. Default 4,096, Linux's `PATH_MAX`.
    pub max_path: u64,
    /// Bytes of one extended header. Default 1 MiB, as Go's reader has it.
    pub max_header: u64,
    /// Bytes of one entry's extended attributes. Default 128 KiB.
    pub max_xattrs: u64,
    /// Bytes of names, links and extended attributes of all entries: what the pull holds in memory.
    /// Default 512 MiB.
    pub max_metadata: u64,
    /// Bytes that a pull leaves free on the store's file system. Default 512 MiB.
    pub min_free: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_layers: 512,
            max_manifest: 4 << 20,
            max_layer: 16 << 30,
            max_unpacked: 64 << 30,
            max_ratio: 100,
            max_entries: 2_000_000,
            max_path: 4096,
            max_header: 1 << 20,
            max_xattrs: 128 << 10,
            max_metadata: 512 << 20,
            min_free: 512 << 20,
        }
    }
}

/// What a pull is doing. Events of parallel downloads interleave.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// Asking what the reference stands for.
    Resolving,
    /// Another process or task pulls the same image; its result will be used.
    Waiting,
    /// `bytes` of a layer's `total` are on disk.
    Downloading {
        /// The layer.
        digest: Digest,
        /// Bytes so far, those of an earlier, interrupted pull included.
        bytes: u64,
        /// Bytes in all.
        total: u64,
    },
    /// So many bytes of unpacked layers have been converted.
    Converting {
        /// Bytes so far.
        bytes: u64,
    },
    /// The image is in the store.
    Done,
}

/// Who hears of a pull's progress; called from the pull's own threads, it should be quick.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;

/// How to pull.
#[derive(Clone, Default)]
pub struct PullOptions {
    /// What to pick from an image for several platforms. Default `linux/amd64`.
    pub platform: Platform,
    /// For the registry of the reference. Without them, those of `docker login` are used, if there are any.
    pub credentials: Option<Credentials>,
    /// Where `docker login` keeps credentials. Default `$DOCKER_CONFIG/config.json` or
    /// `~/.docker/config.json`.
    pub docker_config: Option<PathBuf>,
    /// Registries (`host` or `host:port`) to speak plain HTTP with, besides those on a loopback address.
    pub insecure_registries: Vec<String>,
    /// A PEM file of certificate authorities to trust instead of the built-in (Mozilla's) ones.
    pub ca_file: Option<PathBuf>,
    /// Layers to download at once. Default (0) is 4.
    pub parallel: usize,
    /// Keep the layers as downloaded, so that an image that shares them need not fetch them again.
    pub keep_blobs: bool,
    /// Take entries with absolute paths (`/usr/x`) as relative to the image's root, as Docker does, instead
    /// of refusing the image.
    pub allow_absolute_paths: bool,
    /// How large the image may be.
    pub limits: Limits,
    /// Who hears of progress; see [`Self::on_progress`].
    pub progress: Option<ProgressSink>,
}

impl PullOptions {
    /// Calls `sink` on what happens, from the pull's own threads; it should be quick.
    #[must_use]
    pub fn on_progress(mut self, sink: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(sink));
        self
    }

    pub(crate) fn report(&self, progress: Progress) {
        if let Some(sink) = &self.progress {
            sink(progress);
        }
    }
}

impl fmt::Debug for PullOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullOptions")
            .field("platform", &self.platform)
            .field("credentials", &self.credentials)
            .field("insecure_registries", &self.insecure_registries)
            .field("parallel", &self.parallel)
            .field("keep_blobs", &self.keep_blobs)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
