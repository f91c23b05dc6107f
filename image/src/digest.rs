//! Content digests (OCI image-spec, descriptor.md § Digests): `sha256:` or `sha512:` and lower-case hex.
//! Every byte that enters the store is checked against one; a digest that does not parse is refused, so
//! that its text is safe as a file name.
use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

use crate::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    fn hex_len(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// The digest of some content, such as a manifest or a layer. Displays as `sha256:…`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    algorithm: Algorithm,
    hex: String,
}

impl Digest {
    /// The SHA-256 digest of `bytes`.
    #[must_use]
    pub fn sha256(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        hasher.finish()
    }

    /// The hexadecimal part, without the algorithm.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// The algorithm's name, `sha256` or `sha512`.
    #[must_use]
    pub fn algorithm(&self) -> &'static str {
        self.algorithm.name()
    }

    /// `sha256-<hex>`: the digest as one path component.
    pub(crate) fn file_name(&self) -> String {
        format!("{}-{}", self.algorithm.name(), self.hex)
    }

    /// What [`Self::file_name`] was made from.
    pub(crate) fn from_file_name(name: &str) -> Option<Self> {
        name.replacen('-', ":", 1).parse().ok()
    }

    /// The first 16 bytes of the hash, for a file system's UUID.
    pub(crate) fn prefix(&self) -> [u8; 16] {
        let mut prefix = [0; 16];
        for (byte, pair) in prefix.iter_mut().zip(self.hex.as_bytes().chunks(2)) {
            let text = std::str::from_utf8(pair).unwrap_or("00");
            *byte = u8::from_str_radix(text, 16).unwrap_or(0);
        }
        prefix
    }

    /// A hasher that computes a digest of this one's kind.
    pub(crate) fn hasher(&self) -> Hasher {
        Hasher::new(self.algorithm)
    }

    /// Fails unless `bytes` have this digest; `what` names them in the error.
    pub(crate) fn verify(&self, bytes: &[u8], what: &str) -> Result<(), Error> {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        self.verify_hash(hasher, what)
    }

    /// Fails unless what `hasher` has seen has this digest.
    pub(crate) fn verify_hash(&self, hasher: Hasher, what: &str) -> Result<(), Error> {
        let actual = hasher.finish();
        if actual == *self {
            return Ok(());
        }
        Err(Error::DigestMismatch {
            what: what.to_owned(),
            expected: self.to_string(),
            actual: actual.to_string(),
        })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let refused = || InvalidDigest(text.chars().take(160).collect());
        let (name, hex) = text.split_once(':').ok_or_else(refused)?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(refused()),
        };
        let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if hex.len() != algorithm.hex_len() || !hex.bytes().all(lower_hex) {
            return Err(refused());
        }
        Ok(Self { algorithm, hex: hex.to_owned() })
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// Text that is not `sha256:` and 64, or `sha512:` and 128, lower-case hexadecimal digits.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0:?} is not a digest: sha256:<64 hex digits> or sha512:<128 hex digits> expected")]
pub struct InvalidDigest(String);

/// A running hash over bytes as they pass.
#[derive(Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
            Algorithm::Sha512 => Self::Sha512(Sha512::new()),
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        match self {
            Self::Sha256(hash) => Digest { algorithm: Algorithm::Sha256, hex: hex(&hash.finalize()) },
            Self::Sha512(hash) => Digest { algorithm: Algorithm::Sha512, hex: hex(&hash.finalize()) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_digest_is_the_hash_of_its_content() {
        assert_eq!(Digest::sha256(b"").to_string(), EMPTY);
        let digest: Digest = EMPTY.parse().unwrap();
        assert_eq!(digest.prefix()[..3], [0xe3, 0xb0, 0xc4]);
        assert!(digest.verify(b"", "nothing").is_ok());
        assert!(matches!(digest.verify(b"x", "one byte"), Err(Error::DigestMismatch { .. })));
    }

    #[test]
    fn text_that_could_leave_a_directory_is_no_digest() {
        for text in ["", "sha256", "sha256:", "sha256:../../../etc/passwd", "md5:00", "sha256:ABC", "../x:y"]
        {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
        assert!(EMPTY.to_uppercase().parse::<Digest>().is_err());
        assert!(format!("{EMPTY}0").parse::<Digest>().is_err());
    }
}
