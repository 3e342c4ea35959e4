//! Once an hour, deletes tombstones older than the retention and than any entry that may still be applied.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tracing::info;

use super::Task;
use crate::control::Control;
use crate::store::{Store, tombstones};
use crate::stream::Redis;
use crate::time::now_ms;

const ROUND: Duration = Duration::from_hours(1);

/// One per process with pipelines.
pub struct Tombstones {
    /// The stream and its dead letters, which may be retried.
    pub redis: Redis,
    /// The database.
    pub store: Store,
    /// `TOMBSTONE_RETENTION`.
    pub retention: Duration,
    /// It pauses with the pipelines.
    pub control: Arc<Control>,
}

impl Tombstones {
    async fn sweep(&self) -> Result<u64> {
        let mut stream = self.redis.connect().await?;
        let oldest = stream.oldest_dead_letter_source().await?;
        let bound =
            now_ms().saturating_sub(self.retention.as_millis() as u64).min(oldest.unwrap_or(u64::MAX));
        Ok(tombstones::sweep(self.store.session().await?.client(), bound).await?)
    }
}

impl Task for Tombstones {
    const NAME: &'static str = "tombstones";

    async fn round(&mut self) -> Result<Duration> {
        self.control.pipelines_go().await;
        if let count @ 1.. = self.sweep().await? {
            info!(count, "deleted tombstones older than the retention");
        }
        Ok(ROUND)
    }
}
