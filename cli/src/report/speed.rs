//! Decode steps: throughput by batch size, time by position, and how near their matrix products come to the machine.

use super::chart::{Axis, Chart, Frame, INK, Key, Sign, series_color, text};
use super::data::Products;
use super::svg::{Anchor, Stroke};
use super::{Figure, Source};
use crate::table::percent;

const HEIGHT: f64 = 320.0;

/// A line's name and its points.
type Line = (String, Vec<(f64, f64)>);

/// Throughput by batch size of steps whose sequences are all as long.
pub fn throughput(source: &Source) -> Figure {
    let points = &source.data.throughput;
    let place = |size: u32| f64::from(size.max(1)).log2();
    let lines = lines(
        points
            .iter()
            .map(|p| (p.series.clone(), (place(p.batch_size), p.tokens_per_s))),
    );
    let caption = "Tokens per second of decode steps in which every slot has a sequence of that many tokens in the \
                   cache, prompts left out. Where a curve bends, more sequences only wait for each other.";
    source.figure(
        "decode-throughput",
        "Decode throughput by batch size",
        caption,
        |title| {
            let x = Axis::sizes("batch size (sequences)", points.iter().map(|p| p.batch_size));
            let most = points.iter().map(|p| p.tokens_per_s).fold(0.0, f64::max);
            draw(title, x, Axis::from_zero("tokens per second", most), &lines)
        },
    )
}

/// Step time by position, a line per batch size, on a logarithmic scale: a large batch takes many times what a small does.
pub fn step_times(source: &Source) -> Figure {
    let mut points = source.data.step_times.clone();
    points.retain(|p| p.milliseconds > 0.0);
    points.sort_by_key(|p| (p.batch_size, p.position));
    let place = |p: &super::StepTime| (f64::from(p.position), p.milliseconds.log10());
    let lines = lines(points.iter().map(|p| (format!("batch {}", p.batch_size), place(p))));
    let caption = "Time of one decode step when every sequence of the batch has that many tokens in the cache \
                   (logarithmic). What rises with the position is attention; the rest are the matrix products.";
    source.figure("step-time", "Step time by position", caption, |title| {
        let last = points.iter().map(|p| p.position).max().unwrap_or(1);
        let x = Axis::from_zero("position: tokens in the cache of each sequence", f64::from(last));
        let y = Axis::log("milliseconds per step", points.iter().map(|p| p.milliseconds));
        draw(title, x, y, &lines)
    })
}

/// Points by the name of their line, in order of first appearance.
fn lines(points: impl Iterator<Item = (String, (f64, f64))>) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for (name, point) in points {
        match lines.iter_mut().find(|(known, _)| *known == name) {
            Some((_, points)) => points.push(point),
            None => lines.push((name, vec![point])),
        }
    }
    lines
}

fn draw(title: &str, x: Axis, y: Axis, lines: &[Line]) -> String {
    let legend: Vec<Key> = (lines.iter().enumerate())
        .map(|(i, (name, _))| Key::series(name, i))
        .collect();
    let mut chart = Chart::new(Frame {
        title,
        height: HEIGHT,
        legend: &legend,
        x,
        y,
    });
    for (i, (_, points)) in lines.iter().enumerate() {
        chart.line(points, series_color(i), Stroke::Solid, Some(i));
    }
    chart.finish()
}

/// The matrix products' share of the machine's rate by batch size and shape, and of the whole step.
pub fn products(source: &Source, products: &Products) -> Vec<Figure> {
    let mut figures = Vec::new();
    let rate = |p: &super::data::ProductRate| (p.batch_size, p.linear.clone(), p.share);
    let rates: Vec<Share> = products.linears.iter().map(rate).collect();
    if !rates.is_empty() {
        let caption = "Rate of every linear shape of a decode step, of what this machine does of the shape with warm \
                       caches; the line is at 80 %. A little above 100 % is possible: the trial is a measurement too.";
        let title = "Matrix products: share of the machine's rate";
        figures.push(source.figure("products-share", title, caption, |title| {
            groups(title, "share of the machine's rate", &rates, Some(0.8))
        }));
    }
    let timed = products.steps.iter().filter(|s| s.step_ms > 0.0);
    let part = |s: &super::data::WholeStep| {
        (
            s.batch_size,
            format!("context {}", s.context),
            s.products_ms / s.step_ms,
        )
    };
    let parts: Vec<Share> = timed.map(part).collect();
    if !parts.is_empty() {
        let caption = "What part of a whole decode step its matrix products alone would take; the rest is mostly \
                       attention over the tokens in the cache.";
        let title = "Matrix products: share of the step's time";
        figures.push(source.figure("products-of-step", title, caption, |title| {
            groups(title, "share of the step's time", &parts, None)
        }));
    }
    figures
}

/// A batch size, what of it, and the share.
type Share = (u32, String, f64);

