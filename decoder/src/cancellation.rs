//! Taking requests back while they run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lengthwise_core::RequestId;

/// Cancels single requests of a run, from any thread; every clone is the same one. Asking costs the run nothing until it
/// is between two steps, where it takes note.
#[derive(Debug, Clone, Default)]
pub struct Cancellation {
    asked: Arc<Mutex<Vec<RequestId>>>,
}

impl Cancellation {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for the end of a request. One that has ended already, or is none of the run's, is passed over.
    pub fn cancel(&self, id: impl Into<RequestId>) {
        self.lock().push(id.into());
    }

    /// What was asked for since the last time; nothing is kept.
    pub(crate) fn take(&self) -> Vec<RequestId> {
        std::mem::take(&mut *self.lock())
    }

    /// A list of ids is whole whatever panicked beside it.
    fn lock(&self) -> MutexGuard<'_, Vec<RequestId>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
