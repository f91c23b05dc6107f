//! Finding the KVM test machine, or booting it: one for each mode and content (kernel, this program, start script). The
//! machine of another content is left alone, since another checkout may be using it; it ends by itself when idle.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::initramfs;
use crate::cache::{self, Key};
use crate::progress::{self, Ticker};
use crate::{kernel, packages, process, workspace};

/// How the machine's processors run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As fast as it goes.
    Normal,
    /// One processor on an instruction clock: 1 instruction is 1 ns.
    Icount,
}

impl Mode {
    /// The mode's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Icount => "icount",
        }
    }
}

/// How long a machine may take to boot. Emulated, on a busy computer, with one processor.
const BOOT: Duration = Duration::from_secs(120);

/// A connection to the machine's keeper, which is one to the server in the machine. With `fresh`, a machine that runs
/// is not used, and the new one ends with its first command.
pub fn connect(mode: Mode, fresh: bool) -> Result<UnixStream> {
    packages::ensure("the KVM test machine", &[packages::MACHINE])?;
    let kernel = kernel::ensure(kernel::Kernel::TestHost)?;
    let program = workspace::program()?;
    let key = Key::default()
        .with(mode.name())
        .with(initramfs::INIT)
        .with_file(&kernel)?
        .with_file(&program)?
        .finish();
    let mut name = format!("{}-{}", mode.name(), key.get(..8).unwrap_or_default());
    if fresh {
        name = format!("{name}-{}", std::process::id());
    }
    let dir = cache::root()?.join("machines").join(&name);
    let socket = dir.join("sock");
    if let Ok(stream) = UnixStream::connect(&socket) {
        return Ok(stream);
    }
    let _lock = cache::lock(&format!("machine-{name}"))?;
    if let Ok(stream) = UnixStream::connect(&socket) {
        return Ok(stream);
    }
    progress::step(&format!("booting the KVM test machine ({})", mode.name()), || {
        if dir.exists() {
            // What a keeper that was root left may not be this user's to remove.
            process::run_quietly(process::as_root("rm").arg("-rf").arg(&dir))?;
        }
        fs::create_dir_all(dir.parent().context("no cache")?)?;
        fs::DirBuilder::new().mode(0o700).create(&dir)?;
        boot(mode, fresh, &kernel, &program, &dir)
    })?;
    UnixStream::connect(&socket).context("the KVM test machine ended as soon as it was there")
}

/// Starts the keeper, which outlives this process, and waits for its socket.
fn boot(mode: Mode, fresh: bool, kernel: &Path, program: &Path, dir: &Path) -> Result<()> {
    // The file server needs root, and the keeper starts it. sudo may ask for a password here, not in the background.
    let mut keeper = if process::is_root() {
        Command::new(program)
    } else {
        progress::note("with sudo: serving this computer's files to the machine needs root");
        process::run(Command::new("sudo").arg("-v"))?;
        let mut sudo = Command::new("sudo");
        sudo.arg("-n").arg(program);
        sudo
    };
    let log_path = dir.join("keeper.log");
    let log = File::create(&log_path)?;
    keeper.args(["kvm-keeper", mode.name()]).arg(if fresh { "once" } else { "reuse" }).arg(kernel).arg(dir);
    let mut keeper = keeper
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .context("cannot start the machine's keeper")?;
    let (mut ticker, start) = (Ticker::new(), Instant::now());
    let socket: PathBuf = dir.join("sock");
    loop {
        if socket.exists() {
            return Ok(());
        }
        if let Some(status) = keeper.try_wait()? {
            bail!("the machine's keeper ended with {status}\n{}", fs::read_to_string(&log_path)?);
        }
        if start.elapsed() > BOOT {
            bail!("no KVM test machine after {} (see {})", progress::show(BOOT), dir.display());
        }
        ticker.tick(|| "waiting for it".into());
        sleep(Duration::from_millis(20));
    }
}
