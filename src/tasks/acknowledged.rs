//! Records in PostgreSQL, every second, what the group has acknowledged. If PostgreSQL knows less than it had recorded,
//! the reader goes back for the missing events.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tracing::{error, warn};

use super::Task;
use crate::metrics;
use crate::mutex::lock;
use crate::status::Status;
use crate::store::acknowledged::{Known, Noted};
use crate::store::{Store, acknowledged};
use crate::stream::gap::Gap;
use crate::stream::noted::Refill;
use crate::stream::{Redis, Stream, noted};

const ROUND: Duration = Duration::from_secs(1);

/// One per process with pipelines.
pub struct Acknowledged {
    redis: Redis,
    store: Store,
    status: Arc<Status>,
    stream: Option<Stream>,
    /// The last recorded position.
    last: Option<Noted>,
}

impl Acknowledged {
    /// A task that has recorded nothing yet.
    #[must_use]
    pub fn new(redis: Redis, store: Store, status: Arc<Status>) -> Self {
        Self { redis, store, status, stream: None, last: None }
    }
}

impl Task for Acknowledged {
    const NAME: &'static str = "acknowledged";

    async fn round(&mut self) -> Result<Duration> {
        let mut stream = self.redis.reuse(&mut self.stream).await?;
        let state = stream.noted().await?;
        compare(&mut stream, &self.store, state, &mut self.last, &self.status).await?;
        self.stream = Some(stream);
        Ok(ROUND)
    }
}

/// Records new progress. `last`: the last recorded position.
async fn compare(
    stream: &mut Stream,
    store: &Store,
    state: noted::State,
    last: &mut Option<Noted>,
    status: &Status,
) -> Result<()> {
    let session = store.session().await?;
    let known = match acknowledged::known(&session, &stream.keys().stream, &stream.keys().group).await {
        Ok(known) => known,
        Err(error) => {
            session.discard();
            return Err(error.into());
        }
    };
    let known_ms = known.noted.as_ref().map_or(0, |noted| noted.ms);
    let another = !state.server.is_empty() && !known.server.is_empty() && state.server != known.server;
    if known_ms < state.noted_ms || (another && state.noted_ms > 0) {
        *last = None;
        return go_back(stream, &state, &known, status).await;
    }
    let over = state.refill.filter(|refill| state.acked.is_some_and(|acked| acked >= refill.until));
    if let Some(refill) = over {
        stream.refilled().await?;
        warn!(
            from = refill.from,
            until = refill.until,
            seconds = state.now_ms.saturating_sub(refill.since_ms) / 1000,
            "all events that PostgreSQL had lost have been re-read"
        );
    }
    *lock(&status.refill) = state.refill.filter(|_| over.is_none());
    metrics::refilling(lock(&status.refill).is_some());
    let new = Noted { ms: state.now_ms, relay: state.relay, epoch: state.epoch, position: state.acked };
    let same = |last: &Noted| Noted { ms: new.ms, ..last.clone() } == new;
    if last.as_ref().is_some_and(same) && known_ms > 0 {
        return Ok(());
    }
    acknowledged::note(&session, &stream.keys().stream, &stream.keys().group, &new).await?;
    stream.remember_noted(new.ms, &known.server).await?;
    *last = Some(new);
    Ok(())
}

/// PostgreSQL knows less than it had recorded: sends the reader back to PostgreSQL's position.
async fn go_back(stream: &mut Stream, state: &noted::State, known: &Known, status: &Status) -> Result<()> {
    let noted = known.noted.clone().unwrap_or_default();
    // A position is valid only at the relay, and in the numbering, that it comes from.
    let position = noted.position.filter(|_| noted.relay == state.relay && noted.epoch == state.epoch);
    let gap = position.is_none().then(|| {
        Gap::new(
            "the database lacks acknowledged events, and does not know since which position; everything that the relay \
             still has is being re-read",
            None,
        )
    });
    let from = position.unwrap_or(0);
    if stream.refill(state, from, noted.ms, &known.server, gap.as_ref()).await? {
        let until = state.acked.unwrap_or(from);
        *lock(&status.refill) = Some(Refill { from, until, since_ms: state.now_ms });
        metrics::refilling(true);
        metrics::count(metrics::DATABASE_WENT_BACK, 1);
        if gap.is_some() {
            metrics::count(metrics::RELAY_GAPS, 1);
        }
        error!(
            from,
            acknowledged = state.acked,
            "PostgreSQL has gone back in time, or is another database: it lacks acknowledged events; the reader \
             re-reads them"
        );
    }
    Ok(())
}
