//! OCI images as disks: a reference such as `python:3.12` in, a verified, read-only EROFS file out, without
//! root, mounts or other programs.
//!
//! ```no_run
//! # async fn example() -> Result<(), cubby_image::Error> {
//! use cubby_image::{PullOptions, PullPolicy, Reference, Store};
//!
//! let store = Store::open("/home/me/.microsandbox/cubby/images")?;
//! let reference: Reference = "python:3.12".parse()?;
//! let image = store.resolve(&reference, PullPolicy::IfMissing, &PullOptions::default()).await?;
//! println!("{} runs {:?}", image.disk.display(), image.config.cmd);
//! # Ok(())
//! # }
//! ```
//!
//! What it promises: every byte was checked against its digest; owners, modes, times, extended attributes, hard
//! links and device nodes are those of the image; an image is made once, whoever asks; the same image gives the
//! same bytes. What it refuses, with a typed [`Error`]: paths that leave the image, archives that break their
//! format, content that is not what its digest says, and anything beyond the [`Limits`].
//!
//! Not there: credential helpers, signatures, images compressed other than by gzip or zstd, pushing.
#![forbid(unsafe_code)]

mod config;
mod digest;
mod erofs;
mod error;
pub mod ext4;
mod layer;
mod manifest;
mod options;
mod pull;
mod reference;
mod source;
mod space;
mod store;

pub use config::ImageConfig;
pub use digest::{Digest, InvalidDigest};
pub use error::Error;
pub use layer::tar;
pub use options::{Credentials, Limits, Platform, Progress, ProgressSink, PullOptions, PullPolicy};
pub use reference::Reference;
pub use store::{Hold, Image, Removal, Store, Stored};
