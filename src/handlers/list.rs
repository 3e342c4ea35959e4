//! What is waiting, running, done or failed.

use anyhow::Result;
use serde::Serialize;

use crate::event::Task;
use crate::store::Store;
use crate::store::handlers::ResultRow;
use crate::stream::Stream;
use crate::stream::tasks::Tasks;
use crate::time::now_ms;

/// The states of a task: in the stream (`waiting`), or as in `standpipe.results`.
pub const STATES: [&str; 5] = ["waiting", "running", "retrying", "done", "failed"];

/// Which tasks to show.
#[derive(Clone, Debug)]
pub struct Filter {
    /// In this state; empty for any.
    pub state: String,
    /// For this function; empty for any.
    pub function: String,
    /// At most so many.
    pub limit: usize,
}

/// The tasks, the newest first.
#[derive(Clone, Debug, Serialize)]
pub struct List {
    /// How many there are in the stream.
    #[serde(flatten)]
    pub counts: Tasks,
    /// The ones asked for.
    pub tasks: Vec<ResultRow>,
}

/// The tasks that match.
///
/// # Errors
///
/// Redis or PostgreSQL cannot be reached.
pub async fn list(stream: &Stream, store: &Store, filter: &Filter) -> Result<List> {
    let mut stream = stream.of_tasks();
    let counts = stream.count_tasks().await?;
    let Filter { state, function, limit } = filter;
    let mut tasks = Vec::new();
    if state.is_empty() || state == "waiting" {
        for entry in stream.waiting_tasks(*limit).await? {
            let task = Task::of(&entry).ok();
            let row = ResultRow {
                id: task.map_or_else(|| entry.id.to_string(), |task| task.id),
                function: entry.event_type,
                state: "waiting".to_owned(),
                attempts: 0,
                result: None,
                error: None,
                by: None,
                started_at: entry.id.ms as f64 / 1000.0,
                seconds: now_ms().saturating_sub(entry.id.ms) as f64 / 1000.0,
            };
            if function.is_empty() || *function == row.function {
                tasks.push(row);
            }
        }
        tasks.reverse();
    }
    let left = limit.saturating_sub(tasks.len());
    if state != "waiting" && left > 0 {
        let session = store.session().await?;
        tasks.extend(session.results(state, function, i64::try_from(left).unwrap_or(i64::MAX)).await?);
    }
    Ok(List { counts, tasks })
}
