//! What was measured: as JSON, and as a table for people.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::LIVELY;
use super::latency::Latency;
use super::machine::Machine;
use super::reader::ReaderFigures;
use super::sweep::Sweep;

/// A figure of several rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Stat {
    /// What is quoted.
    pub median: f64,
    /// The lowest.
    pub min: f64,
    /// The highest.
    pub max: f64,
}

impl FromIterator<f64> for Stat {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_unstable_by(f64::total_cmp);
        let (Some(min), Some(max)) = (values.first(), values.last()) else { return Self::default() };
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Self { median, min: *min, max: *max }
    }
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this program.
    pub version: &'static str,
    /// Whether it was built with optimisations; figures without say nothing.
    pub release_build: bool,
    /// What it ran on.
    pub machine: Machine,
    /// What it ran with.
    pub servers: Servers,
    /// What it worked on.
    pub workload: Workload,
    /// One for each set of tables; empty when it was not asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub throughput: Vec<Throughput>,
    /// One for each mode.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub latency: Vec<Latency>,
    /// The reader.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reader: Option<ReaderFigures>,
    /// One for each mode.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backlog: Vec<Backlog>,
    /// One for each factor and mode.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sweeps: Vec<Sweep>,
    /// Missing measurements and other remarks.
    pub notes: Vec<String>,
}

/// The private servers.
#[derive(Clone, Debug, Serialize)]
pub struct Servers {
    /// With its version.
    pub redis: String,
    /// Its version.
    pub postgresql: String,
    /// Those of its settings that matter.
    pub postgresql_settings: Vec<String>,
    /// A transaction that waits for the disk, alone: the median, in milliseconds.
    pub flush_ms: f64,
}

/// The events.
#[derive(Clone, Debug, Serialize)]
pub struct Workload {
    /// Stream entries of a run.
    pub events: u64,
    /// Their bytes on average.
    pub event_bytes: f64,
    /// Where the simulated network's chance comes from.
    pub seed: u64,
    /// Its accounts.
    pub accounts: u32,
    /// Runs of each variant.
    pub rounds: u32,
    /// Settings that the environment changed.
    pub settings: Vec<String>,
}

/// All variants on one set of tables.
#[derive(Clone, Debug, Serialize)]
pub struct Throughput {
    /// What the events are like.
    pub network: &'static str,
    /// `own` or `existing`.
    pub tables: &'static str,
    /// Rows that the events come to, in all tables together.
    pub rows: u64,
    /// Their bytes in COPY's texts.
    pub row_bytes: u64,
    /// What was measured.
    pub variants: Vec<VariantFigures>,
    /// Of the medians: `event/floor`, `event/reference` and so on.
    pub ratios: BTreeMap<String, f64>,
}

/// One variant.
#[derive(Clone, Debug, Serialize)]
pub struct VariantFigures {
    /// floor, event, batch, reference, `event_without_notifications`, `batch_without_notifications`.
    pub name: &'static str,
    /// What it is about.
    pub events_per_second: Stat,
    /// Seconds per 100,000 events, all of the server's processes.
    pub postgres_cpu: Stat,
    /// The same beside COPY of the same rows, in the same round: how many times as much.
    pub postgres_by_copy: Stat,
    /// Bytes of write-ahead log per 100,000 events.
    pub wal_bytes: Stat,
    /// The most that there were.
    pub connections: u64,
    /// The part of all processors that went to what has nothing to do with it, from 0 to 1: what it could not have.
    pub elsewhere: Stat,
    /// Seconds per 100,000 events; the floor does not touch Redis.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redis_cpu: Option<Stat>,
    /// Events that came to an error and were acknowledged all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<Stat>,
    /// Of `standpipe worker`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessFigures>,
}

/// What `standpipe worker` itself needs.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessFigures {
    /// Seconds per 100,000 events, its start included.
    pub cpu: Stat,
    /// Events per processor second.
    pub events_per_cpu_second: Stat,
    /// The most that it had resident.
    pub peak_memory_bytes: Stat,
    /// From its start to `/readyz` with 200, on a migrated database and with all the events waiting.
    pub ready_ms: Stat,
}

