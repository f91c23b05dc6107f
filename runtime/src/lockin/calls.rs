//! The system calls of each kind of thread after the lock-in. What is not here kills the process. A call is here
//! because the tests make it, or because the C library may make it on another kernel or in another version; then
//! the line says so. No thread starts another or runs a program, and but for the network's none opens a socket.

use libc as c;

use super::filter::{Call, Only};

const fn any(number: libc::c_long) -> Call {
    Call { number, only: Only::Any }
}

const fn only(number: libc::c_long, only: Only) -> Call {
    Call { number, only }
}

/// Memory that holds no code: what was not executable at the lock-in never will be.
const NO_CODE: Only = Only::Without(2, c::PROT_EXEC.cast_unsigned());

/// What a vCPU still asks of KVM (linux/kvm.h): `KVM_RUN`, and after a pause `KVM_GET_DEVICE_ATTR` and
/// `KVM_SET_DEVICE_ATTR` for its TSC's offset. What was set up stays as it is.
const VCPU_IOCTLS: &[u32] = &[0xae80, 0x4018_aee2, 0x4018_aee1];

/// What is asked of the VM at a pause and after it: `KVM_GET_CLOCK`, `KVM_SET_CLOCK`.
const VM_IOCTLS: &[u32] = &[0x8030_ae7c, 0x4030_ae7b];

/// Faults and `abort`, whose handlers put the default back so that the process ends with their signal.
const FATAL_SIGNALS: &[u32] =
    &[c::SIGSEGV.cast_unsigned(), c::SIGBUS.cast_unsigned(), c::SIGABRT.cast_unsigned()];

/// Memory, locks, time, eventfds, messages of a panic, and the end of a thread.
pub(super) const EVERY_THREAD: &[Call] = &[
    any(c::SYS_read),
    any(c::SYS_write),
    any(c::SYS_writev), // the C library's last words, of a heap that is broken
    any(c::SYS_close),
    only(c::SYS_fcntl, Only::OneOf(1, &[c::F_GETFD.cast_unsigned()])), // debug builds, before they close
    any(c::SYS_futex),
    any(c::SYS_brk),
    only(c::SYS_mmap, NO_CODE),
    only(c::SYS_mprotect, NO_CODE),
    any(c::SYS_munmap),
    any(c::SYS_mremap),
    any(c::SYS_madvise),
    any(c::SYS_sched_getaffinity), // malloc asks once how many arenas are worth while
    any(c::SYS_sched_yield),
    any(c::SYS_getrandom),     // seeds of hash maps
    any(c::SYS_clock_gettime), // where the clock cannot be read in user space
    any(c::SYS_clock_nanosleep),
    any(c::SYS_nanosleep), // older C libraries
    any(c::SYS_restart_syscall),
    any(c::SYS_rt_sigreturn),
    any(c::SYS_rt_sigprocmask),
    any(c::SYS_sigaltstack),
    only(c::SYS_rt_sigaction, Only::OneOf(0, FATAL_SIGNALS)),
    any(c::SYS_getpid),
    any(c::SYS_gettid),
    only(c::SYS_tgkill, Only::OurselvesAt(0)), // kicks, and `abort`
    any(c::SYS_exit),
    any(c::SYS_exit_group),
];

/// A vCPU: into the guest and out again. Interrupts are eventfds, which are written.
pub(super) const VCPU: &[Call] = &[
    only(c::SYS_ioctl, Only::OneOf(1, VCPU_IOCTLS)),
    any(c::SYS_lseek), // the ring that the console's output goes into begins again
];

/// A disk: kicks come by epoll, its file is open.
pub(super) const WORKER: &[Call] = &[
    any(c::SYS_epoll_wait),
    any(c::SYS_epoll_pwait), // other C libraries
    any(c::SYS_epoll_ctl),
    any(c::SYS_preadv),
    any(c::SYS_pwritev),
    any(c::SYS_pwrite64), // zeros, on file systems that cannot make a range of them
    any(c::SYS_fdatasync),
    any(c::SYS_fallocate),
];

/// Sockets of the Internet: no Unix sockets, no packets of one's own making.
const INTERNET: &[u32] = &[c::AF_INET.cast_unsigned(), c::AF_INET6.cast_unsigned()];

