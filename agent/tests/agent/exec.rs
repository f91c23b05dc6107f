//! What a command finds, and how a command that cannot run is reported.

use std::os::unix::fs::PermissionsExt;

use cubby_protocol::message::{ExecFailure, Exited, Open, Rlimit, Started, TtySize};
use cubby_protocol::{Kind, SessionId, decode};

use crate::client::{Agent, End, Outcome, command, shell, wait_gone};

#[test]
fn output_and_exit_code_come_back() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let outcome = client.run(&shell("echo out; echo err >&2; exit 7"));
    assert_eq!((outcome.text(), outcome.stderr.as_slice(), outcome.code()), ("out\n", &b"err\n"[..], 7));
    assert!(outcome.pid.is_some());
    assert_eq!(client.run(&command("true", &[])).code(), 0);
}

#[test]
fn a_signal_is_a_signal_and_not_a_code() {
    let agent = Agent::start();
    let outcome = agent.connect().run(&shell("kill -SEGV $$"));
    assert_eq!(outcome.end, Some(End::Exited(Exited::Signal(11))));
    let outcome = agent.connect().run(&shell("kill -KILL $$"));
    assert_eq!(outcome.end, Some(End::Exited(Exited::Signal(9))), "a plain KILL is not the kernel's");
}

#[test]
fn environment_directory_and_limits_are_the_commands() {
    let agent = Agent::start();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let open = Open {
        env: vec![pair("A", "first"), pair("A", "last"), pair("EMPTY", "")],
        cwd: Some("/usr".into()),
        rlimits: vec![Rlimit { resource: 7, soft: 100, hard: 200 }],
        ..shell("pwd; echo $A; echo \"[$EMPTY]\" $HOSTNAME; ulimit -Sn; ulimit -Hn; echo ${TERM-none}")
    };
    assert_eq!(agent.connect().run(&open).text(), "/usr\nlast\n[] test\n100\n200\nnone\n");
}

#[test]
fn a_command_has_1024_open_files_until_it_says_otherwise() {
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap();
    let agent = Agent::start();
    let other = Rlimit { resource: 4, soft: 0, hard: 0 };
    let open = Open {
        rlimits: vec![other],
        ..shell("ulimit -Sn; ulimit -Hn; ulimit -c; ulimit -Sn 2048 && ulimit -Sn")
    };
    assert!(hard > 2048, "too few for this test");
    assert_eq!(agent.connect().run(&open).text(), format!("1024\n{hard}\n0\n2048\n"));
}

