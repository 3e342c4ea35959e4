//! `standpipe dead-letters`: looking at what could not be applied, applying it again after a correction, throwing it away.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use redis::aio::MultiplexedConnection;

use crate::apply::interpret;
use crate::event::{EntryId, Reject};
use crate::store::{Outcome, Store};
use crate::stream::Keys;
use crate::stream::dead_letters::{self, Letter};

/// Which letters are meant; everything that is given must fit.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// These ids; empty for any.
    pub ids: Vec<String>,
    /// This class.
    pub reason: Option<String>,
    /// This type (commit, identity, account) or this collection.
    pub kind: Option<String>,
    /// Not tried before this long ago.
    pub since: Option<Duration>,
}

impl Filter {
    /// Whether the letter is meant.
    #[must_use]
    pub fn fits(&self, letter: &Letter) -> bool {
        let young = |since: Duration| {
            let then =
                jiff::Timestamp::now().checked_sub(jiff::SignedDuration::try_from(since).unwrap_or_default());
            match (letter.last_time.parse::<jiff::Timestamp>(), then) {
                (Ok(last), Ok(then)) => last >= then,
                _ => true,
            }
        };
        (self.ids.is_empty() || self.ids.contains(&letter.id))
            && self.reason.as_ref().is_none_or(|reason| *reason == letter.reason)
            && self
                .kind
                .as_ref()
                .is_none_or(|kind| *kind == letter.event_type || *kind == letter.collection())
            && self.since.is_none_or(young)
    }
}

/// A walk over the letters, the oldest first, page by page. Letters that come meanwhile are not met: a letter whose
/// retry failed comes back at the end.
#[derive(Debug)]
pub struct Walk {
    filter: Filter,
    after: Option<String>,
    /// The newest letter when the walk began.
    end: Option<EntryId>,
}

impl Walk {
    /// Begins.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn new(connection: &mut MultiplexedConnection, keys: &Keys, filter: Filter) -> Result<Self> {
        Ok(Self { filter, after: None, end: dead_letters::newest(connection, keys).await? })
    }

    /// The letters of the next page that fit, perhaps none; `None` at the end.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn next(
        &mut self,
        connection: &mut MultiplexedConnection,
        keys: &Keys,
    ) -> Result<Option<Vec<Letter>>> {
        let Some(end) = self.end else { return Ok(None) };
        let mut page = dead_letters::page(connection, keys, self.after.as_deref(), 200).await?;
        page.retain(|letter| letter.id.parse::<EntryId>().is_ok_and(|id| id <= end));
        let Some(last) = page.last() else { return Ok(None) };
        self.after = Some(last.id.clone());
        page.retain(|letter| self.filter.fits(letter));
        Ok(Some(page))
    }
}

/// What became of one letter that was tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retried {
    /// Its operation is in the database, and it is gone.
    Applied,
    /// It still cannot be applied; the letter says when and why.
    StillBad(Reject),
}

/// Applies a letter's operation in place, durably, and removes the letter; or notes why that failed.
///
/// # Errors
///
/// Redis or PostgreSQL cannot be reached, or PostgreSQL refuses for a reason that is none of the letter's.
pub async fn retry(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    store: &Store,
    letter: Letter,
) -> Result<Retried> {
    let entry = letter
        .entry()
        .with_context(|| format!("dead letter {}: source_id {}", letter.id, letter.source_id))?;
    let bad = match interpret(&entry) {
        Err(reject) => Some(reject),
        Ok(event) if !event.rejected.is_empty() => {
            event.rejected.first().map(|rejected| rejected.reject.clone())
        }
        Ok(event) => {
            let session = store.session().await?;
            match session.apply(&[&event]).await.pop() {
                Some(Ok(Outcome::Applied(_))) => {
                    session.flush(&[&event]).await?;
                    None
                }
                Some(Ok(Outcome::Rejected(bad))) => bad.into_iter().next().map(|(_, reject)| reject),
                Some(Err(error)) => {
                    session.discard();
                    return Err(error.into());
                }
                None => bail!("the database gave no answer"),
            }
        }
    };
    match bad {
        None => {
            dead_letters::remove(connection, keys, &letter).await?;
            Ok(Retried::Applied)
        }
        Some(reject) => {
            dead_letters::tried_again(connection, keys, letter, &reject).await?;
            Ok(Retried::StillBad(reject))
        }
    }
}
