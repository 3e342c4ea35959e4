//! Starting the parts and ending them in order. The only place that spawns.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use metrics_exporter_prometheus::PrometheusHandle;
use redis::aio::MultiplexedConnection;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::config::Config;
use crate::control::Control;
use crate::http::{self, Server};
use crate::metrics;
use crate::pipeline::{InHand, Names, Pipeline};
use crate::relay::reader::Reader;
use crate::report;
use crate::status::{Settings, State, Status, lock, now_ms};
use crate::store::acknowledged::{Known, Noted};
use crate::store::verdict::Verdict;
use crate::store::{Store, StoreError, acknowledged, migrate, purge, takeover, tombstones};
use crate::stream::gap::Gap;
use crate::stream::legacy::{self, Legacy};
use crate::stream::noted::Refill;
use crate::stream::{Keys, Redis, backoff, dead_letters, group, is_nogroup, is_oom, janitor, lease, noted};

/// A consumer that sent a read within this time is active: pipelines read every second, the Python worker ten times a second.
const ACTIVE: Duration = Duration::from_secs(3);
/// Idle consumers with nothing pending are removed after this time.
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
    /// The status of its parts.
    pub status: Arc<Status>,
    /// Where its HTTP server listens.
    pub http: Option<SocketAddr>,
    stop_reader: CancellationToken,
    stop: CancellationToken,
    /// Told when the pipelines have ended.
    release: CancellationToken,
    readers: JoinSet<()>,
    pipelines: JoinSet<()>,
    /// Tasks that end at `release`.
    keepers: JoinSet<()>,
    /// Runs until aborted.
    helpers: JoinSet<()>,
    store: Option<Store>,
    control: Arc<Control>,
}

/// Runs until SIGTERM, SIGINT or an operator's drain request, then drains. A second signal ends the process immediately.
///
/// # Errors
///
/// The process cannot start: the HTTP address is taken, or the configuration turns out to be unusable.
pub async fn run(
    config: Config,
    parts: Parts,
    metrics: PrometheusHandle,
    control: Control,
) -> Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut next_signal = async move || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    let stop = CancellationToken::new();
    let mut running = start(config, parts, metrics, control, &stop)?;
    let control = Arc::clone(&running.control);
    tokio::select! {
        name = next_signal() => {
            info!(signal = name, limit = ?running.config.drain_timeout, "draining; a second signal exits immediately");
        }
        () = control.drain_begun() => {
            info!(limit = ?running.config.drain_timeout, "draining on request; a signal exits immediately");
        }
        () = running.failed() => {
            error!("a part of the process ended unexpectedly: stopping");
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
                error!("not drained within DRAIN_TIMEOUT; entries in hand stay pending for the next start");
                Ok(ExitCode::FAILURE)
            }
        }
        name = next_signal() => {
            warn!(signal = name, "a signal while draining: exiting immediately; entries in hand stay pending");
            // Immediately: tasks in the middle of a call are not waited for.
            std::process::exit(130);
        }
    }
}

