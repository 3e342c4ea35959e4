//! Restores a database that was taken over, for the workers that used it before.

use std::fmt;
use std::time::Instant;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::super::StoreError;
use super::super::verdict::Verdict;
use super::catalogue::{Catalogue, ReplacedIndex};
use super::step::{Lock, Run, Say, Step};
use super::{drop_index, identifier, lock, unlock};

/// How often newly inserted rows are removed before giving up on a unique index.
const TRIES: u32 = 20;

/// The plan of an undo.
#[derive(Debug)]
pub struct Undo {
    indexes: Vec<Restore>,
    steps: Vec<Step>,
    kept: Vec<String>,
}

/// A unique index to restore.
#[derive(Debug)]
struct Restore {
    index: ReplacedIndex,
    /// The number of rows that it cannot hold; `None` if it exists already.
    surplus: Option<i64>,
    /// Leftovers of an interrupted build that have to be removed first.
    leftovers: Vec<Run>,
    build: Vec<Run>,
    finish: Vec<Run>,
}

/// Plans [`undo`]. Changes nothing.
///
/// # Errors
///
/// There is nothing to undo, or nothing would be left; or the server cannot be reached or refuses.
pub async fn plan(client: &Client) -> Result<Undo, StoreError> {
    let catalogue = Catalogue::read(client).await?;
    let halt = |message: String| Err(StoreError::new(Verdict::Halt, message));
    if !catalogue.relations.contains_key("standpipe.replaced_indexes") {
        return halt("there is nothing to undo: this database was never migrated".to_owned());
    }
    if catalogue.tables(true).is_empty() {
        return halt(
            "standpipe created this database, there is nothing to restore; drop the database to remove it"
                .to_owned(),
        );
    }
    let others: i64 =
        client.query_one(include_str!("../../../sql/store/other_sessions.sql"), &[]).await?.get(0);
    if others > 0 {
        return halt(format!("standpipe is working on this database ({others} connections): stop it first"));
    }
    Undo::make(client, &catalogue).await
}

/// Restores the database to its state before [`super::migrate`]: re-creates the unique indexes, after removing the rows
/// that they cannot hold, and drops our columns, functions and records. The other rows stay as they are. Safe to
/// interrupt and to repeat.
///
/// # Errors
///
/// As for [`plan`].
pub async fn undo(client: &Client, say: &mut Say<'_>) -> Result<(), StoreError> {
    lock(client, say).await?;
    let done = async {
        let undo = plan(client).await?;
        for restore in &undo.indexes {
            restore.run(client, say).await?;
        }
        for step in &undo.steps {
            let began = Instant::now();
            step.run(client, say).await?;
            say(&format!("  {} ({:.2} s)", step.what, began.elapsed().as_secs_f64()));
        }
        for kept in &undo.kept {
            say(&format!("  {kept}"));
        }
        Ok(())
    }
    .await;
    unlock(client).await?;
    done
}

impl Undo {
    async fn make(client: &Client, catalogue: &Catalogue) -> Result<Self, StoreError> {
        let mut undo = Self { indexes: Vec::new(), steps: Vec::new(), kept: Vec::new() };
        for index in &catalogue.replaced {
            if catalogue.relations.contains_key(&index.table) {
                undo.indexes.push(Restore::make(client, catalogue, index).await?);
            }
        }
        for (table, columns) in &catalogue.added {
            let there = catalogue.relations.get(table);
            let columns: Vec<&str> = columns
                .iter()
                .map(String::as_str)
                .filter(|column| there.is_some_and(|there| there.contains(*column)))
                .collect();
            if !columns.is_empty() {
                let drops: Vec<String> =
                    columns.iter().map(|column| format!("DROP COLUMN {}", identifier(column))).collect();
                undo.steps.push(Step {
                    what: format!("{table}: drop {}", columns.join(", ")),
                    lock: Lock::Moment(table.clone()),
                    runs: vec![Run::Transaction(format!(
                        "ALTER TABLE {}.{} {}",
                        identifier(&catalogue.schema),
                        identifier(table),
                        drops.join(", ")
                    ))],
                });
            }
        }
        // Last, because it records what is left to do.
        undo.steps.push(Step {
            what: "drop the schema standpipe".to_owned(),
            lock: Lock::None,
            runs: vec![Run::Transaction("DROP SCHEMA standpipe CASCADE".to_owned())],
        });
        let ours = catalogue.tables(false);
        if !ours.is_empty() {
            undo.kept.push(format!("kept, although standpipe created them: {}", ours.join(", ")));
        }
        Ok(undo)
    }

    /// Rows removed because a unique index cannot hold them.
    #[must_use]
    pub fn surplus(&self) -> i64 {
        self.indexes.iter().filter_map(|restore| restore.surplus).sum()
    }
}

