//! `standpipe.repos`: the queue of repositories to repair, and what became of them; and the rows that they are compared
//! with.

use std::time::Duration;

use serde::Serialize;
use tokio_postgres::Client;

use super::{Session, StoreError};

/// For so long is a repository left alone that has been compared, or whose server is behind.
pub const COOLDOWN: Duration = Duration::from_secs(30);
/// The class of what a backfill queues: the last.
const BACKFILL: i16 = 2;

/// A queued repository, taken by this session.
#[derive(Clone, Debug)]
pub struct Queued {
    /// The account.
    pub did: String,
    /// Why it is queued.
    pub reason: String,
    /// The oldest revision that repairs it; empty for any.
    pub wanted_rev: String,
    /// How often it was tried in vain.
    pub attempts: u32,
    /// A tree that would delete much, and was not believed yet.
    pub doubted: Option<String>,
    /// Whether it is queued by a backfill, and nothing more pressing.
    pub is_backfill: bool,
    /// The server that it came from when it was last fetched.
    pub host: Option<String>,
    /// How often it was asked for.
    requests: i64,
}

/// What became of a repair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finished {
    /// `synced`, `gone` or `error`.
    pub state: &'static str,
    /// The revision of the repository; empty if there is none.
    pub rev: String,
    /// The server that it came from.
    pub host: Option<String>,
    /// Its records.
    pub records: u64,
    /// Those that were missing or different.
    pub healed: u64,
    /// Rows whose record it does not have.
    pub deleted: u64,
    /// Records that cannot be decoded.
    pub refused: u64,
    /// In words.
    pub message: Option<String>,
}

/// A repair that has to wait.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Postponed {
    /// For how long.
    pub pause: Duration,
    /// The account's server.
    pub host: Option<String>,
    /// Why.
    pub message: String,
    /// A tree that would delete much, to be believed when it is found again.
    pub doubted: Option<String>,
    /// Whether it counts as an attempt.
    pub tried: bool,
    /// Whether the others are likely to have to wait, too.
    pub others_too: bool,
}

/// A line of the list.
#[derive(Clone, Debug, Serialize)]
pub struct Repo {
    /// The account.
    pub did: String,
    /// queued, synced, gone or error.
    pub state: String,
    /// Why it was queued.
    pub reason: String,
    /// How often it was tried in vain.
    pub attempts: i32,
    /// The account's server.
    pub host: Option<String>,
    /// Its records.
    pub records: Option<i64>,
    /// Those that were missing or different.
    pub healed: Option<i64>,
    /// Rows whose record it did not have.
    pub deleted: Option<i64>,
    /// Records that cannot be decoded.
    pub refused: Option<i64>,
    /// In words.
    pub message: Option<String>,
    /// When it is tried next, in seconds since 1970.
    pub retry_at: i64,
    /// When it changed last, in seconds since 1970.
    pub updated_at: i64,
}

/// What the database knows about an account.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Comparison {
    /// The revision of its repository when it was last compared; `None` if it never was.
    pub compared: Option<String>,
    /// Its state in the queue, if it ever was in it.
    pub queue: Option<String>,
    /// Why it was queued.
    pub reason: Option<String>,
    /// What came of it, in words.
    pub message: Option<String>,
}

/// A row of an account's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnRow {
    /// Its path in the repository.
    pub path: String,
    /// The record's CID, if the table has it.
    pub cid: Option<String>,
    /// What it is about, if the table has no CID.
    pub subject: Option<String>,
    /// Its revision, if it has one.
    pub rev: Option<String>,
}

/// Queues a repository. Class 0 comes before class 1, and that before a backfill's.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn queue(
    client: &Client,
    did: &str,
    class: i16,
    reason: &str,
    rev: &str,
) -> Result<(), StoreError> {
    client.execute(include_str!("../../sql/repair/queue.sql"), &[&did, &class, &reason, &rev]).await?;
    Ok(())
}

impl Session {
    /// The tracked accounts after this one, some thousand of them: all that were ever queued.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn tracked_after(&self, did: &str) -> Result<Vec<String>, StoreError> {
        let after = include_str!("../../sql/repair/tracked_after.sql");
        let rows = self.in_time(self.client.query(after, &[&did])).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// How many accounts are tracked.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn tracked(&self) -> Result<u64, StoreError> {
        let count = include_str!("../../sql/repair/tracked_count.sql");
        let count: i64 = self.in_time(self.client.query_one(count, &[])).await?.get(0);
        Ok(count.unsigned_abs())
    }

    /// How many repositories are queued as repairs, after a gap and by a backfill; and how many are synced, gone, and given up.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn standings(&self) -> Result<[u64; 6], StoreError> {
        let count = include_str!("../../sql/repair/standings.sql");
        let row = self.in_time(self.client.query_one(count, &[])).await?;
        Ok(std::array::from_fn(|at| row.get::<_, i64>(at).unsigned_abs()))
    }

    /// Queues accounts that were not tracked for a while.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn queue_untracked(&self, dids: &[&str]) -> Result<(), StoreError> {
        let again = include_str!("../../sql/repair/tracked_again.sql");
        self.in_time(self.client.execute(again, &[&dids])).await?;
        Ok(())
    }
}

