//! Leases: at most one reader of a cursor, at most one process of a consumer name.
//!
//! A lease is a key with a life of ten seconds that its holder prolongs. A process restarted after a crash waits for the old
//! lease to expire.

use std::sync::LazyLock;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Script};

/// How long a vanished holder keeps others out.
pub const LIFE: Duration = Duration::from_secs(10);

/// Takes a lease if nobody holds it; also `true` when it is ours already.
///
/// # Errors
///
/// Redis cannot be reached or its memory is full.
pub async fn take(connection: &mut MultiplexedConnection, key: &str, token: &str) -> RedisResult<bool> {
    let answer: Option<String> = redis::cmd("SET")
        .arg(key)
        .arg(token)
        .arg("NX")
        .arg("PX")
        .arg(LIFE.as_millis() as u64)
        .query_async(connection)
        .await?;
    if answer.is_some() {
        return Ok(true);
    }
    prolong(connection, key, token).await
}

/// Prolongs a lease; `false` when it is not ours any more.
///
/// # Errors
///
/// Redis cannot be reached.
pub async fn prolong(connection: &mut MultiplexedConnection, key: &str, token: &str) -> RedisResult<bool> {
    // PEXPIRE works when memory is full, SET does not.
    static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
        Script::new(
            "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
             return redis.call('PEXPIRE', KEYS[1], ARGV[2])",
        )
    });
    SCRIPT.key(key).arg(token).arg(LIFE.as_millis() as u64).invoke_async(connection).await
}

/// Gives a lease back, if it is ours.
///
/// # Errors
///
/// Redis cannot be reached; the lease then runs out by itself.
pub async fn release(connection: &mut MultiplexedConnection, key: &str, token: &str) -> RedisResult<()> {
    static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
        Script::new("if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end")
    });
    SCRIPT.key(key).arg(token).invoke_async(connection).await
}

/// How long the lease still lives; `None` when nobody holds it.
///
/// # Errors
///
/// Redis cannot be reached.
pub async fn life(connection: &mut MultiplexedConnection, key: &str) -> RedisResult<Option<Duration>> {
    let left: i64 = redis::cmd("PTTL").arg(key).query_async(connection).await?;
    Ok(u64::try_from(left).ok().map(Duration::from_millis))
}

/// A token that no other process has.
#[must_use]
pub fn token(consumer_id: &str) -> String {
    format!("{consumer_id}:{}:{:016x}", std::process::id(), fastrand::u64(..))
}

/// Whether some process has this lease.
///
/// # Errors
///
/// Redis cannot be reached.
pub async fn is_held(connection: &mut MultiplexedConnection, key: &str) -> RedisResult<bool> {
    redis::cmd("EXISTS").arg(key).query_async(connection).await
}
