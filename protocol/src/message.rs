//! What the payloads mean: one type for each [`crate::Kind`] that carries a message.
//!
//! Strings are UTF-8 on the wire as bincode writes them (length, bytes). Sizes are bytes and times are what
//! their field's name says. Enumerations only grow at the end, with a new protocol version.

mod events;
mod files;
mod metrics;
mod network;
mod network_rules;
mod sessions;

use serde::{Deserialize, Serialize};

pub use events::*;
pub use files::{
    FileAttributes, FileDone, FileEntries, FileEntry, FileFailed, FileHole, FileMetadata, FileRequest,
    FileTime, PathBytes, WriteHow,
};
pub use metrics::*;
pub use network::{Network, Subnet};
pub use network_rules::*;
pub use sessions::{Attach, SessionEnd, SessionInfo, Welcome};

/// Payload of [`crate::Kind::Fatal`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fatal {
    /// The peer's protocol version is not the sender's.
    VersionMismatch {
        /// The sender's.
        ours: u16,
    },
    /// The peer broke a rule of the protocol.
    Protocol(String),
    /// Every place for a client is taken.
    TooManyClients {
        /// How many there are.
        max: u16,
    },
}

/// Payload of [`crate::Kind::Configure`]: all that a guest learns about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Host name, at most 64 bytes.
    pub hostname: String,
    /// The wall clock: nanoseconds since the Unix epoch.
    pub realtime_ns: u64,
    /// Fresh random bytes for the kernel's pool.
    pub entropy: [u8; 32],
    /// What every command finds in its environment unless it says otherwise.
    pub env: Vec<(String, String)>,
    /// Where commands start unless they say otherwise; empty means `/`.
    pub workdir: String,
    /// Who runs commands unless they say otherwise, as in an image's `USER`; empty means root.
    pub user: String,
    /// Name servers for `/etc/resolv.conf`, as addresses.
    pub nameservers: Vec<String>,
    /// The root file system.
    pub root: RootDisks,
    /// The network card; without one the guest has its loopback interface alone.
    pub network: Option<Network>,
}

/// The root file system: a read-only image below, the sandbox's own disk above it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootDisks {
    /// Block device with the image, EROFS: `/dev/vda`.
    pub image: String,
    /// Block device with the sandbox's own disk, ext4; without one, changes live in memory.
    pub disk: Option<String>,
}

/// Payload of [`crate::Kind::Ready`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReady {
    /// `uname -r` of the guest.
    pub kernel: String,
    /// The agent's version.
    pub agent: String,
}

/// Payload of [`crate::Kind::SetupFailed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupFailed {
    /// What the agent was doing.
    pub stage: SetupStage,
    /// What the kernel said, with the path concerned.
    pub message: String,
}

/// The agent's steps between its first instruction and Ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SetupStage {
    /// `/proc`, `/sys`, `/dev`, cgroups.
    PseudoFilesystems,
    /// The control connection and its first frames.
    Control,
    /// Mounting the image.
    ImageDisk,
    /// Mounting the sandbox's own disk.
    WritableDisk,
    /// The overlay, and making it the root.
    Root,
    /// Host name, clock, random pool, `/etc` files.
    Identity,
    /// Addresses and routes.
    Network,
    /// Accepting clients.
    Listen,
}

impl SetupStage {
    /// The stage in words, as `BootFailed` reports it.
    pub fn name(self) -> &'static str {
        match self {
            Self::PseudoFilesystems => "pseudo-filesystems",
            Self::Control => "control-connection",
            Self::ImageDisk => "image-disk",
            Self::WritableDisk => "writable-disk",
            Self::Root => "root",
            Self::Identity => "identity",
            Self::Network => "network",
            Self::Listen => "listen",
        }
    }
}

/// Payload of [`crate::Kind::Shutdown`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    /// How long processes have between TERM and KILL, in milliseconds.
    pub grace_ms: u32,
}

/// Payload of [`crate::Kind::SetClock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetClock {
    /// Nanoseconds since the Unix epoch.
    pub realtime_ns: u64,
}

/// A byte written to [`crate::MARK_IO_PORT`]: how far the guest has come, seen by the VMM without any driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// The agent's first instructions.
    AgentStarted = 1,
    /// The control connection is up and the configuration was read.
    Configured = 2,
    /// The root file system is in place.
    RootMounted = 3,
    /// Ready is on its way.
    Ready = 4,
    /// Disks are synced; the VM may go. The VMM ends the VM at this write.
    PowerOff = 5,
}

impl Mark {
    /// The step that the mark ends, in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::AgentStarted => "kernel",
            Self::Configured => "configuration",
            Self::RootMounted => "root",
            Self::Ready => "agent",
            Self::PowerOff => "power-off",
        }
    }
}

impl TryFrom<u8> for Mark {
    type Error = u8;
    fn try_from(byte: u8) -> Result<Self, u8> {
        Ok(match byte {
            1 => Self::AgentStarted,
            2 => Self::Configured,
            3 => Self::RootMounted,
            4 => Self::Ready,
            5 => Self::PowerOff,
            _ => return Err(byte),
        })
    }
}

