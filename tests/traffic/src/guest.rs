//! The two ends of the connection over which a guest is told what to do, and what the guest then does.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::exchange::{self, Plan};
use crate::order::Order;
use crate::random::Random;

/// Bytes that a stream is given at once.
const BLOCK: usize = 128 << 10;

/// Ports of the host on which nobody listens are refused like this one, which is for nobody (RFC 6335 §6).
const NOBODY: u16 = 1;

/// Connections of a flood.
const FLOOD: usize = 50;

/// The host's end: the guest that has come first to a listener.
#[derive(Debug)]
pub struct Guest {
    lines: BufReader<TcpStream>,
}

impl Guest {
    /// Waits for the guest.
    ///
    /// # Errors
    /// Those of `accept(2)`.
    pub fn accept(listener: &TcpListener) -> io::Result<Self> {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        Ok(Self { lines: BufReader::new(stream) })
    }

    /// Gives an order. The guest's connections come to the listener before [`Guest::ready`] returns.
    ///
    /// # Errors
    /// The guest has gone.
    pub fn order(&mut self, order: Order) -> io::Result<()> {
        self.say(&order.to_string())
    }

    /// Waits until the guest has all that the order needs.
    ///
    /// # Errors
    /// The guest has gone, or has failed and says why.
    pub fn ready(&mut self) -> io::Result<()> {
        self.hear("ready").map(drop)
    }

    /// Lets it do the next thing.
    ///
    /// # Errors
    /// The guest has gone.
    pub fn go(&mut self) -> io::Result<()> {
        self.say("go")
    }

    /// Waits until it is done, and gives what it says then.
    ///
    /// # Errors
    /// The guest has gone, or has failed and says why.
    pub fn done(&mut self) -> io::Result<String> {
        self.hear("done")
    }

    fn say(&mut self, line: &str) -> io::Result<()> {
        self.lines.get_mut().write_all(format!("{line}\n").as_bytes())
    }

    fn hear(&mut self, expected: &str) -> io::Result<String> {
        let line = next_line(&mut self.lines)?;
        match line.split_once(' ').unwrap_or((&line, "")) {
            (word, rest) if word == expected => Ok(rest.to_owned()),
            _ => Err(io::Error::other(format!("the guest says: {line}"))),
        }
    }
}

fn next_line(lines: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    if lines.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}

/// The guest's end: does what the host at this address says until that hangs up.
///
/// # Errors
/// The host cannot be reached, or says what is no order.
pub fn attend(address: SocketAddr) -> io::Result<()> {
    let control = TcpStream::connect(address)?;
    control.set_nodelay(true)?;
    let mut orders = Orders { address, lines: BufReader::new(control) };
    loop {
        let line = match next_line(&mut orders.lines) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            line => line?,
        };
        let order = line.parse().map_err(|_| io::Error::other(format!("{line}: no order")))?;
        let said = match orders.obey(order) {
            Ok(said) => format!("done {said}"),
            Err(error) => format!("failed: {order}: {error}"),
        };
        orders.say(&said)?;
    }
}

struct Orders {
    address: SocketAddr,
    lines: BufReader<TcpStream>,
}

impl Orders {
    fn say(&mut self, line: &str) -> io::Result<()> {
        self.lines.get_mut().write_all(format!("{line}\n").as_bytes())
    }

    fn connect(&self, count: u32) -> io::Result<Vec<TcpStream>> {
        (0..count).map(|_| TcpStream::connect(self.address)).collect()
    }

    /// Says that everything is there, and waits for the host's word.
    fn begin(&mut self) -> io::Result<()> {
        self.say("ready")?;
        next_line(&mut self.lines).map(drop)
    }

    fn obey(&mut self, order: Order) -> io::Result<String> {
        match order {
            Order::Up { streams, bytes } => {
                let streams = self.connect(streams)?;
                self.begin()?;
                at_once(streams, |stream| send(&stream, bytes))?;
            }
            Order::Down { streams } => {
                let streams = self.connect(streams)?;
                self.begin()?;
                at_once(streams, |stream| receive(&stream).map(drop))?;
            }
            Order::Connect { count } => {
                self.begin()?;
                for _ in 0..count {
                    TcpStream::connect(self.address)?;
                }
            }
            Order::Ask { count } => {
                let stream = self.connect(1)?.remove(0);
                stream.set_nodelay(true)?;
                self.begin()?;
                for _ in 0..count {
                    (&stream).write_all(b"?")?;
                    (&stream).read_exact(&mut [0])?;
                }
            }
            Order::Hold { count } => {
                crate::raise_descriptors();
                let streams = self.connect(count)?;
                self.begin()?;
                for (stream, number) in streams.iter().zip(0u32..) {
                    (&mut &*stream).write_all(&number.to_le_bytes()[..1])?;
                }
                for (stream, number) in streams.iter().zip(0u32..) {
                    let mut byte = [0];
                    (&mut &*stream).read_exact(&mut byte)?;
                    if byte != number.to_le_bytes()[..1] {
                        return Err(io::Error::other(format!("connection {number} has another's byte")));
                    }
                }
                self.begin()?;
            }
            Order::Mix { seed, workers } => return self.mix(seed, workers),
        }
        Ok(String::new())
    }

