//! Counts the repositories that are queued and those that are done, for status, page and metrics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tracing::warn;

use super::Task;
use crate::metrics;
use crate::mutex::lock;
use crate::status::{BackfillStatus, Repositories, Status};
use crate::store::Store;

/// How often. Counting a large table takes time, so it is done less often.
const ROUND: Duration = Duration::from_secs(5);
/// The share of the time that may be spent on it is one in so many.
const SHARE: u32 = 100;

/// One per process with pipelines.
pub struct Standings {
    store: Store,
    status: Arc<Status>,
}

impl Standings {
    /// The task.
    #[must_use]
    pub fn new(store: Store, status: Arc<Status>) -> Self {
        Self { store, status }
    }
}

impl Task for Standings {
    const NAME: &'static str = "repositories";

    async fn round(&mut self) -> Result<Duration> {
        let began = Instant::now();
        let session = self.store.session().await?;
        let counted = session.standings().await;
        let [to_repair, after_gap, to_backfill, synced, gone, error] = match counted {
            Ok(counted) => counted,
            // It took too long. It would again.
            Err(error) if began.elapsed() > ROUND => {
                warn!(%error, "standpipe.repos cannot be counted in time: its figures are missing");
                return Ok(began.elapsed() * SHARE);
            }
            Err(error) => return Err(error.into()),
        };
        let backfills = session.backfills().await?.into_iter().map(|backfill| BackfillStatus {
            per_minute: backfill.per_minute(),
            what: backfill.what,
            listed: backfill.listed,
            is_listed: backfill.is_listed,
            left: backfill.left,
        });
        let backfills = backfills.collect();
        let now = Repositories { to_repair, after_gap, to_backfill, synced, gone, error, backfills };
        metrics::repositories(&now);
        *lock(&self.status.repositories) = Some(now);
        Ok(ROUND.max(began.elapsed() * SHARE))
    }
}