/// Repositories in a state, or in any if it is empty; those that changed last come first.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn list(client: &Client, state: &str, limit: i64) -> Result<Vec<Repo>, StoreError> {
    let rows = client.query(include_str!("../../sql/repair/list.sql"), &[&state, &limit]).await?;
    let repo = |row: tokio_postgres::Row| Repo {
        did: row.get(0),
        state: row.get(1),
        reason: row.get(2),
        attempts: row.get(3),
        host: row.get(4),
        records: row.get(5),
        healed: row.get(6),
        deleted: row.get(7),
        refused: row.get(8),
        message: row.get(9),
        retry_at: row.get(10),
        updated_at: row.get(11),
    };
    Ok(rows.into_iter().map(repo).collect())
}

/// How many repositories are in each state.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn counts(client: &Client) -> Result<Vec<(String, i64)>, StoreError> {
    let rows = client.query(include_str!("../../sql/repair/counts.sql"), &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// What is known about an account.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn comparison(client: &Client, did: &str) -> Result<Comparison, StoreError> {
    let row = client.query_one(include_str!("../../sql/repair/show.sql"), &[&did]).await?;
    Ok(Comparison { compared: row.get(0), queue: row.get(1), reason: row.get(2), message: row.get(3) })
}

impl Session {
    /// Takes a queued repository whose turn it is. This session holds it until [`Session::release_repo`], or its end.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn take_repo(&self) -> Result<Option<Queued>, StoreError> {
        let client = &self.client;
        let rows = self.in_time(client.query(include_str!("../../sql/repair/next.sql"), &[])).await?;
        for row in rows {
            let did: String = row.get(0);
            let take = include_str!("../../sql/repair/take.sql");
            let taken: bool = self.in_time(client.query_one(take, &[&did])).await?.get(0);
            if !taken {
                continue;
            }
            let look = include_str!("../../sql/repair/look.sql");
            if let Some(row) = self.in_time(client.query_opt(look, &[&did])).await? {
                let attempts: i32 = row.get(2);
                return Ok(Some(Queued {
                    did,
                    reason: row.get(0),
                    wanted_rev: row.get(1),
                    attempts: attempts.try_into().unwrap_or(0),
                    doubted: row.get(3),
                    requests: row.get(4),
                    is_backfill: row.get::<_, i16>(5) == BACKFILL,
                    host: row.get(6),
                }));
            }
            self.release_repo(&did).await?;
        }
        Ok(None)
    }

    /// Lets others take a repository.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn release_repo(&self, did: &str) -> Result<(), StoreError> {
        let release = include_str!("../../sql/repair/release.sql");
        self.in_time(self.client.query_one(release, &[&did])).await?;
        Ok(())
    }

    /// From now on, operations of the account that are older than this revision are dead.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn complete_repo(&self, did: &str, rev: &str) -> Result<(), StoreError> {
        let complete = include_str!("../../sql/repair/complete.sql");
        self.in_time(self.client.query_one(complete, &[&did, &rev])).await?;
        Ok(())
    }

    /// The rows of an account's records.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn own_rows(&self, did: &str) -> Result<Vec<OwnRow>, StoreError> {
        let rows =
            self.in_time(self.client.query(include_str!("../../sql/repair/rows.sql"), &[&did])).await?;
        let start = format!("at://{did}/");
        let own = rows.into_iter().filter_map(|row| {
            let uri: String = row.get(0);
            let path = uri.strip_prefix(&start)?.to_owned();
            let path = match row.get(3) {
                // A gate has the key of its post.
                "thread_gate" => path.replace("app.bsky.feed.post/", "app.bsky.feed.threadgate/"),
                "post_gate" => path.replace("app.bsky.feed.post/", "app.bsky.feed.postgate/"),
                _ => path,
            };
            Some(OwnRow { path, cid: row.get(1), subject: row.get(2), rev: row.get(4) })
        });
        Ok(own.collect())
    }

    /// Notes the outcome.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn finish_repo(&self, queued: &Queued, finished: &Finished) -> Result<(), StoreError> {
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let Finished { state, rev, host, message, .. } = finished;
        let numbers = [finished.records, finished.healed, finished.deleted, finished.refused].map(whole);
        let [records, healed, deleted, refused] = &numbers;
        let finish = include_str!("../../sql/repair/finish.sql");
        let Queued { did, requests, .. } = queued;
        let cooldown = COOLDOWN.as_secs_f64();
        let values: [&(dyn postgres_types::ToSql + Sync); 11] =
            [did, state, rev, host, records, healed, deleted, refused, message, requests, &cooldown];
        self.in_time(self.client.execute(finish, &values)).await?;
        Ok(())
    }

    /// Notes when to try again, and why.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn postpone_repo(&self, did: &str, postponed: &Postponed) -> Result<(), StoreError> {
        let Postponed { pause, host, message, doubted, tried, others_too: _ } = postponed;
        let (seconds, attempts) = (pause.as_secs_f64(), i32::from(*tried));
        let postpone = include_str!("../../sql/repair/postpone.sql");
        let values: [&(dyn postgres_types::ToSql + Sync); 6] =
            [&did, &seconds, host, message, doubted, &attempts];
        self.in_time(self.client.execute(postpone, &values)).await?;
        Ok(())
    }
}
