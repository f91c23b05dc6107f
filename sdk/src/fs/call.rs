//! One session about files, from its request to its end.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use cubby_protocol::message::{Credit, FileDone, FileFailed, FileRequest};
use cubby_protocol::{FrameError, INITIAL_WINDOW, Kind, SessionId, decode, encode};

use crate::connection::{Incoming, Session};
use crate::error::{Error, R};
use crate::link::Link;

/// What Linux says of a descriptor that is closed.
const EBADF: i32 = 9;

/// A session that is not over. Dropped, it is called off.
pub(super) struct Call {
    session: Session,
    link: Arc<Link>,
    operation: &'static str,
    path: PathBuf,
    /// Bytes taken for which no credit was given back yet.
    owed: u32,
    over: bool,
}

/// What a session says next.
pub(super) enum Said {
    /// Something that does not end it.
    Frame(Kind, Bytes),
    /// That it is done.
    Done(FileDone),
}

impl Call {
    /// Sends the request and whatever is to go with it.
    pub(super) async fn begin(
        link: &Arc<Link>,
        operation: &'static str,
        path: &Path,
        request: &FileRequest,
        more: impl FnOnce(SessionId, &mut Vec<u8>) -> Result<(), FrameError>,
    ) -> R<Self> {
        let frames = |id, out: &mut Vec<u8>| {
            encode(Kind::FileRequest, id, request, out)?;
            more(id, out)
        };
        let session = link.begin_session(operation, frames).await?;
        Ok(Self { session, link: link.clone(), operation, path: path.to_owned(), owed: 0, over: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The next frame. Nothing is lost when this is called off.
    pub(super) async fn next(&mut self) -> R<Said> {
        if self.over {
            return Err(self.refused(EBADF));
        }
        match self.session.next().await {
            Ok(incoming) => self.on_frame(incoming),
            Err(error) => {
                self.over = true;
                Err(self.link.lost(error, self.operation).await)
            }
        }
    }

    /// The next frame, if it has come already.
    pub(super) fn try_next(&mut self) -> R<Option<Said>> {
        if self.over {
            return Err(self.refused(EBADF));
        }
        self.session.try_next().map(|incoming| self.on_frame(incoming)).transpose()
    }

    /// The answer, when nothing else is to come.
    pub(super) async fn done(mut self) -> R<FileDone> {
        loop {
            match self.next().await? {
                Said::Done(done) => return Ok(done),
                Said::Frame(Kind::Credit, _) => {}
                Said::Frame(..) => return Err(nonsense()),
            }
        }
    }

    pub(super) async fn send(
        &mut self,
        frames: impl FnOnce(SessionId, &mut Vec<u8>) -> Result<(), FrameError>,
    ) -> R<()> {
        match self.session.out.send_frames(frames).await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.over = true;
                Err(self.link.lost(error, self.operation).await)
            }
        }
    }

    /// Lets the guest send more once a good part of the window was taken.
    pub(super) fn give_back(&mut self, bytes: usize) {
        self.owed = self.owed.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.owed >= INITIAL_WINDOW / 4 {
            self.session.out.push(Kind::Credit, &Credit { bytes: std::mem::take(&mut self.owed) });
        }
    }

    fn on_frame(&mut self, incoming: Incoming) -> R<Said> {
        let Incoming { kind, payload } = incoming;
        self.over = kind.ends_session();
        match kind {
            Kind::FileDone => Ok(Said::Done(decode(&payload)?)),
            Kind::FileFailed => {
                let FileFailed { errno, path } = decode(&payload)?;
                if !path.0.is_empty() {
                    self.path = OsString::from_vec(path.0).into();
                }
                Err(self.refused(errno))
            }
            Kind::Refused => Err(Error::refused(self.link.name(), self.operation, decode(&payload)?)),
            kind if self.over => Err(Error::unexpected(kind)),
            kind => Ok(Said::Frame(kind, payload)),
        }
    }

    /// This error number, of this path.
    pub(super) fn refused(&self, errno: i32) -> Error {
        Error::Fs { operation: self.operation, path: self.path.clone(), errno }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.over {
            self.session.out.push_raw(Kind::FileCancel);
        }
    }
}

/// An answer to something else.
pub(super) fn nonsense() -> Error {
    FrameError::Malformed { what: "file session", why: "it is no answer to what was asked".into() }.into()
}
