//! `cubby-sandbox`: the process behind one sandbox. An application starts it with a socket as its standard
//! input (see [`launch`]); it boots one microVM, relays between clients and the guest's agent, keeps the
//! sandbox's policies, and writes how it ended. It runs no guest command itself and knows no SDK.
//!
//! Before it does any of that it forks: what the application started stays behind as the small [`keeper`] of the
//! process that does.
#![deny(unsafe_code)]
// It panics when the log's disk is full; `say` does not.
#![deny(clippy::print_stderr)]

mod assets;
mod backlog;
mod client;
mod command;
mod console_tap;
mod control;
mod detached;
mod ending;
mod keeper;
mod last_words;
mod launch;
mod lockin;
mod machine;
mod network;
mod output_log;
mod pipes;
mod policy;
mod relay;
mod signals;
mod supervisor;
mod sys;
mod upstream;
mod watches;
mod will;

use std::fmt::Display;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use console_tap::ConsoleTap;
use cubby_state::launch::{HostCheck, Unsupported, to_line};
use cubby_state::{ExitReason, ExitReport, LaunchReport, LaunchSpec, RunLock, Store, StoreError};
use cubby_vmm::{Error, Network, Vm};
use last_words::LastWords;
use launch::Launch;
use lockin::{Limits, LockIn};
use machine::Marked;
use network::{Exchange, Plugged};
use output_log::OutputLog;
use pipes::Pipes;
use relay::Relay;
use signals::Signals;
use supervisor::Parts;
use sys::Forked;
use will::Will;

