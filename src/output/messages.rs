//! Settled entries as messages, without what accounts forbid to collect.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::Mutex;
use tracing::warn;

use super::events::Numbers;
use super::jetstream::{self, Forbidden, Message};
use crate::event::EntryId;
use crate::metrics;
use crate::store::Store;
use crate::stream::settled::Settled;

/// About how many bytes to read at a time, and the most entries.
const PAGE_BYTES: usize = 512 << 10;
const PAGE: usize = 200;
/// How often the accounts that forbid collection are read; less often if that takes long.
const FORBIDDEN: Duration = Duration::from_secs(5);

/// A settled entry as messages.
#[derive(Debug)]
pub struct Item {
    /// The entry.
    pub id: EntryId,
    /// The numbers of its operations in version 2.
    pub numbers: Range<u64>,
    /// Its messages.
    pub messages: Vec<Message>,
}

impl Item {
    /// What it takes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let message = |message: &Message| message.text.len() + message.did.len() + size_of::<Message>();
        self.messages.iter().map(message).sum::<usize>() + size_of::<Self>()
    }
}

/// Makes messages.
pub struct Messages {
    store: Store,
    /// The accounts that forbid to collect what they write; `None` before they are known.
    forbidden: Mutex<Option<(Arc<Forbidden>, Instant)>>,
    /// Whether an unusable entry was logged.
    said: AtomicBool,
}

impl Messages {
    /// Nothing is known yet about who forbids collection.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self { store, forbidden: Mutex::new(None), said: false.into() }
    }

    /// These entries as messages, behind those of the pages before.
    ///
    /// # Errors
    ///
    /// PostgreSQL does not say who forbids collection.
    pub async fn of(&self, page: &[Settled], pages: &mut Pages) -> Result<Vec<Item>> {
        if page.is_empty() {
            return Ok(Vec::new());
        }
        let forbidden = self.forbidden().await?;
        Ok(page.iter().map(|settled| self.item(settled, &forbidden, pages)).collect())
    }

    fn item(&self, settled: &Settled, forbidden: &Forbidden, pages: &mut Pages) -> Item {
        let id = settled.entry.id;
        let (messages, operations) = jetstream::messages(settled, forbidden).unwrap_or_else(|error| {
            // It is a dead letter, too: nobody could apply it.
            metrics::count(metrics::SUBSCRIBERS_UNREADABLE, 1);
            if !self.said.swap(true, Ordering::Relaxed) {
                warn!(%id, %error, "cannot send an entry to subscribers: it is malformed (logged once; see standpipe_subscriber_unreadable_entries_total)");
            }
            (Vec::new(), 0)
        });
        Item { id, numbers: pages.numbers.of(id, operations), messages }
    }

    async fn forbidden(&self) -> Result<Arc<Forbidden>> {
        // Only one asks PostgreSQL.
        let mut known = self.forbidden.lock().await;
        if let Some((accounts, due)) = &*known
            && Instant::now() < *due
        {
            return Ok(Arc::clone(accounts));
        }
        let began = Instant::now();
        let accounts = Arc::new(Forbidden(self.store.forbidding().await?));
        let pause = FORBIDDEN.max(began.elapsed() * 50);
        *known = Some((Arc::clone(&accounts), began + pause));
        Ok(accounts)
    }
}

/// A reading, page by page: how many entries to read at a time, and the numbers of their operations.
#[derive(Debug, Default)]
pub struct Pages {
    numbers: Numbers,
    /// The mean size of the last ones, in bytes.
    mean: usize,
}

impl Pages {
    /// Continues with this number.
    pub fn continue_at(&mut self, number: u64) {
        self.numbers = Numbers::from(number);
    }

    /// The number for the next page.
    #[must_use]
    pub fn count(&self) -> usize {
        (PAGE_BYTES / self.mean.max(PAGE_BYTES / PAGE)).max(1)
    }

    /// Learns from a page.
    pub fn note(&mut self, page: &[Settled]) {
        if !page.is_empty() {
            self.mean = page.iter().map(|settled| settled.entry.size()).sum::<usize>() / page.len();
        }
    }
}
