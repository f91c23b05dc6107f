//! One question on its way through the host's resolvers.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::Asker;
use super::message::{self, Query};
use crate::shared::{Shared, Token};
use crate::socket;

/// How long one server has, and how often each is asked.
const PATIENCE: Duration = Duration::from_millis(2500);
const ROUNDS: usize = 2;

/// What is to be done with a lookup.
#[derive(Debug)]
pub(super) enum Step {
    Wait,
    /// This server is of no use.
    Next,
    Answered(Vec<u8>),
    /// None is.
    Failed,
}

#[derive(Debug)]
enum Via {
    None,
    Udp(UdpSocket),
    /// What is still to be sent, and what has come.
    Tcp(TcpStream, Vec<u8>, Vec<u8>),
}

#[derive(Debug)]
pub(super) struct Lookup {
    pub(super) asker: Asker,
    pub(super) asked: Vec<u8>,
    pub(super) query: Query,
    pub(super) deadline: Instant,
    id: u16,
    tries: usize,
    via: Via,
}

impl Lookup {
    pub(super) fn new(asker: Asker, asked: Vec<u8>, query: Query, now: Instant) -> Self {
        Lookup { asker, asked, query, deadline: now, id: 0, tries: 0, via: Via::None }
    }

    /// Asks the next server, from a socket of its own under a number of its own, so that an answer cannot be guessed.
    pub(super) fn next_server(
        &mut self,
        servers: &[SocketAddr],
        index: usize,
        shared: &mut Shared,
        now: Instant,
    ) -> Step {
        self.via = Via::None;
        let Some(server) = servers.get(self.tries % servers.len().max(1)) else { return Step::Failed };
        if self.tries >= ROUNDS * servers.len() {
            return Step::Failed;
        }
        self.tries += 1;
        self.deadline = now + PATIENCE;
        self.id = u16::try_from(shared.draw_u32() >> 16).unwrap_or(0);
        let mut message = self.asked.clone();
        message::set_id(&mut message, self.id);
        let token = Token::Lookup(index);
        match self.asker {
            Asker::Udp(_) => {
                let Ok(socket) = socket::connect_udp(*server) else { return Step::Next };
                if shared.watch(&socket, token).is_err() || socket.send(&message).is_err() {
                    return Step::Next;
                }
                self.via = Via::Udp(socket);
            }
            Asker::Tcp { .. } => {
                let Ok(stream) = socket::connect_tcp(*server) else { return Step::Next };
                let Ok(len) = u16::try_from(message.len()) else { return Step::Failed };
                if shared.watch(&stream, token).is_err() {
                    return Step::Next;
                }
                self.via = Via::Tcp(stream, [&len.to_be_bytes(), message.as_slice()].concat(), Vec::new());
            }
        }
        Step::Wait
    }

    /// Reads and writes what can be.
    pub(super) fn on_ready(&mut self) -> Step {
        let Lookup { asked, query, id, via, .. } = self;
        match via {
            Via::None => Step::Wait,
            Via::Udp(socket) => {
                let mut buffer = [0; 4096];
                // Somebody else's answers do not count, and do not end the wait.
                for _ in 0..64 {
                    match socket.recv(&mut buffer) {
                        Ok(n) => {
                            let answer = buffer.get(..n).unwrap_or_default();
                            if message::answers(answer, asked, query.end, *id) {
                                return Step::Answered(answer.to_vec());
                            }
                        }
                        Err(error) if error.kind() == ErrorKind::WouldBlock => return Step::Wait,
                        Err(_) => return Step::Next,
                    }
                }
                Step::Next
            }
            Via::Tcp(stream, out, come) => {
                while !out.is_empty() {
                    match stream.write(out) {
                        Ok(n) => drop(out.drain(..n)),
                        Err(error) if would_block(&error) => return Step::Wait,
                        Err(_) => return Step::Next,
                    }
                }
                loop {
                    let mut buffer = [0; 4096];
                    match stream.read(&mut buffer) {
                        Ok(0) => return Step::Next,
                        Ok(n) => come.extend_from_slice(buffer.get(..n).unwrap_or_default()),
                        Err(error) if would_block(&error) => return Step::Wait,
                        Err(_) => return Step::Next,
                    }
                    if let Some((len, rest)) = come.split_first_chunk()
                        && let Some(answer) = rest.get(..usize::from(u16::from_be_bytes(*len)))
                    {
                        return if message::answers(answer, asked, query.end, *id) {
                            Step::Answered(answer.to_vec())
                        } else {
                            Step::Next
                        };
                    }
                }
            }
        }
    }
}

/// Whether there is nothing to do for now; a socket that still connects says so in its own way.
fn would_block(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected)
}
