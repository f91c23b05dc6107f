//! `cargo xtask kvm -- COMMAND` behaves as if the command ran here, wherever it runs.

#![allow(clippy::unwrap_used)] // Clippy knows test functions, not the functions that they share.

use std::io::Write;
use std::process::{Command, Output, Stdio};

fn kvm(command: &[&str]) -> Command {
    let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
    xtask
        .args(["kvm", "--"])
        .args(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    xtask
}

fn run(command: &[&str]) -> Output {
    kvm(command).output().unwrap()
}

#[test]
fn the_exit_status_is_the_commands() {
    for (command, code) in [("true", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137)] {
        assert_eq!(run(&["sh", "-c", command]).status.code(), Some(code), "{command}");
    }
    assert_eq!(run(&["no-such-program"]).status.code(), Some(125));
}

#[test]
fn both_outputs_arrive_whole_and_apart() {
    let output = run(&["sh", "-c", "head -c 3000000 /dev/zero; echo problem >&2"]);
    assert_eq!(output.stdout.len(), 3_000_000);
    // Booting the machine may say something before.
    assert!(String::from_utf8_lossy(&output.stderr).ends_with("problem\n"));
}

#[test]
fn a_process_left_behind_does_not_hold_the_command_open() {
    let output = run(&["sh", "-c", "sleep 1000 & echo $!"]);
    assert!(output.status.success());
    let pid = String::from_utf8(output.stdout).unwrap();
    assert!(run(&["kill", pid.trim()]).status.success());
}

#[test]
fn input_environment_and_directory_are_passed() {
    let mut child =
        kvm(&["sh", "-c", "cat; echo $ODD; pwd"]).stdin(Stdio::piped()).env("ODD", "a b").spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"in\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let here = std::env::current_dir().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("in\na b\n{}\n", here.display()));
}

#[test]
fn what_was_built_a_moment_ago_is_what_runs() {
    let program =
        std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("built-{}", std::process::id()));
    for round in ["one", "two", "three"] {
        let new = program.with_extension("new");
        std::fs::write(&new, format!("echo {round}\n")).unwrap();
        std::fs::rename(&new, &program).unwrap();
        let output = run(&["sh", program.to_str().unwrap()]);
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), round);
    }
    let made = program.with_extension("made");
    assert!(run(&["sh", "-c", "echo inside > $0", made.to_str().unwrap()]).status.success());
    assert_eq!(std::fs::read_to_string(&made).unwrap(), "inside\n");
    std::fs::remove_file(program).unwrap();
    std::fs::remove_file(made).unwrap();
}
