//! Where the guest's kernel and agent are.

use std::path::{Path, PathBuf};

/// The files that every guest boots from.
pub(crate) struct Assets {
    pub(crate) kernel: PathBuf,
    pub(crate) agent: PathBuf,
}

/// None of the places has both files.
#[derive(Debug)]
pub(crate) struct Missing {
    places: Vec<PathBuf>,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no vmlinux and cubby-agent in any of")?;
        for place in &self.places {
            write!(f, " {}", place.display())?;
        }
        Ok(())
    }
}

/// Looks in `CUBBY_ASSETS`, `../lib/cubby` beside this binary, and the home's library, in this order.
pub(crate) fn find(home_lib: &Path) -> Result<Assets, Missing> {
    let beside = std::env::current_exe().ok().and_then(|exe| {
        let prefix = exe.parent()?.parent()?;
        Some(prefix.join("lib/cubby"))
    });
    let from_environment = std::env::var_os("CUBBY_ASSETS").map(PathBuf::from);
    let places: Vec<PathBuf> =
        from_environment.into_iter().chain(beside).chain([home_lib.to_owned()]).collect();
    for place in &places {
        // `lib/cubby` of an installation, or the installation itself.
        for directory in [place.clone(), place.join("lib/cubby")] {
            let assets = Assets { kernel: directory.join("vmlinux"), agent: directory.join("cubby-agent") };
            if assets.kernel.is_file() && assets.agent.is_file() {
                return Ok(assets);
            }
        }
    }
    Err(Missing { places })
}
