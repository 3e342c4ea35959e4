//! `standpipe-lab bench`, small: that it measures everything that it promises, and that what it starts from is what it says.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::Value;
use standpipe_lab::servers::Signal;

use crate::{NOTHING, RUN, run, start};

#[tokio::test]
async fn a_small_run_reports_every_figure() {
    let plots = tempfile::tempdir().unwrap();
    let arguments =
        ["bench", "--events", "2000", "--rounds", "1", "--json", "--svg", plots.path().to_str().unwrap()];
    let finished = run(&arguments, NOTHING, RUN).await;
    assert_eq!(finished.code, 0, "{finished:?}");
    assert_eq!(finished.stdout.lines().count(), 1, "{}", finished.stdout);
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    no_null(&report, "");

    let positive = |path: &str| {
        let value = report.pointer(path).unwrap_or_else(|| panic!("no {path} in {report}"));
        assert!(value.as_f64().is_some_and(|value| value > 0.0), "{path} is {value}");
    };
    for path in [
        "/machine/cores",
        "/machine/memory_bytes",
        "/servers/flush_ms",
        "/workload/event_bytes",
        "/throughput/0/rows",
        "/throughput/0/ratios/event~1floor",
        "/throughput/0/ratios/event~1reference",
        "/latency/0/rate/median",
        "/latency/0/samples",
        "/latency/0/commit_ms/p50/median",
        "/latency/0/commit_ms/p99_9/median",
        "/latency/0/durable_ms/p50/median",
        "/reader/frames_per_second/median",
        "/reader/frames_per_cpu_second/median",
        "/reader/peak_memory_bytes/median",
        "/reader/verified/more_cpu_us_per_frame/median",
    ] {
        positive(path);
    }
    assert_eq!(report["workload"]["events"], 2000);
    let bytes = report["reader"]["frame_bytes"].as_f64().unwrap();
    assert!((5000.0..6000.0).contains(&bytes), "frames of {bytes} bytes are not like real ones");
    let variants = report["throughput"][0]["variants"].as_array().unwrap();
    for name in ["floor", "event", "reference", "event_without_notifications"] {
        let place = variants.iter().position(|variant| variant["name"] == name);
        let variant = format!("/throughput/0/variants/{}", place.unwrap_or_else(|| panic!("no {name}")));
        let mut figures =
            vec!["events_per_second/median", "postgres_cpu/median", "wal_bytes/median", "connections"];
        if name.starts_with("event") {
            figures.extend([
                "process/cpu/median",
                "process/peak_memory_bytes/median",
                "process/ready_ms/median",
            ]);
        }
        for figure in figures {
            positive(&format!("{variant}/{figure}"));
        }
    }
    for plot in ["throughput-own.svg", "postgres-cpu-own.svg", "latency.svg"] {
        let svg = fs::read_to_string(plots.path().join(plot)).unwrap();
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"), "{svg}");
    }
}

fn no_null(value: &Value, path: &str) {
    match value {
        Value::Null => panic!("{path} is null"),
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                no_null(item, &format!("{path}/{index}"));
            }
        }
        Value::Object(fields) => {
            fields.iter().for_each(|(name, field)| no_null(field, &format!("{path}/{name}")));
        }
        _ => {}
    }
}

#[tokio::test]
async fn help_lists_every_option_and_bad_values_exit_64() {
    let help = run(&["bench", "--help"], NOTHING, RUN).await;
    assert_eq!(help.code, 0, "{help:?}");
    for option in [
        "--events",
        "--rounds",
        "--seed",
        "--accounts",
        "--rate",
        "--backlog",
        "--sweep",
        "--existing",
        "--only",
        "--postgres",
        "--json",
        "--svg",
    ] {
        assert!(help.stdout.contains(option), "{option} is not in:\n{}", help.stdout);
    }
    for wrong in [["--only", "writer"], ["--rounds", "0"], ["--events", "1"], ["--postgres", "fsync"]] {
        let finished = run(&["bench", wrong[0], wrong[1]], NOTHING, RUN).await;
        assert_eq!(finished.code, 64, "{wrong:?}: {finished:?}");
    }
}

#[tokio::test]
async fn an_interrupted_run_leaves_nothing_behind() {
    let scratch = tempfile::Builder::new().prefix("standpipe-test-bench-").tempdir_in("/tmp").unwrap();
    // Servers that root starts run as somebody else, who has to get through.
    fs::set_permissions(scratch.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let variables = [("TMPDIR", scratch.path().to_str().unwrap())];
    let mut standpipe = start(&["bench", "--only", "throughput"], &variables);
    standpipe.wait_for_line("preparing", RUN).await;
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    standpipe.signal(Signal::Int);
    assert_eq!(standpipe.wait_exit(RUN).await, 1);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
}

/// `sql/existing.sql` is made from what was written down of that database.
#[test]
fn existing_sql_matches_the_recorded_schema() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let lines = |name: &str| -> Vec<Vec<String>> {
        let text = fs::read_to_string(folder.join("../tests/fixtures").join(name)).unwrap();
        text.lines().skip(1).map(|line| line.split('\t').map(str::to_owned).collect()).collect()
    };
    let mut tables = BTreeMap::<String, Vec<String>>::new();
    for line in lines("existing-database.tsv") {
        let field = |index: usize| line.get(index).map_or("", String::as_str);
        let (name, kind, null, default) = (field(1), field(2), field(3), field(4));
        let column = if default.contains("nextval") {
            format!("{name} serial")
        } else if default.is_empty() {
            format!("{name} {kind} {null}")
        } else {
            format!("{name} {kind} DEFAULT {default} {null}")
        };
        tables.entry(line[0].clone()).or_default().push(column.trim_end().to_owned());
    }
    let mut expected = String::new();
    for (table, columns) in tables {
        write!(expected, "\nCREATE TABLE {table} (\n    {}\n);\n", columns.join(",\n    ")).unwrap();
    }
    expected.push('\n');
    for line in lines("existing-indexes.tsv") {
        let [table, name, definition] = line.as_slice() else { panic!("{line:?}") };
        let (unique, on) = match definition.strip_prefix("UNIQUE ") {
            Some(on) => ("UNIQUE ", on),
            None => ("", definition.as_str()),
        };
        writeln!(expected, "CREATE {unique}INDEX {name} ON {table} {on};").unwrap();
        if name.ends_with("_pkey") {
            writeln!(expected, "ALTER TABLE {table} ADD PRIMARY KEY USING INDEX {name};").unwrap();
        }
    }
    let sql = fs::read_to_string(folder.join("sql/existing.sql")).unwrap();
    let statements = sql.split_once("\n\n").unwrap().1;
    assert_eq!(statements, expected.trim_start(), "sql/existing.sql differs from tests/fixtures");
}
