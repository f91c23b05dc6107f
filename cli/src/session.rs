//! One command in a sandbox on this program's streams: bytes pass as they are, in both directions, and no faster than the
//! slower side takes them; signals and sizes of the terminal are passed on; the exit code comes back.
//!
//! Output, input and signals do not wait for each other: three futures, of which the first to end is the end. One that
//! was left by its keys goes on in the sandbox, where others can join it.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use cubbyhole::{Error, ExecEvent, ExecHandle, ExecInput, ExitStatus, Sandbox};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::arguments::{CommandOptions, StreamOptions};
use crate::failure::Failure;
use crate::keys::{DetachKeys, Watch};
use crate::output;
use crate::terminal::{self, RawMode};

const SIGHUP: i32 = 1;
const SIGINT: i32 = 2;
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;

/// How much standard input is read at once.
const CHUNK: usize = 64 << 10;

/// How long what was typed before leaving may take to be read.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What is to run.
pub struct Job {
    /// The program and its arguments.
    pub words: Vec<String>,
    /// What is its own.
    pub options: CommandOptions,
    /// How long it may take.
    pub timeout: Option<Duration>,
    /// What it gets of our streams.
    pub streams: StreamOptions,
}

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// The command ended; this is its exit code as a shell has it.
    Exited(u8),
    /// Nobody waits for the command any more; it may be there still.
    Abandoned(u8),
    /// The command goes on by itself, as the session of this number.
    Detached(u32),
}

/// What can be said to be wrong with the streams before anything is done.
pub fn check(streams: StreamOptions) -> Result<(), Failure> {
    if streams.interactive && streams.tty && !io::stdin().is_terminal() {
        return Err(Failure::own(
            "-t with -i needs a terminal, and standard input is none: leave -t away to pass data on",
        ));
    }
    Ok(())
}

/// Runs a command to its end, or until the keys are typed that let it go on by itself.
pub async fn run(sandbox: &Sandbox, job: Job) -> Result<Ended, Failure> {
    check(job.streams)?;
    let streams = job.streams;
    on_terminal(streams, start(sandbox, job)).await
}

/// Starts a command that goes on by itself, and gives its session's number.
pub async fn start_detached(sandbox: &Sandbox, job: Job) -> Result<u32, Failure> {
    let failed = |error| Failure::of_command(&error);
    let StreamOptions { interactive, tty, .. } = job.streams;
    let mut handle = start(sandbox, job).await?;
    if !(interactive || tty) {
        handle.close_stdin().await.map_err(failed)?;
    }
    let session = handle.id();
    handle.detach().await.map_err(failed)?;
    Ok(session)
}

/// Joins a detached session.
pub async fn join(
    sandbox: &Sandbox,
    session: u32,
    tty: bool,
    interactive: bool,
    detach_keys: DetachKeys,
) -> Result<Ended, Failure> {
    // A command on a terminal can be looked at from none, and one on none has no keys to be left by.
    let tty = tty && io::stdin().is_terminal();
    let streams = StreamOptions { interactive, tty, detach_keys };
    on_terminal(streams, async {
        let handle = sandbox.attach(session).await.map_err(|error| Failure::of_command(&error))?;
        if tty {
            // What is on the terminal there is drawn again for ours.
            let (rows, columns) = terminal::size_or_classic();
            let input = handle.input();
            tell(async move { input.resize(rows, columns).await });
        }
        Ok(handle)
    })
    .await
}

/// Carries a command on this program's streams, with its terminal in the mode for that.
async fn on_terminal(
    streams: StreamOptions,
    starting: impl Future<Output = Result<ExecHandle, Failure>>,
) -> Result<Ended, Failure> {
    let unusable = |error: io::Error| Failure::own(format!("the terminal cannot be used: {error}"));
    // Before the size is asked for, so that no change is missed.
    let signals = Signals::listen().map_err(unusable)?;
    let StreamOptions { interactive, tty, .. } = streams;
    let raw = (interactive && tty).then(|| RawMode::enter(io::stdin())).transpose().map_err(unusable)?;
    let ended = async {
        let handle = starting.await?;
        carry(handle, signals, streams).await
    };
    let ended = ended.await;
    drop(raw);
    ended
}

async fn carry(mut handle: ExecHandle, signals: Signals, streams: StreamOptions) -> Result<Ended, Failure> {
    let input = handle.input();
    tokio::select! {
        ended = deliver(&mut handle) => return ended,
        code = obey(signals, input.clone(), streams.tty) => return Ok(Ended::Abandoned(code)),
        () = feed(input, streams) => {}
    }
    let session = handle.id();
    handle.detach().await.map_err(|error| Failure::of_command(&error))?;
    Ok(Ended::Detached(session))
}

async fn start(sandbox: &Sandbox, job: Job) -> Result<ExecHandle, Failure> {
    let mut words = job.words.into_iter();
    let program = words.next().unwrap_or_default();
    let handle = sandbox.exec_stream_with(program, |options| {
        options.args(words);
        if job.streams.tty {
            let (rows, columns) = terminal::size_or_classic();
            options.tty(rows, columns);
            if let Ok(term) = std::env::var("TERM") {
                options.env("TERM", term);
            }
        }
        for (name, value) in job.options.variables() {
            options.env(name, value);
        }
        if let Some(directory) = job.options.workdir {
            options.cwd(directory);
        }
        if let Some(user) = job.options.user {
            options.user(user);
        }
        match job.timeout {
            Some(timeout) => options.timeout(timeout),
            None => options,
        }
    });
    handle.await.map_err(|error| Failure::of_command(&error))
}

