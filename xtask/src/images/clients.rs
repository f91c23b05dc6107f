//! A Debian with the programs that people use networks with, and the servers that those talk to: as an image for guests,
//! and as a directory for servers that run on this computer (`cubby_tests::internet`). One for both, because half of the
//! servers come with their clients anyway. They are not installed on this computer, where each would start a service.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{RECIPE, SUITE, debian, oci_layout, remove};
use crate::cache::{self, Key};
use crate::process::{self, command};
use crate::{packages, progress};

/// What is installed. `libwrap0` is sshd's.
const PACKAGES: &str = "usr-is-merged,bind9-dnsutils,curl,dnsmasq-base,git,iperf3,iputils-ping,libwrap0,lighttpd,\
    lighttpd-mod-openssl,openssh-client,postgresql-client-15,python3-pip,python3-requests,redis-tools";

/// What is in them and not needed: all of Perl but what Debian itself runs on.
const UNREAD: [&str; 2] = ["/usr/share/perl", "/usr/lib/x86_64-linux-gnu/perl"];

/// Servers whose packages would start them, or bring a compiler: only these files of them are taken.
const UNPACKED: [(&str, &str); 2] =
    [("postgresql-15", "./usr/lib/postgresql ./usr/share/postgresql"), ("openssh-server", "./usr/sbin/sshd")];

/// Finds them in the cache or makes them: a directory with the OCI layout `layout` and the unpacked `root`.
pub fn clients() -> Result<PathBuf> {
    packages::ensure("making an image of network clients", &[packages::IMAGES])?;
    let key = Key::default().with(RECIPE).with(SUITE).with(more().concat()).with(PACKAGES).finish();
    cache::entry("clients", &key, |scratch| {
        progress::step("making the image of network clients from Debian's packages (once)", || make(scratch))
    })
}

fn make(scratch: &Path) -> Result<PathBuf> {
    let (tar, made) = (scratch.join("root.tar"), scratch.join("made"));
    remove(&made)?;
    let root = made.join("root");
    fs::create_dir_all(&root)?;
    debian(PACKAGES, &more(), &tar)?;
    oci_layout(&tar, &made.join("layout"))?;
    // Whoever runs the servers owns the files. What is in /dev only root could make.
    let mut extract = command("tar", ["--extract", "--no-same-owner", "--exclude=./dev/*", "--file"]);
    process::run(extract.arg(&tar).arg("--directory").arg(&root))?;
    Ok(made)
}

/// What mmdebstrap is told besides: what not to unpack, and what to do with the new root, its `$1`.
fn more() -> Vec<String> {
    let excluded = UNREAD.map(|unread| format!("--dpkgopt=path-exclude={unread}/*"));
    let unpack = UNPACKED.map(|(package, files)| {
        format!(
            "cd \"$1/tmp\" && APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get --quiet=2 download {package} \
             && dpkg-deb --fsys-tarfile {package}_*.deb > all.tar && rm {package}_*.deb \
             && tar --extract --file all.tar --directory \"$1\" --exclude '*/bitcode' --exclude '*/man' {files} \
             && rm all.tar"
        )
    });
    // Servers run as `somebody`, since some refuse to be root's.
    let somebody = "echo somebody:x:1000:1000::/srv:/bin/sh >> \"$1/etc/passwd\" \
                    && echo somebody:x:1000: >> \"$1/etc/group\""
        .to_owned();
    let hooks = unpack.into_iter().chain([somebody]).map(|hook| format!("--customize-hook={hook}"));
    excluded.into_iter().chain(hooks).collect()
}
