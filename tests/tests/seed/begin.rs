//! How a sandbox begins, who it belongs to, and how it is found.

use cubby_state::Home;
use cubby_tests::{
    Client, builder, discard, gone, host_time, name, next_output, parent, process, python, refused_as,
    shared, shell, store, until, within,
};
use cubbyhole::{Error, ExitReason, Sandbox, Status};

use crate::CLIENT;

/// "Each sandbox runs as a child process of whatever application creates it."
#[tokio::test]
async fn each_sandbox_runs_as_a_child_process_of_whatever_application_creates_it() {
    let ours = shared().await;
    // Between the two is the sandbox process's keeper, which only waits for it.
    let creator = |name: &str| parent(parent(process(name).pid));
    assert_eq!(creator(ours.name()), std::process::id());
    let name = name("child");
    let mut application = Client::start(&[CLIENT, "attached", &name]);
    assert_eq!(application.line().await, name);
    assert_eq!(creator(&name), application.pid());
    application.finish().await;
    within("the end", Sandbox::get(&name).await.unwrap().wait()).await.unwrap();
    Sandbox::remove(&name).await.unwrap();
}

/// "Sandbox.create boots a microVM, starts the guest agent inside it, and establishes a communication channel back to the
/// host."
#[tokio::test]
async fn create_boots_a_microvm_starts_the_agent_in_it_and_establishes_a_channel() {
    let sandbox = shared().await;
    let pid = process(sandbox.name()).pid;
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let open: Vec<_> = descriptors.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok()).collect();
    assert!(open.iter().any(|path| path.to_str() == Some("anon_inode:kvm-vm")), "no VM in {open:?}");
    // A kernel of its own, whose first process is the agent.
    const BOOT: &str = "/proc/sys/kernel/random/boot_id";
    let theirs = shell(&sandbox, &format!("cat {BOOT}; readlink /proc/1/exe || cat /proc/1/comm")).await;
    let (boot, first) = theirs.split_once('\n').unwrap();
    assert_ne!(boot, std::fs::read_to_string(BOOT).unwrap().trim());
    assert!(first.contains("init") || first.contains("agent"), "{first}");
    assert!(within("ping", sandbox.ping()).await.unwrap() > std::time::Duration::ZERO);
}

/// "Creating: The VM is booting." and "Running: The guest agent is ready. You can call exec, shell."
#[tokio::test]
async fn it_is_creating_while_it_boots_and_running_once_the_agent_is_ready() {
    let name = name("creating");
    let create = tokio::spawn(builder(&name).create());
    let early = async || Sandbox::get(&name).await.ok();
    until("the row", async || early().await.is_some()).await;
    let booting = early().await.unwrap();
    assert_eq!(booting.status().await.unwrap(), Status::Creating);
    let refused = within("exec", booting.exec("true", [""; 0])).await;
    assert!(refused_as(&refused, Status::Creating), "{refused:?}");
    let paused = within("pause", booting.pause()).await;
    assert!(refused_as(&paused, Status::Creating), "{paused:?}");
    let sandbox = within("create", create).await.unwrap().unwrap();
    // "... and waits until it's ready to accept commands."
    assert_eq!(sandbox.status().await.unwrap(), Status::Running);
    let output = within("exec", sandbox.exec("echo", ["first"])).await.unwrap();
    assert_eq!(output.stdout().unwrap(), "first\n");
    assert_eq!(shell(&booting, "echo second").await, "second\n");
    discard(sandbox).await;
}

/// "... initializing (configuring network, setting up the environment)."
#[tokio::test]
async fn the_first_command_finds_loopback_and_the_hosts_time() {
    let name = name("environment");
    let sandbox = within("create", builder(&name).env("COLOUR", "blue").create()).await.unwrap();
    // Python may take seconds to start, which would be no measure of a clock.
    let program = "import sys, time\nprint('ready', flush=True)\nsys.stdin.read(1)\nprint(repr(time.time()), flush=True)";
    let mut first = within("start", sandbox.exec_stream("python3", ["-c", program])).await.unwrap();
    assert_eq!(next_output(&mut first).await, "ready\n");
    let before = host_time();
    first.write_stdin("!").await.unwrap();
    let told = next_output(&mut first).await;
    let after = host_time();
    let guest = std::time::Duration::from_secs_f64(told.trim().parse().unwrap());
    // What the agent takes from being told to having set it.
    let tolerance = std::time::Duration::from_millis(100);
    assert!(
        before <= guest + tolerance && guest <= after + tolerance,
        "{guest:?} not in {before:?} to {after:?}"
    );
    let program = "import os, socket\nserver = socket.create_server(('127.0.0.1', 0))\n\
                   client = socket.create_connection(server.getsockname())\nprint(os.environ['COLOUR'], socket.gethostname())";
    assert_eq!(python(&sandbox, program).await, format!("blue {name}\n"));
    discard(sandbox).await;
}

/// "Attached: sandbox stops when your process exits."
#[tokio::test]
async fn an_attached_sandbox_stops_when_its_application_exits_however_it_does() {
    for how in ["killed", "finished"] {
        let name = name(how);
        let mut application = Client::start(&[CLIENT, "attached", &name]);
        assert_eq!(application.line().await, name);
        let sandbox = Sandbox::get(&name).await.unwrap();
        let before = process(&name);
        // Not synced by anybody.
        assert_eq!(shell(&sandbox, "echo kept > /root/note; echo well").await, "well\n");
        match how {
            "killed" => application.kill().await,
            _ => application.finish().await,
        }
        let report = within("the end", sandbox.wait()).await.unwrap();
        assert_eq!(report.reason, ExitReason::Requested);
        gone(&before).await;
        assert_eq!(sandbox.status().await.unwrap(), Status::Stopped);
        // It ended as a stop ends it: nothing was lost.
        let again = within("start", Sandbox::start(&name)).await.unwrap();
        assert_eq!(shell(&again, "cat /root/note").await, "kept\n");
        discard(again).await;
    }
}

