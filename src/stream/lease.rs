//! Leases: at most one reader per cursor, one process per consumer name, one per output.
//!
//! A lease is a key with a lifetime of ten seconds that its holder keeps prolonging. A process restarted after a crash
//! waits for the old lease to expire.

use std::sync::LazyLock;
use std::time::Duration;

use super::output::Output;
use super::{Keys, Stream};
use redis::{RedisResult, Script};

/// How long a vanished holder keeps others out.
pub const LIFE: Duration = Duration::from_secs(10);

/// What a process can lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// The cursor.
    Reader,
    /// The consumer names that begin with our `CONSUMER_ID`.
    Names,
    /// The Kafka topic from which events are taken.
    Origin,
    /// An output.
    Output(Output),
}

impl Keys {
    pub(super) fn of(&self, lease: Lease) -> String {
        match lease {
            Lease::Reader => self.lease.clone(),
            Lease::Names => self.consumer_lease.clone(),
            Lease::Origin => format!("{}:kafka-lease", self.stream),
            Lease::Output(output) => format!("{}:{}:lease", self.stream, output.group()),
        }
    }
}

impl Stream {
    /// Takes a lease if nobody holds it; also `true` if it is already ours.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn take_lease(&mut self, lease: Lease, token: &str) -> RedisResult<bool> {
        // Once a script has written anything, Redis lets it finish even when its memory is full.
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
            Script::new(
                "redis.call('HDEL', KEYS[2], '')
                 if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
                 if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
                 return redis.call('PEXPIRE', KEYS[1], ARGV[2])",
            )
        });
        let Self { connection, keys } = self;
        SCRIPT
            .key(keys.of(lease))
            .key(&keys.watch)
            .arg(token)
            .arg(LIFE.as_millis() as u64)
            .invoke_async(connection)
            .await
    }

    /// Prolongs a lease; `false` if it is no longer ours.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn prolong_lease(&mut self, lease: Lease, token: &str) -> RedisResult<bool> {
        // PEXPIRE works even when memory is full; SET does not.
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
            Script::new(
                "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
                 return redis.call('PEXPIRE', KEYS[1], ARGV[2])",
            )
        });
        let Self { connection, keys } = self;
        SCRIPT.key(keys.of(lease)).arg(token).arg(LIFE.as_millis() as u64).invoke_async(connection).await
    }

    /// Releases a lease, if it is ours.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached; the lease then expires by itself.
    pub async fn release_lease(&mut self, lease: Lease, token: &str) -> RedisResult<()> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
            Script::new("if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end")
        });
        let Self { connection, keys } = self;
        SCRIPT.key(keys.of(lease)).arg(token).invoke_async(connection).await
    }

    /// The remaining lifetime of the lease; `None` if nobody holds it.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn lease_life(&mut self, lease: Lease) -> RedisResult<Option<Duration>> {
        let Self { connection, keys } = self;
        let left: i64 = redis::cmd("PTTL").arg(keys.of(lease)).query_async(connection).await?;
        Ok(u64::try_from(left).ok().map(Duration::from_millis))
    }

    /// Whether any process holds the consumer names of this `CONSUMER_ID`.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn is_leased(&mut self, consumer_id: &str) -> RedisResult<bool> {
        let Self { connection, keys } = self;
        redis::cmd("EXISTS").arg(keys.lease_of(consumer_id)).query_async(connection).await
    }
}

/// A token that no other process has.
#[must_use]
pub fn token(consumer_id: &str) -> String {
    format!("{consumer_id}:{}:{:016x}", std::process::id(), fastrand::u64(..))
}
