//! Frames that are followed one by one, whole or in pieces, and who keeps what of them.

use super::*;
use crate::backlog::Quota;
use cubby_protocol::message::Open;

fn frame(kind: Kind, session: SessionId) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_raw(kind, session, b"x", &mut bytes).unwrap();
    bytes
}

fn notes() -> Notes {
    Notes::new(OutputLog::default())
}

fn command(session: SessionId) -> Option<Box<Command>> {
    Some(Command::new(session, Open { program: "x".into(), ..Open::default() }, &Quota::default()))
}

#[test]
fn frames_that_an_agent_may_not_send_end_the_connection() {
    let mut allowed =
        vec![0x02, 0x04, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x4b, 0x61, 0x63, 0x64, 0x66, 0x69];
    // Those of files.
    allowed.extend([0x51, 0x52, 0x53, 0x54, 0x57, 0x58]);
    let mut seen = 0;
    for byte in 0..=u8::MAX {
        let Ok(kind) = Kind::try_from(byte) else { continue };
        // A good one before it, and all of it in pieces of any size.
        let session = SessionId::CONNECTION;
        let bytes = [frame(Kind::Pong, session), frame(kind, session)].concat();
        for size in 1..=bytes.len() {
            let (mut up, mut notes) = (Upstream::new(), notes());
            let outcome = bytes.chunks(size).try_for_each(|piece| up.commit(piece, false, &mut notes));
            assert_eq!(outcome.is_ok(), allowed.contains(&byte), "{kind:?} in pieces of {size}");
        }
        seen += usize::from(allowed.contains(&byte));
    }
    assert_eq!(seen, allowed.len());
    // Nor may it send what is no frame.
    let mut broken = frame(Kind::Stdout, SessionId::CONNECTION);
    broken[..4].fill(0xff);
    assert!(Upstream::new().commit(&broken, false, &mut notes()).is_err());
}

#[test]
fn a_drain_waits_for_work_and_not_for_who_listens() {
    let mut up = Upstream::new();
    for kind in [Kind::Open, Kind::Subscribe, Kind::Emit] {
        up.open(SessionId(kind as u32), kind.role(), None);
    }
    assert_eq!((up.sessions(), up.working()), (3, 2));
}

#[test]
fn sessions_are_over_when_the_relay_sees_their_end_and_not_before() {
    let [one, two] = [SessionId(1), SessionId(2)];
    let (mut up, mut notes) = (Upstream::new(), notes());
    up.open(one, Role::Opens, command(one));
    up.open(two, Role::Opens, None);
    let mut from_agent = |bytes: &[u8], left: &[SessionId]| {
        up.commit(bytes, false, &mut notes).unwrap();
        assert_eq!(up.sessions(), left.len());
        assert!(left.iter().all(|id| up.is_open(*id)));
    };
    from_agent(&frame(Kind::Stdout, one), &[one, two]);
    let end = frame(Kind::Exited, one);
    let (begin, rest) = end.split_at(Header::SIZE - 1);
    from_agent(begin, &[one, two]);
    from_agent(rest, &[two]);
    // One that is over, or never was, ends nothing.
    from_agent(&frame(Kind::Failed, one), &[two]);
    from_agent(&frame(Kind::Refused, two), &[]);
    assert_eq!(notes.ended.len(), 1);
}

/// What a client gets, and how many bytes stay, of a stream that arrives in pieces of one size and leaves in pieces
/// of another.
fn split(
    up: &mut Upstream,
    stream: &[u8],
    (arrives, leaves): (usize, usize),
    notes: &mut Notes,
) -> (Vec<u8>, usize) {
    let (mut sent, mut stayed) = (Vec::new(), 0);
    let (mut waiting, mut rest) = (Vec::new(), stream);
    loop {
        let run = up.next_run(&waiting).unwrap();
        if run.length == 0 {
            if rest.is_empty() {
                assert!(waiting.is_empty());
                return (sent, stayed);
            }
            let (now, later) = rest.split_at(arrives.min(rest.len()));
            waiting.extend_from_slice(now);
            rest = later;
            continue;
        }
        let count = if run.stays { run.length } else { run.length.min(leaves) };
        let bytes: Vec<u8> = waiting.drain(..count).collect();
        up.commit(&bytes, run.stays, notes).unwrap();
        if run.stays {
            stayed += count;
        } else {
            sent.extend_from_slice(&bytes);
        }
    }
}

