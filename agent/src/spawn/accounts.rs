//! Users and groups of the guest, read from its `/etc/passwd` and `/etc/group` (a static C library cannot
//! load name-service modules). The files are parsed again whenever they changed.
//!
//! The rules are those of `docker exec --user`: `name`, `uid`, `name:group`, `uid:gid` and mixtures. A number that
//! no line mentions is valid, with group 0 and home `/`. Supplementary groups come with a user that has a line,
//! unless a group is named. Lines that do not parse are passed over.

use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::sys::Credentials;

/// Larger account files are taken as empty.
const MAX_FILE: u64 = 4 << 20;

/// Whom to run as, and where their home is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Numbers for the kernel.
    pub credentials: Credentials,
    /// For `HOME`.
    pub home: String,
}

/// The user or group does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no user or group {0}")]
pub struct Unknown(pub String);

/// The guest's users and groups.
#[derive(Debug)]
pub struct Accounts {
    passwd: Watched,
    group: Watched,
    /// The last answer and its question, as long as both files are what they were: commands tend to run as one user.
    last: Option<(String, Account)>,
}

impl Default for Accounts {
    fn default() -> Self {
        Self::at(Path::new("/etc"))
    }
}

impl Accounts {
    /// The accounts of `directory/passwd` and `directory/group`.
    pub fn at(directory: &Path) -> Self {
        let watched = |name| Watched { path: directory.join(name), ..Watched::default() };
        Self { passwd: watched("passwd"), group: watched("group"), last: None }
    }

    /// Finds whom `user` means; empty means root.
    pub fn find(&mut self, user: &str) -> Result<Account, Unknown> {
        // Both, whether or not the first has changed.
        if self.passwd.refresh() | self.group.refresh() {
            self.last = None;
        }
        if let Some((_, account)) = self.last.as_ref().filter(|(question, _)| question == user) {
            return Ok(account.clone());
        }
        let account = resolve(user, &self.passwd.text, &self.group.text)?;
        self.last = Some((user.into(), account.clone()));
        Ok(account)
    }
}

#[derive(Debug, Default)]
struct Watched {
    path: PathBuf,
    seen: Option<[i64; 5]>,
    text: String,
}

impl Watched {
    /// Reads the file again if it changed, and says whether it did.
    fn refresh(&mut self) -> bool {
        let now = std::fs::metadata(&self.path).ok().filter(|meta| meta.is_file()).map(|meta| {
            [
                meta.dev().cast_signed(),
                meta.ino().cast_signed(),
                meta.size().cast_signed(),
                meta.mtime(),
                meta.mtime_nsec(),
            ]
        });
        let changed = now != self.seen;
        if changed {
            self.text = read(&self.path).unwrap_or_default();
            self.seen = now;
        }
        changed
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    // A FIFO in the file's place must not stop the agent.
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = std::fs::OpenOptions::new().read(true).custom_flags(nonblock).open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn user_line(line: &str) -> Option<User<'_>> {
    let mut fields = line.split(':');
    let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let home = fields.nth(1).unwrap_or_default();
    Some(User { name, uid: number(uid)?, gid: number(gid)?, home })
}

fn group_line(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
    Some((name, number(gid)?, fields.next().unwrap_or_default()))
}

/// Ids above `i32::MAX` are refused, as by Docker: `-1` means "unchanged" to the kernel.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| i32::try_from(*id).is_ok())
}

fn resolve(spec: &str, passwd: &str, group: &str) -> Result<Account, Unknown> {
    let (user, named_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let id = number(user);
    let matches = |line: &User<'_>| line.name == user || (id.is_some() && id == Some(line.uid));
    let line = passwd.lines().filter_map(user_line).find(matches);
    let mut credentials = match (&line, id) {
        (Some(line), _) => Credentials { uid: line.uid, gid: line.gid, groups: Vec::new() },
        (None, Some(uid)) => Credentials { uid, gid: 0, groups: Vec::new() },
        (None, None) => return Err(Unknown(user.into())),
    };
    let mut groups = group.lines().filter_map(group_line);
    if let Some(wanted) = named_group {
        let id = number(wanted);
        let found = groups.find(|(name, gid, _)| *name == wanted || id == Some(*gid)).map(|(_, gid, _)| gid);
        credentials.gid = found.or(id).ok_or_else(|| Unknown(wanted.into()))?;
    } else if let Some(line) = &line {
        let member = |(_, gid, members): (&str, u32, &str)| {
            members.split(',').any(|member| member == line.name).then_some(gid)
        };
        credentials.groups = groups.filter_map(member).collect();
    }
    let home = line.map(|line| line.home).filter(|home| !home.is_empty()).unwrap_or("/");
    Ok(Account { credentials, home: home.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\n\nann:x:1000:100:Ann:/home/ann:/bin/sh\n\
                          77:x:1077:77::/seven:\nbad:x:4294967295:0::/:\n";
    const GROUP: &str = "root:x:0:root\nusers:x:100:\naudio:x:29:bob,ann\nvideo:x:44:ann\nx:y\n";

    fn find(spec: &str) -> Result<(u32, u32, Vec<u32>, String), Unknown> {
        resolve(spec, PASSWD, GROUP).map(|account| {
            let Credentials { uid, gid, groups } = account.credentials;
            (uid, gid, groups, account.home)
        })
    }

    #[test]
    fn users_are_found_as_docker_finds_them() {
        assert_eq!(find(""), Ok((0, 0, vec![0], "/root".into())));
        assert_eq!(find("ann"), Ok((1000, 100, vec![29, 44], "/home/ann".into())));
        assert_eq!(find("1000"), Ok((1000, 100, vec![29, 44], "/home/ann".into())));
        assert_eq!(find("ann:audio"), Ok((1000, 29, vec![], "/home/ann".into())));
        assert_eq!(find("ann:5"), Ok((1000, 5, vec![], "/home/ann".into())));
        assert_eq!(find("4000:audio"), Ok((4000, 29, vec![], "/".into())));
        assert_eq!(find("4000"), Ok((4000, 0, vec![], "/".into())));
        assert_eq!(find("77"), Ok((1077, 77, vec![], "/seven".into())));
        assert_eq!(find(":users"), Ok((0, 100, vec![], "/root".into())));
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_errors() {
        for (spec, subject) in [
            ("eve", "eve"),
            ("ann:nogroup", "nogroup"),
            ("-1", "-1"),
            ("4294967295", "4294967295"),
            ("bad", "bad"),
            ("broken", "broken"),
        ] {
            assert_eq!(find(spec), Err(Unknown(subject.into())), "{spec}");
        }
    }

    #[test]
    fn changed_files_are_read_again() {
        let directory = std::env::temp_dir().join(format!("cubby-accounts-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut accounts = Accounts::at(&directory);
        assert_eq!(accounts.find("ann"), Err(Unknown("ann".into())));
        std::fs::write(directory.join("passwd"), PASSWD).unwrap();
        assert_eq!(accounts.find("ann").unwrap().credentials.uid, 1000);
        // Another question is not given the last answer.
        assert_eq!(accounts.find("77").unwrap().credentials.uid, 1077);
        assert!(accounts.find("ann").unwrap().credentials.groups.is_empty());
        std::fs::write(directory.join("group"), "new:x:9:ann\n").unwrap();
        assert_eq!(accounts.find("ann").unwrap().credentials.groups, [9]);
        std::fs::write(directory.join("passwd"), "ann:x:5:5::/a:\n").unwrap();
        assert_eq!(accounts.find("ann").unwrap().credentials.uid, 5);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
