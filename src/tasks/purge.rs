//! Removes the records of deleted accounts.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tracing::debug;

use super::Task;
use crate::control::Control;
use crate::metrics;
use crate::store::{Store, purge};

const ROUND: Duration = Duration::from_secs(1);

/// One per process with pipelines.
pub struct Purge {
    /// The database.
    pub store: Store,
    /// It pauses with the pipelines.
    pub control: Arc<Control>,
}

impl Task for Purge {
    const NAME: &'static str = "purge";

    async fn round(&mut self) -> Result<Duration> {
        self.control.pipelines_go().await;
        // The statements have the server's time limit, like all of this pool's.
        let session = self.store.session().await?;
        let Some(deletion) = purge::next(session.client()).await? else { return Ok(ROUND) };
        match purge::purge(session.client(), &deletion).await {
            Ok(records) => {
                metrics::count(metrics::PURGED_ACCOUNTS, 1);
                metrics::count(metrics::PURGED_RECORDS, records);
                debug!(did = deletion.did, records, "removed the records of a deleted account");
                Ok(Duration::ZERO)
            }
            Err(error) => {
                session.discard();
                Err(error.into())
            }
        }
    }
}
