//! Lengths: how they are spread, and how well they are predicted.

use anyhow::Result;
use plotters::prelude::*;

use super::Figure;
use super::chart::{
    AMBER, Axis, BLUE, Frame, GREEN, Plot, QUIET, VIOLET, axis_end, chart, failed, number, round_up, series_color,
};
use super::data::PredictionSeries;
use crate::table::percent;

const HEIGHT: u32 = 380;
/// Bars of the histogram, at most.
const BARS: f64 = 40.0;
/// Width of a bar of the spread, and the ratio that the last one is open from.
const SPREAD_STEP: f64 = 0.25;
const SPREAD_LAST: f64 = 5.0;
/// Tokens around the truth within which a prediction counts as good (Acc-50).
const BAND: f64 = 50.0;

/// How many samples have which length.
///
/// # Errors
/// The drawing library failed.
pub fn histogram(samples: &[Vec<u32>]) -> Result<Figure> {
    let mut lengths: Vec<f64> = samples.iter().flatten().map(|&tokens| f64::from(tokens)).collect();
    lengths.sort_by(f64::total_cmp);
    let longest = lengths.last().copied().unwrap_or(1.0).max(1.0);
    let step = round_up(longest / BARS).max(1.0);
    let end = (longest / step).floor() * step + step;
    let counts = counts(&lengths, 0.0, step, (end / step).round() as usize);
    let (median, high) = (quantile(&lengths, 0.5), quantile(&lengths, 0.95));
    let marks = [(median, AMBER), (high, VIOLET)];
    let legend = [
        ("samples".to_owned(), BLUE),
        (format!("median {}", number(&median)), AMBER),
        (format!("95 % are below {}", number(&high)), VIOLET),
    ];
    let x = Axis {
        label: "length, in tokens",
        range: 0.0..end,
        ticks: 9,
        format: &number,
    };
    Ok(Figure {
        name: "lengths",
        title: "Response lengths",
        caption: format!("{} samples of {} instructions.", lengths.len(), samples.len()),
        svg: columns("Response lengths", &legend, x, "samples", &counts, &marks)?,
    })
}

/// How much the samples of one instruction differ: the longest over the shortest.
///
/// # Errors
/// The drawing library failed.
pub fn spread(samples: &[Vec<u32>]) -> Result<Figure> {
    let mut ratios: Vec<f64> = samples.iter().filter_map(|samples| ratio(samples)).collect();
    ratios.sort_by(f64::total_cmp);
    let bars = ((SPREAD_LAST - 1.0) / SPREAD_STEP) as usize + 1;
    let counts = counts(&ratios, 1.0, SPREAD_STEP, bars);
    let median = quantile(&ratios, 0.5);
    let legend = [
        ("instructions".to_owned(), BLUE),
        (format!("median {median:.2}"), AMBER),
    ];
    let last = SPREAD_LAST + SPREAD_STEP;
    let tick = |value: &f64| match *value {
        value if value >= SPREAD_LAST => "5 or more".to_owned(),
        value => number(&value),
    };
    let x = Axis {
        label: "longest sample ÷ shortest sample",
        range: 1.0..last,
        ticks: 9,
        format: &tick,
    };
    let twice = ratios.iter().filter(|&&ratio| ratio >= 2.0).count() as f64 / ratios.len().max(1) as f64;
    Ok(Figure {
        name: "length-spread",
        title: "Spread of lengths over the samples of an instruction",
        caption: format!(
            "The longest of an instruction's samples over its shortest. {} of the instructions have a sample at least \
             twice as long as another: that much of the length is chance, which no predictor can know.",
            percent(twice)
        ),
        svg: columns(
            "Spread of lengths over the samples of an instruction",
            &legend,
            x,
            "instructions",
            &counts,
            &[(median.min(last), AMBER)],
        )?,
    })
}

