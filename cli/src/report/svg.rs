//! SVG, as much of it as figures need.

use std::fmt::Write;

/// A colour, red, green and blue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Color(pub u8, pub u8, pub u8);

impl std::fmt::Display for Color {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "#{:02X}{:02X}{:02X}", self.0, self.1, self.2)
    }
}

/// How a line is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stroke {
    /// Without gaps.
    Solid,
    /// With gaps.
    Dashed,
}

/// Which end of a text stands at its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// The left one.
    Start,
    /// Neither: the text is centred.
    Middle,
    /// The right one.
    End,
}

/// How a text looks.
#[derive(Debug, Clone, Copy)]
pub struct Font {
    /// Height of its letters' box, in pixels.
    pub size: f64,
    /// Whether it is bold.
    pub bold: bool,
    /// Its colour.
    pub color: Color,
    /// Which end stands at the position.
    pub anchor: Anchor,
}

/// A drawing, in pixels from the upper left corner.
#[derive(Debug)]
pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

impl Svg {
    /// An empty one on paper of a colour.
    pub fn new(width: f64, height: f64, paper: Color) -> Self {
        let mut svg = Self {
            width,
            height,
            body: String::new(),
        };
        svg.rect([0.0, 0.0], [width, height], paper, 1.0);
        svg
    }

    /// A filled rectangle between two corners.
    pub fn rect(&mut self, [left, top]: [f64; 2], [right, bottom]: [f64; 2], color: Color, opacity: f64) {
        let (width, height) = (round(right - left), round(bottom - top));
        let (x, y, shade) = (round(left), round(top), shade(opacity));
        self.put(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{color}\"{shade}/>"
        ));
    }

    /// A line through points.
    pub fn line(&mut self, points: &[[f64; 2]], color: Color, width: f64, stroke: Stroke) {
        let dashes = match stroke {
            Stroke::Solid => "",
            Stroke::Dashed => " stroke-dasharray=\"6 4\"",
        };
        let points = list(points);
        self.put(format_args!(
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\"{dashes}/>"
        ));
    }

    /// A filled polygon.
    pub fn polygon(&mut self, points: &[[f64; 2]], color: Color, opacity: f64) {
        let (points, shade) = (list(points), shade(opacity));
        self.put(format_args!("<polygon points=\"{points}\" fill=\"{color}\"{shade}/>"));
    }

    /// A filled circle.
    pub fn circle(&mut self, [x, y]: [f64; 2], radius: f64, color: Color, opacity: f64) {
        let (x, y, shade) = (round(x), round(y), shade(opacity));
        self.put(format_args!(
            "<circle cx=\"{x}\" cy=\"{y}\" r=\"{radius}\" fill=\"{color}\"{shade}/>"
        ));
    }

    /// A line of text whose middle is at this height.
    pub fn text(&mut self, text: &str, at: [f64; 2], font: Font) {
        self.turned_text(text, at, font, "");
    }

    /// The same, read from the bottom up.
    pub fn text_upwards(&mut self, text: &str, at: [f64; 2], font: Font) {
        let turn = format!(" transform=\"rotate(-90 {} {})\"", round(at[0]), round(at[1]));
        self.turned_text(text, at, font, &turn);
    }

    fn turned_text(&mut self, text: &str, [x, y]: [f64; 2], font: Font, turn: &str) {
        let anchor = match font.anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let weight = if font.bold { " font-weight=\"bold\"" } else { "" };
        let (size, color, x, y) = (font.size, font.color, round(x), round(y));
        let text = escape(text);
        // Renderers differ in `dominant-baseline`; a third of the size below the middle is the baseline of any of them.
        self.put(format_args!(
            "<text x=\"{x}\" y=\"{y}\" dy=\"0.35em\" font-family=\"sans-serif\" font-size=\"{size}\" fill=\"{color}\" \
             text-anchor=\"{anchor}\"{weight}{turn}>{text}</text>"
        ));
    }

    fn put(&mut self, element: std::fmt::Arguments) {
        writeln!(self.body, "{element}").expect("a string takes everything");
    }

    /// The file.
    pub fn finish(self) -> String {
        let Self { width, height, body } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\">\n{body}</svg>\n"
        )
    }
}

fn list(points: &[[f64; 2]]) -> String {
    let point = |&[x, y]: &[f64; 2]| format!("{},{}", round(x), round(y));
    points.iter().map(point).collect::<Vec<_>>().join(" ")
}

fn shade(opacity: f64) -> String {
    match opacity < 1.0 {
        true => format!(" fill-opacity=\"{opacity}\""),
        false => String::new(),
    }
}

/// Hundredths of a pixel are enough.
fn round(pixels: f64) -> f64 {
    (pixels * 100.0).round() / 100.0
}

/// Text for SVG and HTML.
pub fn escape(text: &str) -> String {
    let plain = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    plain.replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_stand_where_they_were_put_and_text_is_escaped() {
        let mut svg = Svg::new(100.0, 50.0, Color(255, 255, 255));
        svg.rect([10.0, 20.0], [30.004, 25.0], Color(0, 114, 178), 0.5);
        let font = Font {
            size: 13.0,
            bold: false,
            color: Color(0, 0, 0),
            anchor: Anchor::End,
        };
        svg.text("a < b", [5.0, 6.0], font);
        let file = svg.finish();
        let rect = "<rect x=\"10\" y=\"20\" width=\"20\" height=\"5\" fill=\"#0072B2\" fill-opacity=\"0.5\"/>";
        assert!(file.contains(rect), "{file}");
        assert!(file.contains("text-anchor=\"end\">a &lt; b</text>"), "{file}");
        assert!(file.starts_with("<svg xmlns") && file.contains("viewBox=\"0 0 100 50\""));
    }
}
