//! Writes the sandbox's log ([`cubby_state::log`] has its format): what sessions and the console write, with the time.
//!
//! A log never slows a session down. Records wait in memory, [`MAX_PENDING`] bytes of them, and are written to the page
//! cache at most every [`EVERY`]: about 12 MiB in a second. Of what comes faster the oldest is dropped, so that the
//! beginning and the end of a flood are kept, and what is missing is counted. A disk without room is a gap as well.
//!
//! The files are opened before the lock-in, and written, cut and emptied by descriptor alone.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cubby_protocol::{Kind, SessionId};
use cubby_state::log::{self, FILE_HEADER, Header, MAX_FILE, MAX_RECORD, Source};

use crate::machine::realtime_ns;

/// Bytes of records that wait to be written.
const MAX_PENDING: usize = 256 << 10;

/// How long the first of them may wait, and the next writing has to.
const EVERY: Duration = Duration::from_millis(20);

/// One of the two files.
#[derive(Debug)]
struct Half {
    file: File,
    /// How much of it is whole records.
    length: u64,
}

impl Half {
    /// Opens a file, cuts off what is not whole, and says which number it has.
    fn open(path: &PathBuf) -> io::Result<(Self, u64)> {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut bytes = Vec::new();
        (&mut file).take(MAX_FILE).read_to_end(&mut bytes)?;
        let length = log::whole(&bytes) as u64;
        if file.metadata()?.len() != length {
            file.set_len(length)?;
        }
        let number = if length == 0 { 0 } else { log::sequence(&bytes).unwrap_or(0) };
        Ok((Self { file, length }, number))
    }

    /// Appends all of `bytes`, or nothing.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = (&self.file).write_all(bytes);
        if written.is_err() {
            // A part of it may be there. If it cannot be cut off, it ends the file for readers.
            let _ = self.file.set_len(self.length);
        } else {
            self.length += bytes.len() as u64;
        }
        written
    }
}

/// The files, of which the first is being written.
#[derive(Debug)]
struct Files {
    halves: [Half; 2],
    number: u64,
}

impl Files {
    fn open(paths: &[PathBuf; 2]) -> io::Result<Self> {
        let [one, other] = paths;
        let ((one, first), (other, second)) = (Half::open(one)?, Half::open(other)?);
        let halves = if first >= second { [one, other] } else { [other, one] };
        Ok(Self { halves, number: first.max(second) })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let [current, next] = &mut self.halves;
        if current.length == 0 {
            self.number += 1;
            current.append(&log::file_header(self.number))?;
        } else if current.length + bytes.len() as u64 > MAX_FILE {
            next.file.set_len(0)?;
            next.length = 0;
            next.append(&log::file_header(self.number + 1))?;
            self.number += 1;
            self.halves.swap(0, 1);
        }
        let [current, _] = &mut self.halves;
        current.append(bytes)
    }
}

/// The log of a sandbox, or of one that has none.
#[derive(Debug, Default)]
pub(crate) struct OutputLog {
    files: Option<Files>,
    pending: Vec<u8>,
    /// Where the oldest record begins that was not dropped.
    start: usize,
    /// Bytes of output that were dropped before it.
    dropped: u64,
    /// When records may be written next; a log that is kept has such a time.
    next: Option<Instant>,
}

impl OutputLog {
    /// Goes on with the log in these files.
    pub(crate) fn open(paths: &[PathBuf; 2]) -> io::Result<Self> {
        let (files, next) = (Some(Files::open(paths)?), Some(Instant::now()));
        let mut log = Self { files, next, ..Self::default() };
        log.push(Source::Begin, 0, &[]);
        Ok(log)
    }

    /// Output of a session.
    pub(crate) fn output(&mut self, session: SessionId, kind: Kind, terminal: bool, bytes: &[u8]) {
        let source = match kind {
            Kind::Stderr => Source::Stderr,
            _ if terminal => Source::Terminal,
            _ => Source::Stdout,
        };
        self.push(source, session.0, bytes);
    }

    /// Output of the console, or as much of it as is to be had.
    pub(crate) fn console(&mut self, bytes: &[u8], missing: u64) {
        self.push(Source::Console, 0, bytes);
        if missing > 0 {
            self.push(Source::Gap, 0, &missing.to_le_bytes());
        }
    }

    fn push(&mut self, source: Source, session: u32, bytes: &[u8]) {
        if self.files.is_none() || (bytes.is_empty() && source != Source::Begin) {
            return;
        }
        // What cannot stay need not come.
        let skipped = bytes.len().saturating_sub(MAX_PENDING);
        self.dropped += skipped as u64;
        let at_ns = realtime_ns();
        let rest = bytes.get(skipped..).unwrap_or_default();
        let mut chunks = rest.chunks(MAX_RECORD);
        let mut next = Some(chunks.next().unwrap_or_default());
        while let Some(chunk) = next {
            let length = u32::try_from(chunk.len()).unwrap_or_default();
            self.make_room(Header::SIZE + chunk.len());
            self.pending.extend_from_slice(&Header { length, source, session, at_ns }.to_bytes());
            self.pending.extend_from_slice(chunk);
            next = chunks.next();
        }
    }

