//! What can go wrong between a reference and a disk: one enum, whose messages say what was asked, what stood
//! in the way and, where the user can mend it, how.
use std::{io, path::PathBuf};

/// Why an image could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not a reference to an image.
    #[error("{reference:?} is not an image reference: {why}")]
    Reference {
        /// What was given.
        reference: String,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// The policy is [`PullPolicy::Never`](crate::PullPolicy::Never) and the store does not have the image.
    #[error(
        "{reference} is not in the store, and the pull policy is never: pull it first, or use if-missing"
    )]
    NotPresent {
        /// The image asked for.
        reference: String,
    },
    /// The registry, or the local layout, does not have the image.
    #[error("{reference} does not exist at {registry}: check the name and the tag")]
    NotFound {
        /// The image asked for.
        reference: String,
        /// Who was asked.
        registry: String,
    },
    /// The registry wants credentials, or refused those it was given.
    #[error(
        "{registry} refused access to {repository} ({why}): log in with `docker login {registry}`, or give \
         credentials in the pull options; a private repository and one that does not exist look the same"
    )]
    Unauthorized {
        /// The registry's host.
        registry: String,
        /// The repository asked for.
        repository: String,
        /// What was tried and what the registry said.
        why: String,
    },
    /// The image exists, but not for the wanted platform.
    #[error("{reference} has no image for {wanted}; it offers: {}", offered.join(", "))]
    WrongPlatform {
        /// The image asked for.
        reference: String,
        /// `os/architecture`.
        wanted: String,
        /// What there is, as `os/architecture[/variant]`.
        offered: Vec<String>,
    },
    /// The registry answered with a status that has no meaning of its own here.
    #[error("{url} answered with status {status}: {message}")]
    Registry {
        /// The request's address.
        url: String,
        /// HTTP status.
        status: u16,
        /// The first line of what the registry said.
        message: String,
    },
    /// The registry could not be reached.
    #[error("cannot reach {url}: check the network, the registry's name and its certificate")]
    Network {
        /// The request's address.
        url: String,
        /// What the transport said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A download kept breaking off. What came is kept; the next pull goes on from there.
    #[error(
        "download of {digest} broke off at {got} of {total} bytes, {attempts} times without progress; pull again to go on from there"
    )]
    Interrupted {
        /// The blob.
        digest: String,
        /// Bytes on disk.
        got: u64,
        /// Bytes of the whole blob.
        total: u64,
        /// Attempts in a row that brought nothing.
        attempts: u32,
    },
    /// Content is not what its digest says.
    #[error("{what} is damaged or was tampered with: its digest is {actual}, not {expected}")]
    DigestMismatch {
        /// Which content.
        what: String,
        /// The digest asked for.
        expected: String,
        /// The digest of what came.
        actual: String,
    },
    /// Content is longer or shorter than its descriptor says.
    #[error("{what} has {actual} bytes where its descriptor says {expected}")]
    SizeMismatch {
        /// Which content.
        what: String,
        /// Bytes announced.
        expected: u64,
        /// Bytes seen; for content that is too long, where reading stopped.
        actual: u64,
    },
    /// A manifest, index or configuration cannot be used.
    #[error("the {what} of {reference} cannot be used: {why}")]
    Manifest {
        /// The image.
        reference: String,
        /// `manifest`, `index` or `configuration`.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The image is larger than the options allow.
    #[error(
        "{what} exceeds the limit of {limit}: raise `{option}` in the pull options' limits if the image is trusted"
    )]
    Limit {
        /// What is too large.
        what: String,
        /// The limit's value.
        limit: u64,
        /// The field of [`Limits`](crate::Limits) that says so.
        option: &'static str,
    },
    /// A layer tries to name something outside the image's root.
    #[error("layer {layer} has an entry {path:?} that leaves the image: {why}")]
    Escape {
        /// The layer's digest.
        layer: String,
        /// The entry's path, lossily as text.
        path: String,
        /// The trick.
        why: &'static str,
    },
    /// A layer cannot be read: damaged, or not a tar archive.
    #[error("layer {layer} cannot be unpacked: {why}")]
    Layer {
        /// The layer's digest.
        layer: String,
        /// What is wrong, with the entry where there is one.
        why: String,
    },
    /// A local image directory or archive cannot be read.
    #[error("{} is not a usable {kind}: {why}", path.display())]
    Local {
        /// The path given.
        path: PathBuf,
        /// `oci layout`, `docker archive` or `image directory`.
        kind: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The disk is nearly full.
    #[error("{} has only {free} bytes left, and {reserve} are kept free: remove images, or lower `min_free` in the limits", path.display())]
    NoSpace {
        /// The store.
        path: PathBuf,
        /// Bytes free.
        free: u64,
        /// Bytes that must stay free.
        reserve: u64,
    },
    /// Another process has not let go of the store.
    #[error("another process has kept {} locked for too long: end it (fuser tells which it is), and try again", path.display())]
    Busy {
        /// The lock.
        path: PathBuf,
    },
    /// The store's own files could not be read or written.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Nobody waits for the result any more.
    #[error("the pull was cancelled")]
    Cancelled,
}

impl Error {
    /// Names the path and the deed of an I/O error; for `map_err`.
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.downcast::<Self>() {
            Ok(inner) => inner,
            Err(source) => Self::Io { doing, path, source },
        }
    }
}
