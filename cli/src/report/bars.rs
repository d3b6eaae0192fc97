//! Strategies side by side.

use anyhow::Result;
use lengthwise_scheduler::StrategyRow;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::Figure;
use super::chart::{AMBER, BLUE, GREEN, INK, SLATE, VIOLET, WIDTH, canvas, failed, text};
use crate::table::{grouped, percent, strategy_name};

/// Height of a bar and of the gap below it.
const BAR: i32 = 24;
const GAP: i32 = 12;
/// Where bars begin and may end; names stand before, values behind.
const LEFT: i32 = 170;
const RIGHT: i32 = WIDTH as i32 - 110;

/// Speed where it was measured, effective token ratio, wasted tokens.
///
/// # Errors
/// The drawing library failed.
pub fn figures(rows: &[StrategyRow]) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    if rows.iter().any(|row| row.samples_per_s.is_some()) {
        let rate = |row: &StrategyRow| row.samples_per_s.unwrap_or(0.0);
        figures.push(Figure {
            name: "strategies-speed",
            title: "Throughput",
            caption: "Requests answered per second; more is better.".to_owned(),
            svg: bars("Samples per second", rows, &rate, &|rate| format!("{rate:.2}"))?,
        });
    }
    if !rows.is_empty() {
        figures.push(Figure {
            name: "strategies-effective",
            title: "Effective token ratio",
            caption: "Tokens of answers, of all that were computed (slots × steps); more is better.".to_owned(),
            svg: bars(
                "Effective token ratio",
                rows,
                &|row| row.effective_token_ratio,
                &percent,
            )?,
        });
        figures.push(Figure {
            name: "strategies-wasted",
            title: "Wasted tokens",
            caption: "Tokens computed that are in no answer: padding behind an answer's end, idle slots, and what \
                      failures threw away; fewer is better."
                .to_owned(),
            svg: bars("Wasted tokens", rows, &|row| row.wasted_tokens as f64, &|n| {
                grouped(n as u64)
            })?,
        });
    }
    Ok(figures)
}

fn bars(
    title: &str,
    rows: &[StrategyRow],
    value: &dyn Fn(&StrategyRow) -> f64,
    format: &dyn Fn(f64) -> String,
) -> Result<String> {
    let most = rows.iter().map(value).fold(0.0, f64::max);
    let height = 34 + 22 + rows.len() as u32 * (BAR + GAP) as u32;
    canvas(title, height, |area| {
        for (i, row) in rows.iter().enumerate() {
            let top = 12 + i as i32 * (BAR + GAP);
            let middle = top + BAR / 2;
            let share = if most > 0.0 { value(row) / most } else { 0.0 };
            let end = LEFT + (share * f64::from(RIGHT - LEFT)).round().max(1.0) as i32;
            let bar = Rectangle::new([(LEFT, top), (end, top + BAR)], color(&row.strategy).filled());
            area.draw(&bar).map_err(failed)?;
            area.draw_text(&strategy_name(row), &text(INK, HPos::Right), (LEFT - 12, middle))
                .map_err(failed)?;
            area.draw_text(&format(value(row)), &text(INK, HPos::Left), (end + 10, middle))
                .map_err(failed)?;
        }
        Ok(())
    })
}

/// A strategy has one colour in every figure.
fn color(strategy: &str) -> RGBColor {
    match strategy {
        "po" => AMBER,
        "seqsch" => BLUE,
        "oracle" => GREEN,
        "continuous" => VIOLET,
        _ => SLATE,
    }
}
