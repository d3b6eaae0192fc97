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

/// The largest element; -inf of nothing.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let chunks = x.chunks_exact(8);
    let mut largest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for i in 0..8 {
            lanes[i] = lanes[i].max(chunk[i]);
        }
    }
    for lane in lanes {
        largest = largest.max(lane);
    }
    largest
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
    fn softmax_sums_to_one() {
        let mut x: Vec<f32> = (0..13).map(|i| i as f32).collect();
        softmax(&mut x);
        assert!((sum(&x) - 1.0).abs() < 1e-6);
        assert!((x[12] / x[11] - std::f32::consts::E).abs() < 1e-4);
    }
}
