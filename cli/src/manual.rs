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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn every_command_has_a_page_and_every_option_is_on_it() {
        let directory = std::env::temp_dir().join(format!("cubby-man-{}", std::process::id()));
        assert_eq!(write(&directory), Ok(0));
        let names = std::fs::read_dir(&directory).unwrap().map(|page| page.unwrap().file_name());
        let pages: BTreeSet<String> = names.map(|name| name.into_string().unwrap()).collect();
        // A command's own commands have pages, too.
        let mut shown = vec![("cubby".to_owned(), Arguments::command())];
        let mut at = 0;
        while let Some((name, command)) = shown.get(at).cloned() {
            let below = command.get_subcommands().filter(|one| !one.is_hide_set());
            shown.extend(below.map(|one| (format!("{name}-{}", one.get_name()), one.clone())));
            at += 1;
        }
        assert_eq!(pages, shown.iter().map(|(name, _)| format!("{name}.1")).collect());
        for (name, command) in &shown {
            let page = std::fs::read_to_string(directory.join(format!("{name}.1"))).unwrap();
            for option in command.get_arguments().filter(|option| !option.is_hide_set()) {
                let long = option.get_long().map(|long| format!("\\-\\-{}", long.replace('-', "\\-")));
                assert!(long.is_none_or(|long| page.contains(&long)), "{name} lacks {option}");
            }
        }
        // Where there is a typesetter, it has nothing to say against them.
        if Command::new("groff").arg("--version").stdout(Stdio::null()).status().is_ok() {
            for page in &pages {
                let mut groff = Command::new("groff");
                groff.args(["-man", "-Tutf8", "-ww", "-z"]).arg(directory.join(page));
                let output = groff.output().unwrap();
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success() && said.is_empty(), "{page}: {said}");
            }
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
