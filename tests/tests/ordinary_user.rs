//! Nothing here needs root: a user who may open `/dev/kvm`, with the limits that a login has, does all of it.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Output};

use cubby_tests::{small_image, variable};
use serde_json::json;

use super::CUBBY;

/// A directory with all that a user has: a home, the program, what it boots, and a way to KVM.
struct User {
    directory: tempfile::TempDir,
    image: String,
}

impl User {
    /// One who may open `/dev/kvm` by being in its group, if there is one in it.
    fn new(in_group: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        root("cp --recursive --dereference", &[variable("CUBBY_ASSETS").as_ref(), path("assets").as_ref()]);
        root("cp", &[CUBBY.as_ref(), path("cubby").as_ref()]);
        root("cp", &[variable("CUBBY_RUNTIME").as_ref(), path("cubby-sandbox").as_ref()]);
        std::fs::create_dir(path("image")).unwrap();
        let image = small_image(&path("image"), &json!({}));
        root("chown --recursive 65534:65534", &[directory.path().as_ref()]);
        // The same device under a name of its own, whoever may open the machine's.
        let device = std::fs::metadata("/dev/kvm").unwrap().rdev();
        let [major, minor] =
            [rustix::fs::major(device), rustix::fs::minor(device)].map(|part| part.to_string());
        root("mknod --mode=0660", &[path("kvm").as_ref(), "c".as_ref(), major.as_ref(), minor.as_ref()]);
        if in_group {
            root("chgrp 65534", &[path("kvm").as_ref()]);
        }
        Self { directory, image }
    }

    /// Calls `cubby` with the rights, the limits and the environment of a login, and no others.
    fn cubby(&self, arguments: &[&str]) -> Output {
        let path = |name: &str| self.directory.path().join(name);
        let enter = "mount --bind kvm /dev/kvm && exec prlimit --nofile=1024:4096 --memlock=65536 \
                     setpriv --reuid=65534 --regid=65534 --clear-groups ./cubby \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", enter, "sh"]).args(arguments).current_dir(self.directory.path());
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", self.directory.path());
        command.env("CUBBY_HOME", path("home")).env("CUBBY_ASSETS", path("assets"));
        command.output().unwrap()
    }

    /// What a call that has to succeed prints.
    fn says(&self, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.cubby(arguments);
        assert!(status.success(), "{arguments:?}: {status}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap()
    }
}

/// Runs a command of the administrator's.
fn root(command: &str, arguments: &[&OsStr]) {
    let mut words = command.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).args(arguments).status().unwrap();
    assert!(status.success(), "{command} {arguments:?}: {status}");
}

#[test]
fn a_user_who_may_open_kvm_needs_nothing_else() {
    let user = User::new(true);
    let image = user.image.as_str();
    assert!(!user.says(&["doctor"]).contains("FAIL"));
    assert_eq!(
        user.says(&["run", "--rm", image, "sh", "-c", "id -u; echo > /note; id -u nobody"]),
        "0\n65534\n"
    );
    user.says(&["run", "--detach", "--name", "kept", "--publish", "0:80", image]);
    assert_eq!(user.says(&["exec", "kept", "sh", "-c", "echo kept > /note; echo well"]), "well\n");
    user.says(&["pause", "kept"]);
    user.says(&["resume", "kept"]);
    user.says(&["stop", "kept"]);
    user.says(&["start", "kept"]);
    assert_eq!(user.says(&["exec", "kept", "sh", "-c", "read line < /note; echo $line"]), "kept\n");
    user.says(&["kill", "kept"]);
    user.says(&["rm", "kept"]);
    assert_eq!(user.says(&["ls", "--quiet"]), "");
}

#[test]
fn a_user_who_may_not_is_told_how_to_get_there() {
    let user = User::new(false);
    let Output { status, stdout, stderr } = user.cubby(&["doctor"]);
    let said = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
    assert!(!status.success() && said.contains("be in that group"), "{said}");
}
