//! The whole chain, for demonstration: private servers on free ports in a folder of their own, the simulated relay, the reader,
//! the pipelines, the HTTP server.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::iter::Peekable;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::FutureExt as _;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::servers::{PostgresOptions, PrivateFolder, PrivatePostgres, PrivateRedis, RedisOptions};
use crate::simulate::{self, Counters, NetworkOptions, RelayOptions, Source};
use standpipe::config::{self, Config, ConfigError, Role};
use standpipe::control::Control;
use standpipe::http;
use standpipe::metrics::VERIFIED;
use standpipe::out;
use standpipe::run::{self, Parts, Running};
use standpipe::status::Status;
use standpipe::store::{Store, audit};
use standpipe::time::now_ms;

/// Events per second of a demonstration that does not end by itself: what a small machine can carry.
const RATE: u32 = 1_500;

/// Of its Redis, in bytes.
const REDIS_MEMORY: u64 = 1 << 30;

/// How long a look at the stream may take, in milliseconds: one that is so much younger than the last append saw it.
const LOOK: u64 = 200;

/// What to show.
#[derive(Clone, Copy, Debug)]
pub struct DemoOptions {
    /// Stop after this many events; without it, at Ctrl-C.
    pub events: Option<u64>,
    /// Events per second; without it 1,500, and as fast as it goes where `events` says when to stop.
    pub rate: Option<u32>,
    /// Of the simulated network.
    pub seed: u64,
    /// Of the simulated network.
    pub accounts: u32,
}

/// The addresses of what the demonstration starts, and its token.
struct Addresses {
    /// Host and port of the simulated relay, which is also the directory of its accounts, and their server.
    relay: SocketAddr,
    redis: String,
    database: String,
    token: String,
}

impl Addresses {
    /// `RELAY_URL` and `PLC_URL`.
    fn relay_and_directory(&self) -> (String, String) {
        (format!("ws://{}", self.relay), format!("http://{}", self.relay))
    }
}

/// The configuration. What the operator wants to try out, such as `BATCH_SIZE`, goes for the demonstration too; addresses
/// do not.
fn settings(addresses: &Addresses) -> Result<(Config, Vec<String>), ConfigError> {
    let (relay, directory) = addresses.relay_and_directory();
    let ours = [
        ("RELAY_URL", relay.as_str()),
        ("PLC_URL", &directory),
        ("ALLOW_PRIVATE_ADDRESSES", "true"),
        ("REDIS_URL", &addresses.redis),
        ("DATABASE_URL", &addresses.database),
        ("HTTP_ADDR", "127.0.0.1:0"),
        ("COLLECTIONS", "*"),
        ("CONSUMER_ID", "demo"),
        ("ADMIN_TOKEN", &addresses.token),
    ]
    .map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let quiet = std::env::var_os("LOG_LEVEL").is_none().then(|| ("LOG_LEVEL".into(), "WARNING".into()));
    let theirs = std::env::vars_os().filter(|(name, _)| !ours.iter().any(|(taken, _)| taken == name));
    config::from_env(theirs.chain(quiet).chain(ours.clone()), Role::All)
}

/// The configuration and its warnings before anything is started: for the operator to fix, and for the log.
///
/// # Errors
///
/// A value of the environment cannot be used.
pub fn preview() -> Result<(Config, Vec<String>), ConfigError> {
    settings(&Addresses {
        relay: SocketAddr::from(([127, 0, 0, 1], 1)),
        redis: "redis://127.0.0.1:1".to_owned(),
        database: "postgresql://127.0.0.1:1/standpipe".to_owned(),
        token: "0".repeat(32),
    })
}

impl DemoOptions {
    fn network(&self) -> NetworkOptions {
        NetworkOptions {
            seed: self.seed,
            accounts: self.accounts,
            events: self.events.unwrap_or(0),
            signed: true,
            // One that is sent as fast as it goes is ahead of its consumer: what an account signed before a change would
            // meet the key after it.
            new_keys: self.rate().is_some(),
            ..NetworkOptions::default()
        }
    }

    /// Events per second; one without an end is not to fill the disk.
    fn rate(&self) -> Option<u32> {
        self.rate.or_else(|| self.events.is_none().then_some(RATE))
    }
}