impl Restore {
    async fn make(client: &Client, catalogue: &Catalogue, index: &ReplacedIndex) -> Result<Self, StoreError> {
        let whole = catalogue.indexes.get(&index.name);
        let mut restore =
            Self { index: index.clone(), surplus: None, leftovers: vec![], build: vec![], finish: vec![] };
        if whole == Some(&false) {
            restore.leftovers.push(drop_index(catalogue, &index.name));
        }
        if whole != Some(&true) {
            let rows = client.query_one(&index.surplus(), &[]).await?;
            restore.surplus = Some(rows.get(0));
            restore.build.push(Run::Alone(index.definition.replacen(
                "UNIQUE INDEX",
                "UNIQUE INDEX CONCURRENTLY",
                1,
            )));
        }
        let is_constraint = client
            .query_one(include_str!("../../../sql/store/constraint_exists.sql"), &[&index.name])
            .await?;
        if let (Some(words), false) = (&index.constraint, is_constraint.get(0)) {
            restore.finish.push(Run::Transaction(format!(
                "ALTER TABLE {}.{} ADD CONSTRAINT {name} UNIQUE USING INDEX {name} {words}",
                identifier(&catalogue.schema),
                identifier(&index.table),
                name = identifier(&index.name),
            )));
        }
        if let Some(replacement) = &index.replacement
            && catalogue.indexes.contains_key(replacement)
        {
            restore.finish.push(drop_index(catalogue, replacement));
        }
        Ok(restore)
    }

    async fn run(&self, client: &Client, say: &mut Say<'_>) -> Result<(), StoreError> {
        let began = Instant::now();
        let what = format!("{}: restore {}", self.index.table, self.index.name);
        for run in &self.leftovers {
            run.run(client, &what, say).await?;
        }
        let mut removed = 0;
        if self.surplus.is_some() {
            let mut tries = 0;
            loop {
                removed += self.index.collapse(client).await?;
                let mut built = Ok(());
                for run in &self.build {
                    built = run.run(client, &what, say).await;
                }
                match built {
                    Ok(()) => break,
                    // Somebody inserted rows in the meantime; the invalid index must go before the next attempt.
                    Err(error) if error.sqlstate.as_deref() == Some(SqlState::UNIQUE_VIOLATION.code()) => {
                        tries += 1;
                        let drop =
                            format!("DROP INDEX CONCURRENTLY IF EXISTS {}", identifier(&self.index.name));
                        Run::Alone(drop).run(client, &what, say).await?;
                        if tries == TRIES {
                            return Err(error);
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        for run in &self.finish {
            run.run(client, &what, say).await?;
        }
        let surplus = if removed > 0 { format!(", {removed} surplus rows removed") } else { String::new() };
        say(&format!("  {what}{surplus} ({:.2} s)", began.elapsed().as_secs_f64()));
        Ok(())
    }
}

impl ReplacedIndex {
    /// The number of surplus rows.
    fn surplus(&self) -> String {
        format!(
            "SELECT coalesce(sum(n - 1), 0)::bigint FROM (
                 SELECT count(*) AS n FROM {} WHERE {} GROUP BY {} HAVING count(*) > 1) s",
            identifier(&self.table),
            self.rows(),
            self.keys.join(", ")
        )
    }

    /// The condition for rows that the index covers.
    fn rows(&self) -> String {
        let keys: Vec<String> = self.keys.iter().map(|key| format!("{key} IS NOT NULL")).collect();
        format!("{} AND {}", keys.join(" AND "), self.predicate.as_deref().unwrap_or("true"))
    }

    /// Of duplicate rows about one subject, keeps the newest. Counters count accounts, not rows, so they stay correct.
    async fn collapse(&self, client: &Client) -> Result<u64, StoreError> {
        // Accounts are not records: none is ever surplus, and the index cannot be restored while there are duplicates.
        if self.table == "users" {
            return Ok(0);
        }
        let table = identifier(&self.table);
        let items = if self.table == "reposts" {
            ", items AS (DELETE FROM feed_items WHERE uri IN (SELECT uri FROM gone))"
        } else {
            ""
        };
        let removed = client
            .query_one(
                &format!(
                    "WITH gone AS (
                         DELETE FROM {table} WHERE uri IN (
                             SELECT uri FROM (
                                 SELECT uri, row_number() OVER (
                                     PARTITION BY {} ORDER BY created_at DESC, uri DESC) AS place
                                 FROM {table} WHERE {}) p
                             WHERE place > 1)
                         RETURNING uri)
                     {items}
                     SELECT count(*) FROM gone",
                    self.keys.join(", "),
                    self.rows()
                ),
                &[],
            )
            .await?;
        Ok(u64::try_from(removed.get::<_, i64>(0)).unwrap_or(0))
    }
}

impl fmt::Display for Undo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} steps, in this order:", self.indexes.len() + self.steps.len())?;
        for restore in &self.indexes {
            let ReplacedIndex { table, name, constraint, .. } = &restore.index;
            let lock = match constraint {
                Some(_) => Lock::BesideThenMoment(table.clone()),
                None => Lock::Beside(table.clone()),
            };
            write!(f, "\n  {table}: restore {name}")?;
            match restore.surplus {
                Some(0) | None => {}
                Some(rows) => write!(
                    f,
                    "; removes {rows} rows first: all but the newest for each subject ({})",
                    Lock::Rows(table.clone())
                )?,
            }
            write!(f, "\n      {lock}")?;
        }
        for step in &self.steps {
            write!(f, "\n  {}\n      {}", step.what, step.lock)?;
        }
        for kept in &self.kept {
            write!(f, "\n  {kept}")?;
        }
        Ok(())
    }
}
