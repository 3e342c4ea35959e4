//! The cost of PostgreSQL's statements, from the extension `pg_stat_statements`. Queried only while a page shows it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State as Shared;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Server;
use crate::store::statements;

/// Time limit for PostgreSQL's answer.
const ANSWER: Duration = Duration::from_secs(5);

/// GET /statements: the ten on which the most time was spent.
pub async fn statements(Shared(server): Shared<Arc<Server>>) -> Response {
    let answer = match ask(&server).await {
        Ok(Some(found)) => found,
        Ok(None) => json!({
            "counted": false,
            "why": "PostgreSQL does not track them; add pg_stat_statements to shared_preload_libraries, restart it, \
                    and run CREATE EXTENSION pg_stat_statements in this database",
        }),
        Err(why) => json!({ "counted": false, "why": why }),
    };
    Json(answer).into_response()
}

async fn ask(server: &Server) -> Result<Option<Value>, String> {
    let Some(store) = &server.store else {
        return Err("this process has no pipelines, and therefore no connection to PostgreSQL".to_owned());
    };
    // Does not queue for a connection: the pipelines come first.
    if store.pool_status().1 >= server.pool_max {
        return Err("every connection is in use".to_owned());
    }
    let late = || format!("no answer from PostgreSQL within {ANSWER:?}");
    let session = tokio::time::timeout(ANSWER, store.session()).await.map_err(|_| late())?;
    let session = session.map_err(|error| error.to_string())?;
    let Ok(found) = tokio::time::timeout(ANSWER, statements::look(session.client())).await else {
        // In the pool, the outstanding answer would hold up the next user.
        session.give_up();
        return Err(late());
    };
    let found = found.map_err(|error| format!("PostgreSQL: {error}"))?;
    let Some(statements) = found else { return Ok(None) };
    let statements: Vec<Value> = statements
        .into_iter()
        .map(|statement| {
            json!({
                "statement": statement.text,
                "calls": statement.calls,
                "total_ms": statement.total_ms,
                "mean_ms": statement.mean_ms,
                "rows": statement.rows,
                "share": statement.share,
            })
        })
        .collect();
    Ok(Some(json!({ "counted": true, "statements": statements })))
}