/// A long stream to begin with.
#[derive(Clone, Debug, Serialize)]
pub struct Backlog {
    /// `TRANSACTION`.
    pub mode: &'static str,
    /// Stream entries.
    pub events: u64,
    /// How fast they went.
    pub events_per_second: f64,
    /// The most that the process had resident.
    pub peak_memory_bytes: u64,
    /// From its start to `/readyz` with 200.
    pub ready_ms: f64,
}

const MEBI: f64 = 1_048_576.0;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_head(f)?;
        for throughput in &self.throughput {
            write!(f, "\n{throughput}")?;
        }
        if !self.latency.is_empty() {
            self.write_latency(f)?;
        }
        if let Some(reader) = &self.reader {
            write!(f, "\n{reader}")?;
        }
        if !self.backlog.is_empty() {
            writeln!(f, "\nwith a backlog")?;
            for backlog in &self.backlog {
                writeln!(
                    f,
                    "  {:<6} {} events at {:.0} events/s, at most {:.1} MiB resident, ready after {:.0} ms",
                    backlog.mode,
                    backlog.events,
                    backlog.events_per_second,
                    backlog.peak_memory_bytes as f64 / MEBI,
                    backlog.ready_ms,
                )?;
            }
        }
        for sweep in &self.sweeps {
            writeln!(f, "\nevents/s by {}, TRANSACTION={}", sweep.factor.replace('_', " "), sweep.mode)?;
            for point in &sweep.points {
                writeln!(f, "  {:>9} {}", point.value, Shown(point.events_per_second, 0))?;
            }
        }
        for note in &self.notes {
            writeln!(f, "\nmind: {note}")?;
        }
        Ok(())
    }
}

impl Report {
    fn write_head(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (machine, servers, workload) = (&self.machine, &self.servers, &self.workload);
        writeln!(
            f,
            "standpipe {}{} on {} cores of {}, {:.0} GiB, Linux {}",
            self.version,
            if self.release_build { "" } else { " (NOT a release build)" },
            machine.cores,
            machine.cpu,
            machine.memory_bytes as f64 / MEBI / 1024.0,
            machine.kernel,
        )?;
        writeln!(
            f,
            "{} (append-only file, flushed every second), PostgreSQL {} ({}); one flush alone {:.2} ms",
            servers.redis,
            servers.postgresql,
            servers.postgresql_settings.join(", "),
            servers.flush_ms,
        )?;
        writeln!(
            f,
            "{} events of {:.0} bytes, seed {}, {} accounts; medians of {} rounds (lowest to highest){}",
            workload.events,
            workload.event_bytes,
            workload.seed,
            workload.accounts,
            workload.rounds,
            if workload.settings.is_empty() {
                "; defaults".to_owned()
            } else {
                format!("; {}", workload.settings.join(" "))
            },
        )
    }

    fn write_latency(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nlatency from XADD, ms{:>17}{:>27}{:>27}{:>27}", "events/s", "p50", "p99", "p99.9")?;
        for latency in &self.latency {
            for (what, of) in [("commit", &latency.commit_ms), ("on disk", &latency.durable_ms)] {
                writeln!(
                    f,
                    "  {:<20}{:>17.0}{:>27}{:>27}{:>27}",
                    format!("{}, {what}", latency.mode),
                    latency.rate.median,
                    Shown(of.p50, 2).to_string(),
                    Shown(of.p99, 2).to_string(),
                    Shown(of.p99_9, 2).to_string(),
                )?;
            }
        }
        Ok(())
    }
}

impl Throughput {
    /// A figure of each variant, with its name.
    pub(super) fn bars(&self, figure: impl Fn(&VariantFigures) -> Stat) -> Vec<(String, Stat)> {
        self.variants.iter().map(|variant| (variant.name.replace('_', " "), figure(variant))).collect()
    }

    /// Its names in files and for people.
    pub(super) fn names(&self) -> (String, String) {
        let spread = if self.network == LIVELY { "" } else { "-spread" };
        (format!("{}{spread}", self.tables), format!("{}, {} tables", self.network, self.tables))
    }
}

impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}, {} tables ({} rows of {:.0} bytes); per 100,000 events:",
            self.network,
            self.tables,
            self.rows,
            self.row_bytes as f64 / self.rows.max(1) as f64,
        )?;
        writeln!(
            f,
            "  {:<29}{:>22}{:>12}{:>25}{:>9}{:>9}{:>9}{:>13}{:>14}{:>10}",
            "",
            "PostgreSQL by COPY",
            "PostgreSQL",
            "events/s",
            "Redis",
            "ours",
            "WAL",
            "connections",
            "memory",
            "ready"
        )?;
        for variant in &self.variants {
            let dash = || "-".to_owned();
            let seconds = |stat: &Stat| format!("{:.2} s", stat.median);
            let process = variant.process.as_ref();
            writeln!(
                f,
                "  {:<29}{:>22}{:>12}{:>25}{:>9}{:>9}{:>9}{:>13}{:>14}{:>10}",
                variant.name.replace('_', " "),
                Shown(variant.postgres_by_copy, 2).to_string(),
                seconds(&variant.postgres_cpu),
                Shown(variant.events_per_second, 0).to_string(),
                variant.redis_cpu.as_ref().map_or_else(dash, seconds),
                process.map_or_else(dash, |process| seconds(&process.cpu)),
                format!("{:.0} MB", variant.wal_bytes.median / 1e6),
                variant.connections,
                process.map_or_else(dash, |process| {
                    format!("{:.1} MiB", process.peak_memory_bytes.median / MEBI)
                }),
                process.map_or_else(dash, |process| format!("{:.0} ms", process.ready_ms.median)),
            )?;
        }
        for variant in &self.variants {
            if let Some(process) = &variant.process {
                writeln!(
                    f,
                    "  {}: {:.0} events per CPU second of ours",
                    variant.name.replace('_', " "),
                    process.events_per_cpu_second.median
                )?;
            }
            if let Some(errors) = variant.errors.filter(|errors| errors.max > 0.0) {
                writeln!(f, "  {}: {:.0} events came to an error", variant.name, errors.median)?;
            }
        }
        let ratios: Vec<String> =
            self.ratios.iter().map(|(name, ratio)| format!("{name} {ratio:.2}")).collect();
        writeln!(f, "  {}", ratios.join("   "))
    }
}

impl fmt::Display for ReaderFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "reader ({} frames of {:.0} bytes; relay, reader and Redis share the cores)",
            self.frames, self.frame_bytes
        )?;
        writeln!(f, "  frames/s                     {}", Shown(self.frames_per_second, 0))?;
        writeln!(f, "  frames/s and core of ours    {}", Shown(self.frames_per_cpu_second, 0))?;
        writeln!(
            f,
            "  CPU per frame                ours {:.1} us, relay {:.1} us, Redis {:.1} us",
            self.cpu_us_per_frame.median,
            self.relay_cpu_us_per_frame.median,
            self.redis_cpu_us_per_frame.median
        )?;
        writeln!(f, "  memory                       {:.1} MiB", self.peak_memory_bytes.median / MEBI)?;
        let verified = &self.verified;
        writeln!(
            f,
            "  with VERIFY=on               {:.0} frames/s; CPU per frame ours {:.1} us ({:.1} more, \
             or {:.2} of a core at 2,000 frames/s), Redis {:.1} us more; memory {:.1} MiB",
            verified.frames_per_second.median,
            verified.cpu_us_per_frame.median,
            verified.more_cpu_us_per_frame.median,
            verified.more_cpu_us_per_frame.median * 2000.0 / 1e6,
            verified.more_redis_cpu_us_per_frame.median,
            verified.peak_memory_bytes.median / MEBI
        )
    }
}

/// A figure with its range, to this many places.
struct Shown(Stat, usize);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(stat, places) = self;
        write!(f, "{:.places$} ({:.places$} to {:.places$})", stat.median, stat.min, stat.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_holds_median_minimum_and_maximum() {
        let stat = |values: &[f64]| values.iter().copied().collect::<Stat>();
        assert_eq!(stat(&[3.0, 1.0, 2.0]), Stat { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(stat(&[4.0, 1.0]).median, 2.5);
        assert_eq!(stat(&[]), Stat::default());
    }
}
