//! How an end that nobody asked for gets on record: at once, with its reason, and although nobody looks. These
//! tests read rows as they are ([`Store::history`] settles nothing), and make no call of the library between
//! the event and the record.
//!
//! [`Store::history`]: cubby_state::Store::history

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cubby_state::{ProcessIdentity, Store};
use cubby_tests::{
    Client, builder, discard, freeze, gone, keeper, kill, name, own_home, process, sandbox, shell, store,
    until, variable, within,
};
use cubbyhole::{Error, ExitReason, ExitReport, Sandbox, Status};
use rusqlite::Connection;
use rustix::process::Signal;

use crate::CLIENT;

/// `promised`, or four times as much where several tests at once have every instruction emulated.
fn bound(promised: Duration) -> Duration {
    let emulated = fs::read_to_string("/proc/cpuinfo").unwrap().contains("QEMU TCG");
    promised * if emulated { 4 } else { 1 }
}

/// The report in the row of the newest run, once it is there.
async fn recorded(name: &str) -> ExitReport {
    let (store, name) = (store(), name.parse().unwrap());
    let mut report = None;
    until("a record of the end", async || {
        report = store.history(&name).unwrap().remove(0).exit;
        report.is_some()
    })
    .await;
    report.unwrap()
}

/// The same for a process that was just killed. How long it takes to die is the kernel's affair.
async fn recorded_at_once(name: &str, process: &ProcessIdentity) -> ExitReport {
    until("its death", async || !process.is_running()).await;
    let begin = Instant::now();
    let report = recorded(name).await;
    let took = begin.elapsed();
    println!("{name}: {:?} on record after {took:?}", report.reason);
    assert!(took <= bound(Duration::from_secs(1)), "it took {took:?}");
    report
}

/// What is left when the end is on record: no process, no socket; and that it can be started again.
async fn recovered(sandbox: Sandbox, process: &ProcessIdentity, keeper: &ProcessIdentity) {
    gone(process).await;
    gone(keeper).await;
    assert!(!store().home().socket(&sandbox.name().parse().unwrap()).exists(), "its socket stayed");
    let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
    assert_eq!(shell(&again, "echo well").await, "well\n");
    discard(again).await;
}

#[tokio::test]
async fn a_killed_sandbox_process_is_on_record_at_once_with_its_signal_and_console() {
    for (signal, number) in [(Signal::KILL, 9), (Signal::ABORT, 6), (Signal::SYS, 31)] {
        let sandbox = sandbox(&format!("signal-{number}")).await;
        shell(&sandbox, "echo last words > /dev/console").await;
        let (process, keeper) = (process(sandbox.name()), keeper(sandbox.name()));
        cubby_tests::signal(process.pid, signal);
        let report = recorded_at_once(sandbox.name(), &process).await;
        assert_eq!(report.reason, ExitReason::ProcessKilled { signal: number });
        assert_eq!(report.console_tail.as_deref().map(str::trim), Some("last words"));
        assert_eq!(sandbox.status().await.unwrap(), Status::Crashed);
        recovered(sandbox, &process, &keeper).await;
    }
}

/// More than the ring holds in which a console outlives its process.
#[tokio::test]
async fn a_console_keeps_its_newest_and_a_sandbox_outlives_writing_more_than_that() {
    const LINES: usize = 6000;
    let sandbox = sandbox("talkative").await;
    let (process, keeper) = (process(sandbox.name()), keeper(sandbox.name()));
    let line = |number: usize| format!("line {number:08}");
    let script = format!("seq -f 'line %08.0f' 1 {LINES} > /dev/console; echo well");
    // Each byte is an exit of the virtual machine, and the first one after 64 KiB a call that no byte before has made.
    assert_eq!(shell(&sandbox, &script).await, "well\n");
    assert_eq!(shell(&sandbox, "echo still well").await, "still well\n");
    kill(process.pid);
    let tail = recorded_at_once(sandbox.name(), &process).await.console_tail.unwrap();
    assert!(tail.len() <= ExitReport::MAX_CONSOLE_TAIL && tail.len() > ExitReport::MAX_CONSOLE_TAIL * 9 / 10);
    let lines: Vec<&str> = tail.lines().map(str::trim_end).collect();
    let first = LINES + 1 - (lines.len() - 1);
    assert!(first > 1 && line(first - 1).ends_with(lines[0]), "it begins with {:?}", lines[0]);
    for (number, kept) in (first..).zip(&lines[1..]) {
        assert_eq!(*kept, line(number));
    }
    recovered(sandbox, &process, &keeper).await;
}

