//! The subcommands.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use standpipe::config::{Config, LogFormat, Role, VARIABLES};
use standpipe::dead_letters::{Filter, Retried, Walk};
use standpipe::demo::{self, DemoOptions};
use standpipe::relay::simulate::{self, NetworkOptions, RelayOptions, Source};
use standpipe::run::{self, Parts};
use standpipe::store::{Store, audit, migrate};
use standpipe::stream::dead_letters as stream_letters;
use standpipe::stream::{Keys, Redis};
use standpipe::{dead_letters, doctor, http, metrics, report};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use tracing_subscriber::EnvFilter;

/// Bad command line or configuration (sysexits.h).
pub const EX_USAGE: u8 = 64;
/// A service that is needed cannot be reached (sysexits.h).
pub const EX_UNAVAILABLE: u8 = 69;

/// The AT Protocol firehose into a Redis stream and, through N consumer-group pipelines, into PostgreSQL: one
/// transaction per event, nothing lost, nothing counted twice.
///
/// Settings come from the environment; `standpipe help-env` lists them.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
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
    /// Create or upgrade the tables (also done at start unless `AUTO_MIGRATE=false`)
    Migrate,
    /// Check configuration, Redis, PostgreSQL, permissions and settings; say what is wrong and what to do
    Check,
    /// Stream, group, pipelines, waiting and pending entries, dead letters
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// What can never be applied: look at it, apply it after a correction, throw it away
    DeadLetters {
        #[command(subcommand)]
        action: DeadLetters,
    },
    /// Recount every counter and feed item from the rows; exit 0 when all agree
    Audit {
        /// Put right what differs, then check again
        #[arg(long)]
        repair: bool,
    },
    /// A simulated relay: real websocket frames, deterministic, honours ?cursor=
    Simulate(Simulate),
    /// The whole chain with private servers and a simulated relay, to watch
    Demo(Demo),
    /// Ask the running process whether it is ready; exit 0 when it is
    Healthcheck,
    /// List the environment variables
    HelpEnv,
}

