//! Strategies by batch size: throughput with and without the waste, and the share of the waste.

use lengthwise_scheduler::StrategyRow;

use super::chart::{Axis, Chart, Frame, INK, Key, Sign, series_color};
use super::svg::Stroke;
use super::{Figure, Source};
use crate::table::strategy_name;

const HEIGHT: f64 = 320.0;

/// What one strategy gives at one batch size.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    batch_size: u32,
    /// Tokens of answers per second; `None` where nothing was timed or modelled.
    useful: Option<f64>,
    /// Slots × steps per second.
    computed: Option<f64>,
    /// The share of slots × steps that is in no answer.
    redundant: f64,
}

/// A strategy at every batch size, the smallest first.
type Line = (String, Vec<Point>);

/// Both figures, where a strategy was run at several batch sizes.
pub fn figures(source: &Source) -> Vec<Figure> {
    let lines = lines(&source.data.strategies);
    if lines.iter().all(|(_, points)| points.len() < 2) {
        return Vec::new();
    }
    let is_modelled = source.data.strategies.iter().any(|row| row.seconds.is_none());
    let mut figures = Vec::new();
    if lines.iter().flat_map(|(_, points)| points).any(|p| p.useful.is_some()) {
        figures.push(throughput(source, &lines, is_modelled));
    }
    figures.push(redundancy(source, &lines));
    figures
}

fn lines(rows: &[StrategyRow]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in rows {
        let (name, point) = (strategy_name(row), point(row));
        match lines.iter_mut().find(|(known, _)| *known == name) {
            Some((_, points)) => points.push(point),
            None => lines.push((name, vec![point])),
        }
    }
    for (_, points) in &mut lines {
        points.sort_by_key(|p| p.batch_size);
    }
    lines
}

fn point(row: &StrategyRow) -> Point {
    let computed = row.average_length * row.requests as f64;
    let seconds = row.seconds.or(row.modelled_seconds).filter(|s| *s > 0.0);
    Point {
        batch_size: row.batch_size as u32,
        useful: seconds.map(|s| (computed - row.wasted_tokens as f64) / s),
        computed: seconds.map(|s| computed / s),
        redundant: 1.0 - row.effective_token_ratio,
    }
}

/// Where a batch size stands on its axis.
fn place(point: &Point) -> f64 {
    f64::from(point.batch_size.max(1)).log2()
}

fn axis(lines: &[Line]) -> Axis {
    let sizes = lines.iter().flat_map(|(_, points)| points).map(|p| p.batch_size);
    Axis::sizes("batch size (slots)", sizes)
}

fn throughput(source: &Source, lines: &[Line], is_modelled: bool) -> Figure {
    let what = if is_modelled {
        "Modelled throughput"
    } else {
        "Throughput"
    };
    let caption = "Solid: tokens of answers per second. Dashed: slots × steps per second, padding, idle slots and failures \
                   counted too; the gap between the two is the waste. More sequences at once make the machine faster; \
                   what comes of it depends on the waste.";
    source.figure(
        "throughput-by-batch-size",
        &format!("{what} by batch size, with and without the waste"),
        caption,
        |title| {
            let mut legend: Vec<Key> = (lines.iter().enumerate())
                .map(|(i, (name, _))| Key::series(name, i))
                .collect();
            legend.push(Key::new(
                "without the waste: tokens of answers",
                INK,
                Sign::Line(Stroke::Solid),
            ));
            legend.push(Key::new("with it: slots × steps", INK, Sign::Line(Stroke::Dashed)));
            let all = lines.iter().flat_map(|(_, points)| points);
            let most = all.filter_map(|p| p.computed).fold(0.0, f64::max);
            let mut chart = Chart::new(Frame {
                title,
                height: HEIGHT,
                legend: &legend,
                x: axis(lines),
                y: Axis::from_zero("tokens per second", most),
            });
            for (i, (_, points)) in lines.iter().enumerate() {
                let of = |value: fn(&Point) -> Option<f64>| -> Vec<(f64, f64)> {
                    points.iter().filter_map(|p| Some((place(p), value(p)?))).collect()
                };
                chart.line(&of(|p| p.computed), series_color(i), Stroke::Dashed, None);
                chart.line(&of(|p| p.useful), series_color(i), Stroke::Solid, Some(i));
            }
            chart.finish()
        },
    )
}

fn redundancy(source: &Source, lines: &[Line]) -> Figure {
    let caption = "The share of slots × steps that is in no answer; less is better. In a static batch every sequence \
                   waits for the longest, so that the waste grows with the batch.";
    source.figure(
        "redundancy-by-batch-size",
        "Redundancy by batch size",
        caption,
        |title| {
            let legend: Vec<Key> = (lines.iter().enumerate())
                .map(|(i, (name, _))| Key::series(name, i))
                .collect();
            let mut chart = Chart::new(Frame {
                title,
                height: HEIGHT,
                legend: &legend,
                x: axis(lines),
                y: Axis::share("wasted share of slots × steps"),
            });
            for (i, (_, points)) in lines.iter().enumerate() {
                let places: Vec<(f64, f64)> = points.iter().map(|p| (place(p), p.redundant)).collect();
                chart.line(&places, series_color(i), Stroke::Solid, Some(i));
            }
            chart.finish()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ReportData;

    fn row(name: &str, batch_size: usize, seconds: Option<f64>) -> StrategyRow {
        // 4 requests, 1,144 tokens computed, 572 of them in answers.
        StrategyRow {
            strategy: name.to_owned(),
            batch_size,
            ..crate::table::tests::rows(seconds.map(|s| 2.0 * s))[1].clone()
        }
    }

    #[test]
    fn rates_are_of_useful_and_of_all_tokens_by_size() {
        let rows = [
            row("oracle", 64, Some(2.0)),
            row("vanilla", 4, None),
            row("oracle", 4, Some(4.0)),
        ];
        let point = |batch_size, useful, computed| Point {
            batch_size,
            useful,
            computed,
            redundant: 0.5,
        };
        let lines = lines(&rows);
        assert_eq!(lines.len(), 2);
        let want = [point(4, Some(143.0), Some(286.0)), point(64, Some(286.0), Some(572.0))];
        assert_eq!(lines[0], ("oracle + vbs + fcr".to_owned(), want.to_vec()));
        assert_eq!(lines[1].1, [point(4, None, None)]);
    }

    #[test]
    fn one_size_has_no_figure_and_what_was_not_timed_no_throughput() {
        let of = |rows: &[StrategyRow]| {
            let data = ReportData {
                strategies: rows.to_vec(),
                ..ReportData::default()
            };
            figures(&Source::alone(data))
                .into_iter()
                .map(|f| f.name)
                .collect::<Vec<_>>()
        };
        assert!(
            of(&[row("a", 4, None), row("b", 8, None)]).is_empty(),
            "a line has two points"
        );
        assert_eq!(
            of(&[row("a", 4, None), row("a", 8, None)]),
            ["redundancy-by-batch-size"]
        );
        let timed = of(&[row("a", 4, Some(1.0)), row("a", 8, Some(1.0))]);
        assert_eq!(timed, ["throughput-by-batch-size", "redundancy-by-batch-size"]);
    }
}