fn main() -> ExitCode {
    let began = Instant::now();
    if let Err(error) = sys::close_inherited() {
        say(format_args!("closing the descriptors of others: {error}"));
        return ExitCode::FAILURE;
    }
    let mut arguments = std::env::args_os().skip(1);
    if let Some(first) = arguments.next() {
        if first == "--check" {
            return check(&arguments.next().map(PathBuf::from).unwrap_or_default());
        }
        println!("cubby-sandbox {} is started by the cubbyhole library", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let (mut launch, spec) = match Launch::receive() {
        Ok(received) => received,
        Err(error) => {
            say(error);
            return ExitCode::FAILURE;
        }
    };
    // This process takes the sandbox: from here on nobody else can.
    let taken = RunLock::acquire(&spec.lock, RunLock::PATIENCE)
        .map_err(|error| Failure::at("store", chain(&error)))
        .and_then(|lock| {
            let parts = || Ok((LastWords::new()?, Will::new()?, Signals::take()?, sys::fork()?));
            let (console, will, signals, forked) =
                parts().map_err(|error: std::io::Error| Failure::at("keeper", error))?;
            Ok((lock, console, will, signals, forked))
        });
    let outcome = match taken {
        Ok((lock, console, will, signals, Forked::Parent(child))) => {
            return keeper::keep(child, &spec, lock, &console, &will, &signals);
        }
        // Its keeper lets go of the lock after it.
        Ok((lock, console, will, signals, Forked::Child)) => {
            be_the_sandbox(&mut launch, &spec, &lock, &console, &will, signals, began)
        }
        Err(failure) => Err(failure),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { reason, message, remedy, port }) => {
            match port {
                Some(port) => say(format_args!("{port} cannot be published: {message}")),
                None => say(&message),
            }
            launch.report(&LaunchReport::Failed { reason, message, remedy, port, console_tail: None });
            ExitCode::FAILURE
        }
    }
}

/// Says whether a guest could run here, and boots none.
fn check(home_lib: &Path) -> ExitCode {
    let assets = assets::find(home_lib).map_err(|missing| missing.to_string());
    let check = HostCheck {
        assets: assets.map(|assets| assets.kernel.parent().map(Path::to_owned).unwrap_or_default()),
        kvm: cubby_vmm::probe::probe()
            .map(drop)
            .map_err(|host| Unsupported { why: host.why, remedy: host.remedy }),
    };
    let said = to_line(&check).is_ok_and(|line| io::stdout().write_all(&line).is_ok());
    if said { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Why there is no guest.
struct Failure {
    reason: ExitReason,
    message: String,
    remedy: Option<String>,
    /// The published port that the host does not give.
    port: Option<SocketAddr>,
}

impl Failure {
    fn at(stage: &str, message: impl ToString) -> Self {
        Self {
            reason: ExitReason::BootFailed { stage: stage.into() },
            message: message.to_string(),
            remedy: None,
            port: None,
        }
    }
}

/// Carries the sandbox to its end; a boot that fails is recorded.
fn be_the_sandbox(
    launch: &mut Launch,
    spec: &LaunchSpec,
    lock: &RunLock,
    console: &LastWords,
    will: &Will,
    signals: Signals,
    began: Instant,
) -> Result<(), Failure> {
    let failed = |error: StoreError| Failure::at("store", chain(&error));
    let store = Store::open(&spec.home).map_err(failed)?;
    store.adopt(spec.run, lock).map_err(failed)?;
    boot(launch, spec, &store, console, will, signals, began).inspect_err(|failure| {
        // If not even that can be written, the keeper tries again.
        let _ = will.record(&store, spec, &ExitReport::now(failure.reason.clone()));
    })
}

fn boot(
    launch: &mut Launch,
    spec: &LaunchSpec,
    store: &Store,
    console: &LastWords,
    will: &Will,
    signals: Signals,
    began: Instant,
) -> Result<(), Failure> {
    let assets = assets::find(&spec.home.lib()).map_err(|missing| Failure {
        remedy: Some(
            "install them with `cargo xtask install` or name their directory with CUBBY_ASSETS".into(),
        ),
        ..Failure::at("assets", missing)
    })?;
    let marked = Marked::default();
    let pen = console.pen().map_err(|error| Failure::at("keeper", error))?;
    let tap = ConsoleTap::new().map_err(|error| Failure::at("log", error))?;
    let mut config = machine::config(spec, &assets, marked.clone(), tap.with(pen))
        .map_err(|why| Failure::at("disks", why))?;
    let limits = Limits::new(&spec.config);
    let exchange = network(spec, store, &limits)?.map(|(network, exchange)| {
        config.network = Some(network);
        exchange
    });
    let relay = Relay::listen(&spec.socket, spec.config.max_clients, open_log(spec))
        .map_err(|error| Failure::at("relay", format!("{}: {error}", spec.socket.display())))?;
    let port_socket = spec.home.port_socket(&spec.name);
    let pipes = Pipes::listen(&port_socket, &spec.config.vsock)
        .map_err(|error| Failure::at("relay", format!("{}: {error}", port_socket.display())))?;
    let vmm = |error: Error| match error {
        Error::Host(host) => {
            let (message, remedy) = (host.why, Some(host.remedy));
            Failure { reason: ExitReason::HostUnsupported, message, remedy, port: None }
        }
        error => Failure::at("vm", chain(&error)),
    };
    let locking = |error: std::io::Error| Failure {
        remedy: Some("the host's kernel must have seccomp filters (CONFIG_SECCOMP_FILTER)".into()),
        ..Failure::at("lock-in", error)
    };
    let lock_in = LockIn::prepare(&spec.home, !spec.config.vsock.is_empty()).map_err(locking)?;
    config.on_thread = Some(lock_in.on_thread());
    let mut events = Vm::event_loop().map_err(vmm)?;
    let vm = Vm::boot(config, &mut events).map_err(vmm)?;
    // Everything is open and every thread runs. The guest does not yet.
    lock_in.finish(&limits).map_err(locking)?;
    let parts =
        Parts { spec, launch, store, will, relay, pipes, tap, exchange, vm, events, marked, signals, began };
    supervisor::run(parts).map_err(|why| Failure::at("supervisor", why))
}

/// The guest's network, whose ports are listened on and recorded, unless it has none.
fn network(
    spec: &LaunchSpec,
    store: &Store,
    limits: &Limits,
) -> Result<Option<(Network, Exchange)>, Failure> {
    if !spec.config.has_network() {
        return Ok(None);
    }
    let Plugged { network, exchange, ports } = network::plug_in(&spec.config, limits.network)
        .map_err(|network::Failed { message, port }| Failure { port, ..Failure::at("network", message) })?;
    if !ports.is_empty() {
        store.set_ports(spec.run, &ports).map_err(|error| Failure::at("store", chain(&error)))?;
    }
    Ok(Some((network, exchange)))
}

/// The sandbox's log. One that cannot be had keeps nobody from the sandbox.
fn open_log(spec: &LaunchSpec) -> OutputLog {
    if !spec.config.logs {
        return OutputLog::default();
    }
    OutputLog::open(&spec.home.logs(&spec.name)).unwrap_or_else(|error| {
        say(format_args!("there is no log: {error}"));
        OutputLog::default()
    })
}

/// Writes a line to `process.log`, which is standard error. What is to be done goes on if that has no room.
fn say(what: impl Display) {
    let _ = io::stderr().write_all(format!("cubby-sandbox: {what}\n").as_bytes());
}

/// An error and all its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
