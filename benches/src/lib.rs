//! What the benchmarks share: samples with their percentiles, and the report as text, JSON and a picture.
#![forbid(unsafe_code)]

pub mod network;
mod picture;
mod promises;
mod samples;

pub use picture::boot_picture;
pub use promises::broken_promises;
pub use samples::{Report, Samples, Summary};
