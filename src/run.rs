//! Starts the parts, and ends them in order.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::{Config, WantedDids};
use crate::control::Control;
use crate::handlers;
use crate::http::{self, Server};
use crate::origin::Reader;
use crate::origin::jetstream::Jetstream;
use crate::origin::relay::Relay;
use crate::pipeline::{Names, Pipeline, Shared};
use crate::status::{Settings, State, Status};
use crate::store::Store;
use crate::store::handlers::Handlers;
use crate::stream::Redis;
use crate::tasks::acknowledged::Acknowledged;
use crate::tasks::backfill::Lister;
use crate::tasks::gaps::Gaps;
use crate::tasks::janitor::Janitor;
use crate::tasks::legacy::LegacyKeys;
use crate::tasks::prepare::Prepare;
use crate::tasks::progress::Progress;
use crate::tasks::purge::Purge;
use crate::tasks::repairs::{Repairs, Requests};
use crate::tasks::results::Results;
use crate::tasks::standings::Standings;
use crate::tasks::tombstones::Tombstones;
use crate::tasks::tracked::Tracked;
use crate::tasks::{self, Task};

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
    redis: Redis,
    /// Present if there are pipelines.
    store: Option<Store>,
    /// The operator's functions, if there are any and there are pipelines.
    handlers: Option<Handlers>,
    /// The status of its parts.
    pub status: Arc<Status>,
    control: Arc<Control>,
    /// Where its HTTP server listens.
    pub http: Option<SocketAddr>,
    stop_reader: CancellationToken,
    stop: CancellationToken,
    /// Cancelled when the pipelines have ended.
    release: CancellationToken,
    readers: JoinSet<()>,
    pipelines: JoinSet<()>,
    /// Tasks that end at `release`.
    keepers: JoinSet<()>,
    /// Runs until aborted, when everything else has ended.
    helpers: JoinSet<()>,
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
            // Exits without waiting for tasks in the middle of a call.
            std::process::exit(130);
        }
    }
}

