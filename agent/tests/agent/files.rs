//! Files: what is read, written, listed, removed and copied; what blocks nobody; and what is left afterwards.

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

#[test]
fn what_is_written_is_read_whatever_its_name_and_size() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let names: [&[u8]; 4] = [b"plain", b"a\nb c", b"\xff\xfe\x01", b"-rf *"];
    for (name, size) in names.iter().zip([0, 1, CHUNK, 300_001]) {
        let (path, content) = (scratch.at(OsStr::from_bytes(name)), noise(size));
        let pieces: Vec<&[u8]> = content.chunks(CHUNK).collect();
        assert_eq!(put(&mut client, &write(&path, WriteHow::Truncate), &pieces), Ok(FileDone::Done));
        assert!(fs::read(&path).unwrap() == content);
        let (said, ended) = ask(&mut client, &read(&path));
        assert_eq!(ended, Ok(FileDone::Done));
        assert!(said.data == content, "{} bytes of {size}", said.data.len());
        let opened = said.opened.unwrap();
        assert_eq!((opened.size, opened.mode & 0o7777), (size as u64, 0o644));
    }
    // A part of it.
    let part = FileRequest::Read {
        path: bytes(scratch.at(OsStr::from_bytes(names[3]))),
        offset: 1000,
        length: Some(70_000),
    };
    assert!(ask(&mut client, &part).0.data == noise(300_001)[1000..71_000]);
    // What the kernel makes up has no size, and bytes nevertheless.
    assert!(ask(&mut client, &read("/proc/self/status")).0.data.starts_with(b"Name:\tcubby-agent"));
}

#[test]
fn a_small_file_is_one_message_each_way() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let path = scratch.at("small");
    assert_eq!(put(&mut client, &write(&path, WriteHow::CreateNew), &[b"hello"]), Ok(FileDone::Done));
    let (said, ended) = ask(&mut client, &read(&path));
    assert_eq!((ended, said.data.as_slice(), said.frames), (Ok(FileDone::Done), &b"hello"[..], 3));
    let again = write(&path, WriteHow::CreateNew);
    assert_eq!(put(&mut client, &again, &[b"x"]), Err((17, path.clone())));
    assert_eq!(put(&mut client, &write(&path, WriteHow::Append), &[b", ", b"you"]), Ok(FileDone::Done));
    assert_eq!(fs::read(&path).unwrap(), b"hello, you");
    assert_eq!(put(&mut client, &write(&path, WriteHow::Truncate), &[b"bye"]), Ok(FileDone::Done));
    assert_eq!(fs::read(&path).unwrap(), b"bye");
}

#[test]
fn a_hundred_mebibytes_go_in_and_come_out_within_the_windows() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let (path, block) = (scratch.at("large"), noise(1 << 20));
    let id = begin(&mut client, &write(&path, WriteHow::Truncate));
    let mut window = INITIAL_WINDOW;
    for _ in 0..100 {
        for chunk in block.chunks(CHUNK) {
            while (window as usize) < chunk.len() {
                let (kind, _, payload) = client.frame().unwrap();
                assert_eq!(kind, Kind::Credit);
                window += decode::<Credit>(&payload).unwrap().bytes;
                assert!(window <= INITIAL_WINDOW, "more than there is room for");
            }
            client.send_raw(Kind::FileData, id, chunk);
            window -= u32::try_from(chunk.len()).unwrap();
        }
    }
    client.send_raw(Kind::FileEnd, id, b"");
    assert_eq!(finish(&mut client, id).1, Ok(FileDone::Done));
    let (said, ended) = ask(&mut client, &read(&path));
    assert_eq!((ended, said.data.len()), (Ok(FileDone::Done), 100 << 20));
    assert!(said.data.chunks(1 << 20).all(|mebibyte| mebibyte == block));
}

