//! How near the matrix products of a decode step come to what this machine can do, and the whole step to its products.

use lengthwise_model::{Llama, ProductTiming};
use serde::Serialize;

use super::ProfilePoint;
use crate::progress::Bar;
use crate::table::Table;

/// One linear shape at one batch size.
#[derive(Debug, Clone, Serialize)]
pub struct ProductRow {
    /// Sequences.
    pub batch_size: usize,
    /// `qkv`, `o`, `gate+up`, `down` or `lm_head`.
    pub linear: &'static str,
    /// Outputs of what is multiplied at once.
    pub outputs: usize,
    /// Inputs.
    pub inputs: usize,
    /// How often a step does it.
    pub times: usize,
    /// All of them in a step, in milliseconds.
    pub ms: f64,
    /// The rate reached.
    pub gflops: f64,
    /// What this machine does of the shape with warm caches, by the better of the gemm crate and our kernel.
    pub peak_gflops: f64,
    /// The one divided by the other.
    pub share: f64,
    /// The rate that reading the weights leaves room for, at `read_gb_per_s`.
    pub memory_gflops: f64,
    /// The rate reached divided by the lower of the two limits.
    pub share_of_both: f64,
}

/// A whole step against its products alone.
#[derive(Debug, Clone, Serialize)]
pub struct StepRow {
    /// Sequences.
    pub batch_size: usize,
    /// Tokens of each before the step.
    pub context: usize,
    /// The whole step, in milliseconds.
    pub step_ms: f64,
    /// The sum of its matrix products, in milliseconds.
    pub products_ms: f64,
    /// The one divided by the other.
    pub ratio: f64,
}

/// Both, as `profile --json` prints them.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Products {
    /// Bytes of the weights that a step multiplies with.
    pub weight_bytes: usize,
    /// How fast all threads read them in a step's order, if they do nothing else, in 10⁹ bytes per second: the most of all
    /// batch sizes' measurements.
    pub read_gb_per_s: f64,
    /// By batch size and shape.
    pub linears: Vec<ProductRow>,
    /// By batch size and context.
    pub steps: Vec<StepRow>,
}

/// Times the products at every batch size among `points`. `None` where the CPU path does not run the model.
pub fn measure(network: &Llama, points: &[ProfilePoint]) -> Option<Products> {
    let mut sizes: Vec<usize> = points.iter().map(|p| p.batch_size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let mut products = Products {
        weight_bytes: network.linear_bytes(),
        ..Products::default()
    };
    let mut bar = Bar::new("products", sizes.len() as u64);
    for (i, &batch_size) in sizes.iter().enumerate() {
        let timings = network.time_products(batch_size)?;
        let products_ms: f64 = timings.iter().map(|t| t.seconds * 1000.0).sum();
        let read = timings.first().map_or(0.0, |t| t.read_rate / 1e9);
        products.read_gb_per_s = products.read_gb_per_s.max(read);
        products.linears.extend(timings.iter().map(row));
        let of_size = points.iter().filter(|p| p.batch_size == batch_size);
        products.steps.extend(of_size.map(|p| StepRow {
            batch_size,
            context: p.context,
            step_ms: p.step_ms,
            products_ms,
            ratio: p.step_ms / products_ms,
        }));
        bar.set(i as u64 + 1, |_| format!("batch {batch_size}"));
    }
    bar.finish();
    Some(products)
}

fn row(t: &ProductTiming) -> ProductRow {
    ProductRow {
        batch_size: t.rows,
        linear: t.name,
        outputs: t.outputs,
        inputs: t.inputs,
        times: t.times,
        ms: t.seconds * 1000.0,
        gflops: t.flops() / 1e9,
        peak_gflops: t.peak_flops / 1e9,
        share: t.share(),
        memory_gflops: t.memory_flops() / 1e9,
        share_of_both: t.share_of_both(),
    }
}

impl Products {
    /// Two tables for people.
    pub fn text(&self) -> String {
        let header = vec![
            "batch", "linear", "outputs", "inputs", "times", "ms", "GFLOP/s", "peak", "share", "memory", "of both",
        ];
        let rows = self.linears.iter().map(|r| {
            vec![
                r.batch_size.to_string(),
                r.linear.to_owned(),
                r.outputs.to_string(),
                r.inputs.to_string(),
                r.times.to_string(),
                format!("{:.3}", r.ms),
                format!("{:.1}", r.gflops),
                format!("{:.1}", r.peak_gflops),
                format!("{:.0} %", r.share * 100.0),
                format!("{:.1}", r.memory_gflops),
                format!("{:.0} %", r.share_of_both * 100.0),
            ]
        });
        let linears = Table {
            header,
            rows: rows.collect(),
        };
        let rows = self.steps.iter().map(|r| {
            vec![
                r.batch_size.to_string(),
                r.context.to_string(),
                format!("{:.3}", r.step_ms),
                format!("{:.3}", r.products_ms),
                format!("{:.2}", r.ratio),
            ]
        });
        let steps = Table {
            header: vec!["batch", "context", "step ms", "products ms", "ratio"],
            rows: rows.collect(),
        };
        format!(
            "{:.1} MB of weights, read at {:.1} GB/s: what `memory` leaves room for. `of both`: of the lower of `peak` and `memory`.\n\n{}\n{}",
            self.weight_bytes as f64 / 1e6,
            self.read_gb_per_s,
            linears.text(),
            steps.text()
        )
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use lengthwise_model::{DTypeChoice, LoadedModel, TINY};

    use super::*;

    #[test]
    fn every_point_has_its_step_and_every_batch_size_its_shapes() -> anyhow::Result<()> {
        let model = LoadedModel::open(TINY, DTypeChoice::Auto, &Device::Cpu, &mut ())?;
        let config = model.network.config();
        let point = |batch_size, context, step_ms| ProfilePoint {
            batch_size,
            context,
            prefill_ms: 1.0,
            step_ms,
        };
        let points = [point(1, 32, 3.0), point(1, 64, 6.0), point(4, 32, 9.0)];
        let products = measure(&model.network, &points).expect("it runs on the CPU path");
        assert_eq!((products.linears.len(), products.steps.len()), (10, 3));
        assert!(products.read_gb_per_s > 0.0);
        for row in &products.linears {
            // No upper bound: a busy machine may disturb the limit more than the trial, and a test times nothing.
            assert!(row.share > 0.0 && row.share.is_finite(), "{row:?}");
            assert!(row.share_of_both >= row.share && row.memory_gflops > 0.0, "{row:?}");
            if row.linear == "gate+up" {
                let want = (2 * config.intermediate_size, config.hidden_size);
                assert_eq!((row.outputs, row.inputs), want);
                assert_eq!(row.times, config.num_hidden_layers);
            }
        }
        let [a, b, _] = products.steps.as_slice() else {
            anyhow::bail!("three points");
        };
        assert!(
            (b.ratio / a.ratio - 2.0).abs() < 1e-9,
            "the same products, twice the step"
        );
        Ok(())
    }
}
