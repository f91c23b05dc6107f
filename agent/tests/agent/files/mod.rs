//! Files: what is read, written, listed, removed and copied; what blocks nobody; and what is left afterwards.

mod content;
mod trees;
mod turns;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use cubby_protocol::message::*;
use cubby_protocol::{CHUNK, INITIAL_WINDOW, Kind, SessionId, decode, encode, encode_raw};

use crate::client::{Agent, Client, LIMIT, shell};

/// A directory of a test's own; dropped, it is removed.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("cubby-agent-files-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }

    /// The names in it.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn bytes(path: impl AsRef<Path>) -> PathBytes {
    PathBytes::from(path.as_ref().as_os_str().as_bytes())
}

/// What a session said until it ended.
#[derive(Debug, Default)]
struct Said {
    opened: Option<FileMetadata>,
    data: Vec<u8>,
    holes: Vec<(usize, u64)>,
    entries: Vec<FileEntry>,
    frames: usize,
}

/// How a session ended: with an answer, or with an error number and the path.
type Ended = Result<FileDone, (i32, PathBuf)>;

fn finish(client: &mut Client, id: SessionId) -> (Said, Ended) {
    let mut said = Said::default();
    loop {
        let (kind, from, payload) = client.frame().expect("the agent closed the connection");
        assert_eq!(from, id, "{kind:?}");
        said.frames += 1;
        let mut taken = u32::try_from(payload.len()).unwrap();
        match kind {
            Kind::FileOpened => said.opened = Some(decode(&payload).unwrap()),
            Kind::FileData => said.data.extend_from_slice(&payload),
            Kind::FileHole => {
                taken = FileHole::COST;
                said.holes.push((said.data.len(), decode::<FileHole>(&payload).unwrap().bytes));
            }
            Kind::FileEntries => said.entries.extend(decode::<FileEntries>(&payload).unwrap().0),
            Kind::Credit => {}
            Kind::FileDone => return (said, Ok(decode(&payload).unwrap())),
            Kind::FileFailed => {
                let FileFailed { errno, path } = decode(&payload).unwrap();
                return (said, Err((errno, OsStr::from_bytes(&path.0).into())));
            }
            kind => panic!("unexpected {kind:?}"),
        }
        if matches!(kind, Kind::FileData | Kind::FileHole | Kind::FileEntries) {
            client.send(Kind::Credit, id, &Credit { bytes: taken });
        }
    }
}

fn begin(client: &mut Client, request: &FileRequest) -> SessionId {
    let id = client.fresh();
    client.send(Kind::FileRequest, id, request);
    id
}

fn ask(client: &mut Client, request: &FileRequest) -> (Said, Ended) {
    let id = begin(client, request);
    finish(client, id)
}

/// Asks for what has no answer but that it was done.
fn does(client: &mut Client, request: &FileRequest) {
    assert_eq!(ask(client, request).1, Ok(FileDone::Done), "{request:?}");
}

fn fails(client: &mut Client, request: &FileRequest, errno: rustix::io::Errno, path: impl AsRef<Path>) {
    let expected = Err((errno.raw_os_error(), path.as_ref().to_owned()));
    assert_eq!(ask(client, request).1, expected, "{request:?}");
}

fn read(path: impl AsRef<Path>) -> FileRequest {
    FileRequest::Read { path: bytes(path), offset: 0, length: None }
}

fn write(path: impl AsRef<Path>, how: WriteHow) -> FileRequest {
    let attributes = FileAttributes::default();
    FileRequest::Write { path: bytes(path), how, attributes, sync: false }
}

/// Writes a file that fits into the window.
fn put(client: &mut Client, request: &FileRequest, pieces: &[&[u8]]) -> Ended {
    let id = begin(client, request);
    for piece in pieces {
        client.send_raw(Kind::FileData, id, piece);
    }
    client.send_raw(Kind::FileEnd, id, b"");
    finish(client, id).1
}

fn count(agent: &Agent, what: &str) -> usize {
    fs::read_dir(format!("/proc/{}/{what}", agent.pid())).unwrap().count()
}

/// Waits for what no frame tells.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < LIMIT, "{what} did not come");
        std::thread::yield_now();
    }
}

fn noise(size: usize) -> Vec<u8> {
    (0_u32..).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).take(size).collect()
}