async fn servers(folder: &PrivateFolder) -> Result<(PrivateRedis, PrivatePostgres)> {
    let options = RedisOptions { max_memory: Some(REDIS_MEMORY), ..RedisOptions::default() };
    let redis = PrivateRedis::start(&folder.path().join("redis"), options).await?;
    let postgres =
        PrivatePostgres::start(&folder.path().join("postgres"), PostgresOptions::default()).await?;
    Ok((redis, postgres))
}

/// How to watch it and how to break it.
fn announce(
    addresses: &Addresses,
    running: &Running,
    redis: &PrivateRedis,
    postgres: &PrivatePostgres,
) -> Result<()> {
    let Some(address) = running.http else { return Ok(()) };
    let Addresses { redis: redis_url, database, token, .. } = addresses;
    let (relay, directory) = addresses.relay_and_directory();
    out::line(format_args!(
        "dashboard on http://{address}/, its admin token is {token}; Ctrl-C stops it and audits the database"
    ))?;
    out::line(format_args!(
        "for the command line: export HTTP_ADDR={address} ADMIN_TOKEN={token} RELAY_URL={relay} \
         PLC_URL={directory} ALLOW_PRIVATE_ADDRESSES=true REDIS_URL={redis_url} DATABASE_URL={database}"
    ))?;
    if let (Some(redis), Some(postgres)) = (redis.pid(), postgres.pid()) {
        out::line(format_args!(
            "to break it: kill -9 {postgres} ends its PostgreSQL, kill -9 {redis} its Redis"
        ))?;
    }
    Ok(())
}

fn report(entries: u64, seconds: f64, (cpu, peak): (f64, u64), metrics: &str) -> Result<()> {
    out::line(format_args!(
        "{entries} events in {seconds:.1} s: {:.0} events/s through the whole chain; {:.2} s of CPU per 100,000 \
         events (simulated relay included) and at most {:.0} MiB of memory in this process",
        entries as f64 / seconds,
        cpu / entries as f64 * 100_000.0,
        peak as f64 / 1_048_576.0,
    ))?;
    report_verified(metrics)
}

/// What came of the commits' verification, as Prometheus would read it.
fn report_verified(metrics: &str) -> Result<()> {
    let results = metrics.lines().filter_map(|line| {
        let (result, count) = line.strip_prefix(VERIFIED)?.strip_prefix("{result=\"")?.split_once("\"} ")?;
        (count != "0").then(|| format!("{count} {result}"))
    });
    let results: Vec<String> = results.collect();
    if !results.is_empty() {
        out::line(format_args!("commits verified: {}", results.join(", ")))?;
    }
    Ok(())
}

/// `has_end`: it was to end by itself.
fn report_unfinished(status: &Status, entries: u64, seconds: f64, has_end: bool) -> Result<()> {
    let waiting = unfinished(status).map_or(String::new(), |count| {
        format!("; {count} more were in the stream, which ends with the demo")
    });
    out::line(format_args!("{entries} events in {seconds:.0} s are in PostgreSQL{waiting}"))?;
    if has_end {
        out::line("stopped before all events had arrived")?;
    }
    Ok(())
}

