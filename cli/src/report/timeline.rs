//! What every slot did, strategy by strategy.

use anyhow::Result;
use lengthwise_scheduler::{Spans, StrategyRow, Timeline};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::Figure;
use super::chart::{
    AMBER, Canvas, GREEN, INK, LEGEND_HEIGHT, MARGIN, QUIET, ROSE, WIDTH, axis_end, canvas, failed, legend, number,
    text,
};
use crate::table::{grouped, strategy_name};

const TITLE: &str = "What every slot did";
/// Pixels of a slot, and least and most of all slots of a strategy together.
const SLOT: u64 = 5;
const PANEL: (u64, u64) = (40, 160);
/// Pixels of the line above a panel, below it, and below the last.
const NAME: i32 = 22;
const GAP: i32 = 14;
const AXIS: i32 = 40;
const LEFT: i32 = MARGIN as i32;
const RIGHT: i32 = (WIDTH - 2 * MARGIN) as i32;

/// Slots by step for every strategy that has a timeline, on one scale; none where no strategy has.
///
/// # Errors
/// The drawing library failed.
pub fn timelines(rows: &[StrategyRow]) -> Result<Option<Figure>> {
    let drawn: Vec<(&StrategyRow, &Timeline)> = rows
        .iter()
        .filter_map(|row| Some((row, row.timeline.as_ref()?)))
        .collect();
    let Some(longest) = drawn.iter().map(|(_, timeline)| timeline.size().1).max() else {
        return Ok(None);
    };
    let panels: i32 = drawn.iter().map(|(_, timeline)| NAME + height(timeline) + GAP).sum();
    // Title, legend, panels, axis.
    let total = 34 + LEGEND_HEIGHT as i32 + panels + AXIS;
    let end = axis_end(longest as f64);
    let svg = canvas(TITLE, total as u32, |area| {
        let entries = [
            ("tokens of answers", GREEN),
            ("idle or padding", AMBER),
            ("thrown away", ROSE),
        ];
        legend(area, &entries.map(|(name, color)| (name.to_owned(), color)))?;
        let mut top = LEGEND_HEIGHT as i32;
        for (row, timeline) in &drawn {
            let name = format!("{}: {} steps", strategy_name(row), grouped(row.steps));
            area.draw_text(&name, &text(INK, HPos::Left), (LEFT, top + NAME / 2))
                .map_err(failed)?;
            panel(area, timeline, top + NAME, end)?;
            top += NAME + height(timeline) + GAP;
        }
        axis(area, top, end)
    })?;
    Ok(Some(Figure {
        name: "strategies-slots",
        title: TITLE,
        caption:
            "Every line is a slot, from left to right its decode steps: tokens of answers, steps in which it only \
                  waited, and tokens of requests that were stopped and begun anew."
                .to_owned(),
        svg,
    }))
}

/// Pixels of a strategy's slots.
fn height(timeline: &Timeline) -> i32 {
    (timeline.size().0 * SLOT).clamp(PANEL.0, PANEL.1) as i32
}

fn panel(area: &Canvas, timeline: &Timeline, top: i32, end: f64) -> Result<()> {
    let slots = timeline.size().0.max(1);
    let y = |slot: u64| top + (slot as f64 / slots as f64 * f64::from(height(timeline))).round() as i32;
    let draw = |spans: &Spans, color: RGBColor| -> Result<()> {
        for &[slot, begin, until] in spans {
            let (left, right) = (x(begin as f64, end), x(until as f64, end));
            if left < right {
                let corners = [(left, y(slot)), (right, y(slot + 1))];
                area.draw(&Rectangle::new(corners, color.filled())).map_err(failed)?;
            }
        }
        Ok(())
    };
    draw(&timeline.useful, GREEN)?;
    draw(&timeline.padding, AMBER)?;
    draw(&timeline.thrown_away, ROSE)
}

/// Where a step stands.
fn x(step: f64, end: f64) -> i32 {
    LEFT + (step / end * f64::from(RIGHT - LEFT)).round() as i32
}

fn axis(area: &Canvas, top: i32, end: f64) -> Result<()> {
    for (share, anchor) in [(0.0, HPos::Left), (0.5, HPos::Center), (1.0, HPos::Right)] {
        let at = (x(share * end, end), top);
        area.draw_text(&number(&(share * end)), &text(QUIET, anchor), at)
            .map_err(failed)?;
    }
    let label = (x(end / 2.0, end), top + 18);
    area.draw_text("decode steps", &text(QUIET, HPos::Center), label)
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(timeline: Option<Timeline>) -> StrategyRow {
        StrategyRow {
            timeline,
            ..crate::table::tests::rows(None)[0].clone()
        }
    }

    #[test]
    fn every_span_has_its_rectangle_and_its_colour() -> Result<()> {
        let timeline = Timeline {
            useful: vec![[0, 0, 60], [1, 0, 100]],
            padding: vec![[0, 60, 100]],
            thrown_away: vec![[0, 100, 150]],
        };
        let figure = timelines(&[row(Some(timeline)), row(None)])?.expect("one has a timeline");
        let count = |color: &str| figure.svg.matches(color).count();
        // One more each for the legend.
        let used = [("#10A37F", 3), ("#E08E0B", 2), ("#E14D72", 2)];
        for (color, want) in used {
            assert_eq!(count(color), want, "{color}");
        }
        Ok(())
    }

    #[test]
    fn without_a_timeline_there_is_no_figure() -> Result<()> {
        assert!(timelines(&[row(None)])?.is_none());
        Ok(())
    }
}
