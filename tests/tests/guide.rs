//! The guide (`docs/guide`) does what it says: the commands of its pages are typed into a shell, one page after another in
//! a home of its own, and have to print what the page shows. Its programs are the SDK's examples, included where they
//! stand, so that they are compiled, and run by these commands.
//!
//! A block marked `console` is run. A line that begins with `$ ` is a command, `> ` goes on with it, all else is what it
//! prints: `[..]` stands for any part of a line, `...` for any number of lines. Spaces count as one. A command has to
//! succeed unless the next one is `echo $?`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use cubby_tests::{BOUND, image, shared, until, variable};
use tokio::process::Command;

use super::CUBBY;

/// Pages with commands, each with a test.
macro_rules! pages {
    ($($test:ident: $page:literal,)*) => {
        const PAGES: &[&str] = &[$($page),*];
        $(#[tokio::test] async fn $test() { run_page($page).await })*
    };
}

pages! {
    the_first_sandbox: "first-sandbox.md",
    commands: "commands.md",
    sessions_and_logs: "sessions.md",
    files: "files.md",
    events: "events.md",
    network: "network.md",
    the_lifecycle: "lifecycle.md",
    images: "images.md",
    the_command_line: "cubby.md",
    programs: "programs.md",
    operating: "operating.md",
    troubleshooting: "troubleshooting.md",
}

/// The image of the guide, for which the tests have one of their own.
const IMAGE: &str = "python:3.12";

/// What the shell knows besides: the image, and examples without cargo. After each command its number and status.
const PRELUDE: &str =
    "exec 2>&1 < /dev/null\ncargo() { shift $(($# - 1)); \"cubby-example-$1\" \"$CUBBY_TEST_IMAGE\"; }\n";

const MARK: char = '\u{1}';

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guide/src")
}

fn page(name: &str) -> String {
    fs::read_to_string(source().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A fenced block: its first line's number, what it is, and its lines.
struct Block<'a> {
    line: usize,
    kind: &'a str,
    lines: Vec<&'a str>,
}

fn blocks(text: &str) -> Vec<Block<'_>> {
    let mut blocks: Vec<Block<'_>> = Vec::new();
    let mut inside = false;
    for (number, line) in text.lines().enumerate() {
        match (line.strip_prefix("```"), inside) {
            (Some(kind), false) => {
                blocks.push(Block { line: number + 2, kind, lines: Vec::new() });
                inside = true;
            }
            (Some(_), true) => inside = false,
            (None, true) => blocks.last_mut().unwrap().lines.push(line),
            (None, false) => {}
        }
    }
    assert!(!inside, "a block without an end");
    blocks
}

/// A command and what it is to print.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    line: usize,
    command: String,
    expected: Vec<String>,
}

fn steps(page: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for block in blocks(page).iter().filter(|block| block.kind == "console") {
        assert!(block.lines[0].starts_with("$ "), "line {}: no command", block.line);
        for (offset, line) in block.lines.iter().enumerate() {
            if let Some(command) = line.strip_prefix("$ ") {
                let (line, command) = (block.line + offset, command.to_owned());
                steps.push(Step { line, command, expected: Vec::new() });
                continue;
            }
            let step = steps.last_mut().unwrap();
            match line.strip_prefix("> ").filter(|_| step.expected.is_empty()) {
                Some(more) => step.command = format!("{}\n{more}", step.command),
                None => step.expected.push((*line).to_owned()),
            }
        }
    }
    steps
}