/// Writes out what the command says, until it ends.
async fn deliver(handle: &mut ExecHandle) -> Result<Ended, Failure> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    while let Some(event) = handle.next().await {
        match event.map_err(|error| Failure::of_command(&error))? {
            ExecEvent::Started { .. } => {}
            ExecEvent::Stdout(bytes) => write(&mut stdout, &bytes).await?,
            // Whoever closed it does not want it, and may want the rest.
            ExecEvent::Stderr(bytes) => drop(write(&mut stderr, &bytes).await),
            ExecEvent::Exited(status) => return Ok(Ended::Exited(code(status))),
        }
    }
    Err(Failure::own("the command's end is not known"))
}

async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), Failure> {
    let written = async {
        to.write_all(bytes).await?;
        to.flush().await
    };
    written.await.map_err(|error| output::unwritten(&error))
}

/// The exit code that a shell gives: 128 and the signal's number for a signal.
fn code(status: ExitStatus) -> u8 {
    let code = status.code.or(status.signal.map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

/// Passes standard input on, if it is to be, and its end; comes back only when the keys are typed that leave a terminal.
async fn feed(input: ExecInput, streams: StreamOptions) {
    let StreamOptions { interactive, tty, detach_keys } = streams;
    if interactive {
        let mut stdin = tokio::io::stdin();
        let mut watch = tty.then(|| Watch::new(detach_keys));
        let (mut buffer, mut passed) = (vec![0; CHUNK], Vec::new());
        // An error is the end, too: a terminal that is gone.
        while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
            let mut bytes = buffer.get(..count).unwrap_or_default();
            if let Some(watch) = &mut watch {
                passed.clear();
                let leave = watch.pass(bytes, &mut passed);
                if leave {
                    // What was typed before that is the command's, if it takes it; nobody waits for it any more.
                    let _ = tokio::time::timeout(LAST_WORDS, input.write(&passed)).await;
                    return;
                }
                bytes = &passed;
            }
            match input.write(bytes).await {
                Ok(()) => {}
                // How the command ended is heard where its output is.
                Err(Error::ExecEnded { .. }) | Err(_) => return std::future::pending().await,
            }
        }
    }
    // On a terminal, the end of the input is a character; nobody typed it.
    if interactive || !tty {
        let _ = input.close().await;
    }
    std::future::pending().await
}

/// The signals that a session hears.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    resize: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            resize: signal(SignalKind::window_change())?,
        })
    }

    /// The next one; `None` for a new size.
    async fn next(&mut self) -> Option<i32> {
        tokio::select! {
            _ = self.interrupt.recv() => Some(SIGINT),
            _ = self.terminate.recv() => Some(SIGTERM),
            _ = self.hang_up.recv() => Some(SIGHUP),
            _ = self.resize.recv() => None,
        }
    }
}

/// Passes signals and sizes on, until somebody does not want to wait any more; then with the exit code of that.
async fn obey(mut signals: Signals, input: ExecInput, tty: bool) -> u8 {
    let mut patience = Patience::default();
    loop {
        let signal = signals.next().await;
        let input = input.clone();
        let Some(number) = signal else {
            if tty {
                let (rows, columns) = terminal::size_or_classic();
                tell(async move { input.resize(rows, columns).await });
            }
            continue;
        };
        // With a terminal, keys do not become signals: this is from outside, and the shell in there would not care.
        let answer = if tty { Answer::Abandon } else { patience.answer(Instant::now()) };
        match answer {
            Answer::PassOn => tell(async move { input.signal(number).await }),
            Answer::Kill => tell(async move { input.signal(SIGKILL).await }),
            Answer::Abandon => return u8::try_from(128 + number).unwrap_or(u8::MAX),
        }
    }
}

/// Sends without waiting: whoever does not take it must not keep the next signal from being heard.
fn tell(sending: impl Future<Output = Result<(), Error>> + Send + 'static) {
    // How the command fares is heard where its output is.
    tokio::spawn(sending);
}

/// What a signal brings about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    PassOn,
    Kill,
    Abandon,
}

/// How often somebody has asked lately.
#[derive(Default)]
struct Patience {
    asked: u32,
    last: Option<Instant>,
}

impl Patience {
    /// Who asks again within this time means it.
    const AGAIN: Duration = Duration::from_secs(2);

    fn answer(&mut self, now: Instant) -> Answer {
        let soon = self.last.is_some_and(|last| now.saturating_duration_since(last) <= Self::AGAIN);
        self.asked = if soon { self.asked + 1 } else { 1 };
        self.last = Some(now);
        match self.asked {
            1 => Answer::PassOn,
            2 => Answer::Kill,
            _ => Answer::Abandon,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_a_shell() {
        let exited = |code| ExitStatus { code: Some(code), signal: None };
        for status in [0, 1, 7, 255] {
            assert_eq!(i32::from(code(exited(status))), status);
        }
        assert_eq!(code(ExitStatus { code: None, signal: Some(15) }), 143);
        assert_eq!(code(ExitStatus { code: None, signal: None }), 255);
    }

    #[test]
    fn who_asks_twice_means_it() {
        let begin = Instant::now();
        let mut patience = Patience::default();
        let answers: Vec<Answer> = [0, 3000, 4500, 5000, 5100, 9000]
            .map(|milliseconds| patience.answer(begin + Duration::from_millis(milliseconds)))
            .into();
        use Answer::{Abandon, Kill, PassOn};
        assert_eq!(answers, [PassOn, PassOn, Kill, Abandon, Abandon, PassOn]);
    }
}
