//! The agent's only unsafe code: what neither the standard library nor rustix offers in a safe form.
//! `docs/adr/0003-agent-unsafe-in-one-module.md` says why each is here.
//!
//! - [`Launcher`]: starts a program in a child that shares the agent's memory until it calls `execve`.
//! - [`block_sigchld`], [`heed_signals`]: the end of a child as a readable file descriptor; what signals do.
//! - [`VsockAddr`], [`vsock_peer`]: addresses of `AF_VSOCK`.
//! - [`add_entropy`], [`connect_patiently`], [`kill_group`]: calls whose safe wrappers do not exist.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketAddrAny};

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn check(result: c_int) -> Result<c_int, Errno> {
    if result < 0 { Err(last_errno()) } else { Ok(result) }
}

/// Blocks `SIGCHLD` and returns a non-blocking descriptor that becomes readable when a child ends.
pub fn block_sigchld() -> Result<OwnedFd, Errno> {
    // SAFETY: the set is initialised by `sigemptyset` before anything reads it, every pointer is to a live
    // local, and a non-negative result of `signalfd` is a descriptor that nobody else owns.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Gives every signal that whoever started this process ignores its default again: `execve` keeps what is ignored, so
/// commands would ignore it too. SIGPIPE stays as it is; each child gets it back.
pub fn heed_signals() {
    // SAFETY: all zeroes is a valid `sigaction`, the default without flags; the kernel reads one.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        for signal in (1..=64).filter(|signal| *signal != libc::SIGPIPE) {
            // Those that cannot be changed cannot be ignored either.
            let _ = libc::sigaction(signal, &default, ptr::null_mut());
        }
    }
}

/// Sends a signal, real-time ones included, to a process group; `group` 1 means every process but the caller's.
pub fn kill_group(group: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: `kill` takes two integers and touches no memory.
    check(unsafe { libc::kill(group.saturating_neg(), signal) }).map(drop)
}

/// Mixes `bytes` into the kernel's random pool and counts them as full entropy (random(4), `RNDADDENTROPY`).
pub fn add_entropy(random: impl AsFd, bytes: [u8; 32]) -> Result<(), Errno> {
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: c_int,
        size: c_int,
        bytes: [u8; 32],
    }
    let info = PoolInfo { entropy_bits: 256, size: 32, bytes };
    // SAFETY: the kernel reads `size` bytes after the two integers, and the structure holds exactly these.
    check(unsafe { libc::ioctl(random.as_fd().as_raw_fd(), RNDADDENTROPY, &info) }).map(drop)
}

/// Lets a connect on a vsock take as long as the host needs: the kernel would give up after two seconds (vsock(7)).
pub fn connect_patiently(socket: impl AsFd) -> Result<(), Errno> {
    const CONNECT_TIMEOUT: c_int = 6;
    let limit = libc::timeval { tv_sec: 3600, tv_usec: 0 };
    let size = libc::socklen_t::try_from(size_of_val(&limit)).map_err(|_| Errno::INVAL)?;
    // SAFETY: the kernel reads `size` bytes of `limit`, which lives until the call returns.
    check(unsafe {
        let (fd, value) = (socket.as_fd().as_raw_fd(), (&raw const limit).cast());
        libc::setsockopt(fd, libc::AF_VSOCK, CONNECT_TIMEOUT, value, size)
    })
    .map(drop)
}

/// An `AF_VSOCK` address (vsock(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockAddr {
    /// Which machine; 2 is the host.
    pub cid: u32,
    /// Which port on it.
    pub port: u32,
}

// SAFETY: `f` gets a pointer to a complete, initialised `sockaddr_vm` and its size, valid during the call.
unsafe impl SocketAddrArg for VsockAddr {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        // SAFETY: all zeroes is a valid `sockaddr_vm`.
        let mut raw: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        raw.svm_family = AddressFamily::VSOCK.as_raw();
        raw.svm_cid = self.cid;
        raw.svm_port = self.port;
        let size = SocketAddrLen::try_from(size_of_val(&raw)).unwrap_or_default();
        f(ptr::from_ref(&raw).cast(), size)
    }
}

