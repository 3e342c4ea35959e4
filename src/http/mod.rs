//! Health, readiness, metrics, status, the dashboard and control over HTTP.

mod admin;
pub mod client;
mod connections;
mod ingest;
pub mod live;
mod statements;
mod subscribe;
mod tasks;

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State as Shared};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::sync::Mutex;

pub use self::connections::{MAX_CONNECTIONS, listen};
use self::ingest::Inlet;
use self::live::Live;
use self::subscribe::Outlet;
use crate::config::{AccessToken, Config, LogLevel};
use crate::control::Control;
use crate::health::{self, Answers, Facts, Readiness};
use crate::metrics;
use crate::mutex::lock;
use crate::output::feed::Feed;
use crate::report::{self, PoolReport};
use crate::status::{State, Status};
use crate::store::Store;
use crate::store::handlers::Handlers;
use crate::stream::{Redis, Stream, StreamError};
use crate::time::now_ms;

/// Time limit for an answer from Redis or PostgreSQL.
const ANSWER: Duration = Duration::from_secs(2);
/// Maximum size of a request's body.
const MAX_BODY: usize = 64 * 1024;
/// Time limit until the answer to a request begins.
const REQUEST: Duration = Duration::from_secs(30);
/// The whole page, with its style and script inline. `NONCE` is replaced by a fresh one in each answer.
const PAGE: &str = include_str!("dashboard.html");

/// State shared by the handlers.
pub struct Server {
    status: Arc<Status>,
    redis: Redis,
    stream: Mutex<Option<Stream>>,
    store: Option<Store>,
    /// The operator's functions, if there are any.
    handlers: Option<Handlers>,
    pool_max: usize,
    metrics: PrometheusHandle,
    process: metrics_process::Collector,
    control: Arc<Control>,
    token: Option<AccessToken>,
    /// This process's name on the page.
    name: String,
    /// The log level at the start.
    level: LogLevel,
    live: Live,
    /// Present if subscribers are served.
    outlet: Option<Outlet>,
    /// Present if clients may send events.
    inlet: Option<Inlet>,
}

impl Server {
    /// A server for this process's parts; `store` if there are pipelines.
    #[must_use]
    pub fn new(
        config: &Config,
        redis: Redis,
        (store, handlers): (Option<Store>, Option<Handlers>),
        status: Arc<Status>,
        metrics: PrometheusHandle,
        control: Arc<Control>,
    ) -> Self {
        let process = metrics_process::Collector::new("standpipe_");
        process.describe();
        let feed = |store: &Store| Outlet::new(config, Feed::new(redis.clone(), store.clone()));
        let outlet = store.as_ref().filter(|_| config.subscribe).map(feed);
        Self {
            outlet,
            inlet: Inlet::new(config, &redis),
            status,
            redis,
            stream: Mutex::new(None),
            store,
            handlers,
            pool_max: config.db_pool_size,
            metrics,
            process,
            control,
            token: config.admin_token.clone(),
            name: config.consumer_id.clone(),
            level: config.log_level,
            live: Live::default(),
        }
    }