/// Runs the demonstration; returns whether everything arrived and the audit found nothing wrong.
///
/// # Errors
///
/// The servers cannot be started.
pub async fn demo(options: DemoOptions, metrics: PrometheusHandle, control: Control) -> Result<bool> {
    out::line("starting a private Redis and a private PostgreSQL ...")?;
    let folder = PrivateFolder::create("standpipe-demo")?;
    let (mut redis, mut postgres) = servers(&folder).await?;
    let database = postgres.create_database("standpipe").await?;

    let relay = TcpListener::bind("127.0.0.1:0").await?;
    // For this demonstration alone, and shown to the person who started it.
    let addresses = Addresses {
        relay: relay.local_addr()?,
        redis: redis.url(),
        database,
        token: http::random_token().context("a token for the dashboard")?,
    };
    let counters = Arc::new(Counters::default());
    let stop = CancellationToken::new();
    let network = options.network();
    let (mut sent, last_seq) = Sent::new(&network)?;
    let relay_options = RelayOptions { source: Source::Network(network), rate: options.rate(), oldest: 0 };
    let serving = simulate::serve(relay, relay_options, Arc::clone(&counters), stop.clone());
    let mut serving = pin!(serving.fuse());

    let (config, _) = settings(&addresses)?;
    let store = Store::new(&config)?;
    let began = Instant::now();
    let rendered = metrics.clone();
    let mut running = run::start(config, Parts::All, metrics, control, &stop)?;
    announce(&addresses, &running, &redis, &postgres)?;

    let watch = watch(&running, &counters, &mut sent, last_seq);
    let finished = tokio::select! {
        never = keep_servers(&mut redis, &mut postgres) => { never?; false }
        finished = watch => finished?,
        served = &mut serving => { served?; false }
        () = running.drain_begun() => {
            out::line("\ndraining; Ctrl-C ends at once ...")?;
            false
        }
        _ = tokio::signal::ctrl_c() => {
            out::line("\nfinishing what the pipelines hold; a second Ctrl-C ends at once ...")?;
            false
        }
    };
    let seconds = began.elapsed().as_secs_f64();
    let entries = running.status.entries.load(Ordering::Relaxed);
    let own_usage = own_usage();
    let status = Arc::clone(&running.status);
    // The relay stays until the reader has left it.
    let serve_on = async {
        let _ = serving.await;
        std::future::pending::<()>().await;
    };
    let drained = tokio::select! {
        drained = running.drain() => drained,
        () = serve_on => false,
        _ = tokio::signal::ctrl_c() => return Ok(false),
    };
    if finished {
        report(entries, seconds, own_usage, &rendered.render())?;
    } else {
        report_unfinished(&status, entries, seconds, last_seq.is_some())?;
    }
    let clean = audit_unless_interrupted(&store).await?;
    // One that was to end by itself, and did not, has not shown what it was to show.
    Ok(clean && drained && (finished || last_seq.is_none()))
}

async fn audit_unless_interrupted(store: &Store) -> Result<bool> {
    tokio::select! {
        clean = audit(store) => clean,
        _ = tokio::signal::ctrl_c() => {
            out::line("the audit was interrupted")?;
            Ok(false)
        }
    }
}

/// Audits the database and reports the result.
async fn audit(store: &Store) -> Result<bool> {
    let failed = "the audit could not be done: PostgreSQL";
    let mut session = store.session().await.context(failed)?;
    out::line("audit; Ctrl-C ends it:")?;
    let say = &mut |line: &str| out::note(format_args!("{line}"));
    let findings = audit::audit_and_say(session.client_mut(), say).await.context(failed)?;
    for finding in &findings {
        out::line(finding)?;
    }
    let clean = findings.iter().all(|finding| finding.count == 0);
    out::line(if clean { "everything agrees" } else { "something is wrong" })?;
    Ok(clean)
}

/// How many different frames the relay has sent. It sends many of them again to a reader that comes back after an outage;
/// counted twice, they would look like events that never arrived.
///
/// What the simulated network sends follows from its options, so that sequence numbers, which have gaps, can be counted.
struct Sent {
    /// Frames whose number does not follow on the one before: the number, and the how many-th frame it is.
    jumps: Peekable<Box<dyn Iterator<Item = (u64, u64)>>>,
    /// The last jump that was passed.
    at: (u64, u64),
}

impl Sent {
    /// Also returns the number of the last frame, if there is one. A network that ends is gone through beforehand.
    fn new(network: &NetworkOptions) -> Result<(Self, Option<u64>)> {
        let numbers = simulate::sequence_numbers(network);
        if network.events == 0 {
            return Ok((Self::counting(Box::new(jumps(numbers))), None));
        }
        let mut last = None;
        let jumps: Vec<(u64, u64)> = jumps(numbers.inspect(|seq| last = Some(*seq))).collect();
        let last = last.context("the simulated network is empty")?;
        Ok((Self::counting(Box::new(jumps.into_iter())), Some(last)))
    }

    fn counting(jumps: Box<dyn Iterator<Item = (u64, u64)>>) -> Self {
        Self { jumps: jumps.peekable(), at: (0, 0) }
    }

    /// How many frames there are up to this one; it must not be before one that was asked about earlier.
    fn up_to(&mut self, seq: u64) -> u64 {
        while let Some(jump) = self.jumps.next_if(|(number, _)| *number <= seq) {
            self.at = jump;
        }
        let (number, frames) = self.at;
        frames + (seq - number)
    }
}

