//! The configuration as an operator sees it: the messages, and the files that show the variables.
//!
//! The files are compared with `VARIABLES`, so that a variable cannot be added, renamed or given another default in
//! one place only.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use standpipe::config::{Role, VARIABLES, Variable, from_env};

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn known(name: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|variable| variable.name == name)
}

/// Name and value of a line `NAME<separator>value`, if the name looks like that of a variable.
fn assignment<'a>(line: &'a str, separator: &str) -> Option<(&'a str, &'a str)> {
    let (name, value) = line.split_once(separator)?;
    let looks_right = name.starts_with(|c: char| c.is_ascii_uppercase())
        && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    looks_right.then_some((name, value.trim()))
}

#[test]
fn the_example_file_shows_every_variable_with_its_meaning_and_default() {
    let text = file("config.example.env");
    let lines: Vec<_> = text.lines().collect();
    for variable in VARIABLES {
        let start = format!("#{}=", variable.name);
        let at = lines.iter().position(|line| line.starts_with(&start));
        let at = at.unwrap_or_else(|| panic!("{} is missing", variable.name));
        assert_eq!(lines[at - 1], format!("# {}", variable.meaning));
        let value = &lines[at][start.len()..];
        if variable.name == "DATABASE_URL" {
            assert!(from_env([(variable.name, value)], Role::Worker).is_ok(), "the example must be usable");
        } else {
            assert_eq!(value, variable.default, "{}", variable.name);
        }
    }
    let shown: Vec<_> = lines
        .iter()
        .filter_map(|line| assignment(line.trim_start_matches('#'), "="))
        .map(|(name, _)| name)
        .collect();
    let expected: Vec<_> = VARIABLES.iter().map(|variable| variable.name).collect();
    assert_eq!(shown, expected, "each once, in the order of the table, and no others");
}

#[test]
fn the_example_file_is_accepted_with_everything_uncommented() {
    let text = file("config.example.env");
    let vars = text.lines().filter_map(|line| assignment(line.trim_start_matches('#'), "="));
    let (_, warnings) =
        from_env(vars.chain([("HOSTNAME", "tower")]), Role::All).expect("the example is usable");
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn the_documentation_has_a_row_for_every_variable_and_names_no_other() {
    let text = file("docs/configuration.md");
    for variable in VARIABLES {
        let default = match variable.default {
            "" => "none".to_owned(),
            default => format!("`{default}`"),
        };
        let row = format!("| `{}` | {default} | ", variable.name);
        assert!(text.lines().any(|line| line.starts_with(&row)), "no row starts with {row}");
    }
    let quoted = text.split('`').skip(1).step_by(2);
    for name in quoted.filter(|word| word.contains('_') && assignment(&format!("{word}="), "=").is_some()) {
        assert!(known(name).is_some(), "{name} is documented and not known");
    }
}

/// The names and values under `environment:` of the services that run this program, anchors included. Compose
/// files are YAML; ours keeps to one mapping entry per line, and the test fails if it finds none.
fn compose_environment(text: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    let mut block = "";
    let mut inside = None;
    for line in text.lines().filter(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty()) {
        let indent = line.len() - line.trim_start().len();
        if inside.is_some_and(|outer| indent <= outer) {
            inside = None;
        }
        if indent == 0 || (indent == 2 && inside.is_none()) {
            block = line.trim().split(':').next().unwrap_or_default();
        }
        if line.starts_with("x-environment:") || line.trim() == "environment:" {
            inside = Some(indent);
        } else if inside.is_some() && matches!(block, "x-environment" | "reader" | "worker") {
            found.extend(assignment(line.trim(), ":"));
        }
    }
    found
}

#[test]
fn the_compose_file_uses_known_variables_with_their_defaults() {
    let text = file("docker-compose.yml");
    let environment = compose_environment(&text);
    let shown: BTreeSet<_> = environment.iter().map(|(name, _)| *name).collect();
    assert_eq!(shown.len(), environment.len(), "one of them stands twice");
    assert_eq!(shown, VARIABLES.iter().map(|variable| variable.name).collect::<BTreeSet<_>>());
    for (name, value) in environment {
        let variable = known(name).expect("compared above");
        match name {
            // The addresses of other services, and one that is reachable from outside the container.
            "REDIS_URL" | "DATABASE_URL" | "HTTP_ADDR" => {}
            _ => assert_eq!(value, format!("${{{name}:-{}}}", variable.default)),
        }
    }
}

#[test]
fn the_image_listens_on_all_addresses_of_its_container() {
    let text = file("Dockerfile");
    assert!(text.contains("\nENV HTTP_ADDR=0.0.0.0:9464\n"));
    assert!(from_env([("HTTP_ADDR", "0.0.0.0:9464")], Role::Reader).is_ok());
}

#[test]
fn the_compose_stop_grace_period_exceeds_the_drain_timeout() {
    let drain = known("DRAIN_TIMEOUT").expect("it is in the table").default;
    let drain = humantime::parse_duration(drain).expect("a default parses");
    let text = file("docker-compose.yml");
    let grace: Vec<_> =
        text.lines().filter_map(|line| line.trim().strip_prefix("stop_grace_period: ")).collect();
    assert!(!grace.is_empty());
    for period in grace {
        assert!(humantime::parse_duration(period).expect("a duration") > drain, "{period}");
    }
}

#[test]
fn five_errors_give_five_lines_in_order_without_secrets() {
    let error = from_env(
        [
            ("HTTP_ADDR", ":9464"),
            ("DATABASE_URL", "postgres://standpipe:hunter2/app"),
            ("REDIS_URL", "redis://:hunter2/x@localhost"),
            ("PARALLEL_CONSUMERS", "five"),
            ("CLAIM_IDLE", "30"),
            ("PARALEL_CONSUMERS", "hunter2"),
        ],
        Role::All,
    )
    .expect_err("five of them are wrong");
    let text = error.to_string();
    let names: Vec<_> = text.lines().filter_map(|line| line.split(':').next()).collect();
    assert_eq!(
        names,
        ["REDIS_URL", "DATABASE_URL", "PARALLEL_CONSUMERS", "CLAIM_IDLE", "HTTP_ADDR"],
        "{text}"
    );
    assert!(!text.contains("hunter2"), "{text}");
    assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
}

#[test]
fn no_printed_form_of_a_configuration_shows_a_password() {
    let (config, _) = from_env(
        [
            ("RELAY_URL", "wss://reader:hunter2@relay.example"),
            ("REDIS_URL", "rediss://worker:hunter2@cache.example:6380/1"),
            ("DATABASE_URL", "postgres://app:hunter2@db.example/app?sslmode=verify-full&password=hunter2"),
        ],
        Role::All,
    )
    .expect("all of it is right");
    let described = config.describe().join("\n");
    assert!(!described.contains("hunter2"), "{described}");
    assert!(!format!("{config:?}").contains("hunter2"), "{config:?}");
    assert!(described.contains("REDIS_URL=rediss://worker:***@cache.example:6380/1"), "{described}");
    assert!(config.redis_url.expose().contains("hunter2"), "what connects needs all of it");
}
