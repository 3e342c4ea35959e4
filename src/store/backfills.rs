//! `standpipe.backfills`: how far each backfill has listed its accounts.

use std::collections::HashMap;
use std::time::Duration;

use super::{Session, StoreError};

/// Where a backfill is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Position {
    /// Where to continue; `None` at the beginning.
    pub cursor: Option<String>,
    /// How long ago the end of the list was reached, if it was.
    pub done: Option<Duration>,
}

/// A backfill as people see it.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The value of `BACKFILL`.
    pub what: String,
    /// Repositories that it has queued.
    pub listed: u64,
    /// Whether the list is complete.
    pub is_listed: bool,
    /// Repositories of all backfills that are still to be compared.
    pub left: u64,
    /// How long ago it began, in seconds.
    seconds: f64,
}

impl Progress {
    /// Repositories compared in a minute, on average since it began.
    #[must_use]
    pub fn per_minute(&self) -> f64 {
        self.listed.saturating_sub(self.left) as f64 * 60.0 / self.seconds.max(1.0)
    }
}

impl Session {
    /// Where this backfill is; begins it if need be.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn backfill(&self, what: &str) -> Result<Position, StoreError> {
        let begin = include_str!("../../sql/repair/backfill_begin.sql");
        let row = self.in_time(self.client.query_one(begin, &[&what])).await?;
        let seconds: Option<f64> = row.get(2);
        let done = seconds.map(|seconds| Duration::from_secs_f64(seconds.max(0.0)));
        Ok(Position { cursor: row.get(0), done })
    }

    /// Some of the accounts in the tables, after this one.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn accounts_after(&self, did: &str) -> Result<Vec<String>, StoreError> {
        let seen = include_str!("../../sql/repair/backfill_seen.sql");
        let rows = self.in_time(self.client.query(seen, &[&did])).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Queues accounts, and continues the backfill at `next` (`None`: it is complete).
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn queue_backfill(
        &self,
        what: &str,
        dids: &[String],
        from: Option<&str>,
        next: Option<&str>,
    ) -> Result<(), StoreError> {
        let queue = include_str!("../../sql/repair/backfill_queue.sql");
        self.in_time(self.client.execute(queue, &[&dids, &what, &from, &next])).await?;
        Ok(())
    }

    /// Whether accounts are active, and their status; of those that are here.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn statuses(
        &self,
        dids: &[&str],
    ) -> Result<HashMap<String, (bool, Option<String>)>, StoreError> {
        let look = include_str!("../../sql/repair/gap_statuses.sql");
        let rows = self.in_time(self.client.query(look, &[&dids])).await?;
        Ok(rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect())
    }

    /// Queues accounts that may lack something since a gap, and continues the list at `next` (`None`: it is complete).
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn queue_after_gap(
        &self,
        what: &str,
        dids: &[&str],
        from: Option<&str>,
        next: Option<&str>,
    ) -> Result<(), StoreError> {
        let queue = include_str!("../../sql/repair/gap_queue.sql");
        self.in_time(self.client.execute(queue, &[&dids, &what, &from, &next])).await?;
        Ok(())
    }

    /// How many repositories are still to be compared, at most `limit`.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn backfill_left(&self, limit: i64) -> Result<i64, StoreError> {
        let left = include_str!("../../sql/repair/backfill_left.sql");
        Ok(self.in_time(self.client.query_one(left, &[&limit])).await?.get(0))
    }

    /// All backfills.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn backfills(&self) -> Result<Vec<Progress>, StoreError> {
        let list = include_str!("../../sql/repair/backfill_list.sql");
        let rows = self.in_time(self.client.query(list, &[])).await?;
        let number = |row: &tokio_postgres::Row, at: usize| row.get::<_, i64>(at).unsigned_abs();
        let progress = |row: &tokio_postgres::Row| Progress {
            what: row.get(0),
            listed: number(row, 1),
            is_listed: row.get(2),
            seconds: row.get(3),
            left: number(row, 4),
        };
        Ok(rows.iter().map(progress).collect())
    }
}
