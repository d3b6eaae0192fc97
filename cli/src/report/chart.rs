//! What all figures have in common: size, colours, axes, legend.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Colours of text, quiet text, grid and paper. The page maps each of them to the reader's light or dark scheme, so
/// no figure may use another for these purposes.
pub const INK: RGBColor = RGBColor(0x1f, 0x29, 0x37);
pub const QUIET: RGBColor = RGBColor(0x6b, 0x72, 0x81);
pub const GRID: RGBColor = RGBColor(0xe3, 0xe6, 0xea);
pub const PAPER: RGBColor = RGBColor(0xff, 0xff, 0xfe);

/// Colours of data, readable on light and on dark paper.
pub const BLUE: RGBColor = RGBColor(0x3b, 0x82, 0xf6);
pub const GREEN: RGBColor = RGBColor(0x10, 0xa3, 0x7f);
pub const AMBER: RGBColor = RGBColor(0xe0, 0x8e, 0x0b);
pub const VIOLET: RGBColor = RGBColor(0x8b, 0x5c, 0xf6);
pub const ROSE: RGBColor = RGBColor(0xe1, 0x4d, 0x72);
pub const SLATE: RGBColor = RGBColor(0x8a, 0x94, 0xa6);

/// The colour of the `index`th series.
pub fn series_color(index: usize) -> RGBColor {
    [BLUE, AMBER, GREEN, VIOLET, ROSE, SLATE][index % 6]
}

/// Width of every figure; its height is its own.
pub const WIDTH: u32 = 720;
/// plotters divides sizes by 1.24 when it writes SVG; these are 13 and 17 pixels.
const TEXT_SIZE: f64 = 13.0 * 1.24;
const TITLE_SIZE: f64 = 17.0 * 1.24;
/// Above the plot: the title, and below it the legend.
const TITLE_HEIGHT: u32 = 34;
pub const LEGEND_HEIGHT: u32 = 26;
pub const MARGIN: u32 = 16;

pub type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub type Plot<'a> = ChartContext<
    'a,
    SVGBackend<'a>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

/// One axis.
pub struct Axis<'a> {
    /// What it measures, with the unit.
    pub label: &'a str,
    /// What it spans.
    pub range: Range<f64>,
    /// Ticks, about.
    pub ticks: usize,
    /// A tick's text.
    pub format: &'a dyn Fn(&f64) -> String,
}

impl<'a> Axis<'a> {
    /// A vertical axis from 0 to a round number a little above `most`.
    pub fn from_zero(label: &'a str, most: f64) -> Self {
        Self {
            label,
            range: 0.0..axis_end(most * 1.02),
            ticks: 6,
            format: &number,
        }
    }
}

/// A chart around its series.
pub struct Frame<'a> {
    /// Its title.
    pub title: &'a str,
    /// Its height, in pixels.
    pub height: u32,
    /// What the colours mean.
    pub legend: &'a [(String, RGBColor)],
    /// The horizontal axis.
    pub x: Axis<'a>,
    /// The vertical axis.
    pub y: Axis<'a>,
}

/// Text of a colour at one end or the middle of its position.
pub fn text(color: RGBColor, anchor: HPos) -> TextStyle<'static> {
    let style = TextStyle {
        color: color.to_backend_color(),
        ..TextStyle::from(("sans-serif", TEXT_SIZE).into_font())
    };
    style.pos(Pos::new(anchor, VPos::Center))
}

