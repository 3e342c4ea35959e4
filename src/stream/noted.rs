//! Redis's copy of PostgreSQL's record of what the group acknowledged; and sending the reader back if PostgreSQL knows
//! less.

use std::collections::HashMap;
use std::sync::LazyLock;

use redis::{RedisResult, Script};

use super::Stream;
use super::gap::Gap;

/// The record in Redis.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Redis's clock, Unix milliseconds.
    pub now_ms: u64,
    /// The position before the lowest that the group has not acknowledged.
    pub acked: Option<i64>,
    /// The relay that it belongs to; `None` if another program's reader feeds the stream.
    pub relay: Option<String>,
    /// The epoch that it belongs to.
    pub epoch: u64,
    /// When PostgreSQL last recorded something; 0 for never.
    pub noted_ms: u64,
    /// The server that recorded it.
    pub server: String,
    /// The refill in progress, if any.
    pub refill: Option<Refill>,
}

/// A refill: re-reading events that PostgreSQL lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refill {
    /// The position from which it reads.
    pub from: i64,
    /// The position up to which events had been acknowledged.
    pub until: i64,
    /// Since when, Unix milliseconds.
    pub since_ms: u64,
}

impl Stream {
    /// Reads the record.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn noted(&mut self) -> RedisResult<State> {
        type Answers = ((u64, u64), Option<String>, Option<String>, Option<u64>, HashMap<String, String>);
        let Self { connection, keys } = self;
        let ((seconds, micros), acked, relay, epoch, noted): Answers = redis::pipe()
            .cmd("TIME")
            .get(&keys.acked)
            .get(&keys.relay)
            .cmd("HGET")
            .arg(&keys.epoch)
            .arg("id")
            .cmd("HGETALL")
            .arg(&keys.noted)
            .query_async(connection)
            .await?;
        let number = |name: &str| noted.get(name).and_then(|text| text.parse::<i64>().ok());
        let refill = match (number("refill_from"), number("refill_until")) {
            (Some(from), Some(until)) => {
                let since_ms = number("refill_ms").and_then(|ms| u64::try_from(ms).ok()).unwrap_or(0);
                Some(Refill { from, until, since_ms })
            }
            _ => None,
        };
        Ok(State {
            now_ms: seconds * 1000 + micros / 1000,
            acked: acked.and_then(|text| text.parse().ok()),
            relay,
            epoch: epoch.unwrap_or(0),
            noted_ms: number("ms").and_then(|ms| u64::try_from(ms).ok()).unwrap_or(0),
            server: noted.get("server").cloned().unwrap_or_default(),
            refill,
        })
    }

    /// Stores what PostgreSQL has recorded. Call it after PostgreSQL did.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or its memory is full.
    pub async fn remember_noted(&mut self, ms: u64, server: &str) -> RedisResult<()> {
        let Self { connection, keys } = self;
        redis::cmd("HSET")
            .arg(&keys.noted)
            .arg("ms")
            .arg(ms)
            .arg("server")
            .arg(server)
            .query_async::<i64>(connection)
            .await
            .map(drop)
    }

    /// Records the end of a refill.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn refilled(&mut self) -> RedisResult<()> {
        let Self { connection, keys } = self;
        redis::cmd("HDEL")
            .arg(&keys.noted)
            .arg("refill_from")
            .arg("refill_until")
            .arg("refill_ms")
            .query_async::<i64>(connection)
            .await
            .map(drop)
    }

    /// Sends the reader back to `from`, for what PostgreSQL has lost. If several workers notice, only one does it.
    /// `known_ms`: the time of PostgreSQL's last record. `gap`: what cannot be re-read. `false` if another worker was
    /// faster, or if none of our readers feeds the stream.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or its memory is full.
    pub async fn refill(
        &mut self,
        found: &State,
        from: i64,
        known_ms: u64,
        server: &str,
        gap: Option<&Gap>,
    ) -> RedisResult<bool> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("refill.lua")));
        let Self { connection, keys } = self;
        SCRIPT
            .key(&keys.noted)
            .key(&keys.cursor)
            .key(&keys.acked)
            .key(&keys.relay)
            .key(&keys.watch)
            .key(&keys.missed)
            .key(&keys.gaps)
            .key(&keys.epoch)
            .arg(found.noted_ms)
            .arg(&found.server)
            .arg(from)
            .arg(known_ms)
            .arg(server)
            .arg(found.now_ms)
            .arg(gap.and_then(|gap| serde_json::to_string(gap).ok()).unwrap_or_default())
            .invoke_async(connection)
            .await
    }
}
