//! After a gap, compares what the relay lists with what is known here: revisions with the heads, and the status of each account
//! with its row. An account that lacks something need not write anything for a long time, and its next commit would be the
//! first to show it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::json;
use tokio::sync::OnceCell;
use tracing::info;

use super::Task;
use crate::config::{Backfill, Config, WantedDids};
use crate::control::Control;
use crate::directory::Directory;
use crate::directory::listing::Account;
use crate::event::tid_bits;
use crate::store::Store;
use crate::store::backfills::Position;
use crate::stream::{Redis, Stream};
use crate::verify::known::{Generation, Known};

/// How often to look whether there has been a gap.
const ROUND: Duration = Duration::from_secs(2);

/// One per process with pipelines: several do no harm.
pub struct Gaps {
    config: Arc<Config>,
    redis: Redis,
    store: Store,
    control: Arc<Control>,
    directory: OnceCell<Directory>,
    stream: Option<Stream>,
    /// The last gap after which everything has been compared.
    compared: u64,
}

impl Gaps {
    /// The task.
    #[must_use]
    pub fn new(config: Arc<Config>, redis: Redis, store: Store, control: Arc<Control>) -> Self {
        Self { config, redis, store, control, directory: OnceCell::new(), stream: None, compared: 0 }
    }
}

impl Gaps {
    /// Those that the reader keeps.
    async fn wanted(&self, stream: &mut Stream, accounts: Vec<Account>) -> Result<Vec<Account>> {
        let Some(wanted) = &self.config.wanted_dids else { return Ok(accounts) };
        let keep: HashSet<String> = match wanted {
            WantedDids::List(list) => list.clone(),
            WantedDids::Tracked => {
                let dids: Vec<&str> = accounts.iter().map(|account| account.did.as_str()).collect();
                let Some(tracked) = stream.wanted(&dids).await? else {
                    bail!("the list of tracked accounts is not complete yet");
                };
                tracked.into_iter().map(str::to_owned).collect()
            }
        };
        Ok(accounts.into_iter().filter(|account| keep.contains(&account.did)).collect())
    }
}

impl Task for Gaps {
    const NAME: &'static str = "gaps";

    async fn round(&mut self) -> Result<Duration> {
        self.control.pipelines_go().await;
        let mut stream = self.redis.reuse(&mut self.stream).await?;
        let (now, newest) = stream.generation().await?;
        // Without a head, nothing was ever verified.
        if now.current == self.compared || stream.verification_backlog().await?.accounts == 0 {
            self.stream = Some(stream);
            return Ok(ROUND);
        }
        let what = format!("gap {}", now.current);
        let Position { cursor, done } = self.store.session().await?.backfill(&what).await?;
        if done.is_some() {
            self.compared = now.current;
            self.stream = Some(stream);
            return Ok(ROUND);
        }
        // What the reader reads from now on is newer than the list.
        let (_, seq) = stream.place().await?;
        // No connection is held while the relay answers.
        let directory = self.directory.get_or_try_init(async || Directory::new(&self.config)).await?;
        let page = directory.listed(&self.config.relay_url.http(), &Backfill::All, cursor.as_deref()).await?;
        let accounts = self.wanted(&mut stream, page.accounts).await?;
        let dids: Vec<&str> = accounts.iter().map(|account| account.did.as_str()).collect();
        let known = stream.known(&dids).await?;
        let lacks = |account: &&Account| {
            known.get(account.did.as_str()).is_some_and(|known| may_lack(account, known, now, &newest))
        };
        let lacking: Vec<&str> = accounts.iter().filter(lacks).map(|account| account.did.as_str()).collect();
        let session = self.store.session().await?;
        let changed = changed(&accounts, &session.statuses(&dids).await?);
        if !changed.is_empty() && !stream.append_statuses(&changed, &seq, self.config.max_stream_len).await? {
            bail!("the stream has no room for what the relay says of accounts");
        }
        self.stream = Some(stream);
        session.queue_after_gap(&what, &lacking, cursor.as_deref(), page.cursor.as_deref()).await?;
        if page.cursor.is_some() {
            return Ok(Duration::ZERO);
        }
        info!(
            gap = now.current,
            "the relay's list of accounts has been compared with what is known since the gap"
        );
        Ok(ROUND)
    }
}

/// Entries for the accounts of which the list says something else than their rows.
fn changed(listed: &[Account], here: &HashMap<String, (bool, Option<String>)>) -> Vec<String> {
    let is_another = |account: &&Account| {
        // A list may say less about an active account: what it is troubled by passes.
        here.get(&account.did).is_some_and(|(active, status)| {
            *active != account.active || (!account.active && *status != account.status)
        })
    };
    let entry = |Account { did, active, status, .. }: &Account| {
        let time = jiff::Timestamp::now().to_string();
        json!({ "did": did, "active": active, "status": status, "time": time }).to_string()
    };
    listed.iter().filter(is_another).map(entry).collect()
}

/// Whether an account may lack something. What the relay will still send, because it is newer than everything so far, is not
/// missing. Of an account without a head, nothing was ever here.
fn may_lack(account: &Account, known: &Known, now: Generation, newest: &str) -> bool {
    let Some(head) = &known.head else { return false };
    let is_ahead = tid_bits(&account.rev).is_some_and(|rev| rev > head.rev) && account.rev.as_str() <= newest;
    is_ahead || now.may_lack(known.generation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::known::Head;

    #[test]
    fn what_the_relay_has_and_the_stream_had_passed_is_missing() {
        let [old, head, missed, newest, live] =
            ["3jzfcijpj2z22", "3jzfcijpj2z2a", "3jzfcijpj2z2b", "3jzfcijpj2z2c", "3jzfcijpj2z2d"];
        let now = Generation { current: 2, lossy: 1 };
        let known = Known {
            head: Some(Head { rev: tid_bits(head).unwrap(), data: [0; 16] }),
            generation: 1,
            key: None,
        };
        let lacks = |rev: &str, known: &Known| {
            let did = "did:plc:x".to_owned();
            may_lack(&Account { did, rev: rev.to_owned(), active: true, status: None }, known, now, newest)
        };
        assert_eq!(
            [old, head, missed, newest, live].map(|rev| lacks(rev, &known)),
            [false, false, true, true, false]
        );
        assert!(
            lacks(head, &Known { generation: 0, ..known }),
            "it may have been lost after it was appended"
        );
        assert!(!lacks("", &known) && !lacks(missed, &Known::default()));
    }
}
