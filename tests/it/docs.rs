//! Everything that the documentation names exists.

use std::path::Path;

fn sources(folder: &Path, into: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            into.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_invariant_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/invariants.md")).unwrap();
    let mut code = String::new();
    sources(&root.join("src"), &mut code);
    sources(&root.join("tests"), &mut code);
    let mut sections: Vec<Vec<&str>> = Vec::new();
    for line in page.lines() {
        if line.starts_with(|c: char| c.is_ascii_digit()) {
            sections.push(Vec::new());
        }
        // Names of tests are the only words in code font with several underscores.
        let names = line.split('`').skip(1).step_by(2).filter(|word| word.matches('_').count() > 2);
        if let Some(section) = sections.last_mut() {
            section.extend(names);
        }
    }
    assert_eq!(sections.len(), 16, "sixteen invariants");
    for (index, names) in sections.iter().enumerate() {
        assert!(!names.is_empty(), "invariant {} names no test", index + 1);
        for name in names {
            assert!(
                code.contains(&format!("fn {name}(")),
                "invariant {} names {name}, which is no test",
                index + 1
            );
        }
    }
}

#[test]
fn every_metric_named_in_the_runbook_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let metrics = std::fs::read_to_string(root.join("src/metrics/mod.rs")).unwrap();
    let mut seen = 0;
    for page in ["docs/operations.md", "docs/performance.md", "README.md"] {
        let text = std::fs::read_to_string(root.join(page)).unwrap();
        for word in text.split('`').skip(1).step_by(2).filter(|word| word.starts_with("standpipe_")) {
            if word == "standpipe_" {
                continue;
            }
            seen += 1;
            // Process metrics have a collector of their own.
            if word.starts_with("standpipe_process_") {
                continue;
            }
            assert!(metrics.contains(&format!("\"{word}\"")), "{page} names {word}, which is no metric");
        }
    }
    assert!(seen > 5);
}

#[test]
fn every_metric_is_documented_with_its_help_text() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = ["src/metrics/mod.rs", "src/metrics/describe.rs"]
        .map(|path| std::fs::read_to_string(root.join(path)).unwrap())
        .concat();
    let page = std::fs::read_to_string(root.join("docs/metrics.md")).unwrap();
    let mut lines = Vec::new();
    let described = ["counter", "gauge", "histogram"].map(|kind| (kind, format!("describe_{kind}!(")));
    for (kind, part) in described
        .iter()
        .flat_map(|(kind, call)| source.split(call.as_str()).skip(1).map(move |part| (*kind, part)))
    {
        let name = part.trim_start().split(',').next().unwrap();
        let Some(name) = source.split(&format!("const {name}: &str = \"")).nth(1) else { continue };
        let name = name.split('"').next().unwrap();
        let words = part.split('"').nth(1).unwrap();
        lines.push(format!("| `{name}` | {kind} | {words} |"));
    }
    assert!(lines.len() > 30, "{lines:?}");
    for line in &lines {
        assert!(page.contains(line), "docs/metrics.md lacks\n{line}");
    }
    assert_eq!(page.matches("| `standpipe_").count(), lines.len(), "it has more than there is");
}

#[test]
fn every_runbook_paragraph_the_dashboard_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let (page, health) = (read("src/http/dashboard.html"), read("src/health/rules.rs"));
    let runbook = read("docs/operations.md");
    let titles: Vec<&str> =
        runbook.lines().filter(|line| line.starts_with("**") || line.starts_with('#')).collect();
    let list = page.split("const PARAGRAPHS = {").nth(1).unwrap().split("};").next().unwrap();
    let mut seen = 0;
    for (about, names) in list.lines().filter_map(|line| line.trim().split_once(": ")) {
        // These two are specific to the page.
        let known = ["worker_lease", "dead"].contains(&about) || health.contains(&format!("\"{about}\""));
        assert!(known, "no state is about {about}");
        for name in names.trim_end_matches(',').trim_matches('"').split(", ") {
            let name = name.replace("\\u201C", "").replace("\\u201D", "");
            assert!(titles.iter().any(|title| title.contains(&name)), "docs/operations.md lacks {name:?}");
            seen += 1;
        }
    }
    assert!(seen >= 13, "{seen}");
}
