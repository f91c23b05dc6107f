//! The log of a sandbox: what its sessions and its console wrote, with the time, in two files of at most [`MAX_FILE`]
//! bytes each that take turns. It goes on over restarts and is there after a crash.
//!
//! A file begins with sixteen bytes, `cubbylog` and a sequence number (u64): the file with the larger one is the newer.
//! It is empty until there is something to write. Records follow, each a header and its bytes:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | length of the bytes after the header, at most [`MAX_RECORD`] |
//! | 4 | 1 | source: 1 stdout, 2 stderr, 3 terminal, 4 console, 5 a gap, 6 the beginning of a run |
//! | 5 | 3 | zero |
//! | 8 | 4 | session; 0 where there is none |
//! | 12 | 4 | FNV-1a (32 bits) of the header's other bytes, in their order |
//! | 16 | 8 | nanoseconds since the Unix epoch |
//!
//! All numbers are little-endian. A record is a piece of output as it came, not a line. The bytes of a gap are a u64: so
//! many bytes of output came too fast to be written, or found the disk full. What is no whole record ends a file: it is
//! being written, or was when a machine ended.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::path::PathBuf;

/// The most that a file grows to, in bytes.
pub const MAX_FILE: u64 = 4 << 20;

/// The most bytes in a record.
pub const MAX_RECORD: usize = 32 << 10;

const MAGIC: [u8; 8] = *b"cubbylog";

/// What a file begins with, in bytes.
pub const FILE_HEADER: usize = 16;

/// Where output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Source {
    /// Standard output of a session.
    Stdout = 1,
    /// Standard error of a session.
    Stderr = 2,
    /// The terminal of a session.
    Terminal = 3,
    /// The guest's console.
    Console = 4,
    /// There is none: so many bytes are missing here.
    Gap = 5,
    /// There is none: the sandbox begins a run.
    Begin = 6,
}

impl TryFrom<u8> for Source {
    type Error = u8;

    fn try_from(byte: u8) -> Result<Self, u8> {
        Ok(match byte {
            1 => Self::Stdout,
            2 => Self::Stderr,
            3 => Self::Terminal,
            4 => Self::Console,
            5 => Self::Gap,
            6 => Self::Begin,
            _ => return Err(byte),
        })
    }
}

/// A file's first bytes.
#[must_use]
pub fn file_header(sequence: u64) -> [u8; FILE_HEADER] {
    let [s0, s1, s2, s3, s4, s5, s6, s7] = sequence.to_le_bytes();
    let [m0, m1, m2, m3, m4, m5, m6, m7] = MAGIC;
    [m0, m1, m2, m3, m4, m5, m6, m7, s0, s1, s2, s3, s4, s5, s6, s7]
}

/// The sequence number of a file that begins with these bytes.
#[must_use]
pub fn sequence(bytes: &[u8]) -> Option<u64> {
    let (magic, rest) = bytes.split_first_chunk::<8>()?;
    let number = rest.first_chunk::<8>()?;
    (*magic == MAGIC).then(|| u64::from_le_bytes(*number))
}

/// What is before a record's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// How many bytes follow.
    pub length: u32,
    /// Where they came from.
    pub source: Source,
    /// The session; 0 where there is none.
    pub session: u32,
    /// Nanoseconds since the Unix epoch.
    pub at_ns: u64,
}

impl Header {
    /// Its size in bytes.
    pub const SIZE: usize = 24;

    /// Its bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        let [s0, s1, s2, s3] = self.session.to_le_bytes();
        let [t0, t1, t2, t3, t4, t5, t6, t7] = self.at_ns.to_le_bytes();
        let head = [l0, l1, l2, l3, self.source as u8, 0, 0, 0, s0, s1, s2, s3];
        let time = [t0, t1, t2, t3, t4, t5, t6, t7];
        let check = check(&head, &time);
        let mut bytes = [0; Self::SIZE];
        for (to, from) in bytes.iter_mut().zip(head.iter().chain(&check).chain(&time)) {
            *to = *from;
        }
        bytes
    }

    /// The header that these bytes begin with, if it is one.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<12>()?;
        let (given, rest) = rest.split_first_chunk::<4>()?;
        let time = rest.first_chunk::<8>()?;
        let [l0, l1, l2, l3, source, _, _, _, s0, s1, s2, s3] = *head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if *given != check(head, time) || length as usize > MAX_RECORD {
            return None;
        }
        let source = Source::try_from(source).ok()?;
        let session = u32::from_le_bytes([s0, s1, s2, s3]);
        Some(Self { length, source, session, at_ns: u64::from_le_bytes(*time) })
    }
}

/// FNV-1a: what random or shifted bytes do not have by chance.
fn check(head: &[u8; 12], time: &[u8; 8]) -> [u8; 4] {
    let hash = head
        .iter()
        .chain(time)
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    hash.to_le_bytes()
}

/// A piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub header: Header,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Takes the first whole record off the front of `bytes`.
fn next_record<'b>(bytes: &mut &'b [u8]) -> Option<(Header, &'b [u8])> {
    let header = Header::from_bytes(bytes)?;
    let end = Header::SIZE + header.length as usize;
    let (record, rest) = bytes.split_at_checked(end)?;
    *bytes = rest;
    Some((header, record.get(Header::SIZE..)?))
}

/// How many of a file's bytes are its header and whole records: the rest was cut off when a machine ended.
#[must_use]
pub fn whole(bytes: &[u8]) -> usize {
    let Some(mut rest) = sequence(bytes).and_then(|_| bytes.get(FILE_HEADER..)) else { return 0 };
    while next_record(&mut rest).is_some() {}
    bytes.len() - rest.len()
}

