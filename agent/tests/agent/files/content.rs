//! Bytes of files: what is written is read, holes and all, and an atomic write is whole or nothing.

use super::*;

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
