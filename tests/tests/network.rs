//! The network of sandboxes: guests with Python talk to servers of the test on the host's loopback, and the test to servers in
//! guests.

use std::net::Ipv4Addr;
use std::time::Duration;

use cubby_tests::{
    builder, cpu_ticks, discard, name, next_output, process, python, sandbox, shell, sleeps, store, until,
    within,
};
use cubbyhole::network::{NetworkPolicy, Rule};
use cubbyhole::{Error, ExecHandle, ExitReason, Port, Sandbox};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// How long nothing must happen.
const QUIET: Duration = Duration::from_millis(500);

/// What every script begins with.
pub(super) const PRELUDE: &str = r#"
import errno, os, socket, sys, time
HOST = 'host.cubbyhole.internal'
def refused(kind, address, port):
    "The error of talking to somebody, which has to come before anybody would lose patience."
    begin = time.monotonic()
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    with socket.socket(family, kind) as s:
        s.settimeout(60)
        try:
            s.connect((address, port))
            s.send(b'x')
            s.recv(1)
        except TimeoutError:
            return 'silence'
        except OSError as error:
            took = time.monotonic() - begin
            return errno.errorcode[error.errno] if took < 5 else f'late: {took}'
    return 'answered'
"#;

/// A policy that lets guests talk to the host's loopback, and to whom all may.
fn neighbourly() -> NetworkPolicy {
    NetworkPolicy::public()
        .rule(Rule::allow().net("127.0.0.0/8".parse().unwrap()))
        .rule(Rule::allow().net("::1".parse().unwrap()))
}

async fn online(test: &str) -> Sandbox {
    within("create", builder(&name(test)).network(neighbourly()).create()).await.unwrap()
}

async fn script(sandbox: &Sandbox, script: &str) -> String {
    python(sandbox, &[PRELUDE, script].concat()).await
}

/// Bytes that are different wherever one is lost or moved.
fn pattern(len: usize) -> Vec<u8> {
    (0..251u8).cycle().take(len).collect()
}

/// Runs a server in a guest until its stream is dropped, and waits until it serves.
async fn serve(sandbox: &Sandbox, server: &str) -> ExecHandle {
    let server = format!("{PRELUDE}{server}");
    let mut running = within("serve", sandbox.exec_stream("python3", ["-c", &server])).await.unwrap();
    assert_eq!(next_output(&mut running).await, "serves\n");
    running
}

/// Says after each line that came which sandbox it is.
const ECHO: &str = r#"
s = socket.create_server(('0.0.0.0', 80))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.bind(('0.0.0.0', 53))
import threading
def udp():
    while True:
        data, peer = u.recvfrom(65536)
        u.sendto(data + socket.gethostname().encode(), peer)
threading.Thread(target=udp, daemon=True).start()
def tcp(c):
    f = c.makefile('rwb')
    for line in f:
        f.write(line.strip() + b' ' + socket.gethostname().encode() + b'\n')
        f.flush()
os.write(1, b'serves\n')
while True:
    threading.Thread(target=tcp, args=s.accept()[:1], daemon=True).start()
"#;

/// Sends a line and returns the answer.
async fn ask(stream: &mut TcpStream, line: &str) -> String {
    within("ask", stream.write_all(format!("{line}\n").as_bytes())).await.unwrap();
    answer(stream).await
}

/// The next line that comes.
async fn answer(stream: &mut TcpStream) -> String {
    let mut line = Vec::new();
    loop {
        match within("answer", stream.read_u8()).await.unwrap() {
            b'\n' => return String::from_utf8(line).unwrap(),
            byte => line.push(byte),
        }
    }
}

async fn connect(port: &Port) -> TcpStream {
    within("connect", TcpStream::connect(port.listens_on())).await.unwrap()
}

