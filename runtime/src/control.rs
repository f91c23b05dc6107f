//! The agent's control connection: one vsock stream on which the guest is configured, says that it is
//! ready, and announces its power-off.

use cubby_protocol::message::{GuestConfig, GuestReady, SetClock, SetupFailed, Shutdown};
use cubby_protocol::{Decoder, Frame, FrameError, Header, Hello, Kind, SessionId, decode, encode};
use cubby_vmm::devices::vsock::{StreamId, Vsock};
use serde::Serialize;

use crate::machine;

/// What the agent said.
#[derive(Debug)]
pub(crate) enum Said {
    /// Sessions may be opened.
    Ready,
    /// The guest cannot be set up.
    SetupFailed(SetupFailed),
    /// Disks are synced and the power-off mark follows.
    PoweringOff,
}

/// The connection, if the agent has opened it.
pub(crate) struct Control {
    config: GuestConfig,
    stream: Option<StreamId>,
    greeted: bool,
    decoder: Decoder,
    out: Vec<u8>,
}

impl Control {
    /// Waits for an agent, which gets `config`.
    pub(crate) fn new(config: GuestConfig) -> Self {
        Self { config, stream: None, greeted: false, decoder: Decoder::default(), out: Vec::new() }
    }

    pub(crate) fn is(&self, id: StreamId) -> bool {
        self.stream == Some(id)
    }

    /// The agent connected. A second connection is refused: the first one is PID 1's.
    ///
    /// # Errors
    /// [`FrameError::DoesNotFit`] for a configuration that is too large.
    pub(crate) fn accept(&mut self, id: StreamId, vsock: &mut Vsock) -> Result<(), FrameError> {
        if self.stream.is_some() {
            vsock.reset(id);
            return Ok(());
        }
        self.stream = Some(id);
        self.out.extend_from_slice(&Hello::OURS.to_frame());
        // The time of this moment, and not of the one in which the boot began.
        let config = GuestConfig { realtime_ns: machine::realtime_ns(), ..std::mem::take(&mut self.config) };
        encode(Kind::Configure, SessionId::CONNECTION, &config, &mut self.out)?;
        self.flush(vsock);
        Ok(())
    }

    pub(crate) fn shut_down(&mut self, grace_ms: u32, vsock: &mut Vsock) {
        self.send(Kind::Shutdown, &Shutdown { grace_ms }, vsock);
    }

    pub(crate) fn set_clock(&mut self, realtime_ns: u64, vsock: &mut Vsock) {
        self.send(Kind::SetClock, &SetClock { realtime_ns }, vsock);
    }

    fn send(&mut self, kind: Kind, message: &impl Serialize, vsock: &mut Vsock) {
        // A few bytes always fit.
        let _ = encode(kind, SessionId::CONNECTION, message, &mut self.out);
        self.flush(vsock);
    }

    /// Sends what waits for room.
    pub(crate) fn flush(&mut self, vsock: &mut Vsock) {
        if let Some(id) = self.stream {
            let sent = vsock.send(id, &self.out);
            self.out.drain(..sent);
        }
    }

    /// The next thing that the agent said, if a whole frame of it has come.
    pub(crate) fn next(&mut self, vsock: &mut Vsock) -> Result<Option<Said>, FrameError> {
        let Some(id) = self.stream else { return Ok(None) };
        loop {
            let bytes = vsock.received(id);
            let count = bytes.len();
            self.decoder.push(bytes);
            vsock.consume(id, count);
            let Some(frame) = self.decoder.next_frame()? else {
                if count == 0 {
                    return Ok(None);
                }
                continue;
            };
            let Frame { header: Header { kind, .. }, .. } = frame;
            let payload = frame.payload();
            if !self.greeted {
                Hello::from_payload(payload)?
                    .agree()
                    .map_err(|error| FrameError::Malformed { what: "Hello", why: error.to_string() })?;
                self.greeted = true;
                continue;
            }
            return Ok(Some(match kind {
                Kind::Ready => decode::<GuestReady>(payload).map(|_| Said::Ready)?,
                Kind::SetupFailed => Said::SetupFailed(decode(payload)?),
                Kind::PoweringOff => Said::PoweringOff,
                kind => {
                    let why = format!("{kind:?} is not the agent's to send here");
                    return Err(FrameError::Malformed { what: "control frame", why });
                }
            }));
        }
    }
}
