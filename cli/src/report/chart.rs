//! What all figures have in common: size, colours, axes, legend.

use super::svg::{Anchor, Color, Font, Stroke, Svg};

/// Colours of text, quiet text, grid and paper.
pub const INK: Color = Color(0x1f, 0x29, 0x37);
pub const QUIET: Color = Color(0x4b, 0x55, 0x63);
pub const GRID: Color = Color(0xe3, 0xe6, 0xea);
pub const PAPER: Color = Color(0xff, 0xff, 0xff);

/// Colours of data: those of Okabe and Ito, which people of every kind of colour vision tell apart, and a grey.
pub const BLUE: Color = Color(0x00, 0x72, 0xb2);
pub const ORANGE: Color = Color(0xe6, 0x9f, 0x00);
pub const GREEN: Color = Color(0x00, 0x9e, 0x73);
pub const PURPLE: Color = Color(0xcc, 0x79, 0xa7);
pub const VERMILION: Color = Color(0xd5, 0x5e, 0x00);
pub const SKY: Color = Color(0x56, 0xb4, 0xe9);
pub const GREY: Color = Color(0x75, 0x7d, 0x8a);

const SERIES: [Color; 7] = [GREY, BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY];

/// The colour of the `index`th series.
pub fn series_color(index: usize) -> Color {
    SERIES[index % SERIES.len()]
}

/// Width of every figure; its height is its own.
pub const WIDTH: f64 = 760.0;
pub const MARGIN: f64 = 18.0;
/// Above the plot: the title, and below it the rows of the legend.
pub const TITLE_HEIGHT: f64 = 44.0;
const LEGEND_ROW: f64 = 22.0;
/// Around the plot: numbers and names of the axes.
const LEFT: f64 = 92.0;
const BOTTOM: f64 = 56.0;
const RIGHT: f64 = 30.0;
const TEXT_SIZE: f64 = 13.0;
/// A letter of that size, on average; a little more than the font's own, so that nothing touches.
const LETTER: f64 = 7.2;

/// Text of the usual size.
pub fn text(color: Color, anchor: Anchor) -> Font {
    Font {
        size: TEXT_SIZE,
        bold: false,
        color,
        anchor,
    }
}

/// Pixels that a text of the usual size takes, about.
pub fn text_width(text: &str) -> f64 {
    LETTER * text.chars().count() as f64
}

/// A sheet of the common width with a title.
pub fn sheet(title: &str, height: f64) -> Svg {
    let mut svg = Svg::new(WIDTH, height, PAPER);
    let font = Font {
        size: 17.0,
        bold: true,
        color: INK,
        anchor: Anchor::Start,
    };
    svg.text(title, [MARGIN, 24.0], font);
    svg
}

/// What an entry of the legend stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// An area or bars.
    Area,
    /// A line, without marks.
    Line(Stroke),
    /// A line with the marks of the `n`th series.
    Series(usize),
}

/// An entry of the legend.
#[derive(Debug, Clone)]
pub struct Key {
    /// What it says.
    pub name: String,
    /// Of the sign.
    pub color: Color,
    /// What stands before the name.
    pub sign: Sign,
}

impl Key {
    /// An entry with a sign of its own.
    pub fn new(name: impl Into<String>, color: Color, sign: Sign) -> Self {
        let name = name.into();
        Self { name, color, sign }
    }

    /// The `index`th series of a chart of lines.
    pub fn series(name: impl Into<String>, index: usize) -> Self {
        Self::new(name, series_color(index), Sign::Series(index))
    }

    fn width(&self) -> f64 {
        34.0 + text_width(&self.name) + 14.0
    }
}

/// Pixels that a legend takes: it breaks into rows, above the plot, so that it covers no data.
pub fn legend_height(keys: &[Key]) -> f64 {
    rows(keys).len() as f64 * LEGEND_ROW
}

/// Draws the legend below the title.
pub fn legend(svg: &mut Svg, keys: &[Key]) {
    for (row, keys) in rows(keys).into_iter().enumerate() {
        let y = TITLE_HEIGHT + (row as f64 + 0.5) * LEGEND_ROW;
        let mut x = MARGIN;
        for key in keys {
            match key.sign {
                Sign::Area => svg.rect([x + 7.0, y - 6.5], [x + 20.0, y + 6.5], key.color, 1.0),
                Sign::Line(stroke) => svg.line(&[[x, y], [x + 26.0, y]], key.color, 2.0, stroke),
                Sign::Series(index) => {
                    svg.line(&[[x, y], [x + 26.0, y]], key.color, 2.0, Stroke::Solid);
                    mark(svg, [x + 13.0, y], index, key.color);
                }
            }
            svg.text(&key.name, [x + 34.0, y], text(INK, Anchor::Start));
            x += key.width();
        }
    }
}