#[test]
fn a_command_starts_with_default_signals_and_no_foreign_descriptors() {
    let agent = Agent::start();
    let outcome =
        agent.connect().run(&shell("grep -E 'Sig(Blk|Ign)' /proc/self/status; ls -l /proc/self/fd"));
    let mask = |name: &str| {
        let line = outcome.text().lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    assert_eq!(mask("SigBlk:"), 0);
    // 32 and 33 are the C library's own, which lets nobody set them.
    assert_eq!(mask("SigIgn:") & !(0b11 << 31), 0, "ignored signals");
    assert!(
        !outcome.text().contains("anon_inode") && !outcome.text().contains("socket"),
        "{}",
        outcome.text()
    );
}

#[test]
fn a_command_leads_a_session_of_its_own() {
    let agent = Agent::start();
    let outcome = agent.connect().run(&shell("cut -d' ' -f1,5,6 /proc/$$/stat"));
    let pid = outcome.pid.unwrap();
    assert_eq!(outcome.text(), format!("{pid} {pid} {pid}\n"));
}

#[test]
fn each_failure_has_its_kind() {
    let directory = std::env::temp_dir().join(format!("cubby-agent-kinds-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let file = |name: &str, content: &[u8], mode: u32| {
        let path = directory.join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = file("plain", b"text", 0o644);
    let alien = file("alien", b"\x01\x02\x03\x04", 0o755);
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut check = |open: Open, kind: ExecFailure, errno: i32, subject: &str| {
        let outcome: Outcome = client.run(&open);
        let failed = outcome.failure();
        assert_eq!((failed.kind, failed.errno, failed.subject.as_str()), (kind, errno, subject));
        assert_eq!(outcome.pid, None);
    };
    check(command("no-such-program", &[]), ExecFailure::NotFound, 2, "no-such-program");
    check(command("/no/such", &[]), ExecFailure::NotFound, 2, "/no/such");
    check(command("", &[]), ExecFailure::NotFound, 0, "");
    check(command(&plain, &[]), ExecFailure::NotExecutable, 13, &plain);
    check(command(&alien, &[]), ExecFailure::BadFormat, 8, &alien);
    check(Open { cwd: Some("/nowhere".into()), ..shell("true") }, ExecFailure::BadWorkdir, 2, "/nowhere");
    check(
        Open { user: Some("nobody-here".into()), ..shell("true") },
        ExecFailure::UnknownUser,
        0,
        "nobody-here",
    );
    let limit = Rlimit { resource: 99, soft: 1, hard: 1 };
    check(Open { rlimits: vec![limit], ..shell("true") }, ExecFailure::BadLimit, 22, "rlimit 99");
    check(command("a\0b", &[]), ExecFailure::Other, 22, "a\\0b");
    let path = vec![("PATH".to_owned(), directory.to_str().unwrap().to_owned())];
    check(Open { env: path, ..command("plain", &[]) }, ExecFailure::NotExecutable, 13, "plain");
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn users_are_switched_where_the_agent_may() {
    let agent = Agent::start();
    let outcome =
        agent.connect().run(&Open { user: Some("4711:4712".into()), ..shell("id -u; id -g; echo $HOME") });
    if rustix::process::geteuid().is_root() {
        assert_eq!(outcome.text(), "4711\n4712\n/\n");
    } else {
        assert_eq!((outcome.failure().kind, outcome.failure().errno), (ExecFailure::Other, 1));
    }
}

#[test]
fn a_terminal_is_one() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let size = TtySize { rows: 33, cols: 77 };
    let id = client.open(&Open {
        tty: Some(size),
        stdin: true,
        ..shell(
            "trap 'stty size' WINCH; tty; stty size; echo $TERM; read line; echo got $line; cat; echo end",
        )
    });
    let outcome = client.until(id, |outcome| outcome.text().contains("xterm"));
    assert!(outcome.text().starts_with("/dev/pts/"), "{outcome:?}");
    assert!(outcome.text().contains("33 77\r\n"), "{outcome:?}");
    client.send_raw(Kind::Stdin, id, b"hello\n");
    client.until(id, |outcome| outcome.text().contains("got hello\r\n"));
    // Not before: a signal that comes during a `read` ends it. The shell acts on this one at the latest when `cat` ends.
    client.send(Kind::Resize, id, &TtySize { rows: 11, cols: 22 });
    client.send_raw(Kind::StdinClose, id, b"");
    let outcome = client.wait(id);
    assert_eq!(outcome.code(), 0);
    assert!(outcome.text().contains("11 22\r\n"), "{outcome:?}");
    assert!(outcome.text().ends_with("end\r\n"), "{outcome:?}");
}

#[test]
fn interrupting_a_terminal_ends_its_command() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let size = TtySize { rows: 1, cols: 1 };
    // No shell: one that is about to execute a program may take the interrupt and forget it.
    let id = client.open(&Open { tty: Some(size), stdin: true, ..command("cat", &[]) });
    client.send_raw(Kind::Stdin, id, b"ready\n");
    // Once it is the terminal's echo, once the command, which waits for more.
    client.until(id, |outcome| outcome.text().matches("ready").count() == 2);
    client.send_raw(Kind::Stdin, id, b"\x03");
    assert_eq!(client.wait(id).end, Some(End::Exited(Exited::Signal(2))));
}

#[test]
fn session_numbers_may_come_again_when_they_are_free() {
    let agent = Agent::start();
    let mut client = agent.connect();
    for _ in 0..3 {
        client.send(Kind::Open, SessionId(9), &command("true", &[]));
        loop {
            let (kind, id, _) = client.frame().unwrap();
            assert_eq!(id, SessionId(9));
            if kind == Kind::Exited {
                break;
            }
        }
    }
    client.send(Kind::Open, SessionId(9), &command("sleep", &["1000"]));
    assert_eq!(client.frame().unwrap().0, Kind::Started);
    client.send(Kind::Open, SessionId(9), &command("true", &[]));
    assert_eq!(client.frame().unwrap().0, Kind::Refused);
}

#[test]
fn an_abandoned_session_is_killed_in_silence_and_no_other() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let kept = client.open(&Open { stdin: true, ..command("cat", &[]) });
    // One that is silent, and one whose window is used up.
    let silent = client.open(&command("sleep", &["1000"]));
    let pids = [kept, silent].map(|id| client.until(id, |outcome| outcome.pid.is_some()).pid.unwrap());
    let loud = SessionId(1000);
    client.send(Kind::Open, loud, &command("yes", &[]));
    let mut pid = 0;
    let mut taken = 0;
    while taken < cubby_protocol::INITIAL_WINDOW as usize {
        let (kind, id, payload) = client.frame().unwrap();
        assert_eq!(id, loud);
        match kind {
            Kind::Started => pid = decode::<Started>(&payload).unwrap().pid,
            _ => taken += payload.len(),
        }
    }
    for id in [silent, loud] {
        client.send_raw(Kind::Abandon, id, b"");
        // Once more, and for one that never was, it is nothing.
        client.send_raw(Kind::Abandon, id, b"");
    }
    client.send_raw(Kind::Abandon, SessionId(77), b"");
    wait_gone(pids[1]);
    wait_gone(pid);
    // Nothing was said of them: what comes next is the other one's.
    client.send_raw(Kind::Stdin, kept, b"still here");
    let (kind, id, payload) = client.frame().unwrap();
    assert_eq!((kind, id, payload.as_slice()), (Kind::Stdout, kept, &b"still here"[..]));
    client.send_raw(Kind::StdinClose, kept, b"");
    assert_eq!(client.wait(kept).code(), 0);
    assert_eq!(client.run(&command("true", &[])).code(), 0);
}
