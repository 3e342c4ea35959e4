//! What is waiting, running, done or failed.

use anyhow::Result;
use serde::Serialize;

use crate::event::{Entry, Task};
use crate::store::Store;
use crate::store::handlers::ResultRow;
use crate::stream::Stream;
use crate::stream::tasks::Tasks;
use crate::time::now_ms;

/// The state of a task that is still in the stream.
const WAITING: &str = "waiting";
/// Maximum waiting tasks searched for one list.
const LOOKED_THROUGH: usize = 5_000;
/// The states of a task: in the stream (`waiting`), or as in `standpipe.results`.
pub const STATES: [&str; 5] = [WAITING, "running", "retrying", "done", "failed"];

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

/// The tasks: those that are waiting, then those that are not finished, then the others, each the newest first.
#[derive(Clone, Debug, Serialize)]
pub struct List {
    /// How many there are in the stream.
    #[serde(flatten)]
    pub counts: Tasks,
    /// The ones asked for.
    pub tasks: Vec<ResultRow>,
}

/// The tasks that match. If any state will do, those that are waiting take up half of the list at most.
///
/// # Errors
///
/// Redis or PostgreSQL cannot be reached.
pub async fn list(stream: &Stream, store: &Store, filter: &Filter) -> Result<List> {
    let mut stream = stream.of_tasks();
    let counts = stream.count_tasks().await?;
    let Filter { state, function, limit } = filter;
    let mut tasks = Vec::new();
    match state.as_str() {
        "" => waiting(&mut stream, function, limit.div_ceil(2), &mut tasks).await?,
        WAITING => waiting(&mut stream, function, *limit, &mut tasks).await?,
        _ => {}
    }
    let left = limit.saturating_sub(tasks.len());
    if state != WAITING && left > 0 {
        let session = store.session().await?;
        tasks.extend(session.results(state, function, i64::try_from(left).unwrap_or(i64::MAX)).await?);
    }
    Ok(List { counts, tasks })
}

/// The tasks that nobody has begun with, without their data.
async fn waiting(stream: &mut Stream, function: &str, most: usize, tasks: &mut Vec<ResultRow>) -> Result<()> {
    let (mut before, mut looked) = (None, 0);
    while tasks.len() < most && looked < LOOKED_THROUGH {
        let page = stream.waiting_tasks(before).await?;
        let Some(last) = page.last() else { break };
        before = Some(last.id);
        looked += page.len();
        for entry in page {
            if function.is_empty() || *function == entry.event_type {
                tasks.push(row(entry));
            }
        }
    }
    tasks.truncate(most);
    Ok(())
}

fn row(entry: Entry) -> ResultRow {
    let id = Task::of(&entry).map_or_else(|_| entry.id.to_string(), |task| task.id);
    ResultRow {
        id,
        function: entry.event_type,
        state: WAITING.to_owned(),
        attempts: 0,
        result: None,
        error: None,
        by: None,
        started_at: entry.id.ms as f64 / 1000.0,
        seconds: now_ms().saturating_sub(entry.id.ms) as f64 / 1000.0,
    }
}
