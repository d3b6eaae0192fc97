//! Taking requests back while they run.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lengthwise_core::RequestId;

/// Cancels requests of a run, from any thread; every clone is the same one. Asking costs the run nothing until it is between
/// two steps, where it takes note.
#[derive(Debug, Clone, Default)]
pub struct Cancellation {
    asked: Arc<Mutex<Asked>>,
    #[cfg(test)]
    script: Arc<Mutex<Script>>,
}

/// What a test asks for, and before which of the run's steps; they are counted from 1.
#[cfg(test)]
#[derive(Debug, Default)]
struct Script {
    step: u64,
    cancel: Vec<(u64, RequestId)>,
}

/// What a run is to give up.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// Every request that has not ended.
    pub all: bool,
    /// These, as far as they are the run's and have not ended.
    pub ids: HashSet<RequestId>,
}

impl Asked {
    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        !self.all && self.ids.is_empty()
    }

    /// Whether this request is to be given up.
    pub fn has(&self, id: &RequestId) -> bool {
        self.all || self.ids.contains(id)
    }
}

impl Cancellation {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for the end of a request. One that has ended already, or is none of the run's, is passed over.
    pub fn cancel(&self, id: impl Into<RequestId>) {
        self.lock().ids.insert(id.into());
    }

    /// Asks for the end of all requests, those that run and those that wait.
    pub fn cancel_all(&self) {
        self.lock().all = true;
    }

    /// Asks for the end of a request before the given step, or the part of a batch, counted from 1.
    #[cfg(test)]
    pub(crate) fn cancel_before(&self, step: u64, id: &str) {
        let mut script = self.script.lock().expect("no test panics here");
        script.cancel.push((step, id.into()));
    }

    #[cfg(test)]
    fn follow_script(&self) {
        let mut script = self.script.lock().expect("no test panics here");
        script.step += 1;
        let now = script.step;
        for (_, id) in script.cancel.iter().filter(|(step, _)| *step == now) {
            self.cancel(id.as_str());
        }
    }

    /// What was asked for since the last time; nothing is kept. Called once between two steps.
    pub(crate) fn take(&self) -> Asked {
        #[cfg(test)]
        self.follow_script();
        std::mem::take(&mut *self.lock())
    }

    /// What is asked for is whole whatever panicked beside it.
    fn lock(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
