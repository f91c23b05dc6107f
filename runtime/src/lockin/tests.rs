//! Each test makes a forbidden call, really: in a process of its own, which is this test binary once more, locked in
//! by the same functions as a sandbox process. What must go on working is tried there as well.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output};
use std::time::Duration;

use cubby_state::{Event, ExitReason, ExitReport, RunLock, SandboxConfig, SandboxName, Status, Store};

use rustix::net::{AddressFamily, SocketType};

use super::*;
use crate::network;

/// Tells the test binary that it is the process to be locked in, and where its home is.
const HOME: &str = "CUBBY_LOCKED_IN_AT";
/// Which of its test's calls it is to make: a test makes several, each in another process.
const TURN: &str = "CUBBY_LOCKED_IN_TURN";
const DONE: &str = "the call came back";
const LIMITS: Limits = Limits { clients: 16, network: 0, disk: 1 << 20 };

/// A thread to be.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Main,
    /// The main thread of a sandbox whose guest may reach sockets of the host.
    Connecting,
    Vmm(ThreadKind),
}

const NETWORK: [Kind; 1] = [Kind::Vmm(ThreadKind::Network)];
const EVERY: [Kind; 4] = [Kind::Main, Kind::Vmm(ThreadKind::Vcpu), Kind::Vmm(ThreadKind::Worker), NETWORK[0]];
/// All but the network's.
const OFFLINE: [Kind; 3] = [EVERY[0], EVERY[1], EVERY[2]];

/// Runs the calling test once more, as a process that does `before`, is locked in as `kind`, does `call` and ends. This
/// process gets its output; that one never returns from here.
fn locked_in<T>(kind: Kind, before: impl FnOnce(&Home) -> T, call: impl FnOnce(T)) -> Output {
    thread_local!(static TURNS: Cell<u32> = const { Cell::new(0) });
    let turn = TURNS.replace(TURNS.get() + 1).to_string();
    if let Some(home) = std::env::var_os(HOME) {
        if std::env::var(TURN).unwrap() != turn {
            return Output { status: Default::default(), stdout: Vec::new(), stderr: Vec::new() };
        }
        let home = Home::at(home).unwrap();
        let lock_in = LockIn::prepare(&home, matches!(kind, Kind::Connecting)).unwrap();
        let made = before(&home);
        match kind {
            Kind::Main | Kind::Connecting => lock_in.finish(&LIMITS).unwrap(),
            Kind::Vmm(kind) => lock_in.thread(kind).unwrap(),
        }
        call(made);
        println!("{DONE}");
        std::process::exit(0);
    }
    let dir = tempfile::tempdir().unwrap();
    Home::at(dir.path()).unwrap().create().unwrap();
    let test = std::thread::current().name().unwrap().to_owned();
    assert_ne!(test, "main", "run these tests with more than one thread");
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &test, "--nocapture"])
        .env(HOME, dir.path())
        .env(TURN, turn)
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap()
}

fn ourselves() -> bool {
    std::env::var_os(HOME).is_some()
}

/// Checks that `call` kills each process that is locked in as one of `kinds`.
fn kills(kinds: &[Kind], call: impl Fn()) {
    for kind in kinds {
        let output = locked_in(*kind, |_| (), |()| call());
        if !ourselves() {
            assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{kind:?}: {output:?}");
        }
    }
}

/// Checks that `call` comes back.
fn lets<T>(kinds: &[Kind], before: impl Fn(&Home) -> T, call: impl Fn(T)) {
    for kind in kinds {
        let output = locked_in(*kind, &before, &call);
        if !ourselves() {
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains(DONE), "{kind:?}: {output:?}");
        }
    }
}

fn refused_to(what: &str, result: io::Result<impl Sized>) {
    let kind = result.err().map(|error| error.kind());
    assert_eq!(kind, Some(ErrorKind::PermissionDenied), "{what}");
}

#[test]
fn no_program_is_started() {
    kills(&EVERY, || drop(Command::new("/bin/true").exec()));
}

#[test]
fn no_process_and_no_thread_is_started() {
    kills(&EVERY, || drop(Command::new("/bin/true").spawn()));
    kills(&EVERY, || drop(std::thread::spawn(|| {})));
}

