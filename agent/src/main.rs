//! `cubby-agent`: as PID 1 it runs a guest. With `--listen PATH` it serves clients on a Unix socket as an ordinary
//! process with the rights it has, for tests and for trying things out; it then ends when it is killed. Events are
//! exchanged at `PATH.events`.
#![forbid(unsafe_code)]

use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use cubby_agent::events;
use cubby_agent::server::{Peers, Server};
use cubby_protocol::message::GuestConfig;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        cubby_agent::boot::run();
    }
    let mut args = std::env::args_os().skip(1);
    let (Some(option), Some(mut path), None) = (args.next(), args.next(), args.next()) else {
        return usage();
    };
    if option != "--listen" {
        return usage();
    }
    // PID 1 has inherited nothing.
    cubby_agent::sys::heed_signals();
    let served = UnixListener::bind(&path).and_then(|listener| {
        listener.set_nonblocking(true)?;
        let config = GuestConfig { hostname: "test".into(), ..GuestConfig::default() };
        let mut server = Server::new(listener.into(), Peers::Anyone, config)?;
        path.push(".events");
        server.exchange_events(events::listener(&path)?)?;
        server.run()?;
        Ok(())
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cubby-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("cubby-agent is the first process of a guest; elsewhere: cubby-agent --listen PATH");
    ExitCode::from(2)
}
