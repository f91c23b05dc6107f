//! How much a sandbox may send and receive, on the command line.

use cubbyhole::Bandwidth;

const FORM: &str = "write 10mbit, or up=10mbit,down=1gbit";

/// `RATE`, or `up=RATE,down=RATE` of which one may be left out. A rate is in bits per second, as tc(8) writes them.
pub fn bandwidth(text: &str) -> Result<Bandwidth, String> {
    if !text.contains('=') {
        return rate(text).map(Bandwidth::both);
    }
    text.split(',').try_fold(Bandwidth::default(), |bandwidth, part| match part.split_once('=') {
        Some(("up" | "upload", bits)) => Ok(bandwidth.upload(rate(bits)?)),
        Some(("down" | "download", bits)) => Ok(bandwidth.download(rate(bits)?)),
        _ => Err(format!("{part:?} is neither up nor down: {FORM}")),
    })
}

fn rate(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let scale = match unit.to_ascii_lowercase().as_str() {
        "bit" => 1,
        "k" | "kbit" => 1_000,
        "m" | "mbit" => 1_000_000,
        "g" | "gbit" => 1_000_000_000,
        _ => return Err(format!("{text:?} is no rate: {FORM}")),
    };
    let bits = number.parse::<u64>().ok().and_then(|number| number.checked_mul(scale));
    bits.ok_or_else(|| format!("{text:?} is no rate: {FORM}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_bits_and_one_goes_for_both_directions() {
        assert_eq!(bandwidth("10mbit"), Ok(Bandwidth::both(10_000_000)));
        assert_eq!(bandwidth("2G"), Ok(Bandwidth::both(2_000_000_000)));
        assert_eq!(bandwidth("up=1500kbit"), Ok(Bandwidth::default().upload(1_500_000)));
        assert_eq!(
            bandwidth("down=1gbit,up=64000000bit"),
            Ok(Bandwidth { upload: Some(64_000_000), download: Some(1_000_000_000) })
        );
        for wrong in ["", "10", "mbit", "-1mbit", "10mb", "1.5m", "in=1m", "up=1m,", "99999999999g"] {
            assert!(bandwidth(wrong).unwrap_err().contains("10mbit"), "{wrong}");
        }
    }
}