#[test]
fn holes_are_neither_sent_nor_written() {
    const GIB: u64 = 1 << 30;
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let path = scratch.at("sparse");
    let id = begin(&mut client, &write(&path, WriteHow::Truncate));
    client.send(Kind::FileHole, id, &FileHole { bytes: 2 * GIB });
    client.send_raw(Kind::FileData, id, b"middle");
    client.send(Kind::FileHole, id, &FileHole { bytes: 3 * GIB - 6 });
    client.send_raw(Kind::FileEnd, id, b"");
    assert_eq!(finish(&mut client, id).1, Ok(FileDone::Done));
    let written = fs::metadata(&path).unwrap();
    assert_eq!(written.len(), 5 * GIB);
    assert!(written.blocks() * 512 <= 1 << 20, "{} blocks", written.blocks());
    let copy = scratch.at("copy");
    does(&mut client, &FileRequest::Copy { from: bytes(&path), to: bytes(&copy) });
    for path in [&path, &copy] {
        let (said, ended) = ask(&mut client, &read(path));
        assert_eq!(ended, Ok(FileDone::Done));
        let holes: u64 = said.holes.iter().map(|(_, size)| size).sum();
        assert_eq!(holes + said.data.len() as u64, 5 * GIB);
        assert!(said.data.len() <= 1 << 20, "{} bytes were sent", said.data.len());
        let (before, hole) = said.holes[0];
        assert_eq!(before, 0);
        let at = usize::try_from(2 * GIB - hole).unwrap();
        assert_eq!(&said.data[at..at + 6], b"middle");
        assert!(said.data.iter().filter(|byte| **byte != 0).count() == 6);
        assert!(fs::metadata(path).unwrap().blocks() * 512 <= 1 << 20);
    }
    // There is no room for these, and nothing to begin with at the end of a file that is added to.
    for (how, bytes, errno) in [(WriteHow::Truncate, u64::MAX, 27), (WriteHow::Append, 1, 22)] {
        let id = begin(&mut client, &write(&path, how));
        client.send(Kind::FileHole, id, &FileHole { bytes });
        client.send_raw(Kind::FileEnd, id, b"");
        assert_eq!(finish(&mut client, id).1, Err((errno, path.clone())));
    }
}

#[test]
fn errors_name_their_number_and_their_path() {
    use rustix::io::Errno;
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let (missing, file) = (scratch.at("missing"), scratch.at("file"));
    fs::write(&file, "x").unwrap();
    let below = file.join("below");
    for path in [&missing, &below] {
        let errno = if path == &missing { Errno::NOENT } else { Errno::NOTDIR };
        let path = bytes(path);
        let at = OsStr::from_bytes(&path.0).to_owned();
        for request in [
            FileRequest::Stat { path: path.clone(), follow: true },
            FileRequest::List { path: path.clone() },
            FileRequest::Read { path: path.clone(), offset: 0, length: None },
            FileRequest::Remove { path: path.clone(), all: true },
            FileRequest::Remove { path: path.clone(), all: false },
            FileRequest::Rename { from: path.clone(), to: bytes(scratch.at("other")) },
            FileRequest::Copy { from: path.clone(), to: bytes(scratch.at("other")) },
            FileRequest::ReadLink { path: path.clone() },
        ] {
            if matches!(request, FileRequest::Rename { .. }) && errno == Errno::NOTDIR {
                continue; // The kernel does not say which of the two.
            }
            fails(&mut client, &request, errno, &at);
        }
    }
    fails(&mut client, &read(&scratch.0), Errno::ISDIR, &scratch.0);
    fails(&mut client, &write(&scratch.0, WriteHow::Atomic), Errno::ISDIR, &scratch.0);
    fails(&mut client, &FileRequest::MakeDirectory { path: bytes(&file), mode: None }, Errno::EXIST, &file);
    fails(&mut client, &read(OsStr::from_bytes(b"/a\0b")), Errno::INVAL, OsStr::from_bytes(b"/a\0b"));
    fails(&mut client, &read(""), Errno::NOENT, "");
    assert_eq!(put(&mut client, &write("/dev/full", WriteHow::Truncate), &[b"x"]).unwrap_err().0, 95);
    // A name too long, and a path.
    let long = scratch.at("n".repeat(256));
    fails(
        &mut client,
        &FileRequest::Symlink { target: bytes("x"), path: bytes(&long) },
        Errno::NAMETOOLONG,
        &long,
    );
}

