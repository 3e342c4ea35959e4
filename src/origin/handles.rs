//! Looks handles up, which current relays do not send: the account's document claims one, and the handle's own answer
//! confirms it (<https://atproto.com/specs/handle>). What is confirmed goes into the stream like an `#identity` of the relay.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use serde_json::json;

use super::rounds::{Reached, Rounds};
use crate::directory::{Directory, LookupError};
use crate::metrics;
use crate::stream::{Stream, StreamResult, is_oom};

/// Lookups at a time.
const SLOTS: usize = 16;
/// How many attempts an account gets whose servers cannot be reached. Its next `#identity` begins anew.
const TRIES: u32 = 5;
/// Accounts whose attempts are counted.
const MAX_TRIED: usize = 10_000;
/// The pauses while a server cannot be reached: the first and the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// Looks handles up, as long as a session lasts.
pub(super) struct Handles {
    stream: Stream,
    directory: Arc<Directory>,
    max_stream_len: u64,
    /// Failed attempts by account.
    tries: HashMap<String, u32>,
}

impl Handles {
    pub(super) fn new(stream: Stream, directory: Arc<Directory>, max_stream_len: u64) -> Self {
        Self { stream, directory, max_stream_len, tries: HashMap::new() }
    }
}

impl Rounds for Handles {
    const PAUSES: (Duration, Duration) = (FIRST_PAUSE, LONGEST_PAUSE);

    /// Goes through all of them once.
    async fn round(&mut self) -> StreamResult<Reached> {
        let mut cursor = 0;
        let mut reached = Reached::All;
        loop {
            let (next, found) = self.stream.handles_wanted(cursor).await?;
            let directory = Arc::clone(&self.directory);
            let directory = &directory;
            let mut looks = stream::iter(found)
                .map(|(did, mark)| async move {
                    let found = directory.handle(&did).await;
                    (did, mark, found)
                })
                .buffer_unordered(SLOTS);
            while let Some((did, mark, found)) = looks.next().await {
                let entry = match found {
                    Ok(Some(handle)) => {
                        metrics::handle("confirmed");
                        Some(json!({ "did": did, "handle": handle }).to_string())
                    }
                    Err(LookupError::Away(_)) if self.may_try_again(&did) => {
                        metrics::handle("away");
                        reached = Reached::Some;
                        continue;
                    }
                    Ok(None) | Err(_) => {
                        metrics::handle("unconfirmed");
                        None
                    }
                };
                self.tries.remove(&did);
                match self.stream.handle_looked_up((&did, &mark), entry, self.max_stream_len).await {
                    Ok(true) => {}
                    // There is no room.
                    Ok(false) => reached = Reached::Some,
                    Err(error) if is_oom(&error) => reached = Reached::Some,
                    Err(error) => return Err(error),
                }
            }
            cursor = next;
            if cursor == 0 {
                return Ok(reached);
            }
        }
    }
}

impl Handles {
    /// Whether an account whose servers cannot be reached gets another attempt.
    fn may_try_again(&mut self, did: &str) -> bool {
        if self.tries.len() >= MAX_TRIED && !self.tries.contains_key(did) {
            return false;
        }
        let tries = self.tries.entry(did.to_owned()).or_default();
        *tries += 1;
        *tries < TRIES
    }
}
