//! Leaves out what belongs to accounts that are not wanted (`WANTED_DIDS`), before anything else is done with it.

use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Arrival;
use super::append::Item;
use super::reader::End;
use crate::config::WantedDids;
use crate::metrics;
use crate::stop::or_stop;
use crate::stream::Stream;

/// Items that are looked up together.
pub(super) const CHUNK: usize = 64;
/// How long a worker has to list the accounts before the reader reports that none does.
const PATIENCE: Duration = Duration::from_secs(5);

/// The filter of a session.
pub(super) struct Filter {
    wanted: WantedDids,
    stream: Stream,
}

impl Filter {
    /// A filter, as soon as it is known which accounts are wanted.
    pub(super) async fn new(
        wanted: WantedDids,
        mut stream: Stream,
        stop: &CancellationToken,
    ) -> Result<Self, End> {
        let began = Instant::now();
        while wanted == WantedDids::Tracked && stream.tracked().await?.is_none() {
            if began.elapsed() > PATIENCE || stop.is_cancelled() {
                return Err(End::Untracked);
            }
            let _ = or_stop(stop, tokio::time::sleep(Duration::from_millis(100))).await;
        }
        Ok(Self { wanted, stream })
    }

    /// Queue -> queue, until the first is closed and empty.
    pub(super) async fn run(
        mut self,
        mut from: mpsc::Receiver<Item>,
        to: mpsc::Sender<Item>,
    ) -> Result<(), End> {
        let mut chunk = Vec::new();
        while from.recv_many(&mut chunk, CHUNK).await > 0 {
            let unwanted = self.unwanted(&chunk).await?;
            for mut item in chunk.drain(..) {
                if unwanted.contains(&item.arrival.did) {
                    metrics::count(metrics::RELAY_UNWANTED, 1);
                    leave_out(&mut item.arrival);
                }
                if to.send(item).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The accounts that are not wanted.
    async fn unwanted(&mut self, chunk: &[Item]) -> Result<HashSet<String>, End> {
        let owned = chunk.iter().filter(|item| !item.arrival.did.is_empty());
        let not_in = |wanted: &dyn Fn(&str) -> bool| {
            owned
                .clone()
                .filter(|item| !wanted(&item.arrival.did))
                .map(|item| item.arrival.did.clone())
                .collect()
        };
        match &self.wanted {
            WantedDids::List(list) => Ok(not_in(&|did| list.contains(did))),
            WantedDids::Tracked => {
                let dids: Vec<&str> = owned.clone().map(|item| item.arrival.did.as_str()).collect();
                let wanted = self.stream.wanted(&dids).await?.ok_or(End::Untracked)?;
                Ok(not_in(&|did| wanted.contains(did)))
            }
        }
    }
}

/// Keeps what does not belong to the account.
fn leave_out(arrival: &mut Arrival) {
    arrival.entries.clear();
    arrival.letters.clear();
    arrival.missed.retain(|class, _| *class == "frame");
    arrival.frame = None;
}
