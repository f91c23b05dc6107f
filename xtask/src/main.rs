//! What the project does to itself, one command each: see `cargo xtask --help`.
#![forbid(unsafe_code)]

mod cache;
mod kernel;
mod kvm;
mod packages;
mod process;
mod progress;
mod workspace;

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
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Task::Setup => packages::ensure(
            "this project",
            &[packages::KERNEL, packages::MACHINE, packages::IMAGES, packages::TESTS],
        ),
        Task::Kernel { host } => {
            let kernel = if host { kernel::Kernel::TestHost } else { kernel::Kernel::Guest };
            println!("{}", kernel::ensure(kernel)?.display());
            Ok(())
        }
    }
}
