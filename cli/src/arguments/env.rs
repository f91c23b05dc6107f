//! Environment variables on the command line and in files.

use std::fmt::Display;

/// An environment variable as somebody wrote it: without a value it is to have the one that it has here, if any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    name: String,
    value: Option<String>,
}

impl Variable {
    /// Name and value, unless there is none.
    pub fn resolve(&self) -> Option<(String, String)> {
        let value = self.value.clone().or_else(|| std::env::var(&self.name).ok())?;
        Some((self.name.clone(), value))
    }
}

/// `NAME=VALUE` or `NAME`.
pub fn variable(text: &str) -> Result<Variable, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    match name {
        "" => Err("a variable needs a name: NAME=VALUE".into()),
        name => Ok(Variable { name: name.into(), value }),
    }
}

/// The variables of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VariableFile(pub Vec<Variable>);

/// Reads a file as docker reads one: a variable on each line, nothing quoted; empty lines and those that begin with `#`
/// do not count.
pub fn file(path: &str) -> Result<VariableFile, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let mut variables = Vec::new();
    for (number, line) in (1..).zip(text.trim_start_matches('\u{feff}').lines()) {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |why: &dyn Display| format!("line {number}: {why}");
        let read = variable(line).map_err(|why| wrong(&why))?;
        if read.name.contains(char::is_whitespace) {
            return Err(wrong(&"a variable's name has no spaces"));
        }
        variables.push(read);
    }
    Ok(VariableFile(variables))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_without_a_value_is_taken_from_here() {
        let path = variable("PATH").unwrap().resolve().unwrap();
        assert_eq!(path, ("PATH".to_owned(), std::env::var("PATH").unwrap()));
        assert_eq!(variable("CUBBY_NO_SUCH_VARIABLE").unwrap().resolve(), None);
    }

    #[test]
    fn a_file_is_read_line_by_line() {
        let path = std::env::temp_dir().join(format!("cubby-env-{}", std::process::id()));
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            file(path.to_str().unwrap())
        };
        let VariableFile(variables) =
            read("# all of it\n\nA=1\n  B=\"two words\"  \r\nEMPTY=\nCUBBY_NO_SUCH_VARIABLE\n").unwrap();
        let resolved: Vec<_> = variables.iter().filter_map(Variable::resolve).collect();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(resolved, [pair("A", "1"), pair("B", "\"two words\"  "), pair("EMPTY", "")]);
        assert!(read("A=1\n=2\n").unwrap_err().starts_with("line 2: "));
        assert!(read("A B=1\n").unwrap_err().starts_with("line 1: "));
        std::fs::remove_file(&path).unwrap();
        assert!(file(path.to_str().unwrap()).unwrap_err().contains("No such file"));
    }
}
