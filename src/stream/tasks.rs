//! The stream of tasks: messages for the operator's functions. It has the same consumer group as the stream of events, and what
//! is finished is removed from it at once, so that it holds what is waiting or being worked on.

use std::time::Duration;

use redis::{RedisResult, Value};
use serde::Serialize;

use super::entry::Batch;
use super::{Keys, Redis, Stream};
use crate::event::{Entry, EntryId};
use crate::time::now_ms;

/// Tasks that are looked at together.
const PAGE: usize = 10;

impl Keys {
    /// The stream of tasks.
    #[must_use]
    pub fn tasks(&self) -> String {
        format!("{}:tasks", self.stream)
    }

    fn of_tasks(&self) -> Self {
        Self { stream: self.tasks(), ..self.clone() }
    }
}

impl Redis {
    /// Opens connections to the stream of tasks.
    #[must_use]
    pub fn of_tasks(&self) -> Self {
        Self { client: self.client.clone(), keys: self.keys.of_tasks().into() }
    }
}

/// How many tasks there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Tasks {
    /// Nobody has begun with these.
    pub waiting: u64,
    /// These are being worked on, or wait for another attempt.
    pub begun: u64,
    /// How long the oldest one that nobody has begun with has been waiting.
    pub oldest_seconds: Option<f64>,
}

impl Stream {
    /// The same connection, for the stream of tasks.
    #[must_use]
    pub fn of_tasks(&self) -> Self {
        Self { connection: self.connection.clone(), keys: self.keys.of_tasks().into() }
    }
}

/// For connections to the stream of tasks.
impl Stream {
    /// Makes sure that the stream and its group exist.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or refuses.
    pub async fn ensure_tasks(&mut self) -> RedisResult<()> {
        let Self { connection, keys } = self;
        let created = redis::cmd("XGROUP")
            .arg("CREATE")
            .arg(&keys.stream)
            .arg(&keys.group)
            .arg("0")
            .arg("MKSTREAM")
            .query_async::<()>(connection)
            .await;
        match created {
            Err(error) if error.code() != Some("BUSYGROUP") => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes over tasks that nobody has touched for so long, beginning at `from` (empty for the first). Returns their ids, and where to
    /// continue; empty at the end.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or there is no group.
    pub async fn claim_tasks(
        &mut self,
        consumer: &str,
        idle: Duration,
        from: &str,
    ) -> RedisResult<(Vec<EntryId>, String)> {
        let Self { connection, keys } = self;
        let from = if from.is_empty() { "0-0" } else { from };
        let mut claim = redis::cmd("XAUTOCLAIM");
        claim.arg(&keys.stream).arg(&keys.group).arg(consumer).arg(idle.as_millis() as u64).arg(from);
        let answer: Vec<Value> = claim.arg("COUNT").arg(100).arg("JUSTID").query_async(connection).await?;
        let mut answer = answer.into_iter();
        let next: String = redis::from_redis_value(answer.next().unwrap_or(Value::Nil))?;
        let ids: Vec<String> = redis::from_redis_value(answer.next().unwrap_or(Value::Array(Vec::new())))?;
        let next = if next == "0-0" { String::new() } else { next };
        Ok((ids.iter().filter_map(|id| id.parse().ok()).collect(), next))
    }

    /// A task; `None` if it is finished.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn task(&mut self, id: EntryId) -> RedisResult<Option<Entry>> {
        let Self { connection, keys } = self;
        let (id, mut range) = (id.to_string(), redis::cmd("XRANGE"));
        let found: Value = range.arg(&keys.stream).arg(&id).arg(&id).query_async(connection).await?;
        let mut batch = Batch::default();
        batch.extend(found)?;
        Ok(batch.entries.pop())
    }

    /// Tasks that a consumer has begun with, the oldest first.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or there is no group.
    pub async fn begun_tasks(&mut self, consumer: &str, count: usize) -> RedisResult<Vec<EntryId>> {
        let all = (EntryId::default(), EntryId { ms: u64::MAX, seq: u64::MAX });
        let begun = self.deliveries(consumer, all.0, all.1, count).await?;
        Ok(begun.into_iter().map(|(id, _)| id).collect())
    }

    /// Removes a finished task.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached; the task then stays pending, and is known to be done when it is begun again.
    pub async fn finish_task(&mut self, id: EntryId) -> RedisResult<()> {
        let Self { connection, keys } = self;
        let id = id.to_string();
        redis::pipe()
            .atomic()
            .cmd("XACK")
            .arg(&keys.stream)
            .arg(&keys.group)
            .arg(&id)
            .cmd("XDEL")
            .arg(&keys.stream)
            .arg(&id)
            .query_async(connection)
            .await
    }

    /// How many tasks there are; none if nobody has ever sent one.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn count_tasks(&mut self) -> RedisResult<Tasks> {
        let after = self.last_begun().await?;
        let Self { connection, keys } = self;
        let length: u64 = redis::cmd("XLEN").arg(&keys.stream).query_async(connection).await?;
        let mut pending = redis::cmd("XPENDING");
        let pending = pending.arg(&keys.stream).arg(&keys.group).query_async::<Vec<Value>>(connection).await;
        let begun = match pending {
            Ok(answer) => answer.into_iter().next().map(redis::from_redis_value).transpose()?.unwrap_or(0),
            Err(error) if super::is_nogroup(&error) => 0,
            Err(error) => return Err(error),
        };
        let mut range = redis::cmd("XRANGE");
        range.arg(&keys.stream).arg(format!("({after}")).arg("+").arg("COUNT").arg(1);
        let mut oldest = Batch::default();
        oldest.extend(range.query_async(connection).await?)?;
        let seconds = |task: &Entry| now_ms().saturating_sub(task.id.ms) as f64 / 1000.0;
        let oldest_seconds = oldest.entries.first().map(seconds);
        Ok(Tasks { waiting: length.saturating_sub(begun), begun, oldest_seconds })
    }

    /// The newest task that somebody has begun with.
    async fn last_begun(&mut self) -> RedisResult<EntryId> {
        match self.last_delivered().await {
            Err(error) if super::is_nogroup(&error) => Ok(EntryId::default()),
            after => after,
        }
    }

    /// Tasks that nobody has begun with, the newest first, before this one; a few at a time, since each may be large.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn waiting_tasks(&mut self, before: Option<EntryId>) -> RedisResult<Vec<Entry>> {
        let after = self.last_begun().await?;
        let Self { connection, keys } = self;
        let before = before.map_or_else(|| "+".to_owned(), |before| format!("({before}"));
        let mut range = redis::cmd("XREVRANGE");
        range.arg(&keys.stream).arg(before).arg(format!("({after}")).arg("COUNT").arg(PAGE);
        let mut batch = Batch::default();
        batch.extend(range.query_async(connection).await?)?;
        Ok(batch.entries)
    }
}
