//! From the kernel's first process to a guest that takes sessions, in the order that is quickest: the connection
//! to the host is begun first and answered while the kernel's file systems are mounted.

pub mod identity;
pub mod mark;
mod mounts;
mod network;
mod root;
mod rtnetlink;

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use cubby_protocol::message::{EVENT_SOCKET, GuestReady, Mark, SetupFailed, SetupStage};
use cubby_protocol::{AGENT_PORT, Kind};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::process::{Resource, Rlimit, setrlimit};

use self::mark::Marks;
use crate::control::{Control, HOST_CID};
use crate::events;
use crate::power;
use crate::server::{Peers, Server};
use crate::sys::VsockAddr;

/// Open files that the agent may have, and that its commands may say that they want.
const OPEN_FILES: u64 = 1 << 20;

/// `VMADDR_CID_ANY` (vsock(7)).
const ANY_CID: u32 = u32::MAX;

/// A step that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {errno}")]
pub struct SetupError {
    /// The path, device or object concerned.
    pub what: String,
    /// What the kernel said.
    pub errno: Errno,
}

/// What an error is about, in words.
trait Subject {
    fn words(&self) -> String;
}

impl Subject for CStr {
    fn words(&self) -> String {
        self.to_string_lossy().into_owned()
    }
}

impl Subject for str {
    fn words(&self) -> String {
        self.to_owned()
    }
}

fn at<S: Subject + ?Sized>(what: &S) -> impl Fn(Errno) -> SetupError {
    move |errno| SetupError { what: what.words(), errno }
}

/// A stage that failed, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", stage.name())]
pub struct Failed {
    stage: SetupStage,
    message: String,
}

trait Stage<T> {
    fn stage(self, stage: SetupStage) -> Result<T, Failed>;
}

impl<T, E: std::fmt::Display> Stage<T> for Result<T, E> {
    fn stage(self, stage: SetupStage) -> Result<T, Failed> {
        self.map_err(|error| Failed { stage, message: error.to_string() })
    }
}

/// Runs the guest from its first process to its end.
pub fn run() -> ! {
    let devices = mounts::devices().stage(SetupStage::PseudoFilesystems);
    let marks = Marks::open();
    marks.set(Mark::AgentStarted);
    let (mut control, pseudo) = match Control::begin().stage(SetupStage::Control) {
        Ok(control) => {
            (control, devices.and_then(|()| mounts::pseudo().stage(SetupStage::PseudoFilesystems)))
        }
        Err(failed) => alone(&failed),
    };
    match pseudo.and_then(|()| set_up(&mut control, &marks)) {
        Ok(server) => serve(server, control, &marks),
        Err(failed) => give_up(control, failed, &marks),
    }
}

fn set_up(control: &mut Control, marks: &Marks) -> Result<Server, Failed> {
    let config = control.configuration().stage(SetupStage::Control)?;
    marks.set(Mark::Configured);
    identity::moment(&config).stage(SetupStage::Identity)?;
    root::enter(&config.root)?;
    marks.set(Mark::RootMounted);
    identity::name(&config).stage(SetupStage::Identity)?;
    network::set_up(config.network.as_ref()).stage(SetupStage::Network)?;
    let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    setrlimit(Resource::Nofile, limit).stage(SetupStage::Listen)?;
    let mut server = listener()
        .and_then(|listener| Server::new(listener, Peers::Cid(HOST_CID), config))
        .stage(SetupStage::Listen)?;
    // An image may have something else in that place: its guest goes without events.
    if let Err(errno) = events::listener(EVENT_SOCKET).and_then(|socket| server.exchange_events(socket)) {
        eprintln!("cubby-agent: no events, {EVENT_SOCKET}: {errno}");
    }
    Ok(server)
}

fn listener() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    bind(&socket, &VsockAddr { cid: ANY_CID, port: AGENT_PORT })?;
    listen(&socket, 32)?;
    Ok(socket)
}

fn serve(mut server: Server, mut control: Control, marks: &Marks) -> ! {
    let uname = rustix::system::uname();
    let ready = GuestReady {
        kernel: uname.release().to_string_lossy().into_owned(),
        agent: env!("CARGO_PKG_VERSION").into(),
    };
    marks.set(Mark::Ready);
    control.say(Kind::Ready, &ready);
    let end = control.into_loop().and_then(|control| server.obey(control)).and_then(|()| server.run());
    let control = end.unwrap_or_else(|errno| {
        eprintln!("cubby-agent: event loop: {errno}");
        None
    });
    power::off(control, marks)
}

/// Tells the host why there will be no guest, and waits to be ended.
fn give_up(mut control: Control, failed: Failed, marks: &Marks) -> ! {
    eprintln!("cubby-agent: {failed}");
    control.say(Kind::SetupFailed, &SetupFailed { stage: failed.stage, message: failed.message });
    control.wait_for_end();
    power::off(None, marks)
}

/// There is no connection to tell it on; the console and an unannounced power-off have to do.
fn alone(failed: &Failed) -> ! {
    eprintln!("cubby-agent: {failed}");
    power::halt()
}
