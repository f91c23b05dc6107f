//! What a sandbox is made of: all that `start` needs to bring it back, as it is stored in its row.
//!
//! A configuration is checked as a whole: [`SandboxConfig::validate`] returns every mistake, not the first.
//! Fields that a newer version added are ignored on reading, and fields that an older one did not write take
//! their defaults; a value that this version does not know (a network policy, say) is an error, for guessing
//! at it could open what was closed.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use cubby_network_policy::{Base, MAX_RULES, NetworkPolicy};
use serde::{Deserialize, Serialize};

use crate::bandwidth::Bandwidth;
use crate::home::MAX_SOCKET_PATH;
use crate::ports::{MAX_PORTS, Port};
use crate::vsock::{MAX_VSOCK_PORTS, VsockPort};

/// The name of a sandbox: 1 to 128 characters out of `A-Z a-z 0-9 _ . -`, of which the first is a letter or a
/// digit. It is a file name and needs no quoting in a shell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxName(String);

/// A text that cannot name a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{given:?} cannot name a sandbox: a name is 1 to 128 characters out of A-Z a-z 0-9 _ . - and begins with a letter or a digit"
)]
pub struct InvalidName {
    /// What was given, its first 64 characters at most.
    pub given: String,
}

impl SandboxName {
    /// The most characters a name has.
    pub const MAX: usize = 128;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SandboxName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let starts = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        let rest = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
        if starts && rest && text.len() <= Self::MAX {
            Ok(SandboxName(text.to_owned()))
        } else {
            Err(InvalidName { given: text.chars().take(64).collect() })
        }
    }
}

impl TryFrom<String> for SandboxName {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<SandboxName> for String {
    fn from(name: SandboxName) -> String {
        name.0
    }
}

impl fmt::Display for SandboxName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Where the read-only part of the root comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSource {
    /// As the user wrote it: `python:3.12`, `oci:DIR`, `dir:PATH` …
    pub reference: String,
    /// The digest of the manifest it was resolved to, so that a start uses the same image; `None` for a source
    /// that has no manifest.
    #[serde(default)]
    pub digest: Option<String>,
    /// What the image itself asks for.
    #[serde(default)]
    pub defaults: ImageDefaults,
}

/// An image's own configuration (OCI image-spec, config.md), which the sandbox's goes over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageDefaults {
    /// `NAME=value` each, as the image has them.
    pub env: Vec<String>,
    /// What the image starts, before `cmd`.
    pub entrypoint: Vec<String>,
    /// The arguments of the entry point.
    pub cmd: Vec<String>,
    /// The user it runs as: a name or id, optionally `:` and a group.
    pub user: Option<String>,
    /// The directory it starts in.
    pub workdir: Option<String>,
}

/// The configuration of one sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// The image.
    pub image: ImageSource,
    /// Virtual processors, 1 to 32.
    #[serde(default = "default_cpus")]
    pub cpus: u8,
    /// Memory in MiB, from 64 to 1 TiB.
    #[serde(default = "default_memory")]
    pub memory_mib: u32,
    /// Size of the sandbox's own disk in MiB, from 16 to 1 TiB. It is sparse.
    #[serde(default = "default_disk")]
    pub disk_mib: u32,
    /// Environment of every command, over the image's.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Directory of every command: an absolute path. `None`: the image's, else `/`.
    #[serde(default)]
    pub workdir: Option<String>,
    /// User of every command: a name or id, optionally `:` and a group. `None`: the image's, else root.
    #[serde(default)]
    pub user: Option<String>,
    /// The guest's host name. `None`: made from the sandbox's name.
    #[serde(default)]
    pub hostname: Option<String>,
    /// What `shell` runs: an absolute path. `None`: `/bin/sh`.
    #[serde(default)]
    pub shell: Option<String>,
    /// The user's own marks on it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// How long it may live, in seconds, by the host's monotonic clock. `None`: for ever.
    #[serde(default)]
    pub max_duration_s: Option<u64>,
    /// How long nobody may use it, in seconds. `None`: for ever.
    #[serde(default)]
    pub idle_timeout_s: Option<u64>,
    /// How many clients may be connected at once, 1 to 1000.
    #[serde(default = "default_clients")]
    pub max_clients: u16,
    /// Whether it is removed when it ends.
    #[serde(default)]
    pub ephemeral: bool,
    /// Whether what its sessions and its console write is kept.
    #[serde(default = "default_logs")]
    pub logs: bool,
    /// Ports of the host that lead into it, [`MAX_PORTS`] at most; no port of the host twice.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// Whom it may talk to.
    #[serde(default)]
    pub network: NetworkPolicy,
    /// Who is asked for names on its behalf, four at most. None: whom the host itself asks.
    #[serde(default)]
    pub resolvers: Vec<SocketAddr>,
    /// How much it may send and receive in a second.
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// The file that gets a record of all its frames: an absolute path.
    #[serde(default)]
    pub capture: Option<PathBuf>,
    /// Vsock ports of the host that lead to Unix sockets, [`MAX_VSOCK_PORTS`] at most; none twice.
    #[serde(default)]
    pub vsock: Vec<VsockPort>,
    /// The sandbox process's binary, if the user named one.
    #[serde(default)]
    pub runtime: Option<PathBuf>,
}