/// Bars in groups by batch size, a colour for each name, and a line where one is asked for.
fn groups(title: &str, label: &str, shares: &[Share], line: Option<f64>) -> String {
    let mut sizes: Vec<u32> = shares.iter().map(|(size, ..)| *size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let mut names: Vec<&str> = Vec::new();
    for (_, name, _) in shares {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut legend: Vec<Key> = (names.iter().enumerate())
        .map(|(i, name)| Key::new(*name, series_color(i), Sign::Area))
        .collect();
    legend.extend(line.map(|at| Key::new(percent(at).replace(".0", ""), INK, Sign::Line(Stroke::Dashed))));
    let most = shares.iter().map(|(.., share)| *share).fold(1.0, f64::max);
    let mut y = Axis::from_zero(label, most);
    y.ticks
        .iter_mut()
        .for_each(|(at, text)| *text = format!("{:.0} %", *at * 100.0));
    let tick = |(i, size): (usize, &u32)| (i as f64 + 0.5, size.to_string());
    let mut chart = Chart::new(Frame {
        title,
        height: HEIGHT,
        legend: &legend,
        x: Axis {
            label: "batch size (sequences)".to_owned(),
            range: [0.0, sizes.len() as f64],
            ticks: Vec::new(),
        },
        y,
    });
    for (i, text_of) in sizes.iter().enumerate().map(tick) {
        let [x, y] = chart.at(i, 0.0);
        chart
            .svg
            .text(&text_of, [x, y + 16.0], text(super::chart::QUIET, Anchor::Middle));
    }
    let width = 0.8 / names.len().max(1) as f64;
    for (size, name, share) in shares {
        let group = sizes.iter().position(|s| s == size).unwrap_or(0) as f64;
        let place = names.iter().position(|n| n == name).unwrap_or(0);
        let from = group + 0.1 + place as f64 * width;
        chart.bar(from + 0.04 * width, from + 0.96 * width, *share, series_color(place));
    }
    if let Some(at) = line {
        chart.line(&[(0.0, at), (sizes.len() as f64, at)], INK, Stroke::Dashed, None);
    }
    chart.finish()
}

#[cfg(test)]
mod tests {
    use super::super::data::{ProductRate, WholeStep};
    use super::*;
    use crate::report::{ReportData, StepTime, ThroughputPoint};

    #[test]
    fn points_are_gathered_by_line_in_order_of_appearance() {
        let got = lines(
            [("b", 1.0), ("a", 2.0), ("b", 3.0)]
                .map(|(n, x)| (n.to_owned(), (x, x)))
                .into_iter(),
        );
        assert_eq!(
            got,
            [
                ("b".to_owned(), vec![(1.0, 1.0), (3.0, 3.0)]),
                ("a".to_owned(), vec![(2.0, 2.0)]),
            ]
        );
    }

    #[test]
    fn a_step_without_time_is_no_point_and_every_line_has_its_key() {
        let step = |batch_size, position, milliseconds| StepTime {
            batch_size,
            position,
            milliseconds,
        };
        let data = ReportData {
            step_times: vec![
                step(16, 128, 2.0),
                step(1, 32, 0.0),
                step(16, 32, 1.0),
                step(1, 128, 0.5),
            ],
            throughput: vec![ThroughputPoint {
                series: "decode".to_owned(),
                batch_size: 4,
                tokens_per_s: 9.0,
            }],
            ..ReportData::default()
        };
        let source = Source::alone(data);
        let figure = step_times(&source);
        let circles = figure.svg.matches("<circle").count();
        // Series 0 (batch 1) has one point and one key; series 1 is squares.
        assert_eq!(circles, 2, "{}", figure.svg);
        assert!(figure.svg.contains(">batch 1<") && figure.svg.contains(">batch 16<"));
        assert!(throughput(&source).svg.contains(">decode<"));
    }

    #[test]
    fn products_are_bars_of_their_share() {
        let rate = |linear: &str, share| ProductRate {
            batch_size: 16,
            linear: linear.to_owned(),
            share,
        };
        let data = Products {
            linears: vec![rate("qkv", 0.5), rate("down", 1.0)],
            steps: vec![WholeStep {
                batch_size: 16,
                context: 32,
                step_ms: 2.0,
                products_ms: 1.0,
            }],
        };
        let figures = products(&Source::alone(ReportData::default()), &data);
        let names: Vec<&str> = figures.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["products-share", "products-of-step"]);
        let height = |line: &str| {
            line.split("height=\"")
                .nth(1)
                .and_then(|h| h.split('"').next()?.parse::<f64>().ok())
        };
        let bars: Vec<f64> = figures[0]
            .svg
            .lines()
            .filter(|l| l.contains("<rect"))
            .filter_map(height)
            .collect();
        // Paper, two keys of 13 pixels, two bars of 50 and 100 %.
        let [_, 13.0, 13.0, half, whole] = bars.as_slice() else {
            panic!("{bars:?}");
        };
        assert!((whole / half - 2.0).abs() < 1e-3 && *whole > 100.0, "{bars:?}");
    }
}