#[derive(Debug, Subcommand)]
pub enum DeadLetters {
    /// List them, the oldest first
    List {
        #[command(flatten)]
        which: Which,
        /// At the most
        #[arg(long, default_value_t = 100)]
        limit: usize,
        /// One JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Show one, whole, as JSON
    Show {
        /// Its id
        id: String,
    },
    /// Apply them; what succeeds is removed
    Retry {
        #[command(flatten)]
        which: Which,
        /// All that fit; needed when no ids are given
        #[arg(long)]
        all: bool,
    },
    /// Throw them away
    Purge {
        #[command(flatten)]
        which: Which,
        /// All that fit; needed when no ids are given
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Which {
    /// Their ids
    ids: Vec<String>,
    /// The class of what is wrong
    #[arg(long, value_parser = ["undecodable", "missing_field", "invalid_field", "database"])]
    reason: Option<String>,
    /// A type (commit, identity, account) or a collection such as app.bsky.feed.like
    #[arg(long)]
    kind: Option<String>,
    /// Tried within this time, such as 1h or 2d
    #[arg(long, value_parser = humantime::parse_duration)]
    since: Option<Duration>,
}

#[derive(Debug, clap::Args)]
pub struct Simulate {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:2470")]
    listen: SocketAddr,
    /// Frames in all; 0 for endless
    #[arg(long, default_value_t = 0, conflicts_with = "frames")]
    events: u64,
    /// Frames per second and connection; as fast as they are taken when not given
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
    /// Events per second; as fast as it goes when not given
    #[arg(long, value_parser = parse_rate)]
    rate: Option<u32>,
    /// The same seed gives the same events
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Accounts of the network
    #[arg(long, default_value_t = 10_000)]
    accounts: u32,
}

/// `1000` or `1000/s`.
fn parse_rate(text: &str) -> Result<u32, String> {
    match text.trim_end_matches("/s").parse() {
        Ok(0) => Err("a rate of 0 would never send anything".to_owned()),
        Ok(rate) => Ok(rate),
        Err(_) => Err("write a number of frames per second, such as 1000 or 1000/s".to_owned()),
    }
}

/// Does what the command line says.
///
/// # Errors
///
/// The command failed at its work; bad configurations and absent services have exit codes of their own.
pub async fn execute(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run => serve(Parts::All, Role::All).await,
        Command::Reader => serve(Parts::Reader, Role::Reader).await,
        Command::Worker => serve(Parts::Worker, Role::Worker).await,
        Command::Migrate => with_config(Role::Worker, migrate_database).await,
        Command::Check => with_config(Role::Tool, check).await,
        Command::Status { json } => {
            with_config(Role::Tool, async move |config| status(config, json).await).await
        }
        Command::DeadLetters { action } => {
            with_config(Role::Tool, async move |config| letters(config, action).await).await
        }
        Command::Audit { repair } => {
            with_config(Role::Worker, async move |config| audit_database(config, repair).await).await
        }
        Command::Simulate(options) => simulate(options).await,
        Command::Demo(options) => demonstrate(options).await,
        Command::Healthcheck => with_config(Role::Tool, healthcheck).await,
        Command::HelpEnv => {
            help_env();
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Reads the environment; on mistakes, says them all.
fn load(role: Role) -> Result<(Config, Vec<String>), ExitCode> {
    standpipe::config::from_env(std::env::vars_os(), role).map_err(|error| {
        eprintln!("standpipe: the configuration cannot be used:");
        for line in error.to_string().lines() {
            eprintln!("  {line}");
        }
        ExitCode::from(EX_USAGE)
    })
}

async fn with_config(role: Role, work: impl AsyncFnOnce(Config) -> Result<ExitCode>) -> Result<ExitCode> {
    match load(role) {
        Ok((config, warnings)) => {
            for warning in warnings {
                eprintln!("standpipe: {warning}");
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
    init_logging(&config)?;
    for warning in warnings {
        warn!("{warning}");
    }
    for line in config.describe() {
        debug!("{line}");
    }
    let handle = metrics::install().context("metrics")?;
    run::run(config, parts, handle).await
}

fn init_logging(config: &Config) -> Result<()> {
    let filter = match &config.rust_log {
        Some(filter) => filter.parse::<EnvFilter>().context("RUST_LOG")?,
        // The libraries speak of their own affairs; only ours are of interest below a warning.
        None => EnvFilter::new(format!("warn,standpipe={}", config.log_level.as_filter())),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match config.log_format {
        LogFormat::Json => builder.json().flatten_event(true).with_writer(std::io::stderr).init(),
        LogFormat::Text => {
            builder.with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).init();
        }
    }
    Ok(())
}

async fn migrate_database(config: Config) -> Result<ExitCode> {
    let store = Store::new(&config)?;
    let mut session = match store.session().await {
        Ok(session) => session,
        Err(error) => return Ok(unavailable("PostgreSQL", &error)),
    };
    let done = migrate::migrate(session.client_mut()).await?;
    if done.is_empty() {
        println!("nothing to do: the database is at version {}", migrate::wanted());
    }
    for name in done {
        println!("done: {name}");
    }
    Ok(ExitCode::SUCCESS)
}

async fn check(config: Config) -> Result<ExitCode> {
    let findings = doctor::check(&config).await;
    for finding in &findings {
        println!("{finding}");
    }
    Ok(match doctor::verdict(&findings) {
        doctor::Verdict::Healthy => ExitCode::SUCCESS,
        doctor::Verdict::Unhealthy => ExitCode::FAILURE,
        doctor::Verdict::Unreachable => ExitCode::from(EX_UNAVAILABLE),
    })
}

async fn status(config: Config, json: bool) -> Result<ExitCode> {
    // The process knows more than Redis; without one, Redis alone is asked.
    if let Some(address) = config.http_addr
        && let Ok((200, body)) = http::client::get(address, "/status", Duration::from_secs(3)).await
    {
        if json {
            println!("{body}");
        } else {
            println!("{}", serde_json::to_string_pretty(&serde_json::from_str::<serde_json::Value>(&body)?)?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let redis = Redis::new(config.redis_url.expose()).context("REDIS_URL")?;
    let keys = Keys::new(&config);
    let asked = async {
        let mut connection = redis.connect().await?;
        report::report(&mut connection, &keys).await
    };
    match asked.await {
        Ok(report) if json => println!("{}", serde_json::to_string(&report)?),
        Ok(report) => println!("{}", serde_json::to_string_pretty(&report)?),
        Err(error) => return Ok(unavailable("Redis", &error)),
    }
    Ok(ExitCode::SUCCESS)
}

async fn audit_database(config: Config, repair: bool) -> Result<ExitCode> {
    let store = Store::new(&config)?;
    let mut session = match store.session().await {
        Ok(session) => session,
        Err(error) => return Ok(unavailable("PostgreSQL", &error)),
    };
    if repair {
        audit::repair(session.client_mut()).await?;
    }
    let findings = audit::audit(session.client_mut()).await?;
    for finding in &findings {
        println!("{finding}");
    }
    let clean = findings.iter().all(|finding| finding.count == 0);
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn letters(config: Config, action: DeadLetters) -> Result<ExitCode> {
    let redis = Redis::new(config.redis_url.expose()).context("REDIS_URL")?;
    let keys = Keys::new(&config);
    let mut connection = match redis.connect().await {
        Ok(connection) => connection,
        Err(error) => return Ok(unavailable("Redis", &error)),
    };
    let filter =
        |which: Which| Filter { ids: which.ids, reason: which.reason, kind: which.kind, since: which.since };
    match action {
        DeadLetters::List { which, limit, json } => {
            let mut walk = Walk::new(&mut connection, &keys, filter(which)).await?;
            let mut listed = 0;
            while let Some(page) = walk.next(&mut connection, &keys).await? {
                for letter in page.iter().take(limit - listed) {
                    listed += 1;
                    if json {
                        println!("{}", serde_json::to_string(letter)?);
                    } else {
                        println!(
                            "{}  {}  {} {}  {} ({} attempts)",
                            letter.id,
                            letter.reason,
                            letter.event_type,
                            letter.collection(),
                            letter.message,
                            letter.attempts,
                        );
                    }
                }
                if listed == limit {
                    break;
                }
            }
            if listed == 0 && !json {
                println!("no dead letters");
            }
            Ok(ExitCode::SUCCESS)
        }
        DeadLetters::Show { id } => {
            let Some(letter) = stream_letters::get(&mut connection, &keys, &id).await? else {
                eprintln!("standpipe: there is no dead letter {id}");
                return Ok(ExitCode::FAILURE);
            };
            println!("{}", serde_json::to_string_pretty(&letter)?);
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
                            println!("{id}  still cannot be applied: {reject}");
                        }
                    }
                }
            }
            println!("{applied} applied, {bad} kept");
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
            println!("{removed} thrown away");
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn which_ones() -> ExitCode {
    eprintln!("standpipe: give ids, or --all (with --reason, --kind or --since for some of them)");
    ExitCode::from(EX_USAGE)
}

async fn healthcheck(config: Config) -> Result<ExitCode> {
    let Some(address) = config.http_addr else {
        // Nothing to ask: that this program runs at all is the whole answer.
        return Ok(ExitCode::SUCCESS);
    };
    let (code, body) = http::client::get(address, "/readyz", Duration::from_secs(5)).await?;
    println!("{body}");
    Ok(if code == 200 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn help_env() {
    for variable in VARIABLES {
        let default = if variable.default.is_empty() { "no default" } else { variable.default };
        println!("{} ({default})\n    {}", variable.name, variable.meaning);
    }
}

fn unavailable(what: &str, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("standpipe: {what} cannot be reached: {error}");
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
    println!("simulated relay on ws://{}; Ctrl-C ends it", listener.local_addr()?);
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
                    println!(
                        "{} consumers, {sent} frames sent, {} per second, sequence number {}",
                        counters.connections.load(Ordering::Relaxed),
                        (sent - said) / 10,
                        counters.last_seq_sent.load(Ordering::Relaxed),
                    );
                    said = sent;
                }
            }
            _ = tokio::signal::ctrl_c() => stop.cancel(),
            _ = terminate.recv() => stop.cancel(),
        }
    }
}

async fn demonstrate(options: Demo) -> Result<ExitCode> {
    let handle = metrics::install().context("metrics")?;
    let clean = demo::demo(
        DemoOptions {
            events: options.events,
            rate: options.rate,
            seed: options.seed,
            accounts: options.accounts,
        },
        handle,
    )
    .await?;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
