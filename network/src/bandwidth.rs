//! How much may pass in a second: a bucket for each direction, whose tokens are bytes. Nothing is dropped for want of
//! them. A frame passes while there is something in the bucket, and may leave it in debt, by less than its own length;
//! whoever comes next waits in the guest's ring, or in the host's socket, until the debt is paid.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// How many bytes of frames may pass in a second, each way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// From the guest. `None`: as many as come.
    pub from_guest: Option<NonZeroU64>,
    /// To the guest. `None`: as many as come.
    pub to_guest: Option<NonZeroU64>,
}

/// How long a guest that was silent saves up for, but for [`LEAST_BURST`].
const BURST: Duration = Duration::from_millis(100);

/// What it may always save up, in bytes: two of the largest frames.
const LEAST_BURST: u64 = 128 << 10;

const NANOS: i128 = 1_000_000_000;

#[derive(Debug)]
pub(crate) struct Bucket {
    /// Bytes in a second.
    rate: Option<i128>,
    /// The most that is saved up, and what is there, in billionths of bytes.
    most: i128,
    level: i128,
    filled_at: Instant,
    /// Until when somebody waits.
    awaited: Option<Instant>,
}

impl Bucket {
    pub(crate) fn new(rate: Option<NonZeroU64>, now: Instant) -> Self {
        let rate = rate.map(|rate| i128::from(rate.get()));
        let nanos = i128::try_from(BURST.as_nanos()).unwrap_or(NANOS);
        let most = (rate.unwrap_or_default() * nanos).max(i128::from(LEAST_BURST) * NANOS);
        Bucket { rate, most, level: most, filled_at: now, awaited: None }
    }

    /// Whether a frame may pass now. If not, [`Bucket::awaited`] says when one may.
    pub(crate) fn is_open(&mut self, now: Instant) -> bool {
        let Some(rate) = self.rate else { return true };
        let passed = now.saturating_duration_since(self.filled_at).as_nanos();
        let gained = i128::try_from(passed).unwrap_or(i128::MAX).saturating_mul(rate);
        self.level = self.level.saturating_add(gained).min(self.most);
        self.filled_at = self.filled_at.max(now);
        let missing = 1 - self.level;
        self.awaited = (missing > 0).then(|| {
            let wait = u64::try_from((missing + rate - 1) / rate).unwrap_or(u64::MAX);
            now + Duration::from_nanos(wait)
        });
        missing <= 0
    }

    /// A frame of so many bytes has passed.
    pub(crate) fn take(&mut self, bytes: usize) {
        if self.rate.is_some() {
            self.level -= i128::try_from(bytes).unwrap_or(i128::MAX / NANOS) * NANOS;
        }
    }

    /// When somebody who was kept waiting may pass.
    pub(crate) fn awaited(&self) -> Option<Instant> {
        self.awaited
    }

    /// Nobody needs to be woken for a time that has passed.
    pub(crate) fn on_time(&mut self, now: Instant) {
        self.awaited = self.awaited.filter(|at| *at > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes frames of one size whenever the bucket allows, and gives the bytes that passed in this time.
    fn pass(rate: u64, frame: usize, time: Duration) -> u64 {
        let begin = Instant::now();
        let mut bucket = Bucket::new(NonZeroU64::new(rate), begin);
        let (mut now, mut passed) = (begin, 0);
        while now < begin + time {
            if bucket.is_open(now) {
                bucket.take(frame);
                passed += frame as u64;
                assert!(passed < 1 << 29, "nothing holds it back");
            } else {
                let next = bucket.awaited().unwrap();
                assert!(next > now, "no time passes");
                now = next;
                bucket.on_time(now);
                assert_eq!(bucket.awaited(), None);
            }
        }
        passed
    }

    #[test]
    fn the_rate_is_kept_whatever_the_frames_and_the_burst_is_what_was_saved() {
        for (rate, ms) in [(125_000, 60_000), (12_500_000, 1000), (1_250_000_000, 20)] {
            let time = Duration::from_millis(ms);
            let burst = (rate / 10).max(LEAST_BURST);
            for frame in [60, 1514, 65_550] {
                let passed = pass(rate, frame, time);
                let least = burst + rate * ms / 1000;
                assert!(
                    (least..=least + 2 * frame as u64).contains(&passed),
                    "{rate} B/s, {frame}: {passed}, {least}"
                );
            }
        }
    }

    #[test]
    fn what_is_saved_up_is_bounded_and_time_may_stand_still() {
        let begin = Instant::now();
        let mut bucket = Bucket::new(NonZeroU64::new(1_000_000), begin);
        let later = begin + Duration::from_secs(1 << 32);
        assert!(bucket.is_open(later));
        bucket.take(128 << 10);
        assert!(!bucket.is_open(later));
        // The clock of a guest that was paused may be behind.
        assert!(!bucket.is_open(begin));
        assert!(bucket.is_open(later + Duration::from_micros(1)));
    }

    #[test]
    fn without_a_rate_everything_passes() {
        let now = Instant::now();
        let mut bucket = Bucket::new(None, now);
        bucket.take(usize::MAX);
        assert!(bucket.is_open(now));
        assert_eq!(bucket.awaited(), None);
    }
}
