//! A sandbox process has locked itself in by the time its guest runs. What a forbidden call then comes to is tried in
//! `runtime/src/lockin/tests.rs`; here it is looked for at real sandbox processes, whose guests work meanwhile.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use cubby_tests::{builder, discard, name, process, sandbox, shell, store, within};
use rustix::process::{Resource, Uid, geteuid, getrlimit};

/// A field of a `status` file (proc_pid_status(5)).
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).trim()
}

#[tokio::test]
async fn every_thread_of_a_sandbox_process_is_filtered_and_has_no_privileges() {
    let sandbox = within("create", builder(&name("confined")).cpus(2).create()).await.unwrap();
    let pid = process(sandbox.name()).pid;
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let thread = field(&status, "Name").to_owned();
        assert_eq!(field(&status, "NoNewPrivs"), "1", "{thread}");
        // SECCOMP_MODE_FILTER, and the one of its kind: the main thread's came after the others had begun.
        assert_eq!((field(&status, "Seccomp"), field(&status, "Seccomp_filters")), ("2", "1"), "{thread}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set} of {thread}");
        }
        // An ordinary user cannot shrink it, and cannot gain anything from it.
        assert!(!geteuid().is_root() || field(&status, "CapBnd") == "0000000000000000", "{status}");
        // Newer kernels run a worker of KVM's own in the process, which never leaves the kernel.
        if !thread.starts_with("kvm-nx-lpage") {
            threads.push(thread);
        }
    }
    threads.sort();
    assert_eq!(threads, ["cubby-sandbox", "disk0", "disk1", "net0", "vcpu0", "vcpu1"]);
    assert_eq!(shell(&sandbox, "nproc").await, "2\n");
    discard(sandbox).await;
}

#[tokio::test]
async fn a_sandbox_process_has_limits() {
    let sandbox = sandbox("limited").await;
    let pid = process(sandbox.name()).pid;
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    // 256 of its own and 256 of its vsock ports, one for each client, and what its network may hold, as far as the host lets
    // us; the larger of its disk and 16 GiB.
    for (name, most) in [
        ("Max core file size", 0),
        ("Max open files", (512 + 16 + 17_667).min(getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX))),
        ("Max file size", 16_u64 << 30),
        ("Max locked memory", 0),
    ] {
        assert_eq!(limit(name), [most.to_string(), most.to_string()], "{name}");
    }
    // No memory goes into a core dump, whoever makes it.
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/coredump_filter")).unwrap().trim(), "00000000");
    discard(sandbox).await;
}

#[tokio::test]
async fn a_sandbox_process_has_no_descriptors_but_its_own() {
    // One that its application forgets to close.
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    let forgotten = File::create(&secret).unwrap();
    rustix::io::fcntl_setfd(&forgotten, rustix::io::FdFlags::empty()).unwrap();
    let sandbox = sandbox("descriptors").await;
    drop(forgotten);
    let pid = process(sandbox.name()).pid;
    let home = store().home().clone();
    let own = home.sandbox(&sandbox.name().parse().unwrap());
    let belongs = |link: &Path| {
        let text = link.to_str().unwrap();
        let kinds = [
            "socket:[",
            "anon_inode:[event",
            "anon_inode:[signalfd]",
            "anon_inode:kvm-vm",
            "anon_inode:kvm-vcpu:",
            "/memfd:",
        ];
        kinds.iter().any(|kind| text.starts_with(kind))
            || link == Path::new("/dev/null")
            || link.starts_with(&own)
            || text.starts_with(home.database().to_str().unwrap())
            || (link.starts_with(home.images()) && link.ends_with("disk.erofs"))
    };
    let mut links = Vec::new();
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        links.push(fs::read_link(fd.unwrap().path()).unwrap());
    }
    assert!(links.contains(&own.join("disk.ext4")), "the test looks in the wrong place: {links:?}");
    let foreign: Vec<_> = links.iter().filter(|link| !belongs(link)).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    discard(sandbox).await;
}

/// What somebody hears who connects to a socket as another user, from a thread of his own: users are a thread's.
fn knock(socket: &Path, user: Option<Uid>) -> Vec<u8> {
    let socket = socket.to_owned();
    let thread = std::thread::spawn(move || {
        if let Some(user) = user {
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        }
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // The greeting of either side is 12 bytes of header and what follows; a peer that is refused gets none.
        let mut heard = [0; 12];
        let count = stream.read(&mut heard).unwrap();
        heard[..count].to_vec()
    });
    thread.join().unwrap()
}

#[tokio::test]
async fn the_socket_is_its_owners_alone() {
    let sandbox = sandbox("guarded").await;
    let home = store().home().clone();
    let socket = home.socket(&sandbox.name().parse().unwrap());
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(&socket), mode(socket.parent().unwrap())), (0o600, 0o700));
    assert_eq!(fs::metadata(&socket).unwrap().uid(), geteuid().as_raw());
    assert!(!knock(&socket, None).is_empty(), "its owner was not greeted");
    // Only root can be somebody else.
    if geteuid().is_root() {
        // A second name for it in an open directory, and an open mode: nothing is left but the look at the peer.
        // It is beside the home, for a link stays in its file system.
        let outside = tempfile::tempdir_in(home.root().parent().unwrap().parent().unwrap()).unwrap();
        fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let link = outside.path().join("sock");
        fs::hard_link(&socket, &link).unwrap();
        fs::set_permissions(&link, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(!knock(&link, None).is_empty(), "the second name does not lead to it");
        assert_eq!(knock(&link, Some(Uid::from_raw(65534))), b"", "another user was greeted");
    } else {
        println!("another user was not tried: that takes root");
    }
    assert_eq!(shell(&sandbox, "echo well").await, "well\n");
    discard(sandbox).await;
}