#[test]
fn what_is_no_file_blocks_nobody() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let fifo = scratch.at("fifo");
    assert_eq!(client.run(&shell(&format!("mkfifo {}", fifo.display()))).code(), 0);
    let threads = count(&agent, "task");
    for path in [&fifo, &PathBuf::from("/dev/null"), &PathBuf::from("/dev/ptmx")] {
        assert_eq!(ask(&mut client, &read(path)).1, Err((95, path.clone())));
        for how in [WriteHow::Truncate, WriteHow::Append, WriteHow::Atomic] {
            assert_eq!(put(&mut client, &write(path, how), &[b"x"]), Err((95, path.clone())));
        }
    }
    // Nobody was let in on the other side of the FIFO, either.
    assert!(count(&agent, "task") <= threads + 1, "a thread hangs");
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
}

#[test]
fn directories_are_made_listed_and_removed_with_all_that_is_in_them() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let deep = scratch.at("a/b/c");
    let make = |mode| FileRequest::MakeDirectory { path: bytes(&deep), mode };
    does(&mut client, &make(Some(0o2711)));
    assert_eq!(fs::metadata(&deep).unwrap().permissions().mode() & 0o7777, 0o2711);
    assert_eq!(fs::metadata(scratch.at("a/b")).unwrap().permissions().mode() & 0o7777, 0o755);
    // That it is there is no failure, and no reason to change it.
    does(&mut client, &make(Some(0o700)));
    assert_eq!(fs::metadata(&deep).unwrap().permissions().mode() & 0o7777, 0o2711);

    let victim = scratch.at("victim");
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("stays"), "x").unwrap();
    symlink(&victim, deep.join("link")).unwrap();
    fs::write(deep.join("file"), "four").unwrap();
    let (said, ended) = ask(&mut client, &FileRequest::List { path: bytes(&deep) });
    assert_eq!(ended, Ok(FileDone::Done));
    let entries: BTreeMap<Vec<u8>, FileMetadata> =
        said.entries.into_iter().map(|entry| (entry.name.0, entry.metadata)).collect();
    assert_eq!(entries.len(), 2);
    assert_eq!((entries[&b"file"[..]].size, entries[&b"file"[..]].mode & 0o170_000), (4, 0o100_000));
    assert_eq!(entries[&b"link"[..]].mode & 0o170_000, 0o120_000);

    fails(
        &mut client,
        &FileRequest::Remove { path: bytes(scratch.at("a")), all: false },
        rustix::io::Errno::NOTEMPTY,
        scratch.at("a"),
    );
    does(&mut client, &FileRequest::Remove { path: bytes(scratch.at("a")), all: true });
    assert!(!scratch.at("a").exists());
    assert!(victim.join("stays").exists(), "a link was followed");
    // A link to a directory goes, and what it leads to stays.
    symlink(&victim, scratch.at("link")).unwrap();
    does(&mut client, &FileRequest::Remove { path: bytes(scratch.at("link")), all: true });
    assert!(victim.join("stays").exists() && fs::symlink_metadata(scratch.at("link")).is_err());
    does(&mut client, &FileRequest::Remove { path: bytes(victim.join("stays")), all: false });
    does(&mut client, &FileRequest::Remove { path: bytes(&victim), all: false });
}

#[test]
fn a_deep_tree_is_removed_and_copied() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let deep = format!("tree{}", "/d".repeat(500));
    fs::create_dir_all(scratch.at(&deep)).unwrap();
    fs::write(scratch.at(&deep).join("bottom"), "x").unwrap();
    let (tree, copy) = (scratch.at("tree"), scratch.at("copy"));
    assert_eq!(client.run(&shell("ulimit -n")).code(), 0);
    does(&mut client, &FileRequest::Copy { from: bytes(&tree), to: bytes(&copy) });
    assert!(copy.join(deep.strip_prefix("tree/").unwrap()).join("bottom").exists());
    does(&mut client, &FileRequest::Remove { path: bytes(&copy), all: true });
    does(&mut client, &FileRequest::Remove { path: bytes(&tree), all: true });
    assert_eq!(scratch.names(), [""; 0]);
}

