//! What the matrix products of a decode step take by themselves, and what this machine can do of them.

use std::time::Instant;

use super::Llama;
use crate::cpu::{Output, PackedMatrix, Product, Rows, multiply, read_weights};
use crate::lora::LinearKind;
use crate::ops;

/// The products of one linear shape, in one pass over all layers.
#[derive(Debug, Clone, PartialEq)]
pub struct ProductTiming {
    /// `qkv`, `o`, `gate+up`, `down` or `lm_head`: what is multiplied with the same input at once.
    pub name: &'static str,
    /// Outputs, of all that is multiplied at once.
    pub outputs: usize,
    /// Inputs.
    pub inputs: usize,
    /// How often a step does it.
    pub times: usize,
    /// Rows on the left.
    pub rows: usize,
    /// All of them together, in seconds, with the weights read in the order of a step.
    pub seconds: f64,
    /// Floating-point operations per second that this machine does of the shape, where it is one of a few: the better of the
    /// `gemm` crate (f32) and our kernel on the same operands again and again, so in the caches as far as they hold them.
    pub peak_flops: f64,
    /// Bytes of the weights of one product.
    pub weight_bytes: usize,
    /// Bytes per second at which all threads read all weights of the model, in the order of a step, and do nothing else: no
    /// cache holds what does not fit, whoever multiplies with it.
    pub read_rate: f64,
}

impl ProductTiming {
    /// Floating-point operations per second reached in the step's order.
    pub fn flops(&self) -> f64 {
        self.work() * self.times as f64 / self.seconds
    }

    /// The rate reached as a share of the machine's.
    pub fn share(&self) -> f64 {
        self.flops() / self.peak_flops
    }

    /// The operations per second that reading the weights leaves room for.
    pub fn memory_flops(&self) -> f64 {
        self.work() / (self.weight_bytes as f64 / self.read_rate)
    }

    /// The rate reached as a share of what both the processor and the memory allow.
    pub fn share_of_both(&self) -> f64 {
        self.flops() / self.peak_flops.min(self.memory_flops())
    }

    /// Operations of one product: a multiplication and an addition for each weight and row.
    fn work(&self) -> f64 {
        2.0 * (self.rows * self.outputs * self.inputs) as f64
    }
}

/// The linear layers that share an input.
const GROUPS: [(&str, &[LinearKind]); 4] = [
    ("qkv", &[LinearKind::QProj, LinearKind::KProj, LinearKind::VProj]),
    ("o", &[LinearKind::OProj]),
    ("gate+up", &[LinearKind::GateProj, LinearKind::UpProj]),
    ("down", &[LinearKind::DownProj]),
];

/// Passes over the model: the first warms up, the fastest counts, since others disturb a pass and never speed it up.
const PASSES: usize = 6;
/// Time for which a shape's peak is looked for, in seconds, and the fewest and the most trials.
const PEAK_SECONDS: f64 = 0.05;
const TRIALS: std::ops::RangeInclusive<usize> = 6..=200;

impl Llama {
    /// Times the matrix products of one step of `rows` sequences. `None` where the CPU path does not run the model.
    pub fn time_products(&self, rows: usize) -> Option<Vec<ProductTiming>> {
        // On a thread of the pool, as a step's products run: nobody waits for one to wake.
        rayon::scope(|_| self.time_products_here(rows))
    }

    fn time_products_here(&self, rows: usize) -> Option<Vec<ProductTiming>> {
        let layers: Vec<Vec<Vec<&PackedMatrix>>> = self.blocks.iter().map(groups_of).collect::<Option<_>>()?;
        let head = vec![&**self.lm_head.packed()?];
        let read_rate = read_rate(
            &layers
                .iter()
                .flatten()
                .chain([&head])
                .flatten()
                .copied()
                .collect::<Vec<_>>(),
        );
        let mut buffers = Buffers::new(rows, layers.iter().flatten().chain([&head]));
        let mut best = [f64::INFINITY; GROUPS.len() + 1];
        for pass in 0..PASSES {
            let mut seconds = [0.0; GROUPS.len() + 1];
            let mut following = layers.iter().flatten().chain([&head]).skip(1);
            for layer in &layers {
                for (matrices, seconds) in layer.iter().zip(&mut seconds) {
                    *seconds += buffers.time(matrices, following.next().map(|m| m[0]));
                }
            }
            seconds[GROUPS.len()] = buffers.time(&head, None);
            if pass > 0 {
                best = std::array::from_fn(|i| best[i].min(seconds[i]));
            }
        }
        let one = layers.first()?.iter().chain([&head]);
        let names = GROUPS.iter().map(|(name, _)| (*name, layers.len()));
        let timing = |((name, times), (matrices, seconds)): ((&'static str, usize), (&Vec<&PackedMatrix>, f64))| {
            let mut timing = ProductTiming {
                name,
                outputs: matrices.iter().map(|m| m.shape().0).sum(),
                inputs: matrices[0].shape().1,
                times,
                rows,
                seconds,
                peak_flops: 0.0,
                weight_bytes: matrices.iter().map(|m| m.bytes()).sum(),
                read_rate,
            };
            timing.peak_flops = timing.work() / buffers.fastest(matrices, timing.outputs);
            timing
        };
        let all = names.chain([("lm_head", 1)]).zip(one.zip(best));
        Some(all.map(timing).collect())
    }
}

/// A layer's weights in the groups of [`GROUPS`].
fn groups_of(block: &super::block::Block) -> Option<Vec<Vec<&PackedMatrix>>> {
    let weight = |kind: &LinearKind| block.linears[*kind as usize].weight.packed().map(|w| &**w);
    GROUPS
        .iter()
        .map(|(_, kinds)| kinds.iter().map(weight).collect())
        .collect()
}

/// Operands that fit every product.
struct Buffers {
    rows: usize,
    x: Vec<f32>,
    out: Vec<Vec<f32>>,
}

impl Buffers {
    fn new<'a>(rows: usize, groups: impl Iterator<Item = &'a Vec<&'a PackedMatrix>> + Clone) -> Self {
        let matrices = groups.flatten();
        let inputs = matrices.clone().map(|m| m.shape().1).max().unwrap_or(0);
        let outputs = matrices.map(|m| m.shape().0).max().unwrap_or(0);
        Self {
            rows,
            x: (0..rows * inputs).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect(),
            out: vec![vec![0.0; rows * outputs]; 3],
        }
    }

