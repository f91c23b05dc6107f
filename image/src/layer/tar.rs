//! Reads tar archives, those of image layers and any other: ustar, PAX and GNU (long names, base-256 numbers, all four
//! sparse formats), with names as raw bytes. The contents of files are lent out of the decompressor's
//! own buffers, so that nothing is copied on the way.
//!
//! Refused with [`Malformed`]: wrong header checksums, numbers that do not parse, oversized extended headers,
//! sparse maps that overlap or overrun, entry types that no file system has. What the archive says about
//! paths is not judged here; whoever unpacks it does that.
use std::{
    collections::BTreeMap,
    io::{self, BufRead, Read},
};

use super::pax::{self, Pax};

const BLOCK: usize = 512;
/// Sparse files may have this many segments: a map for a 1 GiB file with a hole in every 4 KiB.
const MAX_SEGMENTS: usize = 1 << 18;

/// What an archive entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// Another name of an earlier entry's file.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A directory.
    Dir,
    /// A named pipe.
    Fifo,
}

/// A point in time, as tar and EROFS have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time {
    /// Seconds since the Unix epoch.
    pub seconds: i64,
    /// Nanoseconds of the second, below a milliard.
    pub nanos: u32,
}

/// One entry's header.
#[derive(Debug)]
pub struct Entry {
    /// Its name as the archive has it: any bytes but NUL, whatever way they lead.
    pub path: Vec<u8>,
    /// What a symbolic link says, or which entry a hard link is another name of.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions, set-user-id, set-group-id and sticky: twelve bits.
    pub mode: u16,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When it was last written.
    pub mtime: Time,
    /// A device's major and minor number.
    pub device: (u32, u32),
    /// Bytes of the file that the entry makes.
    pub size: u64,
    /// Where the archive's bytes belong in a sparse file, as (offset, length), rising; `None` if not sparse.
    pub segments: Option<Vec<(u64, u64)>>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The archive breaks the format.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub(crate) String);

impl From<Malformed> for io::Error {
    fn from(error: Malformed) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

fn malformed<T>(why: impl Into<String>) -> io::Result<T> {
    Err(Malformed(why.into()).into())
}

/// An archive being read. Its errors are those of the reader, or carry a [`Malformed`].
#[derive(Debug)]
pub struct Archive<R> {
    reader: R,
    /// Bytes of the current entry's data not yet taken.
    remaining: u64,
    /// Padding after them.
    padding: u64,
    max_header: u64,
    ended: bool,
}

impl<R: BufRead> Archive<R> {
    /// Reads from `reader`; extended headers and long names may have `max_header` bytes each.
    pub fn new(reader: R, max_header: u64) -> Self {
        Self { reader, remaining: 0, padding: 0, max_header, ended: false }
    }

