//! Run code nobody trusts, inside your own program. A [`Sandbox`] is a child process that boots a microVM: its
//! own kernel, its own disk, nothing of yours.
//!
//! ```
//! # #[tokio::main] async fn main() -> Result<(), cubbyhole::Error> {
//! use cubbyhole::Sandbox;
//!
//! let image = "python:3.12";
//! # let image = std::env::var("CUBBY_TEST_IMAGE").expect("the runner sets it");
//! let sandbox = Sandbox::builder("worker").image(image).create().await?;
//! let output = sandbox.shell("echo hello > /tmp/x && cat /tmp/x").await?;
//! assert_eq!(output.stdout()?, "hello\n");
//! sandbox.stop().await?;
//! Sandbox::remove("worker").await?;
//! # Ok(()) }
//! ```
//!
//! The sandbox process (`cubby-sandbox`), the guest kernel and the agent are installed once, by
//! `cargo xtask install --prefix DIR`; with `DIR/bin` on `PATH` nothing else has to be set. What is kept lies
//! under `~/.microsandbox`, or `CUBBY_HOME`.
//!
//! Everything that waits is `async` and runs on tokio. Every failure is a value of [`Error`].
#![forbid(unsafe_code)]

mod builder;
mod children;
mod connection;
mod context;
mod error;
mod events;
mod exec;
mod fs;
mod host;
mod images;
mod input;
mod launch;
mod link;
mod logs;
mod metrics;
mod network_events;
mod openmetrics;
mod outbox;
mod reaper;
mod sandbox;
mod sessions;
mod vsock;

pub use builder::{Progress, PullPolicy, SandboxBuilder};
pub use error::{Error, EventFault, ExecErrorKind, R};
pub use events::{Event, EventStream, Subscription};
pub use exec::{ExecEvent, ExecHandle, ExecOptions, ExecOutput, ExitStatus};
pub use fs::{
    Copied, CopyOptions, DirEntry, DirReader, FileKind, FileReader, FileWriter, Fs, Metadata, WriteOptions,
};
pub use host::{HostReport, check_host, home};
pub use images::Image;
pub use input::ExecInput;
pub use launch::BootPhase;
pub use logs::{LogLine, LogOptions, LogSource};
pub use metrics::{
    CpuMetrics, DiskMetrics, DroppedFrames, InterfaceMetrics, MemoryMetrics, Metrics, NetworkMetrics,
};
pub use network_events::{DeniedBy, NetworkEvent, NetworkEventKind, NetworkEventStream, NetworkFlow};
pub use openmetrics::openmetrics;
pub use sandbox::{Inspection, Sandbox, SandboxHandle};
pub use sessions::{SessionEnd, SessionInfo};
pub use vsock::VsockStream;

pub use cubby_image::Progress as ImageProgress;
pub use cubby_state::{
    Bandwidth, ExitReason, ExitReport, ImageDefaults, Mistake, NetworkPolicy, Port, SandboxConfig, Status,
    Transport, VsockPort, network,
};
