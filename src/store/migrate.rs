//! Creating and upgrading the tables and functions, from the files in `sql/`.

use tokio_postgres::Client;

use super::StoreError;
use super::verdict::Verdict;
use crate::crash::{self, Point};

/// Numbered migrations: each runs once, in a transaction of its own.
const MIGRATIONS: &[(i32, &str, &str)] = &[
    (1, "tables", include_str!("../../sql/migrations/0001_tables.sql")),
    (2, "every_kind", include_str!("../../sql/migrations/0002_every_kind.sql")),
];

/// The functions: written anew whenever they differ from what the database has.
const FUNCTIONS: &[&str] = &[
    include_str!("../../sql/apply/00_newer.sql"),
    include_str!("../../sql/apply/10_tombstones.sql"),
    include_str!("../../sql/apply/20_likes.sql"),
    include_str!("../../sql/apply/21_reposts.sql"),
    include_str!("../../sql/apply/22_bookmarks.sql"),
    include_str!("../../sql/apply/30_posts.sql"),
    include_str!("../../sql/apply/40_graph.sql"),
    include_str!("../../sql/apply/50_records.sql"),
    include_str!("../../sql/apply/60_users.sql"),
    include_str!("../../sql/apply/70_time.sql"),
    include_str!("../../sql/apply/90_apply.sql"),
];

/// Any number, the same in every process: migrations run one at a time.
const LOCK: i64 = 0x5354_414e_4450_4950;

/// The version that this program's migrations lead to.
#[must_use]
pub fn wanted() -> i32 {
    MIGRATIONS.iter().map(|(version, ..)| *version).max().unwrap_or(0)
}

/// What stands in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The newest migration that ran; 0 for none.
    pub version: i32,
    /// Whether the functions are this program's.
    pub functions: bool,
}

impl Found {
    /// Whether this program can work on it.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.version == wanted() && self.functions
    }
}

/// Looks at the database without changing it.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn look(client: &Client) -> Result<Found, StoreError> {
    let exists: bool =
        client.query_one("SELECT to_regclass('standpipe.migrations') IS NOT NULL", &[]).await?.get(0);
    if !exists {
        return Ok(Found { version: 0, functions: false });
    }
    let row = client
        .query_one(
            "SELECT coalesce((SELECT max(version) FROM standpipe.migrations WHERE version > 0), 0),
                    EXISTS (SELECT FROM standpipe.migrations WHERE version = 0 AND name = $1)",
            &[&fingerprint()],
        )
        .await?;
    Ok(Found { version: row.get(0), functions: row.get(1) })
}

/// Brings the database to this program's version. Safe to interrupt and to repeat; several processes take turns.
///
/// Returns the names of what was done, empty when there was nothing to do.
///
/// # Errors
///
/// The server cannot be reached or refuses, or the database belongs to a newer program.
pub async fn migrate(client: &mut Client) -> Result<Vec<String>, StoreError> {
    let found = look(client).await?;
    if found.version > wanted() {
        return Err(newer(found.version));
    }
    if found.is_current() {
        return Ok(Vec::new());
    }
    // A session's lock, not a transaction's: it spans all migrations. It goes with the connection.
    client
        .batch_execute(&format!(
            "SET statement_timeout = 0; SET lock_timeout = 0; SELECT pg_advisory_lock({LOCK})"
        ))
        .await?;
    let done = under_lock(client).await;
    client
        .batch_execute(&format!(
            "SELECT pg_advisory_unlock({LOCK}); RESET statement_timeout; RESET lock_timeout"
        ))
        .await?;
    done
}

async fn under_lock(client: &mut Client) -> Result<Vec<String>, StoreError> {
    client
        .batch_execute(
            "CREATE SCHEMA IF NOT EXISTS standpipe;
             CREATE TABLE IF NOT EXISTS standpipe.migrations (
                 -- 0 for the functions; then `name` is their fingerprint
                 version integer PRIMARY KEY,
                 name text NOT NULL,
                 applied_at timestamptz NOT NULL DEFAULT now()
             );
             CREATE TABLE IF NOT EXISTS standpipe.tables_before (name text PRIMARY KEY);",
        )
        .await?;
    // Another process may have been faster.
    let found = look(client).await?;
    if found.version > wanted() {
        return Err(newer(found.version));
    }
    let mut done = Vec::new();
    for (version, name, sql) in MIGRATIONS.iter().filter(|(version, ..)| *version > found.version) {
        let transaction = client.transaction().await?;
        if *version == 1 {
            // Which of the application's tables were here before us: those keep their own indexes.
            transaction
                .batch_execute(
                    "INSERT INTO standpipe.tables_before
                     SELECT tablename FROM pg_tables WHERE schemaname = current_schema() ON CONFLICT DO NOTHING",
                )
                .await?;
        }
        transaction.batch_execute(sql).await?;
        crash::at(Point::InMigration);
        transaction
            .execute("INSERT INTO standpipe.migrations (version, name) VALUES ($1, $2)", &[version, name])
            .await?;
        transaction.commit().await?;
        done.push(format!("{version:04}_{name}"));
    }
    if !found.functions || !done.is_empty() {
        let transaction = client.transaction().await?;
        for sql in FUNCTIONS {
            transaction.batch_execute(sql).await?;
        }
        transaction
            .execute(
                "INSERT INTO standpipe.migrations (version, name) VALUES (0, $1)
                 ON CONFLICT (version) DO UPDATE SET name = excluded.name, applied_at = now()",
                &[&fingerprint()],
            )
            .await?;
        transaction.commit().await?;
        done.push("functions".to_owned());
    }
    Ok(done)
}

fn newer(version: i32) -> StoreError {
    StoreError::new(
        Verdict::Halt,
        format!(
            "the database is at version {version}, this program knows versions up to {}: use a newer standpipe",
            wanted()
        ),
    )
}

/// A hash of all the functions' texts (FNV-1a: it needs to be stable, not strong).
fn fingerprint() -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in FUNCTIONS.iter().flat_map(|sql| sql.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}
