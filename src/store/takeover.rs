//! Whether a database has been taken over from the workers that used it before.

use tokio_postgres::Client;

use super::StoreError;

/// Whether the application's tables existed before us, and we have not started to work on them.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn is_due(client: &Client) -> Result<bool, StoreError> {
    let sql = include_str!("../../sql/store/takeover_is_due.sql");
    Ok(client.query_one(sql, &[]).await?.get(0))
}

/// Whether the application's tables existed before us.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn was_theirs(client: &Client) -> Result<bool, StoreError> {
    let sql = include_str!("../../sql/store/tables_were_theirs.sql");
    Ok(client.query_one(sql, &[]).await?.get(0))
}

/// Records that the entries that the others left pending have been replayed.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn done(client: &Client) -> Result<(), StoreError> {
    let sql = include_str!("../../sql/store/takeover_done.sql");
    client.execute(sql, &[]).await?;
    Ok(())
}
