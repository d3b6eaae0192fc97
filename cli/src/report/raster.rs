//! PNG from SVG, with fonts of our own: a machine without any draws the same picture.

use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use resvg::{tiny_skia, usvg};

/// Pixels of the picture to one of the drawing: sharp on screens of twice the usual density and in print.
pub const SCALE: f32 = 2.0;

const REGULAR: &[u8] = include_bytes!("../../../data/fonts/inter-regular.ttf");
const BOLD: &[u8] = include_bytes!("../../../data/fonts/inter-bold.ttf");

/// The picture of a drawing.
///
/// # Errors
/// The drawing is no SVG, or is empty.
pub fn png(svg: &str) -> Result<Vec<u8>> {
    let options = usvg::Options {
        fontdb: fonts(),
        ..usvg::Options::default()
    };
    let tree = usvg::Tree::from_str(svg, &options).context("the figure is no SVG")?;
    let size = tree
        .size()
        .to_int_size()
        .scale_by(SCALE)
        .context("the figure is empty")?;
    let mut pixels = tiny_skia::Pixmap::new(size.width(), size.height()).context("the figure is empty")?;
    let scale = tiny_skia::Transform::from_scale(SCALE, SCALE);
    resvg::render(&tree, scale, &mut pixels.as_mut());
    pixels.encode_png().context("the figure as PNG")
}

fn fonts() -> Arc<usvg::fontdb::Database> {
    static FONTS: OnceLock<Arc<usvg::fontdb::Database>> = OnceLock::new();
    let load = || {
        let mut fonts = usvg::fontdb::Database::new();
        fonts.load_font_data(REGULAR.to_vec());
        fonts.load_font_data(BOLD.to_vec());
        fonts.set_sans_serif_family("Inter");
        Arc::new(fonts)
    };
    FONTS.get_or_init(load).clone()
}

#[cfg(test)]
mod tests {
    use super::super::svg::{Anchor, Color, Font, Svg};
    use super::*;

    fn drawn(text: &str, bold: bool) -> Result<tiny_skia::Pixmap> {
        let mut svg = Svg::new(120.0, 40.0, Color(255, 255, 255));
        let font = Font {
            size: 20.0,
            bold,
            color: Color(0, 0, 0),
            anchor: Anchor::Start,
        };
        svg.text(text, [10.0, 20.0], font);
        Ok(tiny_skia::Pixmap::decode_png(&png(&svg.finish())?)?)
    }

    fn dark(pixels: &tiny_skia::Pixmap) -> usize {
        pixels.pixels().iter().filter(|p| p.red() < 128).count()
    }

    #[test]
    fn the_picture_is_twice_the_drawing_and_its_text_is_there_without_a_font_of_the_machine() -> Result<()> {
        let (empty, text, bold) = (drawn("", false)?, drawn("Slots", false)?, drawn("Slots", true)?);
        assert_eq!((empty.width(), empty.height()), (240, 80));
        assert_eq!(dark(&empty), 0);
        assert!(dark(&text) > 300, "{} dark pixels", dark(&text));
        assert!(dark(&bold) > dark(&text), "bold text has wider strokes");
        Ok(())
    }

    #[test]
    fn every_letter_of_the_figures_has_a_glyph() -> Result<()> {
        for letter in ["÷", "×", "–", "%", "µ", "…"] {
            assert!(dark(&drawn(letter, false)?) > 0, "{letter}");
        }
        assert!(png("no drawing").is_err());
        Ok(())
    }
}
