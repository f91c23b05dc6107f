//! What the end-to-end tests stand on: the image and the names they use, bounds on every wait, what `/proc` says
//! about a process, and a second program that uses sandboxes ([`Client`]).
//!
//! Everything here panics when it cannot do its work: a test that cannot run has failed.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

pub mod internet;
mod memory;
mod repeats;

pub use cubby_traffic::random;
pub use memory::own_kib;
pub use repeats::REPEATS;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cubby_state::{Home, ProcessIdentity, Store};
use cubbyhole::{Error, ExecEvent, ExecHandle, ExecOutput, Sandbox, SandboxBuilder};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::OnceCell;

/// How long anything may take. The slowest machine that these tests run on emulates each instruction.
pub const BOUND: Duration = Duration::from_secs(120);

/// The image of all tests: a small Debian with Python.
pub fn image() -> String {
    variable("CUBBY_TEST_IMAGE")
}

/// A variable that tells the tests what is around them.
pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run these tests with `cargo xtask test`, which sets it")
    })
}

/// A sandbox's name that no other test and no other run has.
pub fn name(test: &str) -> String {
    format!("{test}-{}", std::process::id())
}

/// A sandbox of the test image, with little memory, so that several fit on one machine.
pub fn builder(name: &str) -> SandboxBuilder {
    Sandbox::builder(name).image(image()).memory(192)
}

/// A new sandbox for one test.
pub async fn sandbox(test: &str) -> Sandbox {
    within("create", builder(&name(test)).create()).await.unwrap()
}

/// A sandbox for all tests that leave it as it was: a connection of one's own to it.
pub async fn shared() -> Sandbox {
    static NAME: OnceCell<String> = OnceCell::const_new();
    let name = NAME.get_or_init(async || sandbox("shared").await.name().to_owned()).await;
    Sandbox::get(name).await.unwrap()
}

/// Stops a sandbox and leaves nothing of it.
pub async fn discard(sandbox: Sandbox) {
    within("stop", sandbox.stop()).await.unwrap();
    Sandbox::remove(sandbox.name()).await.unwrap();
}

/// What `future` gives, if it takes no longer than [`BOUND`].
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(BOUND, future).await.unwrap_or_else(|_| panic!("{what} took longer than {BOUND:?}"))
}

