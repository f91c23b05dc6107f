//! The keys that leave a terminal and let its command go on: docker's, `ctrl-p,ctrl-q`, unless somebody chooses others.

/// Most keys that there may be.
const MOST: usize = 8;

/// A sequence of keys, as the bytes that a terminal in raw mode sends for them. It may be empty: then nothing leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DetachKeys {
    bytes: [u8; MOST],
    length: usize,
}

impl DetachKeys {
    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// Docker's.
impl Default for DetachKeys {
    fn default() -> Self {
        const CTRL_P: u8 = 0x10;
        const CTRL_Q: u8 = 0x11;
        Self { bytes: [CTRL_P, CTRL_Q, 0, 0, 0, 0, 0, 0], length: 2 }
    }
}

impl std::str::FromStr for DetachKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut keys = Self { bytes: [0; MOST], length: 0 };
        for word in text.split(',').filter(|_| !text.is_empty()) {
            let byte = key(word).ok_or_else(|| {
                format!("{word:?} is no key: write single characters and ctrl-a to ctrl-z, with commas between them")
            })?;
            *keys.bytes.get_mut(keys.length).ok_or_else(|| format!("at most {MOST} keys"))? = byte;
            keys.length += 1;
        }
        Ok(keys)
    }
}

/// The byte of one key (ASCII's control characters are the letters' without their upper bits).
fn key(word: &str) -> Option<u8> {
    let control = word.strip_prefix("ctrl-");
    let &[byte] = control.unwrap_or(word).as_bytes() else { return None };
    match (control, byte) {
        (None, 0x21..=0x7e) => Some(byte),
        (Some(_), b'a'..=b'z' | b'@' | b'['..=b'_') => Some(byte & 0x1f),
        _ => None,
    }
}

/// Looks for the keys in what is typed. What may be their beginning is held back until it is clear.
#[derive(Debug)]
pub struct Watch {
    keys: DetachKeys,
    seen: usize,
}

impl Watch {
    /// For these keys.
    pub fn new(keys: DetachKeys) -> Self {
        Self { keys, seen: 0 }
    }

    /// Adds to `out` what of `typed` is the command's. Whether the keys were typed; what follows them is nobody's.
    pub fn pass(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        let keys = self.keys;
        let keys = keys.bytes();
        for &byte in typed {
            // The longest beginning of the keys that ends what was typed, as far as it is not the command's yet.
            let mut held = keys.get(..self.seen).unwrap_or_default().to_vec();
            held.push(byte);
            let keep = (0..=held.len().min(keys.len()))
                .rev()
                .find(|&length| held.get(held.len() - length..) == keys.get(..length));
            self.seen = keep.unwrap_or(0);
            if self.seen == keys.len() && !keys.is_empty() {
                self.seen = 0;
                return true;
            }
            out.extend_from_slice(held.get(..held.len() - self.seen).unwrap_or_default());
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_written_as_docker_writes_them() {
        let bytes = |text: &str| text.parse::<DetachKeys>().map(|keys| keys.bytes().to_vec());
        assert_eq!(bytes("ctrl-p,ctrl-q"), Ok(vec![0x10, 0x11]));
        assert_eq!("ctrl-p,ctrl-q".parse(), Ok(DetachKeys::default()));
        assert_eq!(bytes("ctrl-],a,Z"), Ok(vec![0x1d, b'a', b'Z']));
        assert_eq!(bytes(""), Ok(Vec::new()));
        for wrong in ["ctrl-", "ctrl-1", "ab", ",", "ü", "a,b,c,d,e,f,g,h,i"] {
            assert!(bytes(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_typed_passes_but_for_the_keys() {
        let run = |keys: &str, typed: &[u8], cut: usize| {
            let mut watch = Watch::new(keys.parse().unwrap());
            let mut out = Vec::new();
            let left = typed.chunks(cut).any(|typed| watch.pass(typed, &mut out));
            (out, left)
        };
        for cut in [1, 2, 100] {
            assert_eq!(run("ctrl-p,ctrl-q", b"ls\x10\x11rest", cut), (b"ls".to_vec(), true));
            assert_eq!(run("ctrl-p,ctrl-q", b"\x10\x10\x11", cut), (b"\x10".to_vec(), true));
            assert_eq!(run("ctrl-p,ctrl-q", b"\x10x\x11", cut), (b"\x10x\x11".to_vec(), false));
            assert_eq!(run("a,a,b", b"aaab", cut), (b"a".to_vec(), true));
            assert_eq!(run("", b"\x10\x11", cut), (b"\x10\x11".to_vec(), false));
        }
        // A beginning alone waits.
        assert_eq!(run("ctrl-p,ctrl-q", b"x\x10", 1), (b"x".to_vec(), false));
    }
}
