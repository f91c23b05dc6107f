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

/// The newest version whose rights are refused where the kernel knows them.
const NEWEST: ABI = ABI::V5;

/// What SQLite does beside the store's file: its log and its index come and go.
const STORE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | MakeReg | RemoveFile | ReadDir});

/// The socket is removed at the end. The directory holds those of the user's other sandboxes too: their names
/// can be taken away, but not put elsewhere.
const SOCKETS: BitFlags<AccessFs> = make_bitflags!(AccessFs::{RemoveFile});

/// What the process may reach by path.
pub(super) struct Files {
    rules: RulesetCreated,
}

impl Files {
    /// The files of a sandbox process of `home`.
    pub(super) fn of(home: &Home) -> io::Result<Self> {
        let failed = |error: landlock::RulesetError| refused("landlock")(&crate::chain(&error));
        let rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))
            .map_err(failed)?
            // TCP, where the kernel knows it: no rule, so none.
            .handle_access(AccessNet::from_all(NEWEST))
            .map_err(failed)?
            .create()
            .map_err(failed)?;
        let below = |path: &Path, access| {
            let path = PathFd::new(path).map_err(|error| refused("landlock")(&crate::chain(&error)))?;
            Ok::<_, io::Error>(PathBeneath::new(path, access))
        };
        let database = home.database();
        let rules = rules
            .add_rule(below(database.parent().unwrap_or(home.root()), STORE)?)
            .map_err(failed)?
            .add_rule(below(&home.run(), SOCKETS)?)
            .map_err(failed)?;
        Ok(Self { rules })
    }

    /// Confines the calling thread, and says whether the kernel can.
    pub(super) fn confine(&self) -> io::Result<bool> {
        let rules = self.rules.try_clone().map_err(|error| refused("landlock")(&error))?;
        let status = rules.restrict_self().map_err(|error| refused("landlock")(&crate::chain(&error)))?;
        Ok(status.ruleset != RulesetStatus::NotEnforced)
    }
}
