//! The reaper: one thread for each home that this program uses. Now and then it looks after sandboxes that nobody
//! reads ([`Store::reap`]), unless another process has just done so; keepers do the same, more rarely.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use cubby_state::{ReaperLease, Store};

/// How often some process looks.
const PERIOD: Duration = Duration::from_secs(5);

/// The homes that have their thread.
static HOMES: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Sees to it that the home of `store` has a reaper for as long as this program lives. A thread that cannot be
/// had is tried for again at the next use.
pub(crate) fn look_after(store: &Arc<Store>) {
    let root = store.home().root().to_owned();
    let mut homes = HOMES.lock().unwrap_or_else(PoisonError::into_inner);
    if homes.contains(&root) {
        return;
    }
    let store = store.clone();
    if thread::Builder::new().name("cubbyhole-reaper".into()).spawn(move || live(&store)).is_ok() {
        homes.insert(root);
    }
}

/// Sleeps and looks until the home is removed.
fn live(store: &Store) {
    loop {
        thread::sleep(jittered(PERIOD));
        match ReaperLease::take(store.home(), PERIOD) {
            Ok(Some(lease)) => drop(store.reap(&lease)),
            Ok(None) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
            Err(_) => {}
        }
    }
    HOMES.lock().unwrap_or_else(PoisonError::into_inner).remove(store.home().root());
}

/// Between three and five quarters of `period`, so that many programs do not wake at once.
fn jittered(period: Duration) -> Duration {
    let mut byte = [128];
    let _ = rustix::rand::getrandom(&mut byte, rustix::rand::GetRandomFlags::empty());
    period * (384 + u32::from(byte[0])) / 512
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_period_varies_by_a_quarter() {
        for _ in 0..100 {
            let period = jittered(PERIOD);
            assert!(period >= PERIOD * 3 / 4 && period <= PERIOD * 5 / 4, "{period:?}");
        }
    }
}
