//! The socket to the application that started this process. It is standard input: the specification comes
//! in, one report goes out, and its end means that the application is gone.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use cubby_state::launch::{MAX_LINE, from_line, to_line};
use cubby_state::{ExitReason, LaunchReport, LaunchSpec};

pub(crate) struct Launch {
    socket: UnixStream,
    reported: bool,
}

impl Launch {
    /// Takes the socket that was inherited as standard input, and reads the specification from it.
    pub(crate) fn receive() -> Result<(Self, LaunchSpec), String> {
        let socket = io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .map(UnixStream::from)
            .map_err(|error| format!("standard input: {error}"))?;
        let mut line = Vec::new();
        BufReader::new(&socket)
            .take(MAX_LINE as u64)
            .read_until(b'\n', &mut line)
            .map_err(|error| format!("standard input is not the socket of an application: {error}"))?;
        let spec = from_line(&line)
            .map_err(|error| format!("the specification on standard input: {error}: {}", source(&error)))?;
        Ok((Self { socket, reported: false }, spec))
    }

    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Says how the launch went, once.
    pub(crate) fn report(&mut self, report: &LaunchReport) {
        if !std::mem::replace(&mut self.reported, true)
            && let Ok(line) = to_line(report)
        {
            // An application that is gone does not need to know.
            let _ = self.socket.write_all(&line);
        }
    }

    /// Says that there is no guest.
    pub(crate) fn fail(
        &mut self,
        reason: ExitReason,
        message: String,
        remedy: Option<String>,
        console_tail: Option<String>,
    ) {
        let console_tail = console_tail.filter(|tail| !tail.is_empty());
        self.report(&LaunchReport::Failed { reason, message, remedy, port: None, console_tail });
    }

    /// Whether the application is gone. Anything it sends after the specification is not read.
    pub(crate) fn is_closed(&self) -> bool {
        let mut byte = [0; 1];
        let flags = rustix::net::RecvFlags::DONTWAIT | rustix::net::RecvFlags::PEEK;
        !matches!(
            rustix::net::recv(&self.socket, &mut byte, flags),
            Ok((1.., _)) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR)
        )
    }
}

fn source(error: &dyn std::error::Error) -> String {
    error.source().map(ToString::to_string).unwrap_or_default()
}
