//! Figures of results, and the page that holds them.

mod axis;
mod bars;
mod chart;
mod data;
mod engines;
mod input;
mod lengths;
mod page;
mod predictions;
mod raster;
mod sizes;
mod speed;
mod svg;
mod timeline;

use std::path::Path;

pub use data::{PredictionSeries, ReportData, StepTime, ThroughputPoint};
pub use page::page;
pub use raster::png;

/// A figure.
#[derive(Debug, Clone)]
pub struct Figure {
    /// Its files' name without the ending.
    pub name: String,
    /// Its title.
    pub title: String,
    /// What it shows.
    pub caption: String,
    /// The drawing.
    pub svg: String,
}

/// What one input held, and what tells it from the others.
#[derive(Debug, Clone)]
pub struct Source {
    /// The name of its file without the ending; empty where there is none.
    pub name: String,
    /// The same, where another input has parts of the same kind.
    pub tag: Option<String>,
    /// What it held.
    pub data: ReportData,
}

impl Source {
    /// One input alone.
    pub fn alone(data: ReportData) -> Self {
        Self {
            name: String::new(),
            tag: None,
            data,
        }
    }

    /// A figure's or a table's title.
    pub fn title(&self, of: &str) -> String {
        match &self.tag {
            Some(tag) => format!("{of} ({tag})"),
            None => of.to_owned(),
        }
    }

    /// Names a drawing and keeps what is said about it.
    fn figure(&self, name: &str, title: &str, caption: impl Into<String>, draw: impl FnOnce(&str) -> String) -> Figure {
        let title = self.title(title);
        let plain = |c: char| match c {
            c if c.is_ascii_alphanumeric() || c == '_' => c.to_ascii_lowercase(),
            _ => '-',
        };
        let tag: String = self.tag.iter().flat_map(|tag| tag.chars()).map(plain).collect();
        Figure {
            name: if tag.is_empty() {
                name.to_owned()
            } else {
                format!("{name}-{tag}")
            },
            svg: draw(&title),
            title,
            caption: caption.into(),
        }
    }
}

/// Reads the inputs. Where two have parts of the same kind, the names of their files tell them apart.
///
/// # Errors
/// One cannot be read, or is nothing that a report can show.
pub fn read(paths: &[impl AsRef<Path>]) -> anyhow::Result<Vec<Source>> {
    let datas: Vec<ReportData> = (paths.iter().map(|path| input::read(path.as_ref()))).collect::<Result<_, _>>()?;
    let mut taken: Vec<String> = Vec::new();
    let mut name = |path: &Path| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut names = std::iter::once(stem.clone()).chain((2..).map(|n| format!("{stem} {n}")));
        let name = names.find(|name| !taken.contains(name)).unwrap_or_default();
        taken.push(name.clone());
        name
    };
    let names: Vec<String> = paths.iter().map(|path| name(path.as_ref())).collect();
    let shared = |i: usize| {
        let others = datas.iter().enumerate().filter(|(j, _)| *j != i);
        let both = |other: &ReportData| other.parts().iter().zip(datas[i].parts()).any(|(a, b)| *a && b);
        others.map(|(_, other)| other).any(both)
    };
    let source = |(i, (name, data)): (usize, (String, &ReportData))| Source {
        tag: shared(i).then(|| name.clone()),
        name,
        data: data.clone(),
    };
    Ok(names.into_iter().zip(&datas).enumerate().map(source).collect())
}

/// Every figure that the sources have something for.
pub fn figures(sources: &[Source]) -> Vec<Figure> {
    sources.iter().flat_map(of_one).collect()
}

fn of_one(source: &Source) -> Vec<Figure> {
    let data = &source.data;
    let mut figures = sizes::figures(source);
    figures.extend(bars::figures(source));
    figures.extend(timeline::figures(source));
    figures.extend(engines::figure(source));
    if !data.throughput.is_empty() {
        figures.push(speed::throughput(source));
    }
    if !data.step_times.is_empty() {
        figures.push(speed::step_times(source));
    }
    if let Some(products) = &data.products {
        figures.extend(speed::products(source, products));
    }
    if !data.predictions.is_empty() {
        figures.push(predictions::figure(source));
    }
    if data.length_samples.iter().any(|samples| !samples.is_empty()) {
        figures.push(lengths::histogram(source));
    }
    if data.length_samples.iter().any(|samples| samples.len() > 1) {
        figures.push(lengths::spread(source));
    }
    figures
}

#[cfg(test)]
mod tests;
