//! Working alongside another program, which writes no revisions and no tombstones: replays whatever it may have undone.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use tokio_util::sync::CancellationToken;
use tracing::info;

use super::work::Work;
use super::{Ended, Pipeline};
use crate::event::{EntryId, Op};
use crate::stream::Stream;
use crate::stream::group::LeaveOut;

/// The scope of a replay of delivered entries.
#[derive(Default)]
struct Replay {
    /// Hashes of URIs of records and accounts; entries about any of them are replayed.
    touched: HashSet<u64>,
    /// Also replays everything that was acknowledged, and then all later entries about the same records.
    acknowledged: bool,
}

impl Replay {
    fn wants(&mut self, op: &Op<'_>, pending: bool) -> bool {
        let uri = hash(&op.uri);
        if self.acknowledged && !pending {
            self.touched.insert(uri);
        }
        self.touched.contains(&uri)
    }
}

impl Pipeline {
    /// Replays entries behind these that are about the same records and accounts and were already delivered: possibly
    /// to another program, which writes no revisions and no tombstones to show that they are newer. Entries delivered
    /// from now on find our rows.
    pub(super) async fn apply_later(
        &self,
        mut stream: Stream,
        done: &[Work<'_>],
        stop: &CancellationToken,
    ) -> Result<(), Ended> {
        let touched = done
            .iter()
            .filter_map(Work::event)
            .flat_map(|event| event.ops.iter().map(|op| hash(&op.uri)))
            .collect();
        let Some(first) = done.iter().map(|work| work.entry.id).min() else { return Ok(()) };
        let replay = Replay { touched, acknowledged: false };
        self.replay_delivered(&mut stream, first, replay, stop).await.map(drop)
    }

    /// Runs before the first entry if another program has worked in the group: replays what was acknowledged between
    /// the first pending entry and the last delivered one. It may be newer than the pending entries, and the other
    /// program left nothing to show that. Pending entries are applied when they are claimed or read again.
    ///
    /// Returns how many entries were looked at.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or it is time to stop.
    pub async fn take_over(&self, stop: &CancellationToken) -> Result<u64, Ended> {
        let mut stream = self.redis.connect().await?;
        let first = stream.first_pending().await?;
        let Some(first) = first else { return Ok(0) };
        info!(%first, "replaying entries that another program applied after ones that are still pending");
        let replay = Replay { acknowledged: true, ..Replay::default() };
        self.replay_delivered(&mut stream, first.before(), replay, stop).await
    }

    /// Applies the entries delivered after `after`, to any consumer, that are part of the replay; acknowledges nothing.
    /// Repeats this with entries delivered during the replay, because the other program may have undone it, until there
    /// are no more; later deliveries find our rows. Entries pending with this process are left out: they are applied
    /// anyway, and their rows record how old they are.
    ///
    /// Returns how many entries were looked at.
    async fn replay_delivered(
        &self,
        stream: &mut Stream,
        mut after: EntryId,
        mut replay: Replay,
        stop: &CancellationToken,
    ) -> Result<u64, Ended> {
        let mut looked_at = 0;
        loop {
            let until = stream.last_delivered().await?;
            let mut found = false;
            while after < until {
                let leave_out =
                    LeaveOut { consumers: &self.consumers, pending_at_first: replay.touched.is_empty() };
                let page = stream.delivered(after, until, self.batch_size, leave_out).await?;
                let Some(last) = page.last else { break };
                after = last;
                looked_at += page.looked_at;
                let (entries, pending): (Vec<_>, Vec<_>) = page.entries.into_iter().unzip();
                let epochs = self.epochs_of(stream, &entries).await?;
                let mut batch = Vec::new();
                for (entry, pending) in entries.iter().zip(pending) {
                    let mut work = Work::new(entry, &epochs);
                    if work.keep(|op| replay.wants(op, pending)) {
                        batch.push(work);
                    }
                }
                found |= !batch.is_empty();
                if !batch.is_empty() {
                    self.apply(batch, stop).await?;
                }
            }
            if !found {
                return Ok(looked_at);
            }
            replay.acknowledged = false;
        }
    }
}

/// A URI's hash. A collision only applies an entry once more than necessary.
fn hash(uri: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    uri.hash(&mut hasher);
    hasher.finish()
}