const fn default_cpus() -> u8 {
    1
}

const fn default_memory() -> u32 {
    512
}

const fn default_disk() -> u32 {
    4096
}

const fn default_clients() -> u16 {
    16
}

const fn default_logs() -> bool {
    true
}

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {given}, but must be {allowed}")]
pub struct Mistake {
    /// Which setting, as the builder calls it.
    pub field: &'static str,
    /// What was given, shortened.
    pub given: String,
    /// What would be right.
    pub allowed: &'static str,
}

/// All that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidConfig(pub Vec<Mistake>);

impl fmt::Display for InvalidConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the configuration has mistakes: ")?;
        for (i, mistake) in self.0.iter().enumerate() {
            write!(f, "{}{mistake}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for InvalidConfig {}

/// The longest argument or `NAME=value` that Linux passes to a program, in bytes with its NUL (execve(2)).
const MAX_STRING: usize = 128 << 10;

/// The most bytes of environment, and of labels.
const MAX_TOTAL: usize = 1 << 20;

const NO_NETWORK: &str = "left away where the network is none";
const TEXT: &str = "1 to 4095 bytes without NUL";
const ABSOLUTE: &str = "an absolute path of at most 4095 bytes without NUL";

impl SandboxConfig {
    /// A sandbox of the given image: 1 processor, 512 MiB of memory, a disk of 4 GiB, 16 clients, no limits
    /// of time.
    #[must_use]
    pub fn new(reference: impl Into<String>) -> Self {
        SandboxConfig {
            image: ImageSource { reference: reference.into(), ..ImageSource::default() },
            cpus: default_cpus(),
            memory_mib: default_memory(),
            disk_mib: default_disk(),
            env: BTreeMap::new(),
            workdir: None,
            user: None,
            hostname: None,
            shell: None,
            labels: BTreeMap::new(),
            max_duration_s: None,
            idle_timeout_s: None,
            max_clients: default_clients(),
            ephemeral: false,
            logs: default_logs(),
            ports: Vec::new(),
            network: NetworkPolicy::default(),
            resolvers: Vec::new(),
            bandwidth: Bandwidth::default(),
            capture: None,
            vsock: Vec::new(),
            runtime: None,
        }
    }

    /// Whether the guest has a network card at all: not if there is nobody to whom a policy without rules lets it talk.
    #[must_use]
    pub fn has_network(&self) -> bool {
        self.network.base() != Base::None || !self.network.rules().is_empty()
    }

    /// Checks everything.
    ///
    /// # Errors
    /// [`InvalidConfig`] with every mistake there is.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let mut found = Mistakes::default();
        found.check("image", &self.image.reference, is_text(&self.image.reference), TEXT);
        if let Some(digest) = &self.image.digest {
            found.check(
                "image digest",
                digest,
                is_digest(digest),
                "sha256: or sha512: and its hexadecimal digits",
            );
        }
        found.check("cpus", &self.cpus, (1..=32).contains(&self.cpus), "1 to 32");
        found.check(
            "memory",
            &self.memory_mib,
            (64..=1 << 20).contains(&self.memory_mib),
            "64 to 1048576 MiB",
        );
        found.check("disk", &self.disk_mib, (16..=1 << 20).contains(&self.disk_mib), "16 to 1048576 MiB");
        for (name, value) in &self.env {
            let right = !name.is_empty()
                && !name.contains(['=', '\0'])
                && !value.contains('\0')
                && name.len().saturating_add(value.len()).saturating_add(2) <= MAX_STRING;
            found.check(
                "env",
                name,
                right,
                "a name without = and NUL, a value without NUL, 128 KiB together",
            );
        }
        found.check("env", &"too long", total(&self.env) <= MAX_TOTAL, "1 MiB in all");
        let paths = [("workdir", &self.workdir), ("shell", &self.shell)];
        for (field, path) in paths.into_iter().filter_map(|(field, path)| Some((field, path.as_ref()?))) {
            found.check(field, path, path.starts_with('/') && is_text(path), ABSOLUTE);
        }
        if let Some(user) = &self.user {
            found.check("user", user, is_user(user), "a name or id, optionally followed by : and a group");
        }
        if let Some(hostname) = &self.hostname {
            let allowed = "1 to 64 letters, digits, - and . with neither - nor . at an end";
            found.check("hostname", hostname, is_hostname(hostname), allowed);
        }
        for (key, value) in &self.labels {
            let right = (1..=256).contains(&key.len()) && value.len() <= 4096;
            found.check("label", key, right, "a key of 1 to 256 bytes and a value of at most 4096");
        }
        found.check("label", &"too long", total(&self.labels) <= MAX_TOTAL, "1 MiB in all");
        found.check("max_duration", &0, self.max_duration_s != Some(0), "at least 1 s");
        found.check("idle_timeout", &0, self.idle_timeout_s != Some(0), "at least 1 s");
        found.check("max_clients", &self.max_clients, (1..=1000).contains(&self.max_clients), "1 to 1000");
        for (i, port) in self.ports.iter().enumerate() {
            found.check("port", port, port.guest != 0, "1 to 65535 in the guest");
            let twice = self.ports.iter().take(i).any(|earlier| earlier.collides(port));
            found.check("port", port, !twice, "a port of the host that no other line uses");
            found.check("port", port, self.has_network(), NO_NETWORK);
        }
        let count = self.ports.len();
        found.check(
            "port",
            &format_args!("there {count} times"),
            count <= MAX_PORTS,
            "there 256 times at most",
        );
        let rules = self.network.rules().len();
        found.check("network", &format_args!("{rules} rules"), rules <= MAX_RULES, "of 1024 rules at most");
        for resolver in &self.resolvers {
            found.check("resolver", resolver, resolver.port() != 0, "an address with a port from 1 to 65535");
        }
        let resolvers = self.resolvers.len();
        found.check(
            "resolver",
            &format_args!("there {resolvers} times"),
            resolvers <= 4,
            "there 4 times at most",
        );
        let Bandwidth { upload, download } = self.bandwidth;
        for bits in [upload, download].into_iter().flatten() {
            let right = (Bandwidth::LEAST..=Bandwidth::MOST).contains(&bits);
            found.check("bandwidth", &bits, right, "1000000 to 1000000000000 bit/s");
        }
        if let Some(capture) = &self.capture {
            let right = capture.is_absolute() && capture.to_str().is_some_and(is_text);
            found.check("capture", &capture.display(), right, ABSOLUTE);
            found.check("capture", &capture.display(), self.has_network(), NO_NETWORK);
        }
        for (i, VsockPort { port, path }) in self.vsock.iter().enumerate() {
            let allowed = "1 to 4294967294, but not 1024 to 1039, which are the sandbox's own";
            let right = (1..u32::MAX).contains(port) && !(1024..=1039).contains(port);
            found.check("vsock port", port, right, allowed);
            let twice = self.vsock.iter().take(i).any(|earlier| earlier.port == *port);
            found.check("vsock port", port, !twice, "a port that leads nowhere else");
            let right = path.is_absolute()
                && path.to_str().is_some_and(|path| is_text(path) && path.len() <= MAX_SOCKET_PATH);
            let allowed = "an absolute path of at most 107 bytes without NUL";
            found.check("vsock path", &path.display(), right, allowed);
        }
        let count = self.vsock.len();
        let given = format_args!("there {count} times");
        found.check("vsock port", &given, count <= MAX_VSOCK_PORTS, "there 64 times at most");
        if let Some(runtime) = &self.runtime {
            found.check("runtime", &runtime.display(), runtime.to_str().is_some_and(is_text), TEXT);
        }
        if found.0.is_empty() { Ok(()) } else { Err(InvalidConfig(found.0)) }
    }
}

#[derive(Default)]
struct Mistakes(Vec<Mistake>);

impl Mistakes {
    fn check(&mut self, field: &'static str, given: &dyn fmt::Display, right: bool, allowed: &'static str) {
        if !right {
            let given = format!("{:?}", given.to_string().chars().take(64).collect::<String>());
            self.0.push(Mistake { field, given, allowed });
        }
    }
}

fn total(map: &BTreeMap<String, String>) -> usize {
    map.iter().fold(0, |sum, (key, value)| sum.saturating_add(key.len()).saturating_add(value.len()))
}

fn is_text(text: &str) -> bool {
    (1..=4095).contains(&text.len()) && !text.contains('\0')
}

fn is_digest(text: &str) -> bool {
    let hex = |digits: &str, count| {
        digits.len() == count && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    match text.split_once(':') {
        Some(("sha256", digits)) => hex(digits, 64),
        Some(("sha512", digits)) => hex(digits, 128),
        _ => false,
    }
}

fn is_user(text: &str) -> bool {
    let part = |part: &str| {
        (1..=256).contains(&part.len())
            && !part.chars().any(|c| c.is_control() || c.is_whitespace() || c == ':')
    };
    match text.split_once(':') {
        Some((user, group)) => part(user) && part(group),
        None => part(text),
    }
}

fn is_hostname(text: &str) -> bool {
    text.len() <= 64
        && text.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}

#[cfg(test)]
mod tests {
    use cubby_network_policy::Rule;

    use super::*;

    #[test]
    fn names() {
        let longest = "n".repeat(128);
        for name in ["a", "0", "worker", "Worker_1.a-b", "a..b", longest.as_str()] {
            assert_eq!(name.parse::<SandboxName>().unwrap().as_str(), name);
        }
        let (too_long, emoji) = ("n".repeat(129), "🦀".repeat(1024));
        for name in
            ["", ".", "..", "-a", "_a", "a/b", "/a", "../a", "a\0", "a\n", "a b", "ü", &too_long, &emoji]
        {
            let error = name.parse::<SandboxName>().unwrap_err();
            assert!(error.given.chars().count() <= 64);
        }
        assert!(serde_json::from_str::<SandboxName>(r#""a/b""#).is_err());
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let mut config = SandboxConfig::new("");
        config.cpus = 33;
        config.memory_mib = 63;
        config.disk_mib = 15;
        config.env.insert("A=B".into(), String::new());
        config.workdir = Some("relative".into());
        config.user = Some("a:b:c".into());
        config.hostname = Some("-x".into());
        config.shell = Some(String::new());
        config.labels.insert(String::new(), String::new());
        config.max_duration_s = Some(0);
        config.idle_timeout_s = Some(0);
        config.max_clients = 0;
        config.image.digest = Some("sha256:12".into());
        config.ports = vec![Port::new(80, 80), Port::new(80, 81), Port::new(1, 0)];
        config.resolvers = vec![([127, 0, 0, 1], 0).into()];
        config.runtime = Some(PathBuf::new());
        let InvalidConfig(mistakes) = config.validate().unwrap_err();
        let fields: Vec<_> = mistakes.iter().map(|mistake| mistake.field).collect();
        let expected = [
            "image",
            "image digest",
            "cpus",
            "memory",
            "disk",
            "env",
            "workdir",
            "shell",
            "user",
            "hostname",
            "label",
            "max_duration",
            "idle_timeout",
            "max_clients",
            "port",
            "port",
            "resolver",
            "runtime",
        ];
        assert_eq!(fields, expected);
        assert_eq!(mistakes[2].to_string(), "cpus is \"33\", but must be 1 to 32");
    }

    #[test]
    fn the_limits_themselves_are_right() {
        let mut config = SandboxConfig::new("python:3.12");
        config.validate().unwrap();
        config.cpus = 32;
        config.memory_mib = 64;
        config.disk_mib = 1 << 20;
        config.image.digest = Some(format!("sha256:{}", "0a".repeat(32)));
        config.env.insert("A".into(), "=".repeat(MAX_STRING - 3));
        config.workdir = Some("/".into());
        config.user = Some("1000:users".into());
        config.hostname = Some("a-1.example".into());
        config.max_clients = 1000;
        config.ports = vec![
            Port::new(65535, 1),
            Port::new(1, 1),
            Port::new(1, 1).udp(),
            Port::new(0, 1),
            Port::new(0, 1),
        ];
        config.resolvers = vec![([127, 0, 0, 1], 53).into(); 4];
        config.validate().unwrap();
        config.env.insert("A".into(), "=".repeat(MAX_STRING - 2));
        assert_eq!(config.validate().unwrap_err().0.len(), 1);
    }

    #[test]
    fn a_sandbox_without_a_network_has_no_ports_and_rules_are_few() {
        let mut config = SandboxConfig::new("python:3.12");
        assert!(config.has_network());
        config.network = NetworkPolicy::none();
        assert!(!config.has_network());
        config.ports = vec![Port::new(80, 80)];
        let given = |config: &SandboxConfig| config.validate().unwrap_err().to_string();
        assert!(given(&config).contains("127.0.0.1:80->80/tcp"), "{}", given(&config));
        config.network = NetworkPolicy::none().rule(Rule::allow().inbound());
        config.validate().unwrap();
        assert!(config.has_network());
        config.network = (0..1024).fold(NetworkPolicy::none(), |policy, _| policy.rule(Rule::allow()));
        config.ports = vec![Port::new(0, 80); 256];
        config.validate().unwrap();
        config.network = config.network.rule(Rule::allow());
        config.ports.push(Port::new(0, 80));
        config.resolvers = vec![([127, 0, 0, 1], 53).into(); 5];
        assert_eq!(config.validate().unwrap_err().0.len(), 3);
    }

    #[test]
    fn what_a_network_may_carry_and_where_vsock_ports_lead_has_limits() {
        let mut config = SandboxConfig::new("python:3.12");
        config.bandwidth = Bandwidth { upload: Some(Bandwidth::LEAST), download: Some(Bandwidth::MOST) };
        config.capture = Some("/tmp/x.pcap".into());
        let port = |port, path: String| VsockPort { port, path: path.into() };
        let longest = format!("/{}", "x".repeat(MAX_SOCKET_PATH - 1));
        let ports = (0..64).map(|n| port(if n == 0 { u32::MAX - 1 } else { 1039 + n }, longest.clone()));
        config.vsock = ports.collect();
        config.validate().unwrap();

        let fields = |config: &SandboxConfig| -> Vec<&'static str> {
            config.validate().unwrap_err().0.iter().map(|mistake| mistake.field).collect()
        };
        config.vsock.push(port(1, longest.clone()));
        assert_eq!(fields(&config), ["vsock port"], "there are 65");
        let wrong = [port(0, longest.clone()), port(1024, longest.clone()), port(1039, longest.clone())];
        config.vsock = wrong.into();
        config.vsock.extend([port(u32::MAX, longest.clone()), port(7, "x".into()), port(7, longest + "y")]);
        let ports = ["vsock port", "vsock port", "vsock port", "vsock port"];
        assert_eq!(fields(&config), [&ports[..], &["vsock path", "vsock port", "vsock path"]].concat());
        config.vsock.clear();
        config.bandwidth =
            Bandwidth { upload: Some(Bandwidth::LEAST - 1), download: Some(Bandwidth::MOST + 1) };
        config.capture = Some("x.pcap".into());
        assert_eq!(fields(&config), ["bandwidth", "bandwidth", "capture"]);
        config.bandwidth = Bandwidth::default();
        config.capture = Some("/tmp/x.pcap".into());
        config.network = NetworkPolicy::none();
        assert_eq!(fields(&config), ["capture"], "nothing to capture");
    }

    #[test]
    fn older_and_newer_rows_can_be_read() {
        let old: SandboxConfig = serde_json::from_str(r#"{"image":{"reference":"a"}}"#).unwrap();
        assert_eq!(old, SandboxConfig::new("a"));
        let new = r#"{"image":{"reference":"a","signed":true},"gpus":2}"#;
        assert_eq!(serde_json::from_str::<SandboxConfig>(new).unwrap(), SandboxConfig::new("a"));
        let port = r#"{"image":{"reference":"a"},"network":"all","ports":[{"host":80,"guest":8000}]}"#;
        let port = serde_json::from_str::<SandboxConfig>(port).unwrap();
        assert_eq!((port.network, port.ports), (NetworkPolicy::all(), vec![Port::new(80, 8000)]));
        let unknown = r#"{"image":{"reference":"a"},"network":"friends_only"}"#;
        assert!(serde_json::from_str::<SandboxConfig>(unknown).is_err());
    }
}
