//! What this computer offers to sandboxes, asked without making one.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use cubby_state::Home;
use cubby_state::launch::{HostCheck, from_line};

use crate::error::{Error, R};
use crate::launch::find_runtime;

/// How long the sandbox process may take to look at the host: a hundred times what it needs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether sandboxes can run here, and what they would be made of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostReport {
    /// The sandbox process's binary.
    pub runtime: PathBuf,
    /// The directory of the guest's kernel and agent, or why there is none.
    pub assets: Result<PathBuf, String>,
    /// Why this computer cannot run virtual machines, and the remedy; `None` if it can.
    pub unsupported: Option<(String, String)>,
}

/// The directory that holds all that is kept: `CUBBY_HOME`, or `~/.microsandbox`. It need not exist yet.
///
/// # Errors
/// [`Error::Store`] if the environment names none, or one that cannot be used.
pub fn home() -> R<PathBuf> {
    let home = Home::from_env().map_err(cubby_state::StoreError::from)?;
    Ok(home.root().to_owned())
}

/// Looks whether this computer can run sandboxes: asks the sandbox process to try KVM and to find what a guest boots
/// from. Takes a few milliseconds and makes nothing.
///
/// # Errors
/// [`Error::RuntimeNotFound`] without a `cubby-sandbox`; [`Error::Process`] if it does not answer, for one because it
/// is of another version.
pub async fn check_host() -> R<HostReport> {
    let runtime = find_runtime(None)?;
    let failed = |why: String| Error::Process { name: String::new(), why };
    let lib = Home::from_env().map_err(cubby_state::StoreError::from)?.lib();
    let mut command = Command::new(&runtime);
    command.arg("--check").arg(lib).stdin(Stdio::null());
    let asked = tokio::task::spawn_blocking(move || command.output());
    let output = match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(output)) => output.map_err(|error| failed(format!("{}: {error}", runtime.display())))?,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(Error::Timeout { what: format!("{} --check", runtime.display()) }),
    };
    let check: HostCheck = from_line(&output.stdout).map_err(|_| {
        failed(format!("{} does not answer --check: install matching versions", runtime.display()))
    })?;
    let unsupported = check.kvm.err().map(|host| (host.why, host.remedy));
    Ok(HostReport { runtime, assets: check.assets, unsupported })
}
