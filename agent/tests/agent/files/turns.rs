//! What blocks nobody, whose turn it is, what is left of who goes, and what an error says.

use super::*;

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