#[tokio::test]
async fn a_killed_sandbox_process_without_its_application_is_on_record_at_once() {
    let name = name("abandoned");
    let mut application = Client::start(&[CLIENT, "detached", &name]);
    assert_eq!(application.line().await, name);
    application.kill().await;
    let (process, keeper) = (process(&name), keeper(&name));
    kill(process.pid);
    let report = recorded_at_once(&name, &process).await;
    assert_eq!(report.reason, ExitReason::ProcessKilled { signal: 9 });
    recovered(Sandbox::get(&name).await.unwrap(), &process, &keeper).await;
}

#[tokio::test]
async fn a_sandbox_whose_keeper_is_killed_goes_on_and_ends_with_its_application() {
    let name = name("unkept");
    let mut application = Client::start(&[CLIENT, "attached", &name]);
    assert_eq!(application.line().await, name);
    let (process, keeper) = (process(&name), keeper(&name));
    kill(keeper.pid);
    // Its application has waited for it: no zombie.
    gone(&keeper).await;
    let sandbox = Sandbox::get(&name).await.unwrap();
    assert_eq!(shell(&sandbox, "echo kept > /root/note; echo well").await, "well\n");
    let begin = Instant::now();
    application.kill().await;
    gone(&process).await;
    let took = begin.elapsed();
    assert!(took <= bound(Duration::from_secs(2)), "it took {took:?}");
    assert_eq!(recorded(&name).await.reason, ExitReason::Requested);
    let again = within("start", Sandbox::start(&name)).await.unwrap();
    assert_eq!(shell(&again, "cat /root/note").await, "kept\n");
    discard(again).await;
}

/// What a thread waits in: the number of the system call, or nothing if it runs.
fn waits_in(pid: u32, thread: &str) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let named =
        |task: &PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == thread);
    let task = tasks.flatten().map(|task| task.path()).find(named)?;
    fs::read_to_string(task.join("syscall")).ok()?.split(' ').next()?.parse().ok()
}

/// The guest waits for its devices while the end of its boot is written, which takes as long as the disk does.
#[tokio::test]
async fn an_application_that_dies_during_a_boot_takes_the_guest_with_it_wherever_that_is() {
    const FUTEX: u32 = 202;
    const CLOCK_NANOSLEEP: u32 = 230;
    let (directory, name) = (tempfile::tempdir().unwrap(), name("unborn"));
    let home = own_home(directory.path()).await;
    let store = Store::open(&home).unwrap();
    let variable = format!("CUBBY_HOME={}", home.root().display());
    let mut application = Client::start(&["env", &variable, CLIENT, "attached", &name]);
    let row = || store.get(&name.parse().unwrap()).ok();
    let process = || row().and_then(|row| row.run.process);
    until("the process", async || process().is_some()).await;
    let process = process().unwrap();
    let slow = Connection::open(home.database()).unwrap();
    slow.execute_batch("BEGIN IMMEDIATE").unwrap();
    application.kill().await;
    until("a guest that waits for one that writes", async || {
        waits_in(process.pid, "cubby-sandbox") == Some(CLOCK_NANOSLEEP)
            && waits_in(process.pid, "vcpu0") == Some(FUTEX)
    })
    .await;
    slow.execute_batch("ROLLBACK").unwrap();
    gone(&process).await;
    assert_eq!(row().unwrap().run.exit.map(|exit| exit.reason), Some(ExitReason::Requested));
    assert_eq!(row().unwrap().status, Status::Stopped);
}

#[tokio::test]
async fn a_keeper_and_its_sandbox_killed_at_once_are_found_by_a_reader() {
    let sandbox = sandbox("both").await;
    let (process, keeper) = (process(sandbox.name()), keeper(sandbox.name()));
    // It must not come to write while the other dies.
    freeze(keeper.pid);
    kill(process.pid);
    kill(keeper.pid);
    gone(&keeper).await;
    gone(&process).await;
    let report = within("the end", sandbox.wait()).await.unwrap();
    assert_eq!(report.reason, ExitReason::ProcessKilled { signal: 0 });
    recovered(sandbox, &process, &keeper).await;
}

#[tokio::test]
async fn nobody_takes_the_sandbox_for_dead_before_its_keeper_has_spoken() {
    let sandbox = sandbox("unsettled").await;
    let (process, keeper) = (process(sandbox.name()), keeper(sandbox.name()));
    freeze(keeper.pid);
    kill(process.pid);
    until("its death", async || !process.is_running()).await;
    assert_eq!(sandbox.status().await.unwrap(), Status::Running);
    assert!(matches!(Sandbox::start(sandbox.name()).await, Err(Error::InvalidState { .. })));
    cubby_tests::signal(keeper.pid, Signal::CONT);
    let report = recorded_at_once(sandbox.name(), &process).await;
    assert_eq!(report.reason, ExitReason::ProcessKilled { signal: 9 });
    recovered(sandbox, &process, &keeper).await;
}

