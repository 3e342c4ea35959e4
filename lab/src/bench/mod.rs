//! `standpipe-lab bench`: standpipe's speed and what it costs, compared with the best this machine could do and with a
//! loop in the style of the Python worker.
//!
//! Private servers, one prepared stream, the real binary as a child process with its defaults. The variants take turns,
//! several rounds of them, each on a fresh database and after a checkpoint; medians are quoted.
//!
//! - `lab`, `postgres`, `stream`, `program`, `machine`: the servers, the stream, the child process, what each needs
//! - `worker`: `standpipe worker` until it has drained the stream
//! - `floor`: COPY of the same rows
//! - `reference`: the loop in the shape of the Python worker
//! - `latency`, `reader`, `sweep`: the other things that are measured
//! - `distance`: a database that is further away
//! - `report`, `svg`: the figures

mod distance;
mod floor;
mod lab;
mod latency;
pub mod machine;
mod postgres;
mod program;
mod reader;
mod reference;
mod report;
mod stream;
pub mod svg;
mod sweep;
mod worker;

use std::collections::BTreeMap;

use anyhow::Result;

use floor::{Copying, Rows};
use lab::{Cost, Lab};
use machine::Machine;
use reference::Reference;
pub use report::Report;
use report::{Backlog, ProcessFigures, Servers, Stat, Throughput, VariantFigures, Workload};
use standpipe::config::{self, Role};
use standpipe::out;
use stream::Prepared;
use worker::Drained;

/// The database of the workers that standpipe replaces.
const EXISTING_TABLES: &str = include_str!("../../sql/existing.sql");
/// The database to start from that has our own tables.
const OWN: &str = "own";
/// The one that has those of the workers that we replace.
const EXISTING: &str = "existing";
/// The network in which a few accounts are very busy.
const LIVELY: &str = "a lively network";
/// The one in which all are alike.
const SPREAD: &str = "events spread over 200,000 accounts";
/// If other programs used a larger share of the processors than this, the report mentions it.
const ELSEWHERE: f64 = 0.1;
/// Figures are given per this many events.
const PER: f64 = 100_000.0;

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Stream entries of a run.
    pub events: u64,
    /// Runs of each variant.
    pub rounds: u32,
    /// Of the simulated network.
    pub seed: u64,
    /// Of the simulated network.
    pub accounts: u32,
    /// Events per second while latency is measured.
    pub rate: u32,
    /// Also drain a stream of this many entries.
    pub backlog: Option<u64>,
    /// Vary table sizes, pipelines and batch sizes as well.
    pub sweep: bool,
    /// Measure on the tables and indexes of the workers that we replace as well.
    pub existing: bool,
    /// Measure on a network whose events are spread over many accounts as well.
    pub spread: bool,
    /// Only these modes, without the other variants; all when empty.
    pub modes: Vec<String>,
    /// Only these; all when empty.
    pub only: Vec<Part>,
    /// Settings of the private PostgreSQL, on top of the usual ones.
    pub postgres_settings: Vec<(String, String)>,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Events per second, beside floor and reference.
    Throughput,
    /// From XADD to commit.
    Latency,
    /// Frames per second.
    Reader,
}

/// What is measured in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Floor,
    Worker { name: &'static str, mode: &'static str, notifications: bool },
    Reference,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Worker { name, .. } => name,
            Self::Reference => "reference",
        }
    }
}

/// How one run of a variant went.
struct Run {
    seconds: f64,
    cost: Cost,
    errors: Option<u64>,
    process: Option<Drained>,
}

/// Measures; reports progress on the standard error.
///
/// # Errors
///
/// A server cannot be started, or something that is measured fails.
pub async fn bench(options: &BenchOptions) -> Result<Report> {
    out::note("starting a private Redis and a private PostgreSQL ...");
    let mut lab = Lab::start(options).await?;
    lab.postgres.make_template(OWN, "").await?;
    out::note(format_args!("preparing {} events ...", options.events));
    let network = stream::network(options.seed, options.accounts);
    let collections = lab.config.collections.clone();
    let prepared = lab.streams.prepare("prepared", &network, &collections, options.events).await?;

    let mut notes = Vec::new();
    let mut modes = vec!["event"];
    match batch_mode() {
        Ok(()) => modes.push("batch"),
        Err(reason) => notes.push(format!("TRANSACTION=batch is not available: {reason}")),
    }
    modes.retain(|mode| options.modes.is_empty() || options.modes.iter().any(|wanted| wanted == mode));
    let mut report = describe(&mut lab, &prepared, options, notes).await?;
    let wants = |part| options.only.is_empty() || options.only.contains(&part);
    if wants(Part::Throughput) {
        let mut subjects = vec![Subject { network: LIVELY, prepared: prepared.clone(), template: OWN }];
        if options.existing {
            lab.postgres.make_template(EXISTING, EXISTING_TABLES).await?;
            subjects.push(Subject { network: LIVELY, prepared: prepared.clone(), template: EXISTING });
        }
        if options.spread {
            let network = stream::spread_network(options.seed);
            let prepared = lab.streams.prepare("spread", &network, &collections, options.events).await?;
            subjects.push(Subject { network: SPREAD, prepared, template: OWN });
        }
        for subject in subjects {
            let figures = throughput(&mut lab, &subject, options, &modes, &mut report.notes).await?;
            report.throughput.push(figures);
        }
    }
    if wants(Part::Latency) {
        report.latency = latencies(&mut lab, options, &modes).await?;
    }
    if wants(Part::Reader) {
        out::note("the reader ...");
        report.reader = Some(reader::measure(&mut lab, options).await?);
    }
    if let Some(events) = options.backlog {
        out::note(format_args!("preparing a backlog of {events} events ..."));
        let long = lab.streams.prepare("backlog", &network, &collections, events).await?;
        for mode in &modes {
            report.backlog.push(backlog(&mut lab, &long, mode).await?);
        }
        lab.streams.forget(long).await?;
    }
    if options.sweep {
        report.sweeps = sweep::sweep(&mut lab, &prepared, options, &modes).await?;
    }
    Ok(report)
}

