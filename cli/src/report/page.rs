//! The page: one HTML file that needs no other, readable in light and dark.

use std::fmt::Write;

use super::{Figure, ReportData};
use crate::table::Table;

/// The page of a result and its figures.
pub fn page(data: &ReportData, figures: &[Figure]) -> String {
    let mut body = header(data);
    if !data.strategies.is_empty() {
        body += &section("Strategies", &table(&Table::strategies(&data.strategies)));
    }
    if !data.predictors.is_empty() {
        body += &section("Predictors", &table(&Table::predictors(&data.predictors)));
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

fn header(data: &ReportData) -> String {
    let mut html = "<h1>Lengthwise report</h1>\n<p class=\"lead\">Response lengths, their prediction, and what \
                    scheduling by it saves.</p>\n"
        .to_owned();
    if data.setup.is_empty() {
        return html;
    }
    html += "<dl>";
    for (name, value) in &data.setup {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        write!(html, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(&value))
            .expect("a string takes everything");
    }
    html + "</dl>\n"
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

fn figure(figure: &Figure) -> String {
    let label = format!("<svg role=\"img\" aria-label=\"{}\" ", escape(figure.title));
    let svg = figure.svg.replacen("<svg ", &label, 1);
    format!(
        "<figure>\n{svg}<figcaption>{}</figcaption>\n</figure>\n",
        escape(&figure.caption)
    )
}

fn escape(text: &str) -> String {
    let plain = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    plain.replace('"', "&quot;")
}
