//! `cp`: files between this computer and a sandbox, by docker's rules.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use cubbyhole::{Copied, CopyOptions, Error, Fs, Sandbox};

use crate::amount;
use crate::arguments::Cp;
use crate::failure::{Failure, clean, complain};
use crate::progress::ProgressLine;

/// What Linux says of a file that is not there.
const ENOENT: i32 = 2;

/// `cubby cp`
pub async fn copy(cp: Cp) -> Result<u8, Failure> {
    let copied = match (Place::of(&cp.from), Place::of(&cp.to)) {
        (Place::Here(from), Place::There { name, path }) => {
            let fs = Sandbox::get(&name).await?.fs();
            let source = std::fs::metadata(&from).map_err(|error| unreadable(&from, &error))?;
            let target = target(&from, source.is_dir(), &path, there(&fs, &path).await?)?;
            fs.copy_in_with(&from, target, |options| chosen(&cp, options)).await?
        }
        (Place::There { name, path }, Place::Here(to)) => {
            let fs = Sandbox::get(&name).await?.fs();
            let source = fs.stat(&path).await?;
            let target = target(&path, source.is_dir(), &to, here(&to)?)?;
            fs.copy_out_with(&path, target, |options| chosen(&cp, options)).await?
        }
        (Place::Stream, Place::There { name, path }) => {
            if io::stdin().is_terminal() {
                return Err(Failure::new("standard input is a terminal: tar -c DIR | cubby cp - NAME:PATH"));
            }
            let fs = Sandbox::get(&name).await?.fs();
            fs.unpack(io::stdin(), path, |options| chosen(&cp, options)).await?
        }
        (Place::There { name, path }, Place::Stream) => {
            if io::stdout().is_terminal() {
                return Err(Failure::new("standard output is a terminal: cubby cp NAME:PATH - | tar -x"));
            }
            let fs = Sandbox::get(&name).await?.fs();
            fs.pack(path, io::stdout(), |options| chosen(&cp, options)).await?
        }
        (Place::There { name, .. }, Place::There { name: other, .. }) => {
            let remedy = if name == other {
                format!("cubby exec {name} cp -a does that")
            } else {
                "copy to this computer first".to_owned()
            };
            return Err(Failure::new(format!("one of the two has to be here: {remedy}")));
        }
        (Place::Here(_) | Place::Stream, Place::Here(_) | Place::Stream) => {
            return Err(Failure::new("neither is in a sandbox: write NAME:PATH for the one that is"));
        }
    };
    for path in &copied.skipped {
        complain(&clean(&format!("left out {}: it is no file, directory or link", path.display())));
    }
    Ok(u8::from(!copied.skipped.is_empty()))
}

fn chosen<'o>(cp: &Cp, options: &'o mut CopyOptions) -> &'o mut CopyOptions {
    let mut line = ProgressLine::new("", cp.quiet, false);
    options.owners(cp.archive).on_progress(move |copied| line.note(&told(copied)))
}

fn told(copied: &Copied) -> String {
    format!("{} in {} files", amount::bytes(copied.bytes), copied.files)
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("cannot read {}: {error}", path.display()))
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    /// `-`: a tar archive on standard input or output.
    Stream,
    There {
        name: String,
        path: PathBuf,
    },
}

impl Place {
    /// `NAME:PATH` is in a sandbox. What begins with `/` or `.`, or has a slash before its first colon, is here.
    fn of(word: &OsStr) -> Self {
        let bytes = word.as_bytes();
        if bytes == b"-" {
            return Self::Stream;
        }
        let colon = bytes.iter().position(|byte| *byte == b':').filter(|colon| *colon > 0);
        let split = colon.and_then(|colon| Some((bytes.get(..colon)?, bytes.get(colon + 1..)?)));
        match split.and_then(|(name, path)| Some((std::str::from_utf8(name).ok()?, path))) {
            Some((name, path)) if !name.starts_with('.') && !name.contains('/') => {
                // From the root, wherever that is said to begin.
                let path = [if path.starts_with(b"/") { &b""[..] } else { b"/" }, path].concat();
                Self::There { name: name.into(), path: OsString::from_vec(path).into() }
            }
            _ => Self::Here(word.into()),
        }
    }
}

