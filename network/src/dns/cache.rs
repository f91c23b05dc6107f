//! Answers that still hold.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::message::{self, Query, Records};

/// Answers that are kept, and the longest of them: 4 MiB at most.
const ANSWERS: usize = 1024;
const LONGEST: usize = 4096;
/// However long an answer may be kept, it is asked for again after this; and one that says that there is nothing sooner.
const MOST: u32 = 3600;
const MOST_NOTHING: u32 = 60;

/// What makes two questions the same: all that an answer depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    name: String,
    kind: u16,
    class: u16,
    /// Recursion desired, checking disabled, and authentic data: flags of the question.
    flags: (u8, u8),
    edns: bool,
}

fn key(asked: &[u8], query: &Query) -> Key {
    let flag = |at: usize, mask: u8| asked.get(at).map_or(0, |flags| flags & mask);
    Key {
        name: query.name.clone(),
        kind: query.kind,
        class: query.class,
        flags: (flag(2, 0x01), flag(3, 0x30)),
        edns: query.edns,
    }
}

#[derive(Debug)]
struct Kept {
    answer: Vec<u8>,
    since: Instant,
    until: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Cache {
    answers: HashMap<Key, Kept>,
}

impl Cache {
    pub(super) fn keep(&mut self, asked: &[u8], query: &Query, answer: &[u8], now: Instant) {
        let Some(lifetime) = message::lifetime(answer, query.end) else { return };
        let nothing = message::code(answer) != 0 || answer.get(6..8) == Some(&[0, 0]);
        let lifetime = lifetime.min(if nothing { MOST_NOTHING } else { MOST });
        if lifetime == 0 || answer.len() > LONGEST {
            return;
        }
        if self.answers.len() >= ANSWERS {
            self.answers.retain(|_, kept| now < kept.until);
        }
        if self.answers.len() >= ANSWERS
            && let Some(any) = self.answers.keys().next().cloned()
        {
            self.answers.remove(&any);
        }
        let until = now + Duration::from_secs(lifetime.into());
        self.answers.insert(key(asked, query), Kept { answer: answer.to_vec(), since: now, until });
    }

    /// An answer to this question, with what is left of its times.
    pub(super) fn get(&self, asked: &[u8], query: &Query, now: Instant) -> Option<Vec<u8>> {
        let kept = self.answers.get(&key(asked, query)).filter(|kept| now < kept.until)?;
        let passed = u32::try_from(now.duration_since(kept.since).as_secs()).unwrap_or(u32::MAX);
        let mut answer = kept.answer.clone();
        for record in Records::of(&kept.answer, query.end) {
            let record = record?;
            if let Some(field) = answer.get_mut(record.ttl_at..record.ttl_at + 4).filter(|_| record.has_ttl())
            {
                field.copy_from_slice(&record.ttl.saturating_sub(passed).to_be_bytes());
            }
        }
        // The question comes back in the letters in which it was asked.
        if let (Some(to), Some(from)) =
            (answer.get_mut(message::HEADER..query.end), asked.get(message::HEADER..query.end))
        {
            to.copy_from_slice(from);
        }
        message::set_id(&mut answer, message::id(asked));
        Some(answer)
    }
}
