//! The server inside the KVM test machine (`xtask kvm-server`): one connection, one command. A connection that its
//! client closes ends its command. It is reached only by who knows the secret in the initramfs.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{self, PipeReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process_group};

use super::initramfs::{ADDRESS, HOST, TOKEN};
use super::wire::{Frame, Request, TOKEN_SIZE, receive, send};
use crate::process;

/// Serves until the machine ends.
pub fn serve() -> Result<()> {
    let token = fs::read(TOKEN)?;
    let listener = TcpListener::bind(ADDRESS)?;
    for connection in listener.incoming() {
        let (connection, token) = (connection?, token.clone());
        thread::spawn(move || {
            if let Err(error) = one(connection, &token) {
                eprintln!("kvm-server: {error:#}");
            }
        });
    }
    Ok(())
}

fn one(mut client: TcpStream, token: &[u8]) -> Result<()> {
    let mut shown = [0; TOKEN_SIZE];
    client.read_exact(&mut shown)?;
    if shown != token {
        bail!("somebody without the secret");
    }
    client.set_nodelay(true)?;
    send(&mut client, &Frame::Hello)?;
    let request = match receive(&mut client)? {
        None => return Ok(()),
        Some(Frame::Request(request)) => request,
        Some(other) => bail!("{other:?} instead of a request"),
    };
    let last = match start(request) {
        Ok(child) => run(child, &client)?,
        Err(error) => Frame::Failed(format!("{error:#}")),
    };
    send(&mut client, &last)?;
    Ok(())
}

fn start(request: Request) -> Result<Child> {
    for dir in request.shared {
        share(PathBuf::from(OsString::from_vec(dir)))?;
    }
    let mut arguments = request.arguments.into_iter().map(OsString::from_vec);
    let program = arguments.next().context("no command was given")?;
    let mut command = Command::new(&program);
    command
        .args(arguments)
        .env_clear()
        .envs(request.environment.into_iter().map(|(k, v)| (OsString::from_vec(k), OsString::from_vec(v))))
        .current_dir(OsString::from_vec(request.directory))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    if request.user != 0 {
        command.uid(request.user).gid(request.group);
    }
    command
        .spawn()
        .with_context(|| format!("cannot run {} on the KVM test machine", program.to_string_lossy()))
}

/// Puts the host's own directory in the overlay's place. New files in it are seen at once, and so are changed ones,
/// which an overlay would not promise of the layer under it.
fn share(dir: PathBuf) -> Result<()> {
    static SHARED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let mut shared = SHARED.lock().map_err(|_| anyhow::anyhow!("a share failed before"))?;
    if shared.iter().any(|above| dir.starts_with(above)) {
        return Ok(());
    }
    let inside = dir.strip_prefix("/").with_context(|| format!("{} is not absolute", dir.display()))?;
    let host = PathBuf::from(HOST).join(inside);
    fs::create_dir_all(&dir)?;
    process::run_quietly(Command::new("/run/busybox").args(["mount", "--bind"]).arg(host).arg(&dir))?;
    shared.insert(dir);
    Ok(())
}

/// Carries input and output until the command ends, and says how it did.
fn run(mut child: Child, client: &TcpStream) -> Result<Frame> {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a pid out of range")?;
    let stdin = child.stdin.take().context("no stdin")?;
    let stdout = child.stdout.take().context("no stdout")?;
    let stderr = child.stderr.take().context("no stderr")?;
    // Its other end is dropped when the command has ended: what poll(2) can wait for.
    let (ended, ending) = io::pipe()?;
    let over = Arc::new(AtomicBool::new(false));
    let waiter = thread::spawn({
        let over = over.clone();
        move || {
            let status = child.wait();
            over.store(true, Ordering::SeqCst);
            drop(ending);
            status
        }
    });
    // Neither of these two is waited for: a command may end before its input does. The second goes on to read until
    // the client closes, so that no unread input turns the end of the connection into a reset.
    let (to_stdin, input) = mpsc::channel::<Vec<u8>>();
    thread::spawn(move || feed(stdin, &input));
    thread::spawn({
        let (client, over) = (client.try_clone()?, over.clone());
        move || {
            listen(client, &to_stdin);
            end(group, &over);
        }
    });
    let pumped = pump(stdout, stderr, &ended, client);
    if pumped.is_err() {
        end(group, &over);
    }
    let status = waiter.join().map_err(|_| anyhow::anyhow!("the waiting thread panicked"))??;
    pumped?;
    Ok(Frame::Exit(process::code(status)))
}

/// Writes what comes to the command's standard input until its end.
fn feed(mut stdin: impl Write, input: &mpsc::Receiver<Vec<u8>>) {
    for bytes in input {
        if bytes.is_empty() || stdin.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Takes what the client says until the connection ends.
fn listen(mut client: TcpStream, to_stdin: &mpsc::Sender<Vec<u8>>) {
    while let Ok(Some(Frame::Stdin(bytes))) = receive(&mut client) {
        // An error means that the command has closed its standard input.
        let _ = to_stdin.send(bytes);
    }
}

/// Ends the command's process group, unless the command is over: first asked, then made to.
fn end(group: Pid, over: &AtomicBool) {
    for signal in [Signal::TERM, Signal::KILL] {
        if over.load(Ordering::SeqCst) {
            return;
        }
        let _ = kill_process_group(group, signal);
        for _ in 0..20 {
            if over.load(Ordering::SeqCst) {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Sends both outputs as they come, until both are closed, or the command has ended and what it wrote is sent: a
/// process that it left behind may hold them open for ever.
fn pump(
    stdout: impl Read + AsFd,
    stderr: impl Read + AsFd,
    ended: &PipeReader,
    mut client: &TcpStream,
) -> Result<()> {
    let (mut stdout, mut stderr) = (Some(stdout), Some(stderr));
    let mut buffer = vec![0; 64 << 10];
    while stdout.is_some() || stderr.is_some() {
        let (out, err, over) = {
            let mut fds = vec![PollFd::new(ended, PollFlags::IN)];
            fds.extend(stdout.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            fds.extend(stderr.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            poll(&mut fds, None)?;
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
            let over = ready.next() == Some(true);
            let out = stdout.is_some() && ready.next() == Some(true);
            (out, stderr.is_some() && ready.next() == Some(true), over)
        };
        if out {
            move_some(&mut stdout, &mut buffer, Frame::Stdout, &mut client)?;
        }
        if err {
            move_some(&mut stderr, &mut buffer, Frame::Stderr, &mut client)?;
        }
        if over && !out && !err {
            return Ok(());
        }
    }
    Ok(())
}

fn move_some(
    from: &mut Option<impl Read>,
    buffer: &mut [u8],
    frame: fn(Vec<u8>) -> Frame,
    to: &mut impl Write,
) -> io::Result<()> {
    let Some(pipe) = from else { return Ok(()) };
    let count = pipe.read(buffer)?;
    if count == 0 {
        *from = None;
        return Ok(());
    }
    send(to, &frame(buffer.get(..count).unwrap_or_default().to_vec()))
}