#[tokio::test]
async fn streams_and_datagrams_come_through_whole_in_both_directions() {
    const LEN: usize = 10 << 20;
    let sandbox = online("net-whole").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut stream, peer) = listener.accept().await.unwrap();
        assert!(peer.ip().is_loopback());
        let mut whole = Vec::new();
        stream.read_to_end(&mut whole).await.unwrap();
        assert!(whole == pattern(LEN), "{} bytes came", whole.len());
        stream.write_all(&whole).await.unwrap();
    });
    let program = format!(
        r#"
whole = (bytes(range(251)) * (({LEN} + 250) // 251))[:{LEN}]
with socket.create_connection((HOST, {at}), 60) as s:
    s.sendall(whole)
    s.shutdown(socket.SHUT_WR)
    with s.makefile('rb') as f:
        back = f.read()
assert back == whole, len(back)
"#
    );
    script(&sandbox, &program).await;
    within("server", server).await.unwrap();

    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let mut buffer = [0; 65536];
        loop {
            let (len, peer) = socket.recv_from(&mut buffer).await.unwrap();
            socket.send_to(&buffer[..len], peer).await.unwrap();
        }
    });
    let program = format!(
        r#"
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.settimeout(60)
    s.connect((socket.gethostbyname(HOST), {at}))
    for size in 1, 100, 1472:
        data = os.urandom(size)
        s.send(data)
        assert s.recv(65536) == data, size
"#
    );
    script(&sandbox, &program).await;
    server.abort();
    discard(sandbox).await;
}

#[tokio::test]
async fn who_is_not_there_refuses_and_who_may_not_be_talked_to_does_at_once() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = taken.local_addr().unwrap().port();
    let sandbox = online("net-refused").await;
    let program = format!(
        "host = socket.gethostbyname(HOST)\n\
         for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM: print(refused(kind, host, {free}))"
    );
    assert_eq!(script(&sandbox, &program).await, "ECONNREFUSED\nECONNREFUSED\n");
    discard(sandbox).await;

    // The default: the host and its networks are not the public Internet, whoever listens there.
    let sandbox = self::sandbox("net-denied").await;
    let addresses =
        ["198.18.0.254", "10.0.0.1", "192.168.1.1", "169.254.169.254", "172.17.0.1", "fd63:7562:6279::fe"];
    let program = format!(
        "for address in {addresses:?}:\n    \
             print(address, refused(socket.SOCK_STREAM, address, {at}), refused(socket.SOCK_DGRAM, address, {at}))"
    );
    let told = script(&sandbox, &program).await;
    for (address, told) in addresses.iter().zip(told.lines()) {
        let prohibited = if address.contains(':') { "EACCES" } else { "EHOSTUNREACH" };
        assert_eq!(told, format!("{address} ECONNREFUSED {prohibited}"));
    }
    assert_eq!(told.lines().count(), addresses.len());
    let accepted = tokio::time::timeout(QUIET, taken.accept()).await;
    assert!(accepted.is_err(), "somebody came: {accepted:?}");
    // Which rule it was is told to whoever looks.
    let log = store().home().sandbox(&sandbox.name().parse().unwrap()).join("process.log");
    let log = std::fs::read_to_string(log).unwrap();
    let line = "cubby-sandbox: network: refused outbound tcp 169.254.169.254:";
    let told = log.lines().find(|told| told.starts_with(line)).unwrap_or_else(|| panic!("{log}"));
    assert!(told.ends_with(": no rule, and the policy is public"), "{told}");
    discard(sandbox).await;
}