#[test]
fn a_hundred_thousand_entries_are_listed_piece_by_piece_as_they_are_taken() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let total = 100_000;
    for number in 0..total {
        fs::File::create(scratch.at(format!("{number:0>60}"))).unwrap();
    }
    let id = begin(&mut client, &FileRequest::List { path: bytes(&scratch.0) });
    // Without credit, no more than the window comes; then the rest does.
    let (mut taken, mut entries) = (0, Vec::new());
    while taken + 2 * (32 << 10) < INITIAL_WINDOW as usize {
        let (kind, _, payload) = client.frame().unwrap();
        assert_eq!(kind, Kind::FileEntries);
        taken += payload.len();
        entries.extend(decode::<FileEntries>(&payload).unwrap().0);
    }
    client.send_raw(Kind::Ping, SessionId(0), b"");
    loop {
        let (kind, _, payload) = client.frame().unwrap();
        if kind == Kind::Pong {
            break;
        }
        taken += payload.len();
        entries.extend(decode::<FileEntries>(&payload).unwrap().0);
    }
    assert!(taken <= INITIAL_WINDOW as usize && entries.len() < total, "{taken} bytes without credit");
    client.send(Kind::Credit, id, &Credit { bytes: u32::try_from(taken).unwrap() });
    let (said, ended) = finish(&mut client, id);
    assert_eq!(ended, Ok(FileDone::Done));
    entries.extend(said.entries);
    let mut names: Vec<_> = entries.into_iter().map(|entry| entry.name.0).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), total);
}

#[test]
fn a_copy_of_a_tree_is_as_it_was() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let (from, to) = (scratch.at("from"), scratch.at("to"));
    let script = format!(
        "mkdir -p {0}/sub && cd {0} && echo text > sub/file && chmod 4751 sub/file && ln -s /nowhere sub/link && \
         mkfifo sub/fifo && chmod 1700 sub && touch -d @1000.5 sub/file && touch -hd @2000 sub/link && touch -d @3000 sub",
        from.display()
    );
    assert_eq!(client.run(&shell(&script)).code(), 0);
    let copy = |from: &Path, to: &Path| FileRequest::Copy { from: bytes(from), to: bytes(to) };
    does(&mut client, &copy(&from, &to));
    for name in ["sub", "sub/file", "sub/link", "sub/fifo"] {
        let of = |root: &Path| {
            let found = fs::symlink_metadata(root.join(name)).unwrap();
            (found.mode(), found.mtime(), found.mtime_nsec(), found.uid(), found.gid())
        };
        assert_eq!(of(&from), of(&to), "{name}");
    }
    assert_eq!(fs::read_link(to.join("sub/link")).unwrap(), Path::new("/nowhere"));
    assert_eq!(fs::read(to.join("sub/file")).unwrap(), b"text\n");
    // What is in the way is replaced and not written through.
    fs::write(scratch.at("witness"), "untouched").unwrap();
    fs::remove_file(to.join("sub/file")).unwrap();
    symlink(scratch.at("witness"), to.join("sub/file")).unwrap();
    fs::remove_file(from.join("sub/fifo")).unwrap();
    does(&mut client, &copy(&from, &to));
    assert_eq!(fs::read(to.join("sub/file")).unwrap(), b"text\n");
    assert_eq!(fs::read(scratch.at("witness")).unwrap(), b"untouched");
    // Nothing becomes its own copy.
    for (from, to) in [(from.clone(), from.join("sub/in")), (from.join("sub/file"), from.join("sub/file"))] {
        assert_eq!(ask(&mut client, &copy(&from, &to)).1, Err((22, to.clone())));
    }
    assert_eq!(fs::read(from.join("sub/file")).unwrap(), b"text\n");
}

