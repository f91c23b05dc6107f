//! A guest's directory as it is listed.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cubby_protocol::message::{FileEntries, FileEntry, FileRequest};
use cubby_protocol::{Kind, decode};

use super::call::{Call, Said, nonsense};
use super::{Metadata, bytes};
use crate::error::{Error, R};
use crate::link::Link;

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    directory: Arc<Path>,
    name: OsString,
    metadata: Metadata,
}

impl DirEntry {
    /// Its name in the directory: one component, never `.` or `..`.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// The directory's path with its name.
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// What was known of it; of a symbolic link, not of what it leads to.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// A directory that is being listed. Dropping it ends the listing.
pub struct DirReader {
    call: Call,
    directory: Arc<Path>,
    entries: VecDeque<FileEntry>,
    over: bool,
}

impl DirReader {
    pub(super) async fn open(link: &Arc<Link>, path: &Path) -> R<Self> {
        let request = FileRequest::List { path: bytes(path) };
        let call = Call::begin(link, "list", path, &request, |_, _| Ok(())).await?;
        Ok(Self { call, directory: path.into(), entries: VecDeque::new(), over: false })
    }

    /// The next entry, in the order of the file system; `None` after the last. Nothing is lost when the future is
    /// dropped before it is ready.
    pub async fn next(&mut self) -> Option<R<DirEntry>> {
        loop {
            if let Some(entry) = self.entries.pop_front() {
                let entry = check(&self.directory, entry);
                if entry.is_err() {
                    self.over = true;
                    self.entries.clear();
                }
                return Some(entry);
            }
            if self.over {
                return None;
            }
            match self.call.next().await.and_then(|said| self.on_said(said)) {
                Ok(more) => self.over = !more,
                Err(error) => {
                    self.over = true;
                    return Some(Err(error));
                }
            }
        }
    }

    /// Whether more may come.
    fn on_said(&mut self, said: Said) -> R<bool> {
        match said {
            Said::Done(_) => Ok(false),
            Said::Frame(Kind::FileEntries, payload) => {
                self.call.give_back(payload.len());
                self.entries.extend(decode::<FileEntries>(&payload)?.0);
                Ok(true)
            }
            Said::Frame(..) => Err(nonsense()),
        }
    }
}

impl std::fmt::Debug for DirReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirReader").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// No kernel has such names, but whoever has taken over the agent may send them.
fn check(directory: &Arc<Path>, entry: FileEntry) -> R<DirEntry> {
    let FileEntry { name, metadata } = entry;
    let improper =
        matches!(&name.0[..], b"" | b"." | b"..") || name.0.iter().any(|byte| matches!(byte, b'/' | 0));
    let name = OsString::from_vec(name.0);
    if improper {
        return Err(Error::BadFileName { directory: directory.to_path_buf(), name });
    }
    Ok(DirEntry { directory: directory.clone(), name, metadata: metadata.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cubby_protocol::message::{FileMetadata, FileTime, PathBytes};

    #[test]
    fn names_that_no_kernel_has_are_errors() {
        let directory = Arc::from(Path::new("/dir"));
        let named = |name: &[u8]| {
            let time = FileTime::default();
            let metadata = FileMetadata {
                mode: 0o100_644,
                size: 0,
                allocated: 0,
                uid: 0,
                gid: 0,
                links: 1,
                inode: 1,
                accessed: time,
                modified: time,
                changed: time,
            };
            check(&directory, FileEntry { name: PathBytes::from(name), metadata })
        };
        for name in [&b""[..], b".", b"..", b"/", b"a/b", b"../x", b"/etc", b"a\0", b"a/"] {
            let refused = named(name);
            assert!(matches!(refused, Err(Error::BadFileName { .. })), "{refused:?}");
        }
        for name in [&b"..."[..], b"\xff", b" ", b"-"] {
            assert_eq!(named(name).unwrap().path(), Path::new("/dir").join(named(name).unwrap().name()));
        }
    }
}
