//! Checks signatures that could not be checked when their commits arrived, because the account's key was not known.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio::time::Instant;

use super::recent::Recent;
use super::rounds::{Reached, Rounds};
use crate::directory::{Directory, LookupError};
use crate::metrics;
use crate::mutex::lock;
use crate::stream::accounts::{Repair, Unchecked};
use crate::stream::{Stream, StreamResult};
use crate::time::now_ms;
use crate::verify::known::KnownKey;

/// Lookups at a time.
const SLOTS: usize = 32;
/// The pauses while the directory cannot be reached: the first and the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// A signature that does not match is checked again after this time: replicas of the directory lag a little behind.
const AGAIN: Duration = Duration::from_secs(10);
/// Accounts that are checked again.
const MAX_AGAIN: usize = 10_000;

/// Looks up the missing keys, and checks the signatures with them.
pub(super) struct Checker {
    stream: Stream,
    directory: Arc<Directory>,
    recent: Arc<Mutex<Recent>>,
    /// Accounts whose signature did not match, and when that was first seen.
    doubtful: HashMap<String, Instant>,
    /// Where to continue.
    cursor: u64,
}

/// What a lookup says about a commit.
enum Found {
    Signed(KnownKey),
    Foreign(Option<KnownKey>),
    Away,
}

impl Checker {
    pub(super) fn new(stream: Stream, directory: Arc<Directory>, recent: Arc<Mutex<Recent>>) -> Self {
        Self { stream, directory, recent, doubtful: HashMap::new(), cursor: 0 }
    }
}

impl Rounds for Checker {
    const PAUSES: (Duration, Duration) = (FIRST_PAUSE, LONGEST_PAUSE);

    /// Goes through all of them once, or through some if the directory cannot be reached.
    async fn round(&mut self) -> StreamResult<Reached> {
        let mut reached = Reached::All;
        loop {
            let (next, mut found) = self.stream.unchecked(self.cursor).await?;
            let now = Instant::now();
            found.retain(|(did, _)| self.doubtful.get(did).is_none_or(|since| now - *since >= AGAIN));
            let directory = &self.directory;
            let mut looks = stream::iter(found)
                .map(|(did, unchecked)| async move {
                    let found = look(directory, &did, &unchecked).await;
                    (did, unchecked, found)
                })
                .buffer_unordered(SLOTS);
            let mut results = Vec::new();
            while let Some(result) = looks.next().await {
                results.push(result);
            }
            drop(looks);
            for (did, unchecked, found) in results {
                match found {
                    Found::Away => reached = Reached::Some,
                    Found::Signed(key) => self.settle(&did, &unchecked, Some(key), None).await?,
                    Found::Foreign(key) => self.foreign(&did, &unchecked, key).await?,
                }
            }
            self.cursor = next;
            // While the directory cannot be reached, one page is enough. The next round resumes there.
            if next == 0 || reached == Reached::Some {
                let backlog = self.stream.verification_backlog().await?;
                metrics::verification_backlog(&backlog);
                return Ok(reached);
            }
        }
    }
}

impl Checker {
    /// A signature that does not match counts as somebody else's only at the second look.
    async fn foreign(&mut self, did: &str, unchecked: &Unchecked, key: Option<KnownKey>) -> StreamResult<()> {
        if !self.doubtful.contains_key(did) && self.doubtful.len() < MAX_AGAIN {
            self.doubtful.insert(did.to_owned(), Instant::now());
            return Ok(());
        }
        let reason = if key.is_some() { "signature" } else { "no_key" };
        // Its revision is not proven either.
        let repair = Repair { reason: reason.to_owned(), rev: String::new(), at: now_ms() };
        metrics::verified("disproved");
        metrics::repair_requested(reason);
        self.settle(did, unchecked, key, Some(repair)).await
    }

    async fn settle(
        &mut self,
        did: &str,
        unchecked: &Unchecked,
        key: Option<KnownKey>,
        repair: Option<Repair>,
    ) -> StreamResult<()> {
        lock(&self.recent).set_key(did, key);
        let proved = repair.is_none();
        let done = self.stream.checked(did, unchecked, key, repair.as_ref()).await?;
        if done && proved {
            metrics::verified("proved_later");
        }
        self.doubtful.remove(did);
        Ok(())
    }
}

async fn look(directory: &Directory, did: &str, unchecked: &Unchecked) -> Found {
    let key = match directory.document(did).await {
        Ok(document) => document.key,
        Err(LookupError::None(_)) => None,
        Err(LookupError::Away(_)) => return Found::Away,
    };
    match key {
        Some(key) if key.verify_hash(&unchecked.hash, &unchecked.signature) => {
            Found::Signed(KnownKey::new(&key, now_ms()))
        }
        key => Found::Foreign(key.map(|key| KnownKey::new(&key, now_ms()))),
    }
}
