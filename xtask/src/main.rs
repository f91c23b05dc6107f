//! What the project does to itself, one command each: see `cargo xtask --help`.
#![forbid(unsafe_code)]

mod assets;
mod cache;
mod demo;
mod deny;
mod guide;
mod images;
mod kernel;
mod kvm;
mod packages;
mod process;
mod progress;
mod python_suite;
mod registry;
mod runner;
mod test;
mod within;
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
    /// Make the Python image of demo and tests and print where it is
    Image,
    /// Build what a sandbox is made of into target/assets: guest kernel, guest agent, sandbox process
    Assets,
    /// Build the same and the cubby command, and install it with its man pages and completions: PREFIX/bin, PREFIX/lib/cubby
    /// and PREFIX/share
    Install {
        #[arg(long, value_name = "DIR")]
        prefix: PathBuf,
    },
    /// Create a sandbox from an image and run something in it, with the time of each step
    Demo {
        /// Any image reference; without it a Python image is made here and served by a registry
        #[arg(long)]
        image: Option<String>,
        /// What to run in it
        #[arg(last = true)]
        command: Vec<OsString>,
    },
    /// Everything that CI checks: format, clippy, dependencies, unit tests, end-to-end tests on KVM
    Test,
    /// Python's own tests in a sandbox and in a container, and where the two differ
    ///
    /// Takes a quarter of an hour where KVM has to be emulated. docs/python-suite.md has the differences; any other is a
    /// failure. The container needs runc, and root.
    PythonSuite {
        /// The modules (default: test_mmap test_os test_pty test_socket test_subprocess)
        modules: Vec<String>,
    },
    /// The guide as HTML (mdBook), into target/guide
    Guide,
    /// cargo bench, where KVM works
    Bench {
        /// On the instruction clock: times are instruction counts and repeat
        #[arg(long)]
        icount: bool,
        /// Only this one: `boot` or `net`
        #[arg(long, value_name = "NAME")]
        only: Option<String>,
        /// For the benchmark program
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Run a binary of this workspace where KVM works, with all that it needs (cargo's runner)
    #[command(hide = true)]
    Runner {
        #[arg(last = true, required = true)]
        program: Vec<OsString>,
    },
    /// Run a program with all that sandboxes need around it
    #[command(hide = true)]
    Within {
        #[arg(long)]
        assets: PathBuf,
        #[arg(long)]
        image: Option<PathBuf>,
        #[arg(long)]
        registry: bool,
        #[arg(long)]
        clients: Option<PathBuf>,
        #[arg(long)]
        in_memory: bool,
        #[arg(last = true, required = true)]
        program: Vec<OsString>,
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
            let options = kvm::Options { mode, writable: rw, timeout, fresh };
            return Ok(ExitCode::from(kvm::run(&options, &command)?));
        }
        Task::Image => println!("{}", images::PythonImage::ensure()?.dir().display()),
        Task::Assets => println!("{}", assets::build(assets::Cargo::Shows)?.display()),
        Task::Install { prefix } => assets::install(&prefix)?,
        Task::Demo { image, command } => return Ok(ExitCode::from(demo::run(image, command)?)),
        Task::Test => test::run()?,
        Task::Guide => guide::build()?,
        Task::PythonSuite { modules } => python_suite::run(&modules)?,
        Task::Bench { icount, only, arguments } => {
            packages::ensure("comparing networks", &[packages::PEERS])?;
            let mut cargo = workspace::cargo()?;
            cargo.args(["bench", "--package", "cubby-benches"]);
            cargo.args(only.iter().flat_map(|name| ["--bench", name]));
            cargo.arg("--").args(arguments);
            if icount {
                cargo.env(runner::MODE, "icount").env("CUBBY_CLOCK", "instructions");
            }
            return Ok(ExitCode::from(process::code(process::status(&mut cargo)?)));
        }
        Task::Runner { program } => return Ok(ExitCode::from(runner::run(&program)?)),
        Task::Within { assets, image, registry, clients, in_memory, program } => {
            let (image, clients) = (image.as_deref(), clients.as_deref());
            let around = within::Around { assets: &assets, image, registry, clients, in_memory };
            return Ok(ExitCode::from(around.run(&program)?));
        }
        Task::KvmServer => kvm::serve()?,
        Task::KvmKeeper { mode, once, kernel, dir } => {
            let mode = if mode == "icount" { kvm::Mode::Icount } else { kvm::Mode::Normal };
            kvm::keep(mode, once == "once", &kernel, &dir)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
