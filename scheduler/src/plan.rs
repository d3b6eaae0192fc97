//! Cutting a group of requests into batches, by the published rules.

use std::collections::BTreeMap;

use lengthwise_core::{RequestId, bucket_up};

use crate::ScheduleConfig;

/// A request and the length predicted for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Whose answer.
    pub id: RequestId,
    /// The largest length to expect, in tokens.
    pub predicted: u32,
}

/// Requests that are decoded together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedBatch {
    /// Its requests.
    pub ids: Vec<RequestId>,
    /// Tokens after which it stops, whoever has not ended; at least 1.
    pub stop_at: u32,
}

/// Width of a bin of predicted lengths, in tokens.
const BIN: u32 = 50;
/// Upper bounds of the first bins and their batch sizes (`len_bs_dict` of the published code); beyond them the batch
/// size of the config.
const VARIABLE_BATCH_SIZES: [(u32, usize); 4] = [(50, 256), (100, 128), (150, 64), (200, 32)];
/// The published code lets no rest below this many requests be a batch of its own.
const SMALLEST_REST: usize = 16;

/// Cuts one group into batches.
pub fn plan_group(jobs: &[Job], config: &ScheduleConfig) -> Vec<PlannedBatch> {
    if !config.strategy.sorts() {
        return cut(jobs, config.batch_size.get(), |_| config.max_new_tokens);
    }
    let mut sorted = jobs.to_vec();
    sorted.sort_by_key(|job| job.predicted);
    if config.vbs {
        return variable_batches(sorted, config);
    }
    let longest = |batch: &[Job]| batch.iter().map(|j| j.predicted).max().unwrap_or(0);
    cut(&sorted, config.batch_size.get(), |batch| {
        stop_at(longest(batch), config)
    })
}

fn cut(jobs: &[Job], size: usize, stop: impl Fn(&[Job]) -> u32) -> Vec<PlannedBatch> {
    jobs.chunks(size)
        .map(|b| PlannedBatch {
            ids: b.iter().map(|j| j.id.clone()).collect(),
            stop_at: stop(b),
        })
        .collect()
}

/// Where a batch stops: at its largest predicted length under FCR, else at the cap.
fn stop_at(predicted: u32, config: &ScheduleConfig) -> u32 {
    if config.fcr {
        predicted.clamp(1, config.max_new_tokens.max(1))
    } else {
        config.max_new_tokens
    }
}

/// Bins of predicted lengths, each with its own batch size. A rest too small for half a batch joins the next longer
/// bin; the longest bin keeps its own.
fn variable_batches(sorted: Vec<Job>, config: &ScheduleConfig) -> Vec<PlannedBatch> {
    let mut bins: BTreeMap<u32, Vec<Job>> = BTreeMap::new();
    for job in sorted {
        // Predictions above the cap are all the same bin: nothing can be longer.
        let bin = bucket_up(job.predicted.clamp(1, config.max_new_tokens.max(1)), BIN);
        bins.entry(bin).or_default().push(job);
    }
    let mut batches = Vec::new();
    while let Some((bin, mut jobs)) = bins.pop_first() {
        let size = batch_size(bin, config);
        if let Some(mut longer) = bins.first_entry() {
            let rest = jobs.len() % size;
            if rest < (size / 2).max(SMALLEST_REST.min(config.batch_size.get())) {
                longer.get_mut().extend(jobs.split_off(jobs.len() - rest));
            }
        }
        batches.extend(cut(&jobs, size, |_| stop_at(bin, config)));
    }
    batches
}

fn batch_size(bin: u32, config: &ScheduleConfig) -> usize {
    let listed = VARIABLE_BATCH_SIZES.iter().find(|(bound, _)| bin <= *bound);
    listed.map_or(config.batch_size.get(), |(_, size)| {
        (*size).max(config.batch_size.get())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Strategy;
    use std::num::NonZeroUsize;

    fn jobs(predicted: &[u32]) -> Vec<Job> {
        let job = |(i, &predicted): (usize, &u32)| Job {
            id: i.to_string().into(),
            predicted,
        };
        predicted.iter().enumerate().map(job).collect()
    }

    fn shape(batches: &[PlannedBatch]) -> Vec<(Vec<&str>, u32)> {
        batches
            .iter()
            .map(|b| (b.ids.iter().map(RequestId::as_str).collect(), b.stop_at))
            .collect()
    }

    fn config(strategy: Strategy, batch_size: usize) -> ScheduleConfig {
        ScheduleConfig {
            batch_size: NonZeroUsize::new(batch_size).expect("not 0"),
            ..ScheduleConfig::new(strategy)
        }
    }

    #[test]
    fn vanilla_keeps_the_order_of_arrival() {
        let batches = plan_group(&jobs(&[90, 10, 50]), &config(Strategy::Vanilla, 2));
        assert_eq!(shape(&batches), [(vec!["0", "1"], 512), (vec!["2"], 512)]);
    }

    #[test]
    fn sorted_batches_stop_at_their_longest_prediction_under_fcr() {
        let config = config(Strategy::SeqSch, 2);
        let batches = plan_group(&jobs(&[90, 10, 50, 9000]), &config.with(false, true));
        assert_eq!(shape(&batches), [(vec!["1", "2"], 50), (vec!["0", "3"], 512)]);
        let batches = plan_group(&jobs(&[90, 10]), &config.with(false, false));
        assert_eq!(shape(&batches), [(vec!["1", "0"], 512)]);
    }

    #[test]
    fn a_bin_too_small_joins_the_next_longer_one() {
        // 130 requests of 40: one batch of 256 wants at least 128, so they stay; 20 of 90 are fewer than 64 and join
        // the 10 of 260, whose bin is the longest and takes 16 at a time.
        let predicted: Vec<u32> = [(130, 40), (20, 90), (10, 260)]
            .iter()
            .flat_map(|&(n, p)| vec![p; n])
            .collect();
        let batches = plan_group(&jobs(&predicted), &config(Strategy::Oracle, 16).with(true, true));
        let sizes: Vec<_> = batches.iter().map(|b| (b.ids.len(), b.stop_at)).collect();
        assert_eq!(sizes, [(130, 50), (16, 300), (14, 300)]);
        // What joined stands behind what was there.
        assert_eq!(batches[1].ids[0].as_str(), "150");
        assert_eq!(batches[1].ids[10].as_str(), "130");
    }

    #[test]
    fn only_the_rest_of_a_bin_moves_on() {
        // 40 of 160: a batch of 32, and a rest of 8 < 16 that joins the bin of 250.
        let predicted: Vec<u32> = [(40, 160), (16, 230)].iter().flat_map(|&(n, p)| vec![p; n]).collect();
        let batches = plan_group(&jobs(&predicted), &config(Strategy::Oracle, 16).with(true, true));
        let sizes: Vec<_> = batches.iter().map(|b| (b.ids.len(), b.stop_at)).collect();
        assert_eq!(sizes, [(32, 200), (16, 250), (8, 250)]);
    }

    #[test]
    fn predictions_of_zero_and_beyond_the_cap_have_bins_too() {
        let batches = plan_group(&jobs(&[0, u32::MAX]), &config(Strategy::SeqSch, 16).with(true, true));
        let all: usize = batches.iter().map(|b| b.ids.len()).sum();
        assert_eq!(all, 2);
        assert!(batches.iter().all(|b| (1..=512).contains(&b.stop_at)));
    }
}
