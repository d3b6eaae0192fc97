//! Strategies, and predictors, side by side.

use super::chart::{BLUE, GREEN, GREY, INK, MARGIN, ORANGE, PURPLE, TITLE_HEIGHT, WIDTH, sheet, text, text_width};
use super::svg::{Anchor, Color};
use super::{Figure, Source};
use crate::table::{grouped, percent, strategy_name};
use lengthwise_scheduler::StrategyRow;

/// Height of a bar and of the gap below it.
const BAR: f64 = 24.0;
const GAP: f64 = 12.0;
/// Where the longest bar ends; its value stands behind it.
const RIGHT: f64 = WIDTH - 110.0;
/// Bars that can be taken in at a glance; more are for the figures by batch size.
const MOST: usize = 14;

/// A bar: its name, its colour, its length, and that in words.
pub struct Bar {
    pub name: String,
    pub color: Color,
    pub value: f64,
    pub label: String,
}

/// Speed where it was measured, effective token ratio, wasted tokens; and the predictors' error.
pub fn figures(source: &Source) -> Vec<Figure> {
    let rows = &source.data.strategies;
    let mut figures = Vec::new();
    if (1..=MOST).contains(&rows.len()) {
        figures.extend(strategies(source, rows));
    }
    let predictors = &source.data.predictors;
    if !predictors.is_empty() {
        let bar = |row: &lengthwise_train::PredictorRow| Bar {
            name: row.predictor.clone(),
            color: BLUE,
            value: row.error,
            label: format!("{:.1}", row.error),
        };
        let bars: Vec<Bar> = predictors.iter().map(bar).collect();
        let caption = "By how many tokens a prediction is off on average, up or down; less is better.";
        let title = "Mean error of predictions, in tokens";
        figures.push(source.figure("predictors-error", title, caption, |title| draw(title, &bars)));
    }
    figures
}

fn strategies(source: &Source, rows: &[StrategyRow]) -> Vec<Figure> {
    let several = rows.iter().any(|row| row.batch_size != rows[0].batch_size);
    let bars = |value: &dyn Fn(&StrategyRow) -> f64, label: &dyn Fn(f64) -> String| -> Vec<Bar> {
        let bar = |row: &StrategyRow| Bar {
            name: match several {
                true => format!("{}, {} slots", strategy_name(row), row.batch_size),
                false => strategy_name(row),
            },
            color: color(&row.strategy),
            value: value(row),
            label: label(value(row)),
        };
        rows.iter().map(bar).collect()
    };
    let mut figures = Vec::new();
    if rows.iter().any(|row| row.samples_per_s.is_some()) {
        let bars = bars(&|row| row.samples_per_s.unwrap_or(0.0), &|rate| format!("{rate:.2}"));
        figures.push(source.figure(
            "strategies-speed",
            "Requests answered per second",
            "Measured time, predictions included; more is better.",
            |title| draw(title, &bars),
        ));
    }
    let effective = bars(&|row| row.effective_token_ratio, &percent);
    figures.push(source.figure(
        "strategies-effective",
        "Effective token ratio",
        "Tokens of answers, of all that were computed (slots × steps); more is better.",
        |title| draw(title, &effective),
    ));
    let wasted = bars(&|row| row.wasted_tokens as f64, &|n| grouped(n as u64));
    figures.push(source.figure(
        "strategies-wasted",
        "Wasted tokens",
        "Tokens computed that are in no answer: padding behind an answer's end, idle slots, and what failures threw \
         away; fewer is better.",
        |title| draw(title, &wasted),
    ));
    figures
}

/// Horizontal bars from zero, the longest as long as there is room.
pub fn draw(title: &str, bars: &[Bar]) -> String {
    let most = bars.iter().map(|bar| bar.value).fold(0.0, f64::max);
    let names = bars.iter().map(|bar| text_width(&bar.name)).fold(0.0, f64::max);
    let left = MARGIN + names.min(WIDTH / 2.0) + 10.0;
    let mut svg = sheet(title, TITLE_HEIGHT + bars.len() as f64 * (BAR + GAP) + 8.0);
    for (i, bar) in bars.iter().enumerate() {
        let top = TITLE_HEIGHT + 4.0 + i as f64 * (BAR + GAP);
        let middle = top + BAR / 2.0;
        let share = if most > 0.0 { bar.value / most } else { 0.0 };
        let end = left + (share * (RIGHT - left)).max(1.0);
        svg.rect([left, top], [end, top + BAR], bar.color, 1.0);
        svg.text(&bar.name, [left - 10.0, middle], text(INK, Anchor::End));
        svg.text(&bar.label, [end + 8.0, middle], text(INK, Anchor::Start));
    }
    svg.finish()
}

/// A strategy has one colour in every figure of bars.
fn color(strategy: &str) -> Color {
    match strategy {
        "po" => ORANGE,
        "seqsch" => BLUE,
        "oracle" => GREEN,
        "continuous" => PURPLE,
        _ => GREY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values_and_the_longest_ends_where_there_is_room() {
        let bar = |value: f64| Bar {
            name: "a".to_owned(),
            color: BLUE,
            value,
            label: String::new(),
        };
        let svg = draw("t", &[bar(3.0), bar(1.0), bar(0.0)]);
        let width = |line: &&str| {
            line.split("width=\"")
                .nth(1)
                .and_then(|w| w.split('"').next()?.parse::<f64>().ok())
        };
        let widths: Vec<f64> = svg
            .lines()
            .filter(|l| l.contains("#0072B2"))
            .filter_map(|l| width(&l))
            .collect();
        let room = RIGHT - (MARGIN + text_width("a") + 10.0);
        assert_eq!(widths.len(), 3);
        for (got, want) in widths.iter().zip([room, room / 3.0, 1.0]) {
            assert!((got - want).abs() < 0.02, "{got}, want {want}");
        }
    }

    #[test]
    fn too_many_rows_for_bars_have_none() {
        let row = crate::table::tests::rows(None)[0].clone();
        let of = |n| {
            Source::alone(crate::report::ReportData {
                strategies: vec![row.clone(); n],
                ..Default::default()
            })
        };
        assert_eq!(figures(&of(MOST)).len(), 2);
        assert!(figures(&of(MOST + 1)).is_empty());
    }
}
