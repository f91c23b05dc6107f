//! Output of a command that waits, or is kept, in memory: pieces of one stream each, in their order.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use cubby_protocol::Kind;

/// Bytes after which a piece is not added to: what is thrown away at once.
const PIECE: usize = 16 << 10;

/// What a piece costs besides its bytes: a guest that writes single bytes to two streams in turn makes many.
const COST: usize = 64;

/// How much all backlogs together hold that count here, in bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quota(Rc<Cell<usize>>);

impl Quota {
    /// Most that is kept of all sessions of a sandbox, in bytes; of the session that goes beyond it less is kept.
    pub(crate) const MOST: usize = 32 << 20;
}

/// Pieces of output, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    pieces: VecDeque<(Kind, Vec<u8>)>,
    bytes: usize,
    quota: Quota,
    /// The memory of the piece that was thrown away last.
    spare: Vec<u8>,
}

impl Backlog {
    pub(crate) fn new(quota: &Quota) -> Self {
        let mut backlog = Self::default();
        backlog.quota = quota.clone();
        backlog
    }

    /// How many bytes of output there are.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// In how many pieces.
    pub(crate) fn pieces(&self) -> usize {
        self.pieces.len()
    }

    fn cost(&self) -> usize {
        self.bytes + COST * self.pieces.len()
    }

    /// Adds what was written to `kind`.
    pub(crate) fn push(&mut self, kind: Kind, mut bytes: &[u8]) {
        let before = self.cost();
        while !bytes.is_empty() {
            match self.pieces.back_mut() {
                Some((last, piece)) if *last == kind && piece.len() < PIECE => {
                    let (now, later) = bytes.split_at(bytes.len().min(PIECE - piece.len()));
                    piece.extend_from_slice(now);
                    self.bytes += now.len();
                    bytes = later;
                }
                _ => self.pieces.push_back((kind, std::mem::take(&mut self.spare))),
            }
        }
        self.quota.0.set(self.quota.0.get() + self.cost() - before);
    }

    /// Throws the oldest pieces away as long as `newest` bytes and what they cost are left, and more if all together are
    /// over their quota.
    pub(crate) fn trim(&mut self, newest: usize) {
        while let Some((_, oldest)) = self.pieces.front()
            && (self.cost() >= newest + oldest.len() + COST || self.quota.0.get() > Quota::MOST)
        {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        let before = self.cost();
        if let Some((_, mut piece)) = self.pieces.pop_front() {
            self.bytes -= piece.len();
            piece.clear();
            self.spare = piece;
        }
        self.quota.0.set(self.quota.0.get() - (before - self.cost()));
    }

    /// The oldest piece, or as much of it as `most` allows, for `take`; `None` if there is nothing, or nothing is allowed.
    pub(crate) fn take(&mut self, most: usize, take: impl FnOnce(Kind, &[u8])) -> Option<usize> {
        let (kind, piece) = self.pieces.front_mut()?;
        let count = piece.len().min(most);
        let now = piece.get(..count).filter(|now| !now.is_empty())?;
        take(*kind, now);
        if count == piece.len() {
            self.drop_oldest();
        } else {
            piece.drain(..count);
            self.bytes -= count;
            self.quota.0.set(self.quota.0.get() - count);
        }
        Some(count)
    }

    /// A copy that counts in another quota.
    pub(crate) fn copy(&self, quota: &Quota) -> Self {
        let mut copy = Self::new(quota);
        for (kind, piece) in &self.pieces {
            copy.push(*kind, piece);
        }
        copy
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        self.quota.0.set(self.quota.0.get() - self.cost());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(backlog: &mut Backlog, most: usize) -> Vec<(Kind, Vec<u8>)> {
        let mut all = Vec::new();
        while backlog.take(most, |kind, bytes| all.push((kind, bytes.to_vec()))).is_some() {}
        all
    }

    #[test]
    fn pieces_come_back_in_their_order_whatever_is_taken_at_once() {
        let quota = Quota::default();
        let mut backlog = Backlog::new(&quota);
        backlog.push(Kind::Stdout, b"ab");
        backlog.push(Kind::Stdout, b"c");
        backlog.push(Kind::Stderr, b"de");
        backlog.push(Kind::Stdout, b"f");
        assert_eq!((backlog.len(), backlog.pieces()), (6, 3));
        let mut copy = backlog.copy(&quota);
        assert_eq!(quota.0.get(), 2 * (6 + 3 * COST));
        let whole =
            [(Kind::Stdout, b"abc".to_vec()), (Kind::Stderr, b"de".to_vec()), (Kind::Stdout, vec![b'f'])];
        assert_eq!(contents(&mut copy, 100), whole);
        assert_eq!(contents(&mut backlog, 2).len(), 4);
        assert_eq!(quota.0.get(), 0);
        assert_eq!(backlog.take(0, |_, _| ()), None);
    }

    #[test]
    fn the_newest_is_kept_and_memory_is_bounded_however_it_comes() {
        const KEPT: usize = 256 << 10;
        let quota = Quota::default();
        let mut backlog = Backlog::new(&quota);
        let bytes: Vec<u8> = (0..100_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut all = Vec::new();
        for piece in bytes.chunks(777).cycle().take(2000) {
            backlog.push(Kind::Stdout, piece);
            backlog.trim(KEPT);
            all.extend_from_slice(piece);
        }
        assert!((KEPT - COST * 20..KEPT + 2 * PIECE).contains(&backlog.len()), "{}", backlog.len());
        let kept: Vec<u8> =
            contents(&mut backlog, 1 << 20).into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert!(all.ends_with(&kept));
        // One byte to each stream in turn.
        for n in 0..100_000u32 {
            backlog.push(if n % 2 == 0 { Kind::Stdout } else { Kind::Stderr }, b"x");
            backlog.trim(KEPT);
        }
        assert!(backlog.cost() <= KEPT + 2 * PIECE, "{}", backlog.cost());
    }

    #[test]
    fn all_together_are_bounded() {
        let quota = Quota::default();
        let fill = |backlog: &mut Backlog| {
            for _ in 0..64 {
                backlog.push(Kind::Stdout, &[7; PIECE]);
                backlog.trim(1 << 20);
            }
        };
        let mut all: Vec<Backlog> = (0..64).map(|_| Backlog::new(&quota)).collect();
        all.iter_mut().for_each(fill);
        assert!(quota.0.get() <= Quota::MOST);
        assert!(!all[0].is_empty() && all[63].is_empty());
        drop(all);
        assert_eq!(quota.0.get(), 0);
    }
}
