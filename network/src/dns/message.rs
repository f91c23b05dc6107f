//! As much of a DNS message as a forwarder looks at: the question, and the records' types, times and addresses (RFC 1035
//! §4). Everything else passes as it came.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(super) const HEADER: usize = 12;
pub(super) const A: u16 = 1;
const SOA: u16 = 6;
pub(super) const AAAA: u16 = 28;
const OPT: u16 = 41;
pub(super) const IN: u16 = 1;

/// How an answer went (RFC 1035 §4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Code {
    NoError = 0,
    Malformed = 1,
    Failed = 2,
    NoName = 3,
    NotImplemented = 4,
}

/// A question of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Query {
    /// The name in lower case, without a dot at its end. What is no letter, digit, `-` or `_` is escaped (RFC 4343 §2.1), so that
    /// no label can look like two.
    pub(super) name: String,
    pub(super) kind: u16,
    pub(super) class: u16,
    /// Where the question ends.
    pub(super) end: usize,
    /// The longest answer by UDP that the guest takes.
    pub(super) takes: usize,
    /// Whether it speaks EDNS.
    pub(super) edns: bool,
}

fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    message.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn u32_at(message: &[u8], at: usize) -> Option<u32> {
    message.get(at..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// The message's number.
pub(super) fn id(message: &[u8]) -> u16 {
    u16_at(message, 0).unwrap_or(0)
}

/// Gives the message another number.
pub(super) fn set_id(message: &mut [u8], id: u16) {
    if let Some(field) = message.first_chunk_mut() {
        *field = id.to_be_bytes();
    }
}

/// Whether it was cut short.
pub(super) fn is_truncated(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & 2 != 0)
}

/// How it went.
pub(super) fn code(message: &[u8]) -> u8 {
    message.get(3).map_or(0, |flags| flags & 15)
}

/// Passes over a name; returns where it ends.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            len @ 1..=63 => at += 1 + usize::from(len),
            0xc0.. => return message.get(at + 1).map(|_| at + 2),
            _ => return None,
        }
    }
}

/// Reads a question's name, which is never compressed.
fn read_name(message: &[u8], mut at: usize) -> Option<(String, usize)> {
    let (begin, mut name) = (at, String::new());
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        match len {
            0 => return (at - begin <= 255).then_some((name, at)),
            1..=63 if at - begin + len <= 255 => {
                if !name.is_empty() {
                    name.push('.');
                }
                for byte in message.get(at..at + len)? {
                    if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_') {
                        name.push(char::from(byte.to_ascii_lowercase()));
                    } else {
                        name.push_str(&format!("\\{byte:03}"));
                    }
                }
                at += len;
            }
            _ => return None,
        }
    }
}

/// Reads a question.
///
/// # Errors
/// What to answer instead; `None`: nothing, since it is no question at all.
pub(super) fn read_query(message: &[u8]) -> Result<Query, Option<Code>> {
    let flags = u16_at(message, 2).ok_or(None)?;
    if message.len() < HEADER || flags & 0x8000 != 0 {
        return Err(None);
    }
    if flags & 0x7800 != 0 {
        return Err(Some(Code::NotImplemented));
    }
    let malformed = Some(Code::Malformed);
    if u16_at(message, 4) != Some(1) {
        return Err(malformed);
    }
    let (name, at) = read_name(message, HEADER).ok_or(malformed)?;
    let kind = u16_at(message, at).ok_or(malformed)?;
    let class = u16_at(message, at + 2).ok_or(malformed)?;
    let mut query = Query { name, kind, class, end: at + 4, takes: 512, edns: false };
    for record in Records::of(message, query.end) {
        let record = record.ok_or(malformed)?;
        if record.kind == OPT {
            query.edns = true;
            query.takes = usize::from(record.class).max(512);
        }
    }
    Ok(query)
}

/// A record, as far as it is looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record<'a> {
    pub(super) kind: u16,
    pub(super) class: u16,
    pub(super) ttl: u32,
    /// Where its time to live is.
    pub(super) ttl_at: usize,
    pub(super) data: &'a [u8],
}

