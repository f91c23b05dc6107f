//! image

pub mod ext4;
