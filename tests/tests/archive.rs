//! `cubby cp -`: tar archives into a guest and out of it, through pipes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Output, Stdio};

use cubby_tests::{shared, shell, within};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::CUBBY;
use super::terminal::Terminal;

/// Runs a program with these bytes on its standard input.
async fn piped(program: &str, arguments: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.kill_on_drop(true).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let write = async move {
        // Whoever refuses the beginning does not read the end.
        let _ = stdin.write_all(input).await;
    };
    within(program, async { tokio::join!(write, child.wait_with_output()).1 }).await.unwrap()
}

/// The same, and it goes well and complains of nothing.
async fn printed(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let output = piped(program, arguments, input).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{program} {arguments:?}: {} {said}", output.status);
    output.stdout
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn an_archive_goes_in_and_comes_out_as_it_was() {
    let sandbox = shared().await;
    shell(&sandbox, "mkdir -p /root/archive/there && echo old > /root/archive/there/file").await;
    let there = |path: &str| format!("{}:/root/archive{path}", sandbox.name());
    let host = tempfile::tempdir().unwrap();
    let tree = host.path().join("tree");
    // Too long for one field of the oldest format, which has two.
    let long = ["n".repeat(90), "m".repeat(90)].join("/");
    fs::create_dir_all(tree.join(&long)).unwrap();
    let large: Vec<u8> = (0..3_000_001_u32).map(|n| (n % 251) as u8).collect();
    fs::write(tree.join(&long).join("large"), &large).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    fs::write(tree.join("run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(tree.join("run"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(tree.join("run"), tree.join("walk")).unwrap();
    symlink("../else/where", tree.join("link")).unwrap();
    fs::File::create(tree.join("sparse")).unwrap().set_len(16 << 20).unwrap();

    for format in ["--format=gnu", "--format=pax", "--format=ustar"] {
        let sparse = if format == "--format=ustar" { "--no-seek" } else { "--sparse" };
        let line = ["-c", format, sparse, "--mtime=@1000000000", "-C", text(host.path()), "tree"];
        let archive = printed("tar", &line, b"").await;
        printed(CUBBY, &["cp", "-", &there("/there")], &archive).await;
        let script = format!(
            "cd /root/archive/there && find tree -printf '%P %y %m %U %T@ %l\\n' | sort && cat file && \
             wc -c < tree/{long}/large && stat -c '%s %b' tree/sparse"
        );
        let found = shell(&sandbox, &script).await;
        let time = "1000000000.0000000000";
        for line in [
            format!("{long} d "),
            format!("{long}/large f "),
            format!("empty f 644 0 {time} "),
            format!("link l 777 0 {time} ../else/where"),
            format!("run f 4751 0 {time} "),
            format!("walk f 4751 0 {time} "),
            "old".into(),
            "3000001".into(),
        ] {
            assert!(found.lines().any(|found| found.starts_with(&line)), "{format}: no {line:?} in\n{found}");
        }
        let (size, blocks) = found.lines().last().unwrap().split_once(' ').unwrap();
        assert_eq!(size, "16777216");
        // A file that was sparse in the archive is in the guest.
        let most = if sparse == "--sparse" { 64 } else { u64::MAX };
        assert!(blocks.parse::<u64>().unwrap() <= most, "{format}: {blocks} blocks");
    }

    // Out again, to a tar that knows nothing of where it is from.
    shell(&sandbox, "rm /root/archive/there/tree/sparse").await;
    let archive = printed(CUBBY, &["cp", &there("/there/tree"), "-"], b"").await;
    let out = host.path().join("out");
    fs::create_dir(&out).unwrap();
    printed("tar", &["-x", "-p", "-C", text(&out)], &archive).await;
    let out = out.join("tree");
    assert!(fs::read(out.join(&long).join("large")).unwrap() == large, "the bytes are others");
    assert_eq!(fs::read_link(out.join("link")).unwrap(), Path::new("../else/where"));
    let run = fs::metadata(out.join("run")).unwrap();
    assert_eq!((run.mode() & 0o7777, run.mtime(), run.size()), (0o751, 1_000_000_000, 10));
    assert_eq!(fs::metadata(out.join("empty")).unwrap().size(), 0);

    // What is in a directory, and a file by itself.
    let listed = printed(CUBBY, &["cp", &there("/there/."), "-"], b"").await;
    let listed = String::from_utf8(printed("tar", &["-t"], &listed).await).unwrap();
    assert!(listed.lines().next() == Some("./") && listed.contains("\n./tree/run\n"), "{listed}");
    let archive = printed(CUBBY, &["cp", &there("/there/file"), "-"], b"").await;
    assert_eq!(printed("tar", &["-x", "-O", "file"], &archive).await, b"old\n");

    // Owners are kept for whoever asks.
    let line = ["-c", "--owner=:1234", "--group=:77", "-C", text(host.path()), "tree/run"];
    let archive = printed("tar", &line, b"").await;
    printed(CUBBY, &["cp", "-a", "-", &there("/there")], &archive).await;
    assert_eq!(shell(&sandbox, "stat -c %u:%g /root/archive/there/tree/run").await, "1234:77\n");
    let archive = printed(CUBBY, &["cp", &there("/there/tree/run"), "-"], b"").await;
    let listed = printed("tar", &["-t", "-v", "--numeric-owner"], &archive).await;
    assert!(String::from_utf8_lossy(&listed).contains(" 1234/77 "), "{listed:?}");
    shell(&sandbox, "rm -r /root/archive").await;
}

#[tokio::test]
async fn an_archive_that_leads_out_or_is_none_is_refused() {
    let sandbox = shared().await;
    shell(&sandbox, "mkdir -p /root/inside /root/outside && echo untouched > /root/outside/file").await;
    let inside = format!("{}:/root/inside", sandbox.name());
    let host = tempfile::tempdir().unwrap();
    let at = |path: &str| host.path().join(path).to_str().unwrap().to_owned();
    for directory in ["links", "trees/a", "trees/b"] {
        fs::create_dir_all(at(directory)).unwrap();
    }
    symlink("/root/outside", at("links/a")).unwrap();
    symlink("/root/outside/file", at("links/b")).unwrap();
    fs::write(at("trees/a/file"), "theirs").unwrap();
    fs::write(at("file"), [7; 5000]).unwrap();
    let pack = async |line: &[&str]| printed("tar", &[&["-c", "-P"], line].concat(), b"").await;

    let up = pack(&["-C", &at("trees/a"), "--transform=s,^,x/../../outside/,", "file"]).await;
    let through = pack(&["-C", &at("links"), "a", "-C", &at("trees"), "a/file"]).await;
    let directory = pack(&["-C", &at("links"), "a", "-C", &at("trees"), "--no-recursion", "a"]).await;
    let plain = pack(&["-C", host.path().to_str().unwrap(), "file"]).await;
    for (archive, why) in [
        (&up[..], "\"x/../../outside/file\" leads out"),
        (&through, "\"a/file\" leads out"),
        (&directory, "\"a/\" leads out"),
        (b"", "it is empty"),
        (b"\x1f\x8b\x08\0", "gunzip it first"),
        (&[b'x'; 2048], "a header field is not a number"),
        (&plain[..300], "ends inside a header"),
        (&plain[..2048], "ends inside a file"),
    ] {
        let output = piped(CUBBY, &["cp", "-", &inside], archive).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{why}: {said}");
        assert!(
            said.starts_with("error: cannot use the tar archive: ") && said.matches(why).count() == 1,
            "{why}: {said}"
        );
    }
    // From the root is from the directory on, and a link that a file takes the place of is not written through.
    let rooted =
        pack(&["-C", &at("links"), "b", "-C", &at("trees/a"), "--transform=s,^file$,/b,", "file"]).await;
    printed(CUBBY, &["cp", "-", &inside], &rooted).await;
    let found = shell(&sandbox, "cat /root/outside/*; ls /root/outside; cat /root/inside/b").await;
    assert_eq!(found, "untouched\nfile\ntheirs");

    for (line, why) in [
        (["-", &format!("{}:/root/none", sandbox.name())], "No such file"),
        (["-", &format!("{}:/root/outside/file", sandbox.name())], "Not a directory"),
        ([&format!("{}:/root/none", sandbox.name()), "-"], "No such file"),
        (["-", "-"], "NAME:PATH"),
    ] {
        let output = piped(CUBBY, &["cp", line[0], line[1]], &plain).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.contains(why), "{line:?}: {said}");
        assert!(output.stdout.is_empty());
    }
    // Nobody wants an archive on a screen.
    let mut terminal = Terminal::cubby(&["cp", &inside, "-"], 24, 200);
    terminal.expect("standard output is a terminal");
    assert_eq!(terminal.end().await, Some(1));
    let mut terminal = Terminal::cubby(&["cp", "-", &inside], 24, 200);
    terminal.expect("standard input is a terminal");
    assert_eq!(terminal.end().await, Some(1));
    shell(&sandbox, "rm -r /root/inside /root/outside").await;
}