/// "Detached: sandbox survives after your process exits." and "Detach: Keeps a sandbox running after the parent process
/// exits. It becomes a background process that you can reconnect to later with Sandbox::get."
#[tokio::test]
async fn a_detached_sandbox_survives_its_application_and_get_reconnects_to_it() {
    for how in ["detached", "detaching"] {
        let name = name(how);
        let mut application = Client::start(&[CLIENT, how, &name]);
        assert_eq!(application.line().await, name);
        let before = process(&name);
        application.kill().await;
        let sandbox = Sandbox::get(&name).await.unwrap();
        // The sandbox process had every chance to see the end of its application.
        for _ in 0..10 {
            assert_eq!(shell(&sandbox, "echo well").await, "well\n");
        }
        assert_eq!(process(&name), before);
        // And from another process still.
        let mut other = Client::start(&[CLIENT, "run", &name, "echo also well"]);
        assert_eq!(other.line().await, "also well");
        other.finish().await;
        discard(sandbox).await;
        gone(&before).await;
    }
}

/// "Detached sandboxes are tracked at ~/.microsandbox/db/."
#[tokio::test]
async fn sandboxes_are_tracked_in_the_database_of_the_users_home() {
    let user = tempfile::tempdir().unwrap();
    let mut list = tokio::process::Command::new(CLIENT);
    let output = list.arg("list").env_remove("CUBBY_HOME").env("HOME", user.path()).output().await.unwrap();
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    let home = Home::at(user.path().join(".microsandbox")).unwrap();
    assert_eq!(home.database(), user.path().join(".microsandbox/db/cubby.db"));
    assert!(home.database().is_file());
    // CUBBY_HOME moves all of it.
    let sandbox = shared().await;
    assert!(store().home().database().starts_with(std::env::var("CUBBY_HOME").unwrap()));
    assert!(store().list().unwrap().iter().any(|row| row.name.as_str() == sandbox.name()));
}

/// "for handle in Sandbox::list().await? { println!("{}: {:?}", handle.name(), handle.status()); }" and "Remove: Delete a
/// stopped sandbox and its associated state from disk."
#[tokio::test]
async fn names_are_taken_listed_found_removed_and_free_again() {
    let name = name("named");
    for missing in [
        Sandbox::get(&name).await.map(drop),
        Sandbox::start(&name).await.map(drop),
        Sandbox::remove(&name).await,
        Sandbox::get("no name, this").await.map(drop),
    ] {
        assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
    }
    let sandbox = within("create", builder(&name).create()).await.unwrap();
    let home = store().home().clone();
    let id = name.parse().unwrap();
    assert!(home.sandbox(&id).exists() && home.socket(&id).exists());

    let second = within("create", builder(&name).create()).await;
    assert!(matches!(second, Err(Error::AlreadyExists { .. })), "{second:?}");
    let start = within("start", Sandbox::start(&name)).await;
    assert!(refused_as(&start, Status::Running), "{start:?}");
    let removed = Sandbox::remove(&name).await;
    assert!(refused_as(&removed, Status::Running), "{removed:?}");
    // None of the three harmed it.
    assert_eq!(shell(&sandbox, "echo well").await, "well\n");

    let find = async || Sandbox::list().await.unwrap().into_iter().find(|one| one.name() == name).unwrap();
    let listed = find().await;
    assert_eq!(listed.status(), Status::Running);
    let other = listed.connect().await.unwrap();
    assert_eq!(shell(&other, "hostname").await, format!("{name}\n"));
    within("ping", other.ping()).await.unwrap();
    within("touch", other.touch()).await.unwrap();

    // The end is everybody's to ask for and to see.
    within("stop", other.stop()).await.unwrap();
    assert_eq!((sandbox.status().await.unwrap(), find().await.status()), (Status::Stopped, Status::Stopped));
    let taken = within("create", builder(&name).create()).await;
    assert!(matches!(taken, Err(Error::AlreadyExists { .. })), "{taken:?}");
    Sandbox::remove(&name).await.unwrap();
    assert!(!home.sandbox(&id).exists(), "its directory stayed");
    assert!(!home.socket(&id).exists(), "its socket stayed");
    assert!(matches!(Sandbox::get(&name).await, Err(Error::NotFound { .. })));
    assert!(Sandbox::list().await.unwrap().iter().all(|one| one.name() != name));
    assert!(matches!(sandbox.status().await, Err(Error::NotFound { .. })));
    // And the name can be used again, for a disk without a past.
    let fresh = within("create", builder(&name).create()).await.unwrap();
    discard(fresh).await;
}

/// The same name, created twice at once by different processes.
#[tokio::test]
async fn of_two_that_create_a_name_at_once_one_wins_and_one_is_told() {
    let name = name("contested");
    let mut clients = [0, 1].map(|_| Client::start(&[CLIENT, "create", &name, &cubby_tests::image()]));
    let mut outcomes = Vec::new();
    for client in &mut clients {
        let _took = client.line().await;
        outcomes.push(client.line().await);
    }
    outcomes.sort();
    assert!(outcomes[0].starts_with("AlreadyExists") && outcomes[1] == "created", "{outcomes:?}");
    for client in clients {
        client.finish().await;
    }
    Sandbox::remove(&name).await.unwrap();
}
