//! Memory for weights: on large pages where there are some, since a step reads all of it and finds little of it again.
//!
//! With pages of 4 KiB a processor spends as long on looking up where a weight lies as on fetching it: the products of 110 M
//! parameters alone, at one row and at sixteen, took 1.1 to 1.7 times as long without.

use std::ops::{Deref, DerefMut};

#[cfg(target_os = "linux")]
use memmap2::{Advice, MmapMut};

/// A fixed number of elements.
pub(super) enum Memory<T> {
    Allocated(Vec<T>),
    /// `len` elements from byte `first` on.
    #[cfg(target_os = "linux")]
    Mapped {
        map: MmapMut,
        first: usize,
        len: usize,
        kind: std::marker::PhantomData<T>,
    },
}

/// Bytes of a large page.
#[cfg(target_os = "linux")]
const LARGE_PAGE: usize = 2 << 20;

impl<T: Copy> Memory<T> {
    /// `len` times `value`.
    pub fn filled(value: T, len: usize) -> Self {
        #[cfg(target_os = "linux")]
        if size_of::<T>() * len >= LARGE_PAGE
            && let Some(memory) = Self::mapped(value, len)
        {
            return memory;
        }
        Self::Allocated(vec![value; len])
    }

    /// On large pages if the system gives some; what does not fill one lies on small ones. `None` if it gives no memory.
    #[cfg(target_os = "linux")]
    fn mapped(value: T, len: usize) -> Option<Self> {
        let map = MmapMut::map_anon(size_of::<T>() * len + LARGE_PAGE).ok()?;
        // Where there are no large pages small ones serve.
        let _ = map.advise(Advice::HugePage);
        let first = map.as_ptr().align_offset(LARGE_PAGE);
        let mut memory = Self::Mapped {
            map,
            first,
            len,
            kind: std::marker::PhantomData,
        };
        let start = memory.pointer();
        for i in 0..len {
            // SAFETY: `len` elements fit behind the first large page's beginning, which is aligned for any type.
            unsafe { start.add(i).write(value) };
        }
        Some(memory)
    }

    #[cfg(target_os = "linux")]
    fn pointer(&mut self) -> *mut T {
        match self {
            Self::Allocated(all) => all.as_mut_ptr(),
            Self::Mapped { map, first, .. } => map[*first..].as_mut_ptr().cast(),
        }
    }
}

impl<T> Deref for Memory<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Allocated(all) => all,
            #[cfg(target_os = "linux")]
            // SAFETY: `mapped` has written `len` elements there.
            Self::Mapped { map, first, len, .. } => unsafe {
                std::slice::from_raw_parts(map[*first..].as_ptr().cast(), *len)
            },
        }
    }
}

impl<T> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Allocated(all) => all,
            #[cfg(target_os = "linux")]
            // SAFETY: as above.
            Self::Mapped { map, first, len, .. } => unsafe {
                std::slice::from_raw_parts_mut(map[*first..].as_mut_ptr().cast(), *len)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_memory_holds_what_is_written() {
        for len in [0, 3, (2 << 20) / 8, (5 << 20) / 8 + 1] {
            let mut memory = Memory::filled(7u64, len);
            assert_eq!((memory.len(), memory.iter().all(|v| *v == 7)), (len, true));
            memory.iter_mut().enumerate().for_each(|(i, v)| *v = i as u64);
            assert!(memory.iter().enumerate().all(|(i, v)| *v == i as u64));
        }
    }
}
