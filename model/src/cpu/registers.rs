//! Sixteen f32 side by side, as the inner loop holds them: an AVX-512 register, two AVX registers, or an array.

use half::f16;

use super::panel::{Group, LANES, Tile};

/// Sixteen f32, and how the inner loop is run with them. All kinds round alike: one fused multiplication and addition after
/// the other, so that a result does not depend on the processor.
pub(crate) trait Vector: Copy {
    /// Rows that are multiplied together at most: as many sums as there are registers for.
    const ROWS: usize;

    /// Panels that are multiplied with tiles of `rows` rows together: at few rows one panel's sums would wait for each
    /// other.
    fn together(rows: usize) -> usize;

    fn zero() -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);

    /// `self + x row`.
    fn plus(self, x: f32, row: Self) -> Self;

    /// Whole numbers times their columns' scales.
    fn scaled(whole: &[i8; LANES], scales: &[f32; LANES]) -> Self;

    /// f16 as f32, which all have.
    fn widened(half: &[f16; LANES]) -> Self;

    /// Runs a tile of `rows` rows, at most [`Vector::ROWS`].
    ///
    /// # Safety
    /// As [`Tile::run`] asks, with `rows` for `M`.
    unsafe fn dispatch<G: Group, const P: usize, const A: usize, const T: bool>(rows: usize, tile: Tile<G, P>);
}

/// Calls `Tile::run` with the number of rows as a constant.
macro_rules! by_height {
    ($vector:ty, $rows:expr, $tile:expr, $a:ident, $t:ident, $($height:literal)+) => {
        match $rows {
            // SAFETY: the caller's.
            $($height => unsafe { $tile.run::<$vector, $height, $a, $t>() },)+
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

#[cfg(not(all(
    target_arch = "x86_64",
    target_feature = "avx2",
    target_feature = "f16c",
    target_feature = "fma"
)))]
pub(crate) use Portable as Base;
/// What every processor that the program is built for has.
#[cfg(all(
    target_arch = "x86_64",
    target_feature = "avx2",
    target_feature = "f16c",
    target_feature = "fma"
))]
pub(crate) use avx2::Avx2 as Base;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;