/// The CID behind an address that `accept` returned, or `None` if it is not an `AF_VSOCK` address.
pub fn vsock_peer(address: &SocketAddrAny) -> Option<u32> {
    let whole = usize::try_from(address.addr_len()).ok()? >= size_of::<libc::sockaddr_vm>();
    if address.address_family() != AddressFamily::VSOCK || !whole {
        return None;
    }
    // SAFETY: the family says what the bytes are, and there are enough of them; the storage is aligned.
    Some(unsafe { (*address.as_ptr().cast::<libc::sockaddr_vm>()).svm_cid })
}

/// Whom a program runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// All that a child does between its birth and `execve`, prepared so that it need not allocate.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Paths to try in turn, as `execvp` does.
    pub candidates: Vec<CString>,
    /// The argument vector, the program's name first.
    pub argv: Vec<CString>,
    /// The environment, `NAME=value` each.
    pub env: Vec<CString>,
    /// Where to go first; `None` is `/`, where the agent is.
    pub cwd: Option<CString>,
    /// Whom to become; `None` stays root without supplementary groups.
    pub credentials: Option<Credentials>,
    /// `RLIMIT_` number, soft and hard limit.
    pub rlimits: Vec<(u8, u64, u64)>,
    /// Standard input, output and error. None of them is below 3.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Whether standard input is a terminal to be controlled by.
    pub tty: bool,
}

/// The step at which a child gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The kernel made no child.
    Fork,
    /// Descriptors, session, terminal, signals.
    Prepare,
    /// A resource limit; its place in the plan.
    Limit(usize),
    /// The working directory.
    Workdir,
    /// User and groups.
    Credentials,
    /// `execve`.
    Exec,
}

const STACK: usize = 64 << 10;

/// Starts programs. Holds the stack on which children run before `execve`.
#[derive(Debug)]
pub struct Launcher {
    stack: Box<[u128]>,
}

struct Job<'a> {
    plan: &'a Plan<'a>,
    argv: *const *const c_char,
    env: *const *const c_char,
    failure: Option<(Step, c_int)>,
}

impl Default for Launcher {
    fn default() -> Self {
        Self { stack: vec![0; STACK / size_of::<u128>()].into_boxed_slice() }
    }
}

impl Launcher {
    /// Starts `plan` and returns the child's pid once its `execve` succeeded. Waits until then: the child
    /// borrows the agent's memory, which saves copying page tables and a pipe for the error.
    pub fn launch(&mut self, plan: &Plan<'_>) -> Result<i32, (Step, Errno)> {
        let pointers = |strings: &[CString]| -> Vec<*const c_char> {
            strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
        };
        let (argv, env) = (pointers(&plan.argv), pointers(&plan.env));
        let mut job = Job { plan, argv: argv.as_ptr(), env: env.as_ptr(), failure: None };
        let job = ptr::from_mut(&mut job);
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: the child runs `child` on a stack of its own (the top is 16-byte aligned, as the ABI asks)
        // with a pointer that stays valid, because CLONE_VFORK stops this thread, the only one, until the child
        // has left this memory by `execve` or `_exit`. No reference to `job` or the stack is used meanwhile.
        let pid = unsafe {
            let top = self.stack.as_mut_ptr_range().end;
            libc::clone(child, top.cast(), flags, job.cast())
        };
        let pid = check(pid).map_err(|errno| (Step::Fork, errno))?;
        // SAFETY: `job` is still alive and the child, its only other user, is gone; volatile, since the
        // compiler has not seen the child write.
        match unsafe { ptr::read_volatile(&raw const (*job).failure) } {
            None => Ok(pid),
            Some((step, errno)) => {
                // SAFETY: waits for our own child, without a place for its status.
                while unsafe { libc::waitpid(pid, ptr::null_mut(), 0) } < 0 && last_errno() == Errno::INTR {}
                Err((step, Errno::from_raw_os_error(errno)))
            }
        }
    }
}

