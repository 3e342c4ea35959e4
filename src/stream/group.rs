//! The consumer group: created in one place, read, acknowledged, taken over.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;

use redis::{FromRedisValue as _, ParsingError, RedisError, RedisResult, Script, Value};
use serde::{Deserialize, Serialize};

use super::entry::Batch;
use super::{BLOCK, Stream};
use crate::event::{Entry, EntryId};

/// A consumer of another program that holds nothing and has been idle for longer than this counts as gone.
const OTHERS_IDLE: Duration = Duration::from_mins(10);

static KEEP_FRESH: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("keep_fresh.lua")));
static GONE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("gone.lua")));
static CLAIM: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("claim.lua")));
static DELIVERED: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("delivered.lua")));

/// What [`ensure`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ensured {
    /// The stream had been deleted; the reader's cursor was set back to the lowest unacknowledged position.
    pub stream_lost: bool,
    /// The group did not exist.
    pub group_created: bool,
}

impl Stream {
    /// Makes sure that stream and group exist. The only place that creates the group.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or refuses.
    pub async fn ensure(&mut self) -> Result<Ensured, RedisError> {
        let Self { connection, keys } = self;
        let script = Script::new(include_str!("ensure.lua"));
        let (lost, created): (i64, i64) = script
            .key(&keys.stream)
            .key(&keys.cursor)
            .key(&keys.acked)
            .key(&keys.lost)
            .key(&keys.watch)
            .key(&keys.start)
            .arg(&keys.group)
            .invoke_async(connection)
            .await?;
        Ok(Ensured { stream_lost: lost == 1, group_created: created == 1 })
    }

    /// Reads entries not yet delivered; `wait`: waits up to [`BLOCK`] for the first.
    ///
    /// Do not drop the future and keep the connection: the entries would be assigned to us without our knowledge.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or refuses; [`super::is_nogroup`] recognises a missing group.
    pub async fn read_new(&mut self, consumer: &str, count: usize, wait: bool) -> RedisResult<Batch> {
        let Self { connection, keys } = self;
        let mut command = redis::cmd("XREADGROUP");
        command.arg("GROUP").arg(&keys.group).arg(consumer).arg("COUNT").arg(count);
        if wait {
            command.arg("BLOCK").arg(BLOCK.as_millis() as u64);
        }
        command.arg("STREAMS").arg(&keys.stream).arg(">").query_async(connection).await
    }

    /// Reads entries that this consumer received earlier and never acknowledged, starting after `after`.
    ///
    /// For the start and after a reconnection only: it resets the entries' idle time.
    ///
    /// # Errors
    ///
    /// As for [`read_new`].
    pub async fn read_pending(&mut self, consumer: &str, count: usize, after: EntryId) -> RedisResult<Batch> {
        let Self { connection, keys } = self;
        redis::cmd("XREADGROUP")
            .arg("GROUP")
            .arg(&keys.group)
            .arg(consumer)
            .arg("COUNT")
            .arg(count)
            .arg("STREAMS")
            .arg(&keys.stream)
            .arg(after.to_string())
            .query_async(connection)
            .await
    }

    /// Acknowledges entries. Only for entries whose effects are durable, or that are already lost or dead letters.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached; the entries then stay pending and are applied again, which changes nothing.
    pub async fn acknowledge(&mut self, ids: &[EntryId]) -> RedisResult<()> {
        let Self { connection, keys } = self;
        if ids.is_empty() {
            return Ok(());
        }
        let mut command = redis::cmd("XACK");
        command.arg(&keys.stream).arg(&keys.group);
        for id in ids {
            command.arg(id.to_string());
        }
        command.query_async::<i64>(connection).await?;
        Ok(())
    }

