//! Takes repositories that have to be repaired from Redis into the queue, and repairs them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::OnceCell;

use super::Task;
use crate::config::Config;
use crate::control::Control;
use crate::repair::Repairer;
use crate::store::{Store, repos};
use crate::stream::{Redis, Stream};

/// How often to look for something to do.
const ROUND: Duration = Duration::from_secs(1);

/// Moves what the reader noted into `standpipe.repos`. One per process with pipelines.
pub struct Requests {
    redis: Redis,
    store: Store,
    stream: Option<Stream>,
    /// Where to continue.
    cursor: u64,
}

impl Requests {
    /// The task.
    #[must_use]
    pub fn new(redis: Redis, store: Store) -> Self {
        Self { redis, store, stream: None, cursor: 0 }
    }
}

impl Task for Requests {
    const NAME: &'static str = "repair requests";

    async fn round(&mut self) -> Result<Duration> {
        let mut stream = self.redis.reuse(&mut self.stream).await?;
        let (next, found) = stream.repairs(self.cursor).await?;
        self.cursor = next;
        let more = next != 0 || !found.is_empty();
        if !found.is_empty() {
            let session = self.store.session().await?;
            for (did, repair, text) in found {
                // After a gap they are many: what is known to be wrong comes first.
                let class = i16::from(repair.reason == "gap");
                if let Err(error) =
                    repos::queue(session.client(), &did, class, &repair.reason, &repair.rev).await
                {
                    session.discard();
                    return Err(error.into());
                }
                stream.take_repair(&did, &text).await?;
            }
        }
        self.stream = Some(stream);
        Ok(if more { Duration::ZERO } else { ROUND })
    }
}

/// Repairs one repository after the other. `REPAIR_CONCURRENCY` of them work side by side.
pub struct Repairs {
    config: Arc<Config>,
    redis: Redis,
    store: Store,
    /// It pauses with the pipelines.
    control: Arc<Control>,
    /// Shared by all of them, and made when it is first needed.
    repairer: Arc<OnceCell<Repairer>>,
}

impl Repairs {
    /// One of them; all share `repairer`.
    #[must_use]
    pub fn new(
        config: Arc<Config>,
        redis: Redis,
        store: Store,
        control: Arc<Control>,
        repairer: Arc<OnceCell<Repairer>>,
    ) -> Self {
        Self { config, redis, store, control, repairer }
    }
}

impl Task for Repairs {
    const NAME: &'static str = "repairs";

    async fn round(&mut self) -> Result<Duration> {
        self.control.pipelines_go().await;
        let make = async || Repairer::new(Arc::clone(&self.config), self.redis.clone(), self.store.clone());
        let repairer = self.repairer.get_or_try_init(make).await?;
        Ok(if repairer.next().await? { Duration::ZERO } else { ROUND })
    }
}
