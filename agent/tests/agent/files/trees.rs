//! Names and trees: what is made, listed, copied, changed and removed.

use super::*;

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
