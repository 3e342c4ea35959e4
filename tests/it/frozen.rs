//! What others build on: names of metrics and keys, the shape of the status pages, `--help`, exit codes. Any
//! change that was not meant to be visible from outside fails here.
//!
//! `STANDPIPE_FREEZE=1` rewrites the lists in `tests/fixtures/frozen`. A line that disappears from one of
//! them is a breaking change.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use crate::support::chain::{Chain, Program, SOON, network, redis_command};
use crate::support::{Standpipe, free_port};
use serde_json::Value;

/// Compares with the frozen list.
#[track_caller]
fn is_frozen(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/frozen").join(name);
    if std::env::var("STANDPIPE_FREEZE").is_ok_and(|freeze| freeze == "1") {
        std::fs::write(&path, found).unwrap();
    }
    let frozen = std::fs::read_to_string(&path).unwrap_or_default();
    let (before, after): (BTreeSet<&str>, BTreeSet<&str>) =
        (frozen.lines().collect(), found.lines().collect());
    let gone: Vec<_> = before.difference(&after).collect();
    let new: Vec<_> = after.difference(&before).collect();
    assert!(gone.is_empty() && new.is_empty(), "{name}: gone: {gone:#?}\nnew: {new:#?}");
    assert_eq!(frozen, found, "{name}: in another order");
}

#[tokio::test]
async fn the_help_of_every_command_is_unchanged() {
    let mut all = String::new();
    let mut commands = vec![Vec::<String>::new()];
    while let Some(command) = commands.pop() {
        let mut arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        arguments.push("--help");
        let help = Standpipe::run(&arguments, &[("COLUMNS", "100")], SOON).await;
        assert_eq!(help.code, 0, "{arguments:?}: {}", help.stderr);
        writeln!(all, "=== standpipe {}\n{}", arguments.join(" "), help.stdout).unwrap();
        let listed = help.stdout.lines().skip_while(|line| *line != "Commands:").skip(1);
        for line in listed.take_while(|line| !line.is_empty()) {
            let name =
                line.strip_prefix("  ").and_then(|line| line.split_whitespace().next()).unwrap_or_default();
            if line.starts_with("   ") || name == "help" {
                continue;
            }
            commands.push(command.iter().cloned().chain([name.to_owned()]).collect());
        }
    }
    let settings = Standpipe::run(&["help-env"], &[("COLUMNS", "100")], SOON).await;
    writeln!(all, "=== standpipe help-env\n{}", settings.stdout).unwrap();
    is_frozen("help.txt", &all);
}

#[tokio::test]
async fn exit_codes_are_unchanged() {
    let nobody = format!("redis://127.0.0.1:{}", free_port().unwrap());
    let nothing = format!("postgres://nobody@127.0.0.1:{}/nothing", free_port().unwrap());
    let unreachable = [("REDIS_URL", nobody.as_str()), ("DATABASE_URL", &nothing)];
    let mut codes = String::new();
    for (command, variables) in [
        ("--help", &[][..]),
        ("--version", &[]),
        ("help-env", &[]),
        ("nonsense", &[]),
        ("run", &[("BATCH_SIZE", "many")]),
        ("reader", &[("RELAY_URL", "ftp://relay.example")]),
        ("worker", &[("DATABASE_URL", "nothing")]),
        ("check", &unreachable),
        ("status", &unreachable),
        ("migrate", &unreachable),
        ("audit", &unreachable),
        ("dead-letters list", &unreachable),
        ("control pause", &[("HTTP_ADDR", "127.0.0.1:1"), ("ADMIN_TOKEN", "a-token-of-some-length")]),
        ("healthcheck", &[("HTTP_ADDR", "127.0.0.1:1")]),
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        let code = Standpipe::run(&words, variables, SOON).await.code;
        let names: Vec<&str> = variables.iter().map(|(name, _)| *name).collect();
        writeln!(codes, "{code:3} {command} {}", names.join(" ")).unwrap();
    }
    is_frozen("exit-codes.txt", &codes);
}

/// Every path through a JSON document.
fn paths(value: &Value, path: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                paths(value, &format!("{path}.{name}"), into);
            }
        }
        Value::Array(values) => {
            for value in values {
                paths(value, &format!("{path}[]"), into);
            }
        }
        _ => {
            into.insert(path.to_owned());
        }
    }
}

fn lines(of: impl IntoIterator<Item = String>) -> String {
    of.into_iter().fold(String::new(), |lines, line| lines + &line + "\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_keys_and_status_pages_are_unchanged() {
    let chain = Chain::start(&network(3_000), None).await;
    let program = Program::start("run", &chain.variables().with("LEGACY_STATUS", "true")).await;
    chain.finished().await;
    // Some of them appear only once their task has run.
    crate::support::wait_until("every task to have worked once", SOON, async || {
        let (_, text) = program.get("/metrics").await;
        let keys: Vec<String> = redis_command(&chain.redis, &["KEYS", "*"]).await;
        program.readiness().await.0 == 200
            && ["cluster:metrics", "firehose:status", "firehose:events:trimmed"]
                .iter()
                .all(|name| keys.iter().any(|key| key == name))
            && ["standpipe_refilling", "standpipe_trimmed_entries_total"]
                .iter()
                .all(|name| text.contains(name))
    })
    .await;

    let (_, text) = program.get("/metrics").await;
    // Labels appear only with the events they describe, so they are left out.
    let metrics: BTreeSet<String> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).map(str::to_owned).collect();
    assert!(metrics.len() > 30, "{metrics:#?}");
    is_frozen("metrics.txt", &lines(metrics));

    let mut found = BTreeSet::new();
    for page in ["/status", "/health", "/workers/status"] {
        let (code, text) = program.get(page).await;
        assert_eq!(code, 200, "{page}: {text}");
        paths(&serde_json::from_str(&text).unwrap(), page, &mut found);
    }
    is_frozen("status.txt", &lines(found));

    let keys: Vec<String> = redis_command(&chain.redis, &["KEYS", "*"]).await;
    is_frozen("keys.txt", &lines(keys.into_iter().collect::<BTreeSet<_>>()));
}
