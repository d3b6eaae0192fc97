//! Which instructions the inner loops are run with: found when the program runs, so that one binary serves all.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::registers::Avx512;
use super::registers::{Base, Vector};

/// A set of instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Instructions {
    /// What the program is built for.
    Base,
    /// An array in the place of registers: what other architectures run, here for the tests.
    #[cfg(test)]
    Portable,
    /// 512-bit registers.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Work for which registers of any kind serve. `run` is to be `#[inline(always)]`, and whatever it calls: only then is it
/// compiled for the instructions that it is run with.
pub(crate) trait Kernel {
    fn run<V: Vector>(self);
}

impl Instructions {
    /// The best of this processor; without AVX-512 where `LENGTHWISE_NO_AVX512` is set to anything but 0.
    pub fn best() -> Self {
        static BEST: OnceLock<Instructions> = OnceLock::new();
        *BEST.get_or_init(|| {
            let refused = std::env::var_os("LENGTHWISE_NO_AVX512").is_some_and(|v| !v.is_empty() && v != "0");
            Self::all().last().filter(|_| !refused).copied().unwrap_or(Self::Base)
        })
    }

    /// All that this processor has, the best last.
    pub fn all() -> &'static [Self] {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx512f") {
            return &[
                #[cfg(test)]
                Self::Portable,
                Self::Base,
                Self::Avx512,
            ];
        }
        &[
            #[cfg(test)]
            Self::Portable,
            Self::Base,
        ]
    }

    /// Most rows of a tile.
    pub fn tile_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::ROWS,
            _ => Base::ROWS,
        }
    }

    /// Panels that go together with tiles of `rows` rows.
    pub fn together(self, rows: usize) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::together(rows),
            _ => Base::together(rows),
        }
    }

    /// Runs `kernel` with these instructions. They are chosen here, outside of every loop over rows: code that lacks them
    /// cannot be merged with code that has them.
    pub fn run<K: Kernel>(self, kernel: K) {
        match self {
            Self::Base => kernel.run::<Base>(),
            #[cfg(test)]
            Self::Portable => kernel.run::<super::registers::Portable>(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: only `all` names AVX-512, and only where the processor has it.
            Self::Avx512 => unsafe { with_avx512(kernel) },
        }
    }
}

/// # Safety
/// The processor has AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn with_avx512<K: Kernel>(kernel: K) {
    kernel.run::<Avx512>();
}
