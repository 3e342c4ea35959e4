//! The whole chain to watch: private servers on free ports in a folder of their own, the simulated relay, the reader,
//! the pipelines, the HTTP server.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::{self, Role};
use crate::control::Control;
use crate::http;
use crate::private::{PostgresOptions, PrivateFolder, PrivatePostgres, PrivateRedis, RedisOptions};
use crate::relay::simulate::{self, Counters, NetworkOptions, RelayOptions, Source};
use crate::run::{self, Parts, Running};
use crate::store::{Store, audit};

/// What to show.
#[derive(Clone, Copy, Debug)]
pub struct DemoOptions {
    /// Stop after this many events; without it, at Ctrl-C.
    pub events: Option<u64>,
    /// Events per second; without it as fast as it goes.
    pub rate: Option<u32>,
    /// Of the simulated network.
    pub seed: u64,
    /// Of the simulated network.
    pub accounts: u32,
}

/// Runs the demonstration; returns whether everything arrived and the audit found nothing wrong.
///
/// # Errors
///
/// The servers cannot be started.
pub async fn demo(options: DemoOptions, metrics: PrometheusHandle) -> Result<bool> {
    println!("starting a private Redis and a private PostgreSQL ...");
    let folder = PrivateFolder::create("standpipe-demo")?;
    let redis = PrivateRedis::start(&folder.path().join("redis"), RedisOptions::default()).await?;
    let postgres =
        PrivatePostgres::start(&folder.path().join("postgres"), PostgresOptions::default()).await?;
    let database = postgres.create_database("standpipe").await?;

    let relay = TcpListener::bind("127.0.0.1:0").await?;
    let relay_address = relay.local_addr()?;
    let counters = Arc::new(Counters::default());
    let stop = CancellationToken::new();
    let network = NetworkOptions {
        seed: options.seed,
        accounts: options.accounts,
        events: options.events.unwrap_or(0),
        ..NetworkOptions::default()
    };
    let last_seq = options.events.map(|_| last_seq(&network)).transpose()?;
    let relay_options = RelayOptions { source: Source::Network(network), rate: options.rate };
    let serving = simulate::serve(relay, relay_options, Arc::clone(&counters), stop.clone());

    // For this demonstration alone, and shown to whoever started it.
    let token = http::random_token().context("a token for the dashboard")?;
    let variables = [
        ("RELAY_URL".to_owned(), format!("ws://{relay_address}")),
        ("REDIS_URL".to_owned(), redis.url()),
        ("DATABASE_URL".to_owned(), database),
        ("HTTP_ADDR".to_owned(), "127.0.0.1:0".to_owned()),
        ("COLLECTIONS".to_owned(), "*".to_owned()),
        ("CONSUMER_ID".to_owned(), "demo".to_owned()),
        ("ADMIN_TOKEN".to_owned(), token.clone()),
    ];
    // What the operator wants to try out, such as BATCH_SIZE, goes for the demonstration too; addresses do not.
    let tuning = config::VARIABLES.iter().filter_map(|variable| {
        let name = variable.name.to_owned();
        if variables.iter().any(|(ours, _)| *ours == name) {
            return None;
        }
        std::env::var_os(&name).and_then(|value| value.into_string().ok()).map(|value| (name, value))
    });
    let all: Vec<(String, String)> = variables.iter().cloned().chain(tuning).collect();
    let (config, _) = config::from_env(all, Role::All)?;
    let store = Store::new(&config)?;
    let began = Instant::now();
    let mut running = run::start(config, Parts::All, metrics, Control::new(None), &stop)?;
    if let Some(address) = running.http {
        println!("dashboard on http://{address}/, its admin token is {token}; Ctrl-C stops");
    }

    let watch = watch(&running, &counters, last_seq);
    let finished = tokio::select! {
        finished = watch => finished,
        served = serving => { served?; false }
        () = running.drain_begun() => {
            println!("\ndraining ...");
            false
        }
        _ = tokio::signal::ctrl_c() => {
            println!("\nstopping ...");
            false
        }
    };
    let seconds = began.elapsed().as_secs_f64();
    let entries = running.status.entries.load(Ordering::Relaxed);
    let (cpu, peak) = own_usage();
    let drained = running.drain().await;
    if last_seq.is_none() {
        return Ok(drained);
    }
    if !finished {
        println!("stopped before all events had arrived");
        return Ok(false);
    }
    println!(
        "{entries} events in {seconds:.1} s: {:.0} events/s through the whole chain; {:.2} s of CPU per 100,000 events \
         (simulated relay included) and at most {:.0} MiB of memory in this process",
        entries as f64 / seconds,
        cpu / entries as f64 * 100_000.0,
        peak as f64 / 1_048_576.0,
    );
    let mut session = store.session().await.context("audit")?;
    let findings = audit::audit(session.client_mut()).await?;
    println!("audit:");
    for finding in &findings {
        println!("{finding}");
    }
    let clean = findings.iter().all(|finding| finding.count == 0);
    println!("{}", if clean { "everything agrees" } else { "something is wrong" });
    Ok(clean && drained)
}

/// The sequence number of the last frame: known beforehand, because the network follows from its options.
fn last_seq(network: &NetworkOptions) -> Result<u64> {
    simulate::Network::new(network)
        .filter_map(|frame| frame.seq)
        .last()
        .context("the simulated network is empty")
}

/// Shows how it is going; returns when the last event is in the database.
async fn watch(running: &Running, counters: &Counters, last_seq: Option<u64>) -> bool {
    let terminal = std::io::stdout().is_terminal();
    let mut last = (Instant::now(), 0);
    loop {
        let interval = if terminal { 500 } else { 2000 };
        let deadline = Instant::now() + Duration::from_millis(interval);
        while Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if is_finished(running, last_seq) {
                if terminal {
                    println!();
                }
                return true;
            }
        }
        let entries = running.status.entries.load(Ordering::Relaxed);
        let rate = (entries - last.1) as f64 / last.0.elapsed().as_secs_f64();
        last = (Instant::now(), entries);
        let look = running.status.look().map(|(look, _)| look).unwrap_or_default();
        let line = format!(
            "relay sent {}   in PostgreSQL {entries}   {rate:.0} events/s   stream {}   pending {}",
            counters.frames_sent.load(Ordering::Relaxed),
            look.length,
            look.pending,
        );
        if terminal {
            print!("\r\x1b[K{line}");
            let _ = std::io::stdout().flush();
        } else {
            println!("{line}");
        }
    }
}

/// Whether the last event is in the stream and everything in the stream is acknowledged.
fn is_finished(running: &Running, last_seq: Option<u64>) -> bool {
    let cursor = running.status.reader.as_ref().and_then(|reader| crate::status::lock(reader).cursor);
    let arrived = matches!((cursor, last_seq), (Some(cursor), Some(last)) if cursor.unsigned_abs() >= last);
    // A look taken after the last append: the state before it says nothing.
    arrived
        && running.status.look().is_some_and(|(look, _)| look.is_drained())
        && running.status.pipelines.iter().all(|pipeline| crate::status::lock(pipeline).in_flight == 0)
}

/// CPU seconds and peak resident bytes of this process.
fn own_usage() -> (f64, u64) {
    let usage = metrics_process::collector::collect();
    let peak = std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .unwrap_or(0);
    (usage.cpu_seconds_total.unwrap_or(0.0), peak * 1024)
}
