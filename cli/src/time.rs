//! Moments as people and programs read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// RFC 3339 in UTC, to the millisecond. Moments before 1970 are 1970.
pub fn rfc3339(moment: SystemTime) -> String {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (day, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(day);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

/// Year, month and day so many days after 1 January 1970, counted in whole Gregorian cycles of 400 years (146,097 days)
/// and years that begin in March, so that the day that some years lack is the last.
fn date(days: u64) -> (u64, u64, u64) {
    const CYCLE: u64 = 146_097;
    // From 1 March of the year 0 to 1 January 1970.
    let days = days + 719_468;
    let (cycle, day) = (days / CYCLE, days % CYCLE);
    let year = (day - day / 1460 + day / 36_524 - day / (CYCLE - 1)) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Months from March have 31, 30, 31, 30, 31 days, and again: 153 in five.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (cycle * 400 + year + next, month, day)
}

/// The moment that RFC 3339 text in UTC names; a fraction of a second and the time of day may be missing.
pub fn moment(text: &str) -> Option<SystemTime> {
    let (date, time) = text.split_once('T').unwrap_or((text, "00:00:00Z"));
    let [year, month, day] = numbers(date, '-')?;
    let (time, fraction) = time.strip_suffix('Z').unwrap_or(time).split_once('.').unwrap_or((time, "0"));
    let [hour, minute, second] = numbers(time.strip_suffix('Z').unwrap_or(time), ':')?;
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 60 || fraction.len() > 9 {
        return None;
    }
    let nanoseconds = format!("{fraction:0<9}").parse().ok()?;
    let seconds = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    Some(UNIX_EPOCH + Duration::new(seconds, nanoseconds))
}

fn numbers(text: &str, separator: char) -> Option<[u64; 3]> {
    let mut numbers = [0; 3];
    let mut words = text.split(separator);
    for number in &mut numbers {
        let word = words.next().filter(|word| (2..=4).contains(&word.len()))?;
        *number = word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok())??;
    }
    words.next().is_none().then_some(numbers)
}

/// How many days after 1 January 1970 a date is: [`date`] the other way round.
fn days(year: u64, month: u64, day: u64) -> u64 {
    // Years begin in March, so that the day that some years lack is the last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468
}

/// How long ago something was: the largest unit alone.
pub fn ago(age: Duration) -> String {
    let seconds = age.as_secs();
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // As `date --utc --date=@N` prints them.
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
        assert!(rfc3339(UNIX_EPOCH + Duration::from_millis(1_234)).ends_with("01.234Z"));
    }

    #[test]
    fn moments_are_read_as_they_are_written() {
        for seconds in (0..4_200_000_000).step_by(86_400 * 3 + 12_345) {
            let at = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(moment(&rfc3339(at)), Some(at));
        }
        assert_eq!(moment("1970-01-02"), Some(UNIX_EPOCH + Duration::from_secs(86_400)));
        assert_eq!(moment("1970-01-01T00:00:01.5"), Some(UNIX_EPOCH + Duration::from_millis(1500)));
        for wrong in
            ["", "now", "1970-13-01", "1969-12-31", "1970-01-01T25:00:00Z", "1970-1-1", "1970-01-01-01"]
        {
            assert_eq!(moment(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn ages_have_one_unit() {
        for (seconds, text) in [
            (0, "0 seconds ago"),
            (1, "1 second ago"),
            (119, "1 minute ago"),
            (7200, "2 hours ago"),
            (90_000, "1 day ago"),
        ] {
            assert_eq!(ago(Duration::from_secs(seconds)), text);
        }
    }
}