#[tokio::test]
async fn names_are_answered_by_whom_the_sandbox_is_told_to_ask() {
    // A server that knows one name (RFC 1035 §4.1).
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = server.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let mut buffer = [0; 512];
        loop {
            let (len, peer) = server.recv_from(&mut buffer).await.unwrap();
            let question = buffer[12..len].to_vec();
            let end = question.iter().position(|byte| *byte == 0).unwrap() + 5;
            let question = &question[..end];
            let known = question.starts_with(b"\x07service\x07example\x00");
            let answers = u8::from(known && question[end - 3] == 1);
            let mut answer = buffer[..2].to_vec();
            answer.extend([0x81, if known { 0x80 } else { 0x83 }, 0, 1, 0, answers, 0, 0, 0, 0]);
            answer.extend(question);
            if answers == 1 {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 93, 184, 215, 14]);
            }
            server.send_to(&answer, peer).await.unwrap();
        }
    });
    let policy = NetworkPolicy::public().rule(Rule::deny().name("secret.example".parse().unwrap()));
    let sandbox = builder(&name("net-names")).resolver(at).network(policy).create();
    let sandbox = within("create", sandbox).await.unwrap();
    let program = r#"
def look_up(name):
    begin = time.monotonic()
    try: found = socket.gethostbyname(name)
    except OSError as error: found = type(error).__name__
    return found if time.monotonic() - begin < 5 else 'late'
for name in 'service.example', 'other.example', 'secret.example': print(look_up(name))
print(open('/etc/resolv.conf').read().strip())
"#;
    let expected = "93.184.215.14\ngaierror\ngaierror\nnameserver 198.18.0.1\n";
    assert_eq!(script(&sandbox, program).await, expected);
    serving.abort();
    discard(sandbox).await;
}

#[tokio::test]
async fn a_published_port_leads_into_the_guest_from_boot_to_stop_and_again_after_a_start() {
    let name = name("net-published");
    let building = builder(&name).hostname("one").port(0, 80).publish(Port::new(0, 53).udp()).port(0, 81);
    let sandbox = within("create", building.clone().create_detached()).await.unwrap();
    let ports = sandbox.ports().await.unwrap();
    assert_eq!(ports.iter().map(|port| port.guest).collect::<Vec<_>>(), [80, 53, 81]);
    assert!(ports.iter().all(|port| port.host != 0 && port.address == Ipv4Addr::LOCALHOST), "{ports:?}");
    let server = serve(&sandbox, ECHO).await;
    let mut stream = connect(&ports[0]).await;
    assert_eq!(ask(&mut stream, "hello").await, "hello one");
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.send_to(b"datagram ", ports[1].listens_on()).await.unwrap();
    let mut buffer = [0; 100];
    let (len, from) = within("datagram", client.recv_from(&mut buffer)).await.unwrap();
    assert_eq!((&buffer[..len], from), (&b"datagram one"[..], ports[1].listens_on()));
    // Nobody listens there in the guest.
    // The reset may be there before we have seen that we are connected.
    let reset = match within("connect", TcpStream::connect(ports[2].listens_on())).await {
        Ok(mut nobody) => within("reset", nobody.read(&mut buffer)).await.unwrap_err(),
        Err(reset) => reset,
    };
    assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);

    // Who wants the same port is told before anything boots, and disturbs nobody.
    let other = format!("{name}-other");
    let error = within("create", builder(&other).port(ports[0].host, 80).create()).await.unwrap_err();
    let Error::PortUnavailable { address, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*address, ports[0].listens_on());
    assert!(error.to_string().contains("Address already in use"), "{error}");
    let other = Sandbox::get(&other).await.unwrap();
    let report = other.last_exit().await.unwrap().unwrap();
    assert_eq!(report.reason, ExitReason::BootFailed { stage: "network".into() });
    Sandbox::remove(other.name()).await.unwrap();
    assert_eq!(ask(&mut stream, "still").await, "still one");

    drop(server);
    within("stop", sandbox.stop()).await.unwrap();
    assert_eq!(sandbox.ports().await.unwrap(), []);
    for port in &ports[..1] {
        let error = TcpStream::connect(port.listens_on()).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(within("end", stream.read(&mut buffer)).await.unwrap_or(0), 0);

    let sandbox = within("start", Sandbox::start(&name)).await.unwrap();
    let ports = sandbox.ports().await.unwrap();
    assert_eq!(sandbox.inspect().await.unwrap().config.ports.len(), ports.len());
    let _server = serve(&sandbox, ECHO).await;
    assert_eq!(ask(&mut connect(&ports[0]).await, "again").await, "again one");
    within("kill", sandbox.kill()).await.unwrap();
    let error = TcpStream::connect(ports[0].listens_on()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    Sandbox::remove(&name).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_without_a_network_has_its_loopback_alone() {
    let offline = builder(&name("net-none")).network(NetworkPolicy::none()).create();
    let sandbox = within("create", offline).await.unwrap();
    assert_eq!(shell(&sandbox, "ls /sys/class/net").await, "lo\n");
    let program =
        "print(refused(socket.SOCK_STREAM, '198.18.0.254', 80), refused(socket.SOCK_STREAM, '1.1.1.1', 80))";
    assert_eq!(script(&sandbox, program).await, "ENETUNREACH ENETUNREACH\n");
    let threads = std::fs::read_dir(format!("/proc/{}/task", process(sandbox.name()).pid)).unwrap();
    let named = threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("comm")).unwrap());
    assert!(named.into_iter().all(|name| name != "net0\n"));
    discard(sandbox).await;
}

