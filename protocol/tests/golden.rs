//! The bytes of every message, pinned: a change here is a change of the protocol's version.
#![allow(clippy::indexing_slicing, clippy::unwrap_used)]
use cubby_protocol::message::*;
use cubby_protocol::{FrameError, Kind, SessionId, decode, encode};
use serde::{Serialize, de::DeserializeOwned};

fn pinned<M: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(
    kind: Kind,
    message: &M,
    golden: &[u8],
) {
    let mut frame = Vec::new();
    encode(kind, SessionId(7), message, &mut frame).unwrap();
    assert_eq!(frame.get(12..).unwrap(), golden, "{message:?}");
    assert_eq!(&decode::<M>(golden).unwrap(), message);
    for cut in 0..golden.len() {
        assert!(decode::<M>(&golden[..cut]).is_err(), "{message:?} decodes from {cut} bytes");
    }
    let mut long = golden.to_vec();
    long.push(0);
    assert!(matches!(decode::<M>(&long), Err(FrameError::Malformed { .. })));
}

#[test]
fn messages_have_their_golden_bytes() {
    let open = Open {
        program: "sh".into(),
        args: vec!["-c".into(), "true".into()],
        env: vec![("A".into(), "b".into())],
        cwd: Some("/".into()),
        user: None,
        tty: Some(TtySize { rows: 24, cols: 300 }),
        stdin: true,
        rlimits: vec![Rlimit { resource: 7, soft: 1, hard: u64::MAX }],
        timeout_ms: Some(250),
    };
    pinned(
        Kind::Open,
        &open,
        &[
            2, b's', b'h', 2, 2, b'-', b'c', 4, b't', b'r', b'u', b'e', 1, 1, b'A', 1, b'b', 1, 1, b'/', 0,
            1, 24, 251, 44, 1, 1, 1, 7, 1, 253, 255, 255, 255, 255, 255, 255, 255, 255, 1, 250,
        ],
    );
    pinned(Kind::Started, &Started { pid: 300 }, &[251, 44, 1]);
    pinned(Kind::Exited, &Exited::Code(-1), &[0, 1]);
    pinned(Kind::Exited, &Exited::Signal(9), &[1, 18]);
    pinned(Kind::Exited, &Exited::OutOfMemory, &[2]);
    pinned(Kind::Exited, &Exited::TimedOut, &[3]);
    pinned(
        Kind::Failed,
        &ExecFailed { kind: ExecFailure::NotFound, errno: 2, subject: "nope".into() },
        &[0, 4, 4, b'n', b'o', b'p', b'e'],
    );
    pinned(Kind::Refused, &Refused::Draining, &[0]);
    pinned(Kind::Credit, &Credit { bytes: 65_536 }, &[252, 0, 0, 1, 0]);
    pinned(Kind::Signal, &Signal { number: 15 }, &[30]);
    pinned(Kind::Resize, &TtySize { rows: 1, cols: 2 }, &[1, 2]);
    pinned(Kind::Request, &Request::Drain { deadline_ms: Some(5) }, &[3, 1, 5]);
    pinned(Kind::Request, &Request::Kill, &[5]);
    pinned(Kind::Reply, &Reply::Done, &[0]);
    pinned(Kind::Request, &Request::Sessions, &[8]);
    pinned(Kind::Request, &Request::DetachSession { session: 17 }, &[9, 17]);
    pinned(
        Kind::Request,
        &Request::SetNetwork { policy: "\"all\"".into() },
        &[10, 5, b'"', b'a', b'l', b'l', b'"'],
    );
    pinned(Kind::Request, &Request::NetworkCounters, &[11]);
    pinned(Kind::Refused, &Refused::NoNetwork, &[7]);
    pinned(Kind::Attach, &Attach { session: 300 }, &[251, 44, 1]);
    pinned(Kind::Welcome, &Welcome { first: 17, step: 16 }, &[17, 16]);
    pinned(Kind::Refused, &Refused::NoSuchSession { session: 5 }, &[4, 5]);
    pinned(Kind::Refused, &Refused::NotDetached { session: 5 }, &[5, 5]);
    let info = SessionInfo {
        session: 17,
        command: vec!["ls".into()],
        started_ns: 2,
        pid: Some(9),
        tty: true,
        detached: true,
        attached: 1,
        end: Some(SessionEnd::Exited(Exited::Code(1))),
    };
    let golden = [4, 1, 17, 1, 2, b'l', b's', 2, 1, 9, 1, 1, 1, 1, 0, 0, 2];
    pinned(Kind::Reply, &Reply::Sessions(vec![info]), &golden);
    pinned(Kind::Shutdown, &Shutdown { grace_ms: 100 }, &[100]);
    pinned(Kind::SetClock, &SetClock { realtime_ns: 1 }, &[1]);
    pinned(Kind::Fatal, &Fatal::VersionMismatch { ours: 1 }, &[0, 1]);
    pinned(
        Kind::SetupFailed,
        &SetupFailed { stage: SetupStage::ImageDisk, message: "x".into() },
        &[2, 1, b'x'],
    );
    let config = GuestConfig {
        hostname: "h".into(),
        realtime_ns: 1,
        env: vec![],
        root: RootDisks { image: "/dev/vda".into(), disk: None },
        ..GuestConfig::default()
    };
    let mut golden = vec![1, b'h', 1];
    golden.extend([0; 32]);
    golden.extend([0, 0, 0, 0, 8]);
    golden.extend(b"/dev/vda");
    golden.extend([0, 0]);
    pinned(Kind::Configure, &config, &golden);
    let network = Network {
        mtu: Some(1500),
        ipv4: Some(Subnet { address: [10, 0, 0, 2].into(), prefix: 24, gateway: Some([10, 0, 0, 1].into()) }),
        ipv6: Some(Subnet { address: [0xfd00, 0, 0, 0, 0, 0, 0, 2].into(), prefix: 64, gateway: None }),
    };
    golden.pop();
    golden.extend([1, 1, 251, 0xdc, 5, 1, 10, 0, 0, 2, 24, 1, 10, 0, 0, 1]);
    golden.extend([1, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 64, 0]);
    pinned(Kind::Configure, &GuestConfig { network: Some(network), ..config }, &golden);
}

