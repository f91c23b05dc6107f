//! What a sandbox uses: numbers that move when something happens, and in the right direction.

use std::time::Duration;

use cubby_tests::{builder, discard, name, next_output, python, sandbox, until, within};
use cubbyhole::{Error, ExitReason, Metrics, Sandbox, Status};
use serde_json::Value;
use tokio::process::Command;

use super::CUBBY;

const MIB: u64 = 1 << 20;

async fn metrics(sandbox: &Sandbox) -> Metrics {
    within("metrics", sandbox.metrics()).await.unwrap()
}

#[tokio::test]
async fn metrics_follow_what_a_guest_does() {
    let sandbox = sandbox("metrics").await;
    let idle = metrics(&sandbox).await;
    assert_eq!((idle.name.as_str(), idle.cpu.vcpus, idle.clients), (sandbox.name(), 1, 1));
    assert_eq!(idle.sessions, 0, "a question is no session");
    assert!(idle.uptime > Duration::ZERO);
    // 192 MiB without what the kernel keeps; the agent is the only process.
    assert!(idle.memory.total > 128 * MIB && idle.memory.total < 192 * MIB, "{idle:?}");
    assert!(idle.memory.used > 0 && idle.memory.used < 64 * MIB, "{idle:?}");
    assert_eq!(idle.processes, 1, "{idle:?}");
    assert!(idle.memory.host_resident > 8 * MIB && idle.memory.host_resident < 256 * MIB, "{idle:?}");
    // A sparse ext4 of 4 GiB.
    assert!(idle.disk.total > 3 << 30 && idle.disk.total <= 4 << 30, "{idle:?}");
    assert!(idle.disk.host_allocated > 0 && idle.disk.host_allocated < 64 * MIB, "{idle:?}");
    assert!(idle.disk.read > 0, "the image was read: {idle:?}");
    assert_eq!(
        idle.network.iter().map(|interface| interface.name.as_str()).filter(|name| *name == "lo").count(),
        1
    );

    // Processor: a busy loop of a second of its own processor time is a second of the guest's, at least.
    python(&sandbox, "import time\nwhile time.process_time() < 1: pass").await;
    let busy = metrics(&sandbox).await;
    let (user, usage) = (busy.cpu.user_ns - idle.cpu.user_ns, busy.cpu.usage_ns - idle.cpu.usage_ns);
    assert!(usage > 700_000_000 && user > 0, "{usage} ns: {busy:?}");
    assert!(usage >= user && busy.uptime > idle.uptime);

    // Memory: 64 MiB that are written to, in the guest's count and in the host's.
    let program = "import sys\nheld = bytearray(b'x' * (64 << 20))\nprint(1, flush=True)\nsys.stdin.read()";
    let mut holder = within("start", sandbox.exec_stream("python3", ["-c", program])).await.unwrap();
    next_output(&mut holder).await;
    let full = metrics(&sandbox).await;
    assert!(full.memory.used > busy.memory.used + 56 * MIB, "{full:?}");
    assert!(full.memory.host_resident > idle.memory.host_resident + 56 * MIB, "{full:?}");
    assert_eq!((full.processes, full.sessions), (2, 1), "{full:?}");
    holder.close_stdin().await.unwrap();
    assert!(within("the end", holder.wait()).await.unwrap().success());

    // Disk: 16 MiB that are synced, in the guest's file system and on the host.
    python(
        &sandbox,
        "import os\nf = open('/var/large', 'wb')\nf.write(os.urandom(16 << 20))\nf.flush()\nos.fsync(f.fileno())",
    )
    .await;
    let written = metrics(&sandbox).await;
    assert!(written.disk.used >= full.disk.used + 16 * MIB, "{written:?}");
    assert!(written.disk.written >= full.disk.written + 16 * MIB, "{written:?}");
    assert!(written.disk.host_allocated >= full.disk.host_allocated + 16 * MIB, "{written:?}");

    // Loopback is an interface like any other.
    python(
        &sandbox,
        "import socket\na = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\na.bind(('127.0.0.1', 0))\n\
         a.sendto(b'x' * 1000, a.getsockname())\nassert len(a.recv(2000)) == 1000",
    )
    .await;
    let lo =
        |metrics: &Metrics| metrics.network.iter().find(|interface| interface.name == "lo").unwrap().clone();
    let (before, after) = (lo(&written), lo(&metrics(&sandbox).await));
    assert!(after.received_bytes >= before.received_bytes + 1000, "{before:?} {after:?}");
    assert!(after.sent_packets > before.sent_packets);

    let text = written.to_openmetrics();
    let bytes = format!("cubby_disk_used_bytes{{sandbox=\"{}\"}} {}\n", sandbox.name(), written.disk.used);
    assert!(text.contains(&bytes) && text.ends_with("# EOF\n"), "{text}");
    discard(sandbox).await;
}