/// Starts the parts. None of them waits for another: the reader reads while PostgreSQL is down.
///
/// # Errors
///
/// As for [`run`].
pub fn start(
    config: Config,
    parts: Parts,
    metrics: PrometheusHandle,
    control: Control,
    stop: &CancellationToken,
) -> Result<Running> {
    let control = Arc::new(control);
    let config = Arc::new(config);
    let redis = Redis::open(&config).context("REDIS_URL")?;
    let store = parts.worker().then(|| Store::new(&config)).transpose()?;
    let consumers = if parts.worker() { config.parallel_consumers } else { 0 };
    let status = Arc::new(Status::new(
        parts.reader().then(|| config.relay_url.relay()),
        (0..consumers).map(|index| config.consumer_name(index)).collect(),
        Settings { transaction: config.transaction.as_str(), batch_size: config.batch_size },
    ));
    let mut running = Running {
        status: Arc::clone(&status),
        http: None,
        stop_reader: stop.child_token(),
        stop: stop.clone(),
        release: CancellationToken::new(),
        readers: JoinSet::new(),
        pipelines: JoinSet::new(),
        keepers: JoinSet::new(),
        helpers: JoinSet::new(),
        store: store.clone(),
        config: Arc::clone(&config),
        control: Arc::clone(&control),
    };

    // Helpers live until everything else has ended.
    if let Some(address) = config.http_addr {
        let listener =
            http::listen(address).with_context(|| format!("HTTP_ADDR: cannot listen on {address}"))?;
        let address = listener.local_addr()?;
        running.http = Some(address);
        info!(%address, "HTTP");
        let server = Server::new(
            &config,
            redis.clone(),
            store.clone(),
            Arc::clone(&status),
            metrics.clone(),
            Arc::clone(&control),
        );
        running.helpers.spawn(server.serve(listener));
    }
    running.helpers.spawn(upkeep(metrics, Arc::clone(&status)));

    running.keepers.spawn(keep_legacy_status(
        config.legacy_status,
        config.relay_url.to_string(),
        redis.clone(),
        store.clone(),
        Arc::clone(&status),
        running.release.clone(),
    ));
    running.helpers.spawn(keep_house(Keys::new(&config), redis.clone(), Arc::clone(&status)));
    if let Some(store) = &store {
        running.helpers.spawn(forget_tombstones(
            Keys::new(&config),
            redis.clone(),
            store.clone(),
            config.tombstone_retention,
            Arc::clone(&control),
        ));
        running.helpers.spawn(purge_accounts(store.clone(), Arc::clone(&control)));
        running.helpers.spawn(note_acknowledged(
            Keys::new(&config),
            redis.clone(),
            store.clone(),
            Arc::clone(&status),
        ));
        let in_hand = InHand::default();
        let (say_names, names) = watch::channel(Names::Waiting(State::Starting));
        let first = Pipeline::new(
            0,
            &config,
            redis.clone(),
            store.clone(),
            Arc::clone(&status),
            Arc::clone(&in_hand),
            names.clone(),
        );
        running.keepers.spawn(prepare(
            Arc::clone(&config),
            redis.clone(),
            store.clone(),
            first,
            say_names,
            running.release.clone(),
        ));
        for index in 0..consumers {
            let (redis, store, status) = (redis.clone(), store.clone(), Arc::clone(&status));
            let pipeline =
                Pipeline::new(index, &config, redis, store, status, Arc::clone(&in_hand), names.clone());
            let pipeline = pipeline.paused_by(control.pipelines());
            running.pipelines.spawn(pipeline.run(stop.clone()));
        }
    }
    if parts.reader() {
        let reader = Reader::new(Arc::clone(&config), redis, Arc::clone(&status), control.reader())?;
        running.readers.spawn(reader.run(running.stop_reader.clone()));
    }
    info!(
        ?parts,
        version = env!("STANDPIPE_VERSION"),
        pipelines = consumers,
        batch = config.batch_size,
        transaction = config.transaction.as_str(),
        "started"
    );
    Ok(running)
}

impl Running {
    /// Resolves when a part ended unexpectedly: it panicked.
    pub async fn failed(&mut self) {
        tokio::select! {
            Some(_) = self.readers.join_next() => {}
            Some(_) = self.pipelines.join_next() => {}
            Some(_) = self.keepers.join_next() => {}
            Some(_) = self.helpers.join_next() => {}
            else => std::future::pending().await,
        }
    }

    /// Resolves when an operator asks for a drain.
    pub async fn drain_begun(&self) {
        self.control.drain_begun().await;
    }

    /// Stops the reader, lets the pipelines finish and acknowledge what they hold, closes everything.
    ///
    /// Returns whether that was done within `DRAIN_TIMEOUT`.
    pub async fn drain(&mut self) -> bool {
        self.control.drain();
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
        // A moment to give the lease back and to write the last figures.
        let _ = tokio::time::timeout(Duration::from_secs(1), async {
            while self.keepers.join_next().await.is_some() {}
        })
        .await;
        self.keepers.shutdown().await;
        self.helpers.shutdown().await;
        if let Some(store) = &self.store {
            store.close().await;
        }
        drained
    }
}

