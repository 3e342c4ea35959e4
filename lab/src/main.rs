//! `standpipe-lab`: the simulated relay, the demo and the benchmark on the command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use standpipe::control::Control;
use standpipe::{logging, metrics, out};
use standpipe_lab::bench::{self, BenchOptions, Part};
use standpipe_lab::demo::{self, DemoOptions};
use standpipe_lab::simulate::{self, NetworkOptions, RelayOptions, Source};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Bad command line or configuration (sysexits.h).
const EX_USAGE: u8 = 64;

/// What standpipe is shown, tested and measured with: a simulated relay, a demo, a benchmark. All of it runs on private
/// servers and leaves the machine's own alone.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A simulated relay: real websocket frames, deterministic, honours ?cursor=
    Simulate(Simulate),
    /// The whole chain with private servers and a simulated relay, to watch
    Demo(Demo),
    /// Measure throughput, latency and memory on private servers, next to the limits of the machine
    Bench(Bench),
}

#[derive(Debug, clap::Args)]
struct Simulate {
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
    /// All accounts are there from the beginning, each as busy as the others
    #[arg(long, conflicts_with = "frames")]
    spread: bool,
    /// Also delete accounts
    #[arg(long, conflicts_with = "frames")]
    deletions: bool,
    /// Filler bytes per commit, to imitate the size of real frames
    #[arg(long, default_value_t = 0, conflicts_with = "frames")]
    pad: usize,
    /// Accounts have no keys: commits look signed, and are not. Several times faster
    #[arg(long, conflicts_with_all = ["frames", "lies"])]
    unsigned: bool,
    /// Send one commit in so many wrong, or not at all, for somebody who verifies to notice
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "frames")]
    lies: u32,
    /// Serve a recorded file instead: 4-byte big-endian length and message, repeated
    #[arg(long, value_name = "FILE")]
    frames: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Demo {
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

#[expect(clippy::struct_excessive_bools, reason = "the flags of a command line")]
#[derive(Debug, clap::Args)]
struct Bench {
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
    /// Also measure a network of 200,000 accounts in which hardly two events in a row are from the same one
    #[arg(long)]
    spread: bool,
    /// Only these modes, without the reference and without turning notifications off
    #[arg(long, value_name = "MODE", value_delimiter = ',', value_parser = ["event", "batch"])]
    mode: Vec<String>,
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

fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            // --help and --version arrive here too, and are not mistakes.
            let code = if error.use_stderr() { EX_USAGE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match run(command) {
        Ok(code) => code,
        Err(error) if error.is::<out::Closed>() => ExitCode::SUCCESS,
        Err(error) => {
            out::note(format_args!("standpipe-lab: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(command: Command) -> Result<ExitCode> {
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        anyhow::bail!("another TLS provider is installed already");
    }
    match command {
        Command::Simulate(options) => simulate(options).await,
        Command::Demo(options) => demonstrate(options).await,
        Command::Bench(options) => benchmark(options).await,
    }
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
            spread: options.spread,
            signed: !options.unsigned,
            lies: options.lies,
            ..NetworkOptions::default()
        }),
    };
    let listener = TcpListener::bind(options.listen)
        .await
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    let address = listener.local_addr()?;
    out::line(format_args!("simulated relay on ws://{address}; Ctrl-C ends it"))?;
    if let Source::Network(NetworkOptions { signed: true, .. }) = source {
        out::line(format_args!(
            "it knows its accounts' keys, too: PLC_URL=http://{address} ALLOW_PRIVATE_ADDRESSES=true"
        ))?;
    }
    let stop = CancellationToken::new();
    let counters = Arc::new(simulate::Counters::default());
    let serving = simulate::serve(
        listener,
        RelayOptions { source, rate: options.rate, oldest: 0 },
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
        Err(error) => {
            for line in error.report() {
                out::note(line);
            }
            return Ok(ExitCode::from(EX_USAGE));
        }
    };
    let set_level = logging::install(&config)?;
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
    let Bench {
        events,
        rounds,
        seed,
        accounts,
        rate,
        backlog,
        sweep,
        existing,
        spread,
        mode,
        only,
        postgres,
        json,
        svg,
    } = options;
    let options = BenchOptions {
        events,
        rounds,
        seed,
        accounts,
        rate,
        backlog,
        sweep,
        existing,
        spread,
        modes: mode,
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
    out::note(format_args!("standpipe-lab: interrupted by {signal}"));
    ExitCode::FAILURE
}
