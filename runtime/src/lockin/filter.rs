//! Seccomp filters (seccomp(2)): from a table of permitted calls to a program that the host's kernel runs before
//! each call of a thread. What is not in the table kills the process: an error would be a second try for who has
//! taken it over, and a bug of ours is better seen than worked around.
//!
//! The program is a search tree over the calls' numbers, as small as it can be: the kernel translates it, and asks it
//! about every number there is, when it is installed. A list of comparisons makes that take milliseconds.

use std::collections::BTreeMap;
use std::io;

use libc::sock_filter;
use rustix::process::Pid;

use super::refused;
use crate::sys;

/// A system call that a kind of thread makes.
pub(super) struct Call {
    pub(super) number: libc::c_long,
    pub(super) only: Only,
}

/// With which arguments, counted from 0. Each is an `int` or `unsigned` of the kernel's: its low 32 bits count.
#[derive(Clone, Copy)]
pub(super) enum Only {
    /// Any.
    Any,
    /// The argument is one of these.
    OneOf(u8, &'static [u32]),
    /// The argument has none of these bits.
    Without(u8, u32),
    /// The argument is this process.
    OurselvesAt(u8),
}

/// A filter, ready to be installed.
pub(super) struct Filter(Vec<sock_filter>);

/// Offsets in `struct seccomp_data`: the call's number, the architecture, the low half of an argument.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn argument(index: u8) -> u32 {
    16 + 8 * index as u32
}

/// `AUDIT_ARCH_X86_64` (linux/audit.h). The x32 calls have it too, and numbers far above all others.
const X86_64: u32 = 0xc000_003e;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const IF_ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// A program from its end to its beginning, for jumps only go on. A place in it is counted from the end.
#[derive(Default)]
struct Backwards(Vec<sock_filter>);

impl Backwards {
    /// Puts an instruction before all others, and says where it is.
    fn put(&mut self, code: u32, value: u32, jt: u8, jf: u8) -> usize {
        // All codes are below 256.
        let [low, ..] = code.to_le_bytes();
        self.0.push(sock_filter { code: u16::from(low), jt, jf, k: value });
        self.0.len()
    }

    /// The same for a comparison, from which it goes on at either place.
    fn branch(&mut self, code: u32, value: u32, yes: usize, no: usize) -> io::Result<usize> {
        let here = self.0.len();
        let jump = |to| u8::try_from(here - to).map_err(|_| refused("seccomp")(&"too many calls"));
        Ok(self.put(code, value, jump(yes)?, jump(no)?))
    }
}

/// The filter that permits the calls of `tables` to threads of the process `pid`, on x86_64 alone: another
/// architecture's numbers (`int 0x80`) mean other calls, and kill.
pub(super) fn compile(tables: &[&[Call]], pid: Pid) -> io::Result<Filter> {
    let pid = pid.as_raw_nonzero().get().unsigned_abs();
    let mut calls: BTreeMap<u32, Vec<Only>> = BTreeMap::new();
    for call in tables.iter().copied().flatten() {
        let number = u32::try_from(call.number).map_err(|error| refused("seccomp")(&error))?;
        calls.entry(number).or_default().push(call.only);
    }
    // What begins at a number and goes on to the next; `None` is forbidden.
    let mut ranges: Vec<(u32, Option<Vec<Only>>)> = vec![(0, None)];
    for (number, only) in calls {
        let free = only.iter().any(|only| matches!(only, Only::Any));
        let only = if free { Vec::new() } else { only };
        match ranges.last_mut() {
            // It is where the one before ends, which makes one range of both if neither has conditions.
            Some((begin, verdict)) if *begin == number => {
                *verdict = Some(only);
                let merges = matches!(ranges.as_slice(), [.., (_, Some(one)), (_, Some(two))] if one.is_empty() && two.is_empty());
                if merges {
                    ranges.pop();
                }
            }
            _ => ranges.push((number, Some(only))),
        }
        ranges.push((number + 1, None));
    }
    let mut program = Backwards::default();
    let allow = program.put(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0);
    // The nearest to the search: a table that is empty goes on here.
    let kill = program.put(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0);
    let ends = Ends { allow, kill, pid };
    search(&ranges, &ends, &mut program)?;
    let number = program.put(LOAD, NUMBER, 0, 0);
    program.branch(IF_EQUAL, X86_64, number, kill)?;
    program.put(LOAD, ARCHITECTURE, 0, 0);
    program.0.reverse();
    Ok(Filter(program.0))
}

/// Where a search ends, and for whom it is.
struct Ends {
    allow: usize,
    kill: usize,
    pid: u32,
}

/// Puts the search for the last of the ranges that begins at or below the number, and says where it begins.
fn search(ranges: &[(u32, Option<Vec<Only>>)], ends: &Ends, program: &mut Backwards) -> io::Result<usize> {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    match (low, high) {
        ([], [(_, Some(permitted))]) => arguments(permitted, ends, program),
        ([], _) => Ok(ends.kill),
        (low, [(number, _), ..]) => {
            let at_least = search(high, ends, program)?;
            let below = search(low, ends, program)?;
            program.branch(IF_AT_LEAST, *number, at_least, below)
        }
        (_, []) => Ok(ends.kill),
    }
}

