//! The guest sees the image: every file with its kind, mode, owner, size, time, target, links and bytes.

use std::collections::{BTreeMap, HashMap};
use std::process::Command;

use cubby_tests::{builder, discard, image, layer, name, shared, shell, small_image, tar, variable, within};
use cubbyhole::Sandbox;
use serde_json::json;

/// `kind and mode, owner, size, time, links, target` of each path, as `tar` lists an archive.
fn listed(listing: &str) -> BTreeMap<String, String> {
    let mut entries = BTreeMap::new();
    let mut links: HashMap<String, (String, u32)> = HashMap::new();
    for line in listing.lines() {
        // mode owner size date time name: a device has `major,minor` for a size.
        let mut rest = line;
        let mut field = || {
            let (field, later) = rest.trim_start().split_once(' ').unwrap();
            rest = later;
            field
        };
        let (mode, owner, size, date, time) = (field(), field(), field(), field(), field());
        let time = time.split('.').next().unwrap();
        let name = rest;
        let absolute = |name: &str| format!("/{}", name.trim_start_matches("./").trim_end_matches('/'));
        if mode.starts_with('h') {
            let (name, original) = name.split_once(" link to ").unwrap();
            let original = absolute(original);
            links.entry(original.clone()).or_insert((original.clone(), 1)).1 += 1;
            links.insert(absolute(name), (original, 0));
            continue;
        }
        let (name, target) = match mode.starts_with('l') {
            true => name.split_once(" -> ").unwrap(),
            false => (name, ""),
        };
        let size = if mode.starts_with('-') { size } else { "" };
        entries.insert(absolute(name), format!("{mode} {owner} {size} {date} {time} [{target}]"));
    }
    let counts: HashMap<String, u32> = links
        .iter()
        .filter(|(name, (original, _))| *name == original)
        .map(|(name, (_, count))| (name.clone(), *count))
        .collect();
    for (name, (original, _)) in &links {
        entries.insert(name.clone(), entries[original].clone());
    }
    for (name, entry) in &mut entries {
        let count = links.get(name).map_or(1, |(original, _)| counts[original]);
        if !entry.starts_with('d') {
            entry.push_str(&format!(" x{count}"));
        }
    }
    entries
}

/// The same, as the guest's `find` prints it.
const FIND: &str = r#"find / -xdev \( -type d -printf '%p\t%M %U/%G  %TY-%Tm-%Td %TT\t[]\n' \) \
    -o \( -type f -printf '%p\t%M %U/%G %s %TY-%Tm-%Td %TT\t[] x%n\n' \) \
    -o -printf '%p\t%M %U/%G  %TY-%Tm-%Td %TT\t[%l] x%n\n'"#;

fn found(listing: &str) -> BTreeMap<String, String> {
    let entry = |line: &str| {
        let mut fields = line.split('\t');
        let mut field = || fields.next().unwrap();
        let (name, begin, end) = (field(), field(), field());
        // Seconds come with a fraction.
        (name.to_owned(), format!("{} {end}", begin.split('.').next().unwrap()))
    };
    listing.lines().map(entry).collect()
}

#[tokio::test]
async fn a_guest_sees_its_image_entry_by_entry_and_byte_by_byte() {
    // A sandbox that nobody has written to.
    let sandbox = within("create", builder(&name("image")).create()).await.unwrap();
    let (layer, _) = layer(&image());
    let listing =
        tar(&["--list", "--verbose", "--numeric-owner", "--full-time", "--quoting-style=literal"], &layer);
    let mut expected = listed(&listing);
    let mut seen = found(&shell(&sandbox, &format!("export TZ=UTC; {FIND}")).await);
    // What the guest has mounted, and what is mounted over the image, is not the image's.
    let mounts = shell(&sandbox, "cut -d' ' -f2 /proc/mounts").await;
    let of_the_guest = |path: &str| {
        mounts.lines().any(|mount| path == mount || (mount != "/" && path.starts_with(&format!("{mount}/"))))
    };
    let own = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/etc", "/run/agent.sock", "/run"];
    for entries in [&mut expected, &mut seen] {
        entries.retain(|path, _| !of_the_guest(path) && !own.contains(&path.as_str()) && path != "/");
    }
    assert!(expected.len() > 1000, "only {} entries were compared", expected.len());
    let different: Vec<_> = expected
        .keys()
        .chain(seen.keys())
        .filter(|path| expected.get(*path) != seen.get(*path))
        .map(|path| {
            format!("{path}: {:?} in the image, {:?} in the guest", expected.get(path), seen.get(path))
        })
        .take(20)
        .collect();
    assert!(different.is_empty(), "{}", different.join("\n"));

    let directory = tempfile::tempdir().unwrap();
    let into = directory.path().to_str().unwrap();
    tar(
        &["--extract", "--no-same-owner", "--directory", into, "./usr/bin", "./usr/sbin", "./var/lib/dpkg"],
        &layer,
    );
    let sums = "find usr/bin usr/sbin var/lib/dpkg -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum";
    let ours = Command::new("sh").args(["-c", sums]).current_dir(directory.path()).output().unwrap();
    let ours = String::from_utf8(ours.stdout).unwrap();
    assert!(ours.lines().count() > 300, "only {} files were compared", ours.lines().count());
    assert_eq!(shell(&sandbox, &format!("cd / && {sums}")).await, ours);
    discard(sandbox).await;
}

