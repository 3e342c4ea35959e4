//! Applies a difference here, without the stream: a backfill is not news, and the stream is for what is.

use std::time::Duration;

use super::{RepairError, Repairer};
use crate::apply::{Context, interpret};
use crate::config::TransactionMode;
use crate::event::{Entry, EntryId, Event};
use crate::store::{Fate, Session};

/// Entries of up to 200 operations that are applied at a time.
const PART: usize = 8;
/// The pause before what lost to another transaction is applied again.
const AGAIN: Duration = Duration::from_millis(50);

impl Repairer {
    /// Applies entries with the place of one that would have been appended then. What cannot be applied is left: the next
    /// comparison finds it again.
    pub(super) async fn apply_here(
        &self,
        session: &Session,
        entries: Vec<String>,
        (id, seq): &(EntryId, String),
    ) -> Result<(), RepairError> {
        let epochs = self.redis.connect().await?.epochs().await?;
        let entries: Vec<Entry> = entries
            .into_iter()
            .map(|data| Entry { id: *id, event_type: "commit".to_owned(), data, seq: seq.clone() })
            .collect();
        for part in entries.chunks(PART) {
            let mut events: Vec<Event<'_>> =
                part.iter().filter_map(|entry| interpret(entry, Context::now(&epochs)).ok()).collect();
            let mut open: Vec<usize> = (0..events.len()).collect();
            while !open.is_empty() {
                let chosen: Vec<&Event<'_>> = open.iter().map(|&index| &events[index]).collect();
                let fates = session.apply(&chosen, TransactionMode::Event).await?;
                let mut again = Vec::new();
                for (index, fate) in open.into_iter().zip(fates) {
                    match fate {
                        Fate::Applied(_) => {}
                        Fate::Rejected(bad) => {
                            let mut places = 0..;
                            let is_good = |place| !bad.iter().any(|(index, _)| Some(*index) == place);
                            if events[index].keep(|_| is_good(places.next())) {
                                again.push(index);
                            }
                        }
                        Fate::Lost(_) => again.push(index),
                    }
                }
                if !again.is_empty() {
                    tokio::time::sleep(AGAIN).await;
                }
                open = again;
            }
            session.flush(&events.iter().collect::<Vec<_>>()).await?;
        }
        Ok(())
    }
}
