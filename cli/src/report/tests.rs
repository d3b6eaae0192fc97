use super::*;

fn sample() -> Source {
    Source::alone(serde_json::from_str(include_str!("sample.json")).expect("the sample is a result"))
}

fn names(figures: &[Figure]) -> Vec<&str> {
    figures.iter().map(|figure| figure.name.as_str()).collect()
}

#[test]
fn every_part_of_the_data_has_its_figure() {
    let want = [
        "strategies-speed",
        "strategies-effective",
        "strategies-wasted",
        "predictors-error",
        "decode-throughput",
        "step-time",
        "predictions",
        "lengths",
        "length-spread",
    ];
    assert_eq!(names(&figures(&[sample()])), want);
    let untimed = Source::alone(ReportData {
        strategies: crate::table::tests::rows(None),
        ..ReportData::default()
    });
    assert_eq!(
        names(&figures(&[untimed])),
        ["strategies-effective", "strategies-wasted"]
    );
}

#[test]
fn inputs_with_the_same_parts_are_told_apart_by_their_names() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let rows = serde_json::json!({"strategies": crate::table::tests::rows(None)}).to_string();
    std::fs::create_dir(path("other"))?;
    for name in ["a b.json", "other/a b.json"] {
        std::fs::write(path(name), &rows)?;
    }
    std::fs::write(path("lengths.json"), r#"[{"id":1,"L_t0.0":10}]"#)?;
    let sources = read(&["a b.json", "lengths.json", "other/a b.json"].map(path))?;
    let tags: Vec<_> = sources.iter().map(|s| s.tag.as_deref()).collect();
    assert_eq!(tags, [Some("a b"), None, Some("a b 2")]);
    let figures = figures(&sources);
    let want = [
        "strategies-effective-a-b",
        "strategies-wasted-a-b",
        "lengths",
        "strategies-effective-a-b-2",
        "strategies-wasted-a-b-2",
    ];
    assert_eq!(names(&figures), want);
    assert!(figures[0].svg.contains("Effective token ratio (a b)"));
    Ok(())
}

#[test]
fn the_page_needs_no_other_file_and_escapes_names() {
    let mut source = sample();
    source.data.strategies[0].strategy = "<script>".to_owned();
    let sources = [source];
    let figures = figures(&sources);
    let page = page(&sources, &figures);
    assert!(page.contains("&lt;script&gt;") && !page.contains("<script"));
    for outside in ["src=", "@import", "url(", "<link"] {
        assert!(!page.contains(outside), "{outside}");
    }
    // Its only links are to the files that lie beside it.
    assert_eq!(page.matches("href=").count(), 2 * figures.len());
    for figure in &figures {
        assert!(
            page.contains(&format!("href=\"{}.png\"", figure.name)),
            "{}",
            figure.name
        );
    }
    assert_eq!(page.matches("<svg").count(), figures.len());
}

#[test]
fn every_figure_can_be_drawn_as_a_picture() -> anyhow::Result<()> {
    for figure in figures(&[sample()]) {
        let picture = png(&figure.svg)?;
        assert!(picture.starts_with(b"\x89PNG"), "{}", figure.name);
    }
    Ok(())
}
