//! Orders to the kernel's network (rtnetlink(7)), all of them in one message and its answer: two system calls,
//! however many there are.
//!
//! The kernel carries out one order after another and goes on after a failure. It answers each one that has failed,
//! and the last in any case, for that one asks for it; the first answer with an error names the step.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

use super::{SetupError, at};

/// Bytes of a `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLM_F_REQUEST`, `NLM_F_ACK` and, for something new, `NLM_F_CREATE | NLM_F_EXCL`.
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const NEW: u16 = 0x600;
/// `NLMSG_ERROR`: an answer, to a failure or, with 0 for an error, to none.
const ANSWER: u16 = 2;

/// Orders that are to be carried out in turn.
#[derive(Debug, Default)]
pub(super) struct Orders {
    bytes: Vec<u8>,
    /// Where each order begins, and what it is about.
    steps: Vec<(usize, &'static str)>,
}

/// One order, to be filled with its attributes.
pub(super) struct Order<'a>(&'a mut Vec<u8>);

impl Orders {
    /// Adds an order to change something: its type, and the structure that follows the header.
    pub(super) fn change(&mut self, step: &'static str, kind: u16, fixed: &[u8]) -> Order<'_> {
        self.add(step, kind, REQUEST, fixed)
    }

    /// Adds an order to make something that is not there.
    pub(super) fn create(&mut self, step: &'static str, kind: u16, fixed: &[u8]) -> Order<'_> {
        self.add(step, kind, REQUEST | NEW, fixed)
    }

    fn add(&mut self, step: &'static str, kind: u16, flags: u16, fixed: &[u8]) -> Order<'_> {
        // Sequence numbers are the steps' places. The length is filled in when all are known.
        let sequence = u32::try_from(self.steps.len()).unwrap_or(u32::MAX);
        self.steps.push((self.bytes.len(), step));
        let bytes = &mut self.bytes;
        bytes.extend([0; 4]);
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(fixed);
        Order(bytes)
    }

    /// Writes the lengths, asks for an answer to the last, and gives the message.
    fn message(&mut self) -> &[u8] {
        let ends = self.steps.iter().skip(1).map(|(from, _)| *from).chain([self.bytes.len()]);
        let spans: Vec<_> = self.steps.iter().map(|(from, _)| *from).zip(ends).collect();
        for (from, end) in &spans {
            let length = u32::try_from(end - from).unwrap_or(u32::MAX).to_ne_bytes();
            put(&mut self.bytes, *from, &length);
        }
        if let Some((last, _)) = spans.last()
            && let Some(flags) = self.bytes.get_mut(last + 6..last + 8)
            && let Ok([low, high]) = <&mut [u8; 2]>::try_from(flags)
        {
            [*low, *high] = (u16::from_ne_bytes([*low, *high]) | ACK).to_ne_bytes();
        }
        &self.bytes
    }

    /// Has the kernel carry them out.
    pub(super) fn carry_out(mut self) -> Result<(), SetupError> {
        let failed = at("netlink");
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None);
        let socket = socket.map_err(&failed)?;
        send(&socket, self.message(), SendFlags::empty()).map_err(&failed)?;
        let mut answer = [0; 1024];
        // Each has one answer at most.
        for _ in 0..self.steps.len() {
            let (count, _) = recv(socket.as_fd(), &mut answer, RecvFlags::empty()).map_err(&failed)?;
            if self.is_over(answer.get(..count).unwrap_or(&[]))? {
                return Ok(());
            }
        }
        Err(failed(Errno::PROTO))
    }

    /// Whether an answer is that to the last order.
    fn is_over(&self, answer: &[u8]) -> Result<bool, SetupError> {
        let kind = take(answer, 4).map(u16::from_ne_bytes);
        let (Some(ANSWER), Some(sequence), Some(error)) = (kind, take(answer, 8), take(answer, HEADER))
        else {
            return Err(at("netlink")(Errno::PROTO));
        };
        let step = usize::try_from(u32::from_ne_bytes(sequence)).unwrap_or(usize::MAX);
        let what = self.steps.get(step).map_or("netlink", |(_, what)| what);
        match i32::from_ne_bytes(error).wrapping_neg() {
            0 => Ok(step + 1 == self.steps.len()),
            errno => Err(at(what)(Errno::from_raw_os_error(errno))),
        }
    }
}

impl Order<'_> {
    /// Adds an attribute.
    pub(super) fn with(self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, byte) in bytes.iter_mut().skip(at).zip(value) {
        *to = *byte;
    }
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Orders {
        let mut orders = Orders::default();
        orders.change("first", 16, &[7; 4]);
        orders.create("second", 20, &[8; 4]).with(1, b"abcde").with(2, &[9; 4]);
        orders
    }

    #[test]
    fn golden_bytes() {
        #[rustfmt::skip]
        let golden = [
            20, 0, 0, 0, 16, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 7, 7, 7,
            40, 0, 0, 0, 20, 0, 5, 6, 1, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8,
            9, 0, 1, 0, b'a', b'b', b'c', b'd', b'e', 0, 0, 0, 8, 0, 2, 0, 9, 9, 9, 9,
        ];
        assert_eq!(two().message(), golden);
    }

    #[test]
    fn an_answer_is_the_last_or_names_its_step() {
        let answer = |kind: u8, sequence: u8, error: i32| {
            let mut bytes = vec![36, 0, 0, 0, kind, 0, 0, 0, sequence, 0, 0, 0, 0, 0, 0, 0];
            bytes.extend(error.to_ne_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        assert_eq!(two().is_over(&answer(2, 1, 0)), Ok(true));
        assert_eq!(two().is_over(&answer(2, 0, 0)), Ok(false));
        let error = two().is_over(&answer(2, 0, -101)).unwrap_err();
        assert_eq!((error.what.as_str(), error.errno), ("first", Errno::NETUNREACH));
        for strange in [answer(3, 1, 0), answer(2, 1, 0)[..19].to_vec(), Vec::new()] {
            assert_eq!(two().is_over(&strange).unwrap_err().errno, Errno::PROTO);
        }
        assert_eq!(two().is_over(&answer(2, 9, -1)).unwrap_err().what, "netlink");
    }

    /// Without privileges, and on an interface that nobody has: the kernel's own answer.
    #[test]
    fn the_kernel_understands_and_says_no() {
        let mut orders = Orders::default();
        let mut nobody = [0; 16];
        put(&mut nobody, 4, &0x7fff_fff0_i32.to_ne_bytes());
        orders.change("an interface that is not there", 16, &nobody);
        let error = orders.carry_out().unwrap_err();
        assert_eq!(error.what, "an interface that is not there");
        assert!([Errno::NODEV, Errno::PERM].contains(&error.errno), "{error:?}");
    }
}