    /// The next entry, or `None` at the end of the archive; what follows the end is read and dropped.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let mut pax = Pax::default();
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let data = number(header.field(124, 12))?;
            match header.kind() {
                b'x' => pax.parse(&self.extended(data)?)?,
                // Global headers carry comments (git archive); no layer tool applies them.
                b'g' => drop(self.extended(data)?),
                b'L' => long_name = Some(c_string(&self.extended(data)?).to_vec()),
                b'K' => long_link = Some(c_string(&self.extended(data)?).to_vec()),
                _ => return self.entry(&header, pax, long_name, long_link).map(Some),
            }
        }
    }

    /// The next piece of the current entry's data; empty at its end. Call [`Self::consume`] with what was used.
    pub fn data(&mut self) -> io::Result<&[u8]> {
        if self.remaining == 0 {
            return Ok(&[]);
        }
        let piece = self.reader.fill_buf()?;
        if piece.is_empty() {
            return malformed("the archive ends inside a file");
        }
        let length = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(piece.len());
        Ok(piece.get(..length).unwrap_or_default())
    }

    /// Takes `amount` bytes of the last piece that [`Self::data`] gave.
    pub fn consume(&mut self, amount: usize) {
        self.reader.consume(amount);
        self.remaining = self.remaining.saturating_sub(amount as u64);
    }

    /// The reader, which stands at the current entry's data.
    pub(crate) fn reader(&mut self) -> &mut R {
        &mut self.reader
    }

    /// Says that the caller moves the reader past the current entry's data, by the bytes returned.
    pub(crate) fn leave_data(&mut self) -> u64 {
        std::mem::take(&mut self.remaining) + std::mem::take(&mut self.padding)
    }

    /// Bytes of the current entry's data in the archive that were not consumed yet.
    pub(crate) fn stored(&self) -> u64 {
        self.remaining
    }

    /// The next header that is not the end marker.
    fn header(&mut self) -> io::Result<Option<Header>> {
        self.skip(self.remaining + self.padding)?;
        (self.remaining, self.padding) = (0, 0);
        if self.ended {
            return Ok(None);
        }
        let Some(header) = self.block()? else {
            self.ended = true;
            return Ok(None);
        };
        if header.0.iter().all(|&byte| byte == 0) {
            if self.block()?.is_some_and(|next| next.0.iter().any(|&byte| byte != 0)) {
                return malformed("a lone zero block inside the archive");
            }
            self.ended = true;
            while !self.reader.fill_buf()?.is_empty() {
                let length = self.reader.fill_buf()?.len();
                self.reader.consume(length);
            }
            return Ok(None);
        }
        header.verify()?;
        Ok(Some(header))
    }

    fn block(&mut self) -> io::Result<Option<Header>> {
        if self.reader.fill_buf()?.is_empty() {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        match self.reader.read_exact(&mut block) {
            Ok(()) => Ok(Some(Header(block))),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                malformed("the archive ends inside a header")
            }
            Err(e) => Err(e),
        }
    }

    fn skip(&mut self, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            let piece = self.reader.fill_buf()?.len();
            if piece == 0 {
                return malformed("the archive ends inside a file");
            }
            let length = usize::try_from(bytes).unwrap_or(usize::MAX).min(piece);
            self.reader.consume(length);
            bytes -= length as u64;
        }
        Ok(())
    }

    /// The data of an extended header, which is small or refused.
    fn extended(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > self.max_header {
            return malformed(format!(
                "an extended header of {size} bytes, where {} are allowed",
                self.max_header
            ));
        }
        let mut data = Vec::new();
        let got = self.reader.by_ref().take(size).read_to_end(&mut data)? as u64;
        if got < size {
            return malformed("the archive ends inside an extended header");
        }
        self.padding = padding(size);
        Ok(data)
    }

    fn entry(
        &mut self,
        header: &Header,
        mut pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> io::Result<Entry> {
        let path = pax.sparse.name.take().or(pax.path.take()).or(long_name).unwrap_or_else(|| header.path());
        let link = pax.link.take().or(long_link).unwrap_or_else(|| c_string(header.field(157, 100)).to_vec());
        let kind = match header.kind() {
            // Version 7 archives mark a directory by its name alone.
            0 | b'0' | b'7' if path.ends_with(b"/") => Kind::Dir,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Dir,
            b'6' => Kind::Fifo,
            other => {
                return malformed(format!("{} has the unknown type {:?}", lossy(&path), char::from(other)));
            }
        };
        if path.contains(&0) || link.contains(&0) {
            return malformed(format!("{} has a NUL byte in its name", lossy(&path)));
        }
        let id = |pax: Option<u64>, field| -> io::Result<u32> {
            let id = pax.map_or_else(|| number(field), Ok)?;
            u32::try_from(id).or_else(|_| malformed(format!("{} has the owner {id}", lossy(&path))))
        };
        let (uid, gid) = (id(pax.uid, header.field(108, 8))?, id(pax.gid, header.field(116, 8))?);
        let device = |field| -> io::Result<u32> {
            u32::try_from(number(field)?)
                .or_else(|_| malformed(format!("{} has no valid device", lossy(&path))))
        };
        let device = match kind {
            Kind::Char | Kind::Block => (device(header.field(329, 8))?, device(header.field(337, 8))?),
            _ => (0, 0),
        };
        let mode = u16::try_from(number(header.field(100, 8))? & 0o7777).unwrap_or(0);
        let mtime = match pax.mtime {
            Some(time) => time,
            None => Time { seconds: signed(header.field(136, 12))?, nanos: 0 },
        };
        let mut size = match kind {
            Kind::File => pax.size.map_or_else(|| number(header.field(124, 12)), Ok)?,
            // Only files have data, whatever the header says (POSIX ustar; Go's and GNU's readers agree).
            _ => 0,
        };
        self.remaining = size;
        self.padding = padding(size);
        let segments = if kind == Kind::File { self.sparse(header, &pax, &mut size)? } else { None };
        Ok(Entry { path, link, kind, mode, uid, gid, mtime, device, size, segments, xattrs: pax.xattrs })
    }

    /// The map of a sparse file, if the entry is one; `size` becomes the file's.
    fn sparse(&mut self, header: &Header, pax: &Pax, size: &mut u64) -> io::Result<Option<Vec<(u64, u64)>>> {
        let sparse = &pax.sparse;
        let (map, real) = if header.kind() == b'S' {
            (self.old_gnu_map(header)?, number(header.field(483, 12))?)
        } else if sparse.major == Some(1) && sparse.minor == Some(0) {
            (self.data_map()?, sparse.real_size.unwrap_or(0))
        } else if !sparse.map.is_empty() || sparse.real_size.is_some() {
            (sparse.map.clone(), sparse.real_size.unwrap_or(0))
        } else {
            return Ok(None);
        };
        if map.len() % 2 != 0 || map.len() / 2 > MAX_SEGMENTS {
            return malformed("a sparse map with too many or unpaired numbers");
        }
        let mut segments = Vec::with_capacity(map.len() / 2);
        let (mut end, mut total) = (0_u64, 0_u64);
        for pair in map.chunks_exact(2) {
            let &[offset, length] = pair else { continue };
            let next = offset.checked_add(length);
            let Some(next) = next.filter(|&next| offset >= end && next <= real) else {
                return malformed("a sparse map whose segments overlap or overrun the file");
            };
            (end, total) = (next, total.saturating_add(length));
            segments.push((offset, length));
        }
        if total != self.remaining {
            return malformed("a sparse map that does not match the entry's size");
        }
        *size = real;
        Ok(Some(segments))
    }

    /// Old GNU format: four segments in the header, then extension blocks of 21.
    fn old_gnu_map(&mut self, header: &Header) -> io::Result<Vec<u64>> {
        let mut map = Vec::new();
        gnu_pairs(header.field(386, 96), &mut map)?;
        let mut more = header.field(482, 1) != [0];
        while more {
            let Some(block) = self.block()? else {
                return malformed("the archive ends inside a sparse map");
            };
            gnu_pairs(block.field(0, 504), &mut map)?;
            more = block.field(504, 1) != [0];
            if map.len() / 2 > MAX_SEGMENTS {
                return malformed("a sparse map with too many segments");
            }
        }
        Ok(map)
    }

    /// PAX sparse format 1.0: decimal numbers, a line each, in blocks before the data.
    fn data_map(&mut self) -> io::Result<Vec<u64>> {
        let (mut numbers, mut line, mut wanted) = (Vec::new(), Vec::new(), None);
        while wanted != Some(numbers.len()) {
            if self.remaining < BLOCK as u64 {
                return malformed("a sparse map longer than its entry");
            }
            let Some(block) = self.block()? else {
                return malformed("the archive ends inside a sparse map");
            };
            self.remaining -= BLOCK as u64;
            for &byte in &block.0 {
                if wanted == Some(numbers.len()) {
                    break;
                }
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                let Some(value) = pax::decimal(&line) else {
                    return malformed("a sparse map with a number that is none");
                };
                line.clear();
                if wanted.is_some() {
                    numbers.push(value);
                } else {
                    let count = usize::try_from(value).ok().filter(|&count| count <= MAX_SEGMENTS);
                    wanted = Some(
                        count.ok_or_else(|| Malformed("a sparse map with too many segments".into()))? * 2,
                    );
                }
            }
            if line.len() > 32 {
                return malformed("a sparse map with a number that is none");
            }
        }
        Ok(numbers)
    }
}

