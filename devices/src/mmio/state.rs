//! Stopping a transport with its device's queues, and starting it again from a value: here after a pause, or in
//! another process with a copy of the guest's memory.

use serde::{Deserialize, Serialize};

use super::{QueueRegisters, Transport, lock, status};
use crate::{LayoutError, Queue, QueueState};

/// Everything that continues a transport and its device's queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueRegisters>,
    pub(super) running: Vec<Option<QueueState>>,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
    pub(super) needs_reset: bool,
}

/// Why a saved transport does not fit this device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The device was started before.
    #[error("the device is already running")]
    Running,
    /// Another number of queues.
    #[error("the saved device has {saved} queues, this one has {ours}")]
    Queues {
        /// In the saved state.
        saved: usize,
        /// Of this device.
        ours: usize,
    },
    /// The driver uses features that this device does not offer.
    #[error("the driver uses features {features:#x} that the device does not offer")]
    Features {
        /// The features that are missing.
        features: u64,
    },
    /// A queue cannot be started.
    #[error("queue {index} cannot be started")]
    Queue {
        /// Its index.
        index: usize,
        /// Why.
        source: LayoutError,
    },
}

impl Transport {
    /// Stops the device's queues and returns all that [`Transport::start`] needs to continue, here or in
    /// another process with a copy of the guest's memory. The owner's workers no longer kick, or are about to
    /// be told to continue by the same means.
    pub fn stop(&mut self) -> TransportState {
        let running = self.stop_queues();
        TransportState {
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.clone(),
            running,
            interrupt_status: self.signals.interrupt_status(),
            config_generation: self.signals.generation(),
            needs_reset: self.signals.needs_reset(),
        }
    }

    /// Continues from `state`. Afterwards the owner kicks every one of [`Transport::started_queues`] and calls
    /// [`Transport::raise_pending`]: neither a notification nor an interrupt in flight is part of the state.
    ///
    /// # Errors
    /// [`RestoreError`] if the state does not fit this device and this memory; then nothing has changed.
    pub fn start(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        if self.started_queues().next().is_some() {
            return Err(RestoreError::Running);
        }
        if state.queues.len() != self.sizes.len() || state.running.len() != self.sizes.len() {
            return Err(RestoreError::Queues { saved: state.queues.len(), ours: self.sizes.len() });
        }
        // Before FEATURES_OK a driver may have written anything; it is checked when it sets that bit.
        let missing = state.driver_features & !self.features;
        if state.status & status::FEATURES_OK != 0 {
            if missing != 0 {
                return Err(RestoreError::Features { features: missing });
            }
            for (index, (queue, max)) in state.running.iter().zip(&self.sizes).enumerate() {
                let Some(queue) = queue else { continue };
                Queue::new(self.memory.clone(), self.signals.clone(), *max, queue)
                    .map_err(|source| RestoreError::Queue { index, source })?;
            }
            lock(&self.device).acknowledge(state.driver_features);
            self.start_queues(&state.running)?;
        }
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.queues.clone_from(&state.queues);
        self.signals.restore(state.interrupt_status, state.config_generation, state.needs_reset);
        Ok(())
    }
}
