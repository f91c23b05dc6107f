//! `cubby cp`: docker's habits, on a real guest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Output, Stdio};

use cubby_tests::{shared, shell, within};
use tokio::process::Command;

use super::CUBBY;

/// Runs `cubby cp` to its end.
async fn cp(arguments: &[&str]) -> Output {
    let mut command = Command::new(CUBBY);
    command.arg("cp").args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    within("cp", command.output()).await.unwrap()
}

/// One that has to go well, and says nothing where there is no terminal.
async fn copied(arguments: &[&str]) {
    let output = cp(arguments).await;
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
}

/// One that cannot go well, and says why in one line.
async fn refused(arguments: &[&str], code: i32, why: &str) {
    let output = cp(arguments).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(
        said.starts_with("error: ") && said.contains(why) && said.lines().count() == 1,
        "{arguments:?}: {said}"
    );
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn files_and_directories_go_where_docker_puts_them() {
    let sandbox = shared().await;
    let there = |path: &str| format!("{}:/root/cp/{path}", sandbox.name());
    shell(&sandbox, "mkdir -p /root/cp/dir").await;
    let host = tempfile::tempdir().unwrap();
    let at = |name: &str| host.path().join(name);
    fs::create_dir_all(at("tree/sub")).unwrap();
    fs::write(at("tree/sub/file"), "text\n").unwrap();
    fs::set_permissions(at("tree/sub/file"), fs::Permissions::from_mode(0o741)).unwrap();

    // Into a directory, under another name, over a file that is there.
    copied(&[text(&at("tree/sub/file")), &there("dir")]).await;
    copied(&[text(&at("tree/sub/file")), &there("dir/")]).await;
    copied(&[text(&at("tree/sub/file")), &there("renamed")]).await;
    copied(&[text(&at("tree/sub/file")), &there("renamed")]).await;
    // A directory as a new one, into one that is there, and what is in it.
    copied(&[text(&at("tree")), &there("new")]).await;
    copied(&[text(&at("tree")), &there("new")]).await;
    copied(&[&format!("{}/.", text(&at("tree"))), &there("dir")]).await;
    let found = shell(&sandbox, "cd /root/cp && find . -type f -printf '%P %m\\n' | sort").await;
    let expected = "dir/file 741\ndir/sub/file 741\nnew/sub/file 741\nnew/tree/sub/file 741\nrenamed 741\n";
    assert_eq!(found, expected);

    // The same on the way out.
    fs::create_dir(at("out")).unwrap();
    copied(&[&there("renamed"), text(&at("out"))]).await;
    copied(&[&there("dir"), text(&at("copy"))]).await;
    copied(&["-a", &there("dir"), text(&at("out"))]).await;
    copied(&[&there("dir/."), text(&at("out"))]).await;
    for name in ["out/renamed", "copy/file", "copy/sub/file", "out/dir/sub/file", "out/sub/file", "out/file"]
    {
        assert_eq!(fs::read_to_string(at(name)).unwrap(), "text\n", "{name}");
        assert_eq!(fs::metadata(at(name)).unwrap().permissions().mode() & 0o7777, 0o741, "{name}");
    }
    shell(&sandbox, "rm -r /root/cp").await;
}

#[tokio::test]
async fn what_cannot_be_copied_is_said_in_a_line() {
    let sandbox = shared().await;
    let there = |path: &str| format!("{}:{path}", sandbox.name());
    let host = tempfile::tempdir().unwrap();
    let file = host.path().join("file");
    fs::write(&file, "x").unwrap();
    refused(
        &[&there("/no/such"), text(host.path())],
        1,
        "cannot stat \"/no/such\" in the sandbox: No such file",
    )
    .await;
    refused(&[text(&file), &there("/no/such/")], 1, "there is no such directory").await;
    refused(&[text(&file), &there("/no/such/file")], 1, "No such file or directory").await;
    refused(&[text(host.path()), &there("/etc/passwd")], 1, "that is a file").await;
    refused(&[text(&host.path().join("none")), &there("/tmp")], 1, "No such file or directory").await;
    refused(&[text(&file), "no-such-sandbox:/tmp"], 1, "there is no sandbox named \"no-such-sandbox\"").await;
    refused(&[&there("/etc/passwd"), &there("/tmp")], 1, "one of the two has to be here").await;
    refused(&[text(&file), text(host.path())], 1, "NAME:PATH").await;
    assert_eq!(cp(&[text(&file)]).await.status.code(), Some(2));
    // What is left out is told, and the rest is there.
    shell(&sandbox, "mkdir /root/odd && mkfifo /root/odd/fifo && echo x > /root/odd/file").await;
    refused(&[&there("/root/odd"), text(host.path())], 1, "left out /root/odd/fifo").await;
    assert!(host.path().join("odd/file").exists());
    shell(&sandbox, "rm -r /root/odd").await;
}
