//! Streams on which both ends know every byte: who asks says first what is to come, and both then send, compare what comes
//! with it, and see whether the stream ends as it was to end.
//!
//! A stream that ends by itself ends in each direction after its last byte and not before. One that an end breaks off
//! ends for the other with an error: what came until then was right, and an orderly end would be a lie.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use crate::random::Random;

/// How long an end waits for the other; nothing takes so long but what has been forgotten.
const PATIENCE: Duration = Duration::from_secs(100);

/// Bytes that are made and compared at once.
const BLOCK: usize = 64 << 10;

/// One of two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Who has connected.
    Asks,
    /// Who has accepted.
    Answers,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// This end breaks the connection off, having read half of what would come.
    Reset(End),
    /// This end does not read for a while.
    Stall(End),
    /// This end reads little at a time.
    Slow(End),
}

const FAULTS: [Fault; 7] = [
    Fault::None,
    Fault::Reset(End::Asks),
    Fault::Reset(End::Answers),
    Fault::Stall(End::Asks),
    Fault::Stall(End::Answers),
    Fault::Slow(End::Asks),
    Fault::Slow(End::Answers),
];

/// All that there is to know about a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What its bytes are made from.
    pub seed: u64,
    /// Bytes from who asks, and from who answers.
    pub bytes: [u32; 2],
    /// What goes wrong.
    pub fault: Fault,
}

const PLAN: usize = 17;

impl Plan {
    /// Any plan: a third of its directions say nothing, which makes them half-closed from the beginning; most streams are
    /// small, as they are.
    pub fn draw(random: &mut Random) -> Self {
        let seed = random.bits();
        let mut bytes = || match random.below(12) {
            0..4 => 0,
            4..8 => random.below(2000),
            8..11 => random.below(100_000),
            _ => random.below(2_000_000),
        };
        let bytes = [bytes(), bytes()].map(|bytes| u32::try_from(bytes).unwrap_or(0));
        let fault = if random.below(2) == 0 { Fault::None } else { *random.one_of(&FAULTS) };
        Self { seed, bytes, fault }
    }

    fn encode(&self) -> [u8; PLAN] {
        let fault = FAULTS.iter().position(|fault| *fault == self.fault).unwrap();
        let mut bytes = [0; PLAN];
        bytes[..8].copy_from_slice(&self.seed.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.bytes[0].to_le_bytes());
        bytes[12..16].copy_from_slice(&self.bytes[1].to_le_bytes());
        bytes[16] = fault.to_le_bytes()[0];
        bytes
    }

    fn decode(bytes: [u8; PLAN]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            seed: u64::from(word(0)?) | u64::from(word(4)?) << 32,
            bytes: [word(8)?, word(12)?],
            fault: *FAULTS.get(usize::from(bytes[16]))?,
        })
    }

    /// What an end sends, and what it hears.
    fn seen_by(&self, end: End) -> (Pattern, Pattern) {
        let asks = Pattern { random: Random(self.seed), left: self.bytes[0] as usize };
        let answers = Pattern { random: Random(!self.seed), left: self.bytes[1] as usize };
        match end {
            End::Asks => (asks, answers),
            End::Answers => (answers, asks),
        }
    }
}

/// Bytes that look random and are the same on both ends.
struct Pattern {
    random: Random,
    left: usize,
}

impl Pattern {
    /// The next bytes, a block of them unless they end.
    fn next<'a>(&mut self, block: &'a mut [u8]) -> &'a [u8] {
        let len = self.left.min(block.len());
        let bytes = &mut block[..len];
        for eight in bytes.chunks_mut(8) {
            let len = eight.len();
            eight.copy_from_slice(&self.random.bits().to_le_bytes()[..len]);
        }
        self.left -= len;
        bytes
    }
}

/// Asks for a stream and exchanges it; returns how many bytes have come as they should.
///
/// # Errors
/// What was not as it should be.
pub fn ask(mut stream: &TcpStream, plan: &Plan) -> io::Result<u64> {
    prepare(stream)?;
    stream.write_all(&plan.encode())?;
    exchange(stream, plan, End::Asks)
}

/// Answers a stream, whatever it is to be. Who goes away before having asked has not asked.
///
/// # Errors
/// What was not as it should be.
pub fn answer(mut stream: &TcpStream) -> io::Result<u64> {
    prepare(stream)?;
    let mut plan = [0; PLAN];
    match stream.read_exact(&mut plan) {
        Err(error) if is_end(&error) || is_broken(&error) => return Ok(0),
        read => read?,
    }
    let plan = Plan::decode(plan).ok_or_else(|| io::Error::other(format!("no plan: {plan:?}")))?;
    exchange(stream, &plan, End::Answers)
        .map_err(|error| io::Error::new(error.kind(), format!("{plan:?}: {error}")))
}

/// Ends a connection with a reset.
pub fn break_off(stream: TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

fn is_broken(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionReset | BrokenPipe | ConnectionAborted | NotConnected)
}

fn is_end(error: &io::Error) -> bool {
    error.kind() == ErrorKind::UnexpectedEof
}

