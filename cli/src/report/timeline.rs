//! What every slot did, strategy by strategy.

use lengthwise_scheduler::{Spans, StrategyRow, Timeline};

use super::chart::{
    Axis, BLUE, GREY, GRID, INK, Key, MARGIN, ORANGE, PURPLE, QUIET, Sign, TITLE_HEIGHT, WIDTH, legend, legend_height,
    sheet, text,
};
use super::svg::{Anchor, Color, Stroke, Svg};
use super::{Figure, Source};
use crate::table::{grouped, percent, strategy_name};

/// Pixels of a slot, and least and most of all slots of a strategy together.
const SLOT: f64 = 6.0;
const PANEL: (f64, f64) = (48.0, 192.0);
/// Pixels of the line above a panel, below it, and below the last.
const NAME: f64 = 26.0;
const GAP: f64 = 12.0;
const AXIS: f64 = 52.0;
const LEFT: f64 = MARGIN + 6.0;
const RIGHT: f64 = WIDTH - MARGIN - 14.0;

/// A row that has a timeline, and that.
type Drawn<'a> = (&'a StrategyRow, &'a Timeline);

/// For every batch size the slots by step of each strategy that has a timeline, on one scale.
pub fn figures(source: &Source) -> Vec<Figure> {
    let timelines = source.data.strategies.iter();
    let mut drawn: Vec<Drawn> = timelines
        .filter_map(|row| Some((row, row.timeline.as_ref()?)))
        .collect();
    // A stable sort: strategies stay in the order they were run in.
    drawn.sort_by_key(|(row, _)| row.batch_size);
    let by_size = drawn.chunk_by(|(a, _), (b, _)| a.batch_size == b.batch_size);
    by_size
        .enumerate()
        .map(|(i, drawn)| of_size(source, drawn, i == 0))
        .collect()
}

/// The figure of one batch size; the first of a source says how it is to be read.
fn of_size(source: &Source, drawn: &[Drawn], is_first: bool) -> Figure {
    let slots = drawn.first().map_or(0, |(row, _)| row.batch_size);
    let caption = match is_first {
        true => {
            "Every line of a panel is a slot, from left to right its decode steps: tokens of answers, steps in which it \
             only waited (padding behind an answer's end, or nothing to do), and tokens that had to be computed again \
             because their request was stopped. With a variable batch size there are more slots for short answers."
                .to_owned()
        }
        false => format!("The same at a batch size of {slots}."),
    };
    let title = format!("What every slot did, batch size {slots}");
    source.figure(&format!("timeline-{slots}"), &title, caption, |title| {
        draw(title, drawn)
    })
}

fn draw(title: &str, drawn: &[Drawn]) -> String {
    let keys = [
        Key::new("tokens of answers", BLUE, Sign::Area),
        Key::new("padding or idle", ORANGE, Sign::Area),
        Key::new("thrown away", PURPLE, Sign::Area),
    ];
    let longest = drawn.iter().map(|(_, timeline)| timeline.size().1).max().unwrap_or(0);
    let axis = Axis::up_to("decode steps", (longest as f64).max(1.0));
    let panels: f64 = drawn.iter().map(|(_, timeline)| NAME + height(timeline) + GAP).sum();
    let mut top = TITLE_HEIGHT + legend_height(&keys);
    let bottom = top + panels;
    let mut svg = sheet(title, bottom + AXIS);
    legend(&mut svg, &keys);
    for (at, label) in &axis.ticks {
        let x = place(*at, &axis);
        svg.line(&[[x, top + NAME], [x, bottom]], GRID, 1.0, Stroke::Solid);
        svg.text(label, [x, bottom + 10.0], text(QUIET, Anchor::Middle));
    }
    for (row, timeline) in drawn {
        svg.text(&name(row), [LEFT, top + NAME / 2.0 + 2.0], text(INK, Anchor::Start));
        panel(&mut svg, timeline, top + NAME, &axis);
        top += NAME + height(timeline) + GAP;
    }
    svg.text(
        &axis.label,
        [(LEFT + RIGHT) / 2.0, bottom + 32.0],
        text(INK, Anchor::Middle),
    );
    svg.finish()
}

