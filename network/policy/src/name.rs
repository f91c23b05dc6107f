//! Names of hosts in rules.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which names a rule is about: `example.com` is that name alone, `*.example.com` what is below it, and
/// `.example.com` both. Letters are equal whatever their case.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePattern(String);

/// A text that is no pattern of names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{given:?} is no name: write example.com for that name, *.example.com for those below it, or .example.com for both"
)]
pub struct InvalidName {
    /// What was given, its first 64 characters at most.
    pub given: String,
}

/// Whether `text` is a name as DNS has them, without a dot at its end (RFC 1035 §2.3.4; `_` is used by SRV).
fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    text.len() <= 253 && text.split('.').all(label)
}

impl NamePattern {
    /// Whether the pattern is about this name, which may end in a dot.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name).as_bytes();
        let pattern = self.0.strip_prefix('*').unwrap_or(&self.0).as_bytes();
        let below = |suffix: &[u8]| {
            name.len() > suffix.len()
                && name.get(name.len() - suffix.len()..).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
        };
        match self.0.as_bytes().first() {
            Some(b'*') => below(pattern),
            Some(b'.') => below(pattern) || pattern.get(1..).is_some_and(|it| name.eq_ignore_ascii_case(it)),
            _ => name.eq_ignore_ascii_case(pattern),
        }
    }
}

impl FromStr for NamePattern {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let name = text.strip_prefix("*.").or_else(|| text.strip_prefix('.')).unwrap_or(text);
        if is_name(name) {
            Ok(NamePattern(text.to_ascii_lowercase()))
        } else {
            Err(InvalidName { given: text.chars().take(64).collect() })
        }
    }
}

impl TryFrom<String> for NamePattern {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<NamePattern> for String {
    fn from(pattern: NamePattern) -> String {
        pattern.0
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_labels() {
        for (pattern, yes, no) in [
            (
                "example.com",
                &["example.com", "EXAMPLE.com."][..],
                &["a.example.com", "xexample.com", "com", ""][..],
            ),
            (
                "*.example.com",
                &["a.example.com", "a.b.Example.Com"],
                &["example.com", "xexample.com", ".com"],
            ),
            (".example.com", &["example.com", "a.example.com."], &["xexample.com", "example.com.org"]),
            ("localhost", &["localhost"], &["a.localhost"]),
        ] {
            let pattern: NamePattern = pattern.parse().unwrap();
            for name in yes {
                assert!(pattern.matches(name), "{pattern} {name}");
            }
            for name in no {
                assert!(!pattern.matches(name), "{pattern} {name}");
            }
        }
        for wrong in ["", ".", "*", "*.", "a..b", "a b", "*a.com", "a.*.com", "ü.de", &"a".repeat(64)] {
            assert!(wrong.parse::<NamePattern>().is_err(), "{wrong}");
        }
    }
}