#[test]
fn what_is_detached_stays_and_all_else_goes_however_the_stream_is_cut() {
    let [one, two, three] = [SessionId(1), SessionId(2), SessionId(3)];
    let order = [one, two, two, three, two, one, SessionId::CONNECTION, two];
    let mut stream = Vec::new();
    let mut expected = Vec::new();
    for (n, id) in order.into_iter().enumerate() {
        let kind = if id == SessionId::CONNECTION { Kind::Pong } else { Kind::Stdout };
        let mut bytes = Vec::new();
        encode_raw(kind, id, &vec![b'0' + id.0.to_le_bytes()[0]; n * 7], &mut bytes).unwrap();
        stream.extend_from_slice(&bytes);
        if id != two {
            expected.extend_from_slice(&bytes);
        }
    }
    for arrives in [1, 5, 12, 13, 40, 1000] {
        for leaves in [1, 7, 12, 1000] {
            let (mut up, mut notes) = (Upstream::new(), notes());
            for id in [one, two] {
                up.open(id, Role::Opens, command(id));
            }
            up.open(three, Role::Opens, None);
            assert!(up.detach(two) && !up.detach(two) && !up.detach(three));
            let (sent, stayed) = split(&mut up, &stream, (arrives, leaves), &mut notes);
            assert!(sent == expected, "arrives in {arrives}, leaves in {leaves}");
            assert_eq!(sent.len() + stayed, stream.len());
        }
    }
}

#[test]
fn a_frame_goes_to_its_end_the_way_on_which_it_began() {
    let one = SessionId(1);
    let whole = [frame(Kind::Stdout, one), frame(Kind::Stdout, one)].concat();
    let length = Header::SIZE + 1;
    for cut in 0..whole.len() {
        let (mut up, mut notes) = (Upstream::new(), notes());
        up.open(one, Role::Opens, command(one));
        // The socket takes so much, and then the session is detached.
        let (mut sent, mut waiting) = (Vec::new(), whole.clone());
        while sent.len() < cut {
            let run = up.next_run(&waiting).unwrap();
            assert!(!run.stays);
            let bytes: Vec<u8> = waiting.drain(..run.length.min(cut - sent.len())).collect();
            up.commit(&bytes, false, &mut notes).unwrap();
            sent.extend(bytes);
        }
        up.detach(one);
        sent.extend(split(&mut up, &waiting, (3, 3), &mut notes).0);
        // Whole frames, and none that had not begun.
        assert_eq!(sent, whole[..cut.div_ceil(length) * length], "detached after {cut} bytes");
        assert!(up.at_boundary());
    }
}

#[test]
fn a_frame_waits_until_all_of_it_is_there_and_answers_pass_it() {
    let (mut up, mut notes) = (Upstream::new(), notes());
    let bytes = [frame(Kind::Pong, SessionId::CONNECTION), frame(Kind::Pong, SessionId::CONNECTION)].concat();
    let length = bytes.len() / 2;
    for there in 0..=bytes.len() {
        let run = up.next_run(&bytes[..there]).unwrap();
        assert_eq!(run, Run { length: there / length * length, stays: false });
        assert!(up.at_boundary());
    }
    // One that has begun goes on as it comes.
    up.commit(&bytes[..3], false, &mut notes).unwrap();
    assert!(!up.at_boundary());
    assert_eq!(up.next_run(&bytes[3..length]).unwrap().length, length - 3);
    // One that could never be there whole ends the connection.
    let kind = Kind::Stdout;
    let large = u32::try_from(MAX_AGENT_FRAME - Header::SIZE).unwrap();
    for (length, fits) in [(large, true), (large + 1, false)] {
        let header = Header { length, kind, session: SessionId(1) }.to_bytes();
        assert_eq!(Upstream::new().next_run(&header).is_ok(), fits);
    }
}

#[test]
fn a_client_that_is_gone_leaves_what_it_has_detached() {
    let [one, two, three] = [SessionId(1), SessionId(2), SessionId(3)];
    let mut up = Upstream::new();
    for id in [one, two] {
        up.open(id, Role::Opens, command(id));
    }
    up.open(three, Role::Opens, None);
    up.detach(two);
    assert!(up.belongs_to_client(one) && !up.belongs_to_client(two) && up.belongs_to_client(three));
    let mut vsock = Vsock::new(3.try_into().unwrap());
    up.abandon(&mut vsock);
    assert!(up.is_open(two) && up.sessions() == 1);
    let mut told: Vec<u32> = Vec::new();
    let mut decoder = cubby_protocol::Decoder::default();
    decoder.push(&up.to_guest);
    while let Some(frame) = decoder.next_frame().unwrap() {
        assert_eq!((frame.header.kind, frame.payload()), (Kind::Abandon, &b""[..]));
        told.push(frame.header.session.0);
    }
    told.sort_unstable();
    assert_eq!(told, [1, 3]);
    // And what is lost with the stream is lost as by a kill.
    let lost: Vec<_> = up.lose().collect();
    let info = lost[0].info();
    assert!(info.detached && info.end.is_some());
}

#[test]
fn a_message_without_end_ends_the_connection() {
    let one = SessionId(1);
    let mut up = Upstream::new();
    up.open(one, Role::Opens, command(one));
    let mut bytes = Vec::new();
    encode_raw(Kind::Failed, one, &[0; MAX_MESSAGE + 1], &mut bytes).unwrap();
    assert!(up.commit(&bytes, false, &mut notes()).is_err());
}
