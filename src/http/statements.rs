//! The cost of PostgreSQL's statements, from the extension `pg_stat_statements`. Queried only while somebody looks at it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State as Shared;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio_postgres::Client;

use super::Server;

/// How long PostgreSQL may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// GET /statements: the ten on which most time was spent.
pub async fn statements(Shared(server): Shared<Arc<Server>>) -> Response {
    let answer = match ask(&server).await {
        Ok(Some(found)) => found,
        Ok(None) => json!({
            "counted": false,
            "why": "PostgreSQL does not count them; put pg_stat_statements into shared_preload_libraries, restart it, \
                    and run CREATE EXTENSION pg_stat_statements in this database",
        }),
        Err(why) => json!({ "counted": false, "why": why }),
    };
    Json(answer).into_response()
}

async fn ask(server: &Server) -> Result<Option<Value>, String> {
    let Some(store) = &server.store else {
        return Err("this process has no pipelines, and so no connection to PostgreSQL".to_owned());
    };
    // The pipelines come first.
    if store.pool_status().1 >= server.pool_max {
        return Err("every connection is in use".to_owned());
    }
    let late = || format!("PostgreSQL gives no answer within {ANSWER:?}");
    let session = tokio::time::timeout(ANSWER, store.session()).await.map_err(|_| late())?;
    let session = session.map_err(|error| error.to_string())?;
    let Ok(found) = tokio::time::timeout(ANSWER, look(session.client())).await else {
        // Returned to the pool, its answer would hold up the next user.
        session.give_up();
        return Err(late());
    };
    found.map_err(|error| match error.as_db_error() {
        Some(said) => format!("PostgreSQL: {}", said.message()),
        None => error.to_string(),
    })
}

/// `None` without the extension. Constants are none of a statement's text there; those of utility commands would be, and
/// these are left out.
async fn look(client: &Client) -> Result<Option<Value>, tokio_postgres::Error> {
    let schema = client
        .query_opt(
            "SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
             WHERE e.extname = 'pg_stat_statements'",
            &[],
        )
        .await?;
    let Some(schema) = schema else { return Ok(None) };
    let schema: String = schema.get(0);
    let rows = client
        .query(
            &format!(
                "SELECT left(s.query, 400), s.calls, s.total_exec_time, s.mean_exec_time, s.rows,
                        coalesce(s.total_exec_time / nullif(sum(s.total_exec_time) OVER (), 0), 0)
                 FROM {schema}.pg_stat_statements s
                 WHERE s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
                   AND s.userid = (SELECT oid FROM pg_roles WHERE rolname = current_user)
                   AND s.query ~* '^\\s*(select|insert|update|delete|merge|with)\\M'
                 ORDER BY s.total_exec_time DESC
                 LIMIT 10"
            ),
            &[],
        )
        .await?;
    let statements: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "statement": row.get::<_, String>(0).split_whitespace().collect::<Vec<_>>().join(" "),
                "calls": row.get::<_, i64>(1),
                "total_ms": row.get::<_, f64>(2),
                "mean_ms": row.get::<_, f64>(3),
                "rows": row.get::<_, i64>(4),
                "share": row.get::<_, f64>(5),
            })
        })
        .collect();
    Ok(Some(json!({ "counted": true, "statements": statements })))
}