/// What is at a copy's destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Directory,
    Other,
}

async fn there(fs: &Fs, path: &Path) -> Result<Found, Failure> {
    match fs.stat(path).await {
        Ok(found) => Ok(if found.is_dir() { Found::Directory } else { Found::Other }),
        Err(Error::Fs { errno: ENOENT, .. }) => Ok(Found::Nothing),
        Err(error) => Err(error.into()),
    }
}

fn here(path: &Path) -> Result<Found, Failure> {
    match std::fs::metadata(path) {
        Ok(found) => Ok(if found.is_dir() { Found::Directory } else { Found::Other }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::Nothing),
        Err(error) => Err(unreadable(path, &error)),
    }
}

/// Where exactly a copy goes: into a directory that is there, under the source's own name, unless the source is what is in
/// a directory (`DIR/.`); else to the very path.
fn target(from: &Path, is_directory: bool, to: &Path, found: Found) -> Result<PathBuf, Failure> {
    let (said, shown) = (to.as_os_str().as_bytes(), to.display());
    let content = from.as_os_str() == "." || from.as_os_str().as_bytes().ends_with(b"/.");
    match (found, is_directory) {
        (Found::Directory, _) if content => Ok(to.into()),
        (Found::Directory, _) => Ok(from.file_name().map_or_else(|| to.into(), |name| to.join(name))),
        (Found::Other, true) => {
            Err(Failure::new(format!("cannot copy a directory to {shown}: that is a file")))
        }
        (_, false) if said.ends_with(b"/") => {
            Err(Failure::new(format!("cannot copy a file to {shown}: there is no such directory")))
        }
        (Found::Other | Found::Nothing, _) => Ok(to.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_in_a_sandbox_if_it_names_one() {
        let there = |name: &str, path: &str| Place::There { name: name.into(), path: path.into() };
        for (word, expected) in [
            ("box:/etc/passwd", there("box", "/etc/passwd")),
            ("box:etc", there("box", "/etc")),
            ("box:", there("box", "/")),
            ("my.box-1:/a:b", there("my.box-1", "/a:b")),
            ("/tmp/a:b", Place::Here("/tmp/a:b".into())),
            ("./a:b", Place::Here("./a:b".into())),
            ("dir/a:b", Place::Here("dir/a:b".into())),
            (":b", Place::Here(":b".into())),
            ("plain", Place::Here("plain".into())),
            ("-", Place::Stream),
            ("./-", Place::Here("./-".into())),
        ] {
            assert_eq!(Place::of(OsStr::new(word)), expected, "{word}");
        }
        let odd = OsStr::from_bytes(b"box:/\xff");
        assert_eq!(
            Place::of(odd),
            Place::There { name: "box".into(), path: OsStr::from_bytes(b"/\xff").into() }
        );
    }

    #[test]
    fn destinations_are_dockers() {
        use Found::{Directory, Nothing, Other};
        for (from, is_directory, to, found, expected) in [
            ("a/f", false, "/x", Nothing, Some("/x")),
            ("a/f", false, "/x/", Nothing, None),
            ("a/f", false, "/x", Other, Some("/x")),
            ("a/f", false, "/x", Directory, Some("/x/f")),
            ("a/f", false, "/x/", Directory, Some("/x/f")),
            ("a/d", true, "/x", Nothing, Some("/x")),
            ("a/d", true, "/x/", Nothing, Some("/x/")),
            ("a/d/", true, "/x", Directory, Some("/x/d")),
            ("a/d/.", true, "/x", Directory, Some("/x")),
            ("a/d/.", true, "/x", Nothing, Some("/x")),
            (".", true, "/x", Directory, Some("/x")),
            ("/", true, "/x", Directory, Some("/x")),
            ("a/d", true, "/x", Other, None),
        ] {
            let target = target(Path::new(from), is_directory, Path::new(to), found);
            assert_eq!(target.ok().as_deref(), expected.map(Path::new), "{from} to {to}");
        }
    }
}