#[test]
fn no_socket_is_opened() {
    kills(&EVERY, || drop(TcpListener::bind("127.0.0.1:0")));
    kills(&EVERY, || drop(UdpSocket::bind("127.0.0.1:0")));
    kills(&EVERY, || drop(UnixStream::connect("/run/x.sock")));
    kills(&EVERY, || drop(UnixStream::pair()));
    let internet = || drop(rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None));
    kills(&OFFLINE, internet);
    lets(&NETWORK, |_| (), |()| internet());
    kills(&EVERY, || drop(rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None)));
    kills(&EVERY, || drop(rustix::net::socket(AddressFamily::PACKET, SocketType::RAW, None)));
}

#[test]
fn unix_sockets_and_no_others_are_opened_where_the_guest_may_reach_some() {
    let listen = |home: &Home| {
        let path = home.root().join("x.sock");
        (UnixListener::bind(&path).unwrap(), path)
    };
    lets(&[Kind::Connecting], listen, |(listener, path)| {
        let mut here = crate::pipes::connect(&path).unwrap();
        let (mut there, _) = listener.accept().unwrap();
        here.write_all(b"x").unwrap();
        here.shutdown(Shutdown::Write).unwrap();
        assert_eq!(there.read(&mut [0; 2]).unwrap(), 1);
        assert_eq!(there.read(&mut [0; 2]).unwrap(), 0);
        // Nobody listens there.
        drop(listener);
        assert_eq!(crate::pipes::connect(&path).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
    let socket = |family| drop(rustix::net::socket(family, SocketType::STREAM, None));
    kills(&[Kind::Main], || socket(AddressFamily::UNIX));
    for family in [AddressFamily::INET, AddressFamily::INET6, AddressFamily::NETLINK, AddressFamily::VSOCK] {
        kills(&[Kind::Connecting], || socket(family));
    }
    kills(&[Kind::Connecting], || drop(UnixListener::bind("/tmp/x.sock")));
}

#[test]
fn the_networks_thread_carries_flows_and_reads_who_the_resolvers_are() {
    let resolvers = fs::read_to_string(network::RESOLV_CONF).ok();
    let before = |_: &Home| {
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        (port.local_addr().unwrap(), port)
    };
    let call = |(address, port): (SocketAddr, TcpListener)| {
        if let Some(resolvers) = &resolvers {
            assert_eq!(&fs::read_to_string(network::RESOLV_CONF).unwrap(), resolvers);
        }
        let mut client = TcpStream::connect(address).unwrap();
        let (mut server, _) = port.accept().unwrap();
        client.set_nodelay(true).unwrap();
        rustix::net::sockopt::set_socket_keepalive(&client, true).unwrap();
        rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
        client.set_nonblocking(true).unwrap();
        client.write_all(b"passed on").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut passed = String::new();
        server.read_to_string(&mut passed).unwrap();
        assert_eq!(passed, "passed on");
        assert!(client.take_error().unwrap().is_none());
    };
    lets(&NETWORK, before, call);
}

#[test]
fn no_other_process_is_traced_read_or_signalled() {
    // SAFETY: no pointer is passed.
    kills(&EVERY, || unsafe {
        libc::ptrace(libc::PTRACE_ATTACH, libc::getppid(), 0, 0);
    });
    let other = std::os::unix::process::parent_id().cast_signed();
    // SAFETY: as above.
    kills(&EVERY, || unsafe {
        libc::syscall(libc::SYS_tgkill, other, other, 0);
    });
    kills(&EVERY, || {
        let _ = rustix::process::test_kill_process(rustix::process::Pid::INIT);
    });
}

#[test]
fn no_memory_becomes_code() {
    let map = |protection| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory at an address of the kernel's choice.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) }
    };
    kills(&EVERY, || {
        map(libc::PROT_READ | libc::PROT_EXEC);
    });
    kills(&EVERY, || {
        let page = map(libc::PROT_READ | libc::PROT_WRITE);
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: the page was just mapped, and nobody else knows of it.
        unsafe { libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC) };
    });
}

#[test]
fn no_device_is_told_anything_but_to_run_the_guest() {
    kills(&EVERY, || {
        let _ = rustix::io::ioctl_fionread(io::stdin());
    });
    let kvm_run = || {
        // SAFETY: the call takes no argument, and standard input is no vCPU.
        unsafe { libc::ioctl(0, 0xae80) };
    };
    kills(&[Kind::Main, Kind::Vmm(ThreadKind::Worker), NETWORK[0]], kvm_run);
    lets(&[Kind::Vmm(ThreadKind::Vcpu)], |_| (), |()| kvm_run());
}

#[test]
fn no_descriptor_is_made_to_outlive_the_process() {
    // SAFETY: no pointer is passed.
    kills(&EVERY, || unsafe {
        libc::fcntl(0, libc::F_SETFD, 0);
    });
    kills(&EVERY, || drop(rustix::io::dup(io::stdin())));
}

#[test]
fn what_is_not_in_the_tables_kills() {
    // SAFETY: there is no such call, and the other one takes no pointer.
    kills(&EVERY, || unsafe {
        libc::syscall(9999);
    });
    // SAFETY: as above.
    kills(&EVERY, || unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 1);
    });
}