/// The longest over the shortest; `None` with fewer than two samples.
fn ratio(samples: &[u32]) -> Option<f64> {
    let (least, most) = (samples.iter().min()?, samples.iter().max()?);
    (samples.len() > 1).then(|| f64::from(*most) / f64::from((*least).max(1)))
}

/// Left edge, right edge and count of every bar; what lies beyond the last counts in it.
fn counts(values: &[f64], first: f64, step: f64, bars: usize) -> Vec<(f64, f64, f64)> {
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

fn columns(
    title: &str,
    legend: &[(String, RGBColor)],
    x: Axis,
    y_label: &str,
    counts: &[(f64, f64, f64)],
    marks: &[(f64, RGBColor)],
) -> Result<String> {
    let most = counts.iter().map(|bar| bar.2).fold(0.0, f64::max);
    let y = Axis::from_zero(y_label, most);
    let top = y.range.end;
    chart(
        &Frame {
            title,
            height: HEIGHT,
            legend,
            x,
            y,
        },
        |plot: &mut Plot| {
            let bar = |&(left, right, count): &(f64, f64, f64)| {
                let gap = 0.06 * (right - left);
                Rectangle::new([(left + gap, 0.0), (right - gap, count)], BLUE.filled())
            };
            plot.draw_series(counts.iter().filter(|bar| bar.2 > 0.0).map(bar))
                .map_err(failed)?;
            for &(at, color) in marks {
                plot.draw_series(LineSeries::new([(at, 0.0), (at, top)], color.stroke_width(2)))
                    .map_err(failed)?;
            }
            Ok(())
        },
    )
}

/// Predicted against true lengths, with the diagonal and the band of Acc-50.
///
/// # Errors
/// The drawing library failed.
pub fn predictions(series: &[PredictionSeries]) -> Result<Figure> {
    let values = series
        .iter()
        .flat_map(|s| &s.points)
        .flat_map(|&(predicted, actual)| [predicted, actual]);
    let most = axis_end(f64::from(values.max().unwrap_or(1)));
    let mut legend: Vec<_> = series
        .iter()
        .enumerate()
        .map(|(i, s)| (s.predictor.clone(), series_color(i)))
        .collect();
    legend.push(("within 50 tokens".to_owned(), GREEN));
    let axis = |label| Axis {
        label,
        range: 0.0..most,
        ticks: 7,
        format: &number,
    };
    let (x, y) = (axis("true length, in tokens"), axis("predicted length, in tokens"));
    let title = "Predicted and true lengths";
    let svg = chart(
        &Frame {
            title,
            height: 520,
            legend: &legend,
            x,
            y,
        },
        |plot: &mut Plot| {
            plot.draw_series([Polygon::new(band(most), GREEN.mix(0.16).filled())])
                .map_err(failed)?;
            plot.draw_series(LineSeries::new([(0.0, 0.0), (most, most)], QUIET.stroke_width(1)))
                .map_err(failed)?;
            for (i, series) in series.iter().enumerate() {
                let dot = |&(predicted, actual): &(u32, u32)| {
                    Circle::new(
                        (f64::from(actual), f64::from(predicted)),
                        3,
                        series_color(i).mix(0.6).filled(),
                    )
                };
                plot.draw_series(series.points.iter().map(dot)).map_err(failed)?;
            }
            Ok(())
        },
    )?;
    let caption =
        "Each dot is an instruction; on the diagonal a prediction is exact, below it too low, so that a batch \
                   stopped there would cut the answer."
            .to_owned();
    Ok(Figure {
        name: "predictions",
        title,
        caption,
        svg,
    })
}

/// The corners of the band around the diagonal, cut at the axes.
fn band(most: f64) -> Vec<(f64, f64)> {
    let width = BAND.min(most);
    vec![
        (0.0, 0.0),
        (0.0, width),
        (most - width, most),
        (most, most),
        (most, most - width),
        (width, 0.0),
    ]
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
}
