//! Rings of bytes that hold memory only while bytes wait in them, from a pool with a hard limit.

/// The smallest ring with memory; each size is twice the one before.
const SMALLEST: usize = 4 << 10;
const SIZES: usize = 9;
/// Memory that is kept for the next ring rather than given back.
const KEPT: usize = 8 << 20;

/// What a ring may hold while all together hold so much that the next one's memory would soon be the host's to give, which
/// clears each page: more than what is under way to the guest, and one segment behind it.
const FAIR: usize = 128 << 10;
const CROWD: usize = KEPT / 2;

/// What all rings together may hold.
#[derive(Debug)]
pub(crate) struct Pool {
    free: [Vec<Box<[u8]>>; SIZES],
    kept: usize,
    used: usize,
    limit: usize,
}

impl Pool {
    pub(crate) fn new(limit: usize) -> Self {
        Pool { free: Default::default(), kept: 0, used: 0, limit }
    }

    /// Bytes that rings hold now.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Bytes that rings may still take.
    pub(crate) fn room(&self) -> usize {
        self.limit.saturating_sub(self.used)
    }

    /// Bytes that one ring may hold now.
    pub(crate) fn share(&self) -> usize {
        if self.used < CROWD { usize::MAX } else { FAIR }
    }

    fn take(&mut self, size: usize) -> Option<Box<[u8]>> {
        if size > self.room() {
            return None;
        }
        self.used += size;
        let class = usize::try_from((size / SMALLEST).trailing_zeros()).unwrap_or(SIZES);
        match self.free.get_mut(class).and_then(Vec::pop) {
            Some(bytes) => {
                self.kept -= size;
                Some(bytes)
            }
            None => Some(vec![0; size].into_boxed_slice()),
        }
    }

    fn give(&mut self, bytes: Box<[u8]>) {
        let size = bytes.len();
        self.used -= size;
        let class = usize::try_from((size / SMALLEST).trailing_zeros()).unwrap_or(SIZES);
        if let Some(free) = self.free.get_mut(class).filter(|_| size > 0 && self.kept + size <= KEPT) {
            self.kept += size;
            free.push(bytes);
        }
    }
}

/// Bytes in order. Its memory is a power of two, from the pool, and goes back there with the last byte: whoever drops a
/// ring that is not empty calls [`Ring::release`] first.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    bytes: Box<[u8]>,
    start: usize,
    len: usize,
}

impl Ring {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for `n` more bytes, or for as many as the pool still has; returns for how many.
    pub(crate) fn reserve(&mut self, n: usize, pool: &mut Pool) -> usize {
        let spare = self.bytes.len() - self.len;
        if n <= spare {
            return n;
        }
        let size = (self.len + n).next_power_of_two().clamp(SMALLEST, SMALLEST << (SIZES - 1));
        if size > self.bytes.len()
            && let Some(mut bigger) = pool.take(size)
        {
            let (first, second) = self.slices(0, self.len);
            if let Some((to, rest)) = bigger.split_at_mut_checked(first.len()) {
                to.copy_from_slice(first);
                if let Some(to) = rest.get_mut(..second.len()) {
                    to.copy_from_slice(second);
                }
            }
            pool.give(std::mem::replace(&mut self.bytes, bigger));
            self.start = 0;
        }
        n.min(self.bytes.len() - self.len)
    }

    /// Up to `n` bytes behind the last one, for the caller to fill before [`Ring::commit`].
    pub(crate) fn spare(&mut self, n: usize) -> (&mut [u8], &mut [u8]) {
        let n = n.min(self.bytes.len() - self.len);
        let begin = self.wrap(self.start + self.len);
        let first = n.min(self.bytes.len() - begin);
        match self.bytes.split_at_mut_checked(begin) {
            Some((low, high)) => {
                (high.get_mut(..first).unwrap_or_default(), low.get_mut(..n - first).unwrap_or_default())
            }
            None => (&mut [], &mut []),
        }
    }

    /// Says how many bytes of [`Ring::spare`] have been filled.
    pub(crate) fn commit(&mut self, n: usize) {
        self.len = (self.len + n).min(self.bytes.len());
    }

    /// Takes as much of `data` as the pool has room for; returns how much.
    pub(crate) fn push(&mut self, data: &[u8], pool: &mut Pool) -> usize {
        let n = self.reserve(data.len(), pool);
        let (first, second) = self.spare(n);
        let split = first.len();
        first.copy_from_slice(data.get(..split).unwrap_or_default());
        second.copy_from_slice(data.get(split..n).unwrap_or_default());
        self.commit(n);
        n
    }

    /// Up to `n` bytes from the one at `offset` on, in their order.
    pub(crate) fn slices(&self, offset: usize, n: usize) -> (&[u8], &[u8]) {
        let offset = offset.min(self.len);
        let n = n.min(self.len - offset);
        let begin = self.wrap(self.start + offset);
        let first = n.min(self.bytes.len() - begin);
        (
            self.bytes.get(begin..begin + first).unwrap_or_default(),
            self.bytes.get(..n - first).unwrap_or_default(),
        )
    }

    /// Forgets the first `n` bytes.
    pub(crate) fn consume(&mut self, n: usize, pool: &mut Pool) {
        let n = n.min(self.len);
        self.start = self.wrap(self.start + n);
        self.len -= n;
        if self.len == 0 {
            self.release(pool);
        }
    }

    /// Forgets everything.
    pub(crate) fn release(&mut self, pool: &mut Pool) {
        if !self.bytes.is_empty() {
            pool.give(std::mem::take(&mut self.bytes));
        }
        (self.start, self.len) = (0, 0);
    }

    fn wrap(&self, at: usize) -> usize {
        if at >= self.bytes.len() { at - self.bytes.len() } else { at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn bytes_leave_in_order_and_memory_goes_back() {
        let mut pool = Pool::new(64 << 10);
        let (mut ring, mut model) = (Ring::default(), VecDeque::new());
        let mut next = 0u8;
        for round in 0..4000usize {
            let some: Vec<u8> = (0..(round * 7919) % 3001)
                .map(|_| {
                    next = next.wrapping_add(1);
                    next
                })
                .collect();
            let taken = ring.push(&some, &mut pool);
            model.extend(&some[..taken]);
            let (offset, n) = ((round * 31) % 500, (round * 4801) % 4000);
            let (first, second) = ring.slices(offset, n);
            assert!(first.iter().chain(second).eq(model.iter().skip(offset).take(n)), "round {round}");
            let n = (round * 104_729) % 3100;
            ring.consume(n, &mut pool);
            model.drain(..n.min(model.len()));
            assert_eq!(ring.len(), model.len());
            assert!(pool.used() <= 64 << 10);
            assert_eq!(pool.used() == 0, ring.is_empty());
        }
        ring.release(&mut pool);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn an_exhausted_pool_takes_what_fits_and_no_more() {
        let mut pool = Pool::new(4 << 10);
        let (mut one, mut other) = (Ring::default(), Ring::default());
        assert_eq!(one.push(&[1; 5000], &mut pool), 0, "8 KiB do not fit");
        assert_eq!(one.push(&[1; 4000], &mut pool), 4000);
        assert_eq!(one.push(&[1; 4000], &mut pool), 96);
        assert_eq!(other.push(&[1], &mut pool), 0);
        one.consume(4096, &mut pool);
        assert_eq!(other.push(&[1], &mut pool), 1);
    }
}
