//! How many of something there are at the moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts what is alive; clones count together.
#[derive(Debug, Clone, Default)]
pub(crate) struct Count(Arc<AtomicUsize>);

/// One that is counted until it is dropped.
#[derive(Debug)]
#[must_use = "it is counted as long as it lives"]
pub(crate) struct Counted(Count);

impl Count {
    /// How many there are.
    pub fn get(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }

    /// One more, unless there are `most` already.
    pub fn add(&self, most: usize) -> Option<Counted> {
        let more = |count| (count < most).then_some(count + 1);
        let added = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        added.is_ok().then(|| Counted(self.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::Count;

    #[test]
    fn what_is_dropped_leaves_its_place() {
        let count = Count::default();
        let (first, second) = (count.add(2), count.clone().add(2));
        assert!(first.is_some() && second.is_some() && count.add(2).is_none());
        drop(first);
        assert_eq!(count.get(), 1);
        assert!(count.add(2).is_some());
    }
}