/// Puts the look at the arguments of a call that each of these permits; none of them is no look.
fn arguments(permitted: &[Only], ends: &Ends, program: &mut Backwards) -> io::Result<usize> {
    let ourselves = [ends.pid];
    let mut next = if permitted.is_empty() { ends.allow } else { ends.kill };
    for only in permitted {
        let (index, values) = match only {
            Only::Any => return Ok(ends.allow),
            Only::OneOf(index, values) => (*index, *values),
            Only::OurselvesAt(index) => (*index, &ourselves[..]),
            Only::Without(index, bits) => {
                program.branch(IF_ANY_BIT, *bits, next, ends.allow)?;
                next = program.put(LOAD, argument(*index), 0, 0);
                continue;
            }
        };
        for value in values {
            next = program.branch(IF_EQUAL, *value, ends.allow, next)?;
        }
        if !values.is_empty() {
            next = program.put(LOAD, argument(index), 0, 0);
        }
    }
    Ok(next)
}

impl Filter {
    /// Puts the filter on the calling thread, for good.
    pub(super) fn install(&self) -> io::Result<()> {
        sys::install_filter(&self.0).map_err(|error| refused("seccomp")(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do with a call.
    fn run(filter: &Filter, architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = filter.0[at];
            let holds = match u32::from(code) {
                LOAD => {
                    loaded = match k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        k => {
                            assert_eq!(k % 8, 0, "not the low half of an argument");
                            let [low @ .., _, _, _, _] = arguments[(k as usize - 16) / 8].to_le_bytes();
                            u32::from_le_bytes(low)
                        }
                    };
                    at += 1;
                    continue;
                }
                RETURN => return k,
                IF_EQUAL => loaded == k,
                IF_AT_LEAST => loaded >= k,
                IF_ANY_BIT => loaded & k != 0,
                code => panic!("{code:#x} is no instruction of ours"),
            };
            at += 1 + usize::from(if holds { jt } else { jf });
        }
    }

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    const TABLE: &[Call] = &[
        Call { number: 0, only: Only::Any },
        Call { number: 1, only: Only::Any },
        Call { number: 9, only: Only::Without(2, 4) },
        Call { number: 16, only: Only::OneOf(1, &[7, 0xae80]) },
        Call { number: 72, only: Only::OneOf(1, &[1]) },
        Call { number: 72, only: Only::OneOf(0, &[5]) },
        Call { number: 234, only: Only::OurselvesAt(0) },
        Call { number: 435, only: Only::Any },
    ];

    #[test]
    fn a_filter_permits_what_is_in_its_table_and_nothing_else() {
        for length in 0..=TABLE.len() {
            let table = &TABLE[..length];
            let filter = compile(&[table], Pid::from_raw(42).unwrap()).unwrap();
            let far = [500, 0x4000_0000, 0x4000_0001, u32::MAX];
            for number in (0..500).chain(far) {
                let rows = table.iter().filter(|call| call.number == i64::from(number));
                let any = rows.clone().any(|call| matches!(call.only, Only::Any));
                let expected = if any { ALLOW } else { KILL };
                // 0xff is in no row, and has every bit that is forbidden.
                assert_eq!(run(&filter, X86_64, number, [0xff; 6]), expected, "{number} of {length}");
                assert_eq!(run(&filter, 0x4000_0003, number, [0xff; 6]), KILL, "{number} of i386");
            }
        }
    }

    #[test]
    fn arguments_decide_where_a_table_says_so() {
        let filter = compile(&[&TABLE[..4], &TABLE[4..]], Pid::from_raw(42).unwrap()).unwrap();
        let run = |number, arguments| run(&filter, X86_64, number, arguments);
        assert_eq!(run(9, [4, 4, 3, 4, 4, 4]), ALLOW);
        assert_eq!(run(9, [0, 0, 5, 0, 0, 0]), KILL);
        assert_eq!(run(16, [0, 0xae80, 0, 0, 0, 0]), ALLOW);
        assert_eq!(run(16, [0, 7, 0, 0, 0, 0]), ALLOW);
        assert_eq!(run(16, [7, 8, 7, 7, 7, 7]), KILL);
        // The upper half of an int means nothing to the kernel either.
        assert_eq!(run(16, [0, 0xffff_ffff_0000_0007, 0, 0, 0, 0]), ALLOW);
        assert_eq!(run(72, [0, 1, 0, 0, 0, 0]), ALLOW);
        assert_eq!(run(72, [5, 2, 0, 0, 0, 0]), ALLOW);
        assert_eq!(run(72, [1, 5, 0, 0, 0, 0]), KILL);
        assert_eq!(run(234, [42, 1, 0, 0, 0, 0]), ALLOW);
        assert_eq!(run(234, [1, 42, 0, 0, 0, 0]), KILL);
    }
}
