//! Taking turns to read new entries, and dealing them to lanes.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::lanes::LANE_BATCH;
use super::shared::Turn;
use super::{BATCH_BYTES, Pipeline};
use crate::event::Entry;
use crate::mutex::lock;
use crate::stream::entry::Batch;
use crate::stream::{Stream, StreamResult};

/// What a pipeline works on next.
pub(super) enum Next<'s> {
    /// What others have dealt to its lane.
    Waiting(Vec<Entry>),
    /// Whatever it reads: it is its turn.
    Read(Turn<'s>),
}

impl Pipeline {
    /// What to work on next, when it is our turn. `None` when it is time to claim, to stop, or to pause: a read is never
    /// cancelled, because its reply would be lost.
    pub(super) async fn turn(&self, next_claim: Instant, stop: &CancellationToken) -> Option<Next<'_>> {
        let turn = async {
            let Some(lanes) = &self.shared.lanes else { return Next::Read(self.shared.turn().await) };
            if self.index >= lanes.count() {
                return Next::Read(self.shared.quiet_turn().await);
            }
            lanes.open(self.index);
            if let Some(turn) = self.shared.turn_now() {
                return Next::Read(turn);
            }
            let waiting = lanes.take(self.index, LANE_BATCH);
            if waiting.is_empty() { Next::Read(self.shared.turn().await) } else { Next::Waiting(waiting) }
        };
        tokio::select! {
            next = turn => Some(next),
            () = tokio::time::sleep_until(next_claim.into()) => None,
            () = self.interrupted(stop) => None,
        }
    }

    /// New entries.
    pub(super) async fn read(
        &self,
        mut turn: Turn<'_>,
        stream: &mut Stream,
        count: usize,
    ) -> StreamResult<Batch> {
        turn.linger().await;
        let Some(lanes) = &self.shared.lanes else {
            let batch = stream.read_new(&self.consumer, count, true).await?;
            turn.note(batch.entries.len(), count);
            return Ok(batch);
        };
        let mut batch = Batch::default();
        loop {
            let room = LANE_BATCH.saturating_sub(batch.entries.len());
            batch.entries.extend(lanes.take(self.index, room));
            let bytes: usize = batch.entries.iter().map(Entry::size).sum();
            if batch.entries.len() >= LANE_BATCH || bytes >= BATCH_BYTES || lanes.is_full() {
                break;
            }
            let read = match stream.read_new(&self.consumer, count, batch.entries.is_empty()).await {
                Ok(read) => read,
                Err(error) => {
                    lanes.put_back(self.index, batch.entries);
                    return Err(error);
                }
            };
            lock(&self.shared.in_hand).extend(read.entries.iter().map(|entry| entry.id));
            let is_last = read.entries.len() < count;
            turn.note(read.entries.len(), count);
            batch.gone.extend(read.gone);
            // Handing over a few entries to another lane only delays them.
            let few = is_last && batch.entries.is_empty();
            batch.entries.extend(if few { read.entries } else { lanes.deal(self.index, read.entries) });
            if is_last {
                break;
            }
        }
        if batch.entries.is_empty() && batch.gone.is_empty() && self.index < lanes.count() {
            batch.entries = lanes.help(LANE_BATCH);
        }
        Ok(batch)
    }
}
