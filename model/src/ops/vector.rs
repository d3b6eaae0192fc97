//! Loops over slices of f32, written so that the compiler vectorises them.

/// `e^x` with a relative error below 2e-7; 0 for x below -87.
///
/// Cephes' `expf`: the argument is reduced by multiples of ln 2 and a polynomial of degree 5 does the rest. Unlike
/// `f32::exp` it has no call and no branch, so a loop over it is vectorised.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    // Behind a sum with 1.5 * 2^23 comes no fraction, and its lowest bits are the whole number: no conversion is needed.
    const WHOLE: f32 = 12_582_912.0;
    let shifted = clamped * std::f32::consts::LOG2_E + WHOLE;
    let n = shifted - WHOLE;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32
        .mul_add(r, 1.398_2e-3)
        .mul_add(r, 8.333_452e-3)
        .mul_add(r, 4.166_579_6e-2)
        .mul_add(r, 1.666_666_5e-1)
        .mul_add(r, 0.5);
    let y = (p * r).mul_add(r, r) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { y * scale }
}

/// Σ aᵢ bᵢ, in eight partial sums.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a8, a_rest), (b8, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let tail: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    dot_chunks(a8, b8) + tail
}

/// Written out, since the compiler splits the loop over eight lanes into pairs and so into four times the work.
#[cfg(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma"))]
#[inline(always)]
fn dot_chunks(a: &[[f32; 8]], b: &[[f32; 8]]) -> f32 {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps};
    let mut lanes = [0f32; 8];
    // SAFETY: the loads and the store are of whole arrays of eight, unaligned access is what these are for, and the
    // features are on for the whole build.
    unsafe {
        let mut sum = _mm256_setzero_ps();
        for (x, y) in a.iter().zip(b) {
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(y.as_ptr()), sum);
        }
        _mm256_storeu_ps(lanes.as_mut_ptr(), sum);
    }
    add_up(lanes)
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma")))]
#[inline(always)]
fn dot_chunks(a: &[[f32; 8]], b: &[[f32; 8]]) -> f32 {
    let mut lanes = [0f32; 8];
    for (x, y) in a.iter().zip(b) {
        for i in 0..8 {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    add_up(lanes)
}

/// The sum of eight partial sums, as a tree: a chain of seven additions would wait for each.
#[inline(always)]
fn add_up(lanes: [f32; 8]) -> f32 {
    let four: [f32; 4] = std::array::from_fn(|i| lanes[i] + lanes[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// The largest element that is a number; -inf of nothing.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    // Not `f32::max`, which takes three instructions; four chains, which do not wait for each other.
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 32];
    let (chunks, rest) = x.as_chunks::<32>();
    for chunk in chunks {
        for i in 0..32 {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    let mut eight: [f32; 8] =
        std::array::from_fn(|i| larger(larger(lanes[i], lanes[i + 8]), larger(lanes[i + 16], lanes[i + 24])));
    let (chunks, rest) = rest.as_chunks::<8>();
    for chunk in chunks {
        for i in 0..8 {
            eight[i] = larger(eight[i], chunk[i]);
        }
    }
    eight.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// The first place of `value`.
pub(crate) fn position(x: &[f32], value: f32) -> Option<usize> {
    const AT_ONCE: usize = 64;
    let (chunks, rest) = x.as_chunks::<AT_ONCE>();
    // All of a chunk are compared, many at a time, before one is looked for.
    let has = |chunk: &[f32; AT_ONCE]| chunk.iter().fold(false, |found, x| found | (*x == value));
    let first = chunks.iter().position(has).unwrap_or(chunks.len()) * AT_ONCE;
    let chunk = x[first..].get(..AT_ONCE).unwrap_or(rest);
    Some(first + chunk.iter().position(|x| *x == value)?)
}

/// Replaces `x` by its softmax. Returns the largest element and the sum that it was divided by.
#[inline(always)]
pub(crate) fn softmax(x: &mut [f32]) -> (f32, f32) {
    let largest = max(x);
    for v in x.iter_mut() {
        *v = exp(*v - largest);
    }
    let sum = sum(x);
    let inverse = 1.0 / sum;
    for v in x.iter_mut() {
        *v *= inverse;
    }
    (largest, sum)
}

/// Replaces `x` by its softmax before the division. Returns what is to be divided by.
#[inline(always)]
pub(crate) fn exp_all(x: &mut [f32]) -> f32 {
    let largest = max(x);
    for v in x.iter_mut() {
        *v = exp(*v - largest);
    }
    sum(x)
}

/// Σ xᵢ, in eight partial sums.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (chunks, rest) = x.as_chunks::<8>();
    for chunk in chunks {
        for i in 0..8 {
            lanes[i] += chunk[i];
        }
    }
    add_up(lanes) + rest.iter().sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_the_last_bits() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            let got = f64::from(exp(x));
            assert!(((got - want) / want).abs() < 3e-7, "e^{x}: {got}, want {want}");
        }
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_largest_is_found_at_its_first_place_wherever_that_is() {
        for len in 0..150 {
            let x: Vec<f32> = (0..len).map(|i| -1.0 - (i * 7 % 11) as f32).collect();
            for at in 0..len {
                let mut x = x.clone();
                x[at..].fill(-0.5);
                x[..at].iter_mut().step_by(3).for_each(|x| *x = f32::NAN);
                assert_eq!((max(&x), position(&x, -0.5)), (-0.5, Some(at)), "{at} of {len}");
                assert_eq!(position(&x, 4.0), None);
            }
        }
        assert_eq!(max(&[f32::NAN, f32::NEG_INFINITY]), f32::NEG_INFINITY);
    }

    #[test]
    fn softmax_sums_to_one() {
        let mut x: Vec<f32> = (0..13).map(|i| i as f32).collect();
        softmax(&mut x);
        assert!((sum(&x) - 1.0).abs() < 1e-6);
        assert!((x[12] / x[11] - std::f32::consts::E).abs() < 1e-4);
    }
}
