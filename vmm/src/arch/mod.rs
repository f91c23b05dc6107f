//! What belongs to one processor architecture. Today that is x86_64; another one stands beside it and
//! offers the same names.

mod x86_64;

pub(crate) use x86_64::{Boot, cpu, layout, place};