#[tokio::test]
async fn a_pause_holds_flows_without_work_and_they_go_on() {
    let sandbox =
        within("create", builder(&name("net-pause")).hostname("paused").port(0, 80).create()).await.unwrap();
    let port = sandbox.ports().await.unwrap()[0];
    let _server = serve(&sandbox, ECHO).await;
    let mut before = connect(&port).await;
    assert_eq!(ask(&mut before, "before").await, "before paused");
    within("pause", sandbox.pause()).await.unwrap();
    let pid = process(sandbox.name()).pid;
    until("rest", async || sleeps(pid)).await;
    // What comes for it meanwhile waits in the host's kernel, a new connection too.
    before.write_all(b"meanwhile\n").await.unwrap();
    let mut during = connect(&port).await;
    during.write_all(b"new\n").await.unwrap();
    let ticks = cpu_ticks(pid);
    let mut byte = [0];
    let silence = tokio::time::timeout(QUIET, before.read(&mut byte)).await;
    assert!(silence.is_err(), "{silence:?}");
    assert_eq!(cpu_ticks(pid), ticks);
    within("resume", sandbox.resume()).await.unwrap();
    assert_eq!(answer(&mut before).await, "meanwhile paused");
    assert_eq!(ask(&mut before, "after").await, "after paused");
    assert_eq!(answer(&mut during).await, "new paused");
    discard(sandbox).await;
}

#[tokio::test]
async fn sandboxes_have_networks_of_their_own() {
    let make = async |test: &str| {
        let made = builder(&name(test)).hostname(test).port(0, 80).network(neighbourly()).create();
        let sandbox = within("create", made).await.unwrap();
        let port = sandbox.ports().await.unwrap()[0];
        let server = serve(&sandbox, ECHO).await;
        (sandbox, port, server)
    };
    let (one, first, _one) = make("net-one").await;
    let (two, second, _two) = make("net-two").await;
    // Each has the same address on a cable of its own.
    for sandbox in [&one, &two] {
        let addresses = shell(sandbox, "cat /proc/net/fib_trie | grep -c 198.18.0.2").await;
        assert_ne!(addresses.trim(), "0");
    }
    let (mut to_one, mut to_two) = (connect(&first).await, connect(&second).await);
    let (a, b) = tokio::join!(ask(&mut to_one, "who"), ask(&mut to_two, "who"));
    assert_eq!((a.as_str(), b.as_str()), ("who net-one", "who net-two"));
    // From one to the other there is the way that everybody has who may talk to this host.
    let program = format!(
        "s = socket.create_connection((HOST, {}), 60)\ns.sendall(b'from one\\n')\nprint(s.recv(100).decode().strip())",
        second.host
    );
    assert_eq!(script(&one, &program).await, "from one net-two\n");
    discard(one).await;
    assert_eq!(ask(&mut to_two, "alone").await, "alone net-two");
    discard(two).await;
}
