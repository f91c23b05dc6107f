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
    golden.push(0);
    pinned(Kind::Configure, &config, &golden);
}

#[test]
fn a_length_that_lies_is_an_error_and_allocates_nothing() {
    // A string that claims 4 GiB in a frame of six bytes.
    let lie = [253, 0, 0, 0, 0, 1, 0, 0, 0];
    assert!(matches!(decode::<ExecFailed>(&lie), Err(FrameError::Malformed { .. })));
    let lie = [0, 0, 253, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0];
    assert!(matches!(decode::<ExecFailed>(&lie), Err(FrameError::Malformed { .. })));
}

#[test]
fn a_message_over_the_limit_leaves_the_buffer_alone() {
    let open = Open { program: "x".repeat(cubby_protocol::MAX_FRAME), ..Open::default() };
    let mut out = vec![1, 2, 3];
    assert!(encode(Kind::Open, SessionId(1), &open, &mut out).is_err());
    assert_eq!(out, [1, 2, 3]);
}