/// What is measured, and on what.
async fn describe(
    lab: &mut Lab,
    prepared: &Prepared,
    options: &BenchOptions,
    notes: Vec<String>,
) -> Result<Report> {
    let (version, settings) = lab.postgres.describe().await?;
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        release_build: !cfg!(debug_assertions),
        machine: Machine::this(),
        servers: Servers {
            redis: lab.streams.version().await?,
            postgresql: version,
            postgresql_settings: settings,
            flush_ms: lab.postgres.flush_ms().await?,
        },
        workload: Workload {
            events: prepared.entries,
            event_bytes: prepared.entry_bytes,
            seed: options.seed,
            accounts: options.accounts,
            rounds: options.rounds,
            settings: lab.tuning.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        },
        throughput: Vec::new(),
        latency: Vec::new(),
        reader: None,
        backlog: Vec::new(),
        sweeps: Vec::new(),
        notes,
    })
}

async fn latencies(
    lab: &mut Lab,
    options: &BenchOptions,
    modes: &[&'static str],
) -> Result<Vec<latency::Latency>> {
    out::note(format_args!("latency at {} events/s ...", options.rate));
    let postgres = latency::server(lab.folder().path(), options).await?;
    let mut rounds: Vec<Vec<latency::Round>> = modes.iter().map(|_| Vec::new()).collect();
    for number in 1..=options.rounds {
        for (rounds, mode) in rounds.iter_mut().zip(modes) {
            out::note(format_args!("  {mode}, round {number}"));
            rounds.push(latency::round(lab, &postgres, options, mode).await?);
        }
    }
    let figures = modes.iter().zip(&mut rounds);
    Ok(figures.map(|(mode, rounds)| latency::figures(mode, rounds)).collect())
}

/// Whether the program that is measured, which is this one, has the batch mode.
fn batch_mode() -> Result<(), config::ConfigError> {
    let variables = [("DATABASE_URL", "postgres://localhost/standpipe"), ("TRANSACTION", "batch")];
    config::from_env(variables, Role::Worker).map(drop)
}

/// What the variants work on.
struct Subject {
    network: &'static str,
    prepared: Prepared,
    /// The database to start from.
    template: &'static str,
}

/// Every variant in turn.
async fn throughput(
    lab: &mut Lab,
    subject: &Subject,
    options: &BenchOptions,
    modes: &[&'static str],
    notes: &mut Vec<String>,
) -> Result<Throughput> {
    let Subject { network, prepared, template } = subject;
    out::note(format_args!("{network}, {template} tables; once to take the rows and not to count ..."));
    let database = lab.postgres.fresh(template).await?;
    worker::drain(lab, prepared, &database, &[]).await?;
    let rows = floor::take_rows(&database, &lab.postgres.url(template)).await?;

    let mut variants = vec![Variant::Floor];
    for mode in modes.iter().copied() {
        variants.push(Variant::Worker { name: mode, mode, notifications: true });
    }
    if options.modes.is_empty() {
        variants.push(Variant::Reference);
    }
    for mode in modes.iter().copied().filter(|_| options.modes.is_empty()) {
        let name =
            if mode == "batch" { "batch_without_notifications" } else { "event_without_notifications" };
        variants.push(Variant::Worker { name, mode, notifications: false });
    }
    let mut runs: Vec<Vec<Run>> = variants.iter().map(|_| Vec::new()).collect();
    for round in 0..options.rounds as usize {
        // Nobody always comes first, or always after the same one's checkpoint and cleaning up.
        for turn in 0..variants.len() {
            let place = (turn + round) % variants.len();
            let run = run(lab, prepared, &rows, variants[place], template).await?;
            let rate = prepared.entries as f64 / run.seconds;
            out::note(format_args!("  {}, round {}: {rate:.0} events/s", variants[place].name(), round + 1));
            runs[place].push(run);
        }
    }
    let floor = runs.first().map_or(&[][..], Vec::as_slice);
    let variants: Vec<_> = variants
        .iter()
        .zip(&runs)
        .map(|(variant, runs)| figures(variant.name(), runs, floor, prepared.entries as f64))
        .collect();
    let most = variants.iter().map(|variant| variant.elsewhere.max).fold(0.0, f64::max);
    if most > ELSEWHERE {
        notes.push(format!(
            "while it was measured on {template} tables ({network}), up to {:.0} % of the processors went to other programs: the \
             figures are lower than they should be, and ratios are not what they would be",
            most * 100.0
        ));
    }
    Ok(Throughput {
        network,
        tables: template,
        rows: rows.count,
        row_bytes: rows.bytes,
        ratios: ratios(&variants),
        variants,
    })
}

async fn run(
    lab: &mut Lab,
    prepared: &Prepared,
    rows: &Rows,
    variant: Variant,
    template: &str,
) -> Result<Run> {
    let database = lab.postgres.fresh(template).await?;
    Ok(match variant {
        Variant::Floor => {
            let copying = Copying::open(&database).await?;
            let (seconds, cost) = lab.metered(copying.copy(rows)).await?;
            Run { seconds, cost, errors: None, process: None }
        }
        Variant::Reference => {
            let reference = Reference::open(lab, prepared, &database).await?;
            let (done, cost) = lab.metered(reference.run()).await?;
            Run { seconds: done.seconds, cost, errors: Some(done.errors), process: None }
        }
        Variant::Worker { mode, notifications, .. } => {
            let notifications = if notifications { "true" } else { "false" };
            let special = [("TRANSACTION", mode), ("NOTIFICATIONS", notifications)];
            let (drained, cost) = worker::drain(lab, prepared, &database, &special).await?;
            Run { seconds: drained.seconds, cost, errors: None, process: Some(drained) }
        }
    })
}

/// `floor`: COPY in the same rounds.
fn figures(name: &'static str, runs: &[Run], floor: &[Run], events: f64) -> VariantFigures {
    let each = |of: &dyn Fn(&Run) -> f64| runs.iter().map(of).collect::<Stat>();
    let processes: Vec<Drained> = runs.iter().filter_map(|run| run.process).collect();
    let each_process = |of: &dyn Fn(&Drained) -> f64| processes.iter().map(of).collect::<Stat>();
    VariantFigures {
        name,
        events_per_second: each(&|run| events / run.seconds),
        postgres_cpu: each(&|run| run.cost.postgres_cpu / events * PER),
        postgres_by_copy: runs
            .iter()
            .zip(floor)
            .map(|(run, floor)| run.cost.postgres_cpu / floor.cost.postgres_cpu)
            .collect(),
        wal_bytes: each(&|run| run.cost.wal_bytes / events * PER),
        connections: runs.iter().map(|run| run.cost.connections).max().unwrap_or(0),
        elsewhere: each(&|run| {
            let ours = run.process.map_or(0.0, |process| process.cpu);
            let all = run.cost.seconds * std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
            ((run.cost.other_cpu - ours) / all).clamp(0.0, 1.0)
        }),
        redis_cpu: (name != "floor").then(|| each(&|run| run.cost.redis_cpu / events * PER)),
        errors: (name == "reference").then(|| each(&|run| run.errors.unwrap_or(0) as f64)),
        process: (!processes.is_empty()).then(|| ProcessFigures {
            cpu: each_process(&|process| process.cpu / events * PER),
            events_per_cpu_second: each_process(&|process| events / process.cpu),
            peak_memory_bytes: each_process(&|process| process.peak_memory as f64),
            ready_ms: each_process(&|process| process.ready_ms),
        }),
    }
}

/// Each mode by the floor and by the reference loop, with all that is on by default.
fn ratios(variants: &[VariantFigures]) -> BTreeMap<String, f64> {
    let rate = |name| {
        let found = variants.iter().find(|variant| variant.name == name)?;
        Some(found.events_per_second.median)
    };
    let mut ratios = BTreeMap::new();
    for (above, below) in
        [("event", "floor"), ("batch", "floor"), ("event", "reference"), ("batch", "reference")]
    {
        if let (Some(a), Some(b)) = (rate(above), rate(below)) {
            ratios.insert(format!("{above}/{below}"), a / b);
        }
    }
    ratios
}

async fn backlog(lab: &mut Lab, prepared: &Prepared, mode: &'static str) -> Result<Backlog> {
    let database = lab.postgres.fresh(OWN).await?;
    let (drained, _) = worker::drain(lab, prepared, &database, &[("TRANSACTION", mode)]).await?;
    let rate = prepared.entries as f64 / drained.seconds;
    out::note(format_args!("  {mode}: {rate:.0} events/s"));
    Ok(Backlog {
        mode,
        events: prepared.entries,
        events_per_second: rate,
        peak_memory_bytes: drained.peak_memory,
        ready_ms: drained.ready_ms,
    })
}
