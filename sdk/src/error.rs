//! Everything that can go wrong, as values to match on. Each says what was asked, what stood in the way and
//! what to do about it.

use std::path::PathBuf;

use cubby_protocol::message::{self, Refused};
use cubby_protocol::{FrameError, Kind};
use cubby_state::{ExitReport, Status};

use crate::connection::ConnectionError;

/// The result of everything in this crate.
pub type R<T> = Result<T, Error>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No sandbox has this name.
    #[error("there is no sandbox named {name:?}: Sandbox::list() tells which there are")]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// A sandbox of this name exists.
    #[error("a sandbox named {name:?} exists: use Sandbox::get or Sandbox::start, or remove it first")]
    AlreadyExists {
        /// What was asked for.
        name: String,
    },
    /// The sandbox's state does not allow the operation.
    #[error("cannot {operation} sandbox {name:?}: it is {state}")]
    InvalidState {
        /// The sandbox.
        name: String,
        /// Its state.
        state: String,
        /// What was asked for.
        operation: String,
    },
    /// The sandbox finishes what it has and takes nothing new.
    #[error("sandbox {name:?} is draining and takes no new commands: use another sandbox")]
    Draining {
        /// The sandbox.
        name: String,
    },
    /// Every place for a client is taken.
    #[error(
        "sandbox {name:?} has {max} clients, which is all it takes: share one connection, or raise max_clients"
    )]
    TooManyClients {
        /// The sandbox.
        name: String,
        /// How many there may be.
        max: u16,
    },
    /// A port that the sandbox is to publish cannot be had.
    #[error("sandbox {name:?} cannot publish {address}: {why}")]
    PortUnavailable {
        /// The sandbox.
        name: String,
        /// Where it was to listen.
        address: std::net::SocketAddr,
        /// What stood in the way, and what to do.
        why: String,
    },
    /// The sandbox was booted without a network card, which it can get by a boot alone.
    #[error(
        "cannot {operation} sandbox {name:?}: it was booted without a network; stop it, set another policy, and start it"
    )]
    NoNetwork {
        /// The sandbox.
        name: String,
        /// What was asked for.
        operation: String,
    },
    /// A vsock port of the guest cannot be reached.
    #[error("cannot connect to vsock port {port} of sandbox {name:?}: {why}")]
    VsockUnreachable {
        /// The sandbox.
        name: String,
        /// The port.
        port: u32,
        /// What stood in the way.
        why: String,
    },
    /// The sandbox ended while something was in progress, whose outcome is not known.
    #[error("sandbox {name:?} ended during {operation}: {reason}; Sandbox::start boots it again with its disk", reason = report.reason)]
    Ended {
        /// The sandbox.
        name: String,
        /// What was in progress.
        operation: String,
        /// How it ended.
        report: ExitReport,
    },
    /// This host cannot run virtual machines.
    #[error("this host cannot run virtual machines: {why}; {remedy}")]
    HostUnsupported {
        /// What stood in the way.
        why: String,
        /// What to do about it.
        remedy: String,
    },
    /// The guest did not come up.
    #[error("sandbox {name:?} did not boot: {message} (stage: {stage})")]
    BootFailed {
        /// The sandbox.
        name: String,
        /// How far it came.
        stage: String,
        /// What went wrong there.
        message: String,
        /// The end of what the guest wrote to its console, if it wrote anything.
        console_tail: Option<String>,
    },
    /// The command could not run, or was killed for memory.
    #[error("cannot run {program:?}: {kind}{}", subject_of(.subject, *.errno))]
    ExecFailed {
        /// The program.
        program: String,
        /// Which step said no.
        kind: ExecErrorKind,
        /// The guest kernel's error number; 0 if it was not asked.
        errno: i32,
        /// The path, user or resource concerned.
        subject: String,
    },
    /// The time given for it was not enough.
    #[error("{what} took longer than its time-out allows and was ended")]
    Timeout {
        /// What was waited for.
        what: String,
    },
    /// The command has ended already.
    #[error("{program:?} has ended")]
    ExecEnded {
        /// The program.
        program: String,
    },
    /// No session has this number, or none that is remembered.
    #[error("sandbox {name:?} has no session {session}: Sandbox::sessions() tells which there are")]
    NoSuchSession {
        /// The sandbox.
        name: String,
        /// What was asked for.
        session: u32,
    },
    /// The session belongs to the program that started it.
    #[error(
        "session {session} of sandbox {name:?} was not detached: the program that started it has to let it go first"
    )]
    NotDetached {
        /// The sandbox.
        name: String,
        /// The session.
        session: u32,
    },
    /// The command can take no more input before its output is read.
    #[error(
        "the command waits for its output to be taken: read it, then write the rest ({written} bytes were written)"
    )]
    OutputFull {
        /// How many bytes of the call were written.
        written: usize,
    },
    /// Output is not text.
    #[error("{what} is not UTF-8 after byte {valid_up_to}: take its bytes instead")]
    NotUtf8 {
        /// Which output.
        what: &'static str,
        /// How far it is text.
        valid_up_to: usize,
    },
    /// An event cannot be written as JSON, or is too long.
    #[error("event {event:?} cannot be emitted: {why}")]
    BadEvent {
        /// The event's name.
        event: String,
        /// What is wrong with it.
        why: EventFault,
    },
    /// The image cannot be had.
    #[error(transparent)]
    Image(#[from] cubby_image::Error),
    /// The image that the sandbox was created from is not in the store any more.
    #[error(
        "sandbox {name:?} was created from image {reference}, which is gone from the store: remove the sandbox and create it again"
    )]
    ImageGone {
        /// The sandbox.
        name: String,
        /// The image.
        reference: String,
    },
    /// No image, or more than one, is meant by this.
    #[error("no image here is {image:?}, or several are: Image::list() tells which there are")]
    ImageNotFound {
        /// What was asked for.
        image: String,
    },
    /// Sandboxes were created from the image, and need it whenever they boot.
    #[error("image {image:?} is used by {}: remove them first", .sandboxes.join(", "))]
    ImageInUse {
        /// What was asked for.
        image: String,
        /// The sandboxes.
        sandboxes: Vec<String>,
    },
    /// The configuration has mistakes: all of them are here.
    #[error("the configuration has {} mistakes: {}", .0.len(), list(.0))]
    InvalidConfig(Vec<cubby_state::Mistake>),
    /// The sandbox process is of another version.
    #[error(
        "sandbox process speaks protocol {theirs}, we speak {ours}: stop the sandbox with the program that started it, or install matching versions"
    )]
    ProtocolMismatch {
        /// Our protocol version.
        ours: u16,
        /// The sandbox process's.
        theirs: u16,
    },
    /// No sandbox process binary was found.
    #[error("there is no cubby-sandbox: looked at {}; install one (cargo xtask install) and name it with CUBBY_RUNTIME or put it on PATH", places(.looked_at))]
    RuntimeNotFound {
        /// Where it was looked for.
        looked_at: Vec<PathBuf>,
    },
    /// The sandbox process could not be started or spoken to.
    #[error("sandbox process of {name:?}: {why}")]
    Process {
        /// The sandbox.
        name: String,
        /// What went wrong.
        why: String,
    },
    /// The store of sandboxes.
    #[error(transparent)]
    Store(#[from] cubby_state::StoreError),
    /// The guest's kernel has refused something about a file.
    #[error("cannot {operation} {path:?} in the sandbox: {}", std::io::Error::from_raw_os_error(*errno))]
    Fs {
        /// What was asked for.
        operation: &'static str,
        /// The path that it was refused for.
        path: PathBuf,
        /// The error number that Linux has for it: 2 is ENOENT, as in `errno(3)`.
        errno: i32,
    },
    /// The guest's agent has named a file in a way that no kernel does.
    #[error(
        "the sandbox lists {name:?} as a name in {directory:?}, which is none: something in there is up to no good"
    )]
    BadFileName {
        /// Where.
        directory: PathBuf,
        /// What it said.
        name: std::ffi::OsString,
    },
    /// A tar archive cannot be unpacked or written ([`Fs::unpack`](crate::Fs::unpack), [`Fs::pack`](crate::Fs::pack)).
    #[error("cannot use the tar archive")]
    Archive {
        /// What is wrong with it (`InvalidData`), or why it cannot be read or written.
        source: std::io::Error,
    },
    /// A file of the sandbox, or one of this computer that is copied.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// Why an event cannot be emitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EventFault {
    /// It is too long.
    #[error(
        "it takes {size} bytes as JSON and may have {max}: write what is large to a file and tell its name"
    )]
    TooLong {
        /// Its size in bytes, name included.
        size: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// Its name is empty or too long.
    #[error("a name has 1 to {max} bytes")]
    Name {
        /// The limit in bytes.
        max: usize,
    },
    /// JSON has no such value.
    #[error("its data is no JSON: {0}")]
    NotJson(String),
}

