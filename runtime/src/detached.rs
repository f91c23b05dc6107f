//! Detached sessions: how a client lets one go, how others find it, and what is remembered of those that have ended.
//! `docs/adr/0014-detached-sessions.md` has the reasons.

use std::collections::VecDeque;

use cubby_protocol::message::{Credit, Fatal, Refused, Reply, SessionInfo, Signal, TtySize};
use cubby_protocol::{FrameError, Kind, SessionId, decode, encode};
use cubby_vmm::devices::vsock::Vsock;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::command::{Command, Overrun, ViewId};
use crate::relay::{ClientId, Relay};
use crate::upstream::Upstream;

/// Detached sessions that run, over all clients.
const MAX_DETACHED: usize = 256;

/// Ways into them, over all clients: each may hold some hundred KiB for a client that does not read.
const MAX_VIEWS: usize = 64;

/// Detached sessions that are remembered after their end, the newest.
const REMEMBERED: usize = 64;

/// Other sessions that are, for a client whose wish to detach one crosses its end.
const JUST_ENDED: usize = 16;

/// Sessions that are told of at once: so many always fit into a frame.
const TOLD: usize = 512;

/// Sessions that have ended, oldest first.
#[derive(Default)]
pub(crate) struct Ended(VecDeque<Box<Command>>);

impl Ended {
    pub(crate) fn remember(&mut self, command: Box<Command>) {
        let detached = command.is_detached();
        self.0.push_back(command);
        let most = if detached { REMEMBERED } else { JUST_ENDED };
        let alike = |command: &Command| command.is_detached() == detached;
        if self.0.iter().filter(|command| alike(command)).count() > most
            && let Some(oldest) = self.0.iter().position(|command| alike(command))
        {
            self.0.remove(oldest);
        }
    }

    /// Forgets what nobody can detach any more.
    pub(crate) fn forget(&mut self, gone: impl Fn(SessionId) -> bool) {
        self.0.retain(|command| command.is_detached() || !gone(command.session()));
    }

    fn find(&mut self, session: SessionId) -> Option<&mut Command> {
        self.0.iter_mut().find(|command| command.session() == session).map(|command| &mut **command)
    }
}

impl Relay {
    /// The session of this number, and whose stream it is on, if it has not ended.
    pub(crate) fn find(&mut self, session: SessionId) -> Option<(&mut Command, Option<ClientId>)> {
        // Looked for first, for the borrow ends with the search.
        let home = self.upstreams.iter_mut().find_map(|(id, up)| up.command(session).map(|_| *id));
        match home {
            Some(id) => Some((self.upstreams.get_mut(&id)?.command(session)?, home)),
            None => Some((self.ended.find(session)?, None)),
        }
    }

    /// What sessions there are, by their numbers: commands that run, and detached ones that have ended.
    pub(crate) fn list_sessions(&self) -> Vec<SessionInfo> {
        let running = self.upstreams.values().flat_map(Upstream::commands);
        let ended = self.ended.0.iter().map(|command| &**command).filter(|command| command.is_detached());
        let mut all: Vec<SessionInfo> = running.chain(ended).map(Command::info).collect();
        all.sort_by_key(|info| info.session);
        all.drain(..all.len().saturating_sub(TOLD));
        all
    }

    /// Lets a session of `client` go on without it.
    pub(crate) fn detach_session(&mut self, client: ClientId, session: SessionId) -> Reply {
        let detached: usize = self.upstreams.values().map(Upstream::detached).sum();
        if detached >= MAX_DETACHED {
            let max = u32::try_from(MAX_DETACHED).unwrap_or(u32::MAX);
            return Reply::Refused(Refused::TooManySessions { max });
        }
        if self.upstreams.get_mut(&client).is_some_and(|up| up.detach(session)) {
            self.wake(client);
            return Reply::Done;
        }
        let own = self.clients.get(&client).is_some_and(|client| client.numbers().allows(session.0));
        match self.ended.find(session).filter(|command| own && !command.is_detached()) {
            Some(command) => {
                command.detach();
                Reply::Done
            }
            None => Reply::Refused(Refused::NoSuchSession { session: session.0 }),
        }
    }

