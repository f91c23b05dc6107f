//! What a sandbox is made from, and making it.

use std::net::SocketAddr;
use std::path::PathBuf;

use cubby_image::{PullOptions, Reference};
use cubby_state::{
    Bandwidth, ImageDefaults, ImageSource, LaunchSpec, Mistake, NetworkPolicy, Port, SandboxConfig,
    SandboxName, VsockPort,
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::UnboundedReceiverStream;

pub use cubby_image::PullPolicy;

use crate::context::Context;
use crate::error::{Error, R};
use crate::launch::{BootPhase, find_runtime, launch};
use crate::sandbox::Sandbox;

/// How long a guest may take to be ready. Twenty times what a slow machine needs.
const BOOT_TIMEOUT_MS: u64 = 120_000;

/// What [`SandboxName`] takes.
const NAMES: &str = "1 to 128 letters, digits, '_', '.' and '-', beginning with a letter or digit";

/// A sandbox to be. The setters only take notes: [`SandboxBuilder::create`] reports every mistake at once.
#[derive(Clone, Debug)]
#[must_use]
pub struct SandboxBuilder {
    name: String,
    config: SandboxConfig,
    pull_policy: PullPolicy,
}

/// What a create is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// The image: asking, downloading, converting.
    Image(cubby_image::Progress),
    /// The sandbox process starts and boots its VM.
    Booting,
    /// The sandbox runs; these were the steps of its boot.
    Ready(Vec<BootPhase>),
}

type Report<'a> = &'a (dyn Fn(Progress) + Send + Sync);

impl SandboxBuilder {
    pub(crate) fn new(name: String) -> Self {
        Self { name, config: SandboxConfig::new(String::new()), pull_policy: PullPolicy::default() }
    }

    /// The image: `python:3.12`, `localhost:5000/py`, `oci:DIR`, `docker-archive:FILE`, `dir:PATH`. Required.
    pub fn image(mut self, reference: impl Into<String>) -> Self {
        self.config.image.reference = reference.into();
        self
    }

    /// Number of vCPUs, 1 to 32. Default 1.
    pub fn cpus(mut self, count: u8) -> Self {
        self.config.cpus = count;
        self
    }

    /// Memory in MiB, 64 or more. Default 512; only what the guest touches is taken from the host.
    pub fn memory(mut self, mib: u32) -> Self {
        self.config.memory_mib = mib;
        self
    }

    /// Size of the sandbox's own disk in MiB, 16 or more. Default 4096; only what is written takes space.
    pub fn disk(mut self, mib: u32) -> Self {
        self.config.disk_mib = mib;
        self
    }

