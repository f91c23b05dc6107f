//! The product's promise, sentence by sentence: each test is named after one, and quotes it.
//!
//! "The VM exited unexpectedly" is told with all crashes in `crate::processes`, and a boot that fails in `crate::boot`.

mod begin;
mod end;
mod pause;
mod serve;
