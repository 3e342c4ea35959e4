//! Deleting tombstones that can no longer matter.

use tokio_postgres::Client;

use super::StoreError;

/// Rows per transaction: few enough that nobody has to wait.
const CHUNK: i64 = 5_000;

/// Deletes tombstones of deletes that entered the stream before `before_ms` (Unix milliseconds), and keeps how far each
/// account has lost its memory. Returns how many.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn sweep(client: &Client, before_ms: u64) -> Result<u64, StoreError> {
    let before = i64::try_from(before_ms).unwrap_or(i64::MAX);
    let mut total = 0;
    loop {
        // Rows that a concurrent delete of the same record is updating are left for the next time.
        let row = client
            .query_one(include_str!("../../sql/store/delete_tombstones.sql"), &[&before, &CHUNK])
            .await?;
        let deleted: i64 = row.get(0);
        total += u64::try_from(deleted).unwrap_or(0);
        if deleted < CHUNK {
            return Ok(total);
        }
    }
}
