//! Work in numbered units, shared out among threads.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::team::spread;

/// What all units together are about to take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    /// Multiplications.
    pub products: usize,
    /// Bytes of weights that are read.
    pub bytes: usize,
}

/// Multiplications and bytes of a microsecond of one thread, roughly.
const PRODUCTS_PER_MICROSECOND: usize = 80_000;
const BYTES_PER_MICROSECOND: usize = 30_000;
/// Microseconds of work that are worth another thread, and those after which a thread looks for the next part.
const MICROSECONDS_PER_THREAD: usize = 3;
const MICROSECONDS_AT_ONCE: usize = 2;

impl Cost {
    fn microseconds(self) -> usize {
        (self.products / PRODUCTS_PER_MICROSECOND).max(self.bytes / BYTES_PER_MICROSECOND)
    }
}

/// What a thread does at once.
#[derive(Debug, Clone)]
pub(super) struct Turn {
    /// Units, at least one.
    pub units: Range<usize>,
    /// Whether the thread is likely to go on with the unit behind them.
    pub more: bool,
    /// Which of several threads it is.
    pub thread: (usize, usize),
}

/// Runs all `units` by ranges, on several threads where they are worth it.
///
/// Every thread has a stretch of its own, the same one each time, so that what it reads lies together and may still be in
/// its caches; one that has nothing left takes from the ends of the others'. No thread is waited for that has not begun:
/// one that wakes too late finds nothing to do.
pub(super) fn share(units: usize, cost: Cost, run: impl Fn(Turn) + Sync) {
    let threads = rayon::current_num_threads()
        .min(units)
        .min(cost.microseconds() / MICROSECONDS_PER_THREAD);
    if threads <= 1 {
        return run(Turn {
            units: 0..units,
            more: false,
            thread: (0, 1),
        });
    }
    let at_once = (units * MICROSECONDS_AT_ONCE / cost.microseconds()).max(1);
    stretches(units, threads, at_once, &run);
}

/// Runs `job` with every number below `count`, in the same way on up to `threads` threads.
pub(crate) fn each(count: usize, threads: usize, job: impl Fn(usize) + Sync) {
    match threads.min(count) {
        0 | 1 => (0..count).for_each(job),
        threads => stretches(count, threads, 1, &|turn: Turn| turn.units.for_each(&job)),
    }
}

fn stretches(units: usize, threads: usize, at_once: usize, run: &(impl Fn(Turn) + Sync)) {
    let first_of = |thread: usize| first_unit(units, (thread, threads));
    let stretches: Vec<Stretch> = (0..threads)
        .map(|t| Stretch::new(first_of(t)..first_of(t + 1)))
        .collect();
    spread(threads, &|own| {
        let turn = |units, more| Turn {
            units,
            more,
            thread: (own, threads),
        };
        while let Some((range, more)) = stretches[own].first(at_once) {
            run(turn(range, more));
        }
        for other in 1..threads {
            while let Some(range) = stretches[(own + other) % threads].last(at_once) {
                run(turn(range, false));
            }
        }
    });
}

/// The unit that a thread of several begins with.
pub(super) fn first_unit(units: usize, (thread, threads): (usize, usize)) -> usize {
    units * thread / threads
}

/// What is left of a thread's units: the first in the high half, the end in the low one. On cache lines of its own.
#[repr(align(128))]
struct Stretch(AtomicU64);

impl Stretch {
    fn new(units: Range<usize>) -> Self {
        Self(AtomicU64::new(pack(units.start, units.end)))
    }

    /// Takes up to `count` units from the front, and tells whether others are left.
    fn first(&self, count: usize) -> Option<(Range<usize>, bool)> {
        let (start, end) = self.take(|start, end| ((start + count).min(end), end))?;
        let taken = (start + count).min(end);
        Some((start..taken, taken < end))
    }

    /// Takes up to `count` units from the end.
    fn last(&self, count: usize) -> Option<Range<usize>> {
        let rest = |start: usize, end: usize| end.saturating_sub(count).max(start);
        let (start, end) = self.take(|start, end| (start, rest(start, end)))?;
        Some(rest(start, end)..end)
    }

    /// Replaces what is left, where something is, and returns what was.
    fn take(&self, next: impl Fn(usize, usize) -> (usize, usize)) -> Option<(usize, usize)> {
        let unpack = |left: u64| ((left >> 32) as usize, (left & u64::from(u32::MAX)) as usize);
        let replace = |left: u64| {
            let (start, end) = unpack(left);
            (start < end).then(|| {
                let (start, end) = next(start, end);
                pack(start, end)
            })
        };
        // The units need no order among threads: whoever shares out waits for all by other means.
        let order = Ordering::Relaxed;
        self.0.fetch_update(order, order, replace).ok().map(unpack)
    }
}

fn pack(start: usize, end: usize) -> u64 {
    debug_assert!(u32::try_from(end).is_ok(), "more units than a stretch can count");
    (start as u64) << 32 | end as u64
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_stretch_is_taken_from_both_ends_and_no_unit_twice() {
        let stretch = Stretch::new(10..17);
        assert_eq!(stretch.first(2), Some((10..12, true)));
        assert_eq!(stretch.last(3), Some(14..17));
        assert_eq!(stretch.first(5), Some((12..14, false)));
        assert_eq!((stretch.first(1), stretch.last(1)), (None, None));
    }

    #[test]
    fn every_unit_runs_once_on_however_many_threads() {
        for threads in [1, 2, 3, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            for units in [0, 1, 5, 100] {
                let seen: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                let cost = Cost {
                    products: 1_000 * PRODUCTS_PER_MICROSECOND,
                    bytes: 0,
                };
                let all = || {
                    share(units, cost, |turn| {
                        turn.units.for_each(|unit| {
                            seen[unit].fetch_add(1, Ordering::Relaxed);
                        });
                    });
                };
                pool.as_ref().expect("threads").install(all);
                assert!(
                    seen.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                    "{units} units on {threads} threads"
                );
            }
        }
    }
}