impl Record<'_> {
    /// The address that it gives.
    pub(super) fn address(&self) -> Option<IpAddr> {
        match (self.kind, self.class) {
            (A, IN) => <[u8; 4]>::try_from(self.data).ok().map(|it| Ipv4Addr::from(it).into()),
            (AAAA, IN) => <[u8; 16]>::try_from(self.data).ok().map(|it| Ipv6Addr::from(it).into()),
            _ => None,
        }
    }

    /// Whether its time to live is one: that of OPT is something else.
    pub(super) fn has_ttl(&self) -> bool {
        self.kind != OPT
    }
}

/// The records of a message, after its question. `None` ends it, where it breaks the rules.
pub(super) struct Records<'a> {
    message: &'a [u8],
    at: usize,
    left: u32,
}

impl<'a> Records<'a> {
    pub(super) fn of(message: &'a [u8], question_end: usize) -> Self {
        let count = |at| u32::from(u16_at(message, at).unwrap_or(0));
        Records { message, at: question_end, left: count(6) + count(8) + count(10) }
    }

    fn read(&mut self) -> Option<Record<'a>> {
        let at = skip_name(self.message, self.at)?;
        let len = usize::from(u16_at(self.message, at + 8)?);
        let record = Record {
            kind: u16_at(self.message, at)?,
            class: u16_at(self.message, at + 2)?,
            ttl: u32_at(self.message, at + 4)?,
            ttl_at: at + 4,
            data: self.message.get(at + 10..at + 10 + len)?,
        };
        self.at = at + 10 + len;
        Some(record)
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Option<Record<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let record = self.read();
        if record.is_none() {
            self.left = 0;
        }
        Some(record)
    }
}

/// Whether this is an answer to that question: the same number, and the same question whatever its case.
pub(super) fn answers(message: &[u8], asked: &[u8], question_end: usize, id: u16) -> bool {
    let question = |message: &[u8]| message.get(HEADER..question_end).map(<[u8]>::to_ascii_lowercase);
    message.get(2).is_some_and(|flags| flags & 0x80 != 0)
        && self::id(message) == id
        && u16_at(message, 4) == Some(1)
        && question(message).is_some()
        && question(message) == question(asked)
}

/// How long an answer may be kept, in seconds; `None`: not at all.
pub(super) fn lifetime(message: &[u8], question_end: usize) -> Option<u32> {
    if is_truncated(message) || !matches!(code(message), 0 | 3) {
        return None;
    }
    let mut least = None;
    for record in Records::of(message, question_end) {
        let record = record?;
        // That there is nothing holds for as long as the zone's SOA says, in its last field too (RFC 2308 §5).
        let minimum = if record.kind == SOA {
            record.data.len().checked_sub(4).and_then(|at| u32_at(record.data, at)).unwrap_or(0)
        } else {
            u32::MAX
        };
        if record.has_ttl() {
            least = Some(least.unwrap_or(u32::MAX).min(record.ttl).min(minimum));
        }
    }
    least
}

/// An answer without records to a message of which at least the header is there.
pub(super) fn bare(asked: &[u8], question_end: Option<usize>, code: Code, truncated: bool) -> Vec<u8> {
    let kept = question_end.unwrap_or(HEADER);
    let mut answer = asked.get(..kept).unwrap_or_default().to_vec();
    if let Some([_, _, high, low, counts @ ..]) = answer.first_chunk_mut::<HEADER>() {
        // Question's opcode and RD; then QR, TC, RA and how it went.
        *high = (*high & 0x79) | 0x80 | (u8::from(truncated) << 1);
        *low = 0x80 | code as u8;
        *counts = [0, u8::from(question_end.is_some()), 0, 0, 0, 0, 0, 0];
    }
    answer
}