/// Payload of [`crate::Kind::Request`]: what an application asks of the sandbox process itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// What state the sandbox is in.
    Status,
    /// Stop every vCPU.
    Pause,
    /// Let them go on.
    Resume,
    /// Refuse new sessions, let the others finish, then stop.
    Drain {
        /// End what is left after so many milliseconds.
        deadline_ms: Option<u64>,
    },
    /// End every process and power off; after the time-out, kill.
    Stop {
        /// In milliseconds.
        timeout_ms: u64,
    },
    /// End the VM now.
    Kill,
    /// Outlive the application.
    Detach,
    /// Count as activity.
    Touch,
    /// Which sessions there are.
    Sessions,
    /// Let a session of this connection go on without it; what it sends after the answer is nobody's or who attaches.
    DetachSession {
        /// Its number.
        session: u32,
    },
    /// Put other rules in force for the network, now and for later runs.
    SetNetwork {
        /// The policy as JSON, at most [`MAX_POLICY`] bytes.
        policy: String,
    },
    /// What went through the network.
    NetworkCounters,
}

/// Payload of [`crate::Kind::Reply`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// Answers [`Request::Status`].
    Status(SandboxStatus),
    /// Not possible now.
    Refused(Refused),
    /// Tried, and failed.
    Failed(String),
    /// Answers [`Request::Sessions`], in the order of their numbers.
    Sessions(Vec<SessionInfo>),
    /// Answers [`Request::NetworkCounters`]; nothing of a sandbox without a network card.
    NetworkCounters(Option<Box<NetworkCounters>>),
}

/// The sandbox process's own view of its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxStatus {
    /// The state's name, as the state machine spells it.
    pub state: String,
    /// Open sessions over all clients.
    pub sessions: u32,
    /// Connected clients.
    pub clients: u16,
}

/// Payload of [`crate::Kind::Refused`]: why nobody took a session or a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refused {
    /// The sandbox is draining.
    Draining,
    /// The state does not allow it.
    InvalidState {
        /// The state's name.
        state: String,
        /// What was asked for.
        operation: String,
    },
    /// The session's number is in use on this connection.
    SessionInUse,
    /// The agent has as many sessions as it takes.
    TooManySessions {
        /// How many that is.
        max: u32,
    },
    /// There is no session of this number, or none that is remembered.
    NoSuchSession {
        /// The number.
        session: u32,
    },
    /// The session belongs to the connection that opened it.
    NotDetached {
        /// Its number.
        session: u32,
    },
    /// The guest sent more than the session's window allows.
    Overrun,
    /// The guest was booted without a network card.
    NoNetwork,
}

/// Payload of [`crate::Kind::Open`]: a command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// A path, or a name to look up in the command's `PATH`.
    pub program: String,
    /// Arguments, without the program.
    pub args: Vec<String>,
    /// Added to the guest's environment, the last of a name wins.
    pub env: Vec<(String, String)>,
    /// Working directory; the guest's default without one.
    pub cwd: Option<String>,
    /// `name`, `uid`, `name:group` or `uid:gid`; the guest's default without one.
    pub user: Option<String>,
    /// A terminal of this size for all three streams.
    pub tty: Option<TtySize>,
    /// Whether standard input comes from the client; else it is `/dev/null`.
    pub stdin: bool,
    /// Resource limits to set.
    pub rlimits: Vec<Rlimit>,
    /// TERM and then KILL to the command's process group after so many milliseconds.
    pub timeout_ms: Option<u64>,
}

/// A terminal's size in characters. Also the payload of [`crate::Kind::Resize`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
}

/// One resource limit, as `setrlimit(2)` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// The `RLIMIT_` number of Linux on x86_64.
    pub resource: u8,
    /// Soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}

/// Payload of [`crate::Kind::Started`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Process id in the guest.
    pub pid: u32,
}

/// Payload of [`crate::Kind::Exited`]: how a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exited {
    /// It called `exit`.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// The kernel killed it for memory.
    OutOfMemory,
    /// Its time-out ran out and it was ended.
    TimedOut,
}

/// Payload of [`crate::Kind::Failed`]: why a command did not run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecFailed {
    /// Which step said no.
    pub kind: ExecFailure,
    /// The guest kernel's error number, 0 if it was not asked.
    pub errno: i32,
    /// The path, user or resource concerned.
    pub subject: String,
}

/// The steps between a request and a running command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ExecFailure {
    /// No such program.
    NotFound,
    /// The program may not be executed.
    NotExecutable,
    /// The kernel does not know the program's format.
    BadFormat,
    /// The working directory cannot be entered.
    BadWorkdir,
    /// The user or group does not exist.
    UnknownUser,
    /// The guest has too many processes.
    TooManyProcesses,
    /// The guest has no memory for it.
    OutOfMemory,
    /// A resource limit was refused.
    BadLimit,
    /// Any other step.
    Other,
}

/// Payload of [`crate::Kind::Signal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signal {
    /// The signal's number.
    pub number: i32,
}

/// Payload of [`crate::Kind::Credit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// So many more bytes may be sent.
    pub bytes: u32,
}
