//! What the project does to itself, one command each: see `cargo xtask --help`.
#![forbid(unsafe_code)]

mod cache;
mod kernel;
mod kvm;
mod packages;
mod process;
mod progress;
mod workspace;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "What the project does to itself")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that any of the commands needs
    Setup,
    /// Build the guest kernel (vmlinux) and print its path
    Kernel {
        /// The KVM test machine's kernel instead
        #[arg(long)]
        host: bool,
    },
    /// Run a command where KVM works: here, or on the KVM test machine. Its exit status is this one's
    ///
    /// The test machine sees this computer's files, but what is written outside the checkout, the target directory, the
    /// cache and each --rw directory stays in its memory. It is booted once, takes many commands, and ends when idle.
    Kvm {
        /// Use the machine with one processor on an instruction clock: times are instruction counts and repeat
        #[arg(long)]
        icount: bool,
        /// Share this directory writable
        #[arg(long, value_name = "DIR")]
        rw: Vec<PathBuf>,
        /// End the command after so many seconds, with status 124
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
        /// Boot a machine for this command alone
        #[arg(long)]
        fresh: bool,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    #[command(hide = true)]
    KvmServer,
    #[command(hide = true)]
    KvmKeeper { mode: String, once: String, kernel: PathBuf, dir: PathBuf },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Setup => packages::ensure(
            "this project",
            &[packages::KERNEL, packages::MACHINE, packages::IMAGES, packages::TESTS],
        )?,
        Task::Kernel { host } => {
            let kernel = if host { kernel::Kernel::TestHost } else { kernel::Kernel::Guest };
            println!("{}", kernel::ensure(kernel)?.display());
        }
        Task::Kvm { icount, rw, timeout, fresh, command } => {
            let mode = if icount { kvm::Mode::Icount } else { kvm::Mode::Normal };
            let timeout = timeout.map(Duration::from_secs);
            let options = kvm::Options { mode, writable: rw, timeout, fresh, environment: vec![] };
            return Ok(ExitCode::from(kvm::run(&options, &command)?));
        }
        Task::KvmServer => kvm::serve()?,
        Task::KvmKeeper { mode, once, kernel, dir } => {
            let mode = if mode == "icount" { kvm::Mode::Icount } else { kvm::Mode::Normal };
            kvm::keep(mode, once == "once", &kernel, &dir)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
