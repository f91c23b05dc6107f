//! PAX extended headers (POSIX.1-2017, pax § Extended Header): records of `LENGTH KEY=VALUE\n` that override
//! fields of the next entry. Also the GNU sparse maps that travel in them.
use std::collections::BTreeMap;

use super::tar::{Malformed, Time};

/// What the records before an entry say about it.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: Sparse,
}

/// The `GNU.sparse.*` records (GNU tar manual, "PAX Format, Versions 0.0, 0.1 and 1.0").
#[derive(Debug, Default)]
pub(super) struct Sparse {
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Numbers of the map, offset and length in turn (versions 0.0 and 0.1).
    pub(super) map: Vec<u64>,
}

impl Pax {
    /// Adds the records in `bytes`; a later record replaces an earlier one of the same key.
    pub(super) fn parse(&mut self, mut bytes: &[u8]) -> Result<(), Malformed> {
        while !bytes.is_empty() {
            // Some writers pad with NUL bytes.
            if bytes.iter().all(|&byte| byte == 0) {
                break;
            }
            let bad = || Malformed("pax record without a valid length".into());
            let space = bytes.iter().position(|&byte| byte == b' ').ok_or_else(bad)?;
            let length = bytes.get(..space).and_then(decimal).ok_or_else(bad)?;
            let length = usize::try_from(length).map_err(|_| bad())?;
            let record = bytes.get(space + 1..length).ok_or_else(bad)?;
            let record = record.strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(bad)?;
            let (key, value) = (record.get(..equals), record.get(equals + 1..));
            self.record(key.unwrap_or_default(), value.unwrap_or_default())?;
            bytes = bytes.get(length..).unwrap_or_default();
        }
        Ok(())
    }

    /// An empty value takes back what was said before (POSIX.1-2017, pax § pax Extended Header); so an
    /// extended attribute without a value cannot be said, and is not there for Go's readers either.
    fn forget(&mut self, key: &[u8]) {
        match key {
            b"path" => self.path = None,
            b"linkpath" => self.link = None,
            b"size" => self.size = None,
            b"uid" => self.uid = None,
            b"gid" => self.gid = None,
            b"mtime" => self.mtime = None,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.remove(name);
                }
            }
        }
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Malformed> {
        let bad = || Malformed(format!("pax record {} has no valid value", String::from_utf8_lossy(key)));
        let number = || decimal(value).ok_or_else(bad);
        if value.is_empty() {
            self.forget(key);
            return Ok(());
        }
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.mtime = Some(time(value).ok_or_else(bad)?),
            b"GNU.sparse.major" => self.sparse.major = Some(number()?),
            b"GNU.sparse.minor" => self.sparse.minor = Some(number()?),
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.real_size = Some(number()?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse.map.push(number()?),
            b"GNU.sparse.map" => {
                let numbers = value.split(|&byte| byte == b',').map(|text| decimal(text).ok_or_else(bad));
                self.sparse.map = numbers.collect::<Result<_, _>>()?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        Ok(())
    }
}

/// A decimal number of ASCII digits, and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |sum, &byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    })
}

/// Seconds since 1970 as `[-]S[.F]`; digits below a nanosecond are dropped.
fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|&byte| byte == b'.') {
        Some(dot) => (text.get(..dot)?, text.get(dot + 1..)?),
        None => (text, &[][..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut nanos = fraction
        .get(..fraction.len().min(9))
        .map_or(Some(0), |f| if f.is_empty() { Some(0) } else { decimal(f) })?;
    for _ in fraction.len().min(9)..9 {
        nanos *= 10;
    }
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let nanos = u32::try_from(nanos).ok()?;
    Some(match (negative, nanos) {
        (false, _) => Time { seconds, nanos },
        (true, 0) => Time { seconds: -seconds, nanos: 0 },
        (true, _) => Time { seconds: -seconds - 1, nanos: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_override_and_xattrs_keep_their_bytes() {
        let mut pax = Pax::default();
        pax.parse(b"11 path=ab\n11 path=cd\n20 mtime=12.3456789\n30 SCHILY.xattr.user.x=\0=\n\xff..\n")
            .unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"cd"[..]));
        assert_eq!(pax.mtime, Some(Time { seconds: 12, nanos: 345_678_900 }));
        assert_eq!(pax.xattrs[&b"user.x"[..]], b"\0=\n\xff..");
    }

    #[test]
    fn an_empty_value_takes_back_what_was_said() {
        let mut pax = Pax::default();
        pax.parse(b"11 path=ab\n22 SCHILY.xattr.u.a=1\n").unwrap();
        assert_eq!(pax.xattrs.len(), 1);
        pax.parse(b"8 path=\n21 SCHILY.xattr.u.a=\n").unwrap();
        assert_eq!((pax.path, pax.xattrs.len()), (None, 0));
    }

    #[test]
    fn times_before_1970_round_towards_the_past() {
        assert_eq!(time(b"-1.25"), Some(Time { seconds: -2, nanos: 750_000_000 }));
        assert_eq!(time(b"-3"), Some(Time { seconds: -3, nanos: 0 }));
        assert_eq!(time(b"1."), Some(Time { seconds: 1, nanos: 0 }));
        for bad in [&b""[..], b".5", b"1.x", b"--1", b"99999999999999999999"] {
            assert_eq!(time(bad), None);
        }
    }

    #[test]
    fn broken_records_are_refused() {
        for bad in [
            &b"x"[..],
            b"5 a=b",
            b"99 a=b\n",
            b"0 a=b\n",
            b"6 abc\n",
            b"2 \n",
            b"12 size=-10\n",
            b"18446744073709551616 a=b\n",
        ] {
            assert!(Pax::default().parse(bad).is_err(), "{bad:?}");
        }
    }
}