fn gnu_pairs(field: &[u8], map: &mut Vec<u64>) -> io::Result<()> {
    for pair in field.chunks_exact(24) {
        let (offset, length) = pair.split_at(12);
        if length.first() == Some(&0) && offset.first() == Some(&0) {
            break;
        }
        map.push(number(offset)?);
        map.push(number(length)?);
    }
    Ok(())
}

struct Header([u8; BLOCK]);

impl Header {
    fn field(&self, offset: usize, length: usize) -> &[u8] {
        self.0.get(offset..offset + length).unwrap_or_default()
    }

    fn kind(&self) -> u8 {
        self.field(156, 1).first().copied().unwrap_or(0)
    }

    /// The checksum counts its own field as spaces. Old writers summed signed bytes.
    fn verify(&self) -> io::Result<()> {
        let (mut unsigned, mut signed) = (0_i64, 0_i64);
        for (at, &byte) in self.0.iter().enumerate() {
            let byte = if (148..156).contains(&at) { b' ' } else { byte };
            unsigned += i64::from(byte);
            signed += i64::from(i8::from_ne_bytes([byte]));
        }
        let stored = i64::try_from(number(self.field(148, 8))?).unwrap_or(-1);
        if stored == unsigned || stored == signed {
            return Ok(());
        }
        malformed("a header's checksum is wrong: this is no tar archive, or it is damaged")
    }

    /// The name, with the prefix that only POSIX ustar has.
    fn path(&self) -> Vec<u8> {
        let name = c_string(self.field(0, 100));
        let prefix = c_string(self.field(345, 155));
        if self.field(257, 6) != b"ustar\0" || prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn c_string(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

pub(crate) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.get(..bytes.len().min(512)).unwrap_or_default()).into_owned()
}

/// An unsigned number: octal, or base 256 when the first bit is set.
fn number(field: &[u8]) -> io::Result<u64> {
    match signed(field).map(u64::try_from) {
        Ok(Ok(value)) => Ok(value),
        _ => malformed("a header field is not a number"),
    }
}

fn signed(field: &[u8]) -> io::Result<i64> {
    let bad = || Malformed("a header field is not a number".into());
    if let Some((&first, rest)) = field.split_first().filter(|(first, _)| *first & 0x80 != 0) {
        // Two's complement: bit 7 says base 256, bit 6 is the sign.
        let start = if first & 0x40 != 0 { i64::from(first) - 256 } else { i64::from(first & 0x7f) };
        let value =
            rest.iter().try_fold(start, |sum, &byte| sum.checked_mul(256)?.checked_add(i64::from(byte)));
        return Ok(value.ok_or_else(bad)?);
    }
    let text = field.split(|&byte| byte == 0).next().unwrap_or_default().trim_ascii();
    let value = text.iter().try_fold(0_i64, |sum, &byte| {
        let digit = (b'0'..=b'7').contains(&byte).then(|| i64::from(byte - b'0'))?;
        sum.checked_mul(8)?.checked_add(digit)
    });
    Ok(value.ok_or_else(bad)?)
}