/// Which step between a request and a running command said no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExecErrorKind {
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
    /// There was no memory to start it.
    OutOfMemory,
    /// It ran and the kernel killed it for memory.
    KilledForMemory,
    /// A resource limit was refused.
    BadLimit,
    /// Any other step.
    Other,
}

impl std::fmt::Display for ExecErrorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotFound => "no such program",
            Self::NotExecutable => "it may not be executed",
            Self::BadFormat => "not a program that this kernel can run",
            Self::BadWorkdir => "its working directory cannot be entered",
            Self::UnknownUser => "no such user",
            Self::TooManyProcesses => "the guest has too many processes",
            Self::OutOfMemory => "the guest has no memory to start it",
            Self::KilledForMemory => "the guest ran out of memory and killed it: give the sandbox more",
            Self::BadLimit => "a resource limit was refused",
            Self::Other => "the guest could not start it",
        })
    }
}

impl From<message::ExecFailure> for ExecErrorKind {
    fn from(failure: message::ExecFailure) -> Self {
        use message::ExecFailure as F;
        match failure {
            F::NotFound => Self::NotFound,
            F::NotExecutable => Self::NotExecutable,
            F::BadFormat => Self::BadFormat,
            F::BadWorkdir => Self::BadWorkdir,
            F::UnknownUser => Self::UnknownUser,
            F::TooManyProcesses => Self::TooManyProcesses,
            F::OutOfMemory => Self::OutOfMemory,
            F::BadLimit => Self::BadLimit,
            F::Other => Self::Other,
        }
    }
}

