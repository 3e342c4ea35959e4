//! Starting the parts and ending them in order. The only place that spawns.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::http::Server;
use crate::metrics;
use crate::pipeline::{InHand, Names, Pipeline};
use crate::relay::reader::Reader;
use crate::report;
use crate::status::{State, Status, lock, now_ms};
use crate::store::verdict::Verdict;
use crate::store::{Store, StoreError, migrate, tombstones};
use crate::stream::{Keys, Redis, backoff, dead_letters, group, janitor, lease};

/// A consumer that asked for something within this time is at work: pipelines ask every second, the Python worker ten
/// times a second.
const ACTIVE: Duration = Duration::from_secs(3);
/// Consumers without anything pending are forgotten after this time.
const FORGET_CONSUMERS: Duration = Duration::from_hours(1);

/// Which parts this process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// Reader and pipelines.
    All,
    /// Only the reader.
    Reader,
    /// Only the pipelines.
    Worker,
}

impl Parts {
    fn reader(self) -> bool {
        self != Self::Worker
    }

    fn worker(self) -> bool {
        self != Self::Reader
    }
}

/// A started process.
pub struct Running {
    config: Arc<Config>,
    /// What its parts say.
    pub status: Arc<Status>,
    /// Where its HTTP server listens.
    pub http: Option<SocketAddr>,
    stop_reader: CancellationToken,
    stop: CancellationToken,
    /// Told when the pipelines have ended.
    release: CancellationToken,
    readers: JoinSet<()>,
    pipelines: JoinSet<()>,
    /// What ends after everything else.
    helpers: JoinSet<()>,
    store: Option<Store>,
}

/// Runs until SIGTERM or SIGINT, then drains. A second signal ends the process at once.
///
/// # Errors
///
/// The process cannot start: the HTTP address is taken, or the configuration turns out to be unusable.
pub async fn run(config: Config, parts: Parts, metrics: PrometheusHandle) -> Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut next_signal = async move || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    let stop = CancellationToken::new();
    let mut running = start(config, parts, metrics, stop.clone()).await?;
    tokio::select! {
        name = next_signal() => info!(signal = name, limit = ?running.config.drain_timeout, "draining; a second signal ends at once"),
        () = running.failed() => {
            error!("a part of the process ended that should not have: stopping");
            running.drain().await;
            return Ok(ExitCode::FAILURE);
        }
    }
    let began = Instant::now();
    tokio::select! {
        drained = running.drain() => {
            if drained {
                info!(seconds = began.elapsed().as_secs_f64(), "drained");
                Ok(ExitCode::SUCCESS)
            } else {
                error!("not drained within DRAIN_TIMEOUT; what was in hand stays pending and is applied at the next start");
                Ok(ExitCode::FAILURE)
            }
        }
        name = next_signal() => {
            warn!(signal = name, "second signal: ending at once; what was in hand stays pending");
            // Immediately: tasks in the middle of a call are not waited for.
            std::process::exit(130);
        }
    }
}

/// Starts the parts. None of them waits for another: the reader reads while PostgreSQL is away.
///
/// # Errors
///
/// As for [`run`].
pub async fn start(
    config: Config,
    parts: Parts,
    metrics: PrometheusHandle,
    stop: CancellationToken,
) -> Result<Running> {
    let config = Arc::new(config);
    let redis = Redis::new(config.redis_url.expose()).context("REDIS_URL")?;
    let store = parts.worker().then(|| Store::new(&config)).transpose()?;
    let consumers = if parts.worker() { config.parallel_consumers } else { 0 };
    let status = Arc::new(Status::new(
        parts.reader().then(|| config.relay_url.relay()),
        (0..consumers).map(|index| config.consumer_name(index)).collect(),
    ));
    let mut running = Running {
        status: Arc::clone(&status),
        http: None,
        stop_reader: stop.child_token(),
        stop: stop.clone(),
        release: CancellationToken::new(),
        readers: JoinSet::new(),
        pipelines: JoinSet::new(),
        helpers: JoinSet::new(),
        store: store.clone(),
        config: Arc::clone(&config),
    };

    // Helpers live until everything else has ended.
    if let Some(address) = config.http_addr {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("HTTP_ADDR: cannot listen on {address}"))?;
        let address = listener.local_addr()?;
        running.http = Some(address);
        info!(%address, "HTTP");
        let server = Server::new(&config, redis.clone(), store.clone(), Arc::clone(&status), metrics.clone());
        running.helpers.spawn(async move {
            if let Err(error) = server.serve(listener).await {
                error!(%error, "the HTTP server broke");
            }
        });
    }
    running.helpers.spawn(upkeep(metrics, Arc::clone(&status)));

    running.helpers.spawn(keep_house(Keys::new(&config), redis.clone(), Arc::clone(&status)));
    if let Some(store) = &store {
        running.helpers.spawn(forget_tombstones(
            Keys::new(&config),
            redis.clone(),
            store.clone(),
            config.tombstone_retention,
        ));
        let in_hand = InHand::default();
        let (say_names, names) = watch::channel(Names::Waiting(State::Starting));
        running.helpers.spawn(prepare(
            Arc::clone(&config),
            redis.clone(),
            store.clone(),
            say_names,
            running.release.clone(),
        ));
        for index in 0..consumers {
            let (redis, store, status) = (redis.clone(), store.clone(), Arc::clone(&status));
            let pipeline =
                Pipeline::new(index, &config, redis, store, status, Arc::clone(&in_hand), names.clone());
            running.pipelines.spawn(pipeline.run(stop.clone()));
        }
    }
    if parts.reader() {
        let reader = Reader::new(Arc::clone(&config), redis, Arc::clone(&status));
        running.readers.spawn(reader.run(running.stop_reader.clone()));
    }
    info!(
        ?parts,
        version = env!("CARGO_PKG_VERSION"),
        pipelines = consumers,
        batch = config.batch_size,
        "started"
    );
    Ok(running)
}

