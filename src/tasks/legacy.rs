//! Writes the keys of the old application's pages, if wanted: every second and once more at the end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use super::Task;
use crate::mutex::lock;
use crate::status::{State, Status};
use crate::store::{Store, takeover};
use crate::stream::legacy::{Legacy, ReaderState};
use crate::stream::{Redis, Stream};

const ROUND: Duration = Duration::from_secs(1);

/// One per process.
pub struct LegacyKeys {
    /// Whether the keys are wanted; `None` until that is known.
    wanted: Option<bool>,
    legacy: Legacy,
    redis: Redis,
    store: Option<Store>,
    status: Arc<Status>,
    stream: Option<Stream>,
}

impl LegacyKeys {
    /// `wanted`: `None` to write them if the database belonged to the old workers. `url`: the relay's, without secrets.
    #[must_use]
    pub fn new(
        wanted: Option<bool>,
        url: String,
        redis: Redis,
        store: Option<Store>,
        status: Arc<Status>,
    ) -> Self {
        Self { wanted, legacy: Legacy::new(url), redis, store, status, stream: None }
    }

    async fn are_wanted(&self, stream: &mut Stream) -> Result<bool> {
        if stream.has_legacy_keys().await? {
            return Ok(true);
        }
        match &self.store {
            Some(store) => Ok(takeover::was_theirs(store.session().await?.client()).await?),
            None => Ok(false),
        }
    }
}

impl Task for LegacyKeys {
    const NAME: &'static str = "legacy";

    async fn round(&mut self) -> Result<Duration> {
        if self.wanted == Some(false) {
            return Ok(Duration::from_hours(1));
        }
        let mut stream = self.redis.reuse(&mut self.stream).await?;
        if self.wanted.is_none() {
            self.wanted = Some(self.are_wanted(&mut stream).await?);
        }
        if self.wanted == Some(true) {
            let reader = self.status.reader.as_ref().map(|reader| {
                let reader = lock(reader);
                let connected = reader.connected && reader.state == State::Running;
                ReaderState { connected, cursor: reader.cursor }
            });
            self.legacy.write(&mut stream, self.status.counts(), reader).await?;
        }
        self.stream = Some(stream);
        Ok(ROUND)
    }

    async fn last(&mut self) {
        if self.wanted == Some(true) {
            // If this fails, the next start writes the last second's figures.
            let _ = self.round().await;
        }
    }
}