/// Small packets at once, probes of silent peers, ends by reset. None of the same numbers on other levels does more than
/// that to anybody.
const SOCKET_OPTIONS: &[u32] =
    &[c::TCP_NODELAY.cast_unsigned(), c::SO_KEEPALIVE.cast_unsigned(), c::SO_LINGER.cast_unsigned()];

/// The network card and the stack behind it: the guest's flows become sockets here, and published ports, which listen
/// already, bring more. It neither binds nor listens.
pub(super) const NETWORK: &[Call] = &[
    any(c::SYS_epoll_wait),
    any(c::SYS_epoll_pwait), // other C libraries
    any(c::SYS_epoll_ctl),
    only(c::SYS_socket, Only::OneOf(0, INTERNET)),
    any(c::SYS_connect),
    any(c::SYS_accept4),
    only(c::SYS_getsockopt, Only::OneOf(2, &[c::SO_ERROR.cast_unsigned()])),
    only(c::SYS_setsockopt, Only::OneOf(2, SOCKET_OPTIONS)),
    only(c::SYS_ioctl, Only::OneOf(1, &[FIONBIO])), // connections from published ports
    any(c::SYS_shutdown),
    any(c::SYS_readv),
    any(c::SYS_recvfrom),
    any(c::SYS_sendto),
    // The file that names the host's resolvers, when it has changed: Landlock says which.
    only(c::SYS_openat, Only::Without(2, WRITING)),
    any(c::SYS_statx),
    any(c::SYS_fstat),      // newer and older C libraries
    any(c::SYS_newfstatat), // older C libraries
    any(c::SYS_lseek),
];

const FIONBIO: u32 = 0x5421;

/// What makes an `open` more than one for reading.
const WRITING: u32 =
    (c::O_WRONLY | c::O_RDWR | c::O_CREAT | c::O_TRUNC | c::O_TMPFILE & !c::O_DIRECTORY).cast_unsigned();

/// `F_GETLK` and its kin: SQLite's locks.
const LOCKS: &[u32] = &[c::F_GETLK.cast_unsigned(), c::F_SETLK.cast_unsigned(), c::F_SETLKW.cast_unsigned()];

const UNIX: &[u32] = &[c::AF_UNIX.cast_unsigned()];

/// The main thread of a sandbox whose guest may reach Unix sockets of the host by vsock, which its owner has named. It is
/// the only one that can connect to any. No filter knows their paths, and Landlock keeps none of them.
pub(super) const TARGETS: &[Call] = &[only(c::SYS_socket, Only::OneOf(0, UNIX)), any(c::SYS_connect)];

/// The event loop, its clients, and the store.
pub(super) const MAIN: &[Call] = &[
    any(c::SYS_epoll_wait),
    any(c::SYS_epoll_pwait), // other C libraries
    any(c::SYS_epoll_ctl),
    only(c::SYS_ioctl, Only::OneOf(1, VM_IOCTLS)),
    // Clients. Connections come in; none goes out.
    any(c::SYS_accept4),
    only(c::SYS_getsockopt, Only::OneOf(2, &[c::SO_PEERCRED.cast_unsigned()])),
    any(c::SYS_recvfrom),
    any(c::SYS_sendto),
    any(c::SYS_shutdown), // the end of one direction of a pipe to the guest
    // The store, in a directory of its own: Landlock says where.
    any(c::SYS_openat),
    any(c::SYS_newfstatat),
    any(c::SYS_statx),
    any(c::SYS_stat),  // older C libraries
    any(c::SYS_lstat), // older C libraries
    any(c::SYS_fstat), // newer and older ones
    any(c::SYS_access),
    any(c::SYS_unlink),
    any(c::SYS_pread64),
    any(c::SYS_pwrite64),
    any(c::SYS_lseek),
    any(c::SYS_fsync),
    any(c::SYS_fdatasync),
    any(c::SYS_ftruncate),
    only(c::SYS_fcntl, Only::OneOf(1, LOCKS)),
    any(c::SYS_gettimeofday), // SQLite's clock, where it cannot be read in user space
    any(c::SYS_geteuid),      // to compare a peer's user with
];
