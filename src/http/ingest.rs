//! `POST /events`: events from clients, one JSON object on each line.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State as Shared};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{Server, bearer};
use crate::config::{AccessToken, Config};
use crate::metrics;
use crate::origin::ingest::lines::{self, Tasks};
use crate::origin::ingest::{Accepted, Ingest, IngestError};
use crate::stream::Redis;

/// The most bytes in a request.
pub const MAX_BODY: usize = 8 << 20;
/// What is read of a larger one before it is refused.
const PASSED_OVER: usize = 64 << 20;
/// How many requests are read at a time: each may take some times its size of memory.
const AT_A_TIME: usize = 8;
/// How long after a request began it is answered even if its events are not applied.
const APPLIED: Duration = Duration::from_secs(25);
/// The longest Idempotency-Key, in bytes.
const MAX_KEY: usize = 255;

/// Takes events in, if `INGEST_TOKEN` is set.
pub struct Inlet {
    ingest: Ingest,
    token: AccessToken,
    tasks: Tasks<'static>,
    places: Semaphore,
}

impl Inlet {
    /// An inlet, if there is a token.
    #[must_use]
    pub fn new(config: &Config, redis: &Redis) -> Option<Self> {
        let token = config.ingest_token.clone()?;
        Some(Self {
            ingest: Ingest::new(config, redis.clone()),
            token,
            tasks: if config.handlers.is_some() { Tasks::Taken } else { Tasks::Refused },
            places: Semaphore::new(AT_A_TIME),
        })
    }
}

/// What a request is answered with, and the label of the metric.
struct Answer(StatusCode, &'static str, Value);

impl Answer {
    fn error(code: StatusCode, result: &'static str, message: impl Into<String>) -> Self {
        Self(code, result, json!({ "error": message.into() }))
    }

    fn unauthorized(message: &str) -> Self {
        Self::error(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    fn wrong(code: StatusCode, message: impl Into<String>) -> Self {
        Self::error(code, "wrong", message)
    }

    fn later(message: &str) -> Self {
        Self::error(StatusCode::SERVICE_UNAVAILABLE, "later", message)
    }
}

/// Answers a request with events.
pub(super) async fn post(Shared(server): Shared<Arc<Server>>, request: Request) -> Response {
    let Answer(code, result, body) = take(&server, request).await;
    metrics::ingest(result);
    let mut response = (code, Json(body)).into_response();
    let headers = response.headers_mut();
    match code {
        StatusCode::UNAUTHORIZED => {
            headers.insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        StatusCode::SERVICE_UNAVAILABLE => {
            headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        _ => {}
    }
    response
}

async fn take(server: &Server, request: Request) -> Answer {
    let deadline = Instant::now() + APPLIED;
    let (parts, body) = request.into_parts();
    let (inlet, key, wait) = match understand(server, &parts) {
        Ok(understood) => understood,
        Err(answer) => return answer,
    };
    if server.control.is_draining() {
        return Answer::later("this process is draining");
    }
    let Ok(place) = inlet.places.acquire().await else {
        return Answer::later("this process is shutting down");
    };
    let body = match read(body).await {
        Ok(Some(body)) => body,
        Ok(None) => {
            let message = format!("the request is larger than {} MiB", MAX_BODY >> 20);
            return Answer::wrong(StatusCode::PAYLOAD_TOO_LARGE, message);
        }
        Err(error) => return Answer::wrong(StatusCode::BAD_REQUEST, error.to_string()),
    };
    let lines = match lines::read(&body, inlet.tasks) {
        Ok(lines) => lines,
        Err(wrong) => {
            let body = json!({ "error": wrong.to_string(), "line": wrong.line });
            return Answer(StatusCode::BAD_REQUEST, "wrong", body);
        }
    };
    let appended = inlet.ingest.append(key.as_deref(), &body, lines, None).await;
    // Waiting costs next to nothing, and must not keep others out.
    drop((place, body));
    let accepted = match appended {
        Ok(appended) => inlet.ingest.settle(&appended).await,
        Err(error) => Err(error),
    };
    match accepted {
        Ok(accepted) => answer(inlet, accepted, wait.then_some(deadline)).await,
        Err(error @ IngestError::OtherRequest) => {
            Answer::wrong(StatusCode::UNPROCESSABLE_ENTITY, error.to_string())
        }
        Err(IngestError::NotNow(message)) => Answer::later(message),
        Err(error @ (IngestError::Unknown(_) | IngestError::Replaced | IngestError::Moved)) => {
            Answer::error(StatusCode::SERVICE_UNAVAILABLE, "unknown", error.to_string())
        }
    }
}

/// Who may send, the request's name, and whether it waits until its events are applied.
fn understand<'s>(server: &'s Server, parts: &Parts) -> Result<(&'s Inlet, Option<String>, bool), Answer> {
    let inlet = server.inlet.as_ref().ok_or_else(|| {
        let message =
            "sending events is disabled: set INGEST_TOKEN (16 characters or more) and restart this process";
        Answer::error(StatusCode::FORBIDDEN, "unauthorized", message)
    })?;
    match bearer(&parts.headers) {
        Some(given) if inlet.token.is(given) => {}
        Some(_) => return Err(Answer::unauthorized("the token does not match INGEST_TOKEN")),
        None => {
            return Err(Answer::unauthorized("a token is required: Authorization: Bearer <INGEST_TOKEN>"));
        }
    }
    let wait = match parts.uri.query().unwrap_or_default() {
        "" => false,
        "wait=applied" => true,
        other => {
            let message = format!("unknown query {other:.50}: use ?wait=applied or none");
            return Err(Answer::wrong(StatusCode::BAD_REQUEST, message));
        }
    };
    let key = key(&parts.headers).map_err(|message| Answer::wrong(StatusCode::BAD_REQUEST, message))?;
    Ok((inlet, key, wait))
}

/// The whole body; `None` if it is too large.
async fn read(body: Body) -> Result<Option<Vec<u8>>, axum::Error> {
    let mut chunks = body.into_data_stream();
    let (mut whole, mut length) = (Vec::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        length += chunk.len();
        if length <= MAX_BODY {
            whole.extend_from_slice(&chunk);
        } else {
            whole = Vec::new();
            // A client that is still sending when the connection is closed may never see the answer.
            if length > PASSED_OVER {
                break;
            }
        }
    }
    Ok((length <= MAX_BODY).then_some(whole))
}

fn key(headers: &HeaderMap) -> Result<Option<String>, String> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    match key.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= MAX_KEY => Ok(Some(key.to_owned())),
        _ => Err(format!("Idempotency-Key must be 1 to {MAX_KEY} characters of printable ASCII")),
    }
}

async fn answer(inlet: &Inlet, accepted: Accepted, wait: Option<Instant>) -> Answer {
    let Accepted { ids, before, durable } = accepted;
    if !before {
        metrics::count(metrics::INGESTED, ids.len() as u64);
    }
    let shown: Vec<String> = ids.iter().map(ToString::to_string).collect();
    let mut body = json!({ "ids": shown, "repeated": before, "durable": durable });
    if let Some(deadline) = wait {
        let refused = inlet.ingest.applied(&ids, deadline).await.ok().flatten();
        body["applied"] = refused.is_some().into();
        let letters: Vec<Value> = refused
            .unwrap_or_default()
            .into_iter()
            .map(|(id, paths)| json!({ "id": id, "paths": paths }))
            .collect();
        if !letters.is_empty() {
            body["dead_letters"] = letters.into();
        }
    }
    Answer(StatusCode::ACCEPTED, if before { "repeated" } else { "accepted" }, body)
}
