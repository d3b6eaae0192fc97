//! Speed by batch size and by position.

use anyhow::Result;
use plotters::prelude::*;

use super::Figure;
use super::chart::{Axis, Frame, Plot, chart, failed, number, series_color};
use super::data::{StepTime, ThroughputPoint};

const HEIGHT: u32 = 400;

/// A line's name and its points.
type Line = (String, Vec<(f64, f64)>);

/// Throughput by batch size, the latter in powers of two.
///
/// # Errors
/// The drawing library failed.
pub fn throughput(points: &[ThroughputPoint]) -> Result<Figure> {
    let exponent = |size: u32| f64::from(size.max(1)).log2();
    let lines = lines(
        points
            .iter()
            .map(|p| (p.series.clone(), (exponent(p.batch_size), p.tokens_per_s))),
    );
    let (least, most) = points.iter().fold((f64::MAX, 0f64), |(least, most), p| {
        (least.min(exponent(p.batch_size)), most.max(exponent(p.batch_size)))
    });
    let (least, most) = (least.floor(), most.ceil().max(least.floor() + 1.0));
    let x = Axis {
        label: "batch size",
        range: least..most,
        ticks: (most - least) as usize + 1,
        format: &|exponent| {
            if exponent.fract() == 0.0 {
                number(&exponent.exp2())
            } else {
                String::new()
            }
        },
    };
    Ok(Figure {
        name: "throughput",
        title: "Throughput by batch size",
        caption: "Tokens generated per second over all sequences of a batch. Where the curve bends, more sequences \
                  only wait for each other."
            .to_owned(),
        svg: draw("Throughput by batch size", x, "tokens per second", &lines)?,
    })
}

/// Step time by position, a line per batch size.
///
/// # Errors
/// The drawing library failed.
pub fn step_times(points: &[StepTime]) -> Result<Figure> {
    let mut points = points.to_vec();
    points.sort_by_key(|p| (p.batch_size, p.position));
    let name = |p: &StepTime| format!("batch {}", p.batch_size);
    let lines = lines(
        points
            .iter()
            .map(|p| (name(p), (f64::from(p.position), p.milliseconds))),
    );
    let last = points.iter().map(|p| p.position).max().unwrap_or(0);
    let x = Axis {
        label: "position, in tokens",
        range: 0.0..f64::from(last.max(1)),
        ticks: 9,
        format: &number,
    };
    Ok(Figure {
        name: "step-time",
        title: "Step time by position",
        caption: "Time of one decode step when every sequence of the batch has that many tokens in the cache."
            .to_owned(),
        svg: draw("Step time by position", x, "milliseconds per step", &lines)?,
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

fn draw(title: &str, x: Axis, y_label: &str, lines: &[Line]) -> Result<String> {
    let legend: Vec<_> = lines
        .iter()
        .enumerate()
        .map(|(i, (name, _))| (name.clone(), series_color(i)))
        .collect();
    let most = lines
        .iter()
        .flat_map(|(_, points)| points)
        .map(|p| p.1)
        .fold(0.0, f64::max);
    let y = Axis::from_zero(y_label, most);
    chart(
        &Frame {
            title,
            height: HEIGHT,
            legend: &legend,
            x,
            y,
        },
        |plot: &mut Plot| {
            for (i, (_, points)) in lines.iter().enumerate() {
                let color = series_color(i);
                plot.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))
                    .map_err(failed)?;
                // A dot on every measured point, as long as they can be told apart.
                if points.len() <= 40 {
                    let dots = points.iter().map(|&point| Circle::new(point, 4, color.filled()));
                    plot.draw_series(dots).map_err(failed)?;
                }
            }
            Ok(())
        },
    )
}