    /// Drops the oldest records until so many bytes fit behind the others.
    fn make_room(&mut self, size: usize) {
        while self.pending.len() - self.start + size > MAX_PENDING
            && let Some(oldest) = self.pending.get(self.start..).and_then(Header::from_bytes)
        {
            self.start += Header::SIZE + oldest.length as usize;
            self.dropped += u64::from(oldest.length);
        }
        if self.start > MAX_PENDING {
            self.pending.drain(..self.start);
            self.start = 0;
        }
    }

    /// When [`Self::write`] is to be called.
    pub(crate) fn due(&self) -> Option<Instant> {
        let waiting = self.pending.len() > self.start;
        self.next.filter(|_| waiting)
    }

    /// Writes what waits, if it is time.
    pub(crate) fn on_time(&mut self, now: Instant) {
        if self.due().is_some_and(|due| due <= now) {
            self.next = Some(now + EVERY);
            self.write();
        }
    }

    /// Writes what waits.
    pub(crate) fn write(&mut self) {
        let Some(files) = self.files.as_mut().filter(|_| self.pending.len() > self.start) else { return };
        if self.dropped > 0 {
            let gap = gap(self.dropped);
            // It lies before what is left of them: there is room where the dropped ones were, or it is made.
            if let Some(from) = self.start.checked_sub(gap.len()) {
                if let Some(place) = self.pending.get_mut(from..self.start) {
                    place.copy_from_slice(&gap);
                }
                self.start = from;
            } else {
                self.pending.splice(..self.start, gap);
                self.start = 0;
            }
        }
        let waiting = self.pending.get(self.start..).unwrap_or_default();
        self.dropped = match files.append(waiting) {
            Ok(()) => 0,
            // The next gap tells of these as well.
            Err(_) => output(waiting),
        };
        self.pending.clear();
        self.start = 0;
    }
}

/// The record of a gap.
fn gap(missing: u64) -> [u8; Header::SIZE + 8] {
    let header = Header { length: 8, source: Source::Gap, session: 0, at_ns: realtime_ns() };
    let mut gap = [0; Header::SIZE + 8];
    for (to, from) in gap.iter_mut().zip(header.to_bytes().iter().chain(&missing.to_le_bytes())) {
        *to = *from;
    }
    gap
}

/// How many bytes of output these records have, or tell of.
fn output(mut records: &[u8]) -> u64 {
    let mut sum = 0;
    while let Some(header) = Header::from_bytes(records) {
        let bytes = records.get(Header::SIZE..).unwrap_or_default();
        sum += match (header.source, bytes.first_chunk::<8>()) {
            (Source::Gap, Some(missing)) => u64::from_le_bytes(*missing),
            _ => u64::from(header.length),
        };
        records = bytes.get(header.length as usize..).unwrap_or_default();
    }
    sum
}

/// What a file holds at least: its header and one full write.
const _: () = assert!(FILE_HEADER + MAX_PENDING + Header::SIZE + 8 < 4 << 20);

#[cfg(test)]
mod tests {
    use std::fs;

    use cubby_state::log::{Reader, Record};

    use super::*;

    fn paths(dir: &tempfile::TempDir) -> [PathBuf; 2] {
        ["log.0", "log.1"].map(|name| dir.path().join(name))
    }

    fn all(paths: &[PathBuf; 2]) -> Vec<Record> {
        let mut records = Reader::new(paths.clone()).read().unwrap();
        records.retain(|record| record.header.source != Source::Begin);
        records
    }

    fn missing(records: &[Record]) -> u64 {
        let gaps = records.iter().filter(|record| record.header.source == Source::Gap);
        gaps.map(|record| u64::from_le_bytes(record.bytes[..].try_into().unwrap())).sum()
    }

    fn written(records: &[Record]) -> usize {
        let output = records.iter().filter(|record| record.header.source != Source::Gap);
        output.map(|record| record.bytes.len()).sum()
    }

