//! Writes tar archives, also wrong ones.
use std::collections::BTreeMap;

/// An entry to be written.
#[derive(Debug, Clone)]
pub struct Item {
    pub path: Vec<u8>,
    pub kind: u8,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: i64,
    pub nanos: u32,
    pub device: (u32, u32),
    pub data: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Item {
    fn new(path: &[u8], kind: u8, mode: u32) -> Self {
        let path = path.to_vec();
        let (link, data, xattrs) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self {
            path,
            kind,
            link,
            mode,
            uid: 0,
            gid: 0,
            mtime: 1_600_000_000,
            nanos: 0,
            device: (0, 0),
            data,
            xattrs,
        }
    }

    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub fn time(mut self, mtime: i64, nanos: u32) -> Self {
        (self.mtime, self.nanos) = (mtime, nanos);
        self
    }

    pub fn xattr(mut self, name: &[u8], value: &[u8]) -> Self {
        self.xattrs.insert(name.to_vec(), value.to_vec());
        self
    }
}

pub fn dir(path: impl AsRef<[u8]>) -> Item {
    Item::new(path.as_ref(), b'5', 0o755)
}

pub fn file(path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Item {
    Item { data: data.as_ref().to_vec(), ..Item::new(path.as_ref(), b'0', 0o644) }
}

pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
    Item { link: target.as_ref().to_vec(), ..Item::new(path.as_ref(), b'2', 0o777) }
}

pub fn hardlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
    Item { link: target.as_ref().to_vec(), ..Item::new(path.as_ref(), b'1', 0o644) }
}

pub fn device(path: impl AsRef<[u8]>, kind: u8, major: u32, minor: u32) -> Item {
    Item { device: (major, minor), ..Item::new(path.as_ref(), kind, 0o600) }
}

pub fn fifo(path: impl AsRef<[u8]>) -> Item {
    Item::new(path.as_ref(), b'6', 0o640)
}

/// A whole archive.
pub fn archive(items: &[Item]) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        write(item, &mut out);
    }
    out.resize(out.len() + 1024, 0);
    out
}

pub fn write(item: &Item, out: &mut Vec<u8>) {
    let mut records = Vec::new();
    if item.path.len() > 100 {
        record(b"path", &item.path, &mut records);
    }
    if item.link.len() > 100 {
        record(b"linkpath", &item.link, &mut records);
    }
    if item.nanos > 0 || item.mtime < 0 || item.mtime >= 1 << 33 {
        record(b"mtime", format!("{}.{:09}", item.mtime, item.nanos).as_bytes(), &mut records);
    }
    for (name, value) in &item.xattrs {
        record(&[b"SCHILY.xattr.", name.as_slice()].concat(), value, &mut records);
    }
    if !records.is_empty() {
        extension(b'x', &records, out);
    }
    out.extend_from_slice(&header(item, item.data.len() as u64));
    out.extend_from_slice(&item.data);
    pad(out);
}

/// An extended header with these records or this long name.
pub fn extension(kind: u8, data: &[u8], out: &mut Vec<u8>) {
    let mut item = Item::new(b"extension", kind, 0o644);
    item.mtime = 0;
    out.extend_from_slice(&header(&item, data.len() as u64));
    out.extend_from_slice(data);
    pad(out);
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
pub fn record(key: &[u8], value: &[u8], out: &mut Vec<u8>) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(format!("{length} ").as_bytes());
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

pub fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(512), 0);
}

/// A ustar header that says the data has `size` bytes.
pub fn header(item: &Item, size: u64) -> Vec<u8> {
    let mut out = vec![0; 512];
    let put = |out: &mut Vec<u8>, at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    let cut = |bytes: &[u8]| bytes[..bytes.len().min(100)].to_vec();
    put(&mut out, 0, &cut(&item.path));
    put(&mut out, 100, format!("{:07o}", item.mode).as_bytes());
    number(&mut out[108..116], item.uid);
    number(&mut out[116..124], item.gid);
    number(&mut out[124..136], size);
    number(&mut out[136..148], item.mtime.max(0) as u64);
    out[156] = item.kind;
    put(&mut out, 157, &cut(&item.link));
    put(&mut out, 257, b"ustar\x0000");
    number(&mut out[329..337], u64::from(item.device.0));
    number(&mut out[337..345], u64::from(item.device.1));
    seal(&mut out);
    out
}

/// Gives a header its checksum.
pub fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Octal if it fits, base 256 otherwise.
fn number(field: &mut [u8], value: u64) {
    let octal = format!("{value:0width$o}", width = field.len() - 1);
    if octal.len() < field.len() {
        field[..octal.len()].copy_from_slice(octal.as_bytes());
        return;
    }
    field.fill(0);
    let end = field.len();
    field[end - 8.min(end)..].copy_from_slice(&value.to_be_bytes()[8 - 8.min(end)..]);
    field[0] = 0x80;
}