#[test]
fn the_calls_of_another_architecture_kill() {
    const X32: libc::c_long = 0x4000_0000;
    // SAFETY: `getpid` takes nothing.
    kills(&EVERY, || unsafe {
        libc::syscall(X32 | libc::SYS_getpid);
    });
    kills(&EVERY, || {
        // SAFETY: 20 is `getpid` of i386, which takes nothing and changes no memory.
        unsafe {
            std::arch::asm!("int 0x80", inout("eax") 20 => _, out("r8") _, out("r9") _, out("r10") _, out("r11") _)
        };
    });
}

#[test]
fn threads_of_the_vmm_open_no_file() {
    kills(&OFFLINE[1..], || drop(File::open("/etc/passwd")));
    kills(&EVERY[1..], || drop(OpenOptions::new().write(true).open("/dev/null")));
    kills(&EVERY[1..], || drop(File::create_new("/tmp/nothing")));
    kills(&EVERY[1..], || drop(fs::remove_file("/tmp/nothing")));
    kills(&EVERY[1..2], || drop(File::from(io::stdin().as_fd().try_clone_to_owned().unwrap()).sync_data()));
}

#[test]
fn files_of_others_are_out_of_reach() {
    let before = |home: &Home| {
        let other = home.create_sandbox(&"other".parse().unwrap()).unwrap();
        fs::write(other.join("disk.ext4"), "another sandbox's").unwrap();
        fs::write(home.images().join("disk.erofs"), "an image").unwrap();
        fs::write(home.run().join("0.sock"), "").unwrap();
        (home.clone(), other)
    };
    let call = |(home, other): (Home, std::path::PathBuf)| {
        refused_to("reading a file of the host's", File::open("/etc/passwd"));
        refused_to("listing the host's root", fs::read_dir("/"));
        refused_to("reading itself", File::open("/proc/self/mem"));
        refused_to("a device", OpenOptions::new().read(true).write(true).open("/dev/kvm"));
        refused_to("another sandbox's disk", File::open(other.join("disk.ext4")));
        refused_to("an image", OpenOptions::new().write(true).open(home.images().join("disk.erofs")));
        refused_to("a new file among the sockets", File::create(home.run().join("new")));
        refused_to("removing a disk", fs::remove_file(other.join("disk.ext4")));
        fs::remove_file(home.run().join("0.sock")).unwrap();
    };
    // The kernel of a build machine may not have it: the end-to-end tests run where it is.
    if ourselves() || landlock_is_here() {
        lets(&[Kind::Main], before, call);
        let few = |()| {
            refused_to("a file beside the resolvers'", File::open("/etc/passwd"));
            refused_to("reading itself", File::open("/proc/self/mem"));
        };
        lets(&NETWORK, |_| (), few);
    }
}

fn landlock_is_here() -> bool {
    // SAFETY: with this flag the call only returns the version (landlock_create_ruleset(2)).
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    if version < 1 {
        println!("no Landlock here: nothing was tried");
    }
    version >= 1
}

#[test]
fn descriptors_and_files_have_a_limit() {
    let open = |home: &Home| {
        let path = home.database().with_file_name("file");
        fs::write(&path, "").unwrap();
        path
    };
    let exhaust = |path: std::path::PathBuf| {
        let mut held = Vec::new();
        let error = loop {
            match File::open(&path) {
                Ok(file) => held.push(file),
                Err(error) => break error,
            }
        };
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
        assert!((450..560).contains(&held.len()), "{} descriptors", held.len());
    };
    lets(&[Kind::Main], open, exhaust);
    let grow = |path: std::path::PathBuf| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(b"fits", (16 << 30) - 4).unwrap();
        drop(file.write_all_at(b"!", 16 << 30));
    };
    let output = locked_in(Kind::Main, open, grow);
    assert_eq!(output.status.signal(), Some(libc::SIGXFSZ), "{output:?}");
}

