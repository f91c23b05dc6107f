//! What a thread of the pool does: begins a request, or moves an open file on by one step.
//!
//! A step is bounded: it reads or writes [`STEP`] bytes at most, and gives the open file back. What a tree takes is not
//! bounded; it looks between two files whether anybody still wants it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cubby_protocol::message::{FileDone, FileFailed, FileRequest, PathBytes};
use cubby_protocol::{Kind, SessionId};
use rustix::io::Errno;

use super::directory::Lister;
use super::reader::Reader;
use super::writer::Writer;
use super::{metadata, tree};
use crate::output::Output;

/// How many bytes one step moves at most.
pub const STEP: usize = 128 << 10;

/// Whose job it is. A number is never used again, while slots and sessions are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The client's.
    pub slot: u16,
    /// Its session.
    pub session: SessionId,
    /// This one and no other of the same slot and session.
    pub number: u64,
}

/// Set when nobody wants a session's outcome any more.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Nobody wants it.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether nobody wants it.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Goes on, or not.
    pub fn check(&self) -> Result<(), Errno> {
        if self.is_set() { Err(Errno::CANCELED) } else { Ok(()) }
    }
}

/// A piece of a file on its way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// So many of the bytes.
    Data(usize),
    /// Zeroes that were not sent.
    Hole(u64),
}

/// What came for a file since the last step.
#[derive(Debug, Default)]
pub struct Input {
    /// The bytes of all runs of data.
    pub bytes: Vec<u8>,
    /// In the file's order.
    pub runs: Vec<Run>,
    /// What all this has taken from the window.
    pub cost: u32,
    /// Whether it is all.
    pub last: bool,
}

impl Input {
    /// Adds a piece, whose bytes, if it has any, are the caller's to add.
    pub fn push(&mut self, run: Run, cost: u32) {
        self.cost += cost;
        match (self.runs.last_mut(), run) {
            (Some(Run::Data(size)), Run::Data(more)) => *size += more,
            _ => self.runs.push(run),
        }
    }

    /// Without what was in it, to use again.
    pub fn emptied(mut self) -> Self {
        self.bytes.clear();
        self.runs.clear();
        Self { bytes: self.bytes, runs: self.runs, ..Self::default() }
    }
}

/// What a step may use.
#[derive(Debug, Default)]
pub struct Means {
    /// How many bytes it may send.
    pub budget: usize,
    /// Where what it sends goes; empty.
    pub output: Output,
    /// What it may write.
    pub input: Input,
}

/// An open file between two steps.
#[derive(Debug)]
pub enum Open {
    /// Being read.
    Reader(Reader),
    /// A directory being listed.
    Lister(Lister),
    /// Being written.
    Writer(Writer),
}

/// What there is to do.
#[derive(Debug)]
pub enum Work {
    /// The first step of a session.
    Begin(FileRequest, Means),
    /// One more.
    Go(Open, Means),
    /// None.
    Nothing(Means),
    /// An open file that nobody wants any more. To close one may take as long as to write it.
    Discard(Open),
}

/// Work, for whom, and whether they still want it.
#[derive(Debug)]
pub struct Job {
    /// For whom.
    pub ticket: Ticket,
    /// Whether they still want it.
    pub cancel: Cancel,
    /// What there is to do.
    pub work: Work,
}

/// What a job came to.
#[derive(Debug)]
pub struct Outcome {
    /// Frames to send.
    pub output: Output,
    /// What they take from the receiver's window.
    pub cost: usize,
    /// What was written.
    pub input: Input,
    /// How the session goes on.
    pub next: Next,
}

/// How a session goes on.
#[derive(Debug)]
pub enum Next {
    /// With another step.
    Go(Open),
    /// Not at all: it has done what was asked.
    Done(FileDone),
    /// Not at all.
    Failed(FileFailed),
    /// Nobody asked.
    Nothing,
}

/// Why something could not be done, and to what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What the kernel said.
    pub errno: Errno,
    /// Of what.
    pub path: Vec<u8>,
}

