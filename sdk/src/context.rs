//! What every operation needs: the home, the store in it, and the images.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use cubby_image::ext4;
use cubby_state::{ExitReason, ExitReport, Home, LaunchSpec, Record, SandboxName, Store};

use crate::error::{Error, R};
use crate::reaper;

#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) store: Arc<Store>,
    pub(crate) images: cubby_image::Store,
}

impl Context {
    /// Opens the home that the environment names.
    pub(crate) fn open() -> R<Self> {
        let home = Home::from_env().map_err(cubby_state::StoreError::from)?;
        let store = Arc::new(Store::open(&home)?);
        reaper::look_after(&store);
        let images = cubby_image::Store::open(home.images())?;
        Ok(Self { store, images })
    }

    /// The name of an existing sandbox. What cannot be a name is nobody's.
    pub(crate) fn name(name: &str) -> R<SandboxName> {
        name.parse().map_err(|_| Error::NotFound { name: name.into() })
    }

    /// What a sandbox process is told, for the current run of `record`.
    pub(crate) fn launch_spec(
        &self,
        record: &Record,
        image_disk: PathBuf,
        attached: bool,
        boot_timeout_ms: u64,
    ) -> LaunchSpec {
        let home = self.store.home().clone();
        let name = record.name.clone();
        LaunchSpec {
            run: record.run.id,
            config: record.config.clone(),
            image_disk,
            writable_disk: home.disk(&name),
            socket: home.socket(&name),
            lock: home.lock(&name),
            attached,
            boot_timeout_ms,
            home,
            name,
        }
    }

    /// Makes the sandbox's own disk, empty.
    pub(crate) fn format_disk(&self, spec: &LaunchSpec) -> R<()> {
        let path = &spec.writable_disk;
        let failed = |source| Error::File { path: path.clone(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        let mut uuid = [0; 16];
        rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| failed(error.into()))?;
        let options = ext4::Options::new(uuid);
        ext4::format(&file, u64::from(spec.config.disk_mib) << 20, &options)
            .map_err(|error| failed(std::io::Error::other(error)))
    }

    /// Records that a run ended before there was a process to say so.
    pub(crate) fn give_up(&self, spec: &LaunchSpec, stage: &str) {
        let report = ExitReport::now(ExitReason::BootFailed { stage: stage.into() });
        // The sandbox process may have written the end already, in better words.
        let _ = self.store.finish(spec.run, &report);
    }
}
