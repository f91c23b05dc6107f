//! The connection to the sandbox process: it brings the configuration, the time and the order to stop, and takes
//! Ready. It begins non-blocking, so that the rest of the set-up can go on while the host accepts it, blocks during
//! the set-up, and does not block when the event loop has it. A peer that breaks the protocol counts as lost.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use cubby_protocol::message::{GuestConfig, SetClock, Shutdown};
use cubby_protocol::{
    CONTROL_PORT, Decoder, Frame, FrameError, Hello, Kind, SessionId, VersionMismatch, decode,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use crate::boot::identity;
use crate::output::Output;
use crate::sys::{self, VsockAddr};

/// The host's CID (virtio 1.2 §5.10.4).
pub const HOST_CID: u32 = 2;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A system call failed.
    #[error("{doing}: {errno}")]
    Io {
        /// Which.
        doing: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// The host closed the connection.
    #[error("the host closed the control connection")]
    Closed,
    /// The host sent something else.
    #[error("{0:?} frame where {1:?} was due")]
    Unexpected(Kind, Kind),
    /// The host's frames are not ours.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The host speaks another version.
    #[error(transparent)]
    Version(#[from] VersionMismatch),
}

fn io(doing: &'static str) -> impl Fn(Errno) -> ControlError {
    move |errno| ControlError::Io { doing, errno }
}

/// The control connection.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    decoder: Decoder,
    output: Output,
    readable: bool,
    lost: bool,
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Control {
    /// Begins to connect; [`Self::configuration`] waits for the end of it.
    pub fn begin() -> Result<Self, ControlError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None).map_err(io("vsock socket"))?;
        sys::connect_patiently(&socket).map_err(io("vsock connect time-out"))?;
        match connect(&socket, &VsockAddr { cid: HOST_CID, port: CONTROL_PORT }) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err(io("vsock connect")(errno)),
        }
        Ok(Self::new(socket))
    }

    fn new(socket: OwnedFd) -> Self {
        Self { socket, decoder: Decoder::default(), output: Output::default(), readable: false, lost: false }
    }

    /// Waits for the connection, exchanges greetings and reads the configuration.
    pub fn configuration(&mut self) -> Result<GuestConfig, ControlError> {
        let mut ready = [PollFd::new(&self.socket, PollFlags::OUT)];
        while let Err(errno) = poll(&mut ready, None) {
            if errno != Errno::INTR {
                return Err(io("poll")(errno));
            }
        }
        sockopt::socket_error(&self.socket).and_then(|error| error).map_err(io("vsock connect"))?;
        ioctl_fionbio(&self.socket, false).map_err(io("FIONBIO"))?;
        self.output.raw(&Hello::OURS.to_frame());
        self.output.flush(&self.socket).map_err(io("vsock write"))?;
        self.await_frame(Kind::Hello, Hello::from_payload)?.agree()?;
        self.await_frame(Kind::Configure, decode)
    }

    fn await_frame<T>(
        &mut self,
        kind: Kind,
        read: impl Fn(&[u8]) -> Result<T, FrameError>,
    ) -> Result<T, ControlError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                if frame.header.kind != kind {
                    return Err(ControlError::Unexpected(frame.header.kind, kind));
                }
                return Ok(read(frame.payload())?);
            }
            match rustix::io::read(&self.socket, self.decoder.space()) {
                Ok(0) => return Err(ControlError::Closed),
                Ok(count) => self.decoder.filled(count),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(io("vsock read")(errno)),
            }
        }
    }

    /// Sends a message during the set-up.
    pub fn say<M: serde::Serialize>(&mut self, kind: Kind, message: &M) {
        self.output.message(kind, SessionId::CONNECTION, message);
        // A host that is gone shows at the next read.
        let _ = self.output.flush(&self.socket);
    }

    /// Waits until the host closes the connection.
    pub fn wait_for_end(&mut self) {
        while matches!(rustix::io::read(&self.socket, self.decoder.space()), Ok(1..) | Err(Errno::INTR)) {
            self.decoder = Decoder::default();
        }
    }

    /// Hands the connection to the event loop: it does not block from now on.
    pub fn into_loop(self) -> Result<Self, Errno> {
        ioctl_fionbio(&self.socket, true)?;
        Ok(Self { readable: true, ..self })
    }

    /// An event came.
    pub fn on_event(&mut self) {
        self.readable = true;
    }

    /// Whether the host is gone.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Reads what the host wants; the grace period when it wants the guest to end.
    pub fn receive(&mut self) -> Option<Duration> {
        let mut grace = None;
        while self.readable {
            match rustix::io::read(&self.socket, self.decoder.space()) {
                Ok(0) => self.lost = true,
                Ok(count) => self.decoder.filled(count),
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => self.lost = true,
            }
            self.readable &= !self.lost;
        }
        loop {
            match self
                .decoder
                .next_frame()
                .and_then(|frame| frame.map(|frame| obey(frame, &mut self.output, &mut grace)).transpose())
            {
                Ok(Some(())) => {}
                Ok(None) => return grace,
                Err(_) => {
                    self.lost = true;
                    return grace;
                }
            }
        }
    }

    /// Writes what waits.
    pub fn send(&mut self) {
        self.lost |= self.output.flush(&self.socket).is_err();
    }

    /// Says that power-off follows, and waits until the host has it, for at most a second.
    pub fn announce_power_off(mut self) {
        let second = Duration::from_secs(1);
        self.output.message(Kind::PoweringOff, SessionId::CONNECTION, &());
        while let Ok(false) = self.output.flush(&self.socket) {
            let mut ready = [PollFd::new(&self.socket, PollFlags::OUT)];
            let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
            if !matches!(poll(&mut ready, Some(&limit)), Ok(1..)) {
                return;
            }
        }
        // The frame may still be in a queue of the guest's kernel. A lingering close returns when the host has
        // answered the end of the stream, which comes after the frame (virtio 1.2 §5.10.6.5).
        let _ = ioctl_fionbio(&self.socket, false);
        let _ = sockopt::set_socket_linger(&self.socket, Some(second));
    }
}

fn obey(frame: Frame<'_>, output: &mut Output, grace: &mut Option<Duration>) -> Result<(), FrameError> {
    match frame.header.kind {
        Kind::Ping => output.urgent(Kind::Pong, frame.header.session, frame.payload())?,
        Kind::Shutdown => {
            let shutdown: Shutdown = decode(frame.payload())?;
            *grace = Some(Duration::from_millis(shutdown.grace_ms.into()));
        }
        Kind::SetClock => {
            let clock: SetClock = decode(frame.payload())?;
            // A time that the kernel refuses leaves the clock as it is.
            let _ = identity::set_clock(clock.realtime_ns);
        }
        kind => return Err(FrameError::UnknownKind(kind as u8)),
    }
    Ok(())
}
