//! Streams to vsock ports of a guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;

use crate::error::{Error, R};
use crate::sandbox::Sandbox;

/// The longest answer to a call.
const MAX_LINE: usize = 256;

impl Sandbox {
    /// Connects to a process of the guest that listens at this vsock port, whatever its context identifier. Who does not
    /// read stops who writes, in both directions; shutting down the writing half is an end of file for the guest, and the
    /// other half goes on.
    ///
    /// Streams are no use of the sandbox, like connections to its published ports: neither the idle time-out nor a drain
    /// waits for them. Of these, and of those that guests open ([`SandboxBuilder::vsock_listen`](crate::SandboxBuilder)),
    /// there may be 256 at once.
    ///
    /// # Errors
    /// [`Error::VsockUnreachable`] if nobody listens there, for ports 1024 to 1039, which are the sandbox's own, and when
    /// there are too many; [`Error::InvalidState`] for a sandbox that has ended. Of one that is paused it waits.
    ///
    /// ```no_run
    /// # async fn example(sandbox: cubbyhole::Sandbox) -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio::io::{AsyncReadExt, AsyncWriteExt};
    ///
    /// let mut stream = sandbox.connect_vsock(5000).await?;
    /// stream.write_all(b"question").await?;
    /// stream.shutdown().await?;
    /// let mut answer = String::new();
    /// stream.read_to_string(&mut answer).await?;
    /// # Ok(()) }
    /// ```
    pub async fn connect_vsock(&self, port: u32) -> R<VsockStream> {
        let unreachable = |why: String| Error::VsockUnreachable { name: self.name().into(), port, why };
        let status = self.link.record()?.status;
        if !status.is_live() {
            return Err(Error::invalid_state(self.name(), status, "connect to"));
        }
        let failed = |error: io::Error| unreachable(error.to_string());
        let path = self.link.context.store.home().port_socket(&self.link.id);
        let mut stream = UnixStream::connect(path).await.map_err(failed)?;
        // Who is refused before having asked cannot ask any more, and finds the reason all the same.
        let asked = stream.write_all(format!("CONNECT {port}\n").as_bytes()).await;
        // What comes behind the line is the guest's.
        let mut line = Vec::new();
        while line.len() < MAX_LINE {
            match stream.read_u8().await {
                Ok(b'\n') => break,
                Ok(byte) => line.push(byte),
                Err(error) => return Err(failed(asked.err().unwrap_or(error))),
            }
        }
        match std::str::from_utf8(&line).ok().and_then(|line| line.strip_prefix("ERR ")) {
            None if line == b"OK" => Ok(VsockStream { stream }),
            why => Err(unreachable(why.unwrap_or("the answer is none").into())),
        }
    }
}

/// A stream to a vsock port of a guest ([`Sandbox::connect_vsock`]).
#[derive(Debug)]
pub struct VsockStream {
    stream: UnixStream,
}

impl AsyncRead for VsockStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for VsockStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