fn exchange(stream: &TcpStream, plan: &Plan, end: End) -> io::Result<u64> {
    let (mut sent, mut heard) = plan.seen_by(end);
    if plan.fault == Fault::Reset(end) {
        return reset(stream, &mut sent, heard);
    }
    let broken_off = matches!(plan.fault, Fault::Reset(_));
    thread::scope(|scope| {
        let sending = scope.spawn(|| match send(stream, &mut sent) {
            Err(error) if broken_off && is_broken(&error) => Ok(true),
            other => other.map(|()| false),
        });
        let came = hear(stream, &mut heard, plan.fault, end);
        // A socket tells of its reset once: the half that has not heard of it sees an end.
        let told = sending.join().expect("the sending half")?;
        match came {
            Ok(_) if broken_off && !told => {
                Err(io::Error::other("it was broken off, and has ended in order"))
            }
            Err((bytes, error)) if broken_off && (is_broken(&error) || is_end(&error) && told) => Ok(bytes),
            Ok(bytes) => Ok(bytes),
            Err((bytes, error)) => Err(io::Error::new(error.kind(), format!("after {bytes} bytes: {error}"))),
        }
    })
}

fn send(mut stream: &TcpStream, sent: &mut Pattern) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    while sent.left > 0 {
        stream.write_all(sent.next(&mut block))?;
    }
    stream.shutdown(Shutdown::Write)
}

/// Sends everything, hears half of what there is, and closes the connection with a reset.
fn reset(mut stream: &TcpStream, sent: &mut Pattern, mut heard: Pattern) -> io::Result<u64> {
    let mut block = vec![0; BLOCK];
    while sent.left > 0 {
        stream.write_all(sent.next(&mut block))?;
    }
    heard.left /= 2;
    let mut bytes = 0;
    while heard.left > 0 {
        bytes += compare(stream, &mut heard, &mut block, &mut vec![0; BLOCK])? as u64;
    }
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?;
    Ok(bytes)
}

/// Hears all that there is, to the end. An error comes with the bytes before it.
fn hear(
    mut stream: &TcpStream,
    heard: &mut Pattern,
    fault: Fault,
    end: End,
) -> Result<u64, (u64, io::Error)> {
    let step = if fault == Fault::Slow(end) { 1000 } else { BLOCK };
    let (mut expected, mut came) = (vec![0; step], vec![0; step]);
    let (mut bytes, mut steps) = (0, 0u32);
    let middle = heard.left / 2;
    let mut stalled = fault != Fault::Stall(end);
    while heard.left > 0 {
        if !stalled && heard.left <= middle {
            stalled = true;
            thread::sleep(Duration::from_millis(200));
        }
        // So slow only for a while: it is about windows that close, and there may be two million bytes.
        steps += 1;
        if fault == Fault::Slow(end) && steps < 50 {
            thread::sleep(Duration::from_millis(2));
        }
        bytes += compare(stream, heard, &mut expected, &mut came).map_err(|error| (bytes, error))? as u64;
    }
    match stream.read(&mut came) {
        Ok(0) => Ok(bytes),
        Ok(_) => Err((bytes, io::Error::other("more came than was to come"))),
        Err(error) => Err((bytes, error)),
    }
}

/// Takes what there is of the next block and compares it; returns how much that was.
fn compare(
    mut stream: &TcpStream,
    heard: &mut Pattern,
    expected: &mut [u8],
    came: &mut [u8],
) -> io::Result<usize> {
    let expected = heard.next(expected);
    let came = &mut came[..expected.len()];
    stream.read_exact(came)?;
    if came == expected {
        return Ok(came.len());
    }
    let at = came.iter().zip(expected).position(|(came, expected)| came != expected).unwrap_or(0);
    Err(io::Error::new(ErrorKind::InvalidData, format!("byte {at} of this block is another")))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let asks = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (asks, listener.accept().unwrap().0)
    }

    #[test]
    fn every_fault_is_what_both_ends_expect() {
        for fault in FAULTS {
            for bytes in [[0, 0], [100_000, 0], [0, 100_000], [300_000, 200_001]] {
                let plan = Plan { seed: 7, bytes, fault };
                assert_eq!(Plan::decode(plan.encode()), Some(plan));
                let (asks, answers) = pair();
                let answering = thread::spawn(move || answer(&answers));
                // Dropped as soon as it is over: that is when a reset goes out.
                let asked = {
                    let asks = asks;
                    ask(&asks, &plan)
                };
                let answered = answering.join().unwrap();
                assert!(asked.is_ok() && answered.is_ok(), "{plan:?}: {asked:?} {answered:?}");
                if !matches!(fault, Fault::Reset(_)) {
                    assert_eq!((asked.unwrap(), answered.unwrap()), (bytes[1].into(), bytes[0].into()));
                }
            }
        }
    }

    #[test]
    fn a_byte_that_is_another_and_an_end_before_its_time_are_found() {
        let plan = Plan { seed: 7, bytes: [0, 3000], fault: Fault::None };
        for (len, change) in [(2999, 0), (3000, 1), (3001, 0)] {
            let (asks, answers) = pair();
            let wrong = thread::spawn(move || {
                let (mut sent, _) = plan.seen_by(End::Answers);
                let mut bytes = [0; 4000];
                sent.next(&mut bytes[..3000]);
                bytes[1500] ^= change;
                (&answers).write_all(&bytes[..len]).unwrap();
            });
            assert!(ask(&asks, &plan).is_err(), "{len} {change}");
            wrong.join().unwrap();
        }
    }
}
