//! What a user can get wrong before there is any VM: names, configurations, homes. Each is a typed error that says
//! what was asked, what stood in the way and what to do; nothing is made and nothing is lost.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::expect_used)]

use std::error::Error as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use cubbyhole::{Error, Image, Sandbox};

/// The library in a process of its own, because its home comes from the environment: this binary, running
/// [`child`] alone.
fn told(home: &Path, what: &str) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env("CUBBY_HOME", home)
        // Found, and never started.
        .env("CUBBY_RUNTIME", "/bin/false")
        .env("CUBBY_TEST_DO", what)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text.split_once("told: ")
        .map_or_else(|| panic!("{text}"), |(_, rest)| rest)
        .lines()
        .next()
        .unwrap()
        .into()
}

fn names() -> Vec<String> {
    let emoji = "🐇".repeat(1024);
    assert_eq!(emoji.len(), 4096);
    let mut names: Vec<String> =
        ["", "a/b", "/etc", "..", ".", "../a", "a\0b", "-rf", "a b", "a\nb", "naïve"]
            .map(String::from)
            .to_vec();
    names.extend([emoji, "n".repeat(129)]);
    names
}

async fn bad_names() {
    for name in names() {
        let Err(error @ Error::InvalidConfig(_)) = Sandbox::builder(&name).image("a").create().await else {
            panic!("{name:?} was taken for a name")
        };
        let text = error.to_string();
        let Error::InvalidConfig(mistakes) = error else { unreachable!() };
        assert_eq!(
            mistakes.iter().map(|mistake| mistake.field).collect::<Vec<_>>(),
            ["name"],
            "{mistakes:?}"
        );
        assert!(text.contains("1 to 128 letters"), "{text}");
        assert!(text.len() < 600, "{} bytes of error about {} of name", text.len(), name.len());
        assert!(!text.contains(['\0', '\n']), "{text:?}");
        for outcome in [
            Sandbox::get(&name).await.map(drop),
            Sandbox::start(&name).await.map(drop),
            Sandbox::start_detached(&name).await.map(drop),
            Sandbox::remove(&name).await,
        ] {
            let Err(error @ Error::NotFound { .. }) = outcome else { panic!("{outcome:?}") };
            assert!(!error.to_string().contains(['\0', '\n']), "{error:?}");
        }
    }
}

async fn bad_image_names() {
    for name in ["", " ", "UPPER/case", "a:b:c", "python:", "a/../b", "a\0b", "\x1b[2J", "oci:"] {
        let Err(error) = Image::pull(name).await else { panic!("{name:?} was pulled") };
        assert!(matches!(error, Error::Image(_)), "{name:?}: {error:?}");
        for outcome in [Image::get(name).await, Image::remove(name).await] {
            let Err(error @ Error::ImageNotFound { .. }) = outcome else { panic!("{name:?}: {outcome:?}") };
            assert!(!error.to_string().contains(['\0', '\x1b']), "{error}");
        }
    }
}

#[tokio::test]
async fn child() {
    let Ok(what) = std::env::var("CUBBY_TEST_DO") else { return };
    let outcome = match what.as_str() {
        "create" => Sandbox::builder("worker").image("oci:/no/such/image").create().await.map(drop),
        "list" => Sandbox::list().await.map(drop),
        "get" => Sandbox::get("worker").await.map(drop),
        "start" => Sandbox::start("worker").await.map(drop),
        "remove" => Sandbox::remove("worker").await,
        "pull" => Image::pull("oci:/no/such/image").await.map(drop),
        "images" => Image::list().await.map(drop),
        "remove an image" => Image::remove("oci:/no/such/image").await.map(drop),
        "prune images" => Image::prune().await.map(drop),
        "image names" => {
            bad_image_names().await;
            Ok(())
        }
        "names" => {
            bad_names().await;
            Ok(())
        }
        other => panic!("{other}"),
    };
    let Err(error) = outcome else {
        println!("told: nothing");
        return;
    };
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    // The variant's name first.
    let debug = format!("{error:?}");
    println!("told: {} | {text}", debug.split([' ', '{']).next().unwrap());
}

/// All files under a directory with their contents.
fn contents(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            found.push((path.display().to_string(), fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn what_cannot_be_a_name_is_told_so_and_touches_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    assert_eq!(told(&home, "names"), "nothing");
    assert_eq!(fs::read_dir(home.join("cubby/sandboxes")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(home.join("cubby/run")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn what_cannot_be_an_image_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(told(&dir.path().join("home"), "image names"), "nothing");
}

#[tokio::test]
async fn all_mistakes_are_told_at_once() {
    let wrong = Sandbox::builder("no name, this").image("a").cpus(0).memory(1).disk(1).workdir("relative");
    let Err(error) = wrong.env("A=B", "c").max_clients(0).create().await else { panic!("it was created") };
    let Error::InvalidConfig(mistakes) = &error else { panic!("{error:?}") };
    let mut fields: Vec<&str> = mistakes.iter().map(|mistake| mistake.field).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["cpus", "disk", "env", "max_clients", "memory", "name", "workdir"]);
    for mistake in mistakes {
        // What was given, and what would do.
        assert!(!mistake.allowed.is_empty() && error.to_string().contains(&mistake.to_string()), "{error}");
    }
}

const CALLS: [&str; 9] =
    ["create", "list", "get", "start", "remove", "pull", "images", "remove an image", "prune images"];

#[test]
fn a_read_only_home_is_named_with_what_to_do() {
    // Read-only for root as well.
    for call in CALLS {
        let text = told(Path::new("/sys/cubby"), call);
        assert!(text.starts_with("Store(Home(Io | "), "{text}");
        assert!(text.contains("/sys/cubby") && text.contains("CUBBY_HOME"), "{text}");
    }
}

#[test]
fn a_corrupt_database_is_an_error_that_deletes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    assert_eq!(told(&home, "list"), "nothing");
    fs::remove_dir_all(home.join("db")).unwrap();
    fs::create_dir(home.join("db")).unwrap();
    fs::create_dir(home.join("cubby/sandboxes/worker")).unwrap();
    fs::write(home.join("cubby/sandboxes/worker/disk.ext4"), "somebody's disk").unwrap();
    fs::write(home.join("db/cubby.db"), "somebody's text\n".repeat(1000)).unwrap();
    let before = contents(&home);
    for call in CALLS {
        let text = told(&home, call);
        assert!(text.starts_with("Store(Corrupt | "), "{text}");
        assert!(text.contains("cubby.db") && text.contains("move it away"), "{text}");
    }
    assert!(contents(&home) == before, "a file was changed");
}

#[test]
fn a_database_of_a_newer_version_is_left_to_that_version() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    assert_eq!(told(&home, "list"), "nothing");
    let database = home.join("db/cubby.db");
    let connection = rusqlite::Connection::open(&database).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    drop(connection);
    let before = fs::read(&database).unwrap();
    for call in CALLS {
        let text = told(&home, call);
        assert!(text.starts_with("Store(Newer | "), "{text}");
        assert!(text.contains("format 99") && text.contains("use the newer version"), "{text}");
    }
    assert!(fs::read(&database).unwrap() == before, "the file was changed");
}
