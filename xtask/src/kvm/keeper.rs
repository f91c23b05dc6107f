//! The keeper of one KVM test machine (`xtask kvm-keeper`, started by [`super::machine`]): boots it, carries connections
//! from a socket that only its user can open to the server in the machine, pauses an idle machine on the instruction
//! clock (which would otherwise spin through its own future), and ends it after ten idle minutes.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::initramfs;
use super::machine::Mode;
use super::qemu::Machine;
use super::wire::TOKEN_SIZE;
use crate::{process, workspace};

/// An idle machine ends after this.
const IDLE: Duration = Duration::from_secs(600);

/// How long a boot may take.
const BOOT: Duration = Duration::from_secs(110);

/// What the keeper's threads share.
struct State {
    clients: usize,
    since: Instant,
    served: bool,
    qmp: UnixStream,
}

/// Runs the machine whose files are in `dir` until it is not needed any more.
pub fn keep(mode: Mode, once: bool, kernel: &Path, dir: &Path) -> Result<()> {
    let token = token()?;
    // The machine loads this program at every boot: without its debug sections it is a quarter of the size.
    let program = dir.join("xtask");
    let mut strip = process::command("objcopy", ["--strip-all"]);
    process::run(strip.arg(workspace::program()?).arg(&program))?;
    fs::write(dir.join("initramfs"), initramfs::archive(&program, &token)?)?;
    // Taken from the system and given back: QEMU takes it next.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let mut machine = Machine::start(mode, kernel, dir, port)?;
    let deadline = Instant::now() + BOOT;
    while dial(port, &token, Duration::from_millis(250)).is_err() {
        machine.check(dir)?;
        if Instant::now() > deadline {
            bail!("the server did not answer\n{}", fs::read_to_string(dir.join("console.log"))?);
        }
        thread::sleep(Duration::from_millis(50));
    }
    let qmp = monitor(&dir.join("qmp.sock"))?;
    let state = Arc::new(Mutex::new(State { clients: 0, since: Instant::now(), served: false, qmp }));
    let listener = listen(dir)?;
    let pausing = mode == Mode::Icount;
    thread::spawn({
        let state = state.clone();
        move || {
            for client in listener.incoming().flatten() {
                let (state, token) = (state.clone(), token.clone());
                enter(&state, pausing);
                thread::spawn(move || {
                    if let Err(error) = carry(&client, port, &token) {
                        eprintln!("kvm-keeper: {error:#}");
                    }
                    leave(&state, pausing);
                });
            }
        }
    });
    loop {
        thread::sleep(Duration::from_millis(200));
        machine.check(dir)?;
        let state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = state.clients == 0 && (state.since.elapsed() > IDLE || (once && state.served));
        if idle {
            // While the lock is held nobody enters. Who was in the queue finds the connection closed and starts over.
            fs::remove_dir_all(dir)?;
            return Ok(());
        }
    }
}

fn enter(state: &Mutex<State>, pausing: bool) {
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    if pausing && state.clients == 0 {
        report(tell(&mut state.qmp, "cont"));
    }
    state.clients += 1;
}

fn leave(state: &Mutex<State>, pausing: bool) {
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    state.clients = state.clients.saturating_sub(1);
    state.since = Instant::now();
    state.served = true;
    if pausing && state.clients == 0 {
        report(tell(&mut state.qmp, "stop"));
    }
}

fn report(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("kvm-keeper: {error:#}");
    }
}

fn token() -> Result<Vec<u8>> {
    let mut token = vec![0; TOKEN_SIZE];
    fs::File::open("/dev/urandom")?.read_exact(&mut token)?;
    Ok(token)
}

/// The socket that clients find. It appears when it can be used, and in a directory that only its user can enter.
fn listen(dir: &Path) -> Result<UnixListener> {
    let (new, socket) = (dir.join("sock.new"), dir.join("sock"));
    let listener = UnixListener::bind(&new)?;
    let user = |name| std::env::var(name).ok().and_then(|id| id.parse::<u32>().ok());
    if let Some(user) = user("SUDO_UID") {
        std::os::unix::fs::chown(&new, Some(user), user_group())?;
    }
    fs::rename(new, socket)?;
    Ok(listener)
}

fn user_group() -> Option<u32> {
    std::env::var("SUDO_GID").ok()?.parse().ok()
}

/// A connection to the server, which has said hello. QEMU accepts in its place, so that alone says nothing.
fn dial(port: u16, token: &[u8], patience: Duration) -> Result<TcpStream> {
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    server.set_nodelay(true)?;
    server.set_read_timeout(Some(patience))?;
    server.write_all(token)?;
    if server.peek(&mut [0])? == 0 {
        bail!("the server closed the connection");
    }
    server.set_read_timeout(None)?;
    Ok(server)
}

/// Carries both directions until the server has said all, or the client is gone.
fn carry(client: &UnixStream, port: u16, token: &[u8]) -> Result<()> {
    let server =
        dial(port, token, Duration::from_secs(20)).context("the server in the machine does not answer")?;
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = copy(client, &server);
            let _ = server.shutdown(Shutdown::Both);
        });
        let carried = copy(&server, client);
        let _ = client.shutdown(Shutdown::Both);
        // The client's end of a connection is no error of the keeper's.
        drop(carried);
    });
    Ok(())
}

fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(buffer.get(..count).unwrap_or_default())?;
    }
}

/// QEMU's own control connection.
fn monitor(socket: &Path) -> Result<UnixStream> {
    let mut qmp = UnixStream::connect(socket).context("QEMU's monitor")?;
    tell(&mut qmp, "qmp_capabilities")?;
    Ok(qmp)
}

/// Gives QEMU an order and waits until it is carried out. What it says besides (greeting, events) is passed over.
fn tell(qmp: &mut UnixStream, order: &str) -> Result<()> {
    writeln!(qmp, "{{\"execute\":\"{order}\"}}")?;
    let mut reader = BufReader::with_capacity(1, qmp);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed its monitor");
        }
        if line.contains("\"return\"") {
            return Ok(());
        }
        if line.contains("\"error\"") {
            bail!("QEMU on {order}: {line}");
        }
    }
}
