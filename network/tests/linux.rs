//! Linux's own TCP/IP as the guest, in a network namespace behind a tap device, with segments of 64 KiB and checksums left to
//! us: what a real guest does. It needs `unshare`, `ip` and `python3`, and a user who may make namespaces.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cubby_network::policy::Rule;
use cubby_network::{
    Config, Counters, Gso, GsoKind, GuestOffloads, NetworkPolicy, Offload, PartialChecksum, PublishedPort,
    Resolvers, Stack, Transport,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// How long a guest may take for all that a test asks of it.
const PATIENCE: Duration = Duration::from_secs(120);
/// `struct virtio_net_hdr`.
const HEADER: usize = 10;

fn offload(header: &[u8]) -> Offload {
    let field = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let kind = match header[1] & 0x7f {
        0 => None,
        1 => Some(GsoKind::Tcp4),
        4 => Some(GsoKind::Tcp6),
        other => panic!("a bundle of kind {other}"),
    };
    Offload {
        checksum: (header[0] & 1 != 0).then(|| PartialChecksum { start: field(6), offset: field(8) }),
        gso: kind.map(|kind| Gso { kind, headers: field(2), segment: field(4) }),
    }
}

fn header(offload: &Offload) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    if let Some(PartialChecksum { start, offset }) = offload.checksum {
        header[0] = 1;
        header[6..8].copy_from_slice(&start.to_ne_bytes());
        header[8..10].copy_from_slice(&offset.to_ne_bytes());
    }
    if let Some(Gso { kind, headers, segment }) = offload.gso {
        header[1] = if kind == GsoKind::Tcp4 { 1 } else { 4 };
        header[2..4].copy_from_slice(&headers.to_ne_bytes());
        header[4..6].copy_from_slice(&segment.to_ne_bytes());
    }
    header
}

/// Runs a script in a guest whose frames go through the stack until the script is over.
fn run(mut stack: Stack, offloads: bool, script: &str) -> Counters {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let whole = format!(
        "{}\nplug({})\n{script}",
        include_str!("linux/guest.py"),
        if offloads { "True" } else { "False" }
    );
    let mut guest = command
        .args(["--net", "python3", "-c", &whole])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    drop(command);
    let tap = tap(&ours);
    stack.set_offloads(GuestOffloads { checksum: offloads, tso4: offloads, tso6: offloads });
    let begin = Instant::now();
    let mut buffer = vec![0; HEADER + 65_553];
    let status = loop {
        let now = Instant::now();
        for _ in 0..64 {
            match rustix::io::read(&tap, &mut buffer) {
                Ok(n) => stack.transmit(&buffer[HEADER..n], &offload(&buffer), now),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => panic!("{error}"),
            }
        }
        stack.on_ready(now).unwrap();
        stack.on_time(now);
        for _ in 0..64 {
            let Some(frame) = stack.receive(now) else { break };
            let header = header(&frame.offload);
            let [a, b, c] = frame.pieces();
            rustix::io::writev(&tap, &[&header, a, b, c].map(IoSlice::new)).unwrap();
        }
        if let Some(status) = guest.try_wait().unwrap() {
            break status;
        }
        assert!(now < begin + PATIENCE, "{stack:?}");
        if !stack.has_frames() {
            let wait = stack.next_deadline().map(|at| at.saturating_duration_since(now));
            let wait = wait.unwrap_or(PATIENCE).min(Duration::from_millis(20));
            let timeout = rustix::time::Timespec::try_from(wait).unwrap();
            let mut fds = [
                PollFd::from_borrowed_fd(stack.descriptor().unwrap(), PollFlags::IN),
                PollFd::from_borrowed_fd(tap.as_fd(), PollFlags::IN),
            ];
            poll(&mut fds, Some(&timeout)).unwrap();
        }
    };
    assert!(status.success(), "the guest says above what is wrong; {stack:?}");
    let counters = stack.counters();
    assert_eq!((counters.bad_checksum, counters.malformed, counters.spoofed), (0, 0, 0), "{counters:?}");
    counters
}

