//! `man`: the manual, a page for each command, from the same description that reads the command line.

use std::path::Path;

use clap::CommandFactory;

use crate::arguments::Arguments;
use crate::failure::Failure;

/// Writes the pages into `directory`, which is made if need be: `cubby.1`, `cubby-run.1` and so on.
pub fn write(directory: &Path) -> Result<u8, Failure> {
    let written = std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(Arguments::command(), directory));
    match written {
        Ok(()) => Ok(0),
        Err(error) => {
            Err(Failure::new(format!("cannot write the manual to {}: {error}", directory.display())))
        }
    }
}
