//! What becomes of connections when a sandbox ends: a drain lets them be, a stop ends them as their processes' ends do, and
//! what has not come whole does not end as if it had. (Pauses: `network::a_pause_holds_flows_…`.)

use std::io::ErrorKind;

use cubby_tests::{next_output, refused_as, until, within};
use cubbyhole::{Error, ExecHandle, ExitReason, ExitStatus, Sandbox, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::network::{PRELUDE, online_with};

/// Connects to the host's port `at` and takes connections at 80; answers each line in capitals, on all of them, and ends
/// by itself after the line `end`.
const SHOUT: &str = r#"
import selectors
select = selectors.DefaultSelector()
listener = socket.create_server(('0.0.0.0', 80))
select.register(listener, selectors.EVENT_READ)
select.register(socket.create_connection((HOST, at), 60), selectors.EVENT_READ)
print('serves', flush=True)
while True:
    for key, _ in select.select():
        if key.fileobj is listener:
            select.register(listener.accept()[0], selectors.EVENT_READ)
            continue
        line = key.fileobj.recv(100)
        if line == b'end\n': sys.exit(3)
        if line: key.fileobj.sendall(line.upper())
        else: select.unregister(key.fileobj)
"#;

struct Talk {
    sandbox: Sandbox,
    guest: ExecHandle,
    /// A connection of the guest's, and one to it.
    streams: [TcpStream; 2],
}

async fn talk(test: &str) -> Talk {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap().port();
    let sandbox = online_with(test, |building| building.port(0, 80)).await;
    let program = format!("{PRELUDE}at = {at}\n{SHOUT}");
    let mut guest = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    assert_eq!(next_output(&mut guest).await, "serves\n");
    let (mut outward, _) = within("accept", listener.accept()).await.unwrap();
    let mut inward = connect(&sandbox).await;
    for stream in [&mut outward, &mut inward] {
        assert_eq!(shout(stream, "hello\n").await, "HELLO\n");
    }
    Talk { sandbox, guest, streams: [outward, inward] }
}

async fn connect(sandbox: &Sandbox) -> TcpStream {
    let at = sandbox.ports().await.unwrap()[0].listens_on();
    within("connect", TcpStream::connect(at)).await.unwrap()
}

async fn shout(stream: &mut TcpStream, line: &str) -> String {
    within("write", stream.write_all(line.as_bytes())).await.unwrap();
    let mut answer = vec![0; line.len()];
    within("answer", stream.read_exact(&mut answer)).await.unwrap();
    String::from_utf8(answer).unwrap()
}

/// Whoever talked to it sees an end (FIN), and no error.
async fn ended_in_order(streams: [TcpStream; 2]) {
    for mut stream in streams {
        assert_eq!(within("the end", stream.read(&mut [0])).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_drain_lets_connections_be_until_their_processes_end() {
    let Talk { sandbox, mut guest, mut streams } = talk("net-drain").await;
    let other = Sandbox::get(sandbox.name()).await.unwrap();
    let drain = tokio::spawn(async move { other.drain().await });
    until("draining", async || sandbox.status().await.unwrap() == Status::Draining).await;
    let refused = within("exec", sandbox.exec("true", [""; 0])).await;
    assert!(matches!(refused, Err(Error::Draining { .. })), "{refused:?}");
    for stream in &mut streams {
        assert_eq!(shout(stream, "still\n").await, "STILL\n");
    }
    // A drain is about sessions: a port goes on to lead into the guest.
    assert_eq!(shout(&mut connect(&sandbox).await, "new\n").await, "NEW\n");
    assert_eq!(sandbox.status().await.unwrap(), Status::Draining);
    streams[0].write_all(b"end\n").await.unwrap();
    assert_eq!(within("end", guest.wait()).await.unwrap(), ExitStatus { code: Some(3), signal: None });
    ended_in_order(streams).await;
    within("drain", drain).await.unwrap().unwrap();
    assert_eq!(within("end", sandbox.wait()).await.unwrap().reason, ExitReason::Drained);
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn a_stop_ends_connections_in_order() {
    let Talk { sandbox, mut guest, streams } = talk("net-stop").await;
    within("stop", sandbox.stop()).await.unwrap();
    ended_in_order(streams).await;
    assert_eq!(within("end", guest.wait()).await.unwrap().signal, Some(15));
    assert!(refused_as(&sandbox.exec("true", [""; 0]).await, Status::Stopped));
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn what_has_not_come_whole_when_its_sandbox_stops_does_not_end_as_if_it_had() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap().port();
    let sandbox = online_with("net-cut", |building| building).await;
    // More than all sockets and buffers on the way hold.
    let program = format!(
        "{PRELUDE}s = socket.create_connection((HOST, {at}), 60)\n\
         s.settimeout(3)\n\
         try: s.sendall(bytes(64 << 20))\n\
         except TimeoutError: print('full', flush=True)\n\
         sys.stdin.read()\n"
    );
    let mut guest = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    let (mut stream, _) = within("accept", listener.accept()).await.unwrap();
    assert_eq!(next_output(&mut guest).await, "full\n");
    within("stop", sandbox.stop()).await.unwrap();
    let mut came = Vec::new();
    let end = within("the end", stream.read_to_end(&mut came)).await;
    assert_eq!(end.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset), "{} bytes", came.len());
    Sandbox::remove(sandbox.name()).await.unwrap();
}