/// The guest's device, as it comes through the socket.
fn tap(socket: &UnixStream) -> OwnedFd {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0; 8];
    let mut slices = [std::io::IoSliceMut::new(&mut text)];
    recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fd.expect("the guest says above why it has no device")
}

fn stack(policy: NetworkPolicy, ports: Vec<PublishedPort>) -> Stack {
    let resolvers = Resolvers::Fixed(Vec::new());
    Stack::new(Config { policy, ports, resolvers, ..Config::default() }, Instant::now()).unwrap()
}

/// Serves connections, one after another, until there is one too many.
fn serve(
    address: &str,
    times: usize,
    work: impl Fn(TcpStream) + Send + 'static,
) -> (u16, thread::JoinHandle<()>) {
    let listener = TcpListener::bind(address).unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        for _ in 0..times {
            work(listener.accept().unwrap().0);
        }
    });
    (port, server)
}

/// Sends back what comes, while it comes.
fn echo(stream: TcpStream) {
    let (mut from, mut to) = (&stream, &stream);
    std::io::copy(&mut from, &mut to).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Sends bytes there and back, both at once, and compares them.
const EXCHANGE: &str = r#"
def exchange(host, port, size):
    said = random.Random(size).randbytes(size)
    s = connect(port, host)
    def write():
        s.sendall(said)
        s.shutdown(socket.SHUT_WR)
    writer = threading.Thread(target=write)
    writer.start()
    heard = bytearray()
    while chunk := s.recv(1 << 20):
        heard += chunk
    writer.join()
    assert bytes(heard) == said, (len(heard), size)
"#;

#[test]
fn bytes_go_there_and_back_unchanged_in_bundles() {
    let (port, server) = serve("127.0.0.1:0", 3, echo);
    let (port6, server6) = serve("[::1]:0", 1, echo);
    let script = format!(
        "{EXCHANGE}\nfor size in (0, 1, 48 << 20): exchange(HOST, {port}, size)\nexchange(HOST6, {port6}, 8 << 20)"
    );
    let counters = run(stack(NetworkPolicy::all(), Vec::new()), true, &script);
    server.join().unwrap();
    server6.join().unwrap();
    let (mean_in, mean_out) =
        (counters.bytes_in / counters.frames_in, counters.bytes_out / counters.frames_out);
    assert!(mean_out > 4000, "{mean_in} and {mean_out} bytes a frame are no bundles");
}

#[test]
fn a_guest_without_offloads_gets_packets_of_its_mtu() {
    let (port, server) = serve("127.0.0.1:0", 1, echo);
    let script = format!("{EXCHANGE}\nexchange(HOST, {port}, 4 << 20)");
    let counters = run(stack(NetworkPolicy::all(), Vec::new()), false, &script);
    server.join().unwrap();
    assert!(counters.bytes_out / counters.frames_out <= 1514);
}

#[test]
fn refusals_are_at_once_and_each_is_itself() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let free_udp = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let policy = NetworkPolicy::public().rule(Rule::allow().net("127.0.0.0/8".parse().unwrap()));
    let script = format!(
        r#"
code, took = error_of(lambda: connect({free}))
assert code == errno.ECONNREFUSED and took < 5, (code, took)
code, took = error_of(lambda: connect(80, "10.1.2.3"))
assert code == errno.ECONNREFUSED and took < 5, (code, took)
code, took = error_of(lambda: connect(80, "fd00::7"))
assert code == errno.ECONNREFUSED and took < 5, (code, took)
def udp(host, port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(30)
    s.connect((host, port))
    s.send(b"x")
    s.recv(1)
code, took = error_of(lambda: udp(HOST, {free_udp}))
assert code == errno.ECONNREFUSED and took < 5, (code, took)
code, took = error_of(lambda: udp("10.1.2.3", 99))
assert code == errno.EHOSTUNREACH and took < 5, (code, took)
"#
    );
    run(stack(policy, Vec::new()), true, &script);
}

#[test]
fn ends_and_resets_come_through_both_ways() {
    let (port, server) = serve("127.0.0.1:0", 2, |mut stream| {
        let mut order = [0];
        stream.read_exact(&mut order).unwrap();
        if order == *b"r" {
            rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        } else {
            let error = stream.read(&mut order).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    });
    let script = format!(
        r#"
s = connect({port})
s.sendall(b"r")
code, _ = error_of(lambda: s.recv(1))
assert code == errno.ECONNRESET, code
s = connect({port})
s.sendall(b"w")
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
s.close()
"#
    );
    run(stack(NetworkPolicy::all(), Vec::new()), true, &script);
    server.join().unwrap();
}

#[test]
fn a_published_port_leads_to_a_server_in_linux() {
    let port = PublishedPort { transport: Transport::Tcp, host: "127.0.0.1:0".parse().unwrap(), guest: 80 };
    let stack = stack(NetworkPolicy::public(), vec![port]);
    let host = stack.published()[0].host;
    let size = 16 << 20;
    let client = thread::spawn(move || {
        // Until the guest listens its kernel refuses, which is a reset here.
        loop {
            let mut stream = TcpStream::connect(host).unwrap();
            let mut first = [0];
            match stream.read(&mut first) {
                Ok(1) => {}
                Ok(_) => panic!("the server has gone"),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                    continue;
                }
            }
            let writer = stream.try_clone().unwrap();
            let writer = thread::spawn(move || {
                (&writer).write_all(&vec![7; size]).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).unwrap();
            writer.join().unwrap();
            return heard;
        }
    });
    let script = format!(
        r#"
listener = socket.create_server(("0.0.0.0", 80))
s, peer = listener.accept()
assert peer[0] == GATEWAY, peer
s.sendall(b"!")
heard = bytearray()
while chunk := s.recv(1 << 20):
    heard += chunk
assert bytes(heard) == bytes([7]) * {size}
s.sendall(bytes(heard))
s.close()
"#
    );
    run(stack, true, &script);
    assert!(client.join().unwrap() == vec![7; size]);
}

#[test]
fn a_guest_that_stops_reading_opens_its_window_again() {
    let size = 24 << 20;
    // By the second connection the server says that the first takes no more.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let [mut stream, mut sign] = [0, 1].map(|_| listener.accept().unwrap().0);
        stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        let (chunk, mut sent) = (vec![9; 1 << 20], 0);
        let full = loop {
            match stream.write(&chunk) {
                Ok(n) => sent += n,
                Err(error) => break error.kind(),
            }
        };
        assert_eq!(full, ErrorKind::WouldBlock);
        assert!(sent < size, "{sent} bytes were taken for a guest that reads none");
        sign.write_all(b"!").unwrap();
        stream.set_write_timeout(None).unwrap();
        stream.write_all(&vec![9; size - sent]).unwrap();
    });
    let script = format!(
        r#"
s, sign = connect({port}), connect({port})
assert sign.recv(1) == b"!"
heard = 0
while chunk := s.recv(1 << 20):
    assert chunk == bytes([9]) * len(chunk)
    heard += len(chunk)
assert heard == {size}, heard
"#
    );
    run(stack(NetworkPolicy::all(), Vec::new()), true, &script);
    server.join().unwrap();
}

#[test]
fn many_connections_at_once_are_all_served() {
    let (port, server) = serve("127.0.0.1:0", 500, |stream| {
        thread::spawn(move || echo(stream));
    });
    let script = format!(
        r#"
held = [connect({port}) for _ in range(500)]
for n, s in enumerate(held):
    s.sendall(b"%d" % n)
for n, s in enumerate(held):
    s.shutdown(socket.SHUT_WR)
    text = b""
    while chunk := s.recv(100):
        text += chunk
    assert text == b"%d" % n
"#
    );
    let counters = run(stack(NetworkPolicy::all(), Vec::new()), true, &script);
    server.join().unwrap();
    assert_eq!(counters.tcp_opened, 500);
}