/// Waits for what no event tells.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    while !holds().await {
        assert!(begin.elapsed() < BOUND, "{what} did not come within {BOUND:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The standard output of a script that has to succeed.
pub async fn shell(sandbox: &Sandbox, script: &str) -> String {
    let output = within(script, sandbox.shell(script)).await.unwrap();
    success(script, &output)
}

/// The standard output of a Python program that has to succeed.
pub async fn python(sandbox: &Sandbox, program: &str) -> String {
    let output = within(program, sandbox.exec("python3", ["-c", program])).await.unwrap();
    success(program, &output)
}

/// What a running command writes to its standard output next.
pub async fn next_output(command: &mut ExecHandle) -> String {
    loop {
        match within("output", command.next()).await.expect("the command has ended").unwrap() {
            ExecEvent::Stdout(bytes) => return String::from_utf8(bytes.to_vec()).unwrap(),
            ExecEvent::Started { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn success(what: &str, output: &ExecOutput) -> String {
    assert!(output.success(), "{what}: {:?}, {}", output.status(), output.stderr().unwrap_or_default());
    output.stdout().unwrap()
}

/// The home that the environment names, and the store in it.
pub fn store() -> Store {
    Store::open(&Home::from_env().unwrap()).unwrap()
}

/// A home in `directory` that shares the images of the others.
pub async fn own_home(directory: &Path) -> Home {
    let ours = store().home().clone();
    let images = cubby_image::Store::open(ours.images()).unwrap();
    let options = cubby_image::PullOptions::default();
    images.resolve(&image().parse().unwrap(), cubby_image::PullPolicy::IfMissing, &options).await.unwrap();
    let home = Home::at(directory.join("home")).unwrap();
    home.create().unwrap();
    fs::remove_dir(home.images()).unwrap();
    std::os::unix::fs::symlink(ours.images(), home.images()).unwrap();
    home
}

/// The process behind a sandbox.
pub fn process(name: &str) -> ProcessIdentity {
    let record = store().get(&name.parse().unwrap()).unwrap();
    record.run.process.unwrap_or_else(|| panic!("{name} has no process"))
}

/// The parent of the process behind a sandbox, which records its end if it cannot do so itself.
pub fn keeper(name: &str) -> ProcessIdentity {
    let status = fs::read_to_string(format!("/proc/{}/status", process(name).pid)).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("PPid");
    ProcessIdentity::of(parent.trim().parse().unwrap()).unwrap()
}

/// Runs the traffic program in a guest that may talk to the host's loopback, until the stream is dropped: it connects to
/// this listener, and does what it is told there.
pub async fn run_traffic(sandbox: &Sandbox, listener: &std::net::TcpListener) -> ExecHandle {
    let port = listener.local_addr().unwrap().port();
    within("copy_in", sandbox.fs().copy_in(variable("CUBBY_TEST_TRAFFIC"), "/traffic")).await.unwrap();
    let found = shell(sandbox, "getent ahostsv4 host.cubbyhole.internal").await;
    let host = found.split_whitespace().next().unwrap();
    let running = sandbox.exec_stream_with("/traffic", |options| {
        options.args(["run", &format!("{host}:{port}")]).rlimit(RLIMIT_NOFILE, 1 << 16, 1 << 16)
    });
    within("exec", running).await.unwrap()
}

/// The number of the limit of open descriptors (`asm-generic/resource.h`).
const RLIMIT_NOFILE: u8 = 7;

/// A number that a variable tells the tests, for those that have a small and a large size.
pub fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Kills a process at once.
pub fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

/// Stops a process from doing anything, until it is killed.
pub fn freeze(pid: u32) {
    signal(pid, rustix::process::Signal::STOP);
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Waits until a process is gone, its zombie included.
pub async fn gone(process: &ProcessIdentity) {
    until(&format!("the end of process {}", process.pid), async || {
        ProcessIdentity::of(process.pid).map_or(true, |now| now != *process)
    })
    .await;
}

/// The wall clock, since the Unix epoch.
pub fn host_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

/// The processor time that each thread of a process has had, in clock ticks of 10 ms (proc_pid_stat(5), fields 14 and
/// 15), with the thread's id.
pub fn cpu_ticks(pid: u32) -> Vec<(u32, u64)> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let ticks = |thread: u32| {
        let fields = stat(&format!("/proc/{pid}/task/{thread}/stat"))?;
        Some((thread, fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()))
    };
    threads.filter_map(|thread| ticks(thread.unwrap().file_name().to_str()?.parse().ok()?)).collect()
}

/// Whether every thread of a process waits for something.
pub fn sleeps(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.map(|thread| thread.unwrap().path().join("stat")).all(|path| {
        // One that is gone meanwhile does not run either.
        stat(path.to_str().unwrap()).is_none_or(|fields| fields[0] == "S")
    })
}

/// The parent of a process of this machine.
pub fn parent(pid: u32) -> u32 {
    stat(&format!("/proc/{pid}/stat")).unwrap()[1].parse().unwrap()
}

/// The fields of a `stat` file from the third on: the second may hold anything.
fn stat(path: &str) -> Option<Vec<String>> {
    let text = fs::read_to_string(path).ok()?;
    Some(text[text.rfind(')').unwrap() + 2..].split_whitespace().map(str::to_owned).collect())
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Memory of its own, in KiB, and of its guest, if it has one: [`own_kib`] tells them apart.
    pub anonymous_kib: u64,
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
}

impl Holdings {
    /// Those of a process of this machine.
    pub fn of(pid: u32) -> Self {
        let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        Self { anonymous_kib: anonymous_kib(&status), descriptors: count("fd"), threads: count("task") }
    }

    /// Those of the agent, as the guest tells them. What asks is in none of the counts.
    pub async fn of_agent(sandbox: &Sandbox) -> Self {
        let script = "ls /proc/1/fd | wc -l; ls /proc/1/task | wc -l; cat /proc/1/status";
        let text = shell(sandbox, script).await;
        let mut lines = text.lines();
        let mut count = || lines.next().unwrap().trim().parse().unwrap();
        Self { descriptors: count(), threads: count(), anonymous_kib: anonymous_kib(&text) }
    }
}

/// As one line of text, for a process that tells another.
impl std::fmt::Display for Holdings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.anonymous_kib, self.descriptors, self.threads)
    }
}

impl std::str::FromStr for Holdings {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut fields = text.split(' ');
        let mut field = || fields.next().unwrap_or_default();
        Ok(Self { anonymous_kib: field().parse()?, descriptors: field().parse()?, threads: field().parse()? })
    }
}

/// `RssAnon` (proc_pid_status(5)).
fn anonymous_kib(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Another program that uses sandboxes, as `src/bin/client/main.rs` has it. Dropping it kills it.
pub struct Client {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Client {
    /// Starts the program, or what starts it.
    pub fn start(command: &[&str]) -> Self {
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { stdin: child.stdin.take(), child, lines }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("the other program ended")
    }

    /// The next line that it prints.
    pub async fn line(&mut self) -> String {
        let line = within("a line of the other program", self.next_line()).await;
        line.expect("the other program ended")
    }

    /// The next line that it prints, however long that takes, unless its output ends. It may be called off.
    pub async fn next_line(&mut self) -> Option<String> {
        self.lines.next_line().await.unwrap()
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Ends its input, which ends it, and checks that it went well.
    pub async fn finish(mut self) {
        drop(self.stdin.take());
        let status = within("the end of the other program", self.child.wait()).await.unwrap();
        assert!(status.success(), "the other program ended with {status}");
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn blob(layout: &Path, digest: &Value) -> PathBuf {
    layout.join("blobs").join(digest.as_str().unwrap().replace(':', "/"))
}

/// The one layer of an `oci:` image, and its configuration.
pub fn layer(reference: &str) -> (PathBuf, Value) {
    let layout = reference.strip_prefix("oci:").unwrap_or_else(|| panic!("{reference} is no oci: directory"));
    let layout = Path::new(layout);
    let index = read_json(&layout.join("index.json"));
    let manifest = read_json(&blob(layout, &index["manifests"][0]["digest"]));
    let layers = manifest["layers"].as_array().unwrap();
    // Whiteouts are the image crate's to test; here a list of names is to be enough.
    assert_eq!(layers.len(), 1, "the tests want an image of one layer");
    (blob(layout, &layers[0]["digest"]), read_json(&blob(layout, &manifest["config"]["digest"])))
}

/// What `tar` prints about an archive.
pub fn tar(arguments: &[&str], archive: &Path) -> String {
    let mut command = std::process::Command::new("tar");
    command.env("TZ", "UTC").env("LC_ALL", "C").arg("--file").arg(archive).args(arguments);
    let output = command.output().unwrap();
    assert!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Makes an image in a directory from a shell and some commands of the test image, with a configuration of its
/// own, and gives its reference.
pub fn small_image(dir: &Path, config: &Value) -> String {
    let (root, archive) = (dir.join("root"), dir.join("layer.tar"));
    fs::create_dir(&root).unwrap();
    let root = root.to_str().unwrap();
    let parts = [
        "./bin",
        "./lib",
        "./lib64",
        "./usr/lib64",
        "./etc/passwd",
        "./etc/group",
        "./usr/bin/sh",
        "./usr/bin/dash",
        "./usr/bin/id",
        "./usr/lib/*/ld-*",
        "./usr/lib/*/libc.so*",
        "./usr/lib/*/libselinux.so*",
        "./usr/lib/*/libpcre2-8.so*",
    ];
    let extract = ["--extract", "--no-same-owner", "--wildcards", "--directory", root];
    tar(&[&extract[..], &parts].concat(), &layer(&image()).0);
    tar(&["--create", "--owner=0", "--group=0", "--directory", root, "."], &archive);
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let add = |media_type: &str, bytes: &[u8]| {
        let digest = cubby_image::Digest::sha256(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({
            "mediaType": format!("application/vnd.oci.image.{media_type}"),
            "digest": digest.to_string(),
            "size": bytes.len(),
        })
    };
    let layer = add("layer.v1.tar", &fs::read(&archive).unwrap());
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = add("config.v1+json", config.to_string().as_bytes());
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
    let manifest = add("manifest.v1+json", manifest.to_string().as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string()).unwrap();
    format!("oci:{}", dir.display())
}

/// Whether this is an `InvalidState` of the given state.
pub fn refused_as<T>(result: &Result<T, Error>, expected: cubbyhole::Status) -> bool {
    matches!(result, Err(Error::InvalidState { state, .. }) if *state == expected.to_string())
}