/// Makes a [`Failure`] of an error number.
pub fn at(path: &[u8]) -> impl Fn(Errno) -> Failure {
    move |errno| Failure { errno, path: path.to_vec() }
}

impl Outcome {
    /// Of something that could not be done.
    pub fn failed(errno: Errno, path: &[u8]) -> Self {
        let failed = FileFailed { errno: errno.raw_os_error(), path: PathBytes::from(path) };
        Self { output: Output::default(), cost: 0, input: Input::default(), next: Next::Failed(failed) }
    }
}

impl Job {
    /// Does it.
    pub fn run(self) -> Outcome {
        let session = self.ticket.session;
        let (mut means, begun) = match self.work {
            Work::Begin(request, mut means) => {
                let begun = begin(request, session, &mut means, &self.cancel);
                (means, begun)
            }
            Work::Go(open, means) => (means, Ok(Next::Go(open))),
            Work::Nothing(means) => (means, Ok(Next::Nothing)),
            Work::Discard(open) => {
                drop(open);
                (Means::default(), Ok(Next::Nothing))
            }
        };
        let mut cost = 0;
        let next = begun.and_then(|next| match next {
            Next::Go(open) => go(open, session, &mut means, &mut cost),
            next => Ok(next),
        });
        let next = next.unwrap_or_else(|failure| {
            let path = PathBytes(failure.path);
            Next::Failed(FileFailed { errno: failure.errno.raw_os_error(), path })
        });
        Outcome { output: means.output, cost, input: means.input, next }
    }
}

fn begin(
    request: FileRequest,
    session: SessionId,
    means: &mut Means,
    cancel: &Cancel,
) -> Result<Next, Failure> {
    let done = |()| Next::Done(FileDone::Done);
    match request {
        FileRequest::Stat { path, follow } => {
            metadata::stat(&path.0, follow).map(|metadata| Next::Done(FileDone::Metadata(metadata)))
        }
        FileRequest::ReadLink { path } => {
            metadata::read_link(&path.0).map(|target| Next::Done(FileDone::Link(target)))
        }
        FileRequest::List { path } => Ok(Next::Go(Open::Lister(Lister::open(&path.0)?))),
        FileRequest::Read { path, offset, length } => {
            let (reader, metadata) = Reader::open(&path.0, offset, length)?;
            means.output.message(Kind::FileOpened, session, &metadata);
            Ok(Next::Go(Open::Reader(reader)))
        }
        FileRequest::Write { path, how, attributes, sync } => {
            Ok(Next::Go(Open::Writer(Writer::open(&path.0, how, attributes, sync)?)))
        }
        FileRequest::MakeDirectory { path, mode } => metadata::make_directory(&path.0, mode).map(done),
        FileRequest::Remove { path, all: false } => metadata::remove(&path.0).map(done),
        FileRequest::Remove { path, all: true } => tree::remove(&path.0, cancel).map(done),
        FileRequest::Rename { from, to } => metadata::rename(&from.0, &to.0).map(done),
        FileRequest::Copy { from, to } => tree::copy(&from.0, &to.0, cancel).map(done),
        FileRequest::Symlink { target, path } => metadata::symlink(&target.0, &path.0).map(done),
        FileRequest::SetAttributes { path, follow, attributes } => {
            metadata::set(&path.0, follow, attributes).map(done)
        }
    }
}

fn go(open: Open, session: SessionId, means: &mut Means, cost: &mut usize) -> Result<Next, Failure> {
    let over = match open {
        Open::Reader(mut reader) => {
            let over = reader.step(session, means.budget.min(STEP), &mut means.output, cost)?;
            if over { None } else { Some(Open::Reader(reader)) }
        }
        Open::Lister(mut lister) => {
            let over = lister.step(session, &mut means.output, cost)?;
            if over { None } else { Some(Open::Lister(lister)) }
        }
        Open::Writer(mut writer) => {
            writer.write(&means.input)?;
            if means.input.last {
                writer.finish()?;
                None
            } else {
                Some(Open::Writer(writer))
            }
        }
    };
    Ok(over.map_or(Next::Done(FileDone::Done), Next::Go))
}