/// Whether a line is as expected, where `[..]` stands for anything.
fn line_matches(expected: &str, line: &str) -> bool {
    let one_space = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (expected, line) = (one_space(expected), one_space(line));
    let mut parts = expected.split("[..]");
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

fn lines_match(expected: &[String], lines: &[&str]) -> bool {
    match (expected.split_first(), lines.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first == "..." => {
            (0..=lines.len()).any(|skipped| lines_match(rest, &lines[skipped..]))
        }
        (Some((first, rest)), Some((line, lines))) => line_matches(first, line) && lines_match(rest, lines),
        _ => false,
    }
}

/// A home of the page's own, with the images of the tests' in it.
async fn home(page: &str) -> PathBuf {
    let ours = variable("CUBBY_HOME");
    // Whoever has a sandbox has its image.
    drop(shared().await);
    let home = PathBuf::from(format!("{ours}-{}", page.trim_end_matches(".md")));
    for directory in ["", "cubby"] {
        fs::create_dir(home.join(directory)).unwrap();
        fs::set_permissions(home.join(directory), std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .unwrap();
    }
    let mut copy = Command::new("cp");
    copy.args(["--archive", "--link"]).arg(format!("{ours}/cubby/images")).arg(home.join("cubby"));
    assert!(copy.status().await.unwrap().success());
    home
}

/// A directory of programs for `PATH`.
fn link_programs(directory: &Path) {
    symlink(CUBBY, directory.join("cubby")).unwrap();
    for (name, path) in EXAMPLES {
        symlink(path, directory.join(format!("cubby-example-{name}"))).unwrap();
    }
}

const EXAMPLES: &[(&str, &str)] = &[
    ("agent_loop", env!("CARGO_BIN_EXE_cubby-example-agent_loop")),
    ("commands", env!("CARGO_BIN_EXE_cubby-example-commands")),
    ("events", env!("CARGO_BIN_EXE_cubby-example-events")),
    ("files", env!("CARGO_BIN_EXE_cubby-example-files")),
    ("lifecycle", env!("CARGO_BIN_EXE_cubby-example-lifecycle")),
    ("network", env!("CARGO_BIN_EXE_cubby-example-network")),
    ("pool", env!("CARGO_BIN_EXE_cubby-example-pool")),
    ("run_code", env!("CARGO_BIN_EXE_cubby-example-run_code")),
    ("sessions", env!("CARGO_BIN_EXE_cubby-example-sessions")),
];

async fn run_page(name: &str) {
    let steps = steps(&page(name));
    let (home, files, path) = (home(name).await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    link_programs(path.path());
    let mut script = PRELUDE.to_owned();
    for (number, step) in steps.iter().enumerate() {
        let command = step.command.replace(IMAGE, "\"$CUBBY_TEST_IMAGE\"");
        let mark = format!("printf '{MARK}{number} %d{MARK}' $status; (exit $status)");
        script.push_str(&format!("{command}\nstatus=$?; {mark}\n"));
    }
    let mut shell = Command::new("bash");
    let search = format!("{}:{}", path.path().display(), variable("PATH"));
    shell.args(["-c", &script]).current_dir(files.path()).stdin(Stdio::null()).kill_on_drop(true);
    shell.env("PATH", search).env("CUBBY_HOME", &home);
    let output = tokio::time::timeout(BOUND * 3, shell.output()).await;
    let output = output.unwrap_or_else(|_| panic!("{name} takes too long")).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).replace(&image(), IMAGE);
    let mut parts = text.split(MARK);
    let mut wrong = String::new();
    for (number, step) in steps.iter().enumerate() {
        let printed = parts.next().unwrap_or_default();
        let status = parts.next().and_then(|mark| mark.strip_prefix(&format!("{number} ")));
        let asked = steps.get(number + 1).is_some_and(|next| next.command == "echo $?");
        let lines: Vec<&str> = printed.lines().collect();
        if !lines_match(&step.expected, &lines) || !(status == Some("0") || asked) {
            wrong.push_str(&format!(
                "{name}:{}: $ {}\nstatus {}\n--- expected\n{}\n--- printed\n{printed}\n",
                step.line,
                step.command,
                status.unwrap_or("unknown"),
                step.expected.join("\n")
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    // An ephemeral sandbox removes itself, a moment after its end was known.
    until(&format!("{name}: the removal of {:?}", sandboxes(&home)), async || sandboxes(&home).is_empty())
        .await;
    fs::remove_dir_all(home).unwrap();
}

/// What a page has made and not removed.
fn sandboxes(home: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(home.join("cubby/sandboxes")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn every_page_with_commands_is_run_and_every_page_is_in_the_summary() {
    let summary = page("SUMMARY.md");
    let listed: BTreeSet<String> = summary
        .split("](")
        .skip(1)
        .filter_map(|text| text.split(')').next())
        .map(|path| path.trim_start_matches("./").to_owned())
        .collect();
    let there: BTreeSet<String> = fs::read_dir(source())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "SUMMARY.md")
        .collect();
    assert_eq!(listed, there);
    for name in &listed {
        assert_eq!(PAGES.contains(&name.as_str()), !steps(&page(name)).is_empty(), "{name}");
    }
}

#[test]
fn programs_of_the_guide_are_examples_that_exist_and_are_run() {
    let mut commands = String::new();
    let mut included = BTreeSet::new();
    for entry in fs::read_dir(source()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let text = page(&name);
        commands.extend(steps(&text).into_iter().map(|step| step.command + "\n"));
        for block in blocks(&text).iter().filter(|block| block.kind.starts_with("rust")) {
            let include = block.lines[..].first().filter(|_| block.lines.len() == 1);
            let include = include.and_then(|line| line.strip_prefix("{{#include ")?.strip_suffix("}}"));
            let include = include.unwrap_or_else(|| panic!("{name}:{}: not one include", block.line));
            let (path, anchor) = include.split_once(':').map_or((include, None), |(p, a)| (p, Some(a)));
            let program = fs::read_to_string(source().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
            if let Some(anchor) = anchor {
                assert!(program.contains(&format!("// ANCHOR: {anchor}\n")), "{name}: no {anchor} in {path}");
            }
            // The VMM's needs a kernel and an init, which its own tests have.
            if let Some(example) = path.strip_prefix("../../../sdk/examples/") {
                included.insert(example.trim_end_matches(".rs").to_owned());
            }
        }
    }
    for example in included {
        assert!(commands.contains(&format!("cargo run --example {example}\n")), "nobody runs {example}");
    }
}

#[test]
fn output_is_compared_line_by_line_with_placeholders() {
    for (expected, line, same) in [
        ("a b", "a   b ", true),
        ("a", "ab", false),
        ("a[..]c", "abc", true),
        ("a[..]c", "abcd", false),
        ("[..]b[..]", "abc", true),
        ("[..]x[..]", "abc", false),
    ] {
        assert_eq!(line_matches(expected, line), same, "{expected} {line}");
    }
    let expected = ["a", "...", "z"].map(str::to_owned);
    assert!(lines_match(&expected, &["a", "b", "c", "z"]) && lines_match(&expected, &["a", "z"]));
    assert!(!lines_match(&expected, &["a", "z", "y"]) && !lines_match(&expected, &["a"]));
    assert!(!lines_match(&[], &["a"]));
    let page = "```console\n$ one\n> two\nout\n$ three\n```\n```text\n$ no\n```\n";
    let commands: Vec<String> = steps(page).into_iter().map(|step| step.command).collect();
    assert_eq!(commands, ["one\ntwo", "three"]);
}
