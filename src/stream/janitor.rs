//! Trims entries that every group has acknowledged, and reports the state of the stream.

use std::sync::LazyLock;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, ParsingError, RedisResult, Script, Value};

use super::{Keys, Stream};
use crate::config::StreamKeep;
use crate::event::EntryId;
use crate::time::now_ms;

/// Maximum entries trimmed by one call; more would hold up the server.
const TRIM_LIMIT: u32 = 10_000;

/// Minimum time for which acknowledged entries stay if any are kept: subscribers that keep up read them by then.
const AT_LEAST: Duration = Duration::from_secs(5);

/// The minimum time between setting the reader back, in case entries keep being removed.
const SET_BACK_PAUSE: Duration = Duration::from_secs(10);

static SCRIPT: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!(include_str!("set_output.lua"), include_str!("janitor.lua"))));

/// The state of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Whether the stream exists.
    pub exists: bool,
    /// Whether our group exists; without it, nothing is trimmed.
    pub group: bool,
    /// Entries in the stream.
    pub length: u64,
    /// Entries delivered and not acknowledged, in our group.
    pub pending: u64,
    /// Entries not delivered yet; `None` if Redis cannot tell.
    pub lag: Option<u64>,
    /// The oldest entry that is pending.
    pub oldest_pending: Option<EntryId>,
    /// The oldest entry not yet delivered.
    pub oldest_waiting: Option<EntryId>,
    /// Entries removed by this call.
    pub trimmed: u64,
    /// The group whose progress bounds the trim.
    pub held_by: String,
    /// Entries found removed by somebody else that may not have been acknowledged.
    pub removed: u64,
    /// Whether the reader was set back to re-read such entries.
    pub set_back: bool,
    /// Entries, at least, before the first that some group has not acknowledged: mostly what `STREAM_KEEP` keeps. Entries behind
    /// it that are acknowledged do not count: they cannot be trimmed.
    pub acknowledged: u64,
    /// Entries that outputs skipped, because they were too far behind.
    pub skipped: u64,
}

impl Look {
    /// Entries not yet delivered: `None` if Redis cannot tell. An empty backlog is 0 even then.
    #[must_use]
    pub fn waiting(&self) -> Option<u64> {
        if self.group && self.oldest_waiting.is_none() { Some(0) } else { self.lag }
    }

    /// Age of the oldest entry that is not acknowledged.
    #[must_use]
    pub fn oldest_seconds(&self) -> Option<f64> {
        self.oldest_unacknowledged().map(|id| now_ms().saturating_sub(id.ms) as f64 / 1000.0)
    }

    /// The oldest entry whose effects may not be durable.
    #[must_use]
    pub fn oldest_unacknowledged(&self) -> Option<EntryId> {
        match (self.oldest_pending, self.oldest_waiting) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Whether nothing is waiting or pending.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.exists && self.group && self.pending == 0 && self.oldest_waiting.is_none()
    }
}

/// What a process keeps in the stream after it was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing, unless another process keeps something.
    Nothing,
    /// Only what subscribers that keep up may not have read yet: there is no room for more now.
    Moments,
    /// This.
    Some(StreamKeep),
}

impl Stream {
    /// Inspects the stream, records the position before the lowest unacknowledged one, and trims once what is not to be kept.
    /// If it trimmed anything, there may be more to trim. Outputs that are further behind than `max_lag` skip entries.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or refuses.
    pub async fn sweep(&mut self, keep: Keep, max_lag: Option<Duration>) -> RedisResult<Look> {
        let Self { connection, keys } = self;
        call(connection, keys, TRIM_LIMIT, keep, max_lag).await
    }

    /// Inspects the stream without changing anything.
    ///
    /// # Errors
    ///
    /// As for [`sweep`].
    pub async fn look(&mut self) -> RedisResult<Look> {
        let Self { connection, keys } = self;
        call(connection, keys, 0, Keep::Nothing, None).await
    }
}

async fn call(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    limit: u32,
    keep: Keep,
    max_lag: Option<Duration>,
) -> RedisResult<Look> {
    let (ms, bytes) = match keep {
        Keep::Some(StreamKeep::Time(time)) => (time.as_millis().to_string(), String::new()),
        Keep::Some(StreamKeep::Bytes(bytes)) => (AT_LEAST.as_millis().to_string(), bytes.to_string()),
        Keep::Moments => (AT_LEAST.as_millis().to_string(), String::new()),
        Keep::Nothing => (String::new(), String::new()),
    };
    SCRIPT
        .key(&keys.stream)
        .key(&keys.cursor)
        .key(&keys.acked)
        .key(&keys.start)
        .key(&keys.relay)
        .key(&keys.watch)
        .key(&keys.trimmed)
        .arg(&keys.group)
        .arg(limit)
        .arg(now_ms())
        .arg(SET_BACK_PAUSE.as_millis() as u64)
        .arg(ms)
        .arg(bytes)
        .arg(max_lag.map_or_else(String::new, |lag| lag.as_millis().to_string()))
        .invoke_async(connection)
        .await
}

/// Parses the script's reply, in its order.
type Fields = (u64, i64, u64, i64, String, String, u64, String, u64, i64, u64, u64);

impl FromRedisValue for Look {
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        let Value::Array(fields) = value else {
            return Err("the janitor's script answered with something else than a list".into());
        };
        if fields.is_empty() {
            return Ok(Self::default());
        }
        let (
            length,
            group,
            pending,
            lag,
            oldest_pending,
            oldest_waiting,
            trimmed,
            held_by,
            removed,
            set_back,
            acknowledged,
            skipped,
        ) = Fields::from_redis_value(Value::Array(fields))?;
        Ok(Self {
            exists: true,
            group: group == 1,
            length,
            pending,
            lag: u64::try_from(lag).ok(),
            oldest_pending: oldest_pending.parse().ok(),
            oldest_waiting: oldest_waiting.parse().ok(),
            trimmed,
            held_by,
            removed,
            set_back: set_back == 1,
            acknowledged,
            skipped,
        })
    }
}