/// Of ascending numbers, those that do not follow on the one before, with their places, which begin with 1.
fn jumps(numbers: impl Iterator<Item = u64>) -> impl Iterator<Item = (u64, u64)> {
    numbers
        .zip(1..)
        .scan(0, |before, (number, place)| {
            let follows = number == *before + 1;
            *before = number;
            Some((!follows).then_some((number, place)))
        })
        .flatten()
}

/// Entries that were waiting or pending at the last look.
fn unfinished(status: &Status) -> Option<u64> {
    let (look, _) = status.look()?;
    Some(look.waiting()? + look.pending).filter(|count| *count > 0)
}

/// Starts a server again that ended, so that its end can be tried.
async fn keep_servers(redis: &mut PrivateRedis, postgres: &mut PrivatePostgres) -> Result<()> {
    loop {
        tokio::time::sleep(Duration::from_secs(5)).await;
        if postgres.has_ended()? {
            out::line("\nthe private PostgreSQL has ended; starting it again ...")?;
            postgres.start_again().await?;
        }
        if redis.has_ended()? {
            out::line("\nthe private Redis has ended; starting it again ...")?;
            redis.start_again().await?;
        }
    }
}

/// Shows the progress; returns when the last event is in the database.
async fn watch(
    running: &Running,
    counters: &Counters,
    sent: &mut Sent,
    last_seq: Option<u64>,
) -> Result<bool> {
    let terminal = std::io::stdout().is_terminal();
    let mut last = (Instant::now(), 0);
    let mut arrived = None;
    loop {
        let interval = if terminal { 500 } else { 2000 };
        let deadline = Instant::now() + Duration::from_millis(interval);
        while Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if is_finished(running, last_seq, &mut arrived) {
                if terminal {
                    out::line("")?;
                }
                return Ok(true);
            }
        }
        let entries = running.status.entries.load(Ordering::Relaxed);
        let rate = (entries - last.1) as f64 / last.0.elapsed().as_secs_f64();
        last = (Instant::now(), entries);
        let look = running.status.look().map(|(look, _)| look).unwrap_or_default();
        let sent = sent.up_to(counters.last_seq_sent.load(Ordering::Relaxed));
        // After an outage some entries are applied again, which changes nothing.
        let repeated = match entries.saturating_sub(sent) {
            0 => String::new(),
            repeated => format!("   applied again {repeated}"),
        };
        let line = format!(
            "relay sent {sent}   in PostgreSQL {}{repeated}   {rate:.0} events/s   stream {}   pending {}",
            entries.min(sent),
            look.length,
            look.pending,
        );
        if terminal {
            out::raw(&format!("\r\x1b[K{line}"))?;
        } else {
            out::line(line)?;
        }
    }
}

/// Whether the last event is in the stream and everything in the stream is acknowledged. `arrived`: since when the first
/// of these is so.
fn is_finished(running: &Running, last_seq: Option<u64>, arrived: &mut Option<u64>) -> bool {
    let cursor = running.status.reader.as_ref().and_then(|reader| standpipe::mutex::lock(reader).cursor);
    if !matches!((cursor, last_seq), (Some(cursor), Some(last)) if cursor.unsigned_abs() >= last) {
        return false;
    }
    // A look taken after the last append: the state before it says nothing.
    let arrived = *arrived.get_or_insert_with(now_ms);
    running.status.look().is_some_and(|(look, at)| at > arrived + LOOK && look.is_drained())
        && running.status.pipelines.iter().all(|pipeline| standpipe::mutex::lock(pipeline).in_flight == 0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_is_counted_once() {
        for events in [3_000, 0] {
            let network = NetworkOptions { events, ..NetworkOptions::default() };
            let (mut sent, last) = Sent::new(&network).unwrap();
            let numbers: Vec<u64> =
                simulate::Network::new(&network).filter_map(|frame| frame.seq).take(3_000).collect();
            assert_eq!(last, (events > 0).then(|| numbers[2_999]));
            assert!(numbers[2_999] > 3_000, "the numbers have gaps");
            assert_eq!(sent.up_to(0), 0);
            for place in (0..3_000).step_by(7).chain([2_999]) {
                assert_eq!(sent.up_to(numbers[place]), place as u64 + 1);
            }
            // Repeated frames are not counted.
            assert_eq!(sent.up_to(numbers[2_999]), 3_000);
        }
    }
}
