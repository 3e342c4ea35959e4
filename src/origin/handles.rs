//! Looks handles up, which current relays do not send: the account's document claims one, and the handle's own answer
//! confirms it (<https://atproto.com/specs/handle>). What is confirmed goes into the stream like an `#identity` of the relay.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use serde_json::json;

use crate::directory::{Directory, LookupError};
use crate::metrics;
use crate::stream::{Stream, StreamResult, is_oom};

/// Lookups at a time.
const SLOTS: usize = 16;
/// How often an account is looked up whose servers cannot be asked. Its next `#identity` asks anew.
const TRIES: u32 = 5;
/// Accounts for which that is remembered.
const MAX_TRIED: usize = 10_000;
/// How long to wait after everything was looked at.
const REST: Duration = Duration::from_millis(500);
/// How long to wait after a round in which a server could not be asked: doubled each time, up to the second.
const AWAY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_mins(1));

/// Looks handles up, as long as a session lasts.
pub(super) struct Handles {
    stream: Stream,
    directory: Arc<Directory>,
    max_stream_len: u64,
    /// How often each account's servers could not be asked.
    tries: HashMap<String, u32>,
}

impl Handles {
    pub(super) fn new(stream: Stream, directory: Arc<Directory>, max_stream_len: u64) -> Self {
        Self { stream, directory, max_stream_len, tries: HashMap::new() }
    }

    pub(super) async fn run(mut self) -> StreamResult<()> {
        let mut pause = AWAY.0;
        loop {
            let away = self.round().await?;
            if away {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AWAY.1);
            } else {
                pause = AWAY.0;
                tokio::time::sleep(REST).await;
            }
        }
    }

    /// Looks at all of them once. Returns whether some could not be looked up.
    async fn round(&mut self) -> StreamResult<bool> {
        let mut cursor = 0;
        let mut away = false;
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
                        away = true;
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
                    Ok(false) => away = true,
                    Err(error) if is_oom(&error) => away = true,
                    Err(error) => return Err(error),
                }
            }
            cursor = next;
            if cursor == 0 {
                return Ok(away);
            }
        }
    }

    /// Whether an account whose servers could not be asked is looked up once more.
    fn may_try_again(&mut self, did: &str) -> bool {
        if self.tries.len() >= MAX_TRIED && !self.tries.contains_key(did) {
            return false;
        }
        let tries = self.tries.entry(did.to_owned()).or_default();
        *tries += 1;
        *tries < TRIES
    }
}
