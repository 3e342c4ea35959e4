//! What PostgreSQL noted of what the group acknowledged, as Redis remembers it; and sending the reader back when PostgreSQL
//! knows less.

use std::collections::HashMap;
use std::sync::LazyLock;

use redis::{RedisResult, Script};

use super::Stream;
use super::gap::Gap;

/// What Redis says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Redis's clock, Unix milliseconds.
    pub now_ms: u64,
    /// The position before the lowest that the group has not acknowledged.
    pub acked: Option<i64>,
    /// The relay that it belongs to; `None` where another program's reader feeds the stream.
    pub relay: Option<String>,
    /// The epoch that it belongs to.
    pub epoch: u64,
    /// When PostgreSQL noted something last; 0 for never.
    pub noted_ms: u64,
    /// Which server noted it.
    pub server: String,
    /// The refill in progress: from where, up to where, and since when (Unix milliseconds).
    pub refill: Option<Refill>,
}

/// A refill: events read again because PostgreSQL lacks them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refill {
    /// The position from which it is read.
    pub from: i64,
    /// The position up to which it had been acknowledged.
    pub until: i64,
    /// Since when, Unix milliseconds.
    pub since_ms: u64,
}

impl Stream {
    /// Reads it.
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

    /// Remembers that PostgreSQL noted something, after it did.
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

    /// Notes that a refill is over.
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

    /// Sends the reader back to `from`, for what PostgreSQL has lost. Of several workers that find it out one does it. `known_ms`:
    /// what PostgreSQL says it noted last, and `gap`, what cannot be read again. `false` when another one was faster, or when
    /// nobody of ours reads.
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
