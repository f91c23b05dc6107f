//! The serial console: a 16550 whose output is kept, the newest [`KEPT`] bytes of it.
//!
//! The guest decides how much it writes and whether it ever ends a line; neither costs the host more than that.
//! A [`ConsoleLog`] reads the output from any thread, also when the device is gone: a crash report needs it then.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::Interrupt;

/// Bytes of output that are kept.
pub const KEPT: usize = 64 << 10;
/// I/O ports of a 16550.
pub const PORTS: u16 = 8;

/// What a guest wrote to its console, readable from any thread.
#[derive(Clone, Debug, Default)]
pub struct ConsoleLog(Arc<Mutex<Log>>);

#[derive(Debug, Default)]
struct Log {
    newest: VecDeque<u8>,
    total: u64,
}

impl ConsoleLog {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest bytes, oldest first: at most [`KEPT`].
    pub fn tail(&self) -> Vec<u8> {
        self.lock().newest.iter().copied().collect()
    }

    /// How many bytes were ever written.
    pub fn total(&self) -> u64 {
        self.lock().total
    }

    fn push(&self, bytes: &[u8]) {
        let mut log = self.lock();
        let skip = bytes.len().saturating_sub(KEPT);
        let new = bytes.get(skip..).unwrap_or(&[]);
        let excess = (log.newest.len() + new.len()).saturating_sub(KEPT);
        log.newest.drain(..excess);
        log.newest.extend(new);
        log.total = log.total.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    }
}

/// Where the serial port writes: the log, and whoever else listens.
struct Output {
    log: ConsoleLog,
    tee: Option<Box<dyn Write + Send>>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.log.push(bytes);
        // A listener that fails has stopped listening; the guest's console goes on.
        if let Some(tee) = &mut self.tee
            && tee.write_all(bytes).is_err()
        {
            self.tee = None;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(tee) = &mut self.tee
            && tee.flush().is_err()
        {
            self.tee = None;
        }
        Ok(())
    }
}

struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}

/// The registers of a serial port, and the input that the guest has not read. Its output is not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// DLL, DLH, IER, IIR, LCR, LSR, MCR, MSR and SCR, in this order.
    registers: [u8; 9],
    input: Vec<u8>,
}

/// A saved console has more input than the port's FIFO holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved serial port holds {0} bytes of input, more than its fifo")]
pub struct FifoOverflow(pub usize);

/// A serial port that the guest uses as its console.
pub struct Console {
    serial: Serial<Line, NoEvents, Output>,
    log: ConsoleLog,
}

impl Console {
    /// A port with its interrupt line. `tee`, if given, gets every byte as well, on the thread that writes
    /// the port, which is a vCPU's: it should not block. One that fails is dropped.
    pub fn new(line: Arc<dyn Interrupt>, tee: Option<Box<dyn Write + Send>>) -> Self {
        let log = ConsoleLog::default();
        Self { serial: Serial::new(Line(line), Output { log: log.clone(), tee }), log }
    }

