//! The operator's functions for tasks, and `standpipe.results`: what came of each task.

use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;

use super::{Session, Store, StoreError, settings};
use crate::config::Config;
use crate::event::{Reason, Reject, Task};

/// The most characters of an error that are kept.
const MAX_MESSAGE: usize = 2000;
/// After so many attempts that ended without an answer, a task is given up: it may be what ends the server process.
const UNANSWERED: u32 = 20;

/// The functions of a schema, and connections to call them on.
#[derive(Clone)]
pub struct Handlers {
    store: Store,
    schema: String,
    timeout: Duration,
    attempts: u32,
}

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handled {
    /// The function has done it, and its result is durable.
    Done,
    /// It had been done before.
    Before,
    /// Somebody else is working on it.
    Busy,
    /// It failed for the `n`-th time, and may be tried again.
    Failed(u32, Reject),
    /// It failed for good.
    Refused(Reject),
}

/// A task that was begun, and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct ResultRow {
    /// The name of the function.
    #[serde(rename = "type")]
    pub function: String,
    /// Its id.
    pub id: String,
    /// running, retrying, done or failed; waiting for one that is still in the stream.
    pub state: String,
    /// How often it was begun.
    pub attempts: i32,
    /// What the function returned.
    pub result: Option<Box<RawValue>>,
    /// Why the last attempt failed.
    pub error: Option<String>,
    /// The process that worked on it last.
    pub by: Option<String>,
    /// When that began, in seconds since 1970.
    pub started_at: f64,
    /// How long it took, or has taken so far.
    pub seconds: f64,
}

impl Handlers {
    /// The functions in the schema `HANDLERS`; `None` if there is none. Nothing is opened yet.
    ///
    /// # Errors
    ///
    /// `DATABASE_URL` is missing or cannot be parsed.
    pub fn new(config: &Config) -> anyhow::Result<Option<Self>> {
        let Some(schema) = config.handlers.clone() else { return Ok(None) };
        // One more, for an operator who tries a dead letter again.
        let (size, timeout) = (config.handler_pipelines + 1, config.handler_timeout);
        let store = Store::with(config, size, settings::for_handlers, timeout)?;
        Ok(Some(Self { store, schema, timeout, attempts: config.handler_attempts }))
    }

    /// Closes every connection.
    pub async fn close(&self) {
        self.store.close().await;
    }

    /// Calls the function for a task, in one transaction with the result. `by`: the name of this process; `entry`: what tells this
    /// delivery of the task from others.
    ///
    /// # Errors
    ///
    /// PostgreSQL cannot be reached, or has a problem of its own: it is not the task's fault.
    pub async fn handle(&self, task: &Task, by: &str, entry: &str) -> Result<Handled, StoreError> {
        let session = self.store.session().await?;
        match self.on(&session, task, by, entry).await {
            Ok(handled) => Ok(handled),
            Err(error) => {
                // It may hold the task.
                session.discard();
                Err(error)
            }
        }
    }

    /// The same without another attempt if it fails.
    #[must_use]
    pub fn once(&self) -> Self {
        Self { attempts: 1, ..self.clone() }
    }

    async fn on(&self, session: &Session, task: &Task, by: &str, entry: &str) -> Result<Handled, StoreError> {
        let Task { function, id, .. } = task;
        let take = include_str!("../../sql/handlers/take.sql");
        let row = session.in_time(session.client().query_one(take, &[function, id, &self.schema])).await?;
        let (taken, exists): (bool, bool) = (row.get(0), row.get(1));
        if !taken {
            return Ok(Handled::Busy);
        }
        let handled = if exists {
            self.attempt(session, task, by, entry).await?
        } else {
            self.without_function(session, task).await?
        };
        let release = include_str!("../../sql/handlers/release.sql");
        session.in_time(session.client().query_one(release, &[function, id])).await?;
        Ok(handled)
    }

    /// What became of the task before; `None` if nothing is known or it is not finished.
    async fn before(&self, session: &Session, task: &Task) -> Result<Option<Handled>, StoreError> {
        let look = include_str!("../../sql/handlers/look.sql");
        let found = session.in_time(session.client().query_opt(look, &[&task.function, &task.id])).await?;
        Ok(found.map(|row| {
            let error: Option<String> = row.get(1);
            match row.get::<_, &str>(0) {
                "done" => Handled::Before,
                _ => Handled::Refused(Reject::new(Reason::Handler, error.unwrap_or_default())),
            }
        }))
    }

    async fn without_function(&self, session: &Session, task: &Task) -> Result<Handled, StoreError> {
        if let Some(done @ Handled::Before) = self.before(session, task).await? {
            return Ok(done);
        }
        let message = format!("there is no function {}.{}(jsonb)", self.schema, task.function);
        Ok(Handled::Refused(Reject::new(Reason::UnknownType, message)))
    }

