//! One line of a guest process: which event it is, or why it is none. The rest of it is for whoever reads it.

use std::borrow::Cow;

use cubby_protocol::message::{MAX_EVENT, MAX_EVENT_DEPTH, MAX_EVENT_NAME};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// Why a line is no event. The words need no escape in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It has no end within the limit.
    #[error("the line is longer than {MAX_EVENT} bytes")]
    TooLong,
    /// It is not UTF-8.
    #[error("the line is not UTF-8")]
    NotText,
    /// It is not JSON.
    #[error("the line is not JSON at byte {0}")]
    NotJson(usize),
    /// It is another value.
    #[error("the line is no object whose event is a string")]
    NotAnEvent,
    /// The name is none.
    #[error("an event's name has 1 to {MAX_EVENT_NAME} bytes")]
    BadName,
    /// Nobody has to read that.
    #[error("the line is nested deeper than {MAX_EVENT_DEPTH}")]
    TooDeep,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(default, rename = "data")]
    _data: IgnoredAny,
}

/// The line as text and its event's name; `None` for a blank line.
pub fn read(line: &[u8]) -> Result<Option<(Cow<'_, str>, &str)>, Fault> {
    let text = std::str::from_utf8(line).map_err(|_| Fault::NotText)?;
    let text = text.trim_matches([' ', '\t', '\r']);
    if text.is_empty() {
        return Ok(None);
    }
    if depth(text) > MAX_EVENT_DEPTH {
        return Err(Fault::TooDeep);
    }
    let line: Line<'_> = serde_json::from_str(text)
        .map_err(|error| if error.is_data() { Fault::NotAnEvent } else { Fault::NotJson(error.column()) })?;
    // A list of two would do for the deserialiser.
    if !text.starts_with('{') {
        return Err(Fault::NotAnEvent);
    }
    if !(1..=MAX_EVENT_NAME).contains(&line.event.len()) {
        return Err(Fault::BadName);
    }
    Ok(Some((line.event, text)))
}

/// How deep brackets outside of strings lie in each other.
fn depth(text: &str) -> usize {
    let (mut now, mut most, mut quoted, mut escaped) = (0usize, 0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => {
                now += 1;
                most = most.max(now);
            }
            b']' | b'}' if !quoted => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(line: &str) -> Result<Option<String>, Fault> {
        read(line.as_bytes()).map(|event| event.map(|(name, _)| name.into_owned()))
    }

    #[test]
    fn an_event_is_an_object_with_a_name() {
        for (line, expected) in [
            (r#"{"event":"a"}"#, "a"),
            (r#"  { "data": [1, {"event": 2}], "event": "b", "more": null }"#, "b"),
            ("{\"event\":\"c\",\"data\":-1.5e300}\r", "c"),
            (r#"{"event":"\u00e9\n\"","data":"]]]"}"#, "é\n\""),
            (r#"{"event":"*","data":{}}"#, "*"),
        ] {
            assert_eq!(name(line), Ok(Some(expected.into())), "{line}");
        }
        for blank in ["", " \t", "\r"] {
            assert_eq!(name(blank), Ok(None));
        }
    }

    #[test]
    fn what_is_none_says_why() {
        for (line, fault) in [
            ("hello", Fault::NotJson(1)),
            (r#"{"event":"a""#, Fault::NotJson(12)),
            (r#"{"event":"a"} x"#, Fault::NotJson(15)),
            (r#"{"event":"a"}{"event":"b"}"#, Fault::NotJson(14)),
            (r#"{"event":"a","data":01}"#, Fault::NotJson(22)),
            (r#"["a",1]"#, Fault::NotAnEvent),
            (r#""a""#, Fault::NotAnEvent),
            (r#"{"data":1}"#, Fault::NotAnEvent),
            (r#"{"event":1}"#, Fault::NotAnEvent),
            (r#"{"event":"a","event":"b"}"#, Fault::NotAnEvent),
            (r#"{"event":""}"#, Fault::BadName),
        ] {
            assert_eq!(name(line), Err(fault), "{line}");
        }
        assert_eq!(name(&format!(r#"{{"event":"{}"}}"#, "x".repeat(257))), Err(Fault::BadName));
        assert_eq!(read(b"{\"event\":\"\xff\"}").unwrap_err(), Fault::NotText);
        let nested = |depth| format!(r#"{{"event":"a","data":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
        assert_eq!(name(&nested(MAX_EVENT_DEPTH - 1)), Ok(Some("a".into())));
        assert_eq!(name(&nested(MAX_EVENT_DEPTH)), Err(Fault::TooDeep));
        // Brackets in strings are text, and no stack is used for those that are none.
        let text = format!(r#"{{"event":"a","data":"\"{}"}}"#, "[".repeat(1000));
        assert_eq!(name(&text), Ok(Some("a".into())));
        assert_eq!(name(&nested(100_000)), Err(Fault::TooDeep));
    }

    #[test]
    fn faults_are_json_as_they_are() {
        for fault in [
            Fault::TooLong,
            Fault::NotText,
            Fault::NotJson(usize::MAX),
            Fault::NotAnEvent,
            Fault::BadName,
            Fault::TooDeep,
        ] {
            assert!(
                fault.to_string().chars().all(|c| c.is_ascii() && !c.is_control() && !"\"\\".contains(c))
            );
        }
    }
}
