//! Lengths: how they are distributed, and how far the samples of an instruction lie apart.

use super::axis::{number, round_up};
use super::chart::{Axis, BLUE, Chart, Frame, INK, Key, Sign, VERMILION};
use super::svg::{Color, Stroke};
use super::{Figure, Source};
use crate::table::{grouped, percent};

const HEIGHT: f64 = 300.0;
/// Bars of the histogram, at most.
const BARS: f64 = 50.0;
/// Width of a bar of the spread, and the ratio that the last one is open from.
const SPREAD_STEP: f64 = 0.25;
const SPREAD_LAST: f64 = 5.0;

/// A vertical line in a histogram: where, its colour, its stroke, and what it says in the legend.
type Mark = (f64, Color, Stroke, String);

/// Left edge, right edge and count of a bar.
type Column = (f64, f64, f64);

/// How many samples have which length.
pub fn histogram(source: &Source) -> Figure {
    let samples = &source.data.length_samples;
    let mut lengths: Vec<f64> = samples.iter().flatten().map(|&tokens| f64::from(tokens)).collect();
    lengths.sort_by(f64::total_cmp);
    let longest = lengths.last().copied().unwrap_or(1.0).max(1.0);
    let step = round_up(longest / BARS).max(1.0);
    let end = (longest / step).floor() * step + step;
    let columns = counts(&lengths, 0.0, step, (end / step).round() as usize);
    let (median, high) = (quantile(&lengths, 0.5), quantile(&lengths, 0.95));
    let marks = [
        (median, VERMILION, Stroke::Solid, format!("median {}", number(median))),
        (high, INK, Stroke::Dashed, format!("95 % are at most {}", number(high))),
    ];
    let x = Axis::up_to("length of the answer, in tokens", end);
    let (all, instructions) = (grouped(lengths.len() as u64), grouped(samples.len() as u64));
    let caption = format!(
        "{all} sampled answers to {instructions} instructions; width of a bar in tokens: {}.",
        number(step)
    );
    source.figure("lengths", "Length distribution", caption, |title| {
        draw(title, "answers", x, "answers per bar", &columns, &marks)
    })
}

/// How much the samples of one instruction differ: the longest over the shortest.
pub fn spread(source: &Source) -> Figure {
    let samples = &source.data.length_samples;
    let mut ratios: Vec<f64> = samples.iter().filter_map(|samples| ratio(samples)).collect();
    ratios.sort_by(f64::total_cmp);
    let bars = ((SPREAD_LAST - 1.0) / SPREAD_STEP) as usize + 1;
    let columns = counts(&ratios, 1.0, SPREAD_STEP, bars);
    let median = quantile(&ratios, 0.5);
    let last = SPREAD_LAST + SPREAD_STEP;
    let mark = (
        median.min(last),
        VERMILION,
        Stroke::Solid,
        format!("median {median:.2}"),
    );
    let tick = |i: u32| {
        let at = 1.0 + 0.5 * f64::from(i);
        let text = if at < SPREAD_LAST {
            number(at)
        } else {
            "5 or more".to_owned()
        };
        (at, text)
    };
    let x = Axis {
        label: "longest sample ÷ shortest sample".to_owned(),
        range: [1.0, last],
        ticks: (0..=8).map(tick).collect(),
    };
    let twice = ratios.iter().filter(|&&ratio| ratio >= 2.0).count() as f64 / ratios.len().max(1) as f64;
    let caption = format!(
        "The longest of an instruction's samples over its shortest. {} of the {} instructions have a sample at least \
         twice as long as another: that much of the length is chance, which no predictor can know.",
        percent(twice),
        grouped(ratios.len() as u64)
    );
    let title = "Spread of the lengths over an instruction's samples";
    source.figure("length-spread", title, caption, |title| {
        draw(title, "instructions", x, "instructions per bar", &columns, &[mark])
    })
}

/// The longest over the shortest; `None` with fewer than two samples.
fn ratio(samples: &[u32]) -> Option<f64> {
    let (least, most) = (samples.iter().min()?, samples.iter().max()?);
    (samples.len() > 1).then(|| f64::from(*most) / f64::from((*least).max(1)))
}

/// Left edge, right edge and count of every bar; what lies beyond the last counts in it.
fn counts(values: &[f64], first: f64, step: f64, bars: usize) -> Vec<Column> {
    let edge = |bar: usize| first + bar as f64 * step;
    let mut counts: Vec<_> = (0..bars).map(|bar| (edge(bar), edge(bar + 1), 0.0)).collect();
    for value in values {
        let bar = (((value - first) / step).floor().max(0.0) as usize).min(bars - 1);
        counts[bar].2 += 1.0;
    }
    counts
}

/// The value that this share of the sorted values does not exceed (nearest rank).
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

fn draw(title: &str, what: &str, x: Axis, y_label: &str, columns: &[Column], marks: &[Mark]) -> String {
    let mut legend = vec![Key::new(what, BLUE, Sign::Area)];
    legend.extend((marks.iter()).map(|(_, color, stroke, name)| Key::new(name, *color, Sign::Line(*stroke))));
    let most = columns.iter().map(|bar| bar.2).fold(0.0, f64::max);
    let y = Axis::from_zero(y_label, most);
    let top = y.range[1];
    let mut chart = Chart::new(Frame {
        title,
        height: HEIGHT,
        legend: &legend,
        x,
        y,
    });
    for &(left, right, count) in columns.iter().filter(|bar| bar.2 > 0.0) {
        let gap = 0.06 * (right - left);
        chart.bar(left + gap, right - gap, count, BLUE);
    }
    for (at, color, stroke, _) in marks {
        chart.line(&[(*at, 0.0), (*at, top)], *color, *stroke, None);
    }
    chart.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_beyond_the_last_bar_counts_in_it() {
        let bars = counts(&[1.0, 1.1, 1.25, 2.0, 99.0], 1.0, 0.25, 3);
        assert_eq!(bars, [(1.0, 1.25, 2.0), (1.25, 1.5, 1.0), (1.5, 1.75, 2.0)]);
    }

    #[test]
    fn quantiles_are_nearest_ranks() {
        let values = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(
            [0.0, 0.5, 0.75, 0.95].map(|share| quantile(&values, share)),
            [1.0, 2.0, 3.0, 4.0]
        );
    }

    #[test]
    fn one_sample_has_no_spread() {
        assert_eq!((ratio(&[7]), ratio(&[]), ratio(&[10, 25, 20])), (None, None, Some(2.5)));
    }

    #[test]
    fn captions_count_what_was_drawn() {
        let source = Source::alone(crate::report::ReportData {
            length_samples: vec![vec![10, 20], vec![30, 31], vec![5]],
            ..Default::default()
        });
        let caption = histogram(&source).caption;
        assert!(
            caption.starts_with("5 sampled answers to 3 instructions; width of a bar in tokens: 1."),
            "{caption}"
        );
        assert!(spread(&source).caption.contains("50.0 % of the 2 instructions"));
    }
}
