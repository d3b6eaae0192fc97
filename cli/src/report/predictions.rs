//! Predicted against true lengths.

use super::chart::{Axis, Chart, Frame, GREEN, Key, QUIET, Sign, series_color};
use super::svg::Stroke;
use super::{Figure, Source};

/// Tokens around the truth within which a prediction counts as good (Acc-50).
const BAND: f64 = 50.0;
const HEIGHT: f64 = 460.0;

/// Every prediction, the diagonal, and the band of Acc-50.
pub fn figure(source: &Source) -> Figure {
    let series = &source.data.predictions;
    let points = series.iter().flat_map(|s| &s.points);
    let values = points.flat_map(|&(predicted, actual)| [predicted, actual]);
    let most = f64::from(values.max().unwrap_or(1));
    // The second and third colour: grey dots would be lost on the band.
    let color = |i: usize| series_color(i + 1);
    let mut legend: Vec<Key> = (series.iter().enumerate())
        .map(|(i, s)| Key::new(&s.predictor, color(i), Sign::Area))
        .collect();
    legend.push(Key::new("within 50 tokens", pale(), Sign::Area));
    let caption = "Each dot is an instruction; on the diagonal a prediction is exact, below it too low, so that a batch \
                   stopped there would cut the answer.";
    source.figure("predictions", "Predicted and true lengths", caption, |title| {
        let x = Axis::from_zero("true length, in tokens", most);
        let end = x.range[1];
        let mut chart = Chart::new(Frame {
            title,
            height: HEIGHT,
            legend: &legend,
            x,
            y: Axis::from_zero("predicted length, in tokens", most),
        });
        let corners: Vec<[f64; 2]> = band(end).iter().map(|&(x, y)| chart.at(x, y)).collect();
        chart.svg.polygon(&corners, GREEN, 0.16);
        chart.line(&[(0.0, 0.0), (end, end)], QUIET, Stroke::Solid, None);
        for (i, series) in series.iter().enumerate() {
            for &(predicted, actual) in &series.points {
                let at = chart.at(f64::from(actual), f64::from(predicted));
                chart.svg.circle(at, 3.0, color(i), 0.6);
            }
        }
        chart.finish()
    })
}

/// The colour that the band has on paper.
fn pale() -> super::svg::Color {
    let over = |c: u8| (255.0 - 0.16 * f64::from(255 - c)).round() as u8;
    super::svg::Color(over(GREEN.0), over(GREEN.1), over(GREEN.2))
}

/// The corners of the band around the diagonal, cut at the axes.
fn band(most: f64) -> [(f64, f64); 6] {
    let width = BAND.min(most);
    [
        (0.0, 0.0),
        (0.0, width),
        (most - width, most),
        (most, most),
        (most, most - width),
        (width, 0.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{PredictionSeries, ReportData};

    #[test]
    fn every_prediction_is_a_dot() {
        let series = |predictor: &str, points| PredictionSeries {
            predictor: predictor.to_owned(),
            points,
        };
        let data = ReportData {
            predictions: vec![series("a", vec![(10, 20), (30, 30)]), series("b", vec![(5, 90)])],
            ..ReportData::default()
        };
        let figure = figure(&Source::alone(data));
        assert_eq!(figure.svg.matches("<circle").count(), 3);
        assert_eq!(band(90.0)[2], (40.0, 90.0));
        assert_eq!(band(20.0)[2], (0.0, 20.0), "a band wider than the plot fills it");
    }
}
