//! Sequence numbers, which begin again after 2³² (RFC 9293 §3.4).

/// A sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seq(pub(crate) u32);

impl Seq {
    /// The number `n` bytes later.
    pub(crate) fn plus(self, n: usize) -> Seq {
        // Lengths are of buffers far smaller than 2³²; more would wrap as sequence numbers do.
        Seq(self.0.wrapping_add(u32::try_from(n & 0xffff_ffff).unwrap_or(0)))
    }

    /// Bytes from `earlier` to here; 0 if it is not earlier.
    pub(crate) fn since(self, earlier: Seq) -> usize {
        if self.is_before(earlier) {
            return 0;
        }
        usize::try_from(self.0.wrapping_sub(earlier.0)).unwrap_or(0)
    }

    /// Whether this is in the half of all numbers before `other`.
    pub(crate) fn is_before(self, other: Seq) -> bool {
        self.0.wrapping_sub(other.0) >= 1 << 31
    }

    /// The later of two.
    pub(crate) fn latest(self, other: Seq) -> Seq {
        if self.is_before(other) { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_holds_across_the_wrap() {
        let near = Seq(u32::MAX - 1);
        let far = near.plus(10);
        assert_eq!(far, Seq(8));
        assert!(near.is_before(far) && !far.is_before(near) && !near.is_before(near));
        assert_eq!((far.since(near), near.since(far)), (10, 0));
        assert_eq!((near.latest(far), far.latest(near)), (far, far));
    }
}
