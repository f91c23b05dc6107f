//! Vsock ports of applications: processes of a guest reach Unix sockets of the host that its owner has named, and programs of
//! the host reach listeners of the guest.

use cubby_tests::{builder, discard, name, next_output, python, within};
use cubbyhole::{Error, Sandbox};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

const LEN: usize = 3 << 20;

/// Bytes that are different wherever one is lost or moved.
fn pattern() -> Vec<u8> {
    (0..251u8).cycle().take(LEN).collect()
}

/// What every script begins with.
const PRELUDE: &str = r#"
import errno, socket, sys
def connect(port):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.settimeout(60)
    s.connect((socket.VMADDR_CID_HOST, port))
    return s
def outcome(port):
    try: return connect(port) and 'connected'
    except OSError as error: return errno.errorcode[error.errno]
"#;

async fn script(sandbox: &Sandbox, script: &str) -> String {
    python(sandbox, &[PRELUDE, script].concat()).await
}

#[tokio::test]
async fn a_guest_reaches_the_sockets_that_its_owner_has_named_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let (path, nobody) = (dir.path().join("served.sock"), dir.path().join("nobody.sock"));
    let creating = builder(&name("vsock-out")).vsock_listen(5000, &path).vsock_listen(5001, &nobody).create();
    let sandbox = within("create", creating).await.unwrap();
    // Who listens may come later than the sandbox.
    let listener = UnixListener::bind(&path).unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut whole = Vec::new();
        stream.read_to_end(&mut whole).await.unwrap();
        assert!(whole == pattern(), "{} bytes came", whole.len());
        // The guest has ended its half; the other goes on.
        stream.write_all(&whole).await.unwrap();
        drop(stream);
        // One that is broken off.
        let (stream, _) = listener.accept().await.unwrap();
        drop(stream);
        listener
    });
    let program = format!(
        "whole = (bytes(range(251)) * ({LEN} // 251 + 1))[:{LEN}]\n\
         s = connect(5000)\n\
         s.sendall(whole)\n\
         s.shutdown(socket.SHUT_WR)\n\
         back = s.makefile('rb').read()\n\
         assert back == whole, len(back)\n\
         print(connect(5000).recv(1))\n\
         print(*[outcome(port) for port in (5001, 5002, 1024, 1025)])"
    );
    let told = script(&sandbox, &program).await;
    // The port of the agent's connection is listened at, for the agent alone: another one is reset at once.
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines[0], "b''");
    let outcomes: Vec<&str> = lines[1].split(' ').collect();
    assert_eq!([outcomes[1], outcomes[3]], ["ECONNRESET"; 2], "{told}");
    let listener = within("server", server).await.unwrap();
    // 5001 leads to nobody: whether the reset comes before the guest has seen that it is connected is the guest's to
    // say, but nothing is ever read there.
    let program =
        "try: print(connect(5001).recv(1))\nexcept OSError as error: print(errno.errorcode[error.errno])";
    let told = script(&sandbox, program).await;
    assert!(told == "ECONNRESET\n" || told == "b''\n", "{told}");

    // What the host does not read the guest cannot get rid of, and nothing else stands still.
    let program = "s = connect(5000)\n\
                   s.settimeout(3)\n\
                   sent = 0\n\
                   try:\n    \
                       while True: sent += s.send(bytes(65536))\n\
                   except TimeoutError: print(sent, flush=True)\n\
                   print(s.recv(1))\n";
    let program = format!("{PRELUDE}{program}");
    let mut slow = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    let (mut unread, _) = within("accept", listener.accept()).await.unwrap();
    let sent: usize = next_output(&mut slow).await.trim().parse().unwrap();
    assert!(sent < 4 << 20, "{sent} bytes are somewhere");
    let mut bytes = vec![0; sent];
    within("bytes", unread.read_exact(&mut bytes)).await.unwrap();
    unread.write_all(b"!").await.unwrap();
    assert_eq!(next_output(&mut slow).await, "b'!'\n");
    discard(sandbox).await;
}

