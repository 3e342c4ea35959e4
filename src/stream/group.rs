//! The consumer group: created in one place, read, acknowledged.

use redis::aio::MultiplexedConnection;
use redis::{RedisError, RedisResult, Script};
use serde::{Deserialize, Serialize};

use super::entry::Batch;
use super::{BLOCK, Keys};
use crate::event::EntryId;

/// What [`ensure`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ensured {
    /// The stream had been deleted; the reader's cursor was set back to what was not acknowledged.
    pub stream_lost: bool,
    /// The group was not there.
    pub group_created: bool,
}

/// Makes sure that stream and group exist. The only place that creates the group.
///
/// # Errors
///
/// Redis cannot be reached or refuses.
pub async fn ensure(connection: &mut MultiplexedConnection, keys: &Keys) -> Result<Ensured, RedisError> {
    let script = Script::new(include_str!("ensure.lua"));
    let (lost, created): (i64, i64) = script
        .key(&keys.stream)
        .key(&keys.cursor)
        .key(&keys.acked)
        .key(&keys.lost)
        .arg(&keys.group)
        .invoke_async(connection)
        .await?;
    Ok(Ensured { stream_lost: lost == 1, group_created: created == 1 })
}

/// Reads entries that nobody has got yet, waiting up to [`BLOCK`] for the first.
///
/// Do not drop the future and keep the connection: the entries would be ours without our knowing it.
///
/// # Errors
///
/// Redis cannot be reached or refuses; [`super::is_nogroup`] tells a missing group.
pub async fn read_new(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    consumer: &str,
    count: usize,
) -> RedisResult<Batch> {
    redis::cmd("XREADGROUP")
        .arg("GROUP")
        .arg(&keys.group)
        .arg(consumer)
        .arg("COUNT")
        .arg(count)
        .arg("BLOCK")
        .arg(BLOCK.as_millis() as u64)
        .arg("STREAMS")
        .arg(&keys.stream)
        .arg(">")
        .query_async(connection)
        .await
}

/// Reads entries that this consumer got earlier and never acknowledged, those after `after`.
///
/// For the start and after a reconnection only: it resets the entries' idle time.
///
/// # Errors
///
/// As for [`read_new`].
pub async fn read_pending(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    consumer: &str,
    count: usize,
    after: EntryId,
) -> RedisResult<Batch> {
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

/// Acknowledges entries. Only for entries whose effects are durable, or that are lost or dead letters already.
///
/// # Errors
///
/// Redis cannot be reached; the entries then stay pending and are applied again, which changes nothing.
pub async fn acknowledge(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    ids: &[EntryId],
) -> RedisResult<()> {
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

/// Resets the idle time of entries in hand, so that nobody takes them for abandoned. Their delivery count stays.
///
/// # Errors
///
/// Redis cannot be reached.
pub async fn keep_fresh(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    consumer: &str,
    ids: &[EntryId],
) -> RedisResult<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let mut command = redis::cmd("XCLAIM");
    command.arg(&keys.stream).arg(&keys.group).arg(consumer).arg(0);
    for id in ids {
        command.arg(id.to_string());
    }
    command.arg("JUSTID").query_async::<redis::Value>(connection).await?;
    Ok(())
}

/// One consumer of the group, as Redis knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConsumerInfo {
    /// Its name.
    pub name: String,
    /// Entries that it got and did not acknowledge.
    pub pending: u64,
    /// How long ago it last asked for something.
    pub idle_seconds: f64,
}

/// The group's consumers.
///
/// # Errors
///
/// Redis cannot be reached, or there is no such group.
pub async fn consumers(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
) -> RedisResult<Vec<ConsumerInfo>> {
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