    /// Resets the idle time of entries in hand, so that nobody considers them abandoned. Their delivery count stays.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn keep_fresh(&mut self, consumer: &str, ids: &[EntryId]) -> RedisResult<()> {
        let Self { connection, keys } = self;
        if ids.is_empty() {
            return Ok(());
        }
        let mut invocation = KEEP_FRESH.key(&keys.stream);
        invocation.arg(&keys.group).arg(consumer);
        for id in ids {
            invocation.arg(id.to_string());
        }
        invocation.invoke_async(connection).await
    }

    /// Acknowledges entries that somebody removed while they were pending, and sends the reader back for them.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or its memory is full; the entries then stay pending.
    pub async fn give_up(&mut self, ids: &[EntryId]) -> RedisResult<()> {
        let Self { connection, keys } = self;
        if ids.is_empty() {
            return Ok(());
        }
        let mut invocation = GONE.key(&keys.stream);
        invocation.key(&keys.relay).key(&keys.watch).arg(&keys.group);
        for id in ids {
            invocation.arg(id.to_string());
        }
        invocation.invoke_async(connection).await
    }

    /// Takes over entries that have been idle for `idle`, from `start` ("0-0" for the beginning).
    ///
    /// The server scans at most ten times `count` entries, so an empty page is not the end.
    ///
    /// # Errors
    ///
    /// As for [`read_new`].
    pub async fn claim(
        &mut self,
        consumer: &str,
        idle: Duration,
        start: &str,
        count: usize,
    ) -> RedisResult<Claimed> {
        let Self { connection, keys } = self;
        let reply: Value = CLAIM
            .key(&keys.stream)
            .key(&keys.relay)
            .key(&keys.watch)
            .arg(&keys.group)
            .arg(consumer)
            .arg(idle.as_millis() as u64)
            .arg(start)
            .arg(count)
            .invoke_async(connection)
            .await?;
        Ok(claimed(reply)?)
    }

    /// How often each of a consumer's entries has been delivered, for those with an id from `first` to `last`.
    ///
    /// # Errors
    ///
    /// As for [`read_new`].
    pub async fn deliveries(
        &mut self,
        consumer: &str,
        first: EntryId,
        last: EntryId,
        count: usize,
    ) -> RedisResult<Vec<(EntryId, u64)>> {
        let Self { connection, keys } = self;
        let reply: Vec<(String, String, u64, u64)> = redis::cmd("XPENDING")
            .arg(&keys.stream)
            .arg(&keys.group)
            .arg(first.to_string())
            .arg(last.to_string())
            .arg(count)
            .arg(consumer)
            .query_async(connection)
            .await?;
        Ok(reply.into_iter().filter_map(|(id, _, _, times)| Some((id.parse().ok()?, times))).collect())
    }

    /// Removes consumers that have nothing pending and have not read for `idle`: all of them, or the one with this
    /// name. Returns how many.
    ///
    /// # Errors
    ///
    /// As for [`read_new`].
    pub async fn remove_idle_consumers(&mut self, idle: Duration, only: Option<&str>) -> RedisResult<u64> {
        // One script: between a check and a removal, the consumer could receive an entry, which the removal would lose.
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("remove_consumers.lua")));
        let Self { connection, keys } = self;
        SCRIPT
            .key(&keys.stream)
            .arg(&keys.group)
            .arg(idle.as_millis() as u64)
            .arg(only.unwrap_or_default())
            .invoke_async(connection)
            .await
    }

    /// The first of `names` that sent a read within `limit`, and is therefore in use.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn active_consumer(
        &mut self,
        names: &[String],
        limit: Duration,
    ) -> RedisResult<Option<String>> {
        let consumers = match self.consumers().await {
            Ok(consumers) => consumers,
            // No stream or no group: no consumers.
            Err(error) if super::is_nogroup(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let active = consumers
            .into_iter()
            .find(|consumer| consumer.idle_seconds < limit.as_secs_f64() && names.contains(&consumer.name));
        Ok(active.map(|consumer| consumer.name))
    }

    /// The group's consumers.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or there is no such group.
    pub async fn consumers(&mut self) -> RedisResult<Vec<ConsumerInfo>> {
        let Self { connection, keys } = self;
        let reply: redis::streams::StreamInfoConsumersReply = redis::cmd("XINFO")
            .arg("CONSUMERS")
            .arg(&keys.stream)
            .arg(&keys.group)
            .query_async(connection)
            .await?;
        Ok(reply
            .consumers
            .into_iter()
            .map(|consumer| ConsumerInfo {
                name: consumer.name,
                pending: consumer.pending as u64,
                idle_seconds: consumer.idle as f64 / 1000.0,
            })
            .collect())
    }

    /// Whether a consumer of the group belongs to another program: it is active or holds entries, and no process of
    /// ours holds the lease on its name.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or there is no such group.
    pub async fn has_others(&mut self) -> RedisResult<bool> {
        let mut asked: HashMap<String, bool> = HashMap::new();
        for consumer in self.consumers().await? {
            if consumer.pending == 0 && consumer.idle_seconds > OTHERS_IDLE.as_secs_f64() {
                continue;
            }
            let Some((id, _)) = consumer.name.rsplit_once('-') else { return Ok(true) };
            let ours = match asked.get(id) {
                Some(ours) => *ours,
                // Our own lease is held while this runs.
                None if self.keys.lease_of(id) == self.keys.consumer_lease => true,
                None => self.is_leased(id).await?,
            };
            if !ours {
                return Ok(true);
            }
            asked.insert(id.to_owned(), ours);
        }
        Ok(false)
    }

    /// The newest entry delivered to any consumer in the group.
    ///
    /// # Errors
    ///
    /// As for [`has_others`].
    pub async fn last_delivered(&mut self) -> RedisResult<EntryId> {
        let Self { connection, keys } = self;
        let reply: redis::streams::StreamInfoGroupsReply =
            redis::cmd("XINFO").arg("GROUPS").arg(&keys.stream).query_async(connection).await?;
        let own = reply.groups.into_iter().find(|group| group.name == keys.group);
        Ok(own.and_then(|group| group.last_delivered_id.parse().ok()).unwrap_or_default())
    }

    /// The oldest entry delivered but not acknowledged; `None` if there is none.
    ///
    /// # Errors
    ///
    /// As for [`has_others`].
    pub async fn first_pending(&mut self) -> RedisResult<Option<EntryId>> {
        let Self { connection, keys } = self;
        let reply: (u64, Option<String>, Value, Value) =
            redis::cmd("XPENDING").arg(&keys.stream).arg(&keys.group).query_async(connection).await?;
        Ok(reply.1.and_then(|id| id.parse().ok()))
    }

    /// The oldest entries delivered but not acknowledged.
    ///
    /// # Errors
    ///
    /// As for [`has_others`].
    pub async fn pending(&mut self, count: usize) -> RedisResult<Vec<Pending>> {
        let Self { connection, keys } = self;
        let reply: Vec<(String, String, u64, u64)> = redis::cmd("XPENDING")
            .arg(&keys.stream)
            .arg(&keys.group)
            .arg("-")
            .arg("+")
            .arg(count)
            .query_async(connection)
            .await?;
        let entry = |(id, consumer, idle, _)| Pending { id, consumer, idle: Duration::from_millis(idle) };
        Ok(reply.into_iter().map(entry).collect())
    }

    /// One page of the entries in (`after`, `until`], whichever consumer they were delivered to.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or refuses.
    pub async fn delivered(
        &mut self,
        after: EntryId,
        until: EntryId,
        count: usize,
        leave_out: LeaveOut<'_>,
    ) -> RedisResult<Delivered> {
        let Self { connection, keys } = self;
        let (last, looked_at, entries, pending): (String, u64, Value, Vec<u8>) = DELIVERED
            .key(&keys.stream)
            .arg(&keys.group)
            .arg(after.to_string())
            .arg(until.to_string())
            .arg(count)
            .arg(u8::from(leave_out.pending_at_first))
            .arg(leave_out.consumers)
            .invoke_async(connection)
            .await?;
        let mut batch = Batch::default();
        batch.extend(entries)?;
        let entries =
            batch.entries.into_iter().zip(pending.into_iter().map(|pending| pending == 1)).collect();
        Ok(Delivered { last: last.parse().ok(), looked_at, entries })
    }

    /// Which of these pending entries are no longer in the stream.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn dangling<'a>(&mut self, pending: &'a [Pending]) -> RedisResult<Vec<&'a Pending>> {
        let Self { connection, keys } = self;
        if pending.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipe = redis::pipe();
        for entry in pending {
            pipe.cmd("XRANGE").arg(&keys.stream).arg(&entry.id).arg(&entry.id);
        }
        let found: Vec<Vec<Value>> = pipe.query_async(connection).await?;
        Ok(pending.iter().zip(&found).filter(|(_, entry)| entry.is_empty()).map(|(entry, _)| entry).collect())
    }
}