#[tokio::test]
async fn a_program_of_the_host_reaches_listeners_of_the_guest() {
    let sandbox = within("create", builder(&name("vsock-in")).create()).await.unwrap();
    let program = "import threading\n\
                   l = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\n\
                   l.bind((socket.VMADDR_CID_ANY, 6000))\n\
                   l.listen()\n\
                   print('serves', flush=True)\n\
                   def serve(s):\n    \
                       whole = s.makefile('rb').read()\n    \
                       s.sendall(whole)\n    \
                       s.shutdown(socket.SHUT_WR)\n    \
                       print('told', flush=True)\n\
                   while True: threading.Thread(target=serve, args=l.accept()[:1]).start()\n";
    let program = format!("{PRELUDE}{program}");
    let mut server = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    assert_eq!(next_output(&mut server).await, "serves\n");
    let connect = async || within("connect", sandbox.connect_vsock(6000)).await;
    // Two at once, each with its own bytes.
    let whole = pattern();
    let exchange = async |bytes: &[u8]| {
        let (mut reader, mut writer) = tokio::io::split(connect().await.unwrap());
        let mut back = Vec::new();
        let write = async {
            writer.write_all(bytes).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        within("exchange", async { tokio::join!(write, reader.read_to_end(&mut back)).1.unwrap() }).await;
        assert!(back == bytes, "{} bytes came back", back.len());
    };
    tokio::join!(exchange(&whole), exchange(b"short"));

    // Refusals are errors with their reason.
    for (port, expected) in [
        (6001, "nobody listens there"),
        (1024, "that port is the agent's"),
        (1025, "that port is the agent's"),
    ] {
        let refused = within("connect", sandbox.connect_vsock(port)).await;
        let Err(Error::VsockUnreachable { port: told, why, .. }) = &refused else { panic!("{refused:?}") };
        assert_eq!((*told, &**why), (port, expected));
    }
    // Any program can do the same.
    let socket = cubby_tests::store().home().port_socket(&sandbox.name().parse().unwrap());
    for (said, answer) in [
        ("CONNECT 6000\nhello", "OK\nhello"),
        ("CONNECT six\n", "ERR write CONNECT and a port\n"),
        ("HELO 6000 and what else there is to say in a line\n", "ERR write CONNECT and a port\n"),
    ] {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut told = String::new();
        let _ = within("answer", stream.read_to_string(&mut told)).await;
        assert_eq!(told, answer);
    }
    // A pause holds a stream, and it goes on.
    let mut held = connect().await.unwrap();
    held.write_all(b"held").await.unwrap();
    within("pause", sandbox.pause()).await.unwrap();
    held.shutdown().await.unwrap();
    within("resume", sandbox.resume()).await.unwrap();
    let mut told = String::new();
    within("answer", held.read_to_string(&mut told)).await.unwrap();
    assert_eq!(told, "held");

    // A stream is no session: a drain ends it.
    let mut open = connect().await.unwrap();
    drop(server);
    within("drain", sandbox.drain()).await.unwrap();
    let end = within("end", open.read(&mut [0])).await;
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    assert!(!socket.exists());
    let ended = within("connect", sandbox.connect_vsock(6000)).await.map(drop);
    assert!(cubby_tests::refused_as(&ended, cubbyhole::Status::Stopped), "{ended:?}");
    Sandbox::remove(sandbox.name()).await.unwrap();
}

/// Answers every stream of a port with what it says, for ever.
const ECHO: &str = r#"
import selectors
select = selectors.DefaultSelector()
listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
listener.bind((socket.VMADDR_CID_ANY, 6000))
listener.listen(400)
select.register(listener, selectors.EVENT_READ)
print('serves', flush=True)
while True:
    for key, _ in select.select():
        if key.fileobj is listener:
            select.register(listener.accept()[0], selectors.EVENT_READ)
        elif told := key.fileobj.recv(100):
            key.fileobj.sendall(told)
        else:
            select.unregister(key.fileobj)
            key.fileobj.close()
"#;

/// How many streams of both ways there may be (`runtime/src/pipes.rs`).
const MOST: u8 = 255;

async fn echo(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), byte: u8) {
    within("write", stream.write_all(&[byte])).await.unwrap();
    assert_eq!(within("answer", stream.read_u8()).await.unwrap(), byte);
}

