//! `GET /tasks`: what is waiting, running, done or failed.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Query, State as Shared};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use super::Server;
use crate::handlers::list::{Filter, List, STATES, list};

/// Time limit for the answers of Redis and PostgreSQL.
const ANSWER: Duration = Duration::from_secs(10);
/// Tasks in an answer, unless told otherwise.
const PAGE: usize = 100;
/// The most tasks in an answer.
const MOST: usize = 1000;

/// Which tasks to list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Which {
    state: Option<String>,
    #[serde(rename = "type")]
    function: Option<String>,
    limit: Option<usize>,
}

/// GET /tasks?state=failed&type=resize&limit=100: the newest first.
pub async fn tasks(Shared(server): Shared<Arc<Server>>, Query(which): Query<Which>) -> Response {
    let Which { state, function, limit } = which;
    let state = state.unwrap_or_default();
    if !state.is_empty() && !STATES.contains(&state.as_str()) {
        let error = format!("state is one of {}", STATES.join(", "));
        return (StatusCode::BAD_REQUEST, Json(json!({ "error": error }))).into_response();
    }
    let limit = limit.unwrap_or(PAGE).clamp(1, MOST);
    let filter = Filter { state, function: function.unwrap_or_default(), limit };
    match tokio::time::timeout(ANSWER, ask(&server, &filter)).await {
        Ok(Ok(list)) => Json(list).into_response(),
        Ok(Err(error)) => unavailable(&format!("{error:#}")),
        Err(_) => unavailable(&format!("no answer within {ANSWER:?}")),
    }
}

fn unavailable(error: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "error": error }))).into_response()
}

async fn ask(server: &Server, filter: &Filter) -> anyhow::Result<List> {
    let Some(store) = &server.store else {
        anyhow::bail!("this process has no pipelines: send this to one that has");
    };
    list(&server.redis.connect().await?, store, filter).await
}