/// A page of entries abandoned by their consumers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claimed {
    /// Entries now pending with us, and those that somebody has deleted.
    pub batch: Batch,
    /// Where to continue; `None` at the end. Passed back verbatim: the server decides where the next scan begins.
    pub next: Option<String>,
}

fn claimed(reply: Value) -> Result<Claimed, ParsingError> {
    let Value::Array(parts) = reply else {
        return Err("XAUTOCLAIM answered with something else than a list".into());
    };
    let mut parts = parts.into_iter();
    let next = String::from_redis_value(parts.next().unwrap_or(Value::Nil))?;
    let mut batch = Batch::default();
    batch.extend(parts.next().unwrap_or(Value::Array(Vec::new())))?;
    // Since Redis 7; 6.2 returns deleted entries as nil in the list, without their ids.
    if let Some(Value::Array(gone)) = parts.next() {
        for id in gone {
            let id = String::from_redis_value(id)?;
            batch.gone.extend(id.parse::<EntryId>());
        }
    }
    Ok(Claimed { batch, next: (next != "0-0").then_some(next) })
}

/// One consumer of the group, as Redis knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConsumerInfo {
    /// Its name.
    pub name: String,
    /// Entries delivered to it and not acknowledged.
    pub pending: u64,
    /// Time since its last read.
    pub idle_seconds: f64,
}

