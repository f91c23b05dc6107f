//! Commands: what they print, how they end, what they start from, and which step said no when they cannot run.

use std::time::Duration;

use cubby_tests::{discard, image, name, next_output, python, shared, shell, within};
use cubbyhole::{Error, ExecErrorKind, ExecEvent, ExitStatus, Sandbox};

fn exited(code: i32) -> ExitStatus {
    ExitStatus { code: Some(code), signal: None }
}

#[tokio::test]
async fn output_and_errors_come_apart_and_the_exit_code_with_them() {
    let sandbox = shared().await;
    let script = "echo to the one; echo to the other >&2; exit 3";
    let output = within("exec", sandbox.shell(script)).await.unwrap();
    assert_eq!(output.stdout().unwrap(), "to the one\n");
    assert_eq!(output.stderr().unwrap(), "to the other\n");
    assert_eq!(output.status(), exited(3));
    for code in [0, 1, 127, 255] {
        let output = within("exec", sandbox.shell(format!("exit {code}"))).await.unwrap();
        assert_eq!(output.status(), exited(code));
        assert_eq!(output.success(), code == 0);
    }
}

#[tokio::test]
async fn a_signal_is_a_signal_and_no_exit_code() {
    let sandbox = shared().await;
    for signal in [1, 9, 11, 15] {
        let output = within("exec", sandbox.shell(format!("kill -{signal} $$"))).await.unwrap();
        assert_eq!(output.status(), ExitStatus { code: None, signal: Some(signal) });
    }
    // A shell reports its child's signal as a code above 128: that is an exit.
    let output = within("exec", sandbox.shell("sh -c 'kill -9 $$'; exit $?")).await.unwrap();
    assert_eq!(output.status(), exited(137));
}

async fn failure(sandbox: &Sandbox, program: &str, cwd: &str, user: &str) -> (ExecErrorKind, i32, String) {
    let failed = sandbox.exec_with(program, |options| {
        if !cwd.is_empty() {
            options.cwd(cwd);
        }
        if user.is_empty() { options } else { options.user(user) }
    });
    match within(program, failed).await {
        Err(Error::ExecFailed { kind, errno, subject, .. }) => (kind, errno, subject),
        other => panic!("{program}: {other:?}"),
    }
}

/// Numbers of the guest's kernel.
const ENOENT: i32 = 2;
const ENOEXEC: i32 = 8;
const EAGAIN: i32 = 11;
const EACCES: i32 = 13;
const ENOTDIR: i32 = 20;
const EINVAL: i32 = 22;

#[tokio::test]
async fn what_cannot_run_is_an_error_that_names_the_step() {
    let sandbox = shared().await;
    let no_format = "printf '\\177ELF and nothing more' > /tmp/no-format; chmod 755 /tmp/no-format";
    shell(&sandbox, no_format).await;
    shell(&sandbox, "printf '#!/no/such/interpreter\\n' > /tmp/lost; chmod 755 /tmp/lost").await;
    for (program, cwd, user, kind, errno) in [
        ("no-such-program", "", "", ExecErrorKind::NotFound, ENOENT),
        ("/no/such/program", "", "", ExecErrorKind::NotFound, ENOENT),
        ("/etc/passwd/program", "", "", ExecErrorKind::NotFound, ENOENT),
        ("/tmp/lost", "", "", ExecErrorKind::NotFound, ENOENT),
        ("/etc/passwd", "", "", ExecErrorKind::NotExecutable, EACCES),
        ("/tmp", "", "", ExecErrorKind::NotExecutable, EACCES),
        ("/tmp/no-format", "", "", ExecErrorKind::BadFormat, ENOEXEC),
        ("true", "/no/such/directory", "", ExecErrorKind::BadWorkdir, ENOENT),
        ("true", "/etc/passwd", "", ExecErrorKind::BadWorkdir, ENOTDIR),
        // No system call says so: the agent reads the files.
        ("true", "", "nobody-at-all", ExecErrorKind::UnknownUser, 0),
        ("true", "", "games:no-such-group", ExecErrorKind::UnknownUser, 0),
    ] {
        let (found, number, subject) = failure(&sandbox, program, cwd, user).await;
        assert_eq!((found, number), (kind, errno), "{program:?} in {cwd:?} as {user:?}");
        let culprit = match kind {
            ExecErrorKind::UnknownUser => user.rsplit(':').next().unwrap(),
            ExecErrorKind::BadWorkdir => cwd,
            _ => program,
        };
        assert!(subject.contains(culprit), "{subject:?} does not name {culprit:?}");
    }
    // None of it harmed the sandbox.
    assert_eq!(shell(&sandbox, "echo well").await, "well\n");
}

