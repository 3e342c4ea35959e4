//! Control and dead letters: authorisation and handlers.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Extension, Path, Query, Request, State as Shared};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info;

use super::Server;
use super::connections::Peer;
use crate::config::LogLevel;
use crate::control::Part;
use crate::dead_letters::{Filter, Retries, Walk};
use crate::event::EntryId;
use crate::stream::StreamResult;
use crate::stream::dead_letters::Letter;

/// Maximum dead letters in one answer.
const PAGE: usize = 50;
/// Maximum dead letters searched for one answer.
const LOOKED_THROUGH: usize = 2_000;
/// How long one request may keep retrying or purging; the answer reports whether more is left.
const WORK: Duration = Duration::from_secs(15);
/// Maximum characters of a message or an address shown in a list; the letter itself has all of them.
const SHORT: usize = 300;

/// Admits a request that carries the token and does not come from another site's page.
pub async fn admins_only(Shared(server): Shared<Arc<Server>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if is_foreign(headers) {
        return refuse(StatusCode::FORBIDDEN, "requests from other sites are refused");
    }
    match server.token_state(headers) {
        Token::Right => next.run(request).await,
        Token::Unset => refuse(
            StatusCode::FORBIDDEN,
            "control is off: set ADMIN_TOKEN (16 characters or more) in the environment of this process and restart it",
        ),
        Token::Missing => unauthorized("this needs the admin token: Authorization: Bearer <ADMIN_TOKEN>"),
        Token::Wrong => unauthorized("this is not the admin token"),
    }
}

/// Admits a request for dead letters or for PostgreSQL's statements: with the token from anywhere; without it only from
/// this machine and by address. A name in the request means a proxy, or a foreign page whose name resolves to us.
pub async fn nearby_or_admin(Shared(server): Shared<Arc<Server>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let peer = request
        .extensions()
        .get::<Peer>()
        .is_some_and(|Peer(address)| address.ip().to_canonical().is_loopback());
    match server.token_state(headers) {
        Token::Right => next.run(request).await,
        Token::Wrong => unauthorized("this is not the admin token"),
        Token::Missing | Token::Unset if peer && names_an_address(headers) && !is_foreign(headers) => {
            next.run(request).await
        }
        Token::Missing => unauthorized("from another machine, this needs the admin token"),
        Token::Unset => {
            refuse(StatusCode::FORBIDDEN, "this is shown only on the machine itself: ADMIN_TOKEN is not set")
        }
    }
}

/// The state of the token in a request.
enum Token {
    Right,
    Wrong,
    Missing,
    /// This process has no token.
    Unset,
}

impl Server {
    fn token_state(&self, headers: &HeaderMap) -> Token {
        let Some(token) = &self.token else { return Token::Unset };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some((scheme, given)) = given.and_then(|given| given.split_once(' ')) else {
            return Token::Missing;
        };
        if scheme.eq_ignore_ascii_case("bearer") && token.is(given.trim()) {
            Token::Right
        } else {
            Token::Wrong
        }
    }
}

/// Whether a browser reports that the request comes from another site's page.
pub(super) fn is_foreign(headers: &HeaderMap) -> bool {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let elsewhere = text("sec-fetch-site").is_some_and(|site| !matches!(site, "same-origin" | "none"));
    let origin = text("origin").is_some_and(|origin| {
        let host = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        host.is_none() || host != text("host")
    });
    elsewhere || origin
}

/// Whether the request was made to an address or to localhost, and not to some other name.
fn names_an_address(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok()
}

fn refuse(code: StatusCode, error: impl Into<String>) -> Response {
    (code, Json(json!({ "error": error.into() }))).into_response()
}

fn unauthorized(error: &str) -> Response {
    let mut response = refuse(StatusCode::UNAUTHORIZED, error);
    response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    response
}

fn done(text: impl Into<String>) -> Response {
    Json(json!({ "done": text.into() })).into_response()
}

// ---------------------------------------------------------------------------------------------
// Control

/// `?part=`
#[derive(Debug, Deserialize)]
pub struct Which {
    part: Option<String>,
}

/// POST /control/pause
pub async fn pause(server: Shared<Arc<Server>>, peer: Extension<Peer>, which: Query<Which>) -> Response {
    set_pause(&server, *peer, &which, true)
}

/// POST /control/resume
pub async fn resume(server: Shared<Arc<Server>>, peer: Extension<Peer>, which: Query<Which>) -> Response {
    set_pause(&server, *peer, &which, false)
}

