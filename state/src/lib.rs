//! What a sandbox is, apart from the machine that runs it: the states it goes through, what is remembered
//! of it, and where that lies on disk.
//!
//! * [`machine`]: one pure table from (status, event) to the next status or a typed refusal;
//! * [`store`]: the rows of all sandboxes and their runs, in one SQLite file that many processes share;
//! * [`liveness`]: whether the process behind a row is still the process that wrote it;
//! * [`config`], [`ports`], [`exit`], [`launch`]: the values that pass between an application, the store and a sandbox
//!   process;
//! * [`home`]: the directories and names of all files.
//!
//! The application and the sandbox process both link this crate. It is synchronous, knows nothing of virtual
//! machines, and never removes anything that it did not create.
#![forbid(unsafe_code)]

pub mod bandwidth;
pub mod config;
pub mod exit;
pub mod home;
pub mod launch;
pub mod liveness;
pub mod log;
pub mod machine;
pub mod ports;
pub mod store;
pub mod vsock;

pub use bandwidth::Bandwidth;
pub use config::{ImageDefaults, ImageSource, InvalidConfig, Mistake, SandboxConfig, SandboxName};
pub use cubby_network_policy::{self as network, NetworkPolicy};
pub use exit::{Death, ExitReason, ExitReport};
pub use home::{Home, HomeError};
pub use launch::{LaunchReport, LaunchSpec};
pub use liveness::{LockError, ProcessIdentity, RunLock};
pub use machine::{Event, Next, Refused, Status};
pub use ports::{Port, Transport};
pub use store::{ReaperLease, Record, Run, RunId, Store, StoreError, Summary};
pub use vsock::VsockPort;
