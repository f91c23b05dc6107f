//! A sandbox in the hands of a program.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use cubby_protocol::message::Request;
use cubby_state::{
    Event, ExitReport, Port, ProcessIdentity, Record, Run, SandboxConfig, SandboxName, Status, StoreError,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::builder::{SandboxBuilder, bring_up};
use crate::connection::Connection;
use crate::context::Context;
use crate::error::{Error, R};
use crate::exec::{ExecHandle, ExecOptions, ExecOutput};
use crate::fs::Fs;
use crate::launch::{BootPhase, find_runtime};
use crate::link::Link;

/// How long [`Sandbox::stop`] gives the guest before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a guest may take to be ready again.
const BOOT_TIMEOUT_MS: u64 = 120_000;

/// A sandbox. Clones share one connection; dropping all of them ends the connection, and with it the commands
/// they started and have not detached, but not the sandbox.
#[derive(Clone)]
pub struct Sandbox {
    pub(crate) link: Arc<Link>,
    boot: Arc<[BootPhase]>,
    shell: Arc<str>,
}

impl Sandbox {
    /// Begins to describe a new sandbox.
    ///
    /// ```
    /// # #[tokio::main] async fn main() -> Result<(), cubbyhole::Error> {
    /// use cubbyhole::Sandbox;
    ///
    /// let image = "python:3.12";
    /// # let image = std::env::var("CUBBY_TEST_IMAGE").expect("the runner sets it");
    /// let sandbox = Sandbox::builder("box").image(image).memory(256).ephemeral(true).create().await?;
    /// let output = sandbox.exec("python3", ["-c", "print(6 * 7)"]).await?;
    /// assert_eq!(output.stdout()?, "42\n");
    /// sandbox.stop().await?;
    /// # Ok(()) }
    /// ```
    pub fn builder(name: impl Into<String>) -> SandboxBuilder {
        SandboxBuilder::new(name.into())
    }

    /// Boots a sandbox that is Stopped or Crashed, with the configuration and the disk it had. It stops when
    /// this process ends.
    pub async fn start(name: impl AsRef<str>) -> R<Self> {
        Self::start_as(name.as_ref(), true).await
    }

    /// Like [`Self::start`], for a sandbox that outlives this process.
    pub async fn start_detached(name: impl AsRef<str>) -> R<Self> {
        Self::start_as(name.as_ref(), false).await
    }

    async fn start_as(name: &str, attached: bool) -> R<Self> {
        let context = Context::open()?;
        let id = Context::name(name)?;
        let record = context.store.begin_run(&id).map_err(|error| Error::store(name, error))?;
        let image = match find_image(&context, &record) {
            Ok(image) => image,
            Err(error) => {
                let spec = context.launch_spec(&record, Default::default(), attached, BOOT_TIMEOUT_MS);
                context.give_up(&spec, "image");
                return Err(error);
            }
        };
        let spec = context.launch_spec(&record, image.disk, attached, BOOT_TIMEOUT_MS);
        let runtime = find_runtime(record.config.runtime.as_deref()).inspect_err(|_| {
            context.give_up(&spec, "runtime");
        })?;
        bring_up(context, &runtime, spec, &|_| ()).await
    }

    /// Any existing sandbox. It is connected to on first use.
    pub async fn get(name: impl AsRef<str>) -> R<Self> {
        let context = Context::open()?;
        let id = Context::name(name.as_ref())?;
        let record = context.store.get(&id).map_err(|error| Error::store(name.as_ref(), error))?;
        Ok(Self::of(context, &record, None, Vec::new()))
    }

    /// All sandboxes, the newest first.
    pub async fn list() -> R<Vec<SandboxHandle>> {
        let context = Context::open()?;
        let list = context.store.list()?;
        Ok(list
            .into_iter()
            .map(|summary| SandboxHandle {
                name: summary.name,
                status: summary.status,
                created_at: summary.created_at,
            })
            .collect())
    }

    /// Removes a sandbox that is Stopped or Crashed: its row, disk, logs and socket.
    pub async fn remove(name: impl AsRef<str>) -> R<()> {
        let context = Context::open()?;
        let id = Context::name(name.as_ref())?;
        context.store.remove(&id).map_err(|error| Error::store(name.as_ref(), error))
    }

    /// A sandbox whose process has just said that it is ready.
    pub(crate) async fn connected(context: Context, id: SandboxName, boot: Vec<BootPhase>) -> R<Self> {
        let record = context.store.get(&id)?;
        let socket = context.store.home().socket(&id);
        let connection =
            Connection::open(&socket).await.map_err(|error| Error::connection(id.as_str(), error))?;
        Ok(Self::of(context, &record, Some(Arc::new(connection)), boot))
    }

    fn of(
        context: Context,
        record: &Record,
        connection: Option<Arc<Connection>>,
        boot: Vec<BootPhase>,
    ) -> Self {
        Self {
            link: Arc::new(Link::new(context, record, connection)),
            boot: boot.into(),
            shell: record.config.shell.as_deref().unwrap_or("/bin/sh").into(),
        }
    }

    /// The sandbox's name.
    pub fn name(&self) -> &str {
        self.link.name()
    }

    /// What state it is in now.
    pub async fn status(&self) -> R<Status> {
        Ok(self.link.record()?.status)
    }

    /// The ports of this computer that lead into it, while it lives.
    pub async fn ports(&self) -> R<Vec<Port>> {
        Ok(self.inspect().await?.ports)
    }

    /// All that is kept about it: what it was made from, and its current or last run.
    pub async fn inspect(&self) -> R<Inspection> {
        let record = self.link.record()?;
        let run = record.run;
        Ok(Inspection {
            name: record.name.into(),
            status: record.status,
            created_at: record.created_at,
            started_at: run.started_at,
            pid: run.process.filter(|_| record.status.is_live()).map(|process| process.pid),
            exit: run.exit,
            ports: if record.status.is_live() { run.ports } else { Vec::new() },
            size_on_disk: size_on_disk(&self.link.context.store.home().sandbox(&self.link.id)),
            config: record.config,
        })
    }

    /// How its last run ended; `None` if it has not ended yet.
    pub async fn last_exit(&self) -> R<Option<ExitReport>> {
        match self.link.record() {
            Ok(record) => Ok(record.run.exit),
            Err(gone) => self.link.exit_of(self.link.run, gone).map(Some),
        }
    }

    /// Where the time of its boot went, if this value has booted it.
    pub fn boot_phases(&self) -> &[BootPhase] {
        &self.boot
    }

    /// Waits for its end. One that is removed as it ends tells it nevertheless.
    pub async fn wait(&self) -> R<ExitReport> {
        let mut run = self.link.run;
        loop {
            match self.link.record() {
                Ok(Record { run: Run { exit: Some(report), .. }, .. }) => return Ok(report),
                Ok(record) => run = record.run.id,
                Err(gone) => return self.link.exit_of(run, gone),
            }
            match self.link.connection("wait").await {
                Ok(connection) => drop(connection.wait_ended().await),
                // Booting, or just gone: the store knows soon.
                Err(Error::InvalidState { .. } | Error::Process { .. } | Error::NotFound { .. }) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends the guest's processes (TERM, then KILL), syncs its disk and powers it off; after ten seconds it
    /// is killed.
    pub async fn stop(&self) -> R<()> {
        self.stop_with_timeout(STOP_TIMEOUT).await
    }

    /// Like [`Self::stop`], with a time-out of your own. Four fifths of it are the processes' to end by
    /// themselves.
    pub async fn stop_with_timeout(&self, timeout: Duration) -> R<()> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.link.end(Request::Stop { timeout_ms }, Event::Stop).await
    }

    /// Ends the sandbox at once, as if its power were cut. A sandbox process that does not answer within half
    /// a second is killed itself.
    ///
    /// # Errors
    /// [`Error::Store`] if the store cannot be written, for one because its disk is full: the sandbox is dead
    /// nevertheless. Its end is recorded once the store can be written again.
    pub async fn kill(&self) -> R<()> {
        const PATIENCE: Duration = Duration::from_millis(500);
        match tokio::time::timeout(PATIENCE, self.link.end(Request::Kill, Event::Kill)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error @ Error::InvalidState { .. })) if !self.link.is_live()? => Err(error),
            // Booting, at its limit of clients, of another version, or stuck.
            Ok(Err(_)) | Err(_) => self.kill_process().await,
        }
    }

    /// Kills the sandbox process and waits until its run is over. Who is late, because it ended, was started again or was
    /// removed meanwhile, has what it wanted.
    async fn kill_process(&self) -> R<()> {
        let record = self.link.record()?;
        let mut unannounced = match self.link.context.store.request_kill(record.run.id) {
            Ok(()) => None,
            Err(StoreError::RunOver { .. }) => return Ok(()),
            // It is to die, whoever can write that down.
            Err(error) if error.may_pass() => Some(error),
            Err(error) => return Err(Error::store(self.name(), error)),
        };
        let failed = |error: rustix::io::Errno| Error::Process {
            name: self.name().into(),
            why: format!("cannot kill it: {error}"),
        };
        let pid = record.run.process.as_ref().filter(|process| process.is_running());
        let pid = pid.and_then(|process| i32::try_from(process.pid).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // The descriptor is the process's, whoever has its number later; what it was is looked at again.
            let process = pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
            if record.run.process.as_ref().is_some_and(ProcessIdentity::is_running) {
                pidfd_send_signal(&process, Signal::KILL).map_err(failed)?;
            }
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        let gone = || record.run.process.as_ref().is_none_or(|process| !process.is_running());
        loop {
            if gone()
                && let Some(error) = unannounced.take()
            {
                return Err(Error::store(self.name(), error));
            }
            match self.link.record() {
                Ok(now) if now.status.is_live() && now.run.id == record.run.id => {}
                Ok(_) | Err(Error::NotFound { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout { what: format!("the end of sandbox {:?}", self.name()) });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Refuses new commands, lets those that run finish, then stops. Returns when it has stopped.
    pub async fn drain(&self) -> R<()> {
        self.link.end(Request::Drain { deadline_ms: None }, Event::Drain).await
    }

    /// Like [`Self::drain`]; what still runs at the deadline is ended.
    pub async fn drain_with_deadline(&self, deadline: Duration) -> R<()> {
        let deadline_ms = Some(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
        self.link.end(Request::Drain { deadline_ms }, Event::Drain).await
    }

    /// Freezes the guest. It uses no processor time until [`Self::resume`].
    pub async fn pause(&self) -> R<()> {
        self.link.call(Request::Pause, Event::Pause).await
    }

    /// Lets the guest go on exactly where it was, with the wall clock set right.
    pub async fn resume(&self) -> R<()> {
        self.link.call(Request::Resume, Event::Resume).await
    }

    /// Lets the sandbox outlive this process.
    pub async fn detach(self) -> R<()> {
        self.link.call(Request::Detach, Event::Detach).await
    }

    /// Counts as use, for the idle time-out.
    pub async fn touch(&self) -> R<()> {
        self.link.call(Request::Touch, Event::Open).await
    }

    /// The time that the guest's agent takes to answer.
    pub async fn ping(&self) -> R<Duration> {
        let connection = self.link.connection("ping").await?;
        let begin = Instant::now();
        match connection.ping().await {
            Ok(()) => Ok(begin.elapsed()),
            Err(error) => Err(self.link.lost(error, "ping").await),
        }
    }

    /// Runs a command and waits for it. A command that fails is `Ok` with its exit status; one that cannot
    /// run is an error.
    pub async fn exec(
        &self,
        program: impl Into<String>,
        args: impl IntoIterator<Item = impl Into<String>>,
    ) -> R<ExecOutput> {
        self.exec_with(program, |options| options.args(args)).await
    }

    /// Runs a command with options and waits for it.
    pub async fn exec_with(
        &self,
        program: impl Into<String>,
        options: impl FnOnce(&mut ExecOptions) -> &mut ExecOptions,
    ) -> R<ExecOutput> {
        let mut chosen = ExecOptions::default();
        options(&mut chosen);
        chosen.open.stdin = chosen.stdin.is_some();
        let stdin = chosen.stdin.take();
        self.start_command(program.into(), chosen).await?.collect(stdin).await
    }

    /// Starts a command with a standard input to write to, and returns at once.
    pub async fn exec_stream(
        &self,
        program: impl Into<String>,
        args: impl IntoIterator<Item = impl Into<String>>,
    ) -> R<ExecHandle> {
        self.exec_stream_with(program, |options| options.args(args)).await
    }

    /// Starts a command with options, and returns at once.
    pub async fn exec_stream_with(
        &self,
        program: impl Into<String>,
        options: impl FnOnce(&mut ExecOptions) -> &mut ExecOptions,
    ) -> R<ExecHandle> {
        let mut chosen = ExecOptions::default();
        options(&mut chosen);
        chosen.open.stdin = true;
        let stdin = chosen.stdin.take();
        let mut handle = self.start_command(program.into(), chosen).await?;
        if let Some(bytes) = stdin {
            handle.write_stdin(bytes).await?;
            handle.close_stdin().await?;
        }
        Ok(handle)
    }

    /// Runs a script with the sandbox's shell (`/bin/sh -c`) and waits for it.
    pub async fn shell(&self, script: impl Into<String>) -> R<ExecOutput> {
        self.exec(&*self.shell, ["-c".to_owned(), script.into()]).await
    }

    /// Starts a script with the sandbox's shell, and returns at once.
    pub async fn shell_stream(&self, script: impl Into<String>) -> R<ExecHandle> {
        self.exec_stream(&*self.shell, ["-c".to_owned(), script.into()]).await
    }

    /// The guest's files.
    ///
    /// ```no_run
    /// # async fn example(sandbox: cubbyhole::Sandbox) -> Result<(), cubbyhole::Error> {
    /// let fs = sandbox.fs();
    /// fs.write("/tmp/hello", "hello").await?;
    /// assert_eq!(fs.read_to_string("/tmp/hello").await?, "hello");
    /// fs.copy_out("/etc", "./etc-of-the-guest").await?;
    /// # Ok(()) }
    /// ```
    pub fn fs(&self) -> Fs {
        Fs::new(self.link.clone())
    }

    async fn start_command(&self, program: String, options: ExecOptions) -> R<ExecHandle> {
        let open = cubby_protocol::message::Open { program, ..options.open };
        ExecHandle::start(&self.link, &open).await
    }
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("name", &self.name()).finish_non_exhaustive()
    }
}

/// What is kept about a sandbox, as it was when it was read.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Inspection {
    /// Its name.
    pub name: String,
    /// Its state.
    pub status: Status,
    /// When it was created.
    pub created_at: SystemTime,
    /// When its current run began, or its last.
    pub started_at: SystemTime,
    /// The sandbox process, while there is one.
    pub pid: Option<u32>,
    /// How that run ended; `None` if it has not.
    pub exit: Option<ExitReport>,
    /// The ports of this computer that lead into it, while it lives. Where [`SandboxConfig::ports`] has 0, these have what
    /// was found.
    pub ports: Vec<Port>,
    /// Bytes that its own files take on the host's disk; those of its image are not among them.
    pub size_on_disk: u64,
    /// What it was made from, the image's own configuration included.
    pub config: SandboxConfig,
}

/// A sandbox in a list, as it was when the list was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxHandle {
    name: SandboxName,
    status: Status,
    created_at: SystemTime,
}

impl SandboxHandle {
    /// The sandbox's name.
    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// Its state.
    pub fn status(&self) -> Status {
        self.status
    }

    /// When it was created.
    pub fn created_at(&self) -> SystemTime {
        self.created_at
    }

    /// The sandbox itself.
    pub async fn connect(&self) -> R<Sandbox> {
        Sandbox::get(self.name()).await
    }
}

/// What the files of a directory take on the disk. What is gone, or not to be read, takes nothing.
fn size_on_disk(directory: &Path) -> u64 {
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|file| file.blocks().saturating_mul(512)).sum()
}

/// The image that the sandbox was created from.
fn find_image(context: &Context, record: &Record) -> R<cubby_image::Image> {
    let source = &record.config.image;
    let digest = source.digest.as_deref().and_then(|digest| digest.parse().ok());
    let image = match digest {
        Some(digest) => context.images.image(&digest)?,
        None => None,
    };
    image.ok_or_else(|| Error::ImageGone {
        name: record.name.to_string(),
        reference: source.reference.clone(),
    })
}

impl Error {
    /// An error of the store that is about the sandbox `name`.
    pub(crate) fn store(name: &str, error: StoreError) -> Self {
        let name = name.to_owned();
        match error {
            StoreError::NotFound { .. } => Self::NotFound { name },
            StoreError::AlreadyExists { .. } => Self::AlreadyExists { name },
            error => match error.refused() {
                Some(refused) => Self::invalid_state(&name, refused.status, refused.event.as_str()),
                None => Self::Store(error),
            },
        }
    }
}
