//! The kit in monitoring/: it asks only for what the program exports, and Prometheus accepts it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::chain::{Chain, Program, SOON, network};
use crate::support::wait_until;
use serde_json::Value;

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The names of metrics in a text: words that begin with our prefix.
fn metrics_in(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("standpipe_"))
        .map(str::to_owned)
        .collect()
}

/// Every expression in the dashboard.
fn expressions(dashboard: &Value) -> Vec<&str> {
    let panels = dashboard["panels"].as_array().unwrap();
    panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().into_iter().flatten())
        .map(|target| target["expr"].as_str().unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_used_by_the_kit_is_exported_with_its_labels() {
    let chain = Chain::start(&network(300), None).await;
    let program = Program::start("run", &chain.variables()).await;
    chain.finished().await;
    wait_until("the stream to have been looked at", SOON, async || {
        program.metric("standpipe_stream_entries").await > 0.0
    })
    .await;
    let page = program.get("/metrics").await.1;
    // Series, not their comments: histograms are queried by bucket, sum and count.
    let series: String = page.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
    let exported = metrics_in(&series);

    let dashboard: Value = serde_json::from_str(&file("monitoring/grafana/standpipe.json")).unwrap();
    let expressions = expressions(&dashboard);
    assert!(expressions.len() > 30, "the dashboard was not understood");
    let mut sources = expressions.join("\n");
    sources.push_str(&dashboard["templating"].to_string());
    let alerts = file("monitoring/alerts.yml");
    let used: BTreeSet<String> = metrics_in(&sources)
        .into_iter()
        .chain(metrics_in(&alerts))
        .filter(|name| name != "standpipe_")
        .collect();
    assert!(used.len() > 30, "{used:?}");
    let unknown: Vec<_> = used.difference(&exported).collect();
    assert_eq!(unknown, [] as [&String; 0], "in the kit, and not exported");

    // Every label that it selects or groups by exists on that metric, with that value.
    for (metric, label, value) in [
        ("standpipe_entries_total", "type", "commit"),
        ("standpipe_operations_total", "kind", "like"),
        ("standpipe_operations_total", "outcome", "applied"),
        ("standpipe_operations_total", "outcome", "stale"),
        ("standpipe_retries_total", "reason", "halt"),
        ("standpipe_dead_letters_total", "reason", "undecodable"),
        ("standpipe_relay_frames_total", "type", "commit"),
    ] {
        let sample = |line: &str| line.starts_with(metric) && line.contains(&format!("{label}=\"{value}\""));
        assert!(series.lines().any(sample), "{metric} has no {label} {value}");
    }
}

#[test]
fn the_dashboard_shows_most_exported_metrics() {
    let dashboard: Value = serde_json::from_str(&file("monitoring/grafana/standpipe.json")).unwrap();
    let shown = metrics_in(&expressions(&dashboard).join("\n"));
    let source = file("src/metrics/mod.rs");
    let names: BTreeSet<&str> = source
        .split('"')
        .skip(1)
        .step_by(2)
        .filter(|word| word.starts_with("standpipe_") && !word.contains(' '))
        .collect();
    let is_shown = |name: &&&str| shown.iter().any(|other| other.starts_with(**name));
    let missing: Vec<_> = names.iter().filter(|name| !is_shown(name)).collect();
    assert!(missing.len() * 4 < names.len(), "of {} these are not shown: {missing:?}", names.len());
}

#[test]
fn every_alert_is_tested_both_firing_and_quiet() {
    let alerts = file("monitoring/alerts.yml");
    let tests = file("monitoring/alerts_test.yml");
    let names: Vec<&str> = alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() >= 10, "{names:?}");
    for name in names {
        let fires =
            tests.contains(&format!("alertname: {name}\n        exp_alerts:\n          - exp_labels"));
        let quiet = tests.contains(&format!("alertname: {name}, exp_alerts: [] }}"));
        assert!(fires && quiet, "{name}: fires {fires}, quiet {quiet}");
    }
}

#[test]
fn the_compose_file_mounts_only_existing_files() {
    let compose = file("docker-compose.yml");
    let mounts: Vec<&str> = compose
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- ./"))
        .filter_map(|mount| mount.split(':').next())
        .collect();
    assert_eq!(mounts.iter().filter(|path| path.starts_with("monitoring/")).count(), 4, "{mounts:?}");
    for path in mounts {
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(path).exists(), "{path}");
    }
}

/// `make test-monitoring` downloads promtool and runs this; a plain `cargo test` lists it as ignored.
#[test]
#[ignore = "needs promtool: make test-monitoring"]
fn prometheus_accepts_the_configuration_the_rules_and_their_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ours = root.join("target/tools/promtool");
    let promtool = if ours.exists() { ours } else { PathBuf::from("promtool") };
    // The dashboard's expressions as rules, with Grafana's variables filled in.
    let dashboard: Value = serde_json::from_str(&file("monitoring/grafana/standpipe.json")).unwrap();
    let rules: Vec<Value> = expressions(&dashboard)
        .iter()
        .enumerate()
        .map(|(index, expression)| {
            let expression = expression.replace("$__rate_interval", "5m").replace("$instance", ".*");
            serde_json::json!({"record": format!("panel:{index}"), "expr": expression})
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let panels = folder.path().join("panels.yml");
    let groups = serde_json::json!({"groups": [{"name": "panels", "rules": rules}]});
    std::fs::write(&panels, groups.to_string()).unwrap();
    for arguments in [
        &["check", "config", "prometheus.yml"][..],
        &["check", "rules", "alerts.yml"],
        &["test", "rules", "alerts_test.yml"],
        &["check", "rules", "--lint=none", panels.to_str().unwrap()],
    ] {
        let output = Command::new(&promtool)
            .args(arguments)
            .current_dir(root.join("monitoring"))
            .output()
            .expect("promtool; scripts/install-promtool.sh gets it");
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "promtool {arguments:?}:\n{said}");
    }
}
