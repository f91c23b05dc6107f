//! How commands end: by time-out, with their client, and with background processes that outlive them.

use cubby_protocol::message::{Exited, Open, Signal};
use cubby_protocol::{INITIAL_WINDOW, Kind};

use crate::client::{Agent, End, command, shell, wait_gone};

#[test]
fn a_timeout_ends_the_whole_group_and_says_so() {
    let agent = Agent::start();
    let open = Open { timeout_ms: Some(100), ..shell("sleep 1000 & echo $!; sleep 1000") };
    let outcome = agent.connect().run(&open);
    assert_eq!(outcome.end, Some(End::Exited(Exited::TimedOut)));
    wait_gone(outcome.text().trim().parse().unwrap());
}

#[test]
fn a_command_that_ignores_term_is_killed_and_a_quick_one_is_not_timed_out() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let stubborn = client.open(&Open {
        timeout_ms: Some(1),
        ..shell("trap '' TERM; echo ready; while :; do sleep 1000; done")
    });
    let quick = client.run(&Open { timeout_ms: Some(20_000), ..shell("echo quick") });
    assert_eq!((quick.text(), quick.code()), ("quick\n", 0));
    assert_eq!(client.wait(stubborn).end, Some(End::Exited(Exited::TimedOut)));
}

#[test]
fn a_timeout_ends_a_command_whose_output_nobody_takes() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = client.open(&Open { timeout_ms: Some(50), ..command("yes", &[]) });
    // No credit: what was sent stays within the window, and the end still comes when the output was taken.
    let (mut taken, mut pid) = (0, 0);
    while taken < INITIAL_WINDOW as usize {
        match client.frame().unwrap() {
            (Kind::Started, _, payload) => {
                pid = cubby_protocol::decode::<cubby_protocol::message::Started>(&payload).unwrap().pid
            }
            (Kind::Stdout, _, payload) => taken += payload.len(),
            other => panic!("{other:?}"),
        }
    }
    wait_gone(pid);
    client.send(Kind::Credit, id, &cubby_protocol::message::Credit { bytes: 1 << 20 });
    assert_eq!(client.wait(id).end, Some(End::Exited(Exited::TimedOut)));
}

#[test]
fn the_end_of_a_client_is_the_end_of_its_commands_only() {
    let agent = Agent::start();
    let (mut gone, mut stays) = (agent.connect(), agent.connect());
    let id = gone.open(&shell("sleep 1000 & echo $!; sleep 1000"));
    let other = stays.open(&Open { stdin: true, ..command("cat", &[]) });
    let outcome = gone.until(id, |outcome| outcome.text().ends_with('\n'));
    drop(gone);
    wait_gone(outcome.pid.unwrap());
    wait_gone(outcome.text().trim().parse().unwrap());
    stays.send_raw(Kind::Stdin, other, b"still here");
    stays.send_raw(Kind::StdinClose, other, b"");
    let outcome = stays.wait(other);
    assert_eq!((outcome.text(), outcome.code()), ("still here", 0));
}

#[test]
fn a_background_process_holds_up_nobody_and_may_go_on_writing() {
    let agent = Agent::start();
    let mut client = agent.connect();
    // The background process writes more than a pipe holds after the command's end, and then says that it could.
    let done = std::env::temp_dir().join(format!("cubby-agent-background-{}", std::process::id()));
    let _ = std::fs::remove_file(&done);
    let fifo = done.with_extension("fifo");
    let script = format!(
        "mkfifo {fifo}; (read x < {fifo}; head -c 1000000 /dev/zero && echo $? > {done}.tmp && mv {done}.tmp {done}) & echo first",
        fifo = fifo.display(),
        done = done.display()
    );
    let outcome = client.run(&shell(&script));
    assert_eq!((outcome.text(), outcome.code()), ("first\n", 0));
    std::fs::write(&fifo, "go\n").unwrap();
    let deadline = std::time::Instant::now() + crate::client::LIMIT;
    while !done.exists() {
        assert!(std::time::Instant::now() < deadline, "the background process is stuck");
        std::thread::yield_now();
    }
    assert_eq!(std::fs::read_to_string(&done).unwrap(), "0\n");
    std::fs::remove_file(&done).unwrap();
    std::fs::remove_file(&fifo).unwrap();
}

#[test]
fn everything_a_command_wrote_is_sent_although_a_background_process_holds_the_pipe() {
    let agent = Agent::start();
    let outcome = agent.connect().run(&shell("sleep 30 & head -c 60000 /dev/zero; kill -9 $$"));
    assert_eq!(outcome.stdout.len(), 60_000);
    assert_eq!(outcome.end, Some(End::Exited(Exited::Signal(9))));
}

#[test]
fn signals_reach_the_group_real_time_ones_too() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = client.open(&shell(
        "trap 'echo usr1' USR1; trap 'echo rt; exit 3' 40; echo ready; while :; do sleep 0.01; done",
    ));
    client.until(id, |outcome| outcome.text().contains("ready"));
    client.send(Kind::Signal, id, &Signal { number: 10 });
    client.until(id, |outcome| outcome.text().contains("usr1"));
    for nonsense in [0, -9, 65, i32::MIN] {
        client.send(Kind::Signal, id, &Signal { number: nonsense });
    }
    client.send(Kind::Signal, id, &Signal { number: 40 });
    let outcome = client.wait(id);
    assert_eq!(outcome.code(), 3, "{outcome:?}");
}