#[test]
fn names_links_modes_and_times_are_changed() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let (file, link, other) = (scratch.at("file"), scratch.at("link"), scratch.at("other"));
    fs::write(&file, "x").unwrap();
    does(&mut client, &FileRequest::Symlink { target: bytes(&file), path: bytes(&link) });
    assert_eq!(
        ask(&mut client, &FileRequest::ReadLink { path: bytes(&link) }).1,
        Ok(FileDone::Link(bytes(&file)))
    );
    let time = |seconds| FileTime { seconds, nanoseconds: 7 };
    let set = |follow, attributes| FileRequest::SetAttributes { path: bytes(&link), follow, attributes };
    let attributes =
        FileAttributes { mode: Some(0o4711), owner: None, times: Some((time(-5), time(1 << 33))) };
    does(&mut client, &set(true, attributes));
    let times = FileAttributes { mode: None, owner: None, times: Some((time(1), time(2))) };
    does(&mut client, &set(false, times));
    let Ok(FileDone::Metadata(found)) =
        ask(&mut client, &FileRequest::Stat { path: bytes(&link), follow: true }).1
    else {
        panic!("no metadata")
    };
    assert_eq!((found.mode, found.accessed, found.modified), (0o104_711, time(-5), time(1 << 33)));
    let Ok(FileDone::Metadata(found)) =
        ask(&mut client, &FileRequest::Stat { path: bytes(&link), follow: false }).1
    else {
        panic!("no metadata")
    };
    assert_eq!((found.mode & 0o170_000, found.modified), (0o120_000, time(2)));
    if rustix::process::geteuid().is_root() {
        let owner = FileAttributes { owner: Some((1234, u32::MAX)), ..FileAttributes::default() };
        does(&mut client, &set(true, owner));
        let owned = fs::metadata(&file).unwrap();
        assert_eq!((owned.uid(), owned.gid()), (1234, fs::metadata(&scratch.0).unwrap().gid()));
    }
    does(&mut client, &FileRequest::Rename { from: bytes(&file), to: bytes(&other) });
    assert_eq!(scratch.names(), ["link", "other"]);
}

#[test]
fn an_atomic_write_shows_all_or_nothing_and_leaves_nothing() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let (mut client, mut gone) = (agent.connect(), agent.connect());
    let path = scratch.at("config");
    fs::write(&path, "old").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let atomic = write(&path, WriteHow::Atomic);
    let id = begin(&mut client, &atomic);
    client.send_raw(Kind::FileData, id, b"new");
    until("the temporary file", || scratch.names().len() == 2);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    client.send_raw(Kind::FileEnd, id, b"");
    assert_eq!(finish(&mut client, id).1, Ok(FileDone::Done));
    assert_eq!((fs::read(&path).unwrap(), scratch.names()), (b"new".to_vec(), vec!["config".to_owned()]));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    // Called off, and with its client gone.
    let id = begin(&mut client, &atomic);
    client.send_raw(Kind::FileData, id, b"half");
    until("the temporary file", || scratch.names().len() == 2);
    client.send_raw(Kind::FileCancel, id, b"");
    assert_eq!(finish(&mut client, id).1, Err((125, PathBuf::new())));
    until("its end", || scratch.names() == ["config"]);
    let id = begin(&mut gone, &atomic);
    gone.send_raw(Kind::FileData, id, b"half");
    until("the temporary file", || scratch.names().len() == 2);
    drop(gone);
    until("its end", || scratch.names() == ["config"]);
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

#[test]
fn clients_that_stall_hold_no_thread_and_leave_nothing() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let large = scratch.at("large");
    fs::write(&large, noise(4 << 20)).unwrap();
    let mut witness = agent.connect();
    assert!(ask(&mut witness, &FileRequest::Stat { path: bytes(&large), follow: true }).1.is_ok());
    until("rest", || count(&agent, "task") == 1);
    let descriptors = count(&agent, "fd");
    // Far more of them than there are threads: one that gives no credit, one that does not read at all.
    let (mut windows, mut deaf) = (agent.connect(), agent.connect());
    for _ in 0..40 {
        begin(&mut windows, &read(&large));
        let id = begin(&mut deaf, &read(&large));
        deaf.send(Kind::Credit, id, &Credit { bytes: u32::MAX });
        begin(&mut windows, &write(scratch.at("half"), WriteHow::Truncate));
    }
    let mut taken = 0;
    while taken < 40 * INITIAL_WINDOW as usize {
        let (kind, _, payload) = windows.frame().unwrap();
        taken += if kind == Kind::FileData { payload.len() } else { 0 };
    }
    let (said, ended) = ask(&mut witness, &read(&large));
    assert!(ended.is_ok() && said.data == noise(4 << 20));
    until("threads without work to end", || count(&agent, "task") == 1);
    assert!(count(&agent, "fd") >= descriptors + 80, "nothing was open");
    drop((windows, deaf));
    until("everything to be closed", || count(&agent, "fd") == descriptors && count(&agent, "task") == 1);
}

