//! Which module may import which, and which crates each of them may name. The order is that of `src/lib.rs`.

use std::collections::BTreeSet;
use std::path::Path;

/// A module may use those above it and never one below, so there are no cycles. The command line comes last.
const ORDER: [&str; 31] = [
    "mutex",
    "stop",
    "time",
    "out",
    "crash",
    "event",
    "apply",
    "verify",
    "config",
    "stream",
    "status",
    "metrics",
    "control",
    "logging",
    "directory",
    "amqp",
    "kafka",
    "store",
    "output",
    "origin",
    "pipeline",
    "handlers",
    "report",
    "dead_letters",
    "repair",
    "tasks",
    "doctor",
    "health",
    "http",
    "run",
    "cli",
];

/// Crates that only these modules may name.
const CRATES: [(&str, &[&str]); 15] = [
    ("amqprs", &["amqp"]),
    ("krafka", &["kafka"]),
    ("redis", &["stream"]),
    ("tokio_postgres", &["store"]),
    ("postgres_types", &["store"]),
    ("deadpool_postgres", &["store"]),
    ("tokio_tungstenite", &["origin", "http"]),
    ("shrike", &["apply", "verify", "origin", "repair"]),
    ("k256", &["verify"]),
    ("p256", &["verify"]),
    ("bs58", &["verify"]),
    ("axum", &["http"]),
    ("hyper", &["directory", "http"]),
    ("hyper_rustls", &["directory"]),
    ("clap", &["cli", "main"]),
];

/// The source files of the product, each with the module it belongs to.
fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, root: &Path, into: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, root, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let first = path.strip_prefix(root).unwrap().components().next().unwrap();
                let module = first.as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned();
                into.push((module, std::fs::read_to_string(path).unwrap()));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&root, &root, &mut found);
    found
}

/// The names after each `start::`, including one level of braces.
fn named(text: &str, start: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in text.match_indices(start) {
        let boundary =
            text[..at].chars().next_back().is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':');
        if !boundary {
            continue;
        }
        let rest = &text[at + start.len()..];
        let list = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or_default(),
            None => rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default(),
        };
        names
            .extend(list.split(',').map(|name| name.trim().split(':').next().unwrap_or_default().to_owned()));
    }
    names
}

fn violations(sources: &[(String, String)]) -> Vec<String> {
    let place = |name: &str| ORDER.iter().position(|module| *module == name);
    let mut found = Vec::new();
    for (module, text) in sources {
        // Comments and tests may name anything.
        let code: String = text
            .split("#[cfg(test)]\nmod tests {")
            .next()
            .unwrap_or_default()
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect::<Vec<_>>()
            .join("\n");
        if module != "lib" && module != "main" && place(module).is_none() {
            found.push(format!("{module} has no place in the order"));
        }
        for used in named(&code, "crate::").union(&named(&code, "standpipe::")) {
            if let (Some(own), Some(other)) = (place(module), place(used))
                && other > own
            {
                found.push(format!("{module} imports {used}, which stands below it"));
            }
        }
        for (name, rooms) in CRATES {
            // The doctor has a module with the same name as the crate.
            let own = code.contains(&format!("mod {name};"));
            if !own && !named(&code, &format!("{name}::")).is_empty() && !rooms.contains(&module.as_str()) {
                found.push(format!("{module} names the crate {name}, which only {rooms:?} may know"));
            }
        }
    }
    found
}

#[test]
fn imports_follow_the_layer_order_and_each_crate_stays_in_its_modules() {
    assert_eq!(violations(&sources()), Vec::<String>::new());
}

#[test]
fn planted_violations_are_found() {
    for (module, line) in [
        ("event", "use crate::store::Store;"),
        ("stream", "use crate::{config::Config, pipeline::Pipeline};"),
        ("store", "let look = crate::report::report();"),
        ("pipeline", "use redis::Value;"),
        ("tasks", "fn f(client: &tokio_postgres::Client) {}"),
        ("nowhere", ""),
    ] {
        let planted = [(module.to_owned(), line.to_owned())];
        assert_eq!(violations(&planted).len(), 1, "{module}: {line}");
    }
    for (module, line) in [
        ("store", "use crate::event::Event;"),
        ("stream", "use redis::Value;"),
        ("event", "// crate::store knows it"),
        ("event", "#[cfg(test)]\nmod tests {\n use crate::store::Store;\n}"),
    ] {
        assert_eq!(violations(&[(module.to_owned(), line.to_owned())]), Vec::<String>::new(), "{line}");
    }
}

#[test]
fn the_order_matches_lib_rs() {
    let lib = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let declared: BTreeSet<&str> =
        lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let ordered: BTreeSet<&str> = ORDER.into_iter().filter(|name| *name != "cli").collect();
    assert_eq!(declared, ordered);
    let listed: Vec<&str> =
        lib.lines().filter_map(|line| line.split("[`").nth(1)?.split("`]").next()).collect();
    let ordered: Vec<&str> = ORDER.into_iter().filter(|name| *name != "cli").collect();
    assert_eq!(listed, ordered, "the list in src/lib.rs");
}
