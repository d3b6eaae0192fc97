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
    /// Steps after which it stops, whoever has not ended; at least 1. What a request that is resumed had
    /// before does not count.
    pub stop_at: u32,
}

/// Upper bounds of the first bins and their batch sizes (`len_bs_dict` of the published code); beyond them the batch
/// size of the config.
const VARIABLE_BATCH_SIZES: [(u32, usize); 4] = [(50, 256), (100, 128), (150, 64), (200, 32)];
/// The published code lets no rest below this many requests be a batch of its own.
const SMALLEST_REST: usize = 16;

/// Cuts one group into batches.
pub fn plan_group(jobs: &[Job], config: &ScheduleConfig) -> Vec<PlannedBatch> {
    if !config.strategy.sorts() {
        return cut(jobs, config.batch_size.get(), |_| config.cap());
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
        predicted.clamp(1, config.cap())
    } else {
        config.cap()
    }
}

/// Bins of predicted lengths, each with its own batch size. A rest too small for half a batch joins the next longer
/// bin; the longest bin keeps its own.
fn variable_batches(sorted: Vec<Job>, config: &ScheduleConfig) -> Vec<PlannedBatch> {
    let mut bins: BTreeMap<u32, Vec<Job>> = BTreeMap::new();
    for job in sorted {
        // Predictions above the cap are all the same bin: nothing can be longer.
        let bin = bucket_up(job.predicted.clamp(1, config.cap()), config.bucket);
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

/// The listed size, or the config's where that is larger: a user who has room for 64 long answers has it for 64 short
/// ones. With the published 16 it is the published size.
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
    use proptest::prelude::*;
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
        let batches = plan_group(&jobs(&[90, 10, 50, 9000]), &config.clone().with(false, true));
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

    #[test]
    fn equal_predictions_keep_the_order_of_arrival() {
        // Many, since an unstable sort keeps the order of a few.
        let predicted: Vec<u32> = (0..200).map(|i| 7 - i % 2 * 4).collect();
        let batches = plan_group(&jobs(&predicted), &config(Strategy::SeqSch, 100));
        let ids = |batch: &PlannedBatch| {
            batch
                .ids
                .iter()
                .map(|id| id.as_str().parse().unwrap_or(999))
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(&batches[0]), (0..200).skip(1).step_by(2).collect::<Vec<_>>());
        assert_eq!(ids(&batches[1]), (0..200).step_by(2).collect::<Vec<_>>());
    }

    #[test]
    fn a_bin_stays_from_half_a_batch_on_and_joins_below() {
        for (predicted, half) in [(40, 128), (90, 64), (140, 32), (190, 16), (240, 16)] {
            for (count, stays) in [(half, true), (half - 1, false)] {
                let mut lengths = vec![predicted; count];
                lengths.push(512);
                let plan = plan_group(&jobs(&lengths), &config(Strategy::Oracle, 16).with(true, true));
                let stayed = plan[0].stop_at == bucket_up(predicted, 50);
                assert_eq!(stayed, stays, "{count} of {predicted}");
            }
        }
    }

    #[test]
    fn what_joins_counts_towards_the_batch_of_the_bin_it_joins() {
        // 20 of 140 are fewer than 32 and join the 12 of 190: together a full batch of 32, so nothing moves on to 230.
        // The 12 alone would have been fewer than 16.
        let predicted: Vec<u32> = [(20, 140), (12, 190), (16, 230)]
            .iter()
            .flat_map(|&(n, p)| vec![p; n])
            .collect();
        let batches = plan_group(&jobs(&predicted), &config(Strategy::Oracle, 16).with(true, true));
        let sizes: Vec<_> = batches.iter().map(|b| (b.ids.len(), b.stop_at)).collect();
        assert_eq!(sizes, [(32, 200), (16, 250)]);
        assert_eq!((batches[0].ids[0].as_str(), batches[0].ids[12].as_str()), ("20", "0"));
    }

    #[test]
    fn bins_are_as_wide_as_the_config_says() {
        // Bins of 10: 11 and 19 share the bin of 20, 21 is in the bin of 30.
        let mut config = config(Strategy::Oracle, 1).with(true, true);
        config.bucket = 10;
        let batches = plan_group(&jobs(&[21, 11, 19]), &config);
        // Fewer than half a batch of 256: they join the bin of 30.
        assert_eq!(shape(&batches), [(vec!["0", "1", "2"], 30)]);
    }

    #[test]
    fn a_cap_of_zero_still_lets_every_sequence_have_its_token() {
        for strategy in [Strategy::Vanilla, Strategy::SeqSch] {
            let mut config = config(strategy, 2);
            config.max_new_tokens = 0;
            assert_eq!(plan_group(&jobs(&[5]), &config)[0].stop_at, 1);
        }
    }

    proptest! {
        #[test]
        fn every_request_is_in_one_batch_that_stops_between_one_and_the_cap(
            predicted in prop::collection::vec(prop_oneof![Just(0), Just(u32::MAX), 0u32..800], 0..400),
            strategy in prop::sample::select(vec![Strategy::Vanilla, Strategy::Po, Strategy::SeqSch, Strategy::Oracle]),
            vbs: bool, fcr: bool,
            batch_size in 1usize..400, bucket in 0u32..100, cap in 0u32..700,
        ) {
            let config = ScheduleConfig { bucket, max_new_tokens: cap, ..config(strategy, batch_size) }.with(vbs, fcr);
            let batches = plan_group(&jobs(&predicted), &config);
            let mut ids: Vec<usize> =
                batches.iter().flat_map(|b| &b.ids).map(|id| id.as_str().parse().expect("a number")).collect();
            ids.sort_unstable();
            prop_assert_eq!(ids, (0..predicted.len()).collect::<Vec<_>>());
            for batch in &batches {
                prop_assert!((1..=cap.max(1)).contains(&batch.stop_at));
                prop_assert!(!batch.ids.is_empty() && batch.ids.len() <= batch_size.max(256));
            }
        }
    }
}
