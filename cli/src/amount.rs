//! Sizes and durations as people write them.

use std::time::Duration;

/// A size with a unit (`b`, `k`, `m`, `g`, `t`, powers of 1024, `512m` or `512MiB`) in MiB, rounded up. A number alone
/// is refused: docker would take it for bytes, most people mean MiB.
pub fn mebibytes(text: &str) -> Result<u32, String> {
    let wrong = || format!("give a number and a unit, such as 512m or 2g, not {text:?}");
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let mebibytes = number.checked_mul(1 << shift).map(|bytes| bytes.div_ceil(1 << 20));
    mebibytes.and_then(|size| size.try_into().ok()).ok_or_else(|| format!("{text} is too much"))
}

/// A duration: seconds, or numbers with units (`ms`, `s`, `m`, `h`, `d`): `90`, `1m30s`, `250ms`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("give seconds or a duration such as 90s, 1m30s or 2h, not {text:?}");
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let (unit, next) = after.split_at(letters);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let part = number.checked_mul(milliseconds).map(Duration::from_millis);
        total = part.and_then(|part| total.checked_add(part)).ok_or_else(|| format!("{text} is too long"))?;
        rest = next;
    }
    if text.is_empty() { Err(wrong()) } else { Ok(total) }
}

/// A duration in whole seconds, rounded up.
pub fn seconds(text: &str) -> Result<u64, String> {
    let duration = duration(text)?;
    Ok(duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0)))
}

/// Bytes as people read them, decimal as `ls -h --si` and download bars have them.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if count < 1000 {
        return format!("{count} B");
    }
    let mut value = count;
    let mut chosen = "B";
    let mut tenth = 0;
    for unit in UNITS {
        tenth = value % 1000 / 100;
        value /= 1000;
        chosen = unit;
        if value < 1000 {
            break;
        }
    }
    format!("{value}.{tenth} {chosen}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_are_rounded_up() {
        for (text, size) in [
            ("512m", 512),
            ("1g", 1024),
            ("2GiB", 2048),
            ("1048577b", 2),
            ("1k", 1),
            ("1t", 1 << 20),
            ("0m", 0),
        ] {
            assert_eq!(mebibytes(text), Ok(size), "{text}");
        }
        for text in [
            "",
            "512",
            "m",
            "-1m",
            "1.5g",
            "1 g",
            "1e3m",
            "99999999999999999999m",
            "18446744073709551615t",
            "4097t",
        ] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_add_up() {
        for (text, milliseconds) in [
            ("90", 90_000),
            ("1m30s", 90_000),
            ("250ms", 250),
            ("2h", 7_200_000),
            ("1d1s", 86_401_000),
            ("0", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "s", "1x", "1m30", "-1", "1.5s", "18446744073709551615d", " 1s"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert_eq!(seconds("1500ms"), Ok(2));
        assert_eq!(seconds("2s"), Ok(2));
    }

    #[test]
    fn bytes_are_short() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (45_678_901, "45.6 MB"),
            (u64::MAX, "18446744.0 TB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