/// An SVG of the common width with a title; `content` draws the rest below it.
pub fn canvas(title: &str, height: u32, content: impl FnOnce(&Canvas) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        root.fill(&PAPER).map_err(failed)?;
        let bold = ("sans-serif", TITLE_SIZE).into_font().style(FontStyle::Bold);
        let style = TextStyle::from(bold)
            .color(&INK)
            .pos(Pos::new(HPos::Left, VPos::Center));
        root.draw_text(title, &style, (MARGIN as i32, 22)).map_err(failed)?;
        let (_, below) = root.split_vertically(TITLE_HEIGHT);
        content(&below)?;
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

/// A chart: title, legend, axes and grid, and what `series` draws.
pub fn chart(frame: &Frame, series: impl FnOnce(&mut Plot) -> Result<()>) -> Result<String> {
    canvas(frame.title, frame.height, |below| {
        legend(below, frame.legend)?;
        let (_, area) = below.split_vertically(if frame.legend.is_empty() { 0 } else { LEGEND_HEIGHT });
        let mut builder = ChartBuilder::on(&area);
        builder
            .margin(MARGIN)
            .margin_top(10)
            .margin_right(2 * MARGIN)
            .set_label_area_size(LabelAreaPosition::Bottom, 46);
        builder.set_label_area_size(LabelAreaPosition::Left, 64);
        let mut plot = builder
            .build_cartesian_2d(frame.x.range.clone(), frame.y.range.clone())
            .map_err(failed)?;
        let label = text(QUIET, HPos::Center);
        let mut mesh = plot.configure_mesh();
        mesh.x_labels(frame.x.ticks)
            .y_labels(frame.y.ticks)
            .max_light_lines(0)
            .bold_line_style(GRID)
            .axis_style(GRID);
        mesh.x_label_formatter(frame.x.format).y_label_formatter(frame.y.format);
        mesh.x_desc(frame.x.label).y_desc(frame.y.label);
        mesh.label_style(("sans-serif", TEXT_SIZE).into_font().color(&QUIET));
        mesh.axis_desc_style(label).draw().map_err(failed)?;
        series(&mut plot)
    })
}

pub fn legend(area: &Canvas, entries: &[(String, RGBColor)]) -> Result<()> {
    let mut x = MARGIN as i32;
    let y = LEGEND_HEIGHT as i32 / 2;
    for (name, color) in entries {
        area.draw(&Rectangle::new([(x, y - 6), (x + 12, y + 6)], color.filled()))
            .map_err(failed)?;
        area.draw_text(name, &text(INK, HPos::Left), (x + 18, y))
            .map_err(failed)?;
        // The library knows no widths of letters: seven pixels are a wide one of this size.
        x += 18 + 7 * name.chars().count() as i32 + 22;
    }
    Ok(())
}

/// The drawing library's error; it borrows, so its text is kept.
pub fn failed(err: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a figure could not be drawn: {err}")
}

/// The next round number from `value` up: 1, 2, 2.5 or 5 times a power of ten.
pub fn round_up(value: f64) -> f64 {
    next(value, &[1.0, 2.0, 2.5, 5.0])
}

/// Where an axis ends that shows up to `value`: finer than [`round_up`], so that little of the plot stays empty.
pub fn axis_end(value: f64) -> f64 {
    next(value, &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0])
}

fn next(value: f64, steps: &[f64]) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let step = steps.iter().find(|&step| step * power >= value * (1.0 - 1e-9));
    step.unwrap_or(&10.0) * power
}

/// An axis's number: whole ones with thousands set apart, others with up to three digits behind the point.
pub fn number(value: &f64) -> String {
    // Ticks are sums of steps, so 0.3 may come as 0.30000000000000004.
    let rounded = (value * 1000.0).round() / 1000.0;
    if rounded.fract() == 0.0 && rounded >= 0.0 {
        crate::table::grouped(rounded as u64)
    } else {
        rounded.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        assert_eq!(
            [0.0, 1.0, 1.1, 2.2, 430.0, 7000.0].map(round_up),
            [1.0, 1.0, 2.0, 2.5, 500.0, 10000.0]
        );
        assert_eq!([0.0, 1.1, 816.0, 5.5, 8.1].map(axis_end), [1.0, 1.2, 1000.0, 6.0, 10.0]);
        assert_eq!([0.1 + 0.2, 1500.0, 0.0].map(|v| number(&v)), ["0.3", "1,500", "0"]);
    }
}