    async fn attempt(
        &self,
        session: &Session,
        task: &Task,
        by: &str,
        entry: &str,
    ) -> Result<Handled, StoreError> {
        let Task { function, id, data } = task;
        let client = session.client();
        let begin = include_str!("../../sql/handlers/begin.sql");
        let Some(row) = session.in_time(client.query_opt(begin, &[function, id, &by, &entry])).await? else {
            // It is finished: done, or failed and not a dead letter yet.
            return Ok(self.before(session, task).await?.unwrap_or(Handled::Busy));
        };
        let [begun, failures] = [0, 1].map(|column| u32::try_from(row.get::<_, i32>(column)).unwrap_or(0));
        let unanswered = begun.saturating_sub(failures + 1);
        if unanswered >= UNANSWERED {
            let message = format!("{unanswered} attempts ended with the server process, or with ours");
            return self.fail(session, task, u32::MAX, Reject::new(Reason::Handler, message)).await;
        }
        let call = self.call(function);
        let error = match session.in_time(client.execute(&call, &[function, id, data])).await {
            // Somebody has deleted its row.
            Ok(0) => return Ok(Handled::Busy),
            Ok(_) => return Ok(Handled::Done),
            Err(error) => error,
        };
        if is_servers(&error) {
            return Err(error);
        }
        self.fail(session, task, failures + 1, self.reject(error)).await
    }

    /// Notes that an attempt failed, for the `n`-th time.
    async fn fail(
        &self,
        session: &Session,
        task: &Task,
        n: u32,
        reject: Reject,
    ) -> Result<Handled, StoreError> {
        let is_last = n >= self.attempts;
        let state = if is_last { "failed" } else { "retrying" };
        let fail = include_str!("../../sql/handlers/fail.sql");
        let Task { function, id, .. } = task;
        session.in_time(session.client().execute(fail, &[function, id, &state, &reject.message])).await?;
        Ok(if is_last { Handled::Refused(reject) } else { Handled::Failed(n, reject) })
    }

    /// One statement is one transaction: what the function does, and its result. The row is locked before the function is called:
    /// nobody can change it meanwhile, which would call the function twice, or lose its result.
    fn call(&self, function: &str) -> String {
        let schema = &self.schema;
        format!(
            "WITH mine AS MATERIALIZED (
                 SELECT type, id FROM standpipe.results WHERE type = $1 AND id = $2 AND state <> 'done' FOR UPDATE)
             UPDATE standpipe.results r SET state = 'done', result = \"{schema}\".\"{function}\"($3::text::jsonb), error = NULL,
                 finished_at = clock_timestamp() FROM mine WHERE r.type = mine.type AND r.id = mine.id"
        )
    }

    fn reject(&self, error: StoreError) -> Reject {
        let StoreError { message, sqlstate, .. } = error;
        let message: String = message.chars().take(MAX_MESSAGE).collect();
        let message = match sqlstate.as_deref() {
            Some("57014") => {
                let limit = humantime::format_duration(self.timeout);
                format!("it took longer than {limit} (HANDLER_TIMEOUT), or was cancelled: {message}")
            }
            _ => message,
        };
        Reject { reason: Reason::Handler, message, sqlstate }
    }
}

impl Session {
    /// The tasks that were begun last: in any state, and for any function, if these are empty.
    ///
    /// # Errors
    ///
    /// PostgreSQL cannot be reached, or refuses.
    pub async fn results(
        &self,
        state: &str,
        function: &str,
        limit: i64,
    ) -> Result<Vec<ResultRow>, StoreError> {
        let list = include_str!("../../sql/handlers/list.sql");
        let rows = self.in_time(self.client.query(list, &[&state, &function, &limit])).await?;
        let read = |row: tokio_postgres::Row| ResultRow {
            function: row.get(0),
            id: row.get(1),
            state: row.get(2),
            attempts: row.get(3),
            result: row.get::<_, Option<String>>(4).and_then(|text| RawValue::from_string(text).ok()),
            error: row.get(5),
            by: row.get(6),
            started_at: row.get(7),
            seconds: row.get(8),
        };
        Ok(rows.into_iter().map(read).collect())
    }

    /// Forgets results that are older than this, some at a time. Returns how many.
    ///
    /// # Errors
    ///
    /// PostgreSQL cannot be reached, or refuses.
    pub async fn purge_results(&self, older: Duration) -> Result<u64, StoreError> {
        let purge = include_str!("../../sql/handlers/purge.sql");
        self.in_time(self.client.execute(purge, &[&older.as_secs_f64()])).await
    }
}

/// Whether the error of a call says nothing about the task: the connection broke, or the server is being shut down or short of
/// something. What a function raises is its own, whatever the code.
fn is_servers(error: &StoreError) -> bool {
    match error.sqlstate.as_deref() {
        None => true,
        // configuration_limit_exceeded is the function's own doing.
        Some(code) => error.fatal || (code.starts_with("53") && code != "53400" && error.function.is_none()),
    }
}