/// Prepares the pipelines: migrates the database, then claims the consumer names. Ends, and gives the names back, at `release`.
async fn prepare(
    config: Arc<Config>,
    redis: Redis,
    store: Store,
    first: Pipeline,
    names: watch::Sender<Names>,
    release: CancellationToken,
) {
    let lease = Keys::new(&config).consumer_lease;
    let token = lease::token(&config.consumer_id);
    let work = async {
        prepare_database(&store, config.auto_migrate, &names).await;
        take_over(&Keys::new(&config), &redis, &store, &first, &names, &release).await;
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
    store.refuse_transaction_pooling().await?;
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

/// Replays what another program left in the group, before our first entry: at the first start on its database, and whenever
/// such a program works beside us.
async fn take_over(
    keys: &Keys,
    redis: &Redis,
    store: &Store,
    first: &Pipeline,
    names: &watch::Sender<Names>,
    stop: &CancellationToken,
) {
    let mut delays = backoff();
    loop {
        let work = async {
            let due = takeover::is_due(store.session().await?.client()).await?;
            let mut connection = redis.connect().await?;
            // Without a group nothing was left; the first reader creates one.
            let others = match group::has_others(&mut connection, keys).await {
                Ok(others) => others,
                Err(error) if is_nogroup(&error) => return anyhow::Ok(()),
                Err(error) => return Err(error.into()),
            };
            if (due || others)
                && let Some(count @ 1..) = first.take_over(stop).await?
            {
                info!(entries = count, "replayed entries that another program left pending");
            }
            if due {
                takeover::done(store.session().await?.client()).await?;
            }
            anyhow::Ok(())
        };
        let Err(error) = work.await else { return };
        let reason = format!("{error:#}");
        names.send_replace(Names::Waiting(if error.is::<StoreError>() {
            State::WaitingForPostgres { reason }
        } else {
            State::WaitingForRedis { reason }
        }));
        tokio::time::sleep(delays.next().unwrap_or(Duration::from_secs(5))).await;
    }
}

/// Keeps two processes with one `CONSUMER_ID` apart: holds the lease on the names, and waits for consumers that are
/// active under them without one.
async fn keep_names(config: &Config, redis: &Redis, names: &watch::Sender<Names>, token: &str) {
    let keys = Keys::new(config);
    let ours = config.consumer_names();
    let mut delays = backoff();
    loop {
        let held = async {
            let mut connection = redis.connect().await?;
            loop {
                let held = match lease::take(&mut connection, &keys.consumer_lease, token).await {
                    // Redis refuses the lease because its memory is full: only our work can change that. That nobody
                    // holds it, and that nobody is active under our names, has to do.
                    Err(error) if is_oom(&error) => {
                        lease::life(&mut connection, &keys.consumer_lease).await?.is_none()
                    }
                    held => held?,
                };
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
                    "another process works under CONSUMER_ID={}, or did a moment ago; an unused name is free \
                     after 10 s, and concurrent processes need different names",
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
        // While Redis is down nobody else can take the lease either; we find out afterwards who holds it.
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

/// Trims acknowledged entries, and records the state of the stream for all parts.
async fn keep_house(keys: Keys, redis: Redis, status: Arc<Status>) {
    let mut delays = backoff();
    let mut said = false;
    let mut beside = false;
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
                    // Outages are reported by the parts that wait; errors of the script itself are reported here.
                    if error.code() == Some("ERR") && !std::mem::replace(&mut said, true) {
                        error!(%error, "the janitor cannot read the stream: nothing is trimmed");
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
            if !missing && !status.pipelines.is_empty() {
                let Ok(others) = group::has_others(&mut connection, &keys).await else { break };
                if std::mem::replace(&mut beside, others) != others {
                    info!(others, "another program works in the consumer group, or holds entries there");
                }
            }
            if !missing && cleaned.is_none_or(|at| at.elapsed() > FORGET_CONSUMERS / 6) {
                cleaned = Some(Instant::now());
                match group::remove_idle_consumers(&mut connection, &keys, FORGET_CONSUMERS, None).await {
                    Ok(0) => {}
                    Ok(count) => {
                        info!(count, "removed consumers that were idle for an hour");
                    }
                    Err(_) => break,
                }
            }
            let pause = if again { Duration::from_millis(50) } else { Duration::from_secs(1) };
            tokio::time::sleep(pause).await;
        }
    }
}

/// Writes the keys of the old application's pages, every second and once more at `release`, where they are wanted.
async fn keep_legacy_status(
    mut wanted: Option<bool>,
    url: String,
    redis: Redis,
    store: Option<Store>,
    status: Arc<Status>,
    release: CancellationToken,
) {
    let mut legacy = Legacy::new(url);
    while wanted != Some(false) {
        let work = async {
            let mut connection = redis.connect().await?;
            if wanted.is_none() {
                wanted = Some(legacy::is_there(&mut connection).await? || was_theirs(store.as_ref()).await?);
            }
            while wanted == Some(true) {
                let last = release.is_cancelled();
                legacy.write(&mut connection, &status).await?;
                if last {
                    break;
                }
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_secs(1)) => {}
                    () = release.cancelled() => {}
                }
            }
            anyhow::Ok(())
        };
        // The pipelines and the reader report outages.
        if work.await.is_ok() || release.is_cancelled() {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = release.cancelled() => {}
        }
    }
    release.cancelled().await;
}

/// Whether the database was that of the old workers; waits for it.
async fn was_theirs(store: Option<&Store>) -> Result<bool, StoreError> {
    match store {
        Some(store) => takeover::was_theirs(store.session().await?.client()).await,
        None => Ok(false),
    }
}

/// Once an hour, deletes tombstones that are older than the retention and than any entry that may still come.
async fn forget_tombstones(
    keys: Keys,
    redis: Redis,
    store: Store,
    retention: Duration,
    control: Arc<Control>,
) {
    loop {
        control.pipelines_go().await;
        let swept = async {
            let mut connection = redis.connect().await.ok()?;
            let oldest = dead_letters::oldest_source(&mut connection, &keys).await.ok()?;
            let bound = now_ms().saturating_sub(retention.as_millis() as u64).min(oldest.unwrap_or(u64::MAX));
            tombstones::sweep(store.session().await.ok()?.client(), bound).await.ok()
        };
        // If a server is down, try again in an hour.
        if let Some(count @ 1..) = swept.await {
            info!(count, "deleted tombstones older than the retention");
        }
        tokio::time::sleep(Duration::from_hours(1)).await;
    }
}

/// Records in PostgreSQL, every second, what the group has acknowledged. When PostgreSQL knows less than it had recorded, the
/// reader goes back for the missing events.
async fn note_acknowledged(keys: Keys, redis: Redis, store: Store, status: Arc<Status>) {
    let mut last = None;
    loop {
        let work = async {
            let mut connection = redis.connect().await?;
            loop {
                let state = noted::read(&mut connection, &keys).await?;
                compare(&mut connection, &keys, &store, state, &mut last, &status).await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        // The pipelines and the reader report outages; before the first migration there is no table to write to.
        let _: Result<std::convert::Infallible> = work.await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// One round of [`note_acknowledged`]. `last`: what was noted last.
async fn compare(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    store: &Store,
    state: noted::State,
    last: &mut Option<Noted>,
    status: &Status,
) -> Result<()> {
    let session = store.session().await?;
    let known = match acknowledged::known(&session, &keys.stream, &keys.group).await {
        Ok(known) => known,
        Err(error) => {
            session.discard();
            return Err(error.into());
        }
    };
    let known_ms = known.noted.as_ref().map_or(0, |noted| noted.ms);
    let another = !state.server.is_empty() && !known.server.is_empty() && state.server != known.server;
    if known_ms < state.noted_ms || (another && state.noted_ms > 0) {
        *last = None;
        return go_back(connection, keys, &state, &known, status).await;
    }
    let over = state.refill.filter(|refill| state.acked.is_some_and(|acked| acked >= refill.until));
    if let Some(refill) = over {
        noted::refilled(connection, keys).await?;
        warn!(
            from = refill.from,
            until = refill.until,
            seconds = state.now_ms.saturating_sub(refill.since_ms) / 1000,
            "events that PostgreSQL had lost have been read again"
        );
    }
    *lock(&status.refill) = state.refill.filter(|_| over.is_none());
    metrics::refilling(lock(&status.refill).is_some());
    let new = Noted { ms: state.now_ms, relay: state.relay, epoch: state.epoch, position: state.acked };
    let same = |last: &Noted| Noted { ms: new.ms, ..last.clone() } == new;
    if last.as_ref().is_some_and(same) && known_ms > 0 {
        return Ok(());
    }
    acknowledged::note(&session, &keys.stream, &keys.group, &new).await?;
    noted::remember(connection, keys, new.ms, &known.server).await?;
    *last = Some(new);
    Ok(())
}

/// PostgreSQL knows less than it had recorded: sends the reader back to PostgreSQL's position.
async fn go_back(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    state: &noted::State,
    known: &Known,
    status: &Status,
) -> Result<()> {
    let noted = known.noted.clone().unwrap_or_default();
    // A position is of use only to the relay, and in the numbering, that it comes from.
    let position = noted.position.filter(|_| noted.relay == state.relay && noted.epoch == state.epoch);
    let gap = position.is_none().then(|| {
        Gap::new(
            "the database lacks acknowledged events, and does not know from which position; everything that the relay \
             still has is read again",
            None,
        )
    });
    let from = position.unwrap_or(0);
    if noted::refill(connection, keys, state, from, noted.ms, &known.server, gap.as_ref()).await? {
        let until = state.acked.unwrap_or(from);
        *lock(&status.refill) = Some(Refill { from, until, since_ms: state.now_ms });
        metrics::refilling(true);
        metrics::count(metrics::DATABASE_WENT_BACK, 1);
        if gap.is_some() {
            metrics::count(metrics::RELAY_GAPS, 1);
        }
        error!(
            from,
            acknowledged = state.acked,
            "PostgreSQL has gone back in time, or is another database: it lacks acknowledged events; the reader goes back \
             for them"
        );
    }
    Ok(())
}

/// Removes the records of deleted accounts.
async fn purge_accounts(store: Store, control: Arc<Control>) {
    let mut delays = backoff();
    loop {
        control.pipelines_go().await;
        let work = async {
            // The statements are ended by the server's own limit, like all of this pool.
            let session = store.session().await?;
            let Some(deletion) = purge::next(session.client()).await? else { return Ok(None) };
            match purge::purge(session.client(), &deletion).await {
                Ok(count) => Ok(Some((deletion.did, count))),
                Err(error) => {
                    session.discard();
                    Err(error)
                }
            }
        };
        let done: Result<_, StoreError> = work.await;
        match done {
            Ok(Some((did, records))) => {
                delays = backoff();
                metrics::count(metrics::PURGED_ACCOUNTS, 1);
                metrics::count(metrics::PURGED_RECORDS, records);
                debug!(did, records, "removed the records of a deleted account");
            }
            Ok(None) => tokio::time::sleep(Duration::from_secs(1)).await,
            // The pipelines report outages; before the first migration there is no table to read.
            Err(_) => tokio::time::sleep(delays.next().unwrap_or(Duration::from_secs(5))).await,
        }
    }
}

/// Keeps the histograms small and logs progress now and then.
async fn upkeep(metrics: PrometheusHandle, status: Arc<Status>) {
    const TICK: Duration = Duration::from_secs(5);
    let mut before = [(0, Instant::now()); 2];
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    let mut says = false;
    loop {
        tick.tick().await;
        metrics.run_upkeep();
        let now = status.entries.load(Ordering::Relaxed);
        let (entries, since) = before[0];
        let rate = (now - entries) as f64 / since.elapsed().as_secs_f64();
        before = [before[1], (now, Instant::now())];
        *lock(&status.pace) = Some(rate);
        says = !says;
        if says {
            continue;
        }
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
