//! Lists the accounts of `BACKFILL` into the queue that `repairs` works through.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::OnceCell;
use tracing::info;

use super::Task;
use crate::config::{Backfill, Config};
use crate::control::Control;
use crate::directory::Directory;
use crate::store::Store;
use crate::store::backfills::Position;

/// Repositories that are queued ahead. The list can be far longer.
const AHEAD: i64 = 5000;
/// How often to look whether more are wanted, and whether there is anything to report.
const ROUND: Duration = Duration::from_secs(1);
/// How often the tables are looked through for accounts that are new.
const AGAIN: Duration = Duration::from_hours(1);
/// How often progress is logged.
const REPORT: Duration = Duration::from_secs(10);

/// One per process with pipelines: several do no harm.
pub struct Lister {
    config: Arc<Config>,
    store: Store,
    control: Arc<Control>,
    what: Backfill,
    directory: OnceCell<Directory>,
    reported: Option<(Instant, u64)>,
}

impl Lister {
    /// The task.
    #[must_use]
    pub fn new(config: Arc<Config>, store: Store, control: Arc<Control>, what: Backfill) -> Self {
        Self { config, store, control, what, directory: OnceCell::new(), reported: None }
    }

    /// The next accounts, and where to continue.
    async fn next(&self, cursor: Option<&str>) -> Result<(Vec<String>, Option<String>)> {
        if self.what == Backfill::Seen {
            let dids = self.store.session().await?.accounts_after(cursor.unwrap_or_default()).await?;
            let next = dids.last().cloned();
            return Ok((dids, next));
        }
        let directory = self.directory.get_or_try_init(async || Directory::new(&self.config)).await?;
        let page = directory.listed(&self.config.relay_url.http(), &self.what, cursor).await?;
        let active = page.accounts.into_iter().filter(|account| account.active);
        Ok((active.map(|account| account.did).collect(), page.cursor))
    }

    /// Logs how far it is, while anything is left.
    async fn report(&mut self) -> Result<()> {
        if self.reported.is_some_and(|(at, _)| at.elapsed() < REPORT) {
            return Ok(());
        }
        let what = self.what.to_string();
        let session = self.store.session().await?;
        let Some(now) = session.backfills().await?.into_iter().find(|backfill| backfill.what == what) else {
            return Ok(());
        };
        let was_left = self.reported.is_none_or(|(_, left)| left > 0);
        if now.left > 0 {
            info!(
                what,
                listed = now.listed,
                complete = now.is_listed,
                left = now.left,
                per_minute = format_args!("{:.0}", now.per_minute()),
                "backfill"
            );
        } else if was_left && now.is_listed {
            info!(what, listed = now.listed, "the backfill is complete");
        }
        self.reported = Some((Instant::now(), now.left));
        Ok(())
    }
}

impl Task for Lister {
    const NAME: &'static str = "backfill";

    async fn round(&mut self) -> Result<Duration> {
        self.control.pipelines_go().await;
        self.report().await?;
        let what = self.what.to_string();
        let (Position { cursor, done }, left) = {
            let session = self.store.session().await?;
            (session.backfill(&what).await?, session.backfill_left(AHEAD).await?)
        };
        let is_over = done.is_some_and(|since| self.what != Backfill::Seen || since < AGAIN);
        if is_over || left >= AHEAD {
            return Ok(ROUND);
        }
        // No connection is held while the relay answers.
        let (dids, next) = self.next(cursor.as_deref()).await?;
        let session = self.store.session().await?;
        session.queue_backfill(&what, &dids, cursor.as_deref(), next.as_deref()).await?;
        Ok(if next.is_some() { Duration::ZERO } else { ROUND })
    }
}