impl Running {
    /// Resolves when a part ended without being told to: it panicked.
    pub async fn failed(&mut self) {
        tokio::select! {
            Some(_) = self.readers.join_next() => {}
            Some(_) = self.pipelines.join_next() => {}
            Some(_) = self.helpers.join_next() => {}
            else => std::future::pending().await,
        }
    }

    /// Stops the reader, lets the pipelines finish and acknowledge what they hold, closes everything.
    ///
    /// Returns whether that was done within `DRAIN_TIMEOUT`.
    pub async fn drain(&mut self) -> bool {
        let limit = self.config.drain_timeout;
        let drained = tokio::time::timeout(limit, async {
            self.stop_reader.cancel();
            while self.readers.join_next().await.is_some() {}
            self.stop.cancel();
            while self.pipelines.join_next().await.is_some() {}
        })
        .await
        .is_ok();
        self.readers.shutdown().await;
        self.pipelines.shutdown().await;
        self.release.cancel();
        // A moment for the lease to be given back; the others have no end of their own.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.helpers.join_next()).await;
        self.helpers.shutdown().await;
        if let Some(store) = &self.store {
            store.close();
        }
        drained
    }
}

/// What comes before the pipelines: the database brought up to date, then the consumer names. Ends, and gives the names
/// back, at `release`.
async fn prepare(
    config: Arc<Config>,
    redis: Redis,
    store: Store,
    names: watch::Sender<Names>,
    release: CancellationToken,
) {
    let lease = Keys::new(&config).consumer_lease;
    let token = lease::token(&config.consumer_id);
    let work = async {
        prepare_database(&store, config.auto_migrate, &names).await;
        keep_names(&config, &redis, &names, &token).await;
    };
    tokio::select! {
        () = work => {}
        () = release.cancelled() => {}
    }
    if let Ok(mut connection) = redis.connect().await {
        // If it fails the lease runs out by itself.
        let _ = lease::release(&mut connection, &lease, &token).await;
    }
}

/// Waits for the database and brings it up to date.
async fn prepare_database(store: &Store, migrate: bool, names: &watch::Sender<Names>) {
    let mut delays = backoff();
    while let Err(error) = try_prepare(store, migrate).await {
        let reason = error.message;
        names.send_replace(Names::Waiting(match error.verdict {
            Verdict::Halt | Verdict::Reject => State::Halted { reason },
            Verdict::Reconnect | Verdict::Retry => State::WaitingForPostgres { reason },
        }));
        tokio::time::sleep(delays.next().unwrap_or(Duration::from_secs(5))).await;
    }
}

async fn try_prepare(store: &Store, auto_migrate: bool) -> Result<(), StoreError> {
    let mut session = store.session().await?;
    let found = migrate::look(session.client()).await?;
    if !auto_migrate {
        if found.is_current() {
            return Ok(());
        }
        return Err(StoreError::new(
            Verdict::Halt,
            format!(
                "the database is at version {} and this program needs {} with its own functions, and AUTO_MIGRATE is \
                 false: run `standpipe migrate`",
                found.version,
                migrate::wanted()
            ),
        ));
    }
    let done = migrate::migrate(session.client_mut()).await?;
    if !done.is_empty() {
        info!(done = done.join(", "), "the database has been migrated");
    }
    Ok(())
}