fn subject_of(subject: &str, errno: i32) -> String {
    let reason = match errno {
        0 => String::new(),
        errno => format!(": {}", std::io::Error::from_raw_os_error(errno)),
    };
    if subject.is_empty() { reason } else { format!(" ({subject}){reason}") }
}

fn list(mistakes: &[cubby_state::Mistake]) -> String {
    mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn places(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl Error {
    pub(crate) fn connection(name: &str, error: ConnectionError) -> Self {
        match error {
            ConnectionError::Version { ours, theirs } => Self::ProtocolMismatch { ours, theirs },
            ConnectionError::TooManyClients { max } => Self::TooManyClients { name: name.into(), max },
            error => Self::Process { name: name.into(), why: error.to_string() },
        }
    }

    pub(crate) fn refused(name: &str, operation: &str, refused: Refused) -> Self {
        let name = name.to_owned();
        match refused {
            Refused::Draining => Self::Draining { name },
            // What the relay has refused is a session; whoever wanted one knows what for.
            Refused::InvalidState { state, .. } => {
                Self::InvalidState { name, state, operation: operation.into() }
            }
            Refused::SessionInUse => {
                Self::Process { name, why: format!("{operation}: the session's number is in use") }
            }
            Refused::TooManySessions { max } => {
                Self::Process { name, why: format!("{operation}: {max} sessions run, which is all it takes") }
            }
            Refused::NoSuchSession { session } => Self::NoSuchSession { name, session },
            Refused::NotDetached { session } => Self::NotDetached { name, session },
            Refused::NoNetwork => Self::NoNetwork { name, operation: operation.into() },
            Refused::Overrun => Self::Process {
                name,
                why: format!("{operation}: the guest sent more than the session's window"),
            },
        }
    }

    pub(crate) fn invalid_state(name: &str, state: Status, operation: &str) -> Self {
        Self::InvalidState { name: name.into(), state: state.to_string(), operation: operation.into() }
    }

    pub(crate) fn exec_failed(program: &str, failed: message::ExecFailed) -> Self {
        Self::ExecFailed {
            program: program.into(),
            kind: failed.kind.into(),
            errno: failed.errno,
            subject: failed.subject,
        }
    }

    pub(crate) fn killed_for_memory(program: &str) -> Self {
        Self::ExecFailed {
            program: program.into(),
            kind: ExecErrorKind::KilledForMemory,
            errno: 0,
            subject: String::new(),
        }
    }

    pub(crate) fn unexpected(kind: Kind) -> Self {
        FrameError::Malformed { what: "session frame", why: format!("{kind:?} has no place here") }.into()
    }
}

impl From<FrameError> for Error {
    fn from(error: FrameError) -> Self {
        Self::Process { name: String::new(), why: error.to_string() }
    }
}
