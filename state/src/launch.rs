//! What an application tells a sandbox process at its start, and what it hears back: one line of JSON each
//! way over an inherited socket.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::{SandboxConfig, SandboxName};
use crate::exit::ExitReason;
use crate::home::Home;
use crate::store::RunId;

/// The longest line either side accepts, newline included, in bytes. Environment and labels are the bulk of
/// it, and [`SandboxConfig::validate`] bounds both.
pub const MAX_LINE: usize = 16 << 20;

/// All that a sandbox process needs to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// Where the store and everything else lies.
    pub home: Home,
    /// The sandbox.
    pub name: SandboxName,
    /// The run that this process is to carry.
    pub run: RunId,
    /// The sandbox's configuration.
    pub config: SandboxConfig,
    /// The image's disk, read-only.
    pub image_disk: PathBuf,
    /// The sandbox's own disk, already formatted.
    pub writable_disk: PathBuf,
    /// Where to listen for clients.
    pub socket: PathBuf,
    /// The lock to hold for as long as the process lives.
    pub lock: PathBuf,
    /// Whether the sandbox ends with the application, that is, when the inherited socket closes.
    pub attached: bool,
    /// How long the boot may take, in milliseconds.
    pub boot_timeout_ms: u64,
}

/// How the launch went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum LaunchReport {
    /// The agent is ready and the socket listens.
    Ready {
        /// The phases of the boot in their order, each with its end in nanoseconds after the process began.
        boot: Vec<(String, u64)>,
    },
    /// There is no guest, and the process is about to end.
    Failed {
        /// Why.
        reason: ExitReason,
        /// What stood in the way, for people.
        message: String,
        /// What the user can do about it.
        #[serde(default)]
        remedy: Option<String>,
        /// The published port that the host does not give, if that is why.
        #[serde(default)]
        port: Option<SocketAddr>,
        /// What the guest wrote before.
        #[serde(default)]
        console_tail: Option<String>,
    },
}

/// What a sandbox process answers to `--check LIB`, on its standard output: whether it could run a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCheck {
    /// The directory of the guest's kernel and agent, or why there is none.
    pub assets: Result<PathBuf, String>,
    /// Whether KVM runs a kernel here.
    pub kvm: Result<(), Unsupported>,
}

/// Why a host cannot run guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsupported {
    /// What stood in the way.
    pub why: String,
    /// What to do about it.
    pub remedy: String,
}

/// A line that is no launch message.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The line is longer than [`MAX_LINE`].
    #[error("a launch message of {len} bytes is longer than the {MAX_LINE} allowed")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// The line is not what was expected.
    #[error("a launch message cannot be read or written")]
    Json(#[from] serde_json::Error),
}

/// `message` as one line, newline included.
///
/// # Errors
/// [`LineError::TooLong`] over [`MAX_LINE`]; [`LineError::Json`] for a path that is not UTF-8.
pub fn to_line<T: Serialize>(message: &T) -> Result<Vec<u8>, LineError> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    check_length(&line)?;
    Ok(line)
}

/// The message in `line`, with or without its newline.
///
/// # Errors
/// [`LineError::TooLong`] over [`MAX_LINE`]; [`LineError::Json`] if the line is not such a message.
pub fn from_line<T: DeserializeOwned>(line: &[u8]) -> Result<T, LineError> {
    check_length(line)?;
    Ok(serde_json::from_slice(line)?)
}

fn check_length(line: &[u8]) -> Result<(), LineError> {
    if line.len() > MAX_LINE { Err(LineError::TooLong { len: line.len() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_messages_are_one_line_and_come_back() {
        let home = Home::at("/home/u/.microsandbox").unwrap();
        let name: SandboxName = "worker".parse().unwrap();
        let mut config = SandboxConfig::new("python:3.12");
        config.env.insert("TEXT".into(), "two\nlines".into());
        let spec = LaunchSpec {
            run: RunId(7),
            config,
            image_disk: home.images().join("x.erofs"),
            writable_disk: home.disk(&name),
            socket: home.socket(&name),
            lock: home.lock(&name),
            attached: true,
            boot_timeout_ms: 10_000,
            home,
            name,
        };
        let line = to_line(&spec).unwrap();
        assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
        assert_eq!(from_line::<LaunchSpec>(&line).unwrap(), spec);

        let ready = LaunchReport::Ready { boot: vec![("kernel".into(), 40_000_000)] };
        let line = to_line(&ready).unwrap();
        assert_eq!(line, b"{\"result\":\"ready\",\"boot\":[[\"kernel\",40000000]]}\n");
        assert_eq!(from_line::<LaunchReport>(&line).unwrap(), ready);
        let failed: LaunchReport =
            from_line(br#"{"result":"failed","reason":{"kind":"host_unsupported"},"message":"no /dev/kvm"}"#)
                .unwrap();
        assert!(matches!(failed, LaunchReport::Failed { remedy: None, port: None, .. }));
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        assert!(matches!(from_line::<LaunchReport>(b"{}"), Err(LineError::Json(_))));
        let long = vec![b' '; MAX_LINE + 1];
        assert!(matches!(from_line::<LaunchReport>(&long), Err(LineError::TooLong { .. })));
    }
}