#[test]
fn events_and_metrics_have_their_golden_bytes() {
    pinned(Kind::Subscribe, &Subscribe { name: None }, &[0]);
    pinned(Kind::Subscribe, &Subscribe { name: Some("hi".into()) }, &[1, 2, b'h', b'i']);
    let event = Event { dropped: 300, line: r#"{"event":"é"}"#.into() };
    let golden = [&[251, 44, 1, 14][..], r#"{"event":"é"}"#.as_bytes()].concat();
    pinned(Kind::Event, &event, &golden);
    let most = Event { dropped: u64::MAX, line: "x".repeat(MAX_EVENT).into() };
    let mut frame = Vec::new();
    encode(Kind::Event, SessionId(1), &most, &mut frame).unwrap();
    assert!(frame.len() - 12 <= Event::size_of(&most.line));
    let metrics = GuestMetrics {
        uptime_ns: 1,
        cpus: 2,
        cpu: GuestCpu {
            user_ns: 3,
            nice_ns: 4,
            system_ns: 5,
            idle_ns: 6,
            iowait_ns: 7,
            irq_ns: 8,
            softirq_ns: 9,
            steal_ns: 10,
        },
        memory: GuestMemory { total: 11, available: 12 },
        root: GuestFilesystem { total: 13, used: 14 },
        disk: GuestDisk { read: 15, written: 16 },
        interfaces: vec![GuestInterface {
            name: "lo".into(),
            received_bytes: 17,
            received_packets: 18,
            sent_bytes: 19,
            sent_packets: 20,
        }],
        processes: 21,
    };
    let mut golden: Vec<u8> = (1..=16).collect();
    golden.extend([1, 2, b'l', b'o', 17, 18, 19, 20, 21]);
    pinned(Kind::Measured, &metrics, &golden);
}

#[test]
fn messages_about_files_have_their_golden_bytes() {
    let path = || PathBytes(b"/\xff".to_vec());
    let request = |request: FileRequest, golden: &[u8]| pinned(Kind::FileRequest, &request, golden);
    request(FileRequest::Stat { path: path(), follow: true }, &[0, 2, b'/', 0xff, 1]);
    request(FileRequest::List { path: path() }, &[1, 2, b'/', 0xff]);
    request(
        FileRequest::Read { path: path(), offset: 300, length: Some(7) },
        &[2, 2, b'/', 0xff, 251, 44, 1, 1, 7],
    );
    let times = (FileTime { seconds: -1, nanoseconds: 5 }, FileTime { seconds: 2, nanoseconds: 0 });
    let attributes = FileAttributes { mode: Some(0o755), owner: Some((1, 2)), times: Some(times) };
    let golden = [1, 251, 0xed, 1, 1, 1, 2, 1, 1, 5, 4, 0];
    request(
        FileRequest::Write { path: path(), how: WriteHow::Atomic, attributes, sync: true },
        &[&[3, 2, b'/', 0xff, 3][..], &golden, &[1]].concat(),
    );
    request(FileRequest::MakeDirectory { path: path(), mode: None }, &[4, 2, b'/', 0xff, 0]);
    request(FileRequest::Remove { path: path(), all: true }, &[5, 2, b'/', 0xff, 1]);
    request(FileRequest::Rename { from: path(), to: path() }, &[6, 2, b'/', 0xff, 2, b'/', 0xff]);
    request(FileRequest::Copy { from: path(), to: path() }, &[7, 2, b'/', 0xff, 2, b'/', 0xff]);
    request(FileRequest::Symlink { target: path(), path: path() }, &[8, 2, b'/', 0xff, 2, b'/', 0xff]);
    request(FileRequest::ReadLink { path: path() }, &[9, 2, b'/', 0xff]);
    let attributes = FileAttributes::default();
    let set = FileRequest::SetAttributes { path: path(), follow: false, attributes };
    request(set, &[10, 2, b'/', 0xff, 0, 0, 0, 0]);
    let metadata = FileMetadata {
        mode: 0o100_644,
        size: 1,
        allocated: 2,
        uid: 3,
        gid: 4,
        links: 5,
        inode: 6,
        accessed: FileTime::default(),
        modified: FileTime::default(),
        changed: FileTime { seconds: 1, nanoseconds: 9 },
    };
    let golden = [251, 0xa4, 0x81, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 2, 9];
    pinned(Kind::FileOpened, &metadata, &golden);
    let entry = FileEntry { name: path(), metadata };
    pinned(Kind::FileEntries, &FileEntries(vec![entry]), &[&[1, 2, b'/', 0xff][..], &golden].concat());
    pinned(Kind::FileHole, &FileHole { bytes: 5 << 30 }, &[253, 0, 0, 0, 64, 1, 0, 0, 0]);
    pinned(Kind::FileDone, &FileDone::Done, &[0]);
    pinned(Kind::FileDone, &FileDone::Metadata(metadata), &[&[1][..], &golden].concat());
    pinned(Kind::FileDone, &FileDone::Link(path()), &[2, 2, b'/', 0xff]);
    pinned(Kind::FileFailed, &FileFailed { errno: 2, path: path() }, &[4, 2, b'/', 0xff]);
}

#[test]
fn a_length_that_lies_is_an_error_and_allocates_nothing() {
    // A string that claims 4 GiB in a frame of six bytes.
    let lie = [253, 0, 0, 0, 0, 1, 0, 0, 0];
    assert!(matches!(decode::<ExecFailed>(&lie), Err(FrameError::Malformed { .. })));
    let lie = [0, 0, 253, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0];
    assert!(matches!(decode::<ExecFailed>(&lie), Err(FrameError::Malformed { .. })));
    let lie = [4, 252, 0xff, 0xff, 0xff, 0xff, b'/'];
    assert!(matches!(decode::<FileFailed>(&lie), Err(FrameError::Malformed { .. })));
    let lie = [252, 0xff, 0xff, 0xff, 0xff, 1, b'/'];
    assert!(matches!(decode::<FileEntries>(&lie), Err(FrameError::Malformed { .. })));
}

#[test]
fn a_message_over_the_limit_leaves_the_buffer_alone() {
    let open = Open { program: "x".repeat(cubby_protocol::MAX_FRAME), ..Open::default() };
    let mut out = vec![1, 2, 3];
    assert!(encode(Kind::Open, SessionId(1), &open, &mut out).is_err());
    assert_eq!(out, [1, 2, 3]);
}

#[test]
fn what_is_told_of_the_network_has_its_golden_bytes() {
    let flow = NetworkFlow {
        protocol: FlowProtocol::Udp,
        inbound: true,
        peer: "1.2.3.4:300".parse().unwrap(),
        name: Some("a".into()),
    };
    let by = DeniedBy { rule: Some(3), why: "no".into() };
    let event = |what| NetworkEvent { lost: 1, at_ns: 2, what };
    pinned(
        Kind::NetworkEvent,
        &event(NetworkEventKind::Connected(flow.clone())),
        &[1, 2, 0, 1, 1, 0, 1, 2, 3, 4, 251, 44, 1, 1, 1, b'a'],
    );
    pinned(
        Kind::NetworkEvent,
        &event(NetworkEventKind::Denied(flow, by.clone())),
        &[1, 2, 1, 1, 1, 0, 1, 2, 3, 4, 251, 44, 1, 1, 1, b'a', 1, 3, 2, b'n', b'o'],
    );
    pinned(
        Kind::NetworkEvent,
        &event(NetworkEventKind::NameDenied("b".into(), DeniedBy { rule: None, ..by })),
        &[1, 2, 2, 1, b'b', 0, 2, b'n', b'o'],
    );
    pinned(
        Kind::NetworkEvent,
        &event(NetworkEventKind::AnswerDropped("c".into(), [127, 0, 0, 1].into())),
        &[1, 2, 3, 1, b'c', 0, 127, 0, 0, 1],
    );
    let dropped =
        DroppedFrames { refused: 5, malformed: 6, checksum: 7, spoofed: 8, fragments: 9, ignored: 10 };
    let counters = NetworkCounters {
        sent_frames: 1,
        sent_bytes: 2,
        received_frames: 3,
        received_bytes: 4,
        dropped,
        tcp_opened: 11,
        tcp_open: 12,
        tcp_failed: 13,
        udp_opened: 14,
        udp_open: 15,
        udp_dropped: 16,
        lookups: 17,
        denied: 18,
        limited: 19,
        replies_lost: 20,
    };
    let golden: Vec<u8> = [5, 1].into_iter().chain(1..=20).collect();
    pinned(Kind::Reply, &Reply::NetworkCounters(Some(counters.into())), &golden);
}
