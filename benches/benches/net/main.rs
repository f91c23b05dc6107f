//! A guest's network, beside others: what bytes, connections and answers cost through a sandbox's, through QEMU's microvm with
//! its user-mode network, and through whatever else is told to run, all with the same program in the guest and the same
//! server on this host's loopback.
//!
//! `cargo xtask bench --icount --only net` is the way to run it: on the instruction clock one processor does all the
//! work, the guest's, the virtual machine monitor's and the server's, so that a figure is what all of it costs, and
//! repeats. On the wall clock it shows a machine, and whatever else that did.
//!
//! `CUBBY_BENCH_PEER=NAME:COMMAND` adds another system: `COMMAND PROGRAM PORT` has to run `PROGRAM run ADDRESS:PORT` in a
//! guest, with the address at which that guest reaches this host's loopback, and to end when its input does. Text goes to
//! standard output, `bench/net-CLOCK.json` to the target directory. On the instruction clock it fails if a promise of SPEC.md
//! was broken.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod qemu;
mod system;

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use cubby_benches::network::{Figures, Work, broken_promises, table};
use cubby_traffic::{Guest, Order};
use system::System;

/// Bytes over all streams that are enough for caches and windows, and those of a measurement.
const WARM_UP: u64 = 8 << 20;
const BYTES: u64 = 32 << 20;
/// Connections opened, and questions asked, in a round.
const CONNECTIONS: u32 = 300;
const QUESTIONS: u32 = 1000;
const ROUNDS: usize = 3;
const STREAMS: [u32; 2] = [1, 32];

fn main() {
    // `cargo test --benches` runs it with this argument: a little is enough to see that it works.
    let brief = std::env::args().any(|argument| argument == "--test");
    let clock = std::env::var("CUBBY_CLOCK").unwrap_or_else(|_| "wall".into());
    let named: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let systems = System::all().into_iter();
    let systems = systems.filter(|system| named.is_empty() || named.iter().any(|name| name == system.name()));
    let mut figures = Vec::new();
    for system in systems {
        eprintln!("{}", system.name());
        match measure(&system, brief) {
            Ok(measured) => figures.push(measured),
            Err(error) => {
                eprintln!("net: {}: {error}", system.name());
                std::process::exit(1);
            }
        }
    }
    println!("clock: {clock}\n{}", table(&figures));
    write(&clock, &figures);
    let broken = if clock == "instructions" && !brief { broken_promises(&figures) } else { Vec::new() };
    broken.iter().for_each(|promise| eprintln!("net: broken: {promise}"));
    if !broken.is_empty() {
        std::process::exit(1);
    }
}

fn measure(system: &System, brief: bool) -> io::Result<Figures> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let running = system.start(listener.local_addr()?.port())?;
    let mut bench = Bench { guest: Guest::accept(&listener)?, listener: &listener };
    let mut figures = Figures::new(system.name());
    let rounds = if brief { 1 } else { ROUNDS };
    let used = || running.work();
    for round in 0..=rounds {
        let connected = bench.connect(CONNECTIONS, used)?;
        if round > 0 {
            figures.add("connections", connected);
        }
    }
    eprintln!("    {}", figures.newest());
    for round in 0..=rounds {
        let answered = bench.ask(QUESTIONS, used)?;
        if round > 0 {
            figures.add("questions answered", answered);
        }
    }
    eprintln!("    {}", figures.newest());
    for streams in STREAMS {
        for (up, name) in [(true, "from"), (false, "to")] {
            let name = format!("{name} the guest, {streams} streams: bytes");
            bench.move_bytes(up, streams, WARM_UP, used)?;
            for _ in 0..rounds {
                figures.add(&name, bench.move_bytes(up, streams, BYTES, used)?);
            }
            eprintln!("    {}", figures.newest());
        }
    }
    drop(bench);
    running.end()?;
    Ok(figures)
}

struct Bench<'a> {
    listener: &'a TcpListener,
    guest: Guest,
}

impl Bench<'_> {
    /// What `work` takes after the guest has prepared for the order.
    fn measure(
        &mut self,
        (order, streams): (Order, u32),
        count: u64,
        used: impl Fn() -> Work,
        work: impl FnOnce(&mut Self, Vec<TcpStream>) -> io::Result<()>,
    ) -> io::Result<Work> {
        self.guest.order(order)?;
        let connected = (0..streams).map(|_| Ok(self.listener.accept()?.0)).collect::<io::Result<_>>()?;
        self.guest.ready()?;
        let (before, begin) = (used(), Instant::now());
        self.guest.go()?;
        work(self, connected)?;
        let time = begin.elapsed();
        let used = used().since(&before);
        Ok(Work { count, time, ..used })
    }

    /// So many bytes in all, until they are at the other end.
    fn move_bytes(&mut self, up: bool, streams: u32, all: u64, used: impl Fn() -> Work) -> io::Result<Work> {
        let bytes = all / u64::from(streams);
        let order = if up { Order::Up { streams, bytes } } else { Order::Down { streams } };
        let moved = self.measure((order, streams), all, used, |_, connected| {
            if up {
                assert_eq!(Guest::receive_all(connected)?, all, "bytes were lost");
                return Ok(());
            }
            Guest::send_all(connected, bytes)
        })?;
        self.guest.done()?;
        Ok(moved)
    }

    /// Connections, each from the guest's `connect` to its end.
    fn connect(&mut self, count: u32, used: impl Fn() -> Work) -> io::Result<Work> {
        self.measure((Order::Connect { count }, 0), count.into(), used, |bench, _| {
            for _ in 0..count {
                bench.listener.accept()?;
            }
            bench.guest.done().map(drop)
        })
    }

    /// Questions and answers of one byte.
    fn ask(&mut self, count: u32, used: impl Fn() -> Work) -> io::Result<Work> {
        self.measure((Order::Ask { count }, 1), count.into(), used, |bench, mut connected| {
            let mut stream = connected.remove(0);
            stream.set_nodelay(true)?;
            let mut byte = [0];
            for _ in 0..count {
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
            bench.guest.done().map(drop)
        })
    }
}

fn write(clock: &str, figures: &[Figures]) {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(std::path::PathBuf::from);
    let target = target.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../target").into());
    let path = target.join("bench").join(format!("net-{clock}.json"));
    let written = std::fs::create_dir_all(target.join("bench"))
        .and_then(|()| std::fs::write(&path, serde_json::to_string_pretty(figures).unwrap()));
    match written {
        Ok(()) => println!("wrote {}", path.display()),
        Err(error) => eprintln!("{}: {error}", path.display()),
    }
}