#[tokio::test]
async fn looking_at_a_sandbox_is_no_use_of_it() {
    let name = name("watched");
    let sandbox = within("create", builder(&name).idle_timeout(3).create()).await.unwrap();
    // Asked again and again, it is idle nevertheless.
    let mut asked = 0;
    let idle = async {
        loop {
            match sandbox.metrics().await {
                Ok(_) => asked += 1,
                Err(Error::Ended { report, .. }) => return report.reason,
                Err(Error::InvalidState { .. }) => return sandbox.wait().await.unwrap().reason,
                Err(error) => panic!("{error}"),
            }
        }
    };
    assert_eq!(within("the idle time-out", idle).await, ExitReason::IdleTimeout);
    assert!(asked > 2, "it was asked {asked} times");
    Sandbox::remove(&name).await.unwrap();
    // And one that drains can be looked at.
    let sandbox = cubby_tests::sandbox("draining").await;
    let mut work = within("start", sandbox.exec_stream("cat", [""; 0])).await.unwrap();
    within("start", work.next()).await.unwrap().unwrap();
    let drain = tokio::spawn({
        let sandbox = sandbox.clone();
        async move { sandbox.drain().await }
    });
    until("the drain", async || sandbox.status().await.unwrap() == Status::Draining).await;
    assert_eq!(metrics(&sandbox).await.sessions, 1);
    work.close_stdin().await.unwrap();
    assert!(within("the end", work.wait()).await.unwrap().success());
    within("the drain", drain).await.unwrap().unwrap();
    Sandbox::remove(sandbox.name()).await.unwrap();
}

#[tokio::test]
async fn the_command_shows_what_sandboxes_use() {
    let sandbox = sandbox("cli-stats").await;
    let stats = async |arguments: &[&str]| {
        let mut command = Command::new(CUBBY);
        let output = within("cubby stats", command.arg("stats").args(arguments).output()).await.unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, table, _) = stats(&[sandbox.name()]).await;
    assert_eq!(code, Some(0));
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("NAME "), "{table}");
    assert!(lines[1].starts_with(sandbox.name()) && lines[1].contains("% "), "{table}");
    let (code, text, _) = stats(&["--json", sandbox.name()]).await;
    let all: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, all.as_array().unwrap().len()), (Some(0), 1));
    assert_eq!(all[0]["name"], sandbox.name());
    assert!(all[0]["memory"]["used"].as_u64().unwrap() > MIB && all[0]["cpu"]["vcpus"] == 1, "{text}");
    // Without a name it is all that run, and this is one of them.
    let (code, text, _) = stats(&["--openmetrics"]).await;
    assert!(text.contains(&format!("cubby_processes{{sandbox=\"{}\"}} 1\n", sandbox.name())), "{text}");
    assert!(code == Some(0) && text.ends_with("# EOF\n"), "{text}");
    // One that is named and cannot be looked at is told, and the others are shown.
    within("stop", sandbox.stop()).await.unwrap();
    let (code, text, errors) = stats(&["--no-stream", sandbox.name(), "no-such-sandbox"]).await;
    assert_eq!((code, text.lines().count()), (Some(1), 3), "{text}");
    assert!(errors.contains("it is stopped") && errors.contains("no sandbox named"), "{errors}");
    Sandbox::remove(sandbox.name()).await.unwrap();
}