    /// Serves requests for as long as it is polled.
    pub async fn serve(self, listener: TcpListener) {
        let server = Arc::new(self);
        let admins = middleware::from_fn_with_state(Arc::clone(&server), admin::admins_only);
        let nearby = middleware::from_fn_with_state(Arc::clone(&server), admin::nearby_or_admin);
        let control = Router::new()
            .route("/control/pause", post(admin::pause))
            .route("/control/resume", post(admin::resume))
            .route("/control/log-level", post(admin::log_level))
            .route("/control/drain", post(admin::drain))
            .route("/dead-letters/retry", post(admin::retry_letters))
            .route("/dead-letters/purge", post(admin::purge_letters))
            .route_layer(admins);
        let letters = Router::new()
            .route("/dead-letters", get(admin::list))
            .route("/dead-letters/{id}", get(admin::show))
            .route("/statements", get(statements::statements))
            .route("/tasks", get(tasks::tasks))
            .route_layer(nearby);
        let routes = Router::new()
            .route("/", get(page))
            .route("/history", get(history))
            .route("/livez", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/health", get(readyz))
            .route("/metrics", get(prometheus))
            .route("/status", get(status))
            .route("/workers/status", get(status))
            .route("/subscribe", get(subscribe::version_1))
            .route("/xrpc/network.bsky.jetstream.subscribeEvents", get(subscribe::version_2))
            .merge(control)
            .merge(letters)
            .layer(DefaultBodyLimit::max(MAX_BODY))
            // What is sent there is larger, and bounded there.
            .route("/events", get(events).post(ingest::post))
            .layer(middleware::from_fn(guard))
            .with_state(Arc::clone(&server));
        tokio::join!(
            connections::serve(listener, routes),
            live::look(&server),
            live::count_dead_letters(&server),
            async {
                if let Some(outlet) = &server.outlet {
                    outlet.run().await;
                }
            }
        );
    }

    /// Queries Redis, over a connection that is reused as long as it works.
    async fn ask_redis(&self) -> Result<report::Report, String> {
        let ask = async {
            let mut kept = self.stream.lock().await;
            let mut stream = self.redis.reuse(&mut kept).await?;
            let report = report::report(&mut stream).await?;
            *kept = Some(stream);
            Ok(report)
        };
        match tokio::time::timeout(ANSWER, ask).await {
            Ok(Ok(report)) => Ok(report),
            Ok(Err(error)) => {
                let error: StreamError = error;
                Err(error.to_string())
            }
            Err(_) => Err(format!("no answer within {ANSWER:?}")),
        }
    }

    async fn readiness(&self) -> Readiness {
        let mut answers = Answers::default();
        // A fresh look, because the janitor's may be old.
        let oldest_seconds = match self.ask_redis().await {
            Ok(report) => report.stream.oldest_waiting_seconds.unwrap_or(0.0),
            Err(reason) => {
                answers.redis = Some(reason);
                0.0
            }
        };
        if let Some(store) = &self.store {
            // A fully used pool is not a fault while work progresses.
            let (_, in_use) = store.pool_status();
            if in_use < self.pool_max {
                answers.postgres = store.ping(ANSWER).await.err().map(|error| error.to_string());
            }
        }
        let look = self.status.look();
        let facts = Facts::of(&self.status, look.as_ref(), self.control.is_draining());
        let facts = Facts { oldest_seconds, ..facts };
        health::readiness(&facts, answers)
    }

    fn pool(&self) -> Option<PoolReport> {
        self.store.as_ref().map(|store| {
            let (size, in_use) = store.pool_status();
            PoolReport { size, in_use, max: self.pool_max }
        })
    }
}

/// Bounds the time of every request, and adds the headers common to all answers.
async fn guard(request: Request, next: Next) -> Response {
    let mut response = match tokio::time::timeout(REQUEST, next.run(request)).await {
        Ok(response) => response,
        Err(_) => (StatusCode::REQUEST_TIMEOUT, "the request timed out\n").into_response(),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // Responses are live; never cache them.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// Random, as 32 hexadecimal digits.
///
/// # Errors
///
/// The system provides no random bytes.
pub fn random_token() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| anyhow::anyhow!("the system provides no random bytes"))?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

/// The token in the header of a request.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

async fn page() -> Response {
    let Ok(nonce) = random_token() else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    );
    let headers = [
        (header::CONTENT_SECURITY_POLICY, policy),
        (
            HeaderName::from_static("permissions-policy"),
            "camera=(), geolocation=(), microphone=(), payment=(), usb=()".to_owned(),
        ),
    ];
    (headers, Html(PAGE.replace("NONCE", &nonce))).into_response()
}

async fn events(Shared(server): Shared<Arc<Server>>) -> Response {
    server.live.events()
}

async fn history(Shared(server): Shared<Arc<Server>>) -> Response {
    Json(server.live.day()).into_response()
}

async fn readyz(Shared(server): Shared<Arc<Server>>) -> Response {
    let readiness = server.readiness().await;
    let code = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(readiness)).into_response()
}

async fn prometheus(Shared(server): Shared<Arc<Server>>) -> Response {
    server.process.collect();
    metrics::totals::export();
    if let Some(pool) = server.pool() {
        ::metrics::gauge!(metrics::POOL_SIZE).set(pool.size as f64);
        ::metrics::gauge!(metrics::POOL_IN_USE).set(pool.in_use as f64);
    }
    let states: Vec<_> = server.status.pipelines.iter().map(|pipeline| lock(pipeline).state.name()).collect();
    for name in State::OF_PIPELINES {
        let count = states.iter().filter(|state| **state == name).count();
        ::metrics::gauge!(metrics::PIPELINES, "state" => name).set(count as f64);
    }
    if let Some(outlet) = &server.outlet {
        metrics::subscribers(outlet.feed().report());
    }
    if let Some(reader) = &server.status.reader {
        // Counts from the start before the first frame, so that a relay that never sends anything shows up, too.
        let last = lock(reader).last_frame_ms.unwrap_or(server.status.started_ms);
        ::metrics::gauge!(metrics::RELAY_FRAME_AGE).set(now_ms().saturating_sub(last) as f64 / 1000.0);
    }
    let headers = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (headers, server.metrics.render()).into_response()
}

async fn status(Shared(server): Shared<Arc<Server>>) -> Response {
    let mut process = report::process(&server.status, server.pool());
    process.subscribers = server.outlet.as_ref().map(|outlet| outlet.feed().report());
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