fn rows(keys: &[Key]) -> Vec<Vec<&Key>> {
    let mut rows: Vec<Vec<&Key>> = Vec::new();
    let mut left = 0.0;
    for key in keys {
        if rows.is_empty() || key.width() > left {
            rows.push(Vec::new());
            left = WIDTH - 2.0 * MARGIN;
        }
        left -= key.width();
        if let Some(row) = rows.last_mut() {
            row.push(key);
        }
    }
    rows
}

/// The mark of a series: its shape tells it apart where its colour does not.
pub fn mark(svg: &mut Svg, [x, y]: [f64; 2], series: usize, color: Color) {
    match series % 4 {
        0 => svg.circle([x, y], 4.5, color, 1.0),
        1 => svg.rect([x - 4.2, y - 4.2], [x + 4.2, y + 4.2], color, 1.0),
        2 => svg.polygon(&[[x, y - 5.5], [x + 5.2, y + 4.0], [x - 5.2, y + 4.0]], color, 1.0),
        _ => svg.polygon(&[[x, y - 5.8], [x + 5.8, y], [x, y + 5.8], [x - 5.8, y]], color, 1.0),
    }
}

/// One axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// What it measures, with the unit.
    pub label: String,
    /// From where to where.
    pub range: [f64; 2],
    /// Where a tick is, and its text.
    pub ticks: Vec<(f64, String)>,
}

/// A chart around its series.
pub struct Frame<'a> {
    /// Its title.
    pub title: &'a str,
    /// Of the plot itself, in pixels.
    pub height: f64,
    /// What its signs mean.
    pub legend: &'a [Key],
    /// The horizontal axis.
    pub x: Axis,
    /// The vertical axis.
    pub y: Axis,
}

/// A chart whose series are being drawn.
pub struct Chart {
    /// The sheet.
    pub svg: Svg,
    x: Axis,
    y: Axis,
    top: f64,
    height: f64,
}

impl Chart {
    /// Title, legend, axes and grid.
    pub fn new(frame: Frame) -> Self {
        let top = TITLE_HEIGHT + legend_height(frame.legend) + 16.0;
        let mut svg = sheet(frame.title, top + frame.height + BOTTOM);
        legend(&mut svg, frame.legend);
        let mut chart = Self {
            svg,
            x: frame.x,
            y: frame.y,
            top,
            height: frame.height,
        };
        chart.axes();
        chart
    }

    /// Where a point stands on the sheet.
    pub fn at(&self, x: f64, y: f64) -> [f64; 2] {
        let share = |value: f64, [from, to]: [f64; 2]| (value - from) / (to - from);
        let width = WIDTH - LEFT - RIGHT;
        let below = share(y, self.y.range);
        [
            LEFT + share(x, self.x.range) * width,
            self.top + (1.0 - below) * self.height,
        ]
    }

    fn axes(&mut self) {
        let ([left, right], [bottom, top]) = (self.x.range, self.y.range);
        for (value, label) in self.y.ticks.clone() {
            let (from, to) = (self.at(left, value), self.at(right, value));
            self.svg.line(&[from, to], GRID, 1.0, Stroke::Solid);
            self.svg
                .text(&label, [from[0] - 9.0, from[1]], text(QUIET, Anchor::End));
        }
        for (value, label) in self.x.ticks.clone() {
            let (from, to) = (self.at(value, bottom), self.at(value, top));
            self.svg.line(&[from, to], GRID, 1.0, Stroke::Solid);
            self.svg
                .text(&label, [from[0], from[1] + 16.0], text(QUIET, Anchor::Middle));
        }
        let corner = self.at(left, bottom);
        let ends = [self.at(left, top), corner, self.at(right, bottom)];
        self.svg.line(&ends, GREY, 1.0, Stroke::Solid);
        let middle = [(corner[0] + ends[2][0]) / 2.0, corner[1] + 40.0];
        self.svg.text(&self.x.label, middle, text(INK, Anchor::Middle));
        let side = [MARGIN + 2.0, (corner[1] + ends[0][1]) / 2.0];
        self.svg.text_upwards(&self.y.label, side, text(INK, Anchor::Middle));
    }

    /// A line, with the marks of its series where that is given and they can be told apart.
    pub fn line(&mut self, points: &[(f64, f64)], color: Color, stroke: Stroke, marks: Option<usize>) {
        let places: Vec<[f64; 2]> = points.iter().map(|&(x, y)| self.at(x, y)).collect();
        self.svg.line(&places, color, 2.0, stroke);
        if let Some(series) = marks.filter(|_| points.len() <= 40) {
            places.iter().for_each(|&at| mark(&mut self.svg, at, series, color));
        }
    }

    /// A bar from the horizontal axis up.
    pub fn bar(&mut self, from: f64, to: f64, height: f64, color: Color) {
        let (upper, lower) = (self.at(from, height), self.at(to, self.y.range[0]));
        self.svg.rect(upper, lower, color, 1.0);
    }

    /// The file.
    pub fn finish(self) -> String {
        self.svg.finish()
    }
}
