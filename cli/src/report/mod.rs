//! Figures of a result, and the page that holds them.

mod bars;
mod chart;
mod data;
mod lengths;
mod page;
mod speed;
mod timeline;

use anyhow::Result;

pub use data::{PredictionSeries, ReportData, StepTime, ThroughputPoint};
pub use page::page;

/// A figure.
#[derive(Debug, Clone)]
pub struct Figure {
    /// Its file's name without the ending.
    pub name: &'static str,
    /// Its title.
    pub title: &'static str,
    /// What it shows.
    pub caption: String,
    /// The drawing.
    pub svg: String,
}

/// Every figure that the data has something for.
///
/// # Errors
/// The drawing library failed.
pub fn figures(data: &ReportData) -> Result<Vec<Figure>> {
    let mut figures = bars::figures(&data.strategies)?;
    figures.extend(timeline::timelines(&data.strategies)?);
    if !data.throughput.is_empty() {
        figures.push(speed::throughput(&data.throughput)?);
    }
    if !data.step_times.is_empty() {
        figures.push(speed::step_times(&data.step_times)?);
    }
    if !data.predictions.is_empty() {
        figures.push(lengths::predictions(&data.predictions)?);
    }
    if data.length_samples.iter().any(|samples| !samples.is_empty()) {
        figures.push(lengths::histogram(&data.length_samples)?);
    }
    if data.length_samples.iter().any(|samples| samples.len() > 1) {
        figures.push(lengths::spread(&data.length_samples)?);
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> ReportData {
        serde_json::from_str(include_str!("sample.json")).expect("the sample is a result")
    }

    #[test]
    fn every_part_of_the_data_has_its_figure() -> Result<()> {
        let names: Vec<&str> = figures(&sample())?.iter().map(|figure| figure.name).collect();
        let want = [
            "strategies-speed",
            "strategies-effective",
            "strategies-wasted",
            "throughput",
            "step-time",
            "predictions",
            "lengths",
            "length-spread",
        ];
        assert_eq!(names, want);
        let untimed = ReportData {
            strategies: crate::table::tests::rows(None),
            ..ReportData::default()
        };
        let names: Vec<&str> = figures(&untimed)?.iter().map(|figure| figure.name).collect();
        assert_eq!(names, ["strategies-effective", "strategies-wasted"]);
        Ok(())
    }

    #[test]
    fn the_page_needs_no_other_file_and_escapes_names() -> Result<()> {
        let mut data = sample();
        data.strategies[0].strategy = "<script>".to_owned();
        let page = page(&data, &figures(&data)?);
        assert!(page.contains("&lt;script&gt;") && !page.contains("<script"));
        for outside in ["src=", "href=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("<svg").count(), 8);
        Ok(())
    }
}