/// An answer with these addresses of the question's type, for the question's own name.
pub(super) fn with_addresses(asked: &[u8], query: &Query, addresses: &[IpAddr], ttl: u32) -> Vec<u8> {
    let mut answer = bare(asked, Some(query.end), Code::NoError, false);
    let mut count = 0u16;
    for address in addresses {
        let (kind, data) = match address {
            IpAddr::V4(v4) => (A, v4.octets().to_vec()),
            IpAddr::V6(v6) => (AAAA, v6.octets().to_vec()),
        };
        if kind != query.kind || query.class != IN {
            continue;
        }
        count = count.saturating_add(1);
        // The name is where the question has it.
        answer.extend_from_slice(&[0xc0, 12]);
        for field in [kind, IN] {
            answer.extend_from_slice(&field.to_be_bytes());
        }
        answer.extend_from_slice(&ttl.to_be_bytes());
        answer.extend_from_slice(&u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
        answer.extend_from_slice(&data);
    }
    if let Some(field) = answer.get_mut(6..8) {
        field.copy_from_slice(&count.to_be_bytes());
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn question(labels: &[&[u8]], kind: u16) -> Vec<u8> {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in labels {
            message.push(u8::try_from(label.len()).unwrap());
            message.extend_from_slice(label);
        }
        message.push(0);
        message.extend_from_slice(&[0, u8::try_from(kind).unwrap(), 0, 1]);
        message
    }

    #[test]
    fn a_question_is_read_and_no_label_looks_like_two() {
        let message = question(&[b"WWW", b"Example", b"com"], A);
        let query = read_query(&message).unwrap();
        assert_eq!((query.name.as_str(), query.kind, query.class), ("www.example.com", A, IN));
        assert_eq!((query.end, query.takes, query.edns), (message.len(), 512, false));
        let tricky = read_query(&question(&[b"a.example.com\0", b"evil"], A)).unwrap();
        assert_eq!(tricky.name, "a\\046example\\046com\\000.evil");
    }

    #[test]
    fn what_is_no_question_is_told_apart() {
        let good = question(&[b"a"], A);
        let mut answer = good.clone();
        answer[2] |= 0x80;
        assert_eq!(read_query(&answer), Err(None));
        assert_eq!(read_query(&good[..11]), Err(None));
        let mut update = good.clone();
        update[2] |= 5 << 3;
        assert_eq!(read_query(&update), Err(Some(Code::NotImplemented)));
        let mut two = good.clone();
        two[5] = 2;
        assert_eq!(read_query(&two), Err(Some(Code::Malformed)));
        assert_eq!(read_query(&good[..good.len() - 1]), Err(Some(Code::Malformed)));
        let mut pointer = good.clone();
        pointer[12] = 0xc0;
        assert_eq!(read_query(&pointer), Err(Some(Code::Malformed)));
        let long = [b"a".repeat(63).as_slice(); 4].concat();
        let labels: Vec<&[u8]> = long.chunks(63).collect();
        assert_eq!(read_query(&question(&labels, A)), Err(Some(Code::Malformed)));
    }

    #[test]
    fn addresses_come_out_as_they_went_in() {
        let asked = question(&[b"a", b"b"], A);
        let query = read_query(&asked).unwrap();
        let given: Vec<IpAddr> =
            vec!["1.2.3.4".parse().unwrap(), "::1".parse().unwrap(), "5.6.7.8".parse().unwrap()];
        let answer = with_addresses(&asked, &query, &given, 77);
        assert!(answers(&answer, &asked, query.end, 0x1234));
        assert!(!answers(&answer, &asked, query.end, 0x1235));
        assert!(!answers(&answer, &question(&[b"a", b"c"], A), query.end, 0x1234));
        let records: Vec<_> = Records::of(&answer, query.end).map(|record| record.unwrap()).collect();
        let addresses: Vec<_> = records.iter().filter_map(Record::address).collect();
        assert_eq!(addresses, [given[0], given[2]]);
        assert_eq!(lifetime(&answer, query.end), Some(77));
        assert_eq!(lifetime(&bare(&asked, Some(query.end), Code::Failed, false), query.end), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(message: Vec<u8>, end in 0usize..64) {
            if let Ok(query) = read_query(&message) {
                prop_assert!(query.end <= message.len());
                with_addresses(&message, &query, &["1.2.3.4".parse().unwrap()], 1);
            }
            prop_assert!(Records::of(&message, end).filter_map(|it| it?.address()).count() <= message.len());
            lifetime(&message, end);
            answers(&message, &message, end, 0);
        }
    }
}