/// An entry that was delivered and not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Its id.
    pub id: String,
    /// The consumer that received it.
    pub consumer: String,
    /// How long ago it was delivered, or kept fresh.
    pub idle: Duration,
}

/// A page of delivered entries.
#[derive(Clone, Debug, Default)]
pub struct Delivered {
    /// The last entry examined; `None` at the end.
    pub last: Option<EntryId>,
    /// The number of entries examined.
    pub looked_at: u64,
    /// The requested entries among them, each with whether it is pending.
    pub entries: Vec<(Entry, bool)>,
}

/// Which entries [`delivered`] leaves out.
#[derive(Clone, Copy, Debug)]
pub struct LeaveOut<'a> {
    /// Entries pending with these consumers.
    pub consumers: &'a [String],
    /// Entries pending with any consumer, up to the first one that is not pending.
    pub pending_at_first: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claim_replies_of_old_and_new_redis_are_parsed() {
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let entry = Value::Array(vec![bulk("7-1"), Value::Array(vec![bulk("type"), bulk("commit")])]);
        let new = Value::Array(vec![
            bulk("9-0"),
            Value::Array(vec![entry.clone()]),
            Value::Array(vec![bulk("5-0")]),
        ]);
        let claimed_new = claimed(new).unwrap();
        assert_eq!(claimed_new.next.as_deref(), Some("9-0"));
        assert_eq!(claimed_new.batch.entries.len(), 1);
        assert_eq!(claimed_new.batch.gone, [EntryId { ms: 5, seq: 0 }]);
        let old = Value::Array(vec![bulk("0-0"), Value::Array(vec![Value::Nil, entry])]);
        let claimed_old = claimed(old).unwrap();
        assert_eq!(claimed_old.next, None);
        assert_eq!(claimed_old.batch.entries.len(), 1);
    }
}