#[tokio::test]
async fn limits_are_the_commands_own_and_too_many_processes_are_told_from_all_else() {
    const NPROC: u8 = 6;
    const NOFILE: u8 = 7;
    let sandbox = shared().await;
    let limited = sandbox.exec_with("sh", |options| {
        options.args(["-c", "ulimit -S -n; ulimit -H -n"]).rlimit(NOFILE, 100, 200)
    });
    assert_eq!(within("exec", limited).await.unwrap().stdout().unwrap(), "100\n200\n");
    let usual = sandbox.exec("sh", ["-c", "ulimit -S -n; ulimit -H -n; ulimit -S -n 4096; ulimit -S -n"]);
    assert_eq!(usual.await.unwrap().stdout().unwrap(), "1024\n1048576\n4096\n");
    for (resource, soft, hard, subject) in [(99, 1, 1, "rlimit 99"), (NOFILE, 2, 1, "rlimit 7")] {
        let refused = sandbox.exec_with("true", |options| options.rlimit(resource, soft, hard));
        match within("exec", refused).await {
            Err(Error::ExecFailed {
                kind: ExecErrorKind::BadLimit, errno: EINVAL, subject: found, ..
            }) => {
                assert_eq!(found, subject);
            }
            other => panic!("{other:?}"),
        }
    }
    // A user who may have no process and has one cannot start another; root is not counted.
    let mut one =
        within("start", sandbox.exec_stream_with("cat", |options| options.user("games"))).await.unwrap();
    within("start", one.next()).await.unwrap().unwrap();
    let crowded = sandbox.exec_with("true", |options| options.rlimit(NPROC, 0, 0).user("games"));
    match within("exec", crowded).await {
        Err(error @ Error::ExecFailed { kind: ExecErrorKind::TooManyProcesses, errno: EAGAIN, .. }) => {
            assert!(error.to_string().contains("too many processes"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    let root = sandbox.exec_with("true", |options| options.rlimit(NPROC, 0, 0));
    assert!(within("exec", root).await.unwrap().success());
}

#[tokio::test]
async fn a_guest_that_is_full_of_processes_says_so_and_takes_commands_again() {
    let sandbox = cubby_tests::sandbox("crowded").await;
    // A shell that needs no other process to change the limit. The kernel takes nothing below 20, and is past that.
    let script = "max=$(cat /proc/sys/kernel/threads-max); echo 20 > /proc/sys/kernel/threads-max || exit 1; echo low; \
                  read go; echo $max > /proc/sys/kernel/threads-max || exit 1; echo high; read go";
    let mut switch = within("start", sandbox.exec_stream("sh", ["-c", script])).await.unwrap();
    assert_eq!(next_output(&mut switch).await, "low\n");
    match within("exec", sandbox.exec("true", [""; 0])).await {
        Err(Error::ExecFailed { kind: ExecErrorKind::TooManyProcesses, errno: EAGAIN, subject, .. }) => {
            assert_eq!(subject, "true");
        }
        other => panic!("{other:?}"),
    }
    within("write", switch.write_stdin("\n")).await.unwrap();
    assert_eq!(next_output(&mut switch).await, "high\n");
    assert_eq!(shell(&sandbox, "echo well").await, "well\n");
    drop(switch);
    discard(sandbox).await;
}

#[tokio::test]
async fn environment_directory_and_user_are_the_commands_own() {
    let sandbox = shared().await;
    let script = "echo \"$GREETING\"; pwd; id -u; id -g; echo \"$HOME\"";
    let output = sandbox.exec_with("sh", |options| {
        options.args(["-c", script]).env("GREETING", "a b\n$c 'ü'").cwd("/usr/lib").user("games")
    });
    let output = within("exec", output).await.unwrap();
    assert_eq!(output.stdout().unwrap(), "a b\n$c 'ü'\n/usr/lib\n5\n60\n/usr/games\n");
    let ids = sandbox.exec_with("id", |options| options.args(["-u", "-n"]).user("33:100"));
    assert_eq!(within("exec", ids).await.unwrap().stdout().unwrap(), "www-data\n");
    let output =
        within("exec", sandbox.exec_with("id", |options| options.args(["-g"]).user("33:100"))).await.unwrap();
    assert_eq!(output.stdout().unwrap(), "100\n");
    // The next command knows nothing of them.
    assert_eq!(shell(&sandbox, "echo \"[$GREETING]\"; pwd; id -un").await, "[]\n/\nroot\n");
}

#[tokio::test]
async fn standard_input_arrives_byte_for_byte() {
    let sandbox = shared().await;
    // Every byte value, and no period that a buffer's size could hide.
    let bytes: Vec<u8> =
        (0..1_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
    let output = sandbox.exec_with("cat", |options| options.stdin(bytes.clone()));
    let output = within("cat", output).await.unwrap();
    assert!(output.stdout_bytes() == bytes, "cat changed its input");
    let count = sandbox.exec_with("wc", |options| options.args(["-c"]).stdin(Vec::new()));
    assert_eq!(within("wc", count).await.unwrap().stdout().unwrap(), "0\n");
    // Without input there is none to wait for.
    assert_eq!(within("cat", sandbox.exec("cat", [""; 0])).await.unwrap().stdout().unwrap(), "");
}

#[tokio::test]
async fn a_terminal_is_a_terminal() {
    let sandbox = shared().await;
    let script = "tty; stty size; test -t 0 && test -t 1 && test -t 2 && echo all three; echo error >&2";
    let output = sandbox.exec_with("sh", |options| options.args(["-c", script]).tty(33, 101));
    let output = within("tty", output).await.unwrap();
    let text = output.stdout().unwrap();
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert!(lines[0].starts_with("/dev/pts/"), "{text:?}");
    assert_eq!(lines[1..], ["33 101", "all three", "error", ""]);
    assert_eq!(output.stderr().unwrap(), "");
}

#[tokio::test]
async fn a_terminal_is_resized_while_its_command_runs() {
    let sandbox = shared().await;
    let script = "trap 'stty size; exit 4' WINCH; echo ready; while :; do read line; done";
    let handle = sandbox.exec_stream_with("sh", |options| options.args(["-c", script]).tty(10, 20));
    let mut handle = within("start", handle).await.unwrap();
    let mut text = Vec::new();
    loop {
        match within("an event", handle.next()).await.unwrap().unwrap() {
            ExecEvent::Stdout(bytes) => {
                let was_ready = text.starts_with(b"ready");
                text.extend_from_slice(&bytes);
                if !was_ready && text.starts_with(b"ready") {
                    handle.resize(44, 155).await.unwrap();
                    // Dash runs traps between commands: this ends its `read`.
                    handle.write_stdin("\n").await.unwrap();
                }
            }
            ExecEvent::Exited(status) => {
                assert_eq!(status, exited(4));
                break;
            }
            _ => {}
        }
    }
    assert!(String::from_utf8_lossy(&text).contains("44 155\r\n"), "{}", String::from_utf8_lossy(&text));
}

/// How many processes of the guest have this word on their command line.
async fn running(sandbox: &Sandbox, word: &str) -> usize {
    // The program's own command line must not have it.
    let (start, end) = word.split_at(4);
    let program = format!(
        "import os\nword = ('{start}' + '{end}').encode()\ncount = 0\n\
         for pid in filter(str.isdigit, os.listdir('/proc')):\n\
         \x20   try: count += word in open(f'/proc/{{pid}}/cmdline', 'rb').read().split(b'\\0')\n\
         \x20   except OSError: pass\nprint(count)"
    );
    python(sandbox, &program).await.trim().parse().unwrap()
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_ended_with_all_it_started() {
    let sandbox = shared().await;
    let limit = Duration::from_millis(300);
    let plain = sandbox.exec_with("sleep", |options| options.args(["86401"]).timeout(limit));
    assert!(matches!(within("sleep", plain).await, Err(Error::Timeout { what }) if what == "sleep"));
    assert_eq!(running(&sandbox, "86401").await, 0);
    // One that does not care for TERM, with a child.
    let script = "trap '' TERM; sleep 86402 & wait; while :; do sleep 86402; done";
    let stubborn = sandbox.exec_with("sh", |options| options.args(["-c", script]).timeout(limit));
    assert!(matches!(within("sh", stubborn).await, Err(Error::Timeout { .. })));
    assert_eq!(running(&sandbox, "86402").await, 0);
    // One that is quick enough is not touched.
    let quick = sandbox.exec_with("echo", |options| options.args(["quick"]).timeout(Duration::from_secs(60)));
    assert_eq!(within("echo", quick).await.unwrap().stdout().unwrap(), "quick\n");
}

#[tokio::test]
async fn a_handle_sends_signals_and_kills_when_dropped() {
    let sandbox = shared().await;
    let mut handle = within("start", sandbox.exec_stream("sleep", ["86403"])).await.unwrap();
    assert!(matches!(within("start", handle.next()).await, Some(Ok(ExecEvent::Started { pid })) if pid > 1));
    assert_eq!(running(&sandbox, "86403").await, 1);
    handle.signal(15).await.unwrap();
    assert_eq!(within("end", handle.wait()).await.unwrap(), ExitStatus { code: None, signal: Some(15) });

    let mut handle = within("start", sandbox.exec_stream("sleep", ["86404"])).await.unwrap();
    within("start", handle.next()).await.unwrap().unwrap();
    drop(handle);
    cubby_tests::until("the end of a dropped command", async || running(&sandbox, "86404").await == 0).await;
}

#[tokio::test]
async fn what_runs_out_of_memory_says_so() {
    let sandbox = cubby_tests::sandbox("memory").await;
    let program = "b = []\nwhile True: b.append(bytearray(1 << 20))";
    // Python may get to see the kernel's refusal before the kernel has to kill it.
    match within("python3", sandbox.exec("python3", ["-c", program])).await {
        Err(Error::ExecFailed { kind: ExecErrorKind::KilledForMemory, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(shell(&sandbox, "echo well").await, "well\n");
    discard(sandbox).await;
}

#[tokio::test]
async fn a_sandbox_is_configured_as_its_builder_says() {
    let name = name("configured");
    let sandbox = Sandbox::builder(&name)
        .image(image())
        .memory(192)
        .env("ONE", "first")
        .env("LANG", "tlh")
        .workdir("/usr/share")
        .user("games")
        .hostname("elsewhere")
        .shell("/bin/bash");
    let sandbox = within("create", sandbox.create()).await.unwrap();
    let seen = shell(&sandbox, "echo $ONE $LANG; pwd; id -un; hostname; echo ${BASH_VERSION:+bash}").await;
    assert_eq!(seen, "first tlh\n/usr/share\ngames\nelsewhere\nbash\n");
    // A command's own options go before the sandbox's.
    let own = sandbox.exec_with("sh", |options| {
        options.args(["-c", "echo $ONE; pwd; id -un"]).env("ONE", "second").cwd("/").user("root")
    });
    assert_eq!(within("exec", own).await.unwrap().stdout().unwrap(), "second\n/\nroot\n");
    discard(sandbox).await;
}

#[tokio::test]
async fn processes_reach_each_other_over_vsock_and_the_agent_takes_none_of_them_for_the_host() {
    let program = r#"
import socket
LOCAL, AGENT_PORT = 1, 1025
with socket.socket(socket.AF_VSOCK) as server:
    server.bind((socket.VMADDR_CID_ANY, 4321))
    server.listen()
    with socket.socket(socket.AF_VSOCK) as client:
        client.connect((LOCAL, 4321))
        peer, _ = server.accept()
        client.sendall(b"to oneself")
        print(peer.recv(100).decode())
        peer.close()
# Who is not the host hears nothing, not even a hello.
with socket.socket(socket.AF_VSOCK) as client:
    client.settimeout(60)
    client.connect((LOCAL, AGENT_PORT))
    try:
        print(client.recv(100))
    except ConnectionResetError:
        print(b"")
"#;
    let sandbox = shared().await;
    assert_eq!(python(&sandbox, program).await, "to oneself\nb''\n");
}
