//! Time to plan 10,000 requests: `cargo bench -p lengthwise-scheduler`.
#![allow(missing_docs)]

use std::collections::HashMap;
use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use lengthwise_core::Quantile;
use lengthwise_scheduler::{
    BatchExecutor, BatchRun, CostModel, Job, Outcome, PlannedBatch, Planning, Rise, ScheduleConfig, Strategy,
    run_groups,
};

/// Answers at once, so that what is timed is the planning.
struct AtOnce;

impl BatchExecutor for AtOnce {
    type Error = Infallible;

    fn kept_tokens(&self) -> usize {
        1 << 24
    }

    fn run_batch(&mut self, batch: &PlannedBatch) -> Result<BatchRun, Infallible> {
        let outcome = |id: &lengthwise_core::RequestId| (id.clone(), Outcome::Finished { tokens: 1 });
        Ok(BatchRun {
            steps: 1,
            slot_steps: batch.ids.len() as u64,
            outcomes: batch.ids.iter().map(outcome).collect(),
        })
    }
}

fn planning(criterion: &mut Criterion) {
    let jobs: Vec<Job> = (0..10_000u32)
        .map(|i| Job {
            id: i.to_string().into(),
            // A long-tailed mixture of lengths.
            predicted: 1 + (i * 7919 % 997) * (i * 104_729 % 991) / 1940,
        })
        .collect();
    let cost = CostModel {
        step: 3e-3,
        row: 1e-5,
        cached_token: 2e-8,
        prompt_token: 1e-5,
        many_rows: Some(Rise {
            beyond: 16.0,
            more: 4e-5,
        }),
        many_cached_tokens: Some(Rise {
            beyond: 4000.0,
            more: 4e-8,
        }),
    };
    let by_cost = |history, distributions| {
        Some(Arc::new(Planning {
            cost,
            history,
            distributions,
        }))
    };
    // As far off as predictions are: each stands for lengths that spread around it.
    let history = (0..10_000u32)
        .map(|i| (1 + i * 7919 % 512, 1 + i * 104_729 % 512))
        .collect();
    let probabilities = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95];
    let quantile = |job: &Job, probability: f64| Quantile {
        probability,
        tokens: (f64::from(job.predicted) * (0.5 + probability)).round() as u32,
    };
    let quantiles = jobs
        .iter()
        .map(|job| (job.id.clone(), probabilities.map(|p| quantile(job, p)).to_vec()))
        .collect();
    for (name, planning) in [
        ("published", None),
        ("cost", by_cost(Vec::new(), HashMap::new())),
        ("cost with a history of 10,000", by_cost(history, HashMap::new())),
        ("cost with quantiles", by_cost(Vec::new(), quantiles)),
    ] {
        let config = ScheduleConfig {
            group_size: NonZeroUsize::new(jobs.len()).expect("there are jobs"),
            ..ScheduleConfig::new(Strategy::SeqSch)
        };
        let config = config.with(true, true).planned_by(planning);
        criterion.bench_function(&format!("plan 10,000 requests, {name}"), |bencher| {
            bencher.iter(|| run_groups(&jobs, &config, &mut AtOnce).expect("it cannot fail"));
        });
    }
}

criterion_group!(benches, planning);
criterion_main!(benches);
