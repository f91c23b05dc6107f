//! Seccomp filters (seccomp(2)): from a table of permitted calls to a program that the host's kernel runs before
//! each call of a thread. What is not in the table kills the process: an error would be a second try for who has
//! taken it over, and a bug of ours is better seen than worked around.

use std::collections::BTreeMap;
use std::io;

use rustix::process::Pid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use super::refused;

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
pub(super) struct Filter(BpfProgram);

/// The filter that permits the calls of `tables` to threads of the process `pid`, on x86_64 alone: another
/// architecture's numbers (`int 0x80`) mean other calls, and kill.
pub(super) fn compile(tables: &[&[Call]], pid: Pid) -> io::Result<Filter> {
    let failed = |error: seccompiler::BackendError| refused("seccomp")(&error);
    let pid = u64::from(pid.as_raw_nonzero().get().unsigned_abs());
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in tables.iter().copied().flatten() {
        let of_number = rules.entry(call.number).or_default();
        let mut add = |argument, compared, value: u64| {
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compared, value)?;
            of_number.push(SeccompRule::new(vec![condition])?);
            Ok(())
        };
        match call.only {
            // A number without rules is permitted whatever its arguments.
            Only::Any => Ok(()),
            Only::OneOf(argument, values) => {
                values.iter().try_for_each(|value| add(argument, SeccompCmpOp::Eq, u64::from(*value)))
            }
            Only::Without(argument, bits) => add(argument, SeccompCmpOp::MaskedEq(u64::from(bits)), 0),
            Only::OurselvesAt(argument) => add(argument, SeccompCmpOp::Eq, pid),
        }
        .map_err(failed)?;
    }
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map(Filter)
        .map_err(failed)
}

impl Filter {
    /// Puts the filter on the calling thread, for good.
    pub(super) fn install(&self) -> io::Result<()> {
        apply_filter(&self.0).map_err(|error| refused("seccomp")(&crate::chain(&error)))
    }
}
