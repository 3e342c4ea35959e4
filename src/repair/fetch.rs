//! Fetching a repository. A slow server does not hold up the others.

use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Outcome, Repairer};
use crate::directory::LookupError;
use crate::directory::repository::FetchError;
use crate::store::repos::{Finished, Postponed, Queued};
use crate::verify::Key;
use crate::verify::document::Document;

/// A transfer that takes longer than this counts as slow.
const QUICK: Duration = Duration::from_secs(1);
/// While the slots for slow ones are taken, it keeps its slot for so much longer.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long to wait before it is tried again.
const SLOW: Duration = Duration::from_secs(5);
/// The same when the directory cannot be asked.
const DIRECTORY: Duration = Duration::from_secs(10);

/// How many repositories are fetched and compared at a time.
pub(super) struct Slots {
    /// `REPAIR_CONCURRENCY`.
    quick: Semaphore,
    /// As many again whose servers turned out to be slow.
    slow: Semaphore,
}

impl Slots {
    /// So many of both.
    pub(super) fn new(count: usize) -> Self {
        Self { quick: Semaphore::new(count), slow: Semaphore::new(count) }
    }
}

/// A repository, not read yet.
pub(super) struct Fetched {
    pub(super) key: Key,
    pub(super) car: Bytes,
    pub(super) host: String,
}

impl Repairer {
    /// Fetches a repository when there is a slot for it, and keeps the slot for what is done with it.
    pub(super) async fn fetch_in_turn(
        &self,
        queued: &Queued,
    ) -> (Result<Fetched, Outcome>, Option<SemaphorePermit<'_>>) {
        let quick = self.slots.quick.acquire().await.ok();
        let server = OnceLock::new();
        let mut fetch = std::pin::pin!(self.fetch(&queued.did, !queued.is_backfill, &server));
        if let Ok(fetched) = tokio::time::timeout(QUICK, &mut fetch).await {
            return (fetched, quick);
        }
        let slow = tokio::select! {
            fetched = &mut fetch => return (fetched, quick),
            slow = tokio::time::timeout(PATIENCE, self.slots.slow.acquire()) => slow,
        };
        let Ok(_slow) = slow else {
            let host: Option<String> = server.get().cloned();
            if let Some(host) = &host {
                self.directory.hung(host);
            }
            let message = "its server is slow, and the slots for slow ones are taken".to_owned();
            let busy = Postponed { pause: SLOW, host, message, ..Postponed::default() };
            return (Err(Outcome::Postponed(busy)), quick);
        };
        drop(quick);
        let fetched = fetch.await;
        (fetched, self.slots.quick.acquire().await.ok())
    }

    /// `known`: the server, as soon as it is known.
    pub(super) async fn fetch(
        &self,
        did: &str,
        limited: bool,
        known: &OnceLock<String>,
    ) -> Result<Fetched, Outcome> {
        let gone = |host, message| {
            let message = Some(message);
            Outcome::Finished(Finished { state: "gone", host, message, ..Finished::default() })
        };
        // The key as it is now, not as it was remembered.
        let Document { key, server, .. } = match self.directory.document(did).await {
            Ok(document) => document,
            Err(LookupError::None(message)) => return Err(gone(None, message)),
            // That is no fault of the account's, or it would be given up for it.
            Err(LookupError::Away(message)) if did.starts_with("did:plc:") => {
                return Err(Outcome::Postponed(Postponed {
                    pause: DIRECTORY,
                    message,
                    others_too: true,
                    ..Postponed::default()
                }));
            }
            Err(LookupError::Away(message)) => return Err(Outcome::failed(None, message)),
        };
        let (Some(key), Some(server)) = (key, server) else {
            return Err(gone(None, "its document names no key or no server".to_owned()));
        };
        let host = known.get_or_init(|| server.clone()).clone();
        let refused = match self.directory.repository(did, &server, limited).await {
            Ok(car) => return Ok(Fetched { key, car, host }),
            Err(refused) => refused,
        };
        let host = Some(host);
        Err(match refused {
            // Unless the account has moved in the meantime: its old server says the same.
            FetchError::Gone(message) => match self.directory.document(did).await {
                Ok(document) if document.server.as_ref() != Some(&server) => {
                    Outcome::failed(host, format!("{message}: the account has moved"))
                }
                _ => gone(host, message),
            },
            FetchError::Refused(message) => Outcome::failed(host, message),
            FetchError::Busy { reason: message, wait: pause } => {
                Outcome::Postponed(Postponed { pause, host, message, ..Postponed::default() })
            }
            FetchError::Away { reason: message, retry_after } => {
                let pause = retry_after.unwrap_or_default();
                Outcome::Postponed(Postponed { pause, host, message, tried: true, ..Postponed::default() })
            }
        })
    }
}
