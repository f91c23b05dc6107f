//! Files: what the process has open stays open, and what it may still open is the store. Landlock
//! (Documentation/userspace-api/landlock.rst) refuses everything else on kernels that have it, and as much of it
//! as they know; it cannot be taken off again.

use std::io;
use std::path::Path;

use cubby_state::Home;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, make_bitflags,
};

use super::refused;
use crate::network::RESOLV_CONF;

/// The newest version whose rights are refused where the kernel knows them.
const NEWEST: ABI = ABI::V5;

/// What SQLite does beside the store's file: its log and its index come and go.
const STORE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | MakeReg | RemoveFile | ReadDir});

/// The socket is removed at the end. The directory holds those of the user's other sandboxes too: their names
/// can be taken away, but not put elsewhere.
const SOCKETS: BitFlags<AccessFs> = make_bitflags!(AccessFs::{RemoveFile});

/// A file that is replaced when the host changes networks is another file then: who keeps it in a directory made for that
/// (`/run/systemd/resolve`) does that, and the directory is what may be read. `/etc` holds more.
fn replaced_in(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if parent.starts_with("/run") && parent != Path::new("/run") => parent,
        _ => file,
    }
}

fn failed(error: impl std::error::Error) -> io::Error {
    refused("landlock")(&crate::chain(&error))
}

/// No right to any file.
fn no_file() -> io::Result<Ruleset> {
    let best = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    best.handle_access(AccessFs::from_all(NEWEST)).map_err(failed)
}

fn below(path: &Path, access: BitFlags<AccessFs>) -> io::Result<PathBeneath<PathFd>> {
    Ok(PathBeneath::new(PathFd::new(path).map_err(failed)?, access))
}

/// What the process may reach by path.
pub(super) struct Files {
    rules: RulesetCreated,
}

impl Files {
    /// The files of a sandbox process of `home`.
    pub(super) fn of(home: &Home) -> io::Result<Self> {
        let database = home.database();
        let store = below(database.parent().unwrap_or(home.root()), STORE)?;
        let sockets = below(&home.run(), SOCKETS)?;
        // TCP, where the kernel knows it: no rule, so none.
        let rules = no_file()?.handle_access(AccessNet::from_all(NEWEST)).map_err(failed)?;
        let rules = rules.create().map_err(failed)?;
        let rules = rules.add_rule(store).map_err(failed)?.add_rule(sockets).map_err(failed)?;
        Ok(Self { rules })
    }

    /// The files of the network's thread: the one that names the host's resolvers, if there is one. Whom it connects to is
    /// the policy's to say.
    pub(super) fn of_network() -> io::Result<Self> {
        let rules = no_file()?.create().map_err(failed)?;
        let file = Path::new(RESOLV_CONF).canonicalize();
        let rules = match file.as_deref().map(replaced_in) {
            Ok(path) => rules.add_rule(below(path, AccessFs::ReadFile.into())?).map_err(failed)?,
            Err(_) => rules,
        };
        Ok(Self { rules })
    }

    /// Confines the calling thread, and says whether the kernel can.
    pub(super) fn confine(&self) -> io::Result<bool> {
        let rules = self.rules.try_clone().map_err(|error| refused("landlock")(&error))?;
        let status = rules.restrict_self().map_err(|error| refused("landlock")(&crate::chain(&error)))?;
        Ok(status.ruleset != RulesetStatus::NotEnforced)
    }
}