#[tokio::test]
async fn a_signal_stops_or_drains_and_loses_nothing() {
    // To the sandbox process, and to its keeper, which is what its application started.
    for (test, to_keeper, signal, reason) in [
        ("terminated", false, Signal::TERM, ExitReason::Requested),
        ("terminated-keeper", true, Signal::TERM, ExitReason::Requested),
        ("drained-keeper", true, Signal::USR1, ExitReason::Drained),
    ] {
        let sandbox = sandbox(test).await;
        let (process, keeper) = (process(sandbox.name()), keeper(sandbox.name()));
        shell(&sandbox, "echo kept > /root/note").await;
        cubby_tests::signal(if to_keeper { keeper.pid } else { process.pid }, signal);
        assert_eq!(recorded(sandbox.name()).await.reason, reason, "{test}");
        gone(&process).await;
        gone(&keeper).await;
        assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
        let again = within("start", Sandbox::start(sandbox.name())).await.unwrap();
        assert_eq!(shell(&again, "cat /root/note").await, "kept\n");
        discard(again).await;
    }
}

#[tokio::test]
async fn a_keeper_is_small() {
    let sandbox = sandbox("small").await;
    let holdings = cubby_tests::Holdings::of(keeper(sandbox.name()).pid);
    println!("a keeper: {holdings:?}");
    assert!(holdings.anonymous_kib <= 512, "{holdings:?}");
    assert_eq!(holdings.threads, 1);
    discard(sandbox).await;
}

/// Lets the guest do itself harm, and gives how that is recorded.
async fn harm(test: &str, script: &str) -> ExitReport {
    let sandbox = sandbox(test).await;
    let (process, keeper) = (process(sandbox.name()), keeper(sandbox.name()));
    let begin = Instant::now();
    // Its end is not waited for: that would be a reader.
    let harm = within(script, sandbox.shell_stream(script)).await.unwrap();
    let report = recorded(sandbox.name()).await;
    println!("{test}: {:?} on record {:?} after the command was sent", report.reason, begin.elapsed());
    drop(harm);
    assert_eq!(sandbox.status().await.unwrap(), Status::Crashed);
    recovered(sandbox, &process, &keeper).await;
    report
}

#[tokio::test]
async fn a_panic_is_on_record_as_such_with_the_consoles_tail() {
    let report = harm("panic", "echo c > /proc/sysrq-trigger").await;
    assert_eq!(report.reason, ExitReason::GuestPanic);
    assert!(report.console_tail.unwrap().contains("Kernel panic - not syncing: sysrq triggered crash"));
}

#[tokio::test]
async fn a_reboot_is_on_record_as_a_reset() {
    assert_eq!(harm("reboot", "echo b > /proc/sysrq-trigger").await.reason, ExitReason::GuestReset);
}

#[tokio::test]
async fn a_triple_fault_is_on_record_as_a_reset() {
    // The kernel loads an empty table of interrupts and takes one.
    let script = "echo triple > /sys/kernel/reboot/type && echo b > /proc/sysrq-trigger";
    assert_eq!(harm("triple", script).await.reason, ExitReason::GuestReset);
}

