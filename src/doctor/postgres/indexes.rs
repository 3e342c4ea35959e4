//! Indexes.

use crate::doctor::{Findings, size, some_of};
use crate::store::{Client, StoreError, migrate};

const WHAT: &str = "indexes";
/// Smaller indexes cost next to nothing.
const LARGE: i64 = 8 << 20;

/// An existing index.
struct Index {
    table: String,
    name: String,
    /// Its first column.
    column: String,
    /// Unique on this column alone.
    unique: bool,
    condition: Condition,
    bytes: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Good,
    /// No query uses it.
    Unused,
    BeingBuilt,
    /// Its build was interrupted.
    Invalid,
}

impl Index {
    fn works(&self) -> bool {
        matches!(self.condition, Condition::Good | Condition::Unused)
    }
}

/// The indexes that the program needs, and those that only cost time.
pub(super) async fn indexes(
    client: &Client,
    tables: &[&str],
    findings: &mut Findings,
) -> Result<(), StoreError> {
    let there = read(client, tables).await?;
    let before: Vec<String> = client
        .query(include_str!("../../../sql/store/tables_before.sql"), &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    // All three run, because each reports its own findings.
    let complete =
        [keys(&there, findings), lookups(&there, &before, findings), interrupted(&there, findings)];
    if complete == [true; 3] {
        findings.ok(WHAT, format!("all required indexes exist, {} in total", there.len()));
    }
    unused(&there, findings);
    Ok(())
}

async fn read(client: &Client, tables: &[&str]) -> Result<Vec<Index>, StoreError> {
    let rows = client.query(include_str!("../../../sql/check/indexes.sql"), &[&tables]).await?;
    Ok(rows
        .iter()
        .map(|row| Index {
            table: row.get("table_name"),
            name: row.get("name"),
            column: row.get("first_column"),
            unique: row.get("one_column_unique"),
            condition: if !row.get::<_, bool>("valid") {
                if row.get("under_way") { Condition::BeingBuilt } else { Condition::Invalid }
            } else if row.get::<_, Option<bool>>("unused").unwrap_or(false) {
                Condition::Unused
            } else {
                Condition::Good
            },
            bytes: row.get("bytes"),
        })
        .collect())
}

/// Returns whether none is missing.
fn keys(there: &[Index], findings: &mut Findings) -> bool {
    let mut good = true;
    for (table, key) in migrate::keys() {
        let whole =
            |index: &&Index| index.table == table && index.column == key && index.works() && index.unique;
        if there.iter().find(whole).is_none() {
            good = false;
            findings.error(
                WHAT,
                format!("{table} has no unique index on {key}: nothing can be written to it"),
                format!("CREATE UNIQUE INDEX CONCURRENTLY ON {table} ({key})"),
            );
        }
    }
    good
}

/// Returns whether none is missing.
fn lookups(there: &[Index], before: &[String], findings: &mut Findings) -> bool {
    let mut good = true;
    for index in migrate::indexes() {
        let serves =
            |other: &&Index| other.table == index.table && other.column == index.column && other.works();
        // A table that existed before us has the indexes that its own application wants.
        let wanted = index.everywhere || !before.contains(&index.table);
        if wanted && there.iter().find(serves).is_none() {
            good = false;
            findings.warning(
                WHAT,
                format!(
                    "{} has no index that begins with {}: lookups by it read the whole table",
                    index.table, index.column
                ),
                index.sql,
            );
        }
    }
    good
}

/// Returns whether no index build was interrupted.
fn interrupted(there: &[Index], findings: &mut Findings) -> bool {
    let mut good = true;
    for index in there.iter().filter(|index| index.condition == Condition::Invalid) {
        good = false;
        findings.warning(
            WHAT,
            format!(
                "{} is INVALID (its build was interrupted): every write maintains it, no query uses it",
                index.name
            ),
            format!(
                "DROP INDEX CONCURRENTLY {}, then `standpipe migrate` builds what is missing",
                index.name
            ),
        );
    }
    good
}

fn unused(there: &[Index], findings: &mut Findings) {
    let unused: Vec<String> = there
        .iter()
        .filter(|index| index.condition == Condition::Unused && index.bytes > LARGE)
        .map(|index| format!("{} ({})", index.name, size(u64::try_from(index.bytes).unwrap_or(0))))
        .collect();
    if !unused.is_empty() {
        findings.note(
            WHAT,
            format!("no query has used {} since the statistics were last reset", some_of(&unused)),
            "they slow every write: unless a replica uses them, DROP INDEX CONCURRENTLY",
        );
    }
}