    /// Seconds that the product of `matrices` (at most three) with the rows takes, before `next` is multiplied.
    fn time(&mut self, matrices: &[&PackedMatrix], next: Option<&PackedMatrix>) -> f64 {
        let inputs = matrices[0].shape().1;
        let products = matrices.iter().zip(&mut self.out).map(|(matrix, out)| Product {
            matrix,
            // SAFETY: a buffer for each, which nothing reads while `multiply` runs.
            out: unsafe { Output::shared(out, matrix.shape().0) },
            accumulate: false,
        });
        let products: Vec<Product> = products.collect();
        let x = Rows {
            data: &self.x,
            stride: inputs,
        };
        let began = Instant::now();
        multiply(x, self.rows, &products, next);
        began.elapsed().as_secs_f64()
    }

    /// The least seconds of one product that can be had, again and again with the same operands.
    fn fastest(&mut self, matrices: &[&PackedMatrix], outputs: usize) -> f64 {
        let inputs = matrices[0].shape().1;
        let ours = least(|| self.time(matrices, Some(matrices[0])));
        let weight: Vec<f32> = matrices.iter().flat_map(|m| m.unpack()).collect();
        let mut out = vec![0f32; self.rows * outputs];
        let shape = (self.rows, outputs, inputs);
        let gemm = least(|| {
            let began = Instant::now();
            ops::gemm_transposed(&self.x, &weight, shape, &mut out);
            began.elapsed().as_secs_f64()
        });
        ours.min(gemm)
    }
}

/// Bytes per second of reading `matrices` one after the other, the most of several passes in either of two ways.
fn read_rate(matrices: &[&PackedMatrix]) -> f64 {
    let bytes: usize = matrices.iter().map(|m| m.bytes()).sum();
    let seconds = [true, false].into_iter().flat_map(|ahead| {
        (0..PASSES).map(move |_| {
            let began = Instant::now();
            read_weights(matrices, ahead);
            began.elapsed().as_secs_f64()
        })
    });
    bytes as f64 / seconds.fold(f64::INFINITY, f64::min)
}

/// The least of several trials.
fn least(mut trial: impl FnMut() -> f64) -> f64 {
    let (mut least, mut spent, mut trials) = (f64::INFINITY, 0.0, 0);
    while trials < *TRIALS.start() || (spent < PEAK_SECONDS && trials < *TRIALS.end()) {
        let seconds = trial();
        least = least.min(seconds);
        spent += seconds;
        trials += 1;
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_products_are_those_of_the_model() -> anyhow::Result<()> {
        let config = crate::testing::config();
        let llama = crate::testing::network(&config)?;
        let timings = llama.time_products(3).expect("it runs on the CPU path");
        let shapes: Vec<_> = timings.iter().map(|t| (t.name, t.outputs, t.inputs, t.times)).collect();
        // Four query heads and two of keys and values of eight, hidden 32, inner 48, two layers, vocabulary 50.
        let want = [
            ("qkv", 64, 32, 2),
            ("o", 32, 32, 2),
            ("gate+up", 96, 32, 2),
            ("down", 32, 48, 2),
            ("lm_head", 50, 32, 1),
        ];
        assert_eq!(shapes, want);
        for t in &timings {
            assert!(t.rows == 3 && t.seconds > 0.0 && t.share() > 0.0, "{t:?}");
            assert!(t.read_rate > 0.0 && t.share_of_both() >= t.share(), "{t:?}");
        }
        Ok(())
    }

    #[test]
    fn a_share_is_the_rate_reached_of_the_peak_and_of_what_memory_allows() {
        let timing = ProductTiming {
            name: "o",
            outputs: 10,
            inputs: 5,
            times: 4,
            rows: 2,
            seconds: 8.0,
            peak_flops: 200.0,
            weight_bytes: 200,
            read_rate: 125.0,
        };
        // 2 · 2 · 10 · 5 = 200 operations a product, 800 in 8 s.
        assert_eq!((timing.flops(), timing.share()), (100.0, 0.5));
        // Its weights take 1.6 s to read: 125 operations per second, less than the 200 of warm caches.
        assert_eq!((timing.memory_flops(), timing.share_of_both()), (125.0, 0.8));
    }
}