#[test]
fn a_thread_has_no_privileges_left_and_gains_none() {
    let status = std::thread::spawn(|| {
        privileges::gain_none().unwrap();
        privileges::drop_all().unwrap();
        let root = rustix::process::geteuid().is_root();
        (root, fs::read_to_string("/proc/thread-self/status").unwrap(), rustix::process::chroot("/"))
    });
    let (root, status, chroot) = status.join().unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    assert_eq!(field("NoNewPrivs"), "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    // Root could shrink the bounding set, and did.
    assert!(!root || field("CapBnd") == "0000000000000000", "{status}");
    assert_eq!(chroot, Err(rustix::io::Errno::PERM));
}

#[test]
fn the_store_is_still_written() {
    let name: SandboxName = "worker".parse().unwrap();
    let open = |home: &Home| {
        let store = Store::open(home).unwrap();
        let run = store.create(&name, &SandboxConfig::new("python")).unwrap().run.id;
        let lock = RunLock::acquire(&home.lock(&name), RunLock::PATIENCE).unwrap();
        store.adopt(run, &lock).unwrap();
        (store, run, lock)
    };
    lets(&[Kind::Main], open, |(store, run, lock)| {
        store.transition(run, Status::Creating, Event::Ready).unwrap();
        let console = "x".repeat(60 << 10);
        let report = ExitReport::now(ExitReason::GuestPanic).with_console(&console);
        assert_eq!(store.record_end(run, &report).unwrap(), Status::Crashed);
        // Its log and its index go with the last who had it open.
        drop((store, lock));
    });
}

#[test]
fn the_log_is_still_written_and_its_files_take_turns() {
    use crate::output_log::OutputLog;
    use cubby_protocol::{Kind as Frame, SessionId};
    let open = |home: &Home| {
        let name: SandboxName = "worker".parse().unwrap();
        home.create_sandbox(&name).unwrap();
        (OutputLog::open(&home.logs(&name)).unwrap(), home.logs(&name).map(|path| File::open(path).unwrap()))
    };
    lets(&[Kind::Main], open, |(mut log, files)| {
        // Each is emptied once at least.
        for _ in 0..60 {
            log.output(SessionId(1), Frame::Stdout, false, &[b'x'; 250 << 10]);
            log.write();
        }
        for file in files {
            assert!((1 << 20..=4 << 20).contains(&file.metadata().unwrap().len()));
        }
    });
    // What a vCPU leaves for it wakes the main thread.
    let tap = |_: &Home| crate::console_tap::ConsoleTap::new().unwrap();
    lets(&[Kind::Vmm(ThreadKind::Vcpu)], tap, |tap| {
        io::Write::write_all(&mut tap.with(Box::new(io::sink())), b"line\n").unwrap();
    });
    lets(&[Kind::Main], tap, |tap| {
        io::Write::write_all(&mut tap.with(Box::new(io::sink())), b"line\n").unwrap();
        assert_eq!(tap.take().0, b"line\n");
    });
}

#[test]
fn the_end_is_still_told_as_what_it_was() {
    let told = |kind| {
        locked_in(
            kind,
            |_| (),
            |()| {
                let _ = std::panic::catch_unwind(|| panic!("last words"));
            },
        )
    };
    for kind in EVERY {
        let output = told(kind);
        if !ourselves() {
            assert!(String::from_utf8_lossy(&output.stderr).contains("last words"), "{kind:?}: {output:?}");
            assert!(output.status.success(), "{kind:?}: {output:?}");
        }
    }
    for kind in EVERY {
        let output = locked_in(kind, |_| (), |()| std::process::abort());
        assert!(ourselves() || output.status.signal() == Some(libc::SIGABRT), "{kind:?}: {output:?}");
    }
    for kind in EVERY {
        // SAFETY: there is nothing sound about it, and that is the test: nobody relies on this process.
        let fault = || unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
        let output = locked_in(kind, |_| (), |()| fault());
        assert!(ourselves() || output.status.signal() == Some(libc::SIGSEGV), "{kind:?}: {output:?}");
    }
}
