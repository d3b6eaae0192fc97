//! Engines side by side, as `scripts/bench_decode/summary.py` sums them up.

use super::chart::{BLUE, GREY, INK, MARGIN, QUIET, TITLE_HEIGHT, WIDTH, sheet, text, text_width};
use super::svg::{Anchor, Stroke, Svg};
use super::{Figure, Source};
use crate::report::data::EngineRow;

const BAR: f64 = 20.0;
const GAP: f64 = 9.0;
const RIGHT: f64 = WIDTH - 90.0;

/// Requests per second of every engine: medians as bars, smallest and largest as whiskers. `None` without engines.
pub fn figure(source: &Source) -> Option<Figure> {
    let rows = &source.data.engines;
    if rows.is_empty() {
        return None;
    }
    let caption = "The same requests on the same machine, one engine after the other; bars are medians, whiskers the \
                   slowest and the fastest run; more is better.";
    let title = "Requests answered per second, engine by engine";
    Some(source.figure("engines", title, caption, |title| draw(title, rows)))
}

fn draw(title: &str, rows: &[EngineRow]) -> String {
    let names = rows.iter().map(|row| text_width(&row.engine)).fold(0.0, f64::max);
    let left = MARGIN + names.min(WIDTH / 2.0) + 10.0;
    let most = rows.iter().map(|row| row.samples_per_s.most).fold(0.0, f64::max);
    let place = |rate: f64| left + if most > 0.0 { rate / most * (RIGHT - left) } else { 0.0 };
    let mut svg = sheet(title, TITLE_HEIGHT + rows.len() as f64 * (BAR + GAP) + 8.0);
    for (i, row) in rows.iter().enumerate() {
        let top = TITLE_HEIGHT + 4.0 + i as f64 * (BAR + GAP);
        let middle = top + BAR / 2.0;
        let rate = row.samples_per_s;
        let color = if row.engine.starts_with("lengthwise") {
            BLUE
        } else {
            GREY
        };
        svg.rect([left, top], [place(rate.median).max(left + 1.0), top + BAR], color, 1.0);
        whisker(&mut svg, [place(rate.least), place(rate.most)], middle);
        svg.text(&row.engine, [left - 10.0, middle], text(INK, Anchor::End));
        // Behind the whisker, so that it covers neither.
        let label = [place(rate.most.max(rate.median)) + 10.0, middle];
        svg.text(&format!("{:.1}", rate.median), label, text(QUIET, Anchor::Start));
    }
    svg.finish()
}

fn whisker(svg: &mut Svg, [from, to]: [f64; 2], y: f64) {
    if to - from < 0.5 {
        return;
    }
    svg.line(&[[from, y], [to, y]], INK, 1.5, Stroke::Solid);
    for x in [from, to] {
        svg.line(&[[x, y - 4.0], [x, y + 4.0]], INK, 1.5, Stroke::Solid);
    }
}

#[cfg(test)]
mod tests {
    use super::super::data::Spread;
    use super::*;
    use crate::report::ReportData;

    #[test]
    fn every_engine_has_its_bar_and_a_whisker_where_runs_differ() {
        let row = |engine: &str, [least, median, most]: [f64; 3]| {
            let rate = Spread { median, least, most };
            EngineRow {
                engine: engine.to_owned(),
                runs: 3,
                samples_per_s: rate,
                tokens_per_s: rate,
            }
        };
        let data = ReportData {
            engines: vec![
                row("lengthwise continuous, 16 slots", [70.0, 73.6, 78.0]),
                row("llama.cpp", [28.0; 3]),
            ],
            ..ReportData::default()
        };
        let figure = figure(&Source::alone(data)).expect("there are engines");
        assert_eq!(figure.svg.matches("<polyline").count(), 3, "one whisker of three lines");
        assert!(figure.svg.contains(">73.6<") && figure.svg.contains("#0072B2") && figure.svg.contains("#757D8A"));
        assert!(super::figure(&Source::alone(ReportData::default())).is_none());
    }
}