fn set_pause(server: &Server, Peer(peer): Peer, which: &Which, pause: bool) -> Response {
    let name = which.part.as_deref().unwrap_or("all");
    let Some(part) = Part::named(name) else {
        return refuse(StatusCode::BAD_REQUEST, "part is reader, pipelines or all");
    };
    let missing = match part {
        Part::Reader if server.status.reader.is_none() => Some("this process has no reader"),
        Part::Pipelines if server.status.pipelines.is_empty() => Some("this process has no pipelines"),
        _ => None,
    };
    if let Some(missing) = missing {
        return refuse(StatusCode::CONFLICT, missing);
    }
    server.control.pause(part, pause);
    info!(part = name, %peer, "{}", if pause { "paused manually" } else { "resumed manually" });
    done(match (part, pause) {
        (Part::All, true) => "everything finishes the work in hand and pauses until resumed",
        (Part::All, false) => "everything resumes",
        (Part::Reader, true) => "the reader is paused until resumed",
        (Part::Reader, false) => "the reader resumes",
        (Part::Pipelines, true) => "the pipelines finish the work in hand and pause until resumed",
        (Part::Pipelines, false) => "the pipelines resume",
    })
}

/// `?level=`
#[derive(Debug, Deserialize)]
pub struct WhichLevel {
    level: String,
}

/// POST /control/log-level
pub async fn log_level(Shared(server): Shared<Arc<Server>>, Query(which): Query<WhichLevel>) -> Response {
    let Some(level) = LogLevel::named(&which.level) else {
        return refuse(StatusCode::BAD_REQUEST, "level is DEBUG, INFO, WARNING or ERROR");
    };
    match server.control.set_level(level) {
        Ok(()) => done(format!("log level {level} until the next start")),
        Err(error) => refuse(StatusCode::CONFLICT, error),
    }
}

/// POST /control/drain
pub async fn drain(Shared(server): Shared<Arc<Server>>, Extension(Peer(peer)): Extension<Peer>) -> Response {
    info!(%peer, "drain requested by an operator");
    server.control.drain();
    (StatusCode::ACCEPTED, Json(json!({ "done": "finishing the work in hand, then exiting" })))
        .into_response()
}

// ---------------------------------------------------------------------------------------------
// Dead letters

/// The dead letters to list.
#[derive(Debug, Deserialize)]
pub struct List {
    /// Only letters older than this one.
    before: Option<String>,
    reason: Option<String>,
    kind: Option<String>,
    text: Option<String>,
    limit: Option<usize>,
}

/// GET /dead-letters: newest first.
pub async fn list(Shared(server): Shared<Arc<Server>>, Query(list): Query<List>) -> Response {
    if list.before.as_ref().is_some_and(|id| id.parse::<EntryId>().is_err()) {
        return refuse(StatusCode::BAD_REQUEST, "before is the id of a dead letter");
    }
    let limit = list.limit.unwrap_or(PAGE).clamp(1, PAGE);
    let filter = Filter { reason: list.reason, kind: list.kind, text: list.text, ..Filter::default() };
    let work = async {
        let mut stream = server.redis.connect().await?;
        let mut before = list.before;
        let (mut letters, mut looked) = (Vec::new(), 0);
        loop {
            let page = stream.dead_letters_before(before.as_deref(), PAGE).await?;
            let last = page.len() < PAGE;
            for letter in page {
                before = Some(letter.id.clone());
                looked += 1;
                if filter.fits(&letter) {
                    letters.push(summary(&letter));
                }
                if letters.len() == limit {
                    return Ok((letters, before, looked));
                }
            }
            if last {
                return Ok((letters, None, looked));
            }
            if looked >= LOOKED_THROUGH {
                return Ok((letters, before, looked));
            }
        }
    };
    let found: StreamResult<(Vec<Value>, Option<String>, usize)> = work.await;
    match found {
        Ok((letters, next, looked)) => {
            Json(json!({ "letters": letters, "next": next, "looked_through": looked })).into_response()
        }
        Err(error) => refuse(StatusCode::SERVICE_UNAVAILABLE, format!("Redis: {error}")),
    }
}

/// GET /dead-letters/{id}
pub async fn show(Shared(server): Shared<Arc<Server>>, Path(id): Path<String>) -> Response {
    if id.parse::<EntryId>().is_err() {
        return refuse(StatusCode::BAD_REQUEST, "this is not the id of a dead letter");
    }
    let found = async {
        let mut stream = server.redis.connect().await?;
        stream.dead_letter(&id).await
    };
    match found.await {
        Ok(Some(letter)) => Json(letter).into_response(),
        Ok(None) => refuse(StatusCode::NOT_FOUND, format!("there is no dead letter {id}")),
        Err(error) => refuse(StatusCode::SERVICE_UNAVAILABLE, format!("Redis: {error}")),
    }
}