#[test]
fn the_turns_go_round() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let large = scratch.at("large");
    fs::write(&large, noise(64 << 20)).unwrap();
    // The first has more credit than it can ever use; the second is not to wait until it is done.
    let first = begin(&mut client, &read(&large));
    client.send(Kind::Credit, first, &Credit { bytes: u32::MAX });
    let second = begin(&mut client, &read(&large));
    client.send(Kind::Credit, second, &Credit { bytes: u32::MAX });
    let mut taken: BTreeMap<SessionId, usize> = BTreeMap::new();
    loop {
        let (kind, id, payload) = client.frame().unwrap();
        match kind {
            Kind::FileData => *taken.entry(id).or_default() += payload.len(),
            Kind::FileDone => break,
            _ => {}
        }
    }
    // Without turns one would have nearly nothing. How even they are is the scheduler's, too.
    let least = taken.values().min().unwrap();
    assert!(taken.len() == 2 && *least >= 32 << 20, "{taken:?}");
}

#[test]
fn a_tree_that_nobody_wants_removed_any_more_is_left_alone() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut client = agent.connect();
    let tree = scratch.at("tree");
    for directory in 0..100 {
        let directory = tree.join(directory.to_string());
        fs::create_dir_all(&directory).unwrap();
        for file in 0..100 {
            fs::File::create(directory.join(file.to_string())).unwrap();
        }
    }
    let id = begin(&mut client, &FileRequest::Remove { path: bytes(&tree), all: true });
    client.send_raw(Kind::FileCancel, id, b"");
    assert_eq!(finish(&mut client, id).1.unwrap_err().0, 125);
    assert!(tree.exists(), "it was removed to the end");
    does(&mut client, &FileRequest::Remove { path: bytes(&tree), all: true });
}

#[test]
fn breaking_the_rules_costs_the_client_its_connection_and_nobody_else() {
    let (agent, scratch) = (Agent::start(), Scratch::new());
    let mut witness = agent.connect();
    let path = scratch.at("file");
    fs::write(&path, "x").unwrap();
    let mut over = agent.connect();
    let id = begin(&mut over, &write(scratch.at("new"), WriteHow::Truncate));
    // Credit comes when a quarter was written, which need not be before all this is here.
    let more = vec![0; cubby_protocol::MAX_PAYLOAD];
    over.send_raw(Kind::FileData, id, &more);
    assert!(matches!(over.fatal(), Fatal::Protocol(why) if why.contains("window")));
    for kind in [Kind::FileData, Kind::FileEnd] {
        let mut wrong = agent.connect();
        let (id, request) = (wrong.fresh(), FileRequest::List { path: bytes(&scratch.0) });
        // In one piece, so that the listing is not over before the rest comes.
        let mut frames = Vec::new();
        encode(Kind::FileRequest, id, &request, &mut frames).unwrap();
        encode_raw(kind, id, b"", &mut frames).unwrap();
        wrong.stream.write_all(&frames).unwrap();
        assert!(matches!(wrong.fatal(), Fatal::Protocol(_)));
    }
    let mut twice = agent.connect();
    let id = begin(&mut twice, &write(scratch.at("twice"), WriteHow::Truncate));
    twice.send(Kind::FileRequest, id, &read(&path));
    let (kind, _, payload) = twice.frame().unwrap();
    assert_eq!((kind, decode(&payload)), (Kind::Refused, Ok(Refused::SessionInUse)));
    assert_eq!(ask(&mut witness, &read(&path)).0.data, b"x");
}