#[tokio::test]
async fn a_dead_agent_is_on_record_as_such() {
    // PID 1 ignores signals, but not what its own code does: every page of that becomes undefined instructions.
    let program = r#"
import re
for line in open('/proc/1/maps'):
    begin, end, rights = re.match(r'(\w+)-(\w+) (....)', line).groups()
    if 'x' in rights and 'vdso' not in line and 'vsyscall' not in line:
        with open('/proc/1/mem', 'r+b', buffering=0) as memory:
            memory.seek(int(begin, 16))
            memory.write(b'\x0f\x0b' * ((int(end, 16) - int(begin, 16)) // 2))
"#;
    let report = harm("agentless", &format!("exec python3 -c \"{program}\"")).await;
    assert_eq!(report.reason, ExitReason::AgentDied, "{report:?}");
    assert!(report.console_tail.unwrap().contains("Attempted to kill init"));
}

#[tokio::test]
async fn a_host_out_of_memory_is_on_record_as_such() {
    const EAT: &str = "x = bytearray(150 << 20)\nprint(len(x))\nfor i in range(0, len(x), 4096): x[i] = 1";
    let group = PathBuf::from(format!("/sys/fs/cgroup/{}", name("starved")));
    // The controller is one of those that the groups below the root may use.
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory").unwrap();
    fs::create_dir(&group).unwrap();

    // Moved there in the middle of its life.
    let moved = sandbox("starved-moved").await;
    let (pid, warden) = (process(moved.name()), keeper(moved.name()));
    fs::write(group.join("cgroup.procs"), pid.pid.to_string()).unwrap();
    fs::write(group.join("memory.max"), (16 << 20).to_string()).unwrap();
    let _eating = within("exec", moved.exec_stream("python3", ["-c", EAT])).await.unwrap();
    assert_eq!(recorded(moved.name()).await.reason, ExitReason::OutOfMemory);
    fs::write(group.join("memory.max"), "max").unwrap();
    recovered(moved, &pid, &warden).await;

    // Born there, application and all. The group has a kill in its past now, and it does not count.
    let name = name("starved-born");
    let enter = format!("echo $$ > {}/cgroup.procs; exec {CLIENT} attached {name}", group.display());
    let mut application = Client::start(&["sh", "-c", &enter]);
    assert_eq!(application.line().await, name);
    let (pid, warden) = (process(&name), keeper(&name));
    let used: u64 = fs::read_to_string(group.join("memory.current")).unwrap().trim().parse().unwrap();
    fs::write(group.join("memory.max"), (used + (16 << 20)).to_string()).unwrap();
    let starved = Sandbox::get(&name).await.unwrap();
    let _eating = within("exec", starved.exec_stream("python3", ["-c", EAT])).await.unwrap();
    assert_eq!(recorded(&name).await.reason, ExitReason::OutOfMemory);
    // The application and the keeper were not the ones to go.
    fs::write(group.join("memory.max"), "max").unwrap();
    recovered(starved, &pid, &warden).await;
    application.finish().await;
    until("an empty group", async || fs::remove_dir(&group).is_ok()).await;
}

/// A sandbox process that runs a copy of the real one with assets of its own.
fn runtime(dir: &Path, kernel: &[u8]) -> PathBuf {
    let script = dir.join("cubby-sandbox");
    let agent = PathBuf::from(variable("CUBBY_ASSETS"));
    let agent = [agent.join("cubby-agent"), agent.join("lib/cubby/cubby-agent")];
    fs::copy(agent.iter().find(|path| path.exists()).unwrap(), dir.join("cubby-agent")).unwrap();
    fs::write(dir.join("vmlinux"), kernel).unwrap();
    let real = variable("CUBBY_RUNTIME");
    fs::write(&script, format!("#!/bin/sh\nCUBBY_ASSETS={} exec {real}\n", dir.display())).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    script
}

/// Tries to start `name` once more, and gives the stage that is told and recorded.
async fn failed_stage(name: &str) -> String {
    let told = match within("start", Sandbox::start(name)).await {
        Err(Error::BootFailed { stage, .. }) => stage,
        other => panic!("{other:?}"),
    };
    assert_eq!(recorded(name).await.reason, ExitReason::BootFailed { stage: told.clone() });
    told
}

#[tokio::test]
async fn a_boot_is_on_record_with_the_stage_that_failed() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime(dir.path(), b"\x7fELF, and no more of it");
    let name = name("stages");
    let created = within("create", builder(&name).runtime(&runtime).create()).await;
    assert!(matches!(created, Err(Error::BootFailed { ref stage, .. }) if stage == "vm"), "{created:?}");
    assert_eq!(recorded(&name).await.reason, ExitReason::BootFailed { stage: "vm".into() });

    let home = store().home().clone();
    let id = name.parse().unwrap();
    // A directory where the socket should be.
    fs::create_dir(home.socket(&id)).unwrap();
    assert_eq!(failed_stage(&name).await, "relay");
    fs::remove_dir(home.socket(&id)).unwrap();
    // No disk.
    fs::remove_file(home.disk(&id)).unwrap();
    assert_eq!(failed_stage(&name).await, "disks");
    // No kernel, so that the installed one is used, and no file system on the disk.
    fs::remove_file(dir.path().join("vmlinux")).unwrap();
    fs::write(home.disk(&id), "").unwrap();
    assert_eq!(failed_stage(&name).await, "writable-disk");
    // No sandbox process.
    fs::remove_file(&runtime).unwrap();
    assert!(within("start", Sandbox::start(&name)).await.is_err());
    assert_eq!(recorded(&name).await.reason, ExitReason::BootFailed { stage: "runtime".into() });
    Sandbox::remove(&name).await.unwrap();
}
