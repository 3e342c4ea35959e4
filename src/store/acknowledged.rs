//! PostgreSQL's record of what the group has acknowledged. Redis keeps the same record: if PostgreSQL knows less, it
//! has gone back in time (a restored backup, a standby promoted without its last second), or is another database.

use super::{Session, StoreError};

/// The position up to which everything is in the tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Noted {
    /// When it was recorded, by Redis's clock, Unix milliseconds: a later record has a greater number.
    pub ms: u64,
    /// The relay that the position belongs to.
    pub relay: Option<String>,
    /// The epoch that it belongs to.
    pub epoch: u64,
    /// The position; `None` before the first acknowledgement.
    pub position: Option<i64>,
}

/// PostgreSQL's identity and recorded position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The server's identity and timeline; empty if we lack the right to ask.
    pub server: String,
    /// The last recorded position; `None` for none.
    pub noted: Option<Noted>,
}

/// Reads PostgreSQL's record.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn known(session: &Session, stream: &str, group: &str) -> Result<Known, StoreError> {
    let sql = include_str!("../../sql/store/acknowledged.sql");
    let row = session.in_time(session.client.query_opt(sql, &[&stream, &group])).await?;
    let noted = row.map(|row| {
        let number = |column: usize| u64::try_from(row.get::<_, i64>(column)).unwrap_or(0);
        Noted { ms: number(0), relay: row.get(1), epoch: number(2), position: row.get(3) }
    });
    // Managed servers may not allow these functions.
    let sql = include_str!("../../sql/store/server.sql");
    let row = session.in_time(session.client.query_opt(sql, &[])).await?;
    Ok(Known { server: row.map(|row| row.get(0)).unwrap_or_default(), noted })
}

/// Records a position durably, unless a later one is recorded already.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn note(session: &Session, stream: &str, group: &str, new: &Noted) -> Result<(), StoreError> {
    let sql = include_str!("../../sql/store/note_acknowledged.sql");
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let (ms, epoch) = (number(new.ms), number(new.epoch));
    session
        .in_time(session.client.execute(sql, &[&stream, &group, &ms, &new.relay, &epoch, &new.position]))
        .await?;
    Ok(())
}
