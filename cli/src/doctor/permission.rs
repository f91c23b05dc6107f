//! What to do about a device that somebody may not open: who is missing in which group.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The remedy for a device's permissions, in the names of this computer.
pub fn remedy(path: &Path) -> String {
    let Ok(device) = fs::metadata(path) else { return "make it readable and writable for you".into() };
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let uid = rustix::process::geteuid().as_raw();
    for_group(path, uid, device.gid(), device.mode(), &read("/etc/passwd"), &read("/etc/group"))
}

/// `passwd` and `group` are files of that format (passwd(5), group(5)).
fn for_group(path: &Path, uid: u32, gid: u32, mode: u32, passwd: &str, group: &str) -> String {
    const GROUP_MAY: u32 = 0o060;
    let path = path.display();
    let user = entry(passwd, uid).map_or("$USER", |fields| fields.0);
    match entry(group, gid) {
        Some((name, rest)) if mode & GROUP_MAY == GROUP_MAY && gid != 0 => {
            let members = rest.rsplit(':').next().unwrap_or_default();
            if members.split(',').any(|member| member.trim() == user) {
                format!(
                    "you are in group {name}, but were not when you logged in: log in again, or use newgrp {name}"
                )
            } else {
                format!("add yourself to its group (sudo usermod -aG {name} {user}) and log in again")
            }
        }
        _ => format!(
            "give it to a group (sudo chgrp kvm {path} && sudo chmod 660 {path}), and be in that group"
        ),
    }
}

/// Name and remaining fields of the line whose third field is `id`.
fn entry(file: &str, id: u32) -> Option<(&str, &str)> {
    file.lines().find_map(|line| {
        let mut fields = line.splitn(4, ':');
        let (name, _, number, rest) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        (number.parse() == Ok(id)).then_some((name, rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_is_what_is_missing() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\n";
        let remedy = |uid, gid, mode, group| for_group(Path::new("/dev/kvm"), uid, gid, mode, passwd, group);
        assert!(remedy(1000, 104, 0o660, "kvm:x:104:bob\n").contains("usermod -aG kvm ada"));
        assert!(remedy(1000, 104, 0o660, "kvm:x:104:bob,ada\n").contains("log in again, or use newgrp kvm"));
        assert!(remedy(1234, 104, 0o660, "kvm:x:104:\n").contains("usermod -aG kvm $USER"));
        // Its group may not open it either, has no name, or is root's.
        for (gid, mode, group) in
            [(104, 0o600, "kvm:x:104:\n"), (105, 0o660, "kvm:x:104:\n"), (0, 0o660, "root:x:0:\n")]
        {
            assert!(remedy(1000, gid, mode, group).contains("chgrp kvm /dev/kvm"));
        }
    }
}
