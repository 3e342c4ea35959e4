//! Brings the database up to date before anything is applied.

use tracing::info;

use crate::store::verdict::Verdict;
use crate::store::{Store, StoreError, migrate};

/// Creates or upgrades the tables; with `AUTO_MIGRATE=false`, refuses to work with outdated ones.
pub(super) async fn bring_up_to_date(store: &Store, auto_migrate: bool) -> Result<(), StoreError> {
    store.refuse_transaction_pooling().await?;
    let mut session = store.session().await?;
    let found = migrate::look(session.client()).await?;
    if !auto_migrate {
        if found.is_current() {
            return Ok(());
        }
        return Err(StoreError::new(
            Verdict::Halt,
            format!(
                "the database is at version {} and this program needs {} with its own functions, and AUTO_MIGRATE is \
                 false: run `standpipe migrate`",
                found.version,
                migrate::wanted()
            ),
        ));
    }
    let done = migrate::migrate(session.client_mut()).await?;
    if !done.is_empty() {
        info!(done = done.join(", "), "the database has been migrated");
    }
    Ok(())
}