/// Starts the parts. None waits for another: the reader reads even while PostgreSQL is down.
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
    let handlers = if parts.worker() { Handlers::new(&config)? } else { None };
    let consumers = if parts.worker() { config.parallel_consumers } else { 0 };
    let status = Arc::new(Status::new(
        parts.reader().then(|| config.relay_url.relay()),
        (0..consumers).map(|index| config.consumer_name(index)).collect(),
        Settings { transaction: config.transaction.as_str(), batch_size: config.batch_size },
    ));
    let mut running = Running {
        config: Arc::clone(&config),
        redis,
        store,
        handlers,
        status,
        control,
        http: None,
        stop_reader: stop.child_token(),
        stop: stop.clone(),
        release: CancellationToken::new(),
        readers: JoinSet::new(),
        pipelines: JoinSet::new(),
        keepers: JoinSet::new(),
        helpers: JoinSet::new(),
    };
    running.start_http(&metrics)?;
    running.start_tasks(metrics);
    running.start_pipelines(consumers);
    if parts.reader() {
        running.start_reader()?;
    }
    #[cfg(feature = "amqp")]
    {
        running.start_queue();
        running.start_exchange();
    }
    #[cfg(feature = "kafka")]
    {
        running.start_partitions();
        running.start_topic();
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
    fn start_http(&mut self, metrics: &PrometheusHandle) -> Result<()> {
        let Some(address) = self.config.http_addr else { return Ok(()) };
        let listener =
            http::listen(address).with_context(|| format!("HTTP_ADDR: cannot listen on {address}"))?;
        let address = listener.local_addr()?;
        self.http = Some(address);
        info!(%address, "HTTP");
        let (status, control) = (Arc::clone(&self.status), Arc::clone(&self.control));
        let server = Server::new(
            &self.config,
            self.redis.clone(),
            (self.store.clone(), self.handlers.clone()),
            status,
            metrics.clone(),
            control,
        );
        self.helpers.spawn(server.serve(listener));
        Ok(())
    }

    fn start_tasks(&mut self, metrics: PrometheusHandle) {
        let redis = &self.redis.clone();
        let status = || Arc::clone(&self.status);
        let progress = Progress::new(metrics, status());
        let janitor = Janitor::new(Arc::clone(&self.config), redis.clone(), status());
        let url = self.config.relay_url.to_string();
        let legacy =
            LegacyKeys::new(self.config.legacy_status, url, redis.clone(), self.store.clone(), status());
        self.help(progress);
        self.help(janitor);
        self.keep(legacy);
        let Some(store) = &self.store.clone() else { return };
        let control = Arc::clone(&self.control);
        self.help(Tombstones {
            redis: redis.clone(),
            store: store.clone(),
            retention: self.config.tombstone_retention,
            control: Arc::clone(&control),
        });
        if self.config.wanted_dids == Some(WantedDids::Tracked) {
            self.help(Tracked::new(redis.clone(), store.clone()));
        }
        self.help(Requests::new(redis.clone(), store.clone()));
        self.help(Standings::new(store.clone(), Arc::clone(&self.status)));
        let repairer = Arc::default();
        for _ in 0..self.config.repairers() {
            let (config, control) = (Arc::clone(&self.config), Arc::clone(&control));
            self.help(Repairs::new(config, redis.clone(), store.clone(), control, Arc::clone(&repairer)));
        }
        if let Some(what) = self.config.backfill.clone() {
            let (config, control) = (Arc::clone(&self.config), Arc::clone(&control));
            self.help(Lister::new(config, store.clone(), control, what));
        }
        if self.handlers.is_some() {
            let (store, control) = (store.clone(), Arc::clone(&control));
            self.help(Results { store, control, keep: self.config.handler_results });
        }
        let config = Arc::clone(&self.config);
        self.help(Gaps::new(config, redis.clone(), store.clone(), Arc::clone(&control)));
        self.help(Purge { store: store.clone(), control });
        self.help(Acknowledged::new(redis.clone(), store.clone(), Arc::clone(&self.status)));
    }

    /// Spawns a task that is aborted when everything else has ended.
    fn help(&mut self, task: impl Task + 'static) {
        self.helpers.spawn(tasks::run(task, Arc::clone(&self.status), CancellationToken::new()));
    }

    /// Spawns a task that ends at `release`.
    fn keep(&mut self, task: impl Task + 'static) {
        self.keepers.spawn(tasks::run(task, Arc::clone(&self.status), self.release.clone()));
    }

    fn start_pipelines(&mut self, count: usize) {
        let Some(store) = &self.store else { return };
        let shared = Arc::new(Shared::new(&self.config));
        let (say_names, names) = watch::channel(Names::Waiting(State::Starting));
        let pipeline = |index| {
            let (redis, store, status) = (self.redis.clone(), store.clone(), Arc::clone(&self.status));
            Pipeline::new(index, &self.config, redis, store, status, Arc::clone(&shared), names.clone())
        };
        let prepare = Prepare {
            config: Arc::clone(&self.config),
            redis: self.redis.clone(),
            store: store.clone(),
            pipeline: pipeline(0),
            names: say_names,
        };
        self.keepers.spawn(prepare.run(self.release.clone()));
        if let Some(handlers) = &self.handlers {
            let (handlers, status) = (handlers.clone(), Arc::clone(&self.status));
            let pause = self.control.pipelines();
            let worker =
                handlers::Worker::new(&self.config, &self.redis, handlers, status, names.clone(), pause);
            self.pipelines.spawn(worker.run(self.stop.clone()));
        }
        for index in 0..count {
            let pipeline = pipeline(index).paused_by(self.control.pipelines());
            self.pipelines.spawn(pipeline.run(self.stop.clone()));
        }
    }

    fn start_reader(&mut self) -> Result<()> {
        let status = || Arc::clone(&self.status);
        let (config, redis) = (Arc::clone(&self.config), self.redis.clone());
        let reader = Reader::new(config, redis, status(), self.control.reader())?;
        let (config, stop) = (Arc::clone(&self.config), self.stop_reader.clone());
        if config.relay_url.is_jetstream() {
            self.readers.spawn(reader.run(Jetstream::new(config, status())?, stop));
        } else {
            self.readers.spawn(reader.run(Relay::new(config, status())?, stop));
        }
        Ok(())
    }

    #[cfg(feature = "kafka")]
    fn start_partitions(&mut self) {
        let Some(from) = self.config.kafka_origin.clone() else { return };
        let (redis, status) = (self.redis.clone(), Arc::clone(&self.status));
        let partitions =
            crate::origin::kafka::Partitions::new(from, &self.config, redis, status, self.control.reader());
        self.readers.spawn(partitions.run(self.stop_reader.clone()));
    }

    #[cfg(feature = "kafka")]
    fn start_topic(&mut self) {
        let (Some(to), Some(store)) = (self.config.kafka_output.clone(), self.store.clone()) else { return };
        let (redis, status) = (self.redis.clone(), Arc::clone(&self.status));
        let topic = crate::output::publish::Outlet::new(to, &self.config, redis, store, status);
        self.pipelines.spawn(topic.run(self.stop.clone()));
    }

    #[cfg(feature = "amqp")]
    fn start_queue(&mut self) {
        let Some(from) = self.config.amqp_origin.clone() else { return };
        let (redis, status) = (self.redis.clone(), Arc::clone(&self.status));
        let queue = crate::origin::amqp::Queue::new(from, &self.config, redis, status, self.control.reader());
        self.readers.spawn(queue.run(self.stop_reader.clone()));
    }

    #[cfg(feature = "amqp")]
    fn start_exchange(&mut self) {
        let (Some(to), Some(store)) = (self.config.amqp_output.clone(), self.store.clone()) else { return };
        let (redis, status) = (self.redis.clone(), Arc::clone(&self.status));
        let exchange = crate::output::publish::Outlet::new(to, &self.config, redis, store, status);
        self.pipelines.spawn(exchange.run(self.stop.clone()));
    }

    /// Resolves when a part has ended unexpectedly, which means that it panicked.
    pub async fn failed(&mut self) {
        tokio::select! {
            Some(_) = self.readers.join_next() => {}
            Some(_) = self.pipelines.join_next() => {}
            Some(_) = self.keepers.join_next() => {}
            Some(_) = self.helpers.join_next() => {}
            else => std::future::pending().await,
        }
    }

    /// Resolves when an operator requests a drain.
    pub async fn drain_begun(&self) {
        self.control.drain_begun().await;
    }

    /// Stops the reader, lets the pipelines finish and acknowledge their entries, then closes everything.
    ///
    /// Returns whether that succeeded within `DRAIN_TIMEOUT`.
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
        if let Some(handlers) = &self.handlers {
            handlers.close().await;
        }
        self.release.cancel();
        // Allows a moment to release the lease and write the final figures.
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
