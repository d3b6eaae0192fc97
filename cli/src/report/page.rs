//! The page: one HTML file that needs no other.

use std::fmt::Write;

use super::svg::escape;
use super::{Figure, ReportData, Source};
use crate::table::Table;

/// The page of all sources and their figures.
pub fn page(sources: &[Source], figures: &[Figure]) -> String {
    let mut body = "<h1>Lengthwise report</h1>\n<p class=\"lead\">Response lengths, their prediction, and what \
                    scheduling by it saves.</p>\n"
        .to_owned();
    for source in sources {
        body += &setup(source);
    }
    for source in sources {
        body += &tables(source);
    }
    if !figures.is_empty() {
        let figures: String = figures.iter().map(figure).collect();
        body += &section("Figures", &format!("<div class=\"figures\">{figures}</div>"));
    }
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Lengthwise report</title>\n\
         <style>\n{}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        include_str!("page.css")
    )
}

fn setup(source: &Source) -> String {
    let setup = &source.data.setup;
    if setup.is_empty() {
        return String::new();
    }
    let mut html = "<dl>".to_owned();
    let mut put = |name: &str, value: &str| {
        write!(html, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value))
            .expect("a string takes everything");
    };
    if !source.name.is_empty() {
        put("input", &source.name);
    }
    for (name, value) in setup {
        match value.as_str() {
            Some(text) => put(name, text),
            None => put(name, &value.to_string()),
        }
    }
    html + "</dl>\n"
}

fn tables(source: &Source) -> String {
    let data = &source.data;
    let mut html = String::new();
    if !data.strategies.is_empty() {
        html += &section(
            &source.title("Strategies"),
            &table(&Table::strategies(&data.strategies)),
        );
    }
    if !data.predictors.is_empty() {
        html += &section(
            &source.title("Predictors"),
            &table(&Table::predictors(&data.predictors)),
        );
    }
    if !data.bars.is_empty() {
        html += &section(
            &source.title("What was asked and what was reached"),
            &table(&bars(data)),
        );
    }
    html
}

fn bars(data: &ReportData) -> Table {
    let row = |bar: &super::data::Bar| {
        let missed = if bar.reached < bar.asked { " (missed)" } else { "" };
        vec![
            bar.bar.clone(),
            format!("{:.2}", bar.asked),
            format!("{:.2}{missed}", bar.reached),
        ]
    };
    Table {
        header: vec!["ratio", "asked", "reached"],
        rows: data.bars.iter().map(row).collect(),
    }
}

fn section(title: &str, content: &str) -> String {
    format!("<section>\n<h2>{}</h2>\n{content}\n</section>\n", escape(title))
}

fn table(table: &Table) -> String {
    let cells = |tag: &str, cells: &mut dyn Iterator<Item = &str>| {
        let cells: String = cells.map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let head = cells("th", &mut table.header.iter().copied());
    let rows: String = table
        .rows
        .iter()
        .map(|row| cells("td", &mut row.iter().map(String::as_str)))
        .collect();
    format!("<div class=\"table\"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}</tbody>\n</table></div>")
}

/// A figure with its caption, and links to its files, which the page itself does not need.
fn figure(figure: &Figure) -> String {
    let label = format!("<svg role=\"img\" aria-label=\"{}\" ", escape(&figure.title));
    let svg = figure.svg.replacen("<svg ", &label, 1);
    let (name, caption) = (escape(&figure.name), escape(&figure.caption));
    format!(
        "<figure id=\"{name}\">\n{svg}<figcaption>{caption} <span class=\"files\"><a href=\"{name}.svg\">SVG</a> \
         <a href=\"{name}.png\">PNG</a></span></figcaption>\n</figure>\n"
    )
}