/// Keeps two processes with one `CONSUMER_ID` apart: holds the lease on the names, and waits for consumers that are
/// active under them without one.
async fn keep_names(config: &Config, redis: &Redis, names: &watch::Sender<Names>, token: &str) {
    let keys = Keys::new(config);
    let ours: Vec<String> = (0..config.parallel_consumers).map(|index| config.consumer_name(index)).collect();
    let mut delays = backoff();
    loop {
        let held = async {
            let mut connection = redis.connect().await?;
            loop {
                let held = lease::take(&mut connection, &keys.consumer_lease, token).await?;
                let before = names.borrow().clone();
                let active = if held && before != Names::Ours {
                    group::active(&mut connection, &keys, &ours, ACTIVE).await?
                } else {
                    None
                };
                if held && active.is_none() {
                    names.send_if_modified(|names| std::mem::replace(names, Names::Ours) != Names::Ours);
                    tokio::time::sleep(Duration::from_secs(3)).await;
                    continue;
                }
                let reason = format!(
                    "another process works under CONSUMER_ID={}, or did a moment ago; a name that nobody uses is free \
                     after 10 s, and processes side by side need different ones",
                    config.consumer_id
                );
                if !matches!(&before, Names::Waiting(State::WaitingForLease { .. })) {
                    warn!(reason, active, "waiting");
                }
                names.send_replace(Names::Waiting(State::WaitingForLease { reason }));
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        };
        let held: Result<std::convert::Infallible, redis::RedisError> = held.await;
        let Err(error) = held;
        // While Redis is away nobody else can take the lease either; who holds it is found out afterwards.
        names.send_if_modified(|names| match names {
            Names::Ours => false,
            Names::Waiting(state) => {
                *state = State::WaitingForRedis { reason: error.to_string() };
                true
            }
        });
        tokio::time::sleep(delays.next().unwrap_or(Duration::from_secs(1)).min(Duration::from_secs(1))).await;
    }
}

/// Trims what is acknowledged, and looks at the stream for everybody.
async fn keep_house(keys: Keys, redis: Redis, status: Arc<Status>) {
    let mut delays = backoff();
    let mut said = false;
    loop {
        let Ok(mut connection) = redis.connect().await else {
            tokio::time::sleep(delays.next().unwrap_or(Duration::from_secs(5))).await;
            continue;
        };
        let mut cleaned: Option<Instant> = None;
        loop {
            let look = match janitor::sweep(&mut connection, &keys).await {
                Ok(look) => look,
                Err(error) => {
                    // An outage is told by those who wait for it; what the script itself runs into is told here.
                    if error.code() == Some("ERR") && !std::mem::replace(&mut said, true) {
                        error!(%error, "the janitor cannot look at the stream: nothing is trimmed");
                    }
                    tokio::time::sleep(delays.next().unwrap_or(Duration::from_secs(5))).await;
                    break;
                }
            };
            delays = backoff();
            metrics::look(&look);
            let again = look.trimmed > 0;
            let missing = !look.exists || !look.group;
            *lock(&status.stream) = Some((look, now_ms()));
            if missing {
                match group::ensure(&mut connection, &keys).await {
                    Ok(ensured) => metrics::note_ensured(ensured),
                    Err(_) => break,
                }
            }
            if !missing && cleaned.is_none_or(|at| at.elapsed() > FORGET_CONSUMERS / 6) {
                cleaned = Some(Instant::now());
                match group::remove_idle_consumers(&mut connection, &keys, FORGET_CONSUMERS, None).await {
                    Ok(0) => {}
                    Ok(count) => {
                        info!(count, "consumers that were idle for an hour have been removed from the group");
                    }
                    Err(_) => break,
                }
            }
            let pause = if again { Duration::from_millis(50) } else { Duration::from_secs(1) };
            tokio::time::sleep(pause).await;
        }
    }
}

/// Once an hour forgets the tombstones that are older than the retention and than everything that may still come.
async fn forget_tombstones(keys: Keys, redis: Redis, store: Store, retention: Duration) {
    loop {
        let swept = async {
            let mut connection = redis.connect().await.ok()?;
            let oldest = dead_letters::oldest_source(&mut connection, &keys).await.ok()?;
            let bound = now_ms().saturating_sub(retention.as_millis() as u64).min(oldest.unwrap_or(u64::MAX));
            tombstones::sweep(store.session().await.ok()?.client(), bound).await.ok()
        };
        // When a server is away the next hour will do.
        if let Some(count @ 1..) = swept.await {
            info!(count, "tombstones older than the retention have been forgotten");
        }
        tokio::time::sleep(Duration::from_hours(1)).await;
    }
}

/// Keeps the histograms small and says now and then how it is going.
async fn upkeep(metrics: PrometheusHandle, status: Arc<Status>) {
    let mut entries = 0;
    let mut tick = tokio::time::interval(Duration::from_secs(5));
    let mut last = Instant::now();
    loop {
        tick.tick().await;
        metrics.run_upkeep();
        if last.elapsed() < Duration::from_secs(10) {
            continue;
        }
        let now = status.entries.load(Ordering::Relaxed);
        let rate = (now - entries) as f64 / last.elapsed().as_secs_f64();
        (entries, last) = (now, Instant::now());
        let look = status.look().map(|(look, _)| look).unwrap_or_default();
        info!(
            events_per_second = format_args!("{rate:.0}"),
            entries = now,
            waiting = report::waiting(&look).map_or_else(|| "unknown".to_owned(), |n| n.to_string()),
            pending = look.pending,
            oldest_seconds = format_args!("{:.1}", report::oldest_seconds(&look).unwrap_or(0.0)),
            "progress"
        );
    }
}