#[tokio::test]
async fn there_are_so_many_streams_and_one_more_harms_none_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("served.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let creating = builder(&name("vsock-most")).vsock_listen(5000, &path).create();
    let sandbox = within("create", creating).await.unwrap();
    let program = format!("{PRELUDE}{ECHO}");
    let mut server = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    assert_eq!(next_output(&mut server).await, "serves\n");
    // One from the guest, and the others to it.
    let program = format!("{PRELUDE}s = connect(5000)\nprint(s.recv(1))");
    let mut caller = within("start", sandbox.exec_stream("python3", ["-c", &program])).await.unwrap();
    let (mut called, _) = within("accept", listener.accept()).await.unwrap();
    let mut streams = Vec::new();
    for number in 0..MOST {
        let mut stream = within("connect", sandbox.connect_vsock(6000)).await.unwrap();
        echo(&mut stream, number).await;
        streams.push(stream);
    }
    let refused = within("connect", sandbox.connect_vsock(6000)).await;
    let Err(Error::VsockUnreachable { why, .. }) = &refused else { panic!("{refused:?}") };
    assert_eq!(why, "too many connections");
    let refused = "s = None\n\
                   try:\n    \
                       s = connect(5000)\n    \
                       print(s.recv(1))\n\
                   except OSError as error: print(errno.errorcode[error.errno])";
    let told = script(&sandbox, refused).await;
    // Whether the guest has seen for a moment that it is connected is its own to say.
    assert!(told == "ECONNRESET\n" || told == "b''\n", "{told}");
    let came = tokio::time::timeout(std::time::Duration::from_millis(500), listener.accept()).await;
    assert!(came.is_err(), "one more came: {came:?}");
    for (stream, number) in streams.iter_mut().zip(1..=MOST) {
        echo(stream, number).await;
    }
    // One less is room for one more.
    drop(streams.pop());
    let mut again = loop {
        match within("connect", sandbox.connect_vsock(6000)).await {
            Ok(stream) => break stream,
            Err(error) => assert!(error.to_string().contains("too many"), "{error}"),
        }
    };
    echo(&mut again, 1).await;
    called.write_all(b"!").await.unwrap();
    assert_eq!(next_output(&mut caller).await, "b'!'\n");
    discard(sandbox).await;
}

#[tokio::test]
async fn a_stream_that_is_used_does_not_hold_the_idle_time_out() {
    let sandbox = within("create", builder(&name("vsock-idle")).idle_timeout(3).create()).await.unwrap();
    // It runs in no session, which would hold it.
    let program = format!("{PRELUDE}{ECHO}").replace("print('serves', flush=True)", "open('/serves', 'w')");
    within("write", sandbox.fs().write("/server.py", program)).await.unwrap();
    let start =
        "setsid python3 /server.py < /dev/null > /dev/null 2>&1 & until [ -e /serves ]; do sleep 0.1; done";
    cubby_tests::shell(&sandbox, start).await;
    let mut stream = within("connect", sandbox.connect_vsock(6000)).await.unwrap();
    let mut told = 0;
    let talking = async {
        // As often as it goes, until the stream's end.
        while stream.write_all(b"?").await.is_ok() && stream.read_u8().await.is_ok() {
            told += 1;
        }
    };
    let ended = async { within("the end", sandbox.wait()).await.unwrap().reason };
    let ((), reason) = tokio::join!(within("talk", talking), ended);
    assert_eq!(reason, cubbyhole::ExitReason::IdleTimeout);
    assert!(told > 10, "{told} answers in three seconds");
    Sandbox::remove(sandbox.name()).await.unwrap();
}
