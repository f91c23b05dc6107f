//! A small Internet on one computer: a network namespace of its own, in which public and private addresses are on the
//! loopback, names stand for them, and real servers have their usual ports. Guests are in it because the processes of their
//! sandboxes are started there. Nothing of it needs root, leads out of it, or outlives the tests.
//!
//! Servers run unprivileged from a directory of programs that `xtask` has made, on files in memory.

use std::io::{BufRead, BufReader, Read, Seek};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;

use cubbyhole::{Sandbox, SandboxBuilder};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;

use crate::{name, until, variable, within};

/// What `web.test` stands for.
pub const WEB: [&str; 2] = ["93.184.215.14", "2606:2800:21f:cb07::14"];

/// Addresses that are there as well, one of each kind that is not public.
pub const PRIVATE: [&str; 8] = [
    "10.1.2.3",
    "100.64.0.1",
    "169.254.169.254",
    "172.17.0.1",
    "192.168.1.1",
    "203.0.113.1",
    "fd00::1",
    "fec0::1",
];

/// Where names are answered.
const RESOLVER: &str = "127.0.0.53:53";

/// The namespaces, and the way into them.
pub struct Internet {
    /// It ends with its input, which it has as long as this program lives.
    holder: std::process::Child,
    root: PathBuf,
    runtime: PathBuf,
}

/// A server that was started for one test. Dropping it kills it.
pub struct Server {
    child: Child,
    said: std::fs::File,
}

impl Internet {
    /// The one of all tests, with names and web pages.
    pub async fn get() -> &'static Self {
        static INTERNET: OnceCell<Internet> = OnceCell::const_new();
        INTERNET.get_or_init(Self::start).await
    }

    async fn start() -> Self {
        let root = PathBuf::from(variable("CUBBY_TEST_CLIENTS")).join("root");
        // Beside the home, in the directory that goes with this run.
        let runtime = PathBuf::from(variable("CUBBY_HOME")).with_file_name("runtime-in-the-internet");
        let addresses = [&WEB[..], &PRIVATE[..]].concat().join(" ");
        let mut holder = std::process::Command::new("unshare");
        holder.args(["--user", "--map-root-user", "--net", "--mount", "--ipc", "--", "sh", "-c"]);
        holder.args([include_str!("internet/hold.sh"), "hold.sh"]).arg(&root).arg(addresses);
        holder.args([include_str!("internet/names.conf"), include_str!("internet/web.conf")]).arg(&runtime);
        let mut holder = holder.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "there\n", "no namespaces: {:?}", holder.wait());
        let internet = Self { holder, root, runtime };
        for port in [53, 80, 443] {
            until("names and web pages", async || internet.listens(port)).await;
        }
        internet
    }

    /// A sandbox of the clients' image in it, which asks its resolver.
    pub fn builder(&self, test: &str) -> SandboxBuilder {
        let image = format!("oci:{}/layout", variable("CUBBY_TEST_CLIENTS"));
        self.place(Sandbox::builder(name(test)).image(image).memory(384))
    }

    /// A sandbox of any image, put into it.
    pub fn place(&self, builder: SandboxBuilder) -> SandboxBuilder {
        builder.runtime(&self.runtime).resolver(RESOLVER.parse::<SocketAddr>().unwrap())
    }

    /// What one of its programs prints, which has to succeed. `input` is its standard input.
    pub async fn run(&self, program: &[&str], input: &[u8]) -> String {
        let running = async {
            let mut child = self.command(program);
            let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            child.stdin.take().unwrap().write_all(input).await.unwrap();
            child.wait_with_output().await.unwrap()
        };
        let output = within("a program of the Internet", running).await;
        assert!(output.status.success(), "{program:?} ended with {}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same for a script.
    pub async fn script(&self, script: &str) -> String {
        self.run(&["sh", "-ec", script], &[]).await
    }

    /// Starts a server and waits until it has its port.
    pub async fn serve(&self, program: &[&str], port: u16) -> Server {
        let said = tempfile::tempfile().unwrap();
        let mut command = self.command(program);
        command.stdin(Stdio::null()).stdout(said.try_clone().unwrap()).stderr(said.try_clone().unwrap());
        let mut server = Server { child: command.spawn().unwrap(), said };
        until(program[0], async || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "{program:?} ended with {ended:?}: {}", server.said());
            self.listens(port)
        })
        .await;
        server
    }

    /// A program that ends at the latest with the thread that has started it, as nobody in particular.
    fn command(&self, program: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--user", "--preserve-credentials"]);
        command.args(["--net", "--mount", "--ipc", "--", "unshare", "--user", "--map-user=1000"]);
        command.arg("--map-group=1000").arg(format!("--root={}", self.root.display())).arg("--wd=/srv");
        command.args(["--", "setpriv", "--pdeathsig", "KILL", "--"]).args(program);
        command
            .env("HOME", "/srv")
            .env("LC_ALL", "C")
            .env("PATH", "/usr/lib/postgresql/15/bin:/usr/sbin:/usr/bin");
        command.kill_on_drop(true);
        command
    }

    /// Whether somebody listens on a port (proc(5), net/tcp: state 0A is LISTEN).
    fn listens(&self, port: u16) -> bool {
        let ends = format!(":{port:04X}");
        ["tcp", "tcp6"].iter().any(|table| {
            let table = std::fs::read_to_string(format!("/proc/{}/net/{table}", self.holder.id())).unwrap();
            let listening = |line: &str| {
                let mut fields = line.split_whitespace().skip(1);
                fields.next().is_some_and(|local| local.ends_with(&ends)) && fields.nth(1) == Some("0A")
            };
            table.lines().any(listening)
        })
    }
}

impl Server {
    /// What it has written so far.
    pub fn said(&mut self) -> String {
        let mut said = String::new();
        self.said.rewind().unwrap();
        self.said.read_to_string(&mut said).unwrap();
        said
    }
}
