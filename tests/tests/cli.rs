//! The `cubby` command: what it prints, how it ends, and what becomes of a terminal in its hands.

mod images;

use std::process::{Output, Stdio};
use std::time::Duration;

use cubby_tests::{image, name, shared, shell, signal, small_image, until, within};
use cubbyhole::{Error, Sandbox};
use rustix::process::Signal;
use rustix::termios::LocalModes;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use super::CUBBY;
use super::terminal::{Terminal, flags};

pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(CUBBY);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.kill_on_drop(true);
    command
}

/// Runs the command to its end.
pub async fn cubby(arguments: &[&str]) -> Output {
    within(&arguments.join(" "), command(arguments).output()).await.unwrap()
}

/// Runs the command with something to read.
async fn cubby_reading(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = command(arguments).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let write = async move {
        stdin.write_all(input).await.unwrap();
    };
    within(&arguments.join(" "), async { tokio::join!(child.wait_with_output(), write) }).await.0.unwrap()
}

pub fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// What a command printed that had to go well.
pub fn printed(output: &Output) -> &str {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

pub fn assert_ended(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{:?} {}", output.status, text(&output.stderr));
}

#[tokio::test]
async fn run_prints_what_its_command_prints_ends_as_it_does_and_leaves_nothing() {
    let (name, image) = (name("cli-run"), image());
    let script = "echo to the one; echo to the other >&2; exit 7";
    let run = ["run", "--rm", "--name", &name, "-m", "192m", &image, "sh", "-c", script];
    let output = cubby(&run).await;
    assert_ended(&output, 7);
    assert_eq!(text(&output.stdout), "to the one\n");
    assert_eq!(text(&output.stderr), "to the other\n");
    until("the removal", async || matches!(Sandbox::get(&name).await, Err(Error::NotFound { .. }))).await;
    // What is not there cannot be run, and that leaves nothing either.
    let output = cubby(&["run", "--rm", "--name", &name, "-m", "192m", &image, "no-such-program"]).await;
    assert_ended(&output, 127);
    assert!(text(&output.stderr).starts_with("error: cannot run \"no-such-program\""), "{output:?}");
    until("the removal", async || matches!(Sandbox::get(&name).await, Err(Error::NotFound { .. }))).await;
}

#[tokio::test]
async fn standard_input_passes_through_a_run_byte_for_byte() {
    let bytes: Vec<u8> =
        (0..1_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
    let (name, image) = (name("cli-cat"), image());
    let run = ["run", "-i", "--rm", "--name", &name, "-m", "192m", &image, "cat"];
    let output = cubby_reading(&run, &bytes).await;
    assert_ended(&output, 0);
    assert!(output.stdout == bytes, "{} bytes came back", output.stdout.len());
}

#[tokio::test]
async fn an_image_s_own_command_runs_when_none_is_given() {
    let files = tempfile::tempdir().unwrap();
    let config =
        json!({ "Env": ["PATH=/usr/bin"], "Entrypoint": ["sh", "-c"], "Cmd": ["echo its own; exit 3"] });
    let reference = small_image(files.path(), &config);
    let run = ["run", "--rm", "--name", &name("cli-own"), "-m", "192m", &reference];
    let output = cubby(&run).await;
    assert_ended(&output, 3);
    assert_eq!(text(&output.stdout), "its own\n");
    let output = cubby(&[&run[..], &["echo \"$0\"; exit 4", "given"]].concat()).await;
    assert_ended(&output, 4);
    assert_eq!(text(&output.stdout), "given\n");
}

#[tokio::test]
async fn what_is_wrong_before_a_guest_boots_is_said_and_is_125() {
    let files = tempfile::tempdir().unwrap();
    let missing = format!("oci:{}/none", files.path().display());
    for (line, said) in [
        (&["run", &missing, "true"][..], "none"),
        (&["run", "--name", "a/b", &image()], "name is"),
        (&["run", "--cpus", "77", &image()], "but must be 1 to 32"),
        (&["run", "-it", &image()], "standard input is none"),
        (&["run", "-m", "512", &image()], "512m or 2g"),
        (&["run", "-d", &image(), "true"], "cubby exec"),
        (&["run", "-v", "/a:/b", &image(), "true"], "shares no directory"),
        (&["run", "-p", "80:http", &image(), "true"], "HOST:GUEST"),
        (&["run", "-p", "80:80", "--network", "none", &image(), "true"], "where the network is none"),
        (&["run", "--network", "host", &image(), "true"], "none, public, all"),
        (&["run", "--env-file", "/no/such/file", &image(), "true"], "No such file"),
        (&["exec", "no-such-sandbox", "true"], "there is no sandbox named \"no-such-sandbox\": cubby ls"),
    ] {
        let output = cubby(line).await;
        assert_ended(&output, 125);
        let error = text(&output.stderr);
        assert!(error.starts_with("error: ") && error.contains(said), "{line:?}: {error}");
        assert_eq!(text(&output.stdout), "");
    }
}

#[tokio::test]
async fn a_sandbox_is_made_listed_used_stopped_booted_and_removed() {
    let (name, image) = (name("cli-cycle"), image());
    let create =
        ["create", "--name", &name, "-m", "192m", "-e", "GREETING=hello", "-l", "purpose=test", &image];
    assert_eq!(printed(&cubby(&create).await), format!("{name}\n"));
    let again = cubby(&create).await;
    assert_ended(&again, 1);
    assert!(text(&again.stderr).contains(&format!("cubby rm -f {name}")), "{again:?}");

    let listed = cubby(&["ps", "-a"]).await;
    let line = printed(&listed).lines().find(|line| line.starts_with(&name)).expect("it is listed");
    assert!(line.contains("Running") && line.contains(" ago") && !line.contains('\x1b'), "{line:?}");
    let listed: Value = serde_json::from_str(printed(&cubby(&["ls", "--json"]).await)).unwrap();
    let row = listed.as_array().unwrap().iter().find(|row| row["name"] == name.as_str()).unwrap();
    assert_eq!((&row["status"], &row["image"]), (&json!("Running"), &json!(image)));
    assert_eq!(row["labels"]["purpose"], "test");
    let inspected: Value = serde_json::from_str(printed(&cubby(&["inspect", &name]).await)).unwrap();
    assert_eq!(inspected[0]["config"]["env"]["GREETING"], "hello");
    assert_eq!(inspected[0]["exit"], Value::Null);

    let files = tempfile::tempdir().unwrap();
    let variables = files.path().join("variables");
    std::fs::write(&variables, "# of a file\nONE=0\nTWO=2 and\n").unwrap();
    let script = "pwd; echo $GREETING $ONE | tee kept; echo \"$TWO\"";
    let file = ["exec", "--env-file", variables.to_str().unwrap()];
    let exec = [&file[..], &["-w", "/root", "-e", "ONE=1", &name, "sh", "-c", script]].concat();
    assert_eq!(printed(&cubby(&exec).await), "/root\nhello 1\n2 and\n");
    let script = cubby_reading(&["shell", &name], b"echo a shell; exit 6\n").await;
    assert_ended(&script, 6);
    assert_eq!(text(&script.stdout), "a shell\n");

    let refused = cubby(&["rm", &name]).await;
    assert_ended(&refused, 1);
    assert!(
        text(&refused.stderr).contains(&format!("it is running: stop it first, or use cubby rm -f {name}"))
    );
    // One of two fails: the other is stopped, and both are spoken of.
    let stopped = cubby(&["stop", "no-such-sandbox", &name]).await;
    assert_ended(&stopped, 1);
    assert_eq!(text(&stopped.stdout), format!("{name}\n"));
    assert!(text(&stopped.stderr).contains("\"no-such-sandbox\""), "{stopped:?}");
    for (line, listed) in [
        (&["ps", "-q"][..], false),
        (&["ps", "-aq"], true),
        (&["ls", "-q"], true),
        (&["ls", "-q", "--filter", "label=purpose=test", "-f", "status=stopped"], true),
        (&["ls", "-q", "--filter", "label=purpose=other"], false),
        (&["ps", "-q", "--filter", "status=exited"], true),
        (&["ls", "-q", "--filter", "status=running"], false),
    ] {
        let output = cubby(line).await;
        assert_eq!(printed(&output).lines().any(|line| line == name), listed, "{line:?}");
    }
    let late = cubby(&["exec", &name, "true"]).await;
    assert_ended(&late, 125);
    assert!(
        text(&late.stderr).contains(&format!("it is stopped: boot it with cubby start {name}")),
        "{late:?}"
    );

    assert_eq!(printed(&cubby(&["start", &name]).await), format!("{name}\n"));
    assert_eq!(printed(&cubby(&["exec", &name, "cat", "/root/kept"]).await), "hello 1\n");
    printed(&cubby(&["pause", &name]).await);
    printed(&cubby(&["resume", &name]).await);
    printed(&cubby(&["rm", "-f", &name]).await);
    let names = cubby(&["ls", "-q"]).await;
    assert!(!printed(&names).lines().any(|line| line == name));
}

#[tokio::test]
async fn exec_ends_as_its_command_does() {
    let sandbox = shared().await;
    let name = sandbox.name();
    for (line, code) in [
        (&["exec", name, "true"][..], 0),
        (&["exec", name, "sh", "-c", "exit 255"], 255),
        (&["exec", name, "sh", "-c", "kill -TERM $$"], 143),
        (&["exec", name, "/etc/passwd"], 126),
        (&["exec", name, "no-such-program"], 127),
        (&["exec", "-u", "nobody-at-all", name, "true"], 125),
        (&["exec", "--timeout", "300ms", name, "sleep", "86405"], 124),
    ] {
        assert_ended(&cubby(line).await, code);
    }
    // Without -i there is no input to wait for.
    let mut child = command(&["exec", name, "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    let held = child.stdin.take();
    let output = within("cat", child.wait_with_output()).await.unwrap();
    assert_eq!(printed(&output), "");
    drop(held);
    // Whoever stops reading ends the command, as SIGPIPE would.
    let mut child = command(&["exec", name, "yes", "86406"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(within("a line", lines.next_line()).await.unwrap().as_deref(), Some("86406"));
    drop(lines);
    assert_eq!(within("the end", child.wait()).await.unwrap().code(), Some(141));
    until("the end of yes", async || {
        shell(&sandbox, "cat /proc/*/comm 2>/dev/null | grep -cx yes || true").await.trim() == "0"
    })
    .await;
}

/// The next line of a running command's output.
async fn line(lines: &mut tokio::io::Lines<BufReader<tokio::process::ChildStdout>>) -> Option<String> {
    within("a line", lines.next_line()).await.unwrap()
}

#[tokio::test]
async fn an_interrupt_is_the_commands_and_a_second_one_kills() {
    let sandbox = shared().await;
    let script = "trap 'echo got it; exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let mut child = command(&["exec", sandbox.name(), "sh", "-c", script]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(line(&mut lines).await.as_deref(), Some("ready"));
    signal(child.id().unwrap(), Signal::INT);
    assert_eq!(line(&mut lines).await.as_deref(), Some("got it"));
    assert_eq!(within("the end", child.wait()).await.unwrap().code(), Some(9));

    let stubborn = "trap 'echo no' INT; echo ready; while :; do sleep 0.1; done";
    let mut child = command(&["exec", sandbox.name(), "sh", "-c", stubborn]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(line(&mut lines).await.as_deref(), Some("ready"));
    let mut asked = 0;
    // Each is heard before the next is sent; on a slow machine, two may lie too far apart to be meant as one.
    loop {
        signal(child.id().unwrap(), Signal::INT);
        asked += 1;
        match line(&mut lines).await {
            Some(said) => assert_eq!(said, "no"),
            None => break,
        }
    }
    assert!(asked >= 2, "the first one killed");
    assert_eq!(within("the end", child.wait()).await.unwrap().code(), Some(137));
}

#[tokio::test]
async fn a_terminal_reaches_the_guest_with_its_keys_and_sizes_and_comes_back_as_it_was() {
    let (name, image) = (name("cli-tty"), image());
    let run = ["run", "-it", "--rm", "--name", &name, "-m", "192m", "-e", "PS1=prompt> ", &image, "sh"];
    let mut terminal = Terminal::cubby(&run, 33, 101);
    let before = flags(&terminal.modes());
    terminal.expect("booting ");
    terminal.expect("prompt> ");
    assert!(
        !terminal.modes().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    );
    terminal.type_in("stty size\n");
    terminal.expect("\r\n33 101\r\n");
    terminal.resize(44, 155);
    // No event tells when it has arrived.
    until("the new size", async || {
        terminal.type_in("stty size\n");
        terminal.see("\r\n44 155\r\n", Duration::from_millis(500))
    })
    .await;
    // The text that is waited for is not the one that is typed.
    terminal.type_in("echo wait''ing; sleep 86407\n");
    terminal.expect("waiting\r\n");
    terminal.type_in("\x03");
    terminal.type_in("echo code=$?.\n");
    terminal.expect("code=130.");
    terminal.type_in("exit 5\n");
    until("the end", async || terminal.child().try_wait().unwrap().is_some()).await;
    assert_eq!(flags(&terminal.modes()), before);
    assert_eq!(terminal.end().await, Some(5));
    until("the removal", async || matches!(Sandbox::get(&name).await, Err(Error::NotFound { .. }))).await;
}

#[tokio::test]
async fn a_terminal_is_given_back_when_the_command_is_told_to_end() {
    let sandbox = shared().await;
    let exec = ["exec", "-it", "-e", "PS1=prompt> ", sandbox.name(), "sh"];
    let mut terminal = Terminal::cubby(&exec, 24, 80);
    let before = flags(&terminal.modes());
    terminal.expect("prompt> ");
    assert_ne!(flags(&terminal.modes()), before);
    signal(terminal.child().id().unwrap(), Signal::TERM);
    until("the end", async || terminal.child().try_wait().unwrap().is_some()).await;
    assert_eq!(flags(&terminal.modes()), before);
    assert_eq!(terminal.end().await, Some(143));
    // Nobody can read what a command on no terminal prints.
    let mut wrong = Terminal::cubby(&["exec", sandbox.name(), "no-such-program"], 24, 80);
    wrong.expect("error:");
    wrong.expect("no such program");
    assert_eq!(wrong.end().await, Some(127));
}

#[tokio::test]
async fn the_doctor_finds_what_a_guest_needs() {
    let output = cubby(&["doctor", "--json"]).await;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let needed = [
        "/dev/kvm",
        "virtualization",
        "sandbox process",
        "kernel and agent",
        "home",
        "file locks",
        "open files",
    ];
    for what in needed {
        let check = checks.iter().find(|check| check["check"] == what).unwrap_or_else(|| panic!("no {what}"));
        assert_eq!((&check["ok"], &check["remedy"]), (&json!(true), &Value::Null), "{check}");
    }
    assert_eq!(output.status.success(), report["ok"] == true);
    // A home whose path leaves no room for a socket's.
    let long = format!("/tmp/{}", "h".repeat(80));
    let output = within("doctor", command(&["doctor"]).env("CUBBY_HOME", &long).output()).await.unwrap();
    assert_ended(&output, 1);
    assert!(text(&output.stdout).contains("set CUBBY_HOME to a shorter one"), "{output:?}");
    // Without a sandbox process, that is what is wrong, and there is a remedy.
    let output =
        within("doctor", command(&["doctor"]).env("CUBBY_RUNTIME", "/no/such/file").output()).await.unwrap();
    assert_ended(&output, 1);
    let said = text(&output.stdout);
    assert!(said.contains("FAIL  sandbox process: ") && said.contains("cargo xtask install"), "{said}");
}
