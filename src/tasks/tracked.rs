//! With `WANTED_DIDS=tracked`: lists the accounts of `standpipe.repos` in Redis, where the reader looks.

use std::time::{Duration, Instant};

use anyhow::Result;
use tracing::info;

use super::Task;
use crate::store::Store;
use crate::stream::{Redis, Stream};

/// How often to look whether all of them are listed. Counting a large table takes time, so it is done less often.
const ROUND: Duration = Duration::from_secs(5);
/// The share of the time that may be spent on it is one in so many.
const SHARE: u32 = 100;

/// One per process with pipelines: several do no harm.
pub struct Tracked {
    redis: Redis,
    store: Store,
    stream: Option<Stream>,
}

impl Tracked {
    /// The task.
    #[must_use]
    pub fn new(redis: Redis, store: Store) -> Self {
        Self { redis, store, stream: None }
    }
}

impl Task for Tracked {
    const NAME: &'static str = "tracked accounts";

    async fn round(&mut self) -> Result<Duration> {
        let began = Instant::now();
        let mut stream = self.redis.reuse(&mut self.stream).await?;
        let listed = stream.tracked().await?;
        let session = self.store.session().await?;
        let wanted = session.tracked().await?;
        if listed.is_none_or(|listed| listed < wanted) {
            let mut after = String::new();
            let (mut accounts, mut new) = (0, 0);
            loop {
                let dids = session.tracked_after(&after).await?;
                let Some(last) = dids.last() else { break };
                last.clone_into(&mut after);
                let added = stream.track(&dids).await?;
                accounts += dids.len();
                new += added.len();
                // Redis had forgotten them: what they wrote since may have been left out.
                if listed.is_some() {
                    session.queue_untracked(&added).await?;
                }
            }
            if listed.is_none() {
                stream.tracking_is_complete().await?;
            }
            info!(accounts, new, "accounts to read (WANTED_DIDS=tracked)");
        }
        self.stream = Some(stream);
        Ok(ROUND.max(began.elapsed() * SHARE))
    }
}
