//! The threads on which files are read and written, since that may block: on a disk, or for ever on a file system
//! whose server hangs.
//!
//! A thread does one [`Job`] after another, each of which is bounded work, and never waits for a client. So a handful
//! of them serves any number of sessions, and a client that does not read holds an open file and nothing else.
//! Threads are started when there is work for them and end when there has been none for `IDLE`.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::work::{Cancel, Job, Next, Outcome, Ticket, Work};

/// How many threads there may be. Only what takes long in one piece keeps one busy: trees, copies, an `fsync`.
const THREADS: usize = 16;

/// How long a thread waits for work.
const IDLE: Duration = Duration::from_secs(1);

/// A thread's stack, in bytes. Trees are walked without recursion.
const STACK: usize = 256 << 10;

/// What a job came to.
#[derive(Debug)]
pub struct Completion {
    /// Whose job it was.
    pub ticket: Ticket,
    /// What became of it.
    pub outcome: Outcome,
}

/// The threads, seen from the event loop.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    under_way: usize,
    numbers: u64,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// Readable when something is done.
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    done: Vec<Completion>,
    threads: usize,
    idle: usize,
}

impl Pool {
    /// A pool without a thread.
    pub fn new() -> Result<Self, Errno> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Shared { state: Mutex::default(), work: Condvar::new(), bell };
        Ok(Self { shared: Arc::new(shared), under_way: 0, numbers: 0 })
    }

    /// Becomes readable when [`Self::completed`] has something to give.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.shared.bell.as_fd()
    }

    /// Whether no job waits, runs, or has not been looked at since.
    pub fn is_idle(&self) -> bool {
        self.under_way == 0
    }

    /// A number that no session has had.
    pub fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Has what is open closed, if anything is.
    pub fn discard(&mut self, ticket: Ticket, next: Next) {
        if let Next::Go(open) = next {
            self.submit(Job { ticket, cancel: Cancel::default(), work: Work::Discard(open) });
        }
    }

    /// Has a job done.
    pub fn submit(&mut self, job: Job) {
        self.under_way += 1;
        let mut state = self.shared.lock();
        state.waiting.push_back(job);
        if state.idle >= state.waiting.len() || state.threads >= THREADS {
            self.shared.work.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("files".into()).stack_size(STACK);
        if thread.spawn(move || shared.work()).is_err() {
            self.shared.lock().fail_without_threads();
            self.shared.ring();
        }
    }

    /// What was done since the last call.
    pub fn completed(&mut self) -> Vec<Completion> {
        // An event without a ring is no error.
        let _ = rustix::io::read(&self.shared.bell, &mut [0; 8]);
        let done = std::mem::take(&mut self.shared.lock().done);
        self.under_way -= done.len();
        done
    }
}

impl State {
    /// A thread could not be started. If there is none, nobody will do what waits.
    fn fail_without_threads(&mut self) {
        self.threads -= 1;
        if self.threads == 0 {
            let failed = self
                .waiting
                .drain(..)
                .map(|job| Completion { ticket: job.ticket, outcome: Outcome::failed(Errno::AGAIN, &[]) });
            self.done.extend(failed);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // It is full only if it was not looked at for 2^64 rings.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.waiting.pop_front() {
                drop(state);
                let completion = Completion { ticket: job.ticket, outcome: job.run() };
                state = self.lock();
                state.done.push(completion);
                if state.done.len() == 1 {
                    self.ring();
                }
                continue;
            }
            state.idle += 1;
            let (woken, waited) = self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if waited.timed_out() && state.waiting.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}
