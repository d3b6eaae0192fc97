//! Threads that stay awake from one parallel section of a pass to the next.
//!
//! A decode step has some thirty sections of ten to a hundred microseconds, and waking a thread costs as much as the shorter
//! of them. The helpers are tasks of rayon's pool: after a section they look for the next one for a short while, then they
//! go back there and sleep. Nobody waits for a helper that has not begun: one that comes too late finds nothing to do.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a helper looks for another section.
const LINGER: Duration = Duration::from_micros(100);
/// Looks (of some fifty nanoseconds) between two glances at the clock, at each of which another thread may have the
/// processor: longer than most waits, since one that gives way for nothing comes back late.
const LOOKS: usize = 256;

/// Runs `work` on up to `threads` threads, each with a number of its own below that, 0 on this one.
pub(super) fn spread(threads: usize, work: &(dyn Fn(usize) + Sync)) {
    if threads <= 1 {
        return work(0);
    }
    match TEAM.lead() {
        Some(leader) => leader.run(threads.min(1 << 15), work),
        // Another pass has the helpers.
        None => join(0, threads, work),
    }
}

fn join(first: usize, threads: usize, work: &(dyn Fn(usize) + Sync)) {
    if threads <= 1 {
        return work(first);
    }
    let half = threads / 2;
    rayon::join(
        || join(first, threads - half, work),
        || join(first + threads - half, half, work),
    );
}

static TEAM: Team = Team {
    led: AtomicBool::new(false),
    helpers: AtomicUsize::new(0),
    gate: AtomicU64::new(0),
    work: UnsafeCell::new(None),
    failure: Mutex::new(None),
};

/// One leader at a time, and helpers.
struct Team {
    led: AtomicBool,
    /// Helpers that look for a section, are at one, or are on their way.
    helpers: AtomicUsize,
    /// The number of the section, whether it is open, the places left in it, and the helpers that are at it.
    gate: AtomicU64,
    /// What the section does. Written by the leader while the gate is closed and nobody is in, read by those who are in.
    work: UnsafeCell<Option<Work>>,
    /// What a helper's panic said.
    failure: Mutex<Option<Box<dyn Any + Send>>>,
}

type Work = *const (dyn Fn(usize) + Sync);

// SAFETY: `work` is handed from leader to helpers through `gate`, and what it points to may be called by any thread.
unsafe impl Sync for Team {}

/// In the gate: one helper, one place, the open door, one section.
const ACTIVE: u64 = 1;
const PLACE: u64 = 1 << 16;
const OPEN: u64 = 1 << 32;
const SECTION: u64 = 1 << 33;

impl Team {
    fn lead(&'static self) -> Option<Leader> {
        let taken = self
            .led
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        taken.ok().map(|_| Leader(self))
    }

    /// A helper's life.
    fn help(&self) {
        let mut seen = u64::MAX;
        let mut idle_since = Instant::now();
        loop {
            match (0..LOOKS).find_map(|_| self.enter(seen)) {
                Some((section, place)) => {
                    self.work(place);
                    seen = section;
                    idle_since = Instant::now();
                }
                None if idle_since.elapsed() > LINGER => break,
                None => std::thread::yield_now(),
            }
        }
        self.helpers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Takes a place in a section other than `seen`.
    fn enter(&self, seen: u64) -> Option<(u64, usize)> {
        let gate = self.gate.load(Ordering::Relaxed);
        let (section, places) = (gate / SECTION, gate % OPEN / PLACE);
        let next = gate.wrapping_add(ACTIVE).wrapping_sub(PLACE);
        let enters = gate & OPEN != 0 && section != seen && places > 0;
        let entered = enters
            && self
                .gate
                .compare_exchange(gate, next, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        if !entered {
            std::hint::spin_loop();
        }
        entered.then_some((section, places as usize))
    }

    /// Works at `place` of the section that was entered, and leaves it.
    fn work(&self, place: usize) {
        // SAFETY: the leader wrote it before the gate was opened, and neither writes again nor lets what it points to go
        // until all that have entered have left.
        let done = catch_unwind(AssertUnwindSafe(|| unsafe {
            if let Some(work) = *self.work.get() {
                (*work)(place);
            }
        }));
        if let Err(failure) = done {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
        }
        self.gate.fetch_sub(ACTIVE, Ordering::Release);
    }
}

struct Leader(&'static Team);

impl Leader {
    fn run(self, threads: usize, work: &(dyn Fn(usize) + Sync)) {
        let Self(team) = self;
        for _ in team.helpers.load(Ordering::Relaxed)..threads - 1 {
            team.helpers.fetch_add(1, Ordering::Relaxed);
            rayon::spawn(|| TEAM.help());
        }
        // SAFETY: the lifetime alone changes, and `Section` waits for all who use it even where `work` panics here.
        let endless = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work) };
        // SAFETY: only the leader is here, the gate is closed and nobody is in.
        unsafe { *team.work.get() = Some(endless) };
        let section = (team.gate.load(Ordering::Relaxed) / SECTION)
            .wrapping_add(1)
            .wrapping_mul(SECTION);
        let places = (threads - 1) as u64 * PLACE;
        team.gate.store(section | OPEN | places, Ordering::Release);
        let open = Section(self);
        work(0);
        drop(open);
        let failure = team.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(failure) = failure {
            resume_unwind(failure);
        }
    }
}

/// An open section.
struct Section(Leader);

impl Drop for Section {
    fn drop(&mut self) {
        let team = self.0.0;
        team.gate.fetch_and(!OPEN, Ordering::Relaxed);
        let mut looks = 0;
        while !team.gate.load(Ordering::Acquire).is_multiple_of(PLACE) {
            looks += 1;
            match looks % LOOKS {
                0 => std::thread::yield_now(),
                _ => std::hint::spin_loop(),
            }
        }
        team.led.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::each;

    fn counted(count: usize, threads: usize) -> Vec<usize> {
        let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
        each(count, threads, |i| {
            seen[i].fetch_add(1, Ordering::Relaxed);
        });
        seen.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_job_runs_once_in_sections_one_after_the_other() {
        for count in [0, 1, 2, 7, 100] {
            for threads in [1, 2, 3, 16] {
                for _ in 0..200 {
                    assert_eq!(counted(count, threads), vec![1; count], "{count} on {threads}");
                }
            }
        }
    }

    #[test]
    fn passes_side_by_side_and_sections_within_sections_end() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|_| assert_eq!(counted(50, 3), vec![1; 50])));
            }
        });
        each(4, 2, |_| assert_eq!(counted(10, 2), vec![1; 10]));
    }

    #[test]
    fn a_panic_reaches_whoever_asked_and_the_team_goes_on() {
        for bad in 0..8 {
            let failed = catch_unwind(|| each(8, 2, |i| assert_ne!(i, bad, "job {i}")));
            assert!(failed.is_err());
        }
        assert_eq!(counted(8, 2), vec![1; 8]);
    }
}