    /// Sets a variable of every command's environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.config.env.insert(name.into(), value.into());
        self
    }

    /// Where commands start. Default: as the image says, or `/`.
    pub fn workdir(mut self, path: impl Into<String>) -> Self {
        self.config.workdir = Some(path.into());
        self
    }

    /// Who runs commands: `name`, `uid`, `name:group` or `uid:gid`. Default: as the image says, or root.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.config.user = Some(user.into());
        self
    }

    /// The guest's host name. Default: made from the sandbox's name.
    pub fn hostname(mut self, hostname: impl Into<String>) -> Self {
        self.config.hostname = Some(hostname.into());
        self
    }

    /// What [`Sandbox::shell`] runs scripts with. Default `/bin/sh`.
    pub fn shell(mut self, path: impl Into<String>) -> Self {
        self.config.shell = Some(path.into());
        self
    }

    /// A mark of your own on the sandbox.
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.config.labels.insert(name.into(), value.into());
        self
    }

    /// Ends the sandbox so many seconds after its boot: no new commands, five seconds for those that run to
    /// finish, then as [`Sandbox::stop`] does. Default: never.
    pub fn max_duration(mut self, seconds: u64) -> Self {
        self.config.max_duration_s = Some(seconds);
        self
    }

    /// Ends the sandbox when nobody has used it for so many seconds. Default: never.
    pub fn idle_timeout(mut self, seconds: u64) -> Self {
        self.config.idle_timeout_s = Some(seconds);
        self
    }

    /// How many clients may be connected at once. Default 16.
    pub fn max_clients(mut self, count: u16) -> Self {
        self.config.max_clients = count;
        self
    }

    /// Removes the sandbox, disk and all, when it ends, whatever ends it. Who waits for its end at that moment,
    /// or asks for it within the next hour with a [`Sandbox`] from before, still learns how it ended. Default:
    /// it is kept until [`Sandbox::remove`].
    pub fn ephemeral(mut self, ephemeral: bool) -> Self {
        self.config.ephemeral = ephemeral;
        self
    }

    /// Whether what its commands and its console write is kept in a log ([`Sandbox::logs`]), at most 8 MiB of it beside
    /// its disk. Default: it is.
    pub fn logs(mut self, logs: bool) -> Self {
        self.config.logs = logs;
        self
    }

    /// Whom the sandbox may talk to. Default: public addresses, and neither this computer nor private networks. Without
    /// anybody ([`NetworkPolicy::none`] without rules) it has no network card. Everything else is refused at once.
    ///
    /// ```
    /// use cubbyhole::network::{NetworkPolicy, Rule};
    /// use cubbyhole::Sandbox;
    ///
    /// let policy = NetworkPolicy::none()
    ///     .rule(Rule::allow().name("pypi.org".parse()?).ports(443))
    ///     .rule(Rule::allow().name("*.pythonhosted.org".parse()?).ports(443));
    /// let builder = Sandbox::builder("worker").image("python:3.12").network(policy);
    /// # let _ = builder;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn network(mut self, policy: NetworkPolicy) -> Self {
        self.config.network = policy;
        self
    }

    /// How much the sandbox may send and receive in a second, from 1 Mbit/s to 1 Tbit/s. Default: as much as there is.
    pub fn bandwidth(mut self, bandwidth: Bandwidth) -> Self {
        self.config.bandwidth = bandwidth;
        self
    }

    /// Lets processes of the guest that connect to this vsock port of the host (CID 2) reach whoever listens at the Unix
    /// socket `path` of the host then. What the host sees of them is a connection of the user that runs the sandbox. Up to
    /// 64 ports, of which 1024 to 1039 are the sandbox's own; the other way round is [`Sandbox::connect_vsock`].
    ///
    /// A guest's connection is reset if nobody listens there.
    pub fn vsock_listen(mut self, port: u32, path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let path = std::path::absolute(&path).unwrap_or(path);
        self.config.vsock.push(VsockPort { port, path });
        self
    }

    /// Keeps a record of all frames of the guest in this file, in pcap's format, as tcpdump and Wireshark read it: 256 MiB
    /// at most, of the newest run. Frames of the guest's kernel may be up to 64 KiB long, with checksums that were not
    /// computed. A file that cannot be written fails the create.
    pub fn capture(mut self, path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        self.config.capture = Some(std::path::absolute(&path).unwrap_or(path));
        self
    }

    /// Lets a TCP port of this computer's `127.0.0.1` lead to one of the sandbox. Port 0 of this computer is one that is
    /// free, which [`Sandbox::ports`] tells. One that is taken fails the create with [`Error::PortUnavailable`].
    pub fn port(self, host: u16, guest: u16) -> Self {
        self.publish(Port::new(host, guest))
    }

    /// The same for UDP and for other addresses of this computer.
    ///
    /// ```
    /// use cubbyhole::{Port, Sandbox};
    ///
    /// let everybody = std::net::Ipv4Addr::UNSPECIFIED;
    /// let builder = Sandbox::builder("dns").image("dns").publish(Port::new(5353, 53).udp().on(everybody));
    /// # let _ = builder;
    /// ```
    pub fn publish(mut self, port: Port) -> Self {
        self.config.ports.push(port);
        self
    }

    /// Asks this server for names on the sandbox's behalf, and not whom `/etc/resolv.conf` of this computer names. Up to
    /// four.
    pub fn resolver(mut self, server: SocketAddr) -> Self {
        self.config.resolvers.push(server);
        self
    }

    /// The sandbox process's binary. Default: `CUBBY_RUNTIME`, beside this program, or on `PATH`.
    pub fn runtime(mut self, path: impl Into<PathBuf>) -> Self {
        self.config.runtime = Some(path.into());
        self
    }

    /// When to ask the registry. Default: when the image is not here yet.
    pub fn pull_policy(mut self, policy: PullPolicy) -> Self {
        self.pull_policy = policy;
        self
    }

    /// Creates the sandbox, attached: it stops when this process ends, however it ends.
    pub async fn create(self) -> R<Sandbox> {
        self.make(true, &|_| ()).await
    }

    /// Creates the sandbox so that it outlives this process: [`Sandbox::get`] finds it again.
    pub async fn create_detached(self) -> R<Sandbox> {
        self.make(false, &|_| ()).await
    }

    /// Like [`Self::create`], and tells what it is doing. The stream ends with the future.
    pub fn create_with_progress(
        self,
    ) -> (impl Stream<Item = Progress> + Unpin + Send, impl Future<Output = R<Sandbox>>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let create = async move {
            // Nobody has to listen.
            self.make(true, &move |progress| drop(sender.send(progress))).await
        };
        (UnboundedReceiverStream::new(receiver), create)
    }

    async fn make(mut self, attached: bool, report: Report<'_>) -> R<Sandbox> {
        let (name, reference) = self.check()?;
        let runtime = find_runtime(self.config.runtime.as_deref())?;
        let context = Context::open()?;
        let (image, hold) =
            pull_and_hold(&context, &reference, self.pull_policy, &|step| report(Progress::Image(step)))
                .await?;
        self.config.image = ImageSource {
            digest: Some(image.digest.to_string()),
            defaults: defaults(&image),
            ..self.config.image
        };
        let record =
            context.store.create(&name, &self.config).map_err(|error| Error::store(&self.name, error))?;
        // From here on the record keeps it.
        drop(hold);
        let spec = context.launch_spec(&record, image.disk, attached, BOOT_TIMEOUT_MS);
        let made = context.format_disk(&spec);
        match made {
            Ok(()) => bring_up(context, &runtime, spec, report).await,
            Err(error) => {
                context.give_up(&spec, "disk");
                Err(error)
            }
        }
    }

    /// Everything that can be said to be wrong before anything is done.
    fn check(&self) -> R<(SandboxName, Reference)> {
        let name = self.name.parse::<SandboxName>();
        let mut mistakes = self.config.validate().err().map(|invalid| invalid.0).unwrap_or_default();
        if name.is_err() {
            let given = shorten(&self.name);
            mistakes.insert(0, Mistake { field: "name", given, allowed: NAMES });
        }
        match name {
            Ok(name) if mistakes.is_empty() => Ok((name, self.config.image.reference.parse()?)),
            _ => Err(Error::InvalidConfig(mistakes)),
        }
    }
}