/// Reads a log, again and again while it grows.
#[derive(Clone, Debug)]
pub struct Reader {
    paths: [PathBuf; 2],
    /// The file that was read last, by its number, and how far.
    position: Option<(u64, u64)>,
}

impl Reader {
    /// Of the two files at `paths`, which need not be there.
    #[must_use]
    pub fn new(paths: [PathBuf; 2]) -> Self {
        Self { paths, position: None }
    }

    /// What was written since the last time, oldest first.
    ///
    /// # Errors
    /// What the kernel says of a file that is there.
    pub fn read(&mut self) -> io::Result<Vec<Record>> {
        let mut files = Vec::new();
        for path in &self.paths {
            match File::open(path) {
                Ok(file) => files.extend(numbered(file)?),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        files.sort_by_key(|(number, _)| *number);
        let mut records = Vec::new();
        for (number, mut file) in files {
            let from = match self.position {
                Some((last, _)) if number < last => continue,
                Some((last, offset)) if number == last => offset,
                _ => FILE_HEADER as u64,
            };
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(from))?;
            (&mut file).take(MAX_FILE).read_to_end(&mut bytes)?;
            // Begun anew meanwhile: what was read is of two files. The next time finds the new one.
            if numbered(file)?.map(|(now, _)| now) != Some(number) {
                continue;
            }
            let mut rest = &bytes[..];
            while let Some((header, bytes)) = next_record(&mut rest) {
                records.push(Record { header, bytes: bytes.to_vec() });
            }
            self.position = Some((number, from + (bytes.len() - rest.len()) as u64));
        }
        Ok(records)
    }
}

/// A file's number; `None` if nothing has been written to it.
fn numbered(mut file: File) -> io::Result<Option<(u64, File)>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    (&mut file).take(FILE_HEADER as u64).read_to_end(&mut bytes)?;
    Ok(sequence(&bytes).map(|number| (number, file)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn record(session: u32, bytes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(bytes.len()).unwrap();
        let header = Header { length, source: Source::Stdout, session, at_ns: 5 };
        [&header.to_bytes()[..], bytes].concat()
    }

    fn read(reader: &mut Reader) -> Vec<(u32, Vec<u8>)> {
        reader.read().unwrap().into_iter().map(|record| (record.header.session, record.bytes)).collect()
    }

    #[test]
    fn a_header_has_its_golden_bytes_and_no_other_bytes_are_one() {
        let header = Header { length: 3, source: Source::Stderr, session: 0x0102, at_ns: 7 };
        let bytes = header.to_bytes();
        let golden = [3, 0, 0, 0, 2, 0, 0, 0, 2, 1, 0, 0, 0xd6, 0x32, 0x46, 0x64, 7, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes, golden);
        assert_eq!(Header::from_bytes(&bytes), Some(header));
        for at in 0..bytes.len() {
            let mut wrong = bytes;
            wrong[at] ^= 1;
            assert_eq!(Header::from_bytes(&wrong), None, "byte {at}");
        }
        assert_eq!(Header::from_bytes(&bytes[..23]), None);
        let long = Header { length: 1 + u32::try_from(MAX_RECORD).unwrap(), ..header };
        assert_eq!(Header::from_bytes(&long.to_bytes()), None);
    }

    #[test]
    fn files_are_read_in_their_order_and_only_what_is_new() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("log.0"), dir.path().join("log.1")];
        let mut reader = Reader::new(paths.clone());
        assert!(read(&mut reader).is_empty(), "there are no files");
        fs::write(&paths[0], "").unwrap();
        assert!(read(&mut reader).is_empty(), "there is nothing in it");
        let mut newer = [&file_header(9)[..], &record(2, b"second")].concat();
        fs::write(&paths[0], &newer).unwrap();
        fs::write(&paths[1], [&file_header(8)[..], &record(1, b"first"), &record(1, b"")].concat()).unwrap();
        let expected = [(1, b"first".to_vec()), (1, Vec::new()), (2, b"second".to_vec())];
        assert_eq!(read(&mut reader), expected);
        assert_eq!(read(&mut reader), []);
        // A record is there when it is whole.
        let next = record(3, b"third");
        for byte in &next[..next.len() - 1] {
            newer.push(*byte);
            fs::write(&paths[0], &newer).unwrap();
            assert_eq!(read(&mut reader), []);
        }
        newer.extend(next.last());
        fs::write(&paths[0], &newer).unwrap();
        assert_eq!(read(&mut reader), [(3, b"third".to_vec())]);
        // The older one begins again, after the last of the newer.
        newer.extend(record(4, b"fourth"));
        fs::write(&paths[0], &newer).unwrap();
        fs::write(&paths[1], [&file_header(10)[..], &record(5, b"fifth")].concat()).unwrap();
        assert_eq!(read(&mut reader), [(4, b"fourth".to_vec()), (5, b"fifth".to_vec())]);
        assert_eq!(read(&mut reader), []);
    }

    #[test]
    fn what_was_cut_off_ends_a_file_and_hides_nothing_before_it() {
        let whole_file = [&file_header(1)[..], &record(1, b"one"), &record(2, b"two")].concat();
        let first = FILE_HEADER + Header::SIZE + 3;
        for cut in 0..=whole_file.len() {
            let expected = match cut {
                0..FILE_HEADER => 0,
                cut if cut < first => FILE_HEADER,
                cut if cut < whole_file.len() => first,
                _ => whole_file.len(),
            };
            assert_eq!(whole(&whole_file[..cut]), expected, "cut at {cut}");
            // And when zeros were made of what was to come.
            let mut zeroed = whole_file[..cut].to_vec();
            zeroed.resize(whole_file.len() + 100, 0);
            assert!(whole(&zeroed) <= expected.max(whole_file.len()));
        }
    }
}
