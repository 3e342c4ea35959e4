//! Forgets what came of tasks long ago.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use super::Task;
use crate::control::Control;
use crate::store::Store;

const ROUND: Duration = Duration::from_mins(10);

/// One per process with pipelines for tasks.
pub struct Results {
    /// The database.
    pub store: Store,
    /// It pauses with the pipelines.
    pub control: Arc<Control>,
    /// `HANDLER_RESULTS`.
    pub keep: Duration,
}

impl Task for Results {
    const NAME: &'static str = "results";

    async fn round(&mut self) -> Result<Duration> {
        self.control.pipelines_go().await;
        let forgotten = self.store.session().await?.purge_results(self.keep).await?;
        Ok(if forgotten > 0 { Duration::ZERO } else { ROUND })
    }
}