/// `vanilla: 4,693 steps in 7.0 s, 62.7 % wasted`.
fn name(row: &StrategyRow) -> String {
    let seconds = row.seconds.map(|s| format!(" in {s:.2} s")).unwrap_or_default();
    let wasted = percent(1.0 - row.effective_token_ratio);
    format!(
        "{}: {} steps{seconds}, {wasted} wasted",
        strategy_name(row),
        grouped(row.steps)
    )
}

/// Pixels of a strategy's slots.
fn height(timeline: &Timeline) -> f64 {
    (timeline.size().0 as f64 * SLOT).clamp(PANEL.0, PANEL.1)
}

fn panel(svg: &mut Svg, timeline: &Timeline, top: f64, axis: &Axis) {
    let (slots, steps) = timeline.size();
    let slot_height = height(timeline) / slots.max(1) as f64;
    // A hair of paper between slots, as long as they are thick enough to be seen one by one.
    let gap = if slot_height >= 3.0 { 0.6 } else { 0.0 };
    let mut draw = |spans: &Spans, color: Color| {
        for &[slot, begin, until] in spans {
            let y = top + slot as f64 * slot_height;
            let corners = [place(begin as f64, axis), place(until as f64, axis)];
            svg.rect([corners[0], y], [corners[1], y + slot_height - gap], color, 1.0);
        }
    };
    draw(&timeline.useful, BLUE);
    draw(&timeline.padding, ORANGE);
    draw(&timeline.thrown_away, PURPLE);
    let (left, right, bottom) = (LEFT, place(steps as f64, axis), top + height(timeline));
    svg.line(
        &[[left, top], [left, bottom], [right, bottom]],
        GREY,
        1.0,
        Stroke::Solid,
    );
}

/// Where a step stands.
fn place(step: f64, axis: &Axis) -> f64 {
    LEFT + step / axis.range[1] * (RIGHT - LEFT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(timelines: Vec<(usize, Option<Timeline>)>) -> Source {
        let row = crate::table::tests::rows(None)[0].clone();
        let with = |(batch_size, timeline)| StrategyRow {
            timeline,
            batch_size,
            ..row.clone()
        };
        Source::alone(crate::report::ReportData {
            strategies: timelines.into_iter().map(with).collect(),
            ..Default::default()
        })
    }

    #[test]
    fn every_span_has_its_rectangle_its_colour_and_its_length() {
        let timeline = Timeline {
            useful: vec![[0, 0, 60], [1, 0, 100]],
            padding: vec![[0, 60, 100]],
            thrown_away: vec![[0, 100, 150]],
        };
        let figures = figures(&rows(vec![(2, Some(timeline)), (2, None)]));
        let [figure] = figures.as_slice() else {
            panic!("{figures:?}");
        };
        let areas = |color: &str| -> Vec<f64> {
            let rect = format!("fill=\"{color}\"");
            let width = |line: &str| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok();
            let lines = figure.svg.lines().filter(|line| line.contains(&rect));
            lines.filter_map(width).collect()
        };
        // The first of each is the legend's; the longest timeline has 150 steps.
        let unit = (RIGHT - LEFT) / 150.0;
        for (color, spans) in [
            ("#0072B2", vec![60.0, 100.0]),
            ("#E69F00", vec![40.0]),
            ("#CC79A7", vec![50.0]),
        ] {
            let got = areas(color);
            assert_eq!(got.len(), spans.len() + 1, "{color}");
            for (got, span) in got[1..].iter().zip(spans) {
                assert!((got - span * unit).abs() < 0.02, "{color}: {got}, want {}", span * unit);
            }
        }
    }

    #[test]
    fn every_batch_size_has_a_figure_and_none_without_a_timeline() {
        let names = |source: &Source| figures(source).into_iter().map(|f| f.name).collect::<Vec<_>>();
        assert!(names(&rows(vec![(2, None)])).is_empty());
        let timeline = || Some(Timeline::default());
        let mixed = rows(vec![(16, timeline()), (4, timeline()), (16, timeline())]);
        assert_eq!(names(&mixed), ["timeline-4", "timeline-16"]);
    }
}