/// A letter, as shown in a list.
fn summary(letter: &Letter) -> Value {
    let op: Value = serde_json::from_str(&letter.op).unwrap_or_default();
    let data: Value = serde_json::from_str(&letter.data).unwrap_or_default();
    let text = |value: &Value| value.as_str().map(short).unwrap_or_default();
    let repo = [&data["repo"], &op["repo"], &op["did"]].into_iter().find(|repo| repo.is_string());
    json!({
        "id": letter.id,
        "type": letter.event_type,
        "reason": letter.reason,
        "sqlstate": letter.sqlstate,
        "message": short(&letter.message),
        "collection": short(&letter.collection()),
        "action": text(&op["action"]),
        "path": text(&op["path"]),
        "repo": repo.map(text).unwrap_or_default(),
        "attempts": letter.attempts,
        "first_time": letter.first_time,
        "last_time": letter.last_time,
    })
}

fn short(text: &str) -> String {
    match text.char_indices().nth(SHORT) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The letters to retry or purge: ids, or all that match.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Chosen {
    ids: Vec<String>,
    all: bool,
    reason: Option<String>,
    kind: Option<String>,
    text: Option<String>,
    /// Such as `1h`.
    since: Option<String>,
}

impl Chosen {
    fn filter(self) -> Result<Filter, &'static str> {
        if self.ids.is_empty() && !self.all {
            return Err("give ids, or all (with reason, kind, text or since to select some of them)");
        }
        let since = self.since.as_deref().map(humantime::parse_duration).transpose();
        let since = since.map_err(|_| "since is a time such as 1h or 2d")?;
        Ok(Filter { ids: self.ids, reason: self.reason, kind: self.kind, text: self.text, since })
    }
}

/// POST /dead-letters/retry
pub async fn retry_letters(Shared(server): Shared<Arc<Server>>, Json(chosen): Json<Chosen>) -> Response {
    let Some(store) = &server.store else {
        return refuse(StatusCode::CONFLICT, "this process has no pipelines: send this to one that has");
    };
    let filter = match chosen.filter() {
        Ok(filter) => filter,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error),
    };
    let (mut counts, mut still_bad) = (Retries::default(), Vec::new());
    let work = async {
        let mut walk = walk(&server, filter).await?;
        walk.retry_all((store, server.handlers.as_ref()), &mut counts, |id, why| {
            if still_bad.len() < PAGE {
                still_bad.push(json!({ "id": id, "message": short(why) }));
            }
            Ok(())
        })
        .await?;
        anyhow::Ok(walk.was_interrupted())
    };
    let worked = work.await;
    let Retries { applied, kept } = counts;
    if applied + kept > 0 {
        info!(applied, kept, "dead letters retried by an operator");
    }
    match worked {
        Ok(more) => Json(json!({
            "done": format!("{applied} applied, {kept} kept"),
            "applied": applied,
            "kept": kept,
            "still_bad": still_bad,
            "more": more,
        }))
        .into_response(),
        Err(error) => unavailable(&error),
    }
}

/// POST /dead-letters/purge
pub async fn purge_letters(Shared(server): Shared<Arc<Server>>, Json(chosen): Json<Chosen>) -> Response {
    let filter = match chosen.filter() {
        Ok(filter) => filter,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error),
    };
    let mut removed = 0_u64;
    let work = async {
        let mut walk = walk(&server, filter).await?;
        walk.purge_all(&mut removed).await?;
        anyhow::Ok(walk.was_interrupted())
    };
    let worked = work.await;
    if removed > 0 {
        info!(removed, "dead letters purged by an operator");
    }
    match worked {
        Ok(more) => {
            let done = format!("purged {removed}");
            Json(json!({ "done": done, "removed": removed, "more": more })).into_response()
        }
        Err(error) => unavailable(&error),
    }
}

fn unavailable(error: &anyhow::Error) -> Response {
    refuse(StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}"))
}

/// The chosen letters, within a request's time limit.
async fn walk(server: &Server, filter: Filter) -> anyhow::Result<Walk> {
    let stream = server.redis.connect().await?;
    Ok(Walk::new(stream, filter).await?.for_at_most(WORK))
}
