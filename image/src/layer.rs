//! Layers: compressed tar archives, applied one upon the other (OCI image-spec, layer.md) to one [`tree`] of
//! names in memory, while the files' contents go straight to the disk being made.
pub(crate) mod apply;
mod pax;
pub(crate) mod stream;
pub mod tar;
pub(crate) mod tree;