extern "C" fn child(job: *mut c_void) -> c_int {
    // SAFETY: `launch` passes a valid, exclusive `Job`, and stands still while this runs.
    let job = unsafe { &mut *job.cast::<Job<'_>>() };
    // SAFETY: this is the child of `launch`, alone in a process of its own.
    let Err(failure) = unsafe { become_program(job) };
    job.failure = Some(failure);
    // SAFETY: `_exit` runs no handlers of the memory that is not ours.
    unsafe { libc::_exit(127) }
}

/// # Safety
/// Only for a new child of the agent. Makes system calls and nothing else: no allocation, no locks. Ids are
/// set by raw system calls, since the C library's wrappers would signal other threads of the shared memory.
unsafe fn become_program(job: &Job<'_>) -> Result<std::convert::Infallible, (Step, c_int)> {
    let at = |step: Step| move |errno: Errno| (step, errno.raw_os_error());
    let call = |result: libc::c_long| if result < 0 { Err(last_errno()) } else { Ok(()) };
    let plan = job.plan;
    // SAFETY: every call takes integers, or pointers to memory that outlives it and that `plan` holds.
    unsafe {
        check(libc::setsid()).map_err(at(Step::Prepare))?;
        for (fd, target) in plan.stdio.iter().zip(0..) {
            check(libc::dup2(fd.as_raw_fd(), target)).map_err(at(Step::Prepare))?;
        }
        if plan.tty {
            check(libc::ioctl(0, libc::TIOCSCTTY, 0)).map_err(at(Step::Prepare))?;
        }
        for (place, &(resource, soft, hard)) in plan.rlimits.iter().enumerate() {
            let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
            call(libc::syscall(libc::SYS_setrlimit, libc::c_long::from(resource), &limit))
                .map_err(at(Step::Limit(place)))?;
        }
        if let Some(cwd) = &plan.cwd {
            check(libc::chdir(cwd.as_ptr())).map_err(at(Step::Workdir))?;
        }
        if let Some(who) = &plan.credentials {
            let failed = at(Step::Credentials);
            call(libc::syscall(libc::SYS_setgroups, who.groups.len(), who.groups.as_ptr()))
                .map_err(failed)?;
            call(libc::syscall(libc::SYS_setresgid, who.gid, who.gid, who.gid)).map_err(failed)?;
            call(libc::syscall(libc::SYS_setresuid, who.uid, who.uid, who.uid)).map_err(failed)?;
        }
        // The agent ignores SIGPIPE and blocks SIGCHLD, and `execve` keeps both; it resets all the rest.
        let default: libc::sigaction = std::mem::zeroed();
        check(libc::sigaction(libc::SIGPIPE, &default, ptr::null_mut())).map_err(at(Step::Prepare))?;
        let none: libc::sigset_t = std::mem::zeroed();
        check(libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut())).map_err(at(Step::Prepare))?;
        Err((Step::Exec, execute(&plan.candidates, job.argv, job.env)))
    }
}

/// Tries each candidate. What is found but may not be run hides no later one, yet is what is reported.
///
/// # Safety
/// `argv` and `env` are arrays of pointers to strings, with a null at the end.
unsafe fn execute(candidates: &[CString], argv: *const *const c_char, env: *const *const c_char) -> c_int {
    let mut worst = libc::ENOENT;
    for path in candidates {
        let path: &CStr = path;
        // SAFETY: the caller vouches for the arrays; the path is a C string.
        unsafe { libc::execve(path.as_ptr(), argv, env) };
        match last_errno().raw_os_error() {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => worst = libc::EACCES,
            errno => return errno,
        }
    }
    worst
}
