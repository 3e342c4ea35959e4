//! The subcommands.

mod generate;
mod status;

use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};
use standpipe::bench::{self, BenchOptions, Part};
use standpipe::config::{Config, LogFormat, LogLevel, Role, VARIABLES, no_colour};
use standpipe::control::{Control, SetLevel};
use standpipe::dead_letters::{Filter, Retried, Walk};
use standpipe::demo::{self, DemoOptions};
use standpipe::event::Reason;
use standpipe::relay::simulate::{self, NetworkOptions, RelayOptions, Source};
use standpipe::run::{self, Parts};
use standpipe::store::migrate::undo;
use standpipe::store::{Store, audit, migrate};
use standpipe::stream::dead_letters as stream_letters;
use standpipe::stream::{Keys, Redis};
use standpipe::{dead_letters, doctor, http, metrics, out};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Bad command line or configuration (sysexits.h).
pub const EX_USAGE: u8 = 64;
/// A required service cannot be reached (sysexits.h).
pub const EX_UNAVAILABLE: u8 = 69;

/// The AT Protocol firehose into a Redis stream and, through N consumer-group pipelines, into PostgreSQL: one
/// transaction per event, nothing lost, nothing counted twice.
///
/// Settings come from the environment; `standpipe help-env` lists them.
#[derive(Debug, Parser)]
#[command(version = env!("STANDPIPE_VERSION"), about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Reader and pipelines in one process
    Run,
    /// Only the reader: relay -> Redis stream
    Reader,
    /// Only the pipelines: Redis stream -> PostgreSQL
    Worker,
    /// Create or upgrade the tables while others work with them (also done at start unless `AUTO_MIGRATE=false`)
    Migrate(Migrate),
    /// Check configuration, Redis, PostgreSQL, permissions and settings; report problems and remedies
    Check {
        /// Print JSON, on one line
        #[arg(long)]
        json: bool,
    },
    /// Stream, group, pipelines, waiting and pending entries, dead letters
    Status(status::Options),
    /// Inspect, retry or purge events that could not be applied
    DeadLetters {
        #[command(subcommand)]
        action: DeadLetters,
    },
    /// Recount every counter and feed item from the rows; exit 0 when all agree
    Audit {
        /// Repair the differences, then check again
        #[arg(long)]
        repair: bool,
    },
    /// A simulated relay: real websocket frames, deterministic, honours ?cursor=
    Simulate(Simulate),
    /// The whole chain with private servers and a simulated relay, to watch
    Demo(Demo),
    /// Measure throughput, latency and memory on private servers, next to the limits of the machine
    Bench(Bench),
    /// Pause, resume or drain the running process, or change its log level; uses `HTTP_ADDR` and `ADMIN_TOKEN`
    Control {
        #[command(subcommand)]
        action: ControlAction,
    },
    /// Exit 0 if the running process is ready, or only paused by an operator
    Healthcheck,
    /// List the environment variables
    HelpEnv,
    /// Print a shell completion script
    Completions {
        /// The shell
        shell: generate::Shell,
    },
    /// Print the manual page, or write one for each command into a folder
    Man {
        /// The folder; created if missing
        #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
        folder: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub enum ControlAction {
    /// Finish the work in hand, then read nothing more until resumed or restarted
    Pause {
        /// What to pause
        #[arg(value_parser = ["reader", "pipelines", "all"], default_value = "all")]
        part: String,
    },
    /// Resume
    Resume {
        /// What to resume
        #[arg(value_parser = ["reader", "pipelines", "all"], default_value = "all")]
        part: String,
    },
    /// Set the log level until the next start
    LogLevel {
        /// The level
        #[arg(value_parser = ["DEBUG", "INFO", "WARNING", "ERROR"], ignore_case = true)]
        level: String,
    },
    /// Finish the work in hand and exit, as on SIGTERM
    Drain,
}

#[derive(Debug, Subcommand)]
pub enum DeadLetters {
    /// List dead letters, oldest first
    List {
        #[command(flatten)]
        which: Which,
        /// Maximum number to list
        #[arg(long, default_value_t = 100)]
        limit: usize,
        /// One JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Show one: its error, its origin and its operation, with long lines cut
    Show {
        /// Its id
        id: String,
        /// Print all of it, as JSON
        #[arg(long)]
        json: bool,
    },
    /// Apply them again; those that succeed are removed
    Retry {
        #[command(flatten)]
        which: Which,
        /// All that match; required when no ids are given
        #[arg(long)]
        all: bool,
    },
    /// Delete them
    Purge {
        #[command(flatten)]
        which: Which,
        /// All that match; required when no ids are given
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Migrate {
    /// Print the steps and their locks; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Restore a database that was taken over, so that the earlier workers can run again
    #[arg(long)]
    undo: bool,
    /// Undo without asking
    #[arg(long, requires = "undo")]
    yes: bool,
}

#[derive(Debug, clap::Args)]
pub struct Which {
    /// Their ids
    ids: Vec<String>,
    /// The reason class
    #[arg(long, value_parser = PossibleValuesParser::new(Reason::ALL.map(Reason::name)))]
    reason: Option<String>,
    /// A type (commit, identity, account) or a collection such as app.bsky.feed.like
    #[arg(long)]
    kind: Option<String>,
    /// With this text in the message, the record, the repository or an id; case does not matter
    #[arg(long)]
    text: Option<String>,
    /// Tried within this time, such as 1h or 2d
    #[arg(long, value_parser = humantime::parse_duration)]
    since: Option<Duration>,
}

#[derive(Debug, clap::Args)]
pub struct Simulate {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:2470")]
    listen: SocketAddr,
    /// Total number of frames; 0 for endless
    #[arg(long, default_value_t = 0, conflicts_with = "frames")]
    events: u64,
    /// Frames per second and connection; unlimited by default
    #[arg(long, value_parser = parse_rate)]
    rate: Option<u32>,
    /// The same seed gives the same frames
    #[arg(long, default_value_t = 1, conflicts_with = "frames")]
    seed: u64,
    /// Accounts of the network
    #[arg(long, default_value_t = 10_000, conflicts_with = "frames")]
    accounts: u32,
    /// Also delete accounts
    #[arg(long, conflicts_with = "frames")]
    deletions: bool,
    /// Filler bytes per commit, to imitate the size of real frames
    #[arg(long, default_value_t = 0, conflicts_with = "frames")]
    pad: usize,
    /// Serve a recorded file instead: 4-byte big-endian length and message, repeated
    #[arg(long, value_name = "FILE")]
    frames: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct Demo {
    /// Stop after this many events, audit the database and exit 0 or 1
    #[arg(long)]
    events: Option<u64>,
    /// Events per second; 1500 by default, unlimited with --events
    #[arg(long, value_parser = parse_rate)]
    rate: Option<u32>,
    /// The same seed gives the same events
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Accounts of the network
    #[arg(long, default_value_t = 10_000)]
    accounts: u32,
}

#[derive(Debug, clap::Args)]
pub struct Bench {
    /// Stream entries of a run
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1000..))]
    events: u64,
    /// Runs of each variant; medians are reported
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The same seed gives the same events
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Accounts of the network
    #[arg(long, default_value_t = 10_000)]
    accounts: u32,
    /// Events per second while latency is measured
    #[arg(long, default_value = "1000", value_parser = parse_rate)]
    rate: u32,
    /// Also drain a stream of this many entries to measure memory (such as 500000)
    #[arg(long, value_name = "EVENTS", value_parser = clap::value_parser!(u64).range(1..))]
    backlog: Option<u64>,
    /// Also vary table sizes (empty, 1 and 5 million rows), pipelines, batch sizes, PostgreSQL's network latency and disk
    /// speed; takes long
    #[arg(long)]
    sweep: bool,
    /// Also measure on the tables and indexes of the workers before standpipe
    #[arg(long)]
    existing: bool,
    /// Only these parts: throughput, latency, reader
    #[arg(long, value_name = "PART", value_delimiter = ',', value_parser = parse_part)]
    only: Vec<Part>,
    /// A setting of the private PostgreSQL, such as `shared_buffers=1GB`; may be given more than once
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_setting)]
    postgres: Vec<(String, String)>,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    /// Write plots into this folder
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

fn parse_part(text: &str) -> Result<Part, String> {
    match text {
        "throughput" => Ok(Part::Throughput),
        "latency" => Ok(Part::Latency),
        "reader" => Ok(Part::Reader),
        _ => Err("write throughput, latency or reader".to_owned()),
    }
}

fn parse_setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// `1000` or `1000/s`.
fn parse_rate(text: &str) -> Result<u32, String> {
    match text.trim_end_matches("/s").parse() {
        Ok(0) => Err("a rate of 0 would never send anything".to_owned()),
        Ok(rate) => Ok(rate),
        Err(_) => Err("write a number of frames per second, such as 1000 or 1000/s".to_owned()),
    }
}

/// Runs the command.
///
/// # Errors
///
/// The command failed; configuration errors and unreachable services have exit codes of their own.
pub async fn execute(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run => serve(Parts::All, Role::All).await,
        Command::Reader => serve(Parts::Reader, Role::Reader).await,
        Command::Worker => serve(Parts::Worker, Role::Worker).await,
        Command::Migrate(options) => {
            with_config(Role::Worker, async move |config| migrate_database(config, &options).await).await
        }
        Command::Check { json } => check(json).await,
        Command::Status(options) => {
            with_config(Role::Tool, async move |config| status::status(config, options).await).await
        }
        Command::DeadLetters { action } => {
            with_config(Role::Tool, async move |config| letters(config, action).await).await
        }
        Command::Audit { repair } => {
            with_config(Role::Worker, async move |config| audit_database(config, repair).await).await
        }
        Command::Simulate(options) => simulate(options).await,
        Command::Demo(options) => demonstrate(options).await,
        Command::Bench(options) => benchmark(options).await,
        Command::Control { action } => {
            with_config(Role::Tool, async move |config| control(config, &action).await).await
        }
        Command::Healthcheck => with_config(Role::Tool, healthcheck).await,
        Command::HelpEnv => {
            help_env()?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Completions { shell } => generate::completions(shell),
        Command::Man { folder } => generate::man(folder.as_deref()),
    }
}

/// Reads the environment; reports every mistake.
fn load(role: Role) -> Result<(Config, Vec<String>), ExitCode> {
    standpipe::config::from_env(std::env::vars_os(), role).map_err(|error| unusable(&error))
}

/// Reports what is wrong with the configuration.
fn unusable(error: &standpipe::config::ConfigError) -> ExitCode {
    out::note("standpipe: the configuration cannot be used:");
    for line in error.to_string().lines() {
        out::note(format_args!("  {line}"));
    }
    // It may be the cause.
    for warning in &error.warnings {
        out::note(format_args!("  warning: {warning}"));
    }
    ExitCode::from(EX_USAGE)
}

async fn with_config(role: Role, work: impl AsyncFnOnce(Config) -> Result<ExitCode>) -> Result<ExitCode> {
    match load(role) {
        Ok((config, warnings)) => {
            for warning in warnings {
                out::note(format_args!("standpipe: {warning}"));
            }
            work(config).await
        }
        Err(code) => Ok(code),
    }
}

async fn serve(parts: Parts, role: Role) -> Result<ExitCode> {
    let (config, warnings) = match load(role) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let set_level = init_logging(&config)?;
    for warning in warnings {
        warn!("{warning}");
    }
    for line in config.describe() {
        debug!("{line}");
    }
    let handle = metrics::install().context("metrics")?;
    run::run(config, parts, handle, Control::new(Some(set_level))).await
}

/// Starts logging; returns the handle that changes the level.
fn init_logging(config: &Config) -> Result<SetLevel> {
    // Below a warning only our own messages are of interest. The pipelines report broken connections better than the pool.
    let at = |level: LogLevel| {
        EnvFilter::new(format!("warn,deadpool.postgres=error,standpipe={}", level.as_filter()))
    };
    let filter = match &config.rust_log {
        Some(filter) => filter.parse::<EnvFilter>().context("RUST_LOG")?,
        None => at(config.log_level),
    };
    let (filter, reload) = tracing_subscriber::reload::Layer::new(filter);
    let layer = tracing_subscriber::fmt::layer().with_target(false).with_writer(std::io::stderr);
    // A closed log is not a reason to exit: reporting it on the same output would panic.
    let layer = layer.log_internal_errors(false);
    match config.log_format {
        LogFormat::Json => {
            tracing_subscriber::registry().with(filter).with(layer.json().flatten_event(true)).init();
        }
        LogFormat::Text => {
            let layer = layer.with_ansi(std::io::stderr().is_terminal() && !no_colour());
            tracing_subscriber::registry().with(filter).with(layer).init();
        }
    }
    Ok(Box::new(move |level| reload.reload(at(level)).map_err(|error| error.to_string())))
}

async fn migrate_database(config: Config, options: &Migrate) -> Result<ExitCode> {
    let store = Store::new(&config)?;
    let mut session = match store.session().await {
        Ok(session) => session,
        Err(error) => return Ok(unavailable("PostgreSQL", &error)),
    };
    let say = &mut |line: &str| out::note(format_args!("{line}"));
    if options.undo {
        let plan = undo::plan(session.client()).await?;
        if options.dry_run || !options.yes {
            out::line(plan)?;
        }
        if options.dry_run {
            return Ok(ExitCode::SUCCESS);
        }
        if !options.yes {
            match confirm("Undo?") {
                Some(true) => {}
                Some(false) => return Ok(ExitCode::FAILURE),
                None => {
                    out::note("standpipe: nothing was changed: no terminal to ask at; add --yes");
                    return Ok(ExitCode::from(EX_USAGE));
                }
            }
        }
        undo::undo(session.client(), say).await?;
        out::line("done: the database is as it was; `standpipe migrate` takes it over again")?;
        return Ok(ExitCode::SUCCESS);
    }
    if options.dry_run {
        out::line(migrate::plan(session.client()).await?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let done = migrate::migrate_and_say(session.client_mut(), say).await?;
    if done.is_empty() {
        out::line(format_args!("nothing to do: the database is at version {}", migrate::wanted()))?;
    }
    for name in done {
        out::line(format_args!("done: {name}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks the person at the terminal; `None` when there is none.
fn confirm(question: &str) -> Option<bool> {
    if !std::io::stdin().is_terminal() {
        return None;
    }
    let _ = write!(std::io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).ok()?;
    Some(matches!(answer.trim(), "y" | "Y" | "yes"))
}

async fn check(json: bool) -> Result<ExitCode> {
    let (config, warnings) = match load(Role::Tool) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let examination = doctor::check(&config, &warnings).await;
    if json {
        out::unless_closed(out::line(out::safe_json(&serde_json::to_string(&examination)?)))?;
    } else {
        let terminal = std::io::stdout().is_terminal();
        let columns = terminal_size::terminal_size_of(std::io::stdout()).map(|(columns, _)| columns.0.into());
        let page = examination.page(terminal && !no_colour(), columns) + "\n";
        out::unless_closed(out::raw(&page))?;
    }
    Ok(match examination.verdict {
        doctor::Verdict::Healthy => ExitCode::SUCCESS,
        doctor::Verdict::Unhealthy => ExitCode::FAILURE,
        doctor::Verdict::Unreachable => ExitCode::from(EX_UNAVAILABLE),
    })
}

async fn audit_database(config: Config, repair: bool) -> Result<ExitCode> {
    let store = Store::new(&config)?;
    let mut session = match store.session().await {
        Ok(session) => session,
        Err(error) => return Ok(unavailable("PostgreSQL", &error)),
    };
    let say = &mut |line: &str| out::note(format_args!("{line}"));
    if repair {
        for repaired in audit::repair_and_say(session.client_mut(), say).await? {
            if repaired.count > 0 {
                out::line(format_args!("{:>12}  repaired: {}", repaired.count, repaired.rule))?;
            }
        }
    }
    let findings = audit::audit_and_say(session.client_mut(), say).await?;
    for finding in &findings {
        out::unless_closed(out::line(finding))?;
    }
    let clean = findings.iter().all(|finding| finding.count == 0);
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn letters(config: Config, action: DeadLetters) -> Result<ExitCode> {
    let redis = Redis::open(&config).context("REDIS_URL")?;
    let keys = Keys::new(&config);
    let mut connection = match redis.connect().await {
        Ok(connection) => connection,
        Err(error) => return Ok(unavailable("Redis", &error)),
    };
    let filter = |which: Which| Filter {
        ids: which.ids,
        reason: which.reason,
        kind: which.kind,
        text: which.text,
        since: which.since,
    };
    match action {
        DeadLetters::List { which, limit, json } => {
            let mut walk = Walk::new(&mut connection, &keys, filter(which)).await?;
            let mut listed = 0;
            while let Some(page) = walk.next(&mut connection, &keys).await? {
                for letter in page.iter().take(limit - listed) {
                    listed += 1;
                    if json {
                        out::line(out::safe_json(&serde_json::to_string(letter)?))?;
                    } else {
                        out::line(dead_letters::line(letter))?;
                    }
                }
                if listed == limit {
                    break;
                }
            }
            if listed == 0 && !json {
                out::line("no dead letters")?;
            }
            Ok(ExitCode::SUCCESS)
        }
        DeadLetters::Show { id, json } => {
            let Some(letter) = stream_letters::get(&mut connection, &keys, &id).await? else {
                out::note(format_args!("standpipe: there is no dead letter {id}"));
                return Ok(ExitCode::FAILURE);
            };
            if json {
                out::line(out::safe_json(&serde_json::to_string_pretty(&letter)?))?;
            } else {
                out::line(dead_letters::page(&letter))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        DeadLetters::Retry { which, all } => {
            if which.ids.is_empty() && !all {
                return Ok(which_ones());
            }
            let store = Store::new(&config)?;
            let mut walk = Walk::new(&mut connection, &keys, filter(which)).await?;
            let (mut applied, mut bad) = (0, 0);
            while let Some(page) = walk.next(&mut connection, &keys).await? {
                for letter in page {
                    let id = letter.id.clone();
                    match dead_letters::retry(&mut connection, &keys, &store, letter).await? {
                        Retried::Applied => applied += 1,
                        Retried::StillBad(reject) => {
                            bad += 1;
                            let why = out::safe(&reject.to_string(), out::LINE);
                            out::line(format_args!("{id}  still cannot be applied: {why}"))?;
                        }
                    }
                }
            }
            out::line(format_args!("{applied} applied, {bad} kept"))?;
            Ok(if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        DeadLetters::Purge { which, all } => {
            if which.ids.is_empty() && !all {
                return Ok(which_ones());
            }
            let mut walk = Walk::new(&mut connection, &keys, filter(which)).await?;
            let mut removed = 0;
            while let Some(page) = walk.next(&mut connection, &keys).await? {
                for letter in &page {
                    removed += u32::from(stream_letters::remove(&mut connection, &keys, letter).await?);
                }
            }
            out::line(format_args!("purged {removed}"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn which_ones() -> ExitCode {
    out::note("standpipe: give ids, or --all (with --reason, --kind, --text or --since for some of them)");
    ExitCode::from(EX_USAGE)
}

async fn healthcheck(config: Config) -> Result<ExitCode> {
    let Some(address) = config.http_addr else {
        // Nothing to ask: that this program runs at all is the whole answer.
        return Ok(ExitCode::SUCCESS);
    };
    let (code, body) = http::client::get(address, "/readyz", Duration::from_secs(5)).await?;
    // The exit code is the answer, whether or not anybody reads this.
    let _ = out::line(out::safe_json(&body));
    // An orchestrator restarts unhealthy containers; a deliberate pause must not look unhealthy.
    let paused = || {
        let answer: Option<serde_json::Value> = serde_json::from_str(&body).ok();
        answer.is_some_and(|answer| answer["only_paused"] == true)
    };
    Ok(if code == 200 || paused() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sends the operator's command to the running process.
async fn control(config: Config, action: &ControlAction) -> Result<ExitCode> {
    let Some(address) = config.http_addr else {
        out::note("standpipe: HTTP_ADDR is off: the process has no address to connect to");
        return Ok(ExitCode::from(EX_USAGE));
    };
    let Some(token) = &config.admin_token else {
        out::note("standpipe: ADMIN_TOKEN is not set: use the running process's value");
        return Ok(ExitCode::from(EX_USAGE));
    };
    let path = match action {
        ControlAction::Pause { part } => format!("/control/pause?part={part}"),
        ControlAction::Resume { part } => format!("/control/resume?part={part}"),
        ControlAction::LogLevel { level } => format!("/control/log-level?level={level}"),
        ControlAction::Drain => "/control/drain".to_owned(),
    };
    let (code, body) = match http::client::post(address, &path, token, Duration::from_secs(10)).await {
        Ok(answer) => answer,
        Err(error) => return Ok(unavailable("the running process", &format!("{error:#}"))),
    };
    let answer: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
    if code >= 300 {
        out::note(format_args!(
            "standpipe: refused ({code}): {}",
            answer["error"].as_str().unwrap_or(body.trim())
        ));
        return Ok(ExitCode::FAILURE);
    }
    out::line(answer["done"].as_str().unwrap_or(body.trim()))?;
    Ok(ExitCode::SUCCESS)
}

fn help_env() -> Result<()> {
    for variable in VARIABLES {
        let default = if variable.default.is_empty() { "no default" } else { variable.default };
        out::line(format_args!("{} ({default})\n    {}", variable.name, variable.meaning))?;
    }
    Ok(())
}

fn unavailable(what: &str, error: &dyn std::fmt::Display) -> ExitCode {
    out::note(format_args!("standpipe: {what} cannot be reached: {error}"));
    ExitCode::from(EX_UNAVAILABLE)
}

async fn simulate(options: Simulate) -> Result<ExitCode> {
    let source = match &options.frames {
        Some(path) => Source::Recording(Arc::from(simulate::read_frames(path)?)),
        None => Source::Network(NetworkOptions {
            seed: options.seed,
            accounts: options.accounts,
            events: options.events,
            pad: options.pad,
            deletions: options.deletions,
            ..NetworkOptions::default()
        }),
    };
    let listener = TcpListener::bind(options.listen)
        .await
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    out::line(format_args!("simulated relay on ws://{}; Ctrl-C ends it", listener.local_addr()?))?;
    let stop = CancellationToken::new();
    let counters = Arc::new(simulate::Counters::default());
    let serving = simulate::serve(
        listener,
        RelayOptions { source, rate: options.rate },
        Arc::clone(&counters),
        stop.clone(),
    );
    tokio::pin!(serving);
    let mut tick = tokio::time::interval(Duration::from_secs(10));
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut said = 0;
    loop {
        tokio::select! {
            ended = &mut serving => {
                ended?;
                return Ok(ExitCode::SUCCESS);
            }
            _ = tick.tick() => {
                let sent = counters.frames_sent.load(Ordering::Relaxed);
                if sent != said {
                    out::line(format_args!(
                        "{} consumers, {sent} frames sent, {} per second, sequence number {}",
                        counters.connections.load(Ordering::Relaxed),
                        (sent - said) / 10,
                        counters.last_seq_sent.load(Ordering::Relaxed),
                    ))?;
                    said = sent;
                }
            }
            _ = tokio::signal::ctrl_c() => stop.cancel(),
            _ = terminate.recv() => stop.cancel(),
        }
    }
}

async fn demonstrate(options: Demo) -> Result<ExitCode> {
    let (config, warnings) = match demo::preview() {
        Ok(loaded) => loaded,
        Err(error) => return Ok(unusable(&error)),
    };
    let set_level = init_logging(&config)?;
    for warning in warnings {
        warn!("{warning}");
    }
    let handle = metrics::install().context("metrics")?;
    let clean = demo::demo(
        DemoOptions {
            events: options.events,
            rate: options.rate,
            seed: options.seed,
            accounts: options.accounts,
        },
        handle,
        Control::new(Some(set_level)),
    )
    .await?;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn benchmark(options: Bench) -> Result<ExitCode> {
    let Bench { events, rounds, seed, accounts, rate, backlog, sweep, existing, only, postgres, json, svg } =
        options;
    let options = BenchOptions {
        events,
        rounds,
        seed,
        accounts,
        rate,
        backlog,
        sweep,
        existing,
        only,
        postgres_settings: postgres,
    };
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    // Everything it started ends with it.
    let report = tokio::select! {
        report = bench::bench(&options) => report?,
        _ = tokio::signal::ctrl_c() => return Ok(interrupted("SIGINT")),
        _ = terminate.recv() => return Ok(interrupted("SIGTERM")),
    };
    if json {
        out::line(serde_json::to_string(&report)?)?;
    } else {
        out::raw(&report.to_string())?;
    }
    if let Some(folder) = svg {
        for file in bench::svg::write(&report, &folder)? {
            out::note(format_args!("written: {}", file.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn interrupted(signal: &str) -> ExitCode {
    out::note(format_args!("standpipe: interrupted by {signal}"));
    ExitCode::FAILURE
}
