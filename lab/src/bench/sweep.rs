//! One factor varied at a time: how large the tables are, how many pipelines there are, how large the batches, how far away
//! the database is, how slow its disk.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::lab::Lab;
use super::postgres::Connection;
use super::report::Stat;
use super::stream::Prepared;
use super::{BenchOptions, OWN, worker};
use standpipe::out;

const FILL: &str = include_str!("../../sql/fill.sql");
/// Rows in all tables together before the run.
const SIZES: &[u64] = &[0, 1_000_000, 5_000_000];
const PIPELINES: &[u64] = &[1, 2, 5, 10];
const BATCHES: &[u64] = &[10, 50, 100, 200, 500, 1000];
/// To the database and back.
const ROUND_TRIPS_MS: &[u64] = &[0, 1, 5];
/// What a flush of its log takes longer than this machine's disk.
const FLUSHES_MS: &[u64] = &[0, 2, 10];

/// One factor in one mode.
#[derive(Clone, Debug, Serialize)]
pub struct Sweep {
    /// What is varied: `table_rows`, `pipelines`, `batch_size`, `round_trip_ms` or `flush_ms`.
    pub factor: &'static str,
    /// `TRANSACTION`.
    pub mode: &'static str,
    /// How fast it is at each value.
    pub points: Vec<Point>,
}

/// One value of a factor.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// The value.
    pub value: u64,
    /// Events per second.
    pub events_per_second: Stat,
}

/// Varies everything.
///
/// # Errors
///
/// A run fails.
pub async fn sweep(
    lab: &mut Lab,
    prepared: &Prepared,
    options: &BenchOptions,
    modes: &[&'static str],
) -> Result<Vec<Sweep>> {
    let mut sweeps = Vec::new();
    for &rows in SIZES.iter().filter(|rows| **rows > 0) {
        fill(lab, rows).await?;
    }
    for (factor, values) in [
        ("table_rows", SIZES),
        ("pipelines", PIPELINES),
        ("batch_size", BATCHES),
        ("round_trip_ms", ROUND_TRIPS_MS),
        ("flush_ms", FLUSHES_MS),
    ] {
        let mut figures = vec![vec![Vec::new(); values.len()]; modes.len()];
        for round in 1..=options.rounds {
            for (place, value) in values.iter().enumerate() {
                for (figures, mode) in figures.iter_mut().zip(modes) {
                    let text = value.to_string();
                    let (template, variable) = match factor {
                        "table_rows" => (template(*value), None),
                        "pipelines" => (OWN.to_owned(), Some(("PARALLEL_CONSUMERS", text.as_str()))),
                        "batch_size" => (OWN.to_owned(), Some(("BATCH_SIZE", text.as_str()))),
                        _ => (OWN.to_owned(), None),
                    };
                    let special: Vec<_> = [("TRANSACTION", *mode)].into_iter().chain(variable).collect();
                    let mut database = lab.postgres.fresh(&template).await?;
                    let time = Duration::from_millis(*value);
                    match factor {
                        "round_trip_ms" if *value > 0 => database = lab.postgres.far_url(time)?,
                        "flush_ms" => lab.postgres.slow_down_flushes(time).await?,
                        _ => {}
                    }
                    let (drained, _) = worker::drain(lab, prepared, &database, &special).await?;
                    let rate = prepared.entries as f64 / drained.seconds;
                    out::note(format_args!("  {factor} {value}, {mode}, round {round}: {rate:.0} events/s"));
                    figures[place].push(rate);
                }
            }
        }
        sweeps.extend(modes.iter().zip(figures).map(|(mode, figures)| {
            let points = values.iter().zip(figures).map(|(value, rates)| Point {
                value: *value,
                events_per_second: rates.into_iter().collect(),
            });
            Sweep { factor, mode, points: points.collect() }
        }));
    }
    Ok(sweeps)
}

/// The database with this many rows.
fn template(rows: u64) -> String {
    if rows == 0 { OWN.to_owned() } else { format!("filled_{rows}") }
}

async fn fill(lab: &Lab, rows: u64) -> Result<()> {
    out::note(format_args!("filling tables with {rows} rows ..."));
    let name = template(rows);
    lab.postgres.copy(&name, OWN).await?;
    let connection = Connection::open(&lab.postgres.url(&name)).await?;
    // The session's memory for sorting, so that indexes are built in a moment.
    connection
        .batch_execute(&format!(
            "SET bench.rows = {rows}; SET maintenance_work_mem = '512MB'; SET synchronous_commit = off"
        ))
        .await?;
    connection.batch_execute(FILL).await?;
    // So that the run does not set hint bits, nor autovacuum begin in the middle of it.
    connection.batch_execute("VACUUM (FREEZE, ANALYZE)").await?;
    Ok(())
}
