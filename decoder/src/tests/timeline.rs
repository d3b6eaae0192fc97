//! What is recorded of a run is what its statistics count.

use lengthwise_scheduler::{Spans, Timeline};

use super::*;

/// Runs and returns what was recorded.
fn recorded(
    cache_tokens: usize,
    predicted: impl Fn(usize) -> u32,
    config: &ScheduleConfig,
) -> anyhow::Result<(Timeline, StrategyStats)> {
    let mut engine = engine(&model()?, cache_tokens)?;
    engine.record_timeline();
    let (_, stats) = run(&mut engine, &requests(24, 0.8), predicted, config)?;
    let timeline = engine.take_timeline().expect("it was asked for");
    assert_eq!(engine.take_timeline(), None, "one run, one timeline");
    Ok((timeline, stats))
}

/// No two spans of a slot cover the same step.
fn assert_disjoint(timeline: &Timeline) {
    let all = [&timeline.useful, &timeline.padding, &timeline.thrown_away];
    let mut spans: Spans = all.into_iter().flatten().copied().collect();
    spans.sort_unstable();
    for two in spans.windows(2) {
        let ([slot, _, end], [next, begin, _]) = (two[0], two[1]);
        assert!(slot < next || end <= begin, "{:?} and {:?}", two[0], two[1]);
    }
}

#[test]
fn every_token_of_every_strategy_is_in_one_span() -> anyhow::Result<()> {
    let fcr = config(Strategy::SeqSch).with(true, true);
    for config in [config(Strategy::Vanilla), fcr, config(Strategy::Continuous)] {
        let (timeline, stats) = recorded(4096, |i| 5 + i as u32 % 7, &config)?;
        assert_disjoint(&timeline);
        assert_eq!(
            Timeline::area(&timeline.useful),
            stats.useful_tokens,
            "{}",
            config.strategy
        );
        assert_eq!(
            Timeline::area(&timeline.padding),
            stats.wasted_tokens(),
            "{}",
            config.strategy
        );
        assert_eq!(timeline.size().1, stats.steps, "{}", config.strategy);
        assert!(timeline.thrown_away.is_empty());
    }
    Ok(())
}

#[test]
fn what_a_preempted_sequence_had_is_drawn_as_thrown_away() -> anyhow::Result<()> {
    // Room for one longest answer and a little; all are predicted far too short, so that they outgrow it.
    let config = config(Strategy::Continuous);
    let (timeline, stats) = recorded(96, |_| 1, &config)?;
    let [useful, padding, thrown] = [&timeline.useful, &timeline.padding, &timeline.thrown_away].map(Timeline::area);
    assert!(thrown > 0, "nothing was preempted");
    assert_disjoint(&timeline);
    assert_eq!(useful + padding + thrown, stats.steps * 4);
    assert_eq!(useful + thrown, stats.useful_tokens, "each token was drawn in one step");
    assert!(stats.slot_steps > stats.steps * 4, "and some were computed twice");
    Ok(())
}