    #[test]
    fn what_is_written_is_read_with_where_it_came_from() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(&dir);
        let before = realtime_ns();
        for run in 0..3u32 {
            let mut log = OutputLog::open(&paths).unwrap();
            log.output(SessionId(run), Kind::Stdout, false, b"out");
            log.output(SessionId(run), Kind::Stderr, false, b"err");
            log.output(SessionId(run), Kind::Stdout, true, b"\xff");
            log.console(b"panic", 3);
            log.write();
        }
        let records = all(&paths);
        let expected = [
            (Source::Stdout, 2, &b"out"[..]),
            (Source::Stderr, 2, b"err"),
            (Source::Terminal, 2, b"\xff"),
            (Source::Console, 0, b"panic"),
            (Source::Gap, 0, &[3, 0, 0, 0, 0, 0, 0, 0]),
        ];
        assert_eq!(records.len(), 15);
        for (record, (source, session, bytes)) in records[10..].iter().zip(expected) {
            assert_eq!((record.header.source, record.header.session), (source, session));
            assert_eq!(record.bytes, bytes);
            assert!((before..=realtime_ns()).contains(&record.header.at_ns));
        }
    }

    #[test]
    fn a_flood_costs_its_middle_and_says_how_much() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(&dir);
        let mut log = OutputLog::open(&paths).unwrap();
        log.write();
        let total = 40 << 20;
        let piece: Vec<u8> = (0..70_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut sent = 0;
        while sent < total {
            log.output(SessionId(1), Kind::Stdout, false, &piece);
            sent += piece.len();
            assert!(log.pending.capacity() <= 4 * MAX_PENDING, "{}", log.pending.capacity());
        }
        log.output(SessionId(1), Kind::Stdout, false, b"the end");
        log.write();
        let records = all(&paths);
        assert_eq!(records.last().unwrap().bytes, b"the end");
        assert_eq!(missing(&records) + written(&records) as u64, sent as u64 + 7);
        assert!(written(&records) > MAX_PENDING / 2 && missing(&records) > 0);
        // More at once than ever waits.
        log.output(SessionId(1), Kind::Stdout, false, &vec![1; 3 * MAX_PENDING]);
        log.write();
        let records = all(&paths);
        assert_eq!(missing(&records) + written(&records) as u64, (sent + 7 + 3 * MAX_PENDING) as u64);
    }

    #[test]
    fn two_files_take_turns_and_grow_no_further() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(&dir);
        let mut log = OutputLog::open(&paths).unwrap();
        for n in 0..200u32 {
            if n % 50 == 0 {
                // Whoever goes on goes on where the other stopped.
                log = OutputLog::open(&paths).unwrap();
            }
            log.output(SessionId(n), Kind::Stdout, false, &vec![b'x'; 100_000]);
            log.write();
        }
        let sizes = paths.clone().map(|path| fs::metadata(path).unwrap().len());
        assert!(sizes.iter().all(|size| *size <= MAX_FILE && *size > 0), "{sizes:?}");
        let records = all(&paths);
        let sessions: Vec<u32> = records.iter().map(|record| record.header.session).collect();
        assert!(sessions.is_sorted() && sessions.last() == Some(&199), "{sessions:?}");
        assert!(written(&records) as u64 > MAX_FILE - (1 << 20), "{}", written(&records));
    }

    #[test]
    fn what_was_cut_off_is_cut_away_before_more_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(&dir);
        let mut log = OutputLog::open(&paths).unwrap();
        log.output(SessionId(1), Kind::Stdout, false, b"whole");
        log.write();
        let mut torn = fs::read(&paths[0]).unwrap();
        torn.extend_from_slice(&[5, 0, 0, 0, 1, 0, 0]);
        fs::write(&paths[0], &torn).unwrap();
        let mut log = OutputLog::open(&paths).unwrap();
        log.output(SessionId(2), Kind::Stdout, false, b"after");
        log.write();
        let bytes: Vec<_> = all(&paths).into_iter().map(|record| record.bytes).collect();
        assert_eq!(bytes, [b"whole".to_vec(), b"after".to_vec()]);
    }

    #[test]
    fn a_disk_without_room_is_a_gap() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(&dir);
        let mut log = OutputLog::open(&paths).unwrap();
        log.write();
        let full = || OpenOptions::new().append(true).open("/dev/full").unwrap();
        let files = log.files.as_mut().unwrap();
        let file = std::mem::replace(&mut files.halves[0].file, full());
        log.output(SessionId(1), Kind::Stdout, false, b"lost");
        log.write();
        log.output(SessionId(1), Kind::Stdout, false, b"as well");
        log.write();
        log.files.as_mut().unwrap().halves[0].file = file;
        log.output(SessionId(1), Kind::Stdout, false, b"kept");
        log.write();
        let records = all(&paths);
        assert_eq!((records.len(), missing(&records), written(&records)), (2, 11, 4));
    }

    #[test]
    fn it_is_written_at_once_and_then_not_too_often() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(&dir);
        let mut log = OutputLog::open(&paths).unwrap();
        let begin = Instant::now();
        log.on_time(begin);
        assert_eq!(log.due(), None);
        log.output(SessionId(1), Kind::Stdout, false, b"x");
        assert_eq!(log.due(), Some(begin + EVERY));
        log.on_time(begin + EVERY / 2);
        assert!(all(&paths).is_empty());
        log.on_time(begin + EVERY);
        assert_eq!(all(&paths).len(), 1);
        // One that is not to be kept costs nothing and is no error.
        let mut none = OutputLog::default();
        none.output(SessionId(1), Kind::Stdout, false, b"x");
        assert_eq!((none.due(), none.pending.capacity()), (None, 0));
    }
}