    /// Continues a port from [`Console::state`], with nothing in its log.
    ///
    /// # Errors
    /// [`FifoOverflow`] if the state is not one that a port can be in.
    pub fn from_state(
        state: &ConsoleState,
        line: Arc<dyn Interrupt>,
        tee: Option<Box<dyn Write + Send>>,
    ) -> Result<Self, FifoOverflow> {
        let [low, high, enable, identification, line_control, line_status, modem, modem_status, scratch] =
            state.registers;
        let saved = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: state.input.clone(),
        };
        let log = ConsoleLog::default();
        let output = Output { log: log.clone(), tee };
        let serial = Serial::from_state(&saved, Line(line), NoEvents, output)
            .map_err(|_| FifoOverflow(state.input.len()))?;
        Ok(Self { serial, log })
    }

    /// What continues the port.
    pub fn state(&self) -> ConsoleState {
        let state = self.serial.state();
        ConsoleState {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            input: state.in_buffer,
        }
    }

    /// Reads the register at `offset`, below [`PORTS`].
    pub fn read(&mut self, offset: u8) -> u8 {
        self.serial.read(offset)
    }

    /// Writes the register at `offset`, below [`PORTS`].
    pub fn write(&mut self, offset: u8, value: u8) {
        // The output takes everything; what can fail is looping back into a full FIFO, which loses the byte.
        let _ = self.serial.write(offset, value);
    }

    /// Gives the guest input. Returns how many bytes the FIFO took; the rest is to be given later.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.serial.fifo_capacity());
        let Some(bytes) = bytes.get(..n).filter(|bytes| !bytes.is_empty()) else { return 0 };
        self.serial.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// What the guest wrote.
    pub fn log(&self) -> &ConsoleLog {
        &self.log
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("total", &self.log.total()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Line as Counter;

    /// DATA and interrupt enable.
    const THR: u8 = 0;
    const IER: u8 = 1;

    fn console() -> (Console, Arc<Counter>) {
        let line = Arc::new(Counter::default());
        (Console::new(line.clone(), None), line)
    }

    #[test]
    fn the_newest_output_is_kept_and_all_of_it_counted() {
        let (mut console, _) = console();
        let log = console.log().clone();
        for i in 0..KEPT + 10 {
            console.write(THR, u8::try_from(i % 251).unwrap());
        }
        drop(console);
        let tail = log.tail();
        assert_eq!((tail.len(), log.total()), (KEPT, KEPT as u64 + 10));
        assert!(tail.iter().enumerate().all(|(i, byte)| usize::from(*byte) == (i + 10) % 251));
    }

    #[test]
    fn a_tee_sees_every_byte_until_it_fails() {
        struct Short(Arc<Mutex<Vec<u8>>>);
        impl Write for Short {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let mut seen = self.0.lock().unwrap();
                if seen.len() == 3 {
                    return Err(io::Error::other("full"));
                }
                seen.extend_from_slice(bytes);
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut console = Console::new(Arc::new(Counter::default()), Some(Box::new(Short(seen.clone()))));
        for byte in *b"abcdef" {
            console.write(THR, byte);
        }
        assert_eq!(*seen.lock().unwrap(), b"abc");
        assert_eq!(console.log().tail(), b"abcdef");
    }

    #[test]
    fn input_is_bounded_by_the_fifo_and_interrupts() {
        let (mut console, line) = console();
        console.write(IER, 1);
        let taken = console.input(&[b'x'; 1000]);
        assert!(taken > 0 && taken < 1000);
        assert!(line.count() > 0);
        assert_eq!(console.input(b"y"), 0);
        for _ in 0..taken {
            assert_eq!(console.read(THR), b'x');
        }
        assert_eq!(console.input(b"y"), 1);
    }

    #[test]
    fn a_saved_port_continues() {
        let (mut console, line) = console();
        console.write(IER, 1);
        console.write(7, 0x5a);
        console.input(b"rest");
        let saved = serde_json::to_string(&console.state()).unwrap();
        let state: ConsoleState = serde_json::from_str(&saved).unwrap();
        let mut again = Console::from_state(&state, line.clone(), None).unwrap();
        assert_eq!(again.read(7), 0x5a);
        assert_eq!(again.read(THR), b'r');
        let wrong = ConsoleState { input: vec![0; 1000], ..state };
        assert_eq!(Console::from_state(&wrong, line, None).unwrap_err(), FifoOverflow(1000));
    }

    #[test]
    fn any_register_access_is_survived() {
        let (mut console, _) = console();
        for offset in 0..=255 {
            for value in [0, 1, 0x10, 0x80, 0xff] {
                console.write(offset, value);
                console.read(offset);
            }
        }
        // Loop-back mode, more than the FIFO holds.
        console.write(3, 0);
        console.write(4, 0x10);
        for _ in 0..1000 {
            console.write(THR, 1);
        }
        assert!(console.state().input.len() <= 64);
    }
}
