//! Takes over the pending entries of dead consumers.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{Ended, Pipeline};
use crate::crash::{self, Point};
use crate::event::Entry;
use crate::metrics;
use crate::mutex::lock;
use crate::stream::entry::Batch;
use crate::stream::{Stream, is_nogroup};

/// Bytes claimed at a time: more than a batch, because one search for another program's later work covers all of them.
const CLAIM_BYTES: usize = 16 * 1024 * 1024;

impl Pipeline {
    /// Takes over entries of dead consumers. Not while PostgreSQL is down: every holder is waiting for it, too, and
    /// taking entries from each other would not help.
    pub(super) async fn claim(&self, stream: &mut Stream, stop: &CancellationToken) -> Result<(), Ended> {
        let mut start = Some("0-0".to_owned());
        while start.is_some() && !stop.is_cancelled() && !self.is_paused() {
            // As many as fit into memory: one search for another program's later work covers all of them, while a
            // search per page would read the whole stream each time.
            let mut batch = Batch::default();
            let mut bytes = 0;
            while bytes < CLAIM_BYTES
                && let Some(from) = start.take()
            {
                if self.store.ping(Duration::from_secs(2)).await.is_err() {
                    break;
                }
                let page = stream.claim(&self.consumer, self.claim_idle, &from, self.batch_size);
                let page = match page.await {
                    Ok(page) => page,
                    // The next read runs into the same error and creates the group.
                    Err(error) if is_nogroup(&error) => break,
                    Err(error) => return Err(error.into()),
                };
                start = page.next;
                bytes += page.batch.entries.iter().map(Entry::size).sum::<usize>();
                batch.entries.extend(page.batch.entries);
                batch.gone.extend(page.batch.gone);
            }
            if !batch.entries.is_empty() {
                crash::at(Point::WhileClaiming);
            }
            {
                // Entries held by another pipeline of this process are being worked on, whichever consumer owns them by now.
                let in_hand = lock(&self.shared.in_hand);
                batch.entries.retain(|entry| !in_hand.contains(&entry.id));
            }
            if !batch.entries.is_empty() {
                metrics::count(metrics::CLAIMED, batch.entries.len() as u64);
                info!(
                    consumer = self.consumer,
                    entries = batch.entries.len(),
                    "took over entries of a consumer that is gone"
                );
            }
            self.work_again(stream, batch, stop).await?;
        }
        Ok(())
    }
}
