//! Health, readiness, metrics and status over HTTP.

pub mod client;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use redis::aio::MultiplexedConnection;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Mutex;

use crate::config::Config;
use crate::metrics;
use crate::report::{self, PoolReport};
use crate::status::{State, Status, lock, now_ms};
use crate::store::Store;
use crate::stream::{Keys, Redis};

/// Waiting work and no progress for this long means not ready.
const NO_PROGRESS: Duration = Duration::from_secs(30);
/// How long a server may take to answer us.
const ANSWER: Duration = Duration::from_secs(2);

/// What the handlers look at.
pub struct Server {
    status: Arc<Status>,
    keys: Keys,
    redis: Redis,
    connection: Mutex<Option<MultiplexedConnection>>,
    store: Option<Store>,
    pool_max: usize,
    metrics: PrometheusHandle,
    process: metrics_process::Collector,
}

/// What readiness says.
#[derive(Debug, Serialize)]
pub struct Readiness {
    ready: bool,
    /// Everything that is wrong, for people.
    reasons: Vec<String>,
}

impl Server {
    /// A server for this process's parts; `store` where there are pipelines.
    #[must_use]
    pub fn new(
        config: &Config,
        redis: Redis,
        store: Option<Store>,
        status: Arc<Status>,
        metrics: PrometheusHandle,
    ) -> Self {
        let process = metrics_process::Collector::new("standpipe_");
        process.describe();
        Self {
            status,
            keys: Keys::new(config),
            redis,
            connection: Mutex::new(None),
            store,
            pool_max: config.db_pool_size,
            metrics,
            process,
        }
    }

    /// Answers for as long as it is polled.
    ///
    /// # Errors
    ///
    /// The listener broke.
    pub async fn serve(self, listener: TcpListener) -> std::io::Result<()> {
        let routes = Router::new()
            .route("/livez", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/health", get(readyz))
            .route("/metrics", get(prometheus))
            .route("/status", get(status))
            .route("/workers/status", get(status))
            .with_state(Arc::new(self));
        axum::serve(listener, routes).await
    }

    /// Asks Redis, over a connection that is kept while it is good.
    async fn ask_redis(&self) -> Result<report::Report, String> {
        let ask = async {
            let mut kept = self.connection.lock().await;
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => self.redis.connect().await?,
            };
            let report = report::report(&mut connection, &self.keys).await?;
            *kept = Some(connection);
            Ok(report)
        };
        match tokio::time::timeout(ANSWER, ask).await {
            Ok(Ok(report)) => Ok(report),
            Ok(Err(error)) => {
                let error: redis::RedisError = error;
                Err(error.to_string())
            }
            Err(_) => Err(format!("no answer within {ANSWER:?}")),
        }
    }

    async fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        let report = match self.ask_redis().await {
            Ok(report) => Some(report),
            Err(reason) => {
                reasons.push(format!("Redis: {reason}"));
                None
            }
        };
        if let Some(store) = &self.store {
            // All connections being in use is no sign of illness while work goes on.
            let (_, in_use) = store.pool_status();
            if in_use < self.pool_max
                && let Err(error) = store.ping(ANSWER).await
            {
                reasons.push(format!("PostgreSQL: {error}"));
            }
        }
        for pipeline in &self.status.pipelines {
            let pipeline = lock(pipeline);
            match &pipeline.state {
                State::Halted { reason } => {
                    reasons.push(format!("{} has stopped reading: {reason}", pipeline.consumer));
                }
                State::Starting => reasons.push(format!("{} is starting", pipeline.consumer)),
                _ => {}
            }
        }
        if let (Some(report), false) = (&report, self.status.pipelines.is_empty()) {
            let oldest = report.stream.oldest_waiting_seconds.unwrap_or(0.0);
            let since = self.status.last_ack_ms.load(Ordering::Relaxed).max(self.status.started_ms);
            let idle = Duration::from_millis(now_ms().saturating_sub(since));
            if oldest > NO_PROGRESS.as_secs_f64() && idle > NO_PROGRESS {
                reasons.push(format!(
                    "no progress: the oldest entry has waited for {oldest:.0} s and nothing was finished for {} s",
                    idle.as_secs()
                ));
            }
        }
        if let Some(reader) = &self.status.reader {
            let reader = lock(reader);
            let away = Duration::from_millis(now_ms().saturating_sub(reader.connected_ms));
            match &reader.state {
                State::Halted { reason } => reasons.push(format!("the reader has stopped: {reason}")),
                State::WaitingForRelay { reason } if !reader.connected && away > NO_PROGRESS => {
                    reasons.push(format!("no relay for {} s: {reason}", away.as_secs()));
                }
                _ => {}
            }
        }
        Readiness { ready: reasons.is_empty(), reasons }
    }

    fn pool(&self) -> Option<PoolReport> {
        self.store.as_ref().map(|store| {
            let (size, in_use) = store.pool_status();
            PoolReport { size, in_use, max: self.pool_max }
        })
    }
}

async fn readyz(Shared(server): Shared<Arc<Server>>) -> Response {
    let readiness = server.readiness().await;
    let code = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(readiness)).into_response()
}

async fn prometheus(Shared(server): Shared<Arc<Server>>) -> Response {
    server.process.collect();
    if let Some(pool) = server.pool() {
        ::metrics::gauge!(metrics::POOL_SIZE).set(pool.size as f64);
        ::metrics::gauge!(metrics::POOL_IN_USE).set(pool.in_use as f64);
    }
    if let Some(reader) = &server.status.reader
        && let Some(last) = lock(reader).last_frame_ms
    {
        ::metrics::gauge!(metrics::RELAY_FRAME_AGE).set(now_ms().saturating_sub(last) as f64 / 1000.0);
    }
    let headers = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (headers, server.metrics.render()).into_response()
}

async fn status(Shared(server): Shared<Arc<Server>>) -> Response {
    let process = report::process(&server.status, server.pool());
    match server.ask_redis().await {
        Ok(mut report) => {
            report.process = Some(process);
            Json(report).into_response()
        }
        Err(reason) => {
            let body = serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"), "error": format!("Redis: {reason}"), "process": process,
            });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}
