//! A bounded queue of bytes in one piece.

/// Bytes in order, at most `limit` of them. Memory grows with use, never beyond the limit, and moves only when
/// consumed bytes make up at least half of what it holds.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    limit: usize,
}

impl Buffer {
    pub(super) fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), start: 0, limit }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn room(&self) -> usize {
        self.limit - self.len()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or(&[])
    }

    /// Makes `n` bytes at the end, to be filled by the caller; `None` if they do not fit.
    pub(super) fn grow(&mut self, n: usize) -> Option<&mut [u8]> {
        if n > self.room() {
            return None;
        }
        let needed = self.bytes.len() + n;
        if needed > self.bytes.capacity() {
            if self.start >= self.len() || needed > self.limit {
                self.bytes.drain(..self.start);
                self.start = 0;
            }
            let needed = self.bytes.len() + n;
            let wanted = (2 * self.bytes.capacity()).clamp(needed, self.limit);
            self.bytes.reserve_exact(wanted - self.bytes.len());
        }
        let end = self.bytes.len();
        self.bytes.resize(end + n, 0);
        self.bytes.get_mut(end..)
    }

    /// Takes as much of `data` as fits.
    pub(super) fn push(&mut self, data: &[u8]) -> usize {
        let n = data.len().min(self.room());
        if let (Some(to), Some(from)) = (self.grow(n), data.get(..n)) {
            to.copy_from_slice(from);
        }
        n
    }

    /// Forgets the first bytes; returns how many there were.
    pub(super) fn consume(&mut self, n: usize) -> usize {
        let n = n.min(self.len());
        self.start += n;
        if self.is_empty() {
            self.bytes.clear();
            self.start = 0;
        }
        n
    }

    /// Forgets everything, memory included.
    pub(super) fn release(&mut self) {
        self.bytes = Vec::new();
        self.start = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_order_and_memory_stays_in_bounds() {
        let mut buffer = Buffer::new(100);
        let (mut fed, mut taken) = (0u8, 0u8);
        for round in 0..1000usize {
            let some: Vec<u8> = (0..round % 37).map(|i| fed.wrapping_add(u8::try_from(i).unwrap())).collect();
            fed = fed.wrapping_add(u8::try_from(buffer.push(&some)).unwrap());
            for byte in buffer.bytes().iter().take(round % 31) {
                assert_eq!(*byte, taken);
                taken = taken.wrapping_add(1);
            }
            buffer.consume(round % 31);
            assert!(buffer.bytes.capacity() <= 100 && buffer.len() <= 100);
        }
        assert!(taken > 0);
    }
}
