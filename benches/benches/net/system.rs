//! Who can run the traffic program in a guest.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use cubby_benches::network::Work;
use cubby_state::{Home, Store};
use cubbyhole::network::{NetworkPolicy, Rule};
use cubbyhole::{ExecHandle, Sandbox};

use crate::qemu;

/// A virtual machine monitor with a network.
pub enum System {
    /// A sandbox.
    Cubbyhole,
    /// QEMU's microvm with its user-mode network, and our kernel.
    Qemu,
    /// Whatever a command does.
    Other { name: String, command: PathBuf },
}

impl System {
    /// All, ours first.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Cubbyhole, Self::Qemu];
        if let Ok(peer) = std::env::var("CUBBY_BENCH_PEER") {
            let (name, command) = peer.split_once(':').expect("CUBBY_BENCH_PEER is NAME:COMMAND");
            all.push(Self::Other { name: name.to_owned(), command: command.into() });
        }
        all
    }

    /// What the table calls it.
    pub fn name(&self) -> &str {
        match self {
            Self::Cubbyhole => "cubbyhole",
            Self::Qemu => "qemu, slirp",
            Self::Other { name, .. } => name,
        }
    }

    /// Boots a guest that connects to this port of the host's loopback.
    pub fn start(&self, port: u16) -> io::Result<Running> {
        let traffic = PathBuf::from(variable("CUBBY_TEST_TRAFFIC"));
        match self {
            Self::Cubbyhole => Ours::start(&traffic, port)
                .map(|ours| Running::Ours(Box::new(ours)))
                .map_err(io::Error::other),
            Self::Qemu => qemu::start(&traffic, port).map(Running::Process),
            Self::Other { command, .. } => {
                let mut command = Command::new(command);
                command.arg(traffic).arg(port.to_string()).stdin(Stdio::piped());
                Ok(Running::Process(command.spawn()?))
            }
        }
    }
}

/// One that runs.
pub enum Running {
    Ours(Box<Ours>),
    Process(Child),
}

impl Running {
    /// The processor time that it has had.
    pub fn work(&self) -> Work {
        match self {
            Self::Ours(ours) => work(ours.pid),
            Self::Process(child) => work(child.id()),
        }
    }

    pub fn end(self) -> io::Result<()> {
        match self {
            Self::Ours(ours) => ours.end().map_err(io::Error::other),
            Self::Process(mut child) => {
                drop(child.stdin.take());
                child.kill()?;
                child.wait().map(drop)
            }
        }
    }
}

/// A sandbox with the program in it.
pub struct Ours {
    runtime: tokio::runtime::Runtime,
    sandbox: Sandbox,
    _program: ExecHandle,
    pid: u32,
}

impl Ours {
    fn start(traffic: &Path, port: u16) -> Result<Self, cubbyhole::Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let name = format!("bench-net-{}", std::process::id());
        let policy = NetworkPolicy::public().rule(Rule::allow().net("127.0.0.0/8".parse().expect("a net")));
        let (sandbox, program) = runtime.block_on(async {
            let building = Sandbox::builder(&name).image(variable("CUBBY_TEST_IMAGE")).network(policy);
            let sandbox = building.create().await?;
            sandbox.fs().copy_in(traffic, "/traffic").await?;
            let host = sandbox.shell("getent ahostsv4 host.cubbyhole.internal").await?.stdout()?;
            let host = host.split_whitespace().next().unwrap_or_default();
            let address = format!("{host}:{port}");
            let program = sandbox.exec_stream("/traffic", ["run", &address]).await?;
            Ok::<_, cubbyhole::Error>((sandbox, program))
        })?;
        let store = Store::open(&Home::from_env().expect("the home"))?;
        let record = store.get(&name.parse().expect("a name"))?;
        let pid = record.run.process.expect("it runs").pid;
        Ok(Self { runtime, sandbox, _program: program, pid })
    }

    fn end(self) -> Result<(), cubbyhole::Error> {
        self.runtime.block_on(async {
            self.sandbox.kill().await?;
            Sandbox::remove(self.sandbox.name()).await
        })
    }
}

pub fn variable(name: &str) -> String {
    let missing = |_| panic!("{name} is not set: run this with `cargo xtask bench`, which sets it");
    std::env::var(name).unwrap_or_else(missing)
}

/// What the threads of a process and of its children have used. (`utime` and `stime` of proc_pid_stat(5): their sum is exact
/// but for its unit, which is 10 ms.)
fn work(pid: u32) -> Work {
    let mut work = Work::default();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let Ok(stat) = std::fs::read_to_string(thread.path().join("stat")) else { continue };
        let Some((name, fields)) = stat.rsplit_once(')') else { continue };
        let ticks: u64 =
            fields.split_whitespace().skip(11).take(2).filter_map(|it| it.parse::<u64>().ok()).sum();
        let time = std::time::Duration::from_millis(ticks * 10);
        // `vcpu0` of ours and of libkrun's, `CPU 0/KVM` of QEMU's.
        let guest = ["(vcpu", "(CPU ", "(fc_vcpu"].iter().any(|it| name.contains(it));
        *if guest { &mut work.guest } else { &mut work.monitor } += time;
        let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let of_child = self::work(child);
            work.guest += of_child.guest;
            work.monitor += of_child.monitor;
        }
    }
    work
}