#[tokio::test]
async fn an_image_says_how_its_commands_are_run() {
    let sandbox = shared().await;
    let (_, config) = layer(&image());
    let environment = config["config"]["Env"].as_array().unwrap();
    assert!(!environment.is_empty());
    let seen = shell(&sandbox, "env").await;
    for variable in environment {
        assert!(seen.lines().any(|line| Some(line) == variable.as_str()), "{variable} is not in {seen}");
    }
    assert_eq!(
        shell(&sandbox, "pwd").await.trim_end(),
        config["config"]["WorkingDir"].as_str().unwrap_or("/")
    );
}

#[tokio::test]
async fn what_an_image_says_of_its_commands_holds_unless_somebody_says_otherwise() {
    let files = tempfile::tempdir().unwrap();
    let config = json!({ "Env": ["PATH=/usr/bin", "ONE=1 = one", "TWO=2"], "WorkingDir": "/usr/bin", "User": "games" });
    let reference = small_image(files.path(), &config);
    let script = "pwd; id -un; echo \"$ONE $TWO\"";
    let sandbox = within("create", builder(&name("defaults")).image(&reference).create()).await.unwrap();
    assert_eq!(shell(&sandbox, script).await, "/usr/bin\ngames\n1 = one 2\n");
    discard(sandbox).await;
    let other = builder(&name("overridden")).image(&reference).env("TWO", "two").workdir("/").user("root");
    let other = within("create", other.create()).await.unwrap();
    assert_eq!(shell(&other, script).await, "/\nroot\n1 = one two\n");
    discard(other).await;
}

#[tokio::test]
async fn an_image_is_pulled_by_reference_from_a_registry() {
    let reference = variable("CUBBY_TEST_REFERENCE");
    let sandbox =
        within("create", Sandbox::builder(name("pulled")).image(&reference).memory(192).create()).await;
    let sandbox = sandbox.unwrap();
    assert_eq!(shell(&sandbox, "python3 -c 'print(6 * 7)'").await, "42\n");
    discard(sandbox).await;
}

#[tokio::test]
async fn image_and_disk_are_one_file_system_with_one_number_for_each_file() {
    // Files and directories of the image, of the disk, and copied up from one to the other.
    let program = r#"
import os
os.makedirs("/root/numbers/new")
open("/root/numbers/file", "w").close()
os.chmod("/usr/bin/env", 0o755)
device = os.lstat("/").st_dev
seen = {}
for directory in ["/", "/etc", "/usr/bin", "/usr/lib", "/root/numbers"]:
    for entry in os.scandir(directory):
        stat = os.lstat(entry.path)
        if os.path.ismount(entry.path):
            continue
        assert entry.inode() == stat.st_ino, (entry.path, entry.inode(), stat.st_ino)
        assert stat.st_dev == device, (entry.path, stat.st_dev, device)
        other = seen.setdefault(stat.st_ino, entry.path)
        assert other == entry.path or stat.st_nlink > 1, (entry.path, other)
print(len(seen) > 100)
"#;
    let sandbox = shared().await;
    assert_eq!(cubby_tests::python(&sandbox, program).await, "True\n");
    shell(&sandbox, "rm -r /root/numbers").await;
}