    fn mix(&mut self, seed: u64, workers: u32) -> io::Result<String> {
        let (end, bytes, streams) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let address = self.address;
        thread::scope(|scope| {
            let mut running = Vec::new();
            for number in 0..workers {
                let (end, bytes, streams) = (&end, &bytes, &streams);
                running.push(scope.spawn(move || {
                    let mut random = Random(seed ^ u64::from(number) << 48);
                    while !end.load(Ordering::Relaxed) {
                        bytes.fetch_add(anything(address, &mut random)?, Ordering::Relaxed);
                        streams.fetch_add(1, Ordering::Relaxed);
                    }
                    io::Result::Ok(())
                }));
            }
            let told = self.begin();
            end.store(true, Ordering::Relaxed);
            running.into_iter().try_for_each(|worker| worker.join().expect("a worker"))?;
            told
        })?;
        Ok(format!("{} {}", streams.into_inner(), bytes.into_inner()))
    }
}

/// One stream, or what else may be done to a network; returns how many bytes have come as they should.
fn anything(address: SocketAddr, random: &mut Random) -> io::Result<u64> {
    match random.below(32) {
        0 => match TcpStream::connect(SocketAddr::new(address.ip(), NOBODY)) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(0),
            other => Err(io::Error::other(format!("connected to nobody: {other:?}"))),
        },
        1 => {
            let flood: io::Result<Vec<_>> = (0..FLOOD).map(|_| TcpStream::connect(address)).collect();
            for stream in flood? {
                if random.below(2) == 0 {
                    exchange::break_off(stream);
                }
            }
            Ok(0)
        }
        _ => {
            let plan = Plan::draw(random);
            exchange::ask(&TcpStream::connect(address)?, &plan)
                .map_err(|error| io::Error::other(format!("{plan:?}: {error}")))
        }
    }
}

fn at_once(streams: Vec<TcpStream>, work: impl Fn(TcpStream) -> io::Result<()> + Sync) -> io::Result<()> {
    thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = streams.into_iter().map(|stream| scope.spawn(move || work(stream))).collect();
        running.into_iter().try_for_each(|stream| stream.join().expect("a stream"))
    })
}

/// Sends so many bytes, and waits for the other end's end: then they are there.
pub(crate) fn send(mut stream: &TcpStream, bytes: u64) -> io::Result<()> {
    let block = vec![0x5a; BLOCK];
    let mut left = bytes;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
        stream.write_all(&block[..now])?;
        left -= now as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::other("an answer that nobody has asked for")),
    }
}

/// Receives until the other end has finished, and tells it by an end; returns how many bytes there were.
pub(crate) fn receive(mut stream: &TcpStream) -> io::Result<u64> {
    let mut block = vec![0; BLOCK];
    let mut bytes = 0;
    loop {
        match stream.read(&mut block)? {
            0 => break,
            n => bytes += n as u64,
        }
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(bytes)
}

impl Guest {
    /// The host's part of [`Order::Up`] on these streams; returns the bytes that came.
    ///
    /// # Errors
    /// A stream has failed.
    pub fn receive_all(streams: Vec<TcpStream>) -> io::Result<u64> {
        let bytes = AtomicU64::new(0);
        at_once(streams, |stream| {
            bytes.fetch_add(receive(&stream)?, Ordering::Relaxed);
            Ok(())
        })?;
        Ok(bytes.into_inner())
    }

    /// The host's part of [`Order::Down`] on these streams.
    ///
    /// # Errors
    /// A stream has failed.
    pub fn send_all(streams: Vec<TcpStream>, bytes: u64) -> io::Result<()> {
        at_once(streams, |stream| send(&stream, bytes))
    }
}
