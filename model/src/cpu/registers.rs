//! Sixteen f32 side by side, as the inner loop holds them: two AVX registers, or an array elsewhere.

use super::panel::LANES;

pub(crate) use kind::Registers;

#[cfg(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma"))]
mod kind {
    use std::arch::x86_64::{
        __m256, _mm_loadl_epi64, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
        _mm256_mul_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    use super::LANES;

    /// The low and the high eight.
    #[derive(Clone, Copy)]
    pub(crate) struct Registers([__m256; 2]);

    // SAFETY of all blocks here: the target has AVX2 and FMA, and references to sixteen elements are valid for them.
    impl Registers {
        #[inline(always)]
        pub fn zero() -> Self {
            let zero = unsafe { _mm256_setzero_ps() };
            Self([zero, zero])
        }

        #[inline(always)]
        pub fn load(from: &[f32; LANES]) -> Self {
            let at = from.as_ptr();
            unsafe { Self([_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))]) }
        }

        #[inline(always)]
        pub fn store(self, to: &mut [f32; LANES]) {
            let at = to.as_mut_ptr();
            unsafe {
                _mm256_storeu_ps(at, self.0[0]);
                _mm256_storeu_ps(at.add(8), self.0[1]);
            }
        }

        /// `self + x row`.
        #[inline(always)]
        pub fn plus(self, x: f32, row: Self) -> Self {
            unsafe {
                let x = _mm256_set1_ps(x);
                Self([
                    _mm256_fmadd_ps(x, row.0[0], self.0[0]),
                    _mm256_fmadd_ps(x, row.0[1], self.0[1]),
                ])
            }
        }

        /// Whole numbers times their columns' scales.
        #[inline(always)]
        pub fn scaled(whole: &[i8; LANES], scales: &[f32; LANES]) -> Self {
            let (at, scales) = (whole.as_ptr(), Self::load(scales));
            let eight = |at: *const i8| unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))) };
            unsafe {
                Self([
                    _mm256_mul_ps(eight(at), scales.0[0]),
                    _mm256_mul_ps(eight(at.add(8)), scales.0[1]),
                ])
            }
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma")))]
mod kind {
    use super::LANES;

    #[derive(Clone, Copy)]
    pub(crate) struct Registers([f32; LANES]);

    impl Registers {
        pub fn zero() -> Self {
            Self([0.0; LANES])
        }

        pub fn load(from: &[f32; LANES]) -> Self {
            Self(*from)
        }

        pub fn store(self, to: &mut [f32; LANES]) {
            *to = self.0;
        }

        /// `self + x row`.
        pub fn plus(self, x: f32, row: Self) -> Self {
            Self(std::array::from_fn(|j| x.mul_add(row.0[j], self.0[j])))
        }

        /// Whole numbers times their columns' scales.
        pub fn scaled(whole: &[i8; LANES], scales: &[f32; LANES]) -> Self {
            Self(std::array::from_fn(|j| f32::from(whole[j]) * scales[j]))
        }
    }
}
