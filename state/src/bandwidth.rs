//! How much a sandbox may send and receive in a second.

use serde::{Deserialize, Serialize};

/// How much may pass between a sandbox and everybody else, in bits per second; by default as much as there is.
///
/// Ethernet frames are counted. What may not pass yet waits, in the guest or on the host, and is not lost. After a silence
/// a tenth of a second's worth may pass at once, or 128 KiB if that is more. Connections that receive share what there
/// is; those that send are served in the order in which the guest's kernel has put their frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bandwidth {
    /// From the sandbox, in bits per second.
    pub upload: Option<u64>,
    /// To the sandbox, in bits per second.
    pub download: Option<u64>,
}

impl Bandwidth {
    /// The least that can be set: frames are up to 64 KiB long, and one takes half a second then.
    pub const LEAST: u64 = 1_000_000;

    /// The most.
    pub const MOST: u64 = 1_000_000_000_000;

    /// The same in each direction.
    #[must_use]
    pub fn both(bits_per_second: u64) -> Self {
        Bandwidth { upload: Some(bits_per_second), download: Some(bits_per_second) }
    }

    /// The same with another limit for what the sandbox sends.
    #[must_use]
    pub fn upload(self, bits_per_second: u64) -> Self {
        Bandwidth { upload: Some(bits_per_second), ..self }
    }

    /// The same with another limit for what the sandbox receives.
    #[must_use]
    pub fn download(self, bits_per_second: u64) -> Self {
        Bandwidth { download: Some(bits_per_second), ..self }
    }
}
