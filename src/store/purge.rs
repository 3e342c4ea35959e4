//! Removing the records of deleted accounts, in short transactions.

use tokio_postgres::Client;

use super::StoreError;
use crate::event::Kind;

/// Rows per transaction: few enough that nobody has to wait.
const CHUNK: i32 = 200;

/// A deletion whose account still has rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// The account.
    pub did: String,
    /// Identifies the deletion among the account's deletions.
    which: String,
}

/// One of the deletions still to be purged.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn next(client: &Client) -> Result<Option<Deletion>, StoreError> {
    let sql = include_str!("../../sql/store/next_deletion.sql");
    let row = client.query_opt(sql, &[]).await?;
    Ok(row.map(|row| Deletion { did: row.get(0), which: row.get(1) }))
}

/// Removes everything that an account had written before it was deleted. Safe to interrupt, to repeat, and to run
/// concurrently. Returns the number of records.
///
/// # Errors
///
/// The server cannot be reached or refuses; the next call continues.
pub async fn purge(client: &Client, deletion: &Deletion) -> Result<u64, StoreError> {
    let Deletion { did, which } = deletion;
    let mut total = 0;
    for kind in Kind::ALL.into_iter().filter(|kind| kind.table().is_some()) {
        loop {
            let removed: i32 = client
                .query_one(include_str!("../../sql/store/purge.sql"), &[did, &kind.name(), &CHUNK])
                .await?
                .get(0);
            match u64::try_from(removed) {
                Ok(removed @ 1..) => total += removed,
                _ => break,
            }
        }
    }
    client.execute(include_str!("../../sql/store/purged.sql"), &[did, which]).await?;
    Ok(total)
}