fn shorten(text: &str) -> String {
    let start: String = text.chars().take(64).collect();
    format!("{start:?}")
}

/// The image, and that it stays until somebody has written down that it is used.
async fn pull_and_hold(
    context: &Context,
    reference: &Reference,
    policy: PullPolicy,
    report: &(dyn Fn(cubby_image::Progress) + Send + Sync),
) -> R<(cubby_image::Image, cubby_image::Hold)> {
    loop {
        let image = pull(context, reference, policy, report).await?;
        let hold = context.images.hold()?;
        if context.images.image(&image.digest)?.is_some() {
            return Ok((image, hold));
        }
        // Somebody has removed it in this very moment.
    }
}

/// The image that `reference` stands for, fetched if `policy` asks for that.
pub(crate) async fn pull(
    context: &Context,
    reference: &Reference,
    policy: PullPolicy,
    report: &(dyn Fn(cubby_image::Progress) + Send + Sync),
) -> R<cubby_image::Image> {
    if policy != PullPolicy::Always
        && let Some(image) = context.images.find(reference)?
    {
        return Ok(image);
    }
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let options = PullOptions::default().on_progress(move |progress| drop(sender.send(progress)));
    let mut pull = std::pin::pin!(context.images.resolve(reference, policy, &options));
    loop {
        tokio::select! {
            // What was told before the end is passed on before it.
            biased;
            Some(progress) = receiver.recv() => report(progress),
            image = &mut pull => return Ok(image?),
        }
    }
}

fn defaults(image: &cubby_image::Image) -> ImageDefaults {
    let config = &image.config;
    let some = |text: &String| (!text.is_empty()).then(|| text.clone());
    ImageDefaults {
        env: config.env.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        user: some(&config.user),
        workdir: some(&config.workdir),
    }
}

/// Starts the sandbox process for a row that says Creating, and connects.
pub(crate) async fn bring_up(
    context: Context,
    runtime: &std::path::Path,
    spec: LaunchSpec,
    report: Report<'_>,
) -> R<Sandbox> {
    report(Progress::Booting);
    match launch(runtime, &spec).await {
        Ok(phases) => {
            report(Progress::Ready(phases.clone()));
            Sandbox::connected(context, spec.name, phases).await
        }
        Err(error) => {
            // The sandbox process has written how it ended, unless it could not even begin.
            context.give_up(&spec, "spawn");
            Err(error)
        }
    }
}
