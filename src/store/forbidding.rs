//! The accounts that forbid to collect what they write.

use std::collections::HashSet;

use super::{Store, StoreError};

impl Store {
    /// Their DIDs.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses.
    pub async fn forbidding(&self) -> Result<HashSet<String>, StoreError> {
        let session = self.session().await?;
        let rows = session
            .in_time(session.client().query(include_str!("../../sql/store/forbidding.sql"), &[]))
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}