    /// A client wants to have the session `to`, under a number of its own.
    pub(crate) fn attach(&mut self, client: ClientId, session: SessionId, to: SessionId) {
        let views: usize = self.clients.values().map(|client| client.views.len()).sum();
        let refused = match self.find(to) {
            // This one is among them.
            Some((command, _)) if command.is_detached() && views <= MAX_VIEWS => {
                command.attach(ViewId { client, session });
                return;
            }
            Some((command, _)) if command.is_detached() => {
                Refused::TooManySessions { max: u32::try_from(MAX_VIEWS).unwrap_or(u32::MAX) }
            }
            Some((_, Some(_))) => Refused::NotDetached { session: to.0 },
            Some((_, None)) | None => Refused::NoSuchSession { session: to.0 },
        };
        if let Some(client) = self.clients.get_mut(&client) {
            client.refuse_session(session, &refused);
        }
    }

    /// A frame of a client for the session behind one of its views.
    pub(crate) fn on_view_frame(
        &mut self,
        client: ClientId,
        session: SessionId,
        kind: Kind,
        payload: &[u8],
        vsock: &mut Vsock,
    ) {
        let id = ViewId { client, session };
        let Some(to) = self.clients.get(&client).and_then(|client| client.views.get(&session)).copied()
        else {
            return;
        };
        let Some((command, home)) = self.find(to) else { return };
        let mut frame = Vec::new();
        let outcome = match kind {
            Kind::Stdin => command.on_input(id, payload).map_err(|Overrun| FrameError::Malformed {
                what: "Stdin",
                why: "it is more than the session's window allows".into(),
            }),
            Kind::StdinClose => {
                command.on_input_close();
                Ok(())
            }
            Kind::Credit => decode::<Credit>(payload).map(|credit| command.on_credit(id, credit.bytes)),
            // The agent would end the whole stream for a message that is none.
            Kind::Signal => again::<Signal>(kind, to, payload, &mut frame),
            Kind::Resize => again::<TtySize>(kind, to, payload, &mut frame),
            Kind::Abandon => {
                command.leave(id);
                Ok(())
            }
            kind => Err(FrameError::Malformed {
                what: "session frame",
                why: format!("{kind:?} is not for a session that runs a command"),
            }),
        };
        if let Some(up) = home.and_then(|home| self.upstreams.get_mut(&home)) {
            up.unsettle(to);
            // Who sends more of these than the guest takes is not heard.
            if up.flush(vsock) {
                up.forward(&frame, vsock);
            }
        }
        if let Some(home) = home {
            self.wake(home);
        }
        let Some(client) = self.clients.get_mut(&client) else { return };
        if kind == Kind::Abandon {
            client.views.remove(&session);
        }
        if let Err(error) = outcome {
            client.refuse(&Fatal::Protocol(error.to_string()));
        }
    }

    /// Sends a client what its views have to say. Whether they have more that it takes.
    pub(crate) fn serve(&mut self, id: ClientId) -> bool {
        let views = match self.clients.get(&id) {
            Some(client) if !client.views.is_empty() => client.views.clone(),
            _ => return false,
        };
        let mut more = false;
        for (session, to) in views {
            let home = self.upstreams.iter_mut().find_map(|(id, up)| up.command(to).map(|_| *id));
            let Some(client) = self.clients.get_mut(&id) else { return false };
            let boundary = self.upstreams.get(&id).is_none_or(Upstream::at_boundary);
            let command = match home {
                Some(home) => self.upstreams.get_mut(&home).and_then(|up| up.command(to)),
                None => self.ended.find(to),
            };
            let Some(command) = command else {
                client.refuse_session(session, &Refused::NoSuchSession { session: to.0 });
                continue;
            };
            let (said, has_more) = client.show(session, command, id, boundary);
            more |= has_more;
            // What was sent makes room for more. Who has said nothing wakes nobody, or two could wake each other for ever.
            if let Some(home) = home.filter(|_| said) {
                if let Some(up) = self.upstreams.get_mut(&home) {
                    up.unsettle(to);
                }
                self.wake(home);
            }
        }
        more
    }

    /// Takes the views of a client that is gone.
    pub(crate) fn leave(
        &mut self,
        client: ClientId,
        views: impl IntoIterator<Item = (SessionId, SessionId)>,
    ) {
        for (session, to) in views {
            let Some((command, home)) = self.find(to) else { continue };
            command.leave(ViewId { client, session });
            if let Some(home) = home {
                if let Some(up) = self.upstreams.get_mut(&home) {
                    up.unsettle(to);
                }
                self.wake(home);
            }
        }
    }
}

/// The same message under another number, if it is one.
fn again<M: Serialize + DeserializeOwned>(
    kind: Kind,
    session: SessionId,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), FrameError> {
    encode(kind, session, &decode::<M>(payload)?, out)
}
