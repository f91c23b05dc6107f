//! The `cubby` command and sessions that outlive it: detached ones, terminals that are left, and the log.

use cubby_tests::{image, name, sandbox, shared, shell, until, within};
use cubbyhole::{Error, Sandbox};
use serde_json::Value;
use tokio::io::AsyncWriteExt;

use super::cli::{assert_ended, command, cubby, printed, text};
use super::terminal::{Terminal, flags};

async fn session(name: &str, id: &str) -> Value {
    let listed: Value = serde_json::from_str(printed(&cubby(&["sessions", "--json", name]).await)).unwrap();
    let number: u64 = id.parse().unwrap();
    let found = listed.as_array().unwrap().iter().find(|session| session["id"] == number);
    found.cloned().unwrap_or(Value::Null)
}

#[tokio::test]
async fn a_detached_command_is_listed_joined_and_ends_with_its_code() {
    let sandbox = sandbox("cli-detached").await;
    let name = sandbox.name();
    let script = "echo begin; while read line; do echo \"got $line\"; done; exit 9";
    let started = cubby(&["exec", "-d", "-i", name, "sh", "-c", script]).await;
    let id = printed(&started).trim().to_owned();
    let listed = cubby(&["sessions", name]).await;
    let line = printed(&listed).lines().find(|line| line.starts_with(&id)).expect("it is listed").to_owned();
    assert!(line.contains("Detached") && line.contains(" ago") && line.contains("sh -c"), "{line:?}");
    assert_eq!(session(name, &id).await["command"][0], "sh");

    // Without a number it is the one that there is. Its input ends with ours, and its code is ours.
    let mut attached = command(&["attach", name]).stdin(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = attached.stdin.take().unwrap();
    stdin.write_all(b"a word\n").await.unwrap();
    drop(stdin);
    let output = within("attach", attached.wait_with_output()).await.unwrap();
    assert_ended(&output, 9);
    assert_eq!(text(&output.stdout), "begin\ngot a word\n");
    let late = cubby(&["attach", name, &id]).await;
    assert_ended(&late, 9);
    assert_eq!(text(&late.stdout), "begin\ngot a word\n");
    assert_eq!(session(name, &id).await["code"], 9);
    let none = cubby(&["attach", name]).await;
    assert_ended(&none, 125);
    assert!(text(&none.stderr).contains(&format!("cubby exec -d {name} COMMAND")), "{none:?}");
    let none = cubby(&["attach", name, "5"]).await;
    assert_ended(&none, 125);
    assert!(text(&none.stderr).contains(&format!("cubby sessions {name}")), "{none:?}");

    // Its log has the same, and what it has after it has stopped.
    let logs = cubby(&["logs", "--session", &id, name]).await;
    assert_eq!(printed(&logs), "begin\ngot a word\n");
    let mut following = command(&["logs", "-f", "--tail", "1", "--session", &id, name]).spawn().unwrap();
    printed(&cubby(&["stop", name]).await);
    let followed = within("the follower's end", following.wait()).await.unwrap();
    assert_eq!(followed.code(), Some(0));
    let logs = cubby(&["logs", "-n", "1", "--timestamps", "--since", "1h", name]).await;
    let line = printed(&logs).trim_end();
    let (time, words) = line.split_once(' ').unwrap();
    assert!(time.ends_with('Z') && time.starts_with("20") && words == "got a word", "{line:?}");
    assert_eq!(printed(&cubby(&["logs", "--since", "2100-01-01", name]).await), "");
    // By stream, for programs.
    let logs = cubby(&["logs", "--json", "--source", "stdout", "--session", &id, name]).await;
    let lines: Vec<Value> = printed(&logs).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(|line| &line["text"]).collect::<Vec<_>>(), ["begin", "got a word"]);
    let number: u64 = id.parse().unwrap();
    for line in lines {
        assert!(line["source"] == "stdout" && line["session"] == number && line["ended"] == true, "{line}");
        assert!(line["at"].as_str().is_some_and(|at| at.ends_with('Z')), "{line}");
    }
    for other in ["stderr", "console"] {
        let logs = cubby(&["logs", "--source", other, "--session", &id, name]).await;
        assert_eq!(printed(&logs), "", "{other}");
    }
    Sandbox::remove(name).await.unwrap();
    assert_ended(&cubby(&["logs", name]).await, 1);
}

#[tokio::test]
async fn a_terminal_is_left_by_its_keys_and_found_as_it_was() {
    let sandbox = shared().await;
    let name = sandbox.name();
    let mut terminal = Terminal::cubby(&["exec", "-it", "-e", "PS1=prompt> ", name, "sh"], 24, 80);
    let before = flags(&terminal.modes());
    terminal.expect("prompt> ");
    terminal.type_in("here=still''here\n");
    terminal.expect("prompt> ");
    // Half of the keys is the command's: the shell's history, of which there is none.
    terminal.type_in("\x10");
    terminal.type_in("\x11");
    terminal.expect("goes on: cubby attach ");
    until("the end", async || !terminal.runs()).await;
    assert_eq!(flags(&terminal.modes()), before);
    let said = terminal.line();
    assert_eq!(terminal.end().await, Some(0));
    let id = said.strip_prefix(name).expect("its name").trim().to_owned();
    assert_eq!(session(name, &id).await["detached"], true);

    // With other keys, and with another terminal's size.
    let mut terminal = Terminal::cubby(&["attach", "--detach-keys", "ctrl-],x", name, &id], 33, 101);
    terminal.expect("prompt> ");
    terminal.type_in("echo $here; stty size\n");
    terminal.expect("stillhere\r\n33 101\r\n");
    terminal.type_in("\x1dx");
    assert_eq!(terminal.end().await, Some(0));
    assert!(session(name, &id).await["ended"].is_null());
    let mut terminal = Terminal::cubby(&["attach", name, &id], 24, 80);
    terminal.expect("33 101\r\n");
    terminal.type_in("exit 6\n");
    assert_eq!(terminal.end().await, Some(6));
}

#[tokio::test]
async fn a_run_that_is_left_keeps_its_sandbox_until_its_command_ends() {
    let (name, image) = (name("cli-left"), image());
    let run = ["run", "-it", "--rm", "--name", &name, "-m", "192m", "-e", "PS1=prompt> ", &image, "sh"];
    let mut terminal = Terminal::cubby(&run, 24, 80);
    terminal.expect("prompt> ");
    terminal.type_in("\x10\x11");
    terminal.expect(&format!("goes on: cubby attach {name} "));
    assert_eq!(terminal.end().await, Some(0));
    let sandbox = Sandbox::get(&name).await.unwrap();
    assert_eq!(shell(&sandbox, "echo alive").await, "alive\n");
    let attached = cubby(&["attach", "--no-stdin", "--detach-keys", "", &name, "7"]).await;
    assert_ended(&attached, 125);
    discard_ephemeral(sandbox).await;
}

async fn discard_ephemeral(sandbox: Sandbox) {
    within("stop", sandbox.stop()).await.unwrap();
    let name = sandbox.name().to_owned();
    until("the removal", async || matches!(Sandbox::get(&name).await, Err(Error::NotFound { .. }))).await;
}
