//! Many at once: sandboxes on one machine, processors in one sandbox.

use std::collections::BTreeSet;

use cubby_tests::{builder, discard, gone, name, process, shell, within};
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_sandboxes_run_at_once_and_each_is_itself() {
    let base = name("many");
    let mut booting = JoinSet::new();
    for number in 0..20 {
        let builder = builder(&format!("{base}-{number}")).memory(128).env("NUMBER", number.to_string());
        booting.spawn(builder.create());
    }
    let created = within("20 boots", booting.join_all()).await;
    let sandboxes: Vec<_> = created.into_iter().map(|created| created.unwrap()).collect();
    // All are there before the first is used.
    let processes: Vec<_> = sandboxes.iter().map(|sandbox| process(sandbox.name())).collect();
    assert_eq!(processes.iter().map(|process| process.pid).collect::<BTreeSet<_>>().len(), 20);
    let mut running = JoinSet::new();
    for sandbox in &sandboxes {
        let sandbox = sandbox.clone();
        running.spawn(async move {
            let script = "cat /root/note 2>&1; echo $NUMBER > /root/note; hostname; echo $(($(cat /root/note) * 1000))";
            let (_, number) = sandbox.name().rsplit_once('-').unwrap();
            let absent = "cat: /root/note: No such file or directory";
            assert_eq!(shell(&sandbox, script).await, format!("{absent}\n{}\n{}000\n", sandbox.name(), number.trim_start_matches('0')).replace("\n000\n", "\n0\n"));
        });
    }
    within("20 commands", running.join_all()).await;
    let mut stopping = JoinSet::new();
    for sandbox in sandboxes {
        stopping.spawn(discard(sandbox));
    }
    within("20 stops", stopping.join_all()).await;
    for process in processes {
        gone(&process).await;
    }
}

#[tokio::test]
async fn four_processors_all_work() {
    let sandbox = within("create", builder(&name("smp")).cpus(4).create()).await.unwrap();
    assert_eq!(shell(&sandbox, "nproc; grep -c ^processor /proc/cpuinfo").await, "4\n4\n");
    // Field 39 of a process's stat is the processor that it ran on last.
    let script = "for cpu in 0 1 2 3; do taskset -c $cpu cut -d' ' -f39 /proc/self/stat & done; wait";
    let mut ran: Vec<_> = shell(&sandbox, script).await.lines().map(str::to_owned).collect();
    ran.sort_unstable();
    assert_eq!(ran, ["0", "1", "2", "3"]);
    // All at once, with much to say to each other.
    let script = "for n in 1 2 3 4; do (i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done) | wc -l & done; wait";
    assert_eq!(shell(&sandbox, script).await, "2000\n".repeat(4));
    discard(sandbox).await;
}