#[cfg(all(
    target_arch = "x86_64",
    target_feature = "avx2",
    target_feature = "f16c",
    target_feature = "fma"
))]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm_loadl_epi64, _mm_loadu_si128, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtph_ps,
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    use super::{Group, LANES, Tile, Vector, f16};

    /// The low and the high eight.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2([__m256; 2]);

    // SAFETY of all blocks here: the target has AVX2 and FMA, and references to sixteen elements are valid for them.
    impl Vector for Avx2 {
        // Twelve sums, two registers of the panel and one of the rows are fifteen of sixteen.
        const ROWS: usize = 6;

        fn together(rows: usize) -> usize {
            if rows == 1 { 4 } else { 1 }
        }

        #[inline(always)]
        fn zero() -> Self {
            let zero = unsafe { _mm256_setzero_ps() };
            Self([zero, zero])
        }

        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            let at = from.as_ptr();
            unsafe { Self([_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))]) }
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            let at = to.as_mut_ptr();
            unsafe {
                _mm256_storeu_ps(at, self.0[0]);
                _mm256_storeu_ps(at.add(8), self.0[1]);
            }
        }

        #[inline(always)]
        fn plus(self, x: f32, row: Self) -> Self {
            unsafe {
                let x = _mm256_set1_ps(x);
                Self([
                    _mm256_fmadd_ps(x, row.0[0], self.0[0]),
                    _mm256_fmadd_ps(x, row.0[1], self.0[1]),
                ])
            }
        }

        #[inline(always)]
        fn scaled(whole: &[i8; LANES], scales: &[f32; LANES]) -> Self {
            let (at, scales) = (whole.as_ptr(), Self::load(scales));
            let eight = |at: *const i8| unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))) };
            unsafe {
                Self([
                    _mm256_mul_ps(eight(at), scales.0[0]),
                    _mm256_mul_ps(eight(at.add(8)), scales.0[1]),
                ])
            }
        }

        #[inline(always)]
        fn widened(half: &[f16; LANES]) -> Self {
            let at = half.as_ptr().cast();
            unsafe {
                Self([
                    _mm256_cvtph_ps(_mm_loadu_si128(at)),
                    _mm256_cvtph_ps(_mm_loadu_si128(at.add(1))),
                ])
            }
        }

        #[inline(always)]
        unsafe fn dispatch<G: Group, const P: usize, const A: usize, const T: bool>(rows: usize, tile: Tile<G, P>) {
            by_height!(Self, rows, tile, A, T, 1 2 3 4 5 6)
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, _mm_loadu_si128, _mm256_loadu_si256, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{Group, LANES, Tile, Vector, f16};

    /// All sixteen. Only for code that [`super::super::instructions`] runs where the processor has AVX-512.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    // SAFETY of all blocks here: the processor was asked for AVX-512, and references to sixteen elements are valid for it.
    impl Vector for Avx512 {
        // With two panels: 28 sums, two registers of the panels and one of the rows are 31 of 32.
        const ROWS: usize = 14;

        fn together(rows: usize) -> usize {
            if rows <= 3 { 4 } else { 2 }
        }

        #[inline(always)]
        fn zero() -> Self {
            Self(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            Self(unsafe { _mm512_loadu_ps(from.as_ptr()) })
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        fn plus(self, x: f32, row: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(_mm512_set1_ps(x), row.0, self.0) })
        }

        #[inline(always)]
        fn scaled(whole: &[i8; LANES], scales: &[f32; LANES]) -> Self {
            unsafe {
                let whole = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(whole.as_ptr().cast())));
                Self(_mm512_mul_ps(whole, Self::load(scales).0))
            }
        }

        #[inline(always)]
        fn widened(half: &[f16; LANES]) -> Self {
            Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(half.as_ptr().cast())) })
        }

        #[inline(always)]
        unsafe fn dispatch<G: Group, const P: usize, const A: usize, const T: bool>(rows: usize, tile: Tile<G, P>) {
            // SAFETY: the caller's; a tile lasts long enough for the call.
            unsafe { dispatch::<G, P, A, T>(rows, tile) }
        }
    }

    /// # Safety
    /// As [`Vector::dispatch`] asks, and the processor has AVX-512F.
    #[target_feature(enable = "avx512f")]
    #[inline(never)]
    unsafe fn dispatch<G: Group, const P: usize, const A: usize, const T: bool>(rows: usize, tile: Tile<G, P>) {
        match P {
            4 => by_height!(Avx512, rows, tile, A, T, 1 2 3),
            _ => by_height!(Avx512, rows, tile, A, T, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        }
    }
}

/// Sixteen f32 for any processor.
#[cfg_attr(all(target_feature = "avx2", not(test)), allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Vector for Portable {
    const ROWS: usize = 6;

    fn together(rows: usize) -> usize {
        if rows == 1 { 4 } else { 1 }
    }

    fn zero() -> Self {
        Self([0.0; LANES])
    }

    fn load(from: &[f32; LANES]) -> Self {
        Self(*from)
    }

    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }

    fn plus(self, x: f32, row: Self) -> Self {
        Self(std::array::from_fn(|j| x.mul_add(row.0[j], self.0[j])))
    }

    fn scaled(whole: &[i8; LANES], scales: &[f32; LANES]) -> Self {
        Self(std::array::from_fn(|j| f32::from(whole[j]) * scales[j]))
    }

    fn widened(half: &[f16; LANES]) -> Self {
        Self(half.map(f16::to_f32))
    }

    unsafe fn dispatch<G: Group, const P: usize, const A: usize, const T: bool>(rows: usize, tile: Tile<G, P>) {
        by_height!(Self, rows, tile, A, T, 1 2 3 4 5 6)
    }
}
