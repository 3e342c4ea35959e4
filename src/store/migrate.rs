//! Creates and upgrades the tables and functions from the files in `sql/`, and takes over a database that is in use.
//!
//! On an empty database everything is one transaction. On any other, every statement is a step of its own that holds
//! nobody up, and existing objects are skipped: it can be interrupted anywhere and restarted. Changes to existing
//! objects are recorded, so that [`undo`] can revert them.

mod catalogue;
mod statement;
mod step;
pub mod undo;

use std::fmt;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tracing::info;

use super::StoreError;
use super::verdict::Verdict;
use crate::crash::{self, Point};
pub use catalogue::keys;
use catalogue::{Catalogue, UniqueIndex};
use statement::{Kind, Statement};
pub use step::Say;
use step::{Lock, Run, Step};

// `MIGRATIONS`: numbered, from `sql/migrations`. `FUNCTIONS`: from `sql/apply`, re-created whenever they differ from
// those in the database. build.rs lists both folders.
include!(concat!(env!("OUT_DIR"), "/sql.rs"));

/// The advisory lock that lets only one migration run at a time. An arbitrary number, the same in every process.
const LOCK: i64 = 0x5354_414e_4450_4950;

/// Our own schema and records. The list of tables that existed before us is recorded only once, when its own table is
/// created: later, our tables would be among them.
const OWN_SCHEMA: &str = "
    CREATE SCHEMA IF NOT EXISTS standpipe;
    CREATE TABLE standpipe.migrations (
        -- 0 for the functions; then `name` is their fingerprint
        version integer PRIMARY KEY,
        name text NOT NULL,
        applied_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE standpipe.replaced_indexes (
        name text PRIMARY KEY,
        table_name text NOT NULL,
        definition text NOT NULL,
        keys text[] NOT NULL,
        predicate text,
        -- NULL: no constraint
        constraint_words text,
        -- NULL: there was a plain index already
        replacement text
    );
    CREATE TABLE standpipe.added_columns (
        table_name text NOT NULL,
        column_name text NOT NULL,
        PRIMARY KEY (table_name, column_name)
    );
    CREATE TABLE standpipe.tables_before (name text PRIMARY KEY);
    INSERT INTO standpipe.tables_before SELECT tablename FROM pg_tables WHERE schemaname = current_schema()";

/// The version that this program's migrations lead to.
#[must_use]
pub fn wanted() -> i32 {
    MIGRATIONS.iter().map(|(version, ..)| *version).max().unwrap_or(0)
}

/// The state of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The newest migration applied; 0 for none.
    pub version: i32,
    /// Whether the functions are this program's.
    pub functions: bool,
    /// Whether no unique index forbids rows that repositories can legitimately contain.
    pub indexes: bool,
}

impl Found {
    /// Whether this program can work on it.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.version == wanted() && self.functions && self.indexes
    }
}

/// Inspects the database without changing it.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn look(client: &Client) -> Result<Found, StoreError> {
    let indexes = catalogue::unique_by_subject(client).await?.is_empty();
    let exists: bool =
        client.query_one(include_str!("../../sql/store/migrations_exist.sql"), &[]).await?.get(0);
    if !exists {
        return Ok(Found { version: 0, functions: false, indexes });
    }
    let row = client.query_one(include_str!("../../sql/store/version.sql"), &[&fingerprint()]).await?;
    Ok(Found { version: row.get(0), functions: row.get(1), indexes })
}

/// An index that the migrations create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Its name.
    pub name: String,
    /// A table of the application by its name, one of ours as `standpipe.<name>`.
    pub table: String,
    /// Its first column: any other index that begins with it serves as well.
    pub column: String,
    /// The statement that creates it without blocking others.
    pub sql: String,
    /// Whether it is also created on a table that existed before us.
    pub everywhere: bool,
}

/// The indexes that the migrations create.
#[must_use]
pub fn indexes() -> Vec<Index> {
    let statements = MIGRATIONS.iter().flat_map(|(.., file)| statement::split(file));
    statements
        .filter_map(|statement| match &statement.kind {
            Kind::Index { name, table, everywhere } => {
                let plain = plain_index(&statement);
                let columns = plain.split_once('(').map_or("", |(_, columns)| columns);
                Some(Index {
                    name: name.clone(),
                    table: table.clone(),
                    column: columns.split([',', ')', ' ']).next().unwrap_or_default().to_owned(),
                    sql: plain.replacen("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1),
                    everywhere: *everywhere,
                })
            }
            _ => None,
        })
        .collect()
}

/// Brings the database to this program's version, while others keep working with it. Safe to interrupt and to repeat;
/// several processes take turns.
///
/// Returns the names of the steps taken; empty if there was nothing to do.
///
/// # Errors
///
/// The server cannot be reached or refuses, or the database belongs to a newer program.
pub async fn migrate(client: &mut Client) -> Result<Vec<String>, StoreError> {
    migrate_and_say(client, &mut |line| info!("{}", line.trim())).await
}

/// Like [`migrate`], reporting each step.
///
/// # Errors
///
/// As for [`migrate`].
pub async fn migrate_and_say(client: &mut Client, say: &mut Say<'_>) -> Result<Vec<String>, StoreError> {
    if look(client).await?.is_current() {
        return Ok(Vec::new());
    }
    lock(client, say).await?;
    let done = under_lock(client, say).await;
    unlock(client).await?;
    done
}

/// Plans [`migrate`]. Changes nothing.
///
/// # Errors
///
/// As for [`migrate`].
pub async fn plan(client: &Client) -> Result<Plan, StoreError> {
    let found = look(client).await?;
    Plan::make(&Catalogue::read(client).await?, &found)
}

/// One process at a time. A session lock, not a transaction lock: it spans all steps, and is released with the
/// connection. It is polled, because a session waiting for it would hold a snapshot, which the lock holder's CREATE
/// INDEX CONCURRENTLY would wait for.
async fn lock(client: &Client, say: &mut Say<'_>) -> Result<(), StoreError> {
    let began = Instant::now();
    let mut said = false;
    loop {
        if client.query_one("SELECT pg_try_advisory_lock($1)", &[&LOCK]).await?.get(0) {
            return step::begin(client).await;
        }
        if !said && began.elapsed() > Duration::from_secs(2) {
            said = true;
            say("another process is changing the tables; waiting for it");
        }
        tokio::time::sleep(Duration::from_millis(50 + fastrand::u64(..100))).await;
    }
}

async fn unlock(client: &Client) -> Result<(), StoreError> {
    if client.is_closed() {
        // The lock was released with the connection, and the caller has the error.
        return Ok(());
    }
    step::end(client).await?;
    client.execute("SELECT pg_advisory_unlock($1)", &[&LOCK]).await?;
    Ok(())
}

async fn under_lock(client: &mut Client, say: &mut Say<'_>) -> Result<Vec<String>, StoreError> {
    // Another process may have done it already.
    let found = look(client).await?;
    let catalogue = Catalogue::read(client).await?;
    let plan = Plan::make(&catalogue, &found)?;
    if found.version == 0 && is_empty(&catalogue) {
        create(client, &catalogue).await?;
        return Ok(plan.names);
    }
    for warning in &plan.warnings {
        say(&format!("mind: {warning}"));
    }
    let total = plan.steps.len();
    for (index, step) in plan.steps.iter().enumerate() {
        let began = Instant::now();
        step.run(client, say).await?;
        say(&format!("  {:>2}/{total}  {} ({:.2} s)", index + 1, step.what, began.elapsed().as_secs_f64()));
    }
    Ok(plan.names)
}

/// Whether none of the tables exist.
fn is_empty(catalogue: &Catalogue) -> bool {
    let statements = MIGRATIONS.iter().flat_map(|(.., file)| statement::split(file));
    statements.into_iter().all(|statement| match &statement.kind {
        Kind::Table(table) => !catalogue.relations.contains_key(table),
        _ => true,
    })
}

/// Whether a column of a table is one that our migrations know.
#[must_use]
pub(super) fn is_ours(table: &str, column: &str) -> bool {
    let statements = MIGRATIONS.iter().flat_map(|(.., file)| statement::split(file));
    statements.into_iter().any(|statement| match &statement.kind {
        Kind::Table(name) if name.trim_start_matches("standpipe.") == table => {
            statement.sql.lines().any(|line| line.split_whitespace().next() == Some(column))
        }
        Kind::Columns { table: name, columns } if name == table => columns.iter().any(|name| name == column),
        _ => false,
    })
}

/// Whether a function is one of ours. Its schema does not show that: a role named standpipe creates its own objects
/// there, too.
#[must_use]
pub(super) fn is_our_function(name: &str) -> bool {
    name.strip_prefix("standpipe.").is_some_and(|name| {
        // The functions in sql/apply/20_pointers.sql and 41_plain.sql are generated from templates.
        let made = ["put_", "new_", "delete_", "remove_"].iter().any(|prefix| {
            name.strip_prefix(prefix)
                .is_some_and(|kind| crate::event::Kind::ALL.iter().any(|one| one.name() == kind))
        });
        made || FUNCTIONS.iter().any(|sql| sql.contains(&format!(" standpipe.{name}(")))
    })
}

/// Everything in one transaction, on a database that nobody uses yet.
async fn create(client: &mut Client, catalogue: &Catalogue) -> Result<(), StoreError> {
    let transaction = client.transaction().await?;
    if !catalogue.relations.contains_key("standpipe.tables_before") {
        transaction.batch_execute(OWN_SCHEMA).await?;
    }
    for (version, name, file) in MIGRATIONS {
        let statements = statement::split(file);
        let sql: Vec<String> = statements.into_iter().map(|statement| plain_index(&statement)).collect();
        transaction.batch_execute(&sql.join(";\n")).await?;
        transaction.batch_execute(&note_version(*version, name)).await?;
    }
    crash::at(Point::InMigration);
    transaction.batch_execute(&functions()).await?;
    Ok(transaction.commit().await?)
}

/// The remaining steps.
#[derive(Debug, Default)]
pub struct Plan {
    steps: Vec<Step>,
    /// The state after them.
    names: Vec<String>,
    warnings: Vec<String>,
}

/// Whether others may be using a table. A missing table is created by an earlier step, and nobody uses it yet.
fn is_used(catalogue: &Catalogue, table: &str) -> bool {
    catalogue.relations.contains_key(table) && !table.starts_with("standpipe.")
}

fn lock_of(catalogue: &Catalogue, table: &str, lock: fn(String) -> Lock) -> Lock {
    if is_used(catalogue, table) { lock(table.to_owned()) } else { Lock::None }
}

impl Plan {
    /// Warnings for the operator, whether or not there is anything to do.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn make(catalogue: &Catalogue, found: &Found) -> Result<Self, StoreError> {
        if found.version > wanted() {
            return Err(newer(found.version));
        }
        let mut plan = Self::default();
        if !catalogue.relations.contains_key("standpipe.tables_before") {
            plan.add(
                "record the existing tables in the new schema standpipe",
                Lock::None,
                vec![Run::Transaction(OWN_SCHEMA.to_owned())],
            );
        }
        for (version, name, file) in MIGRATIONS.iter().filter(|(version, ..)| *version > found.version) {
            for statement in statement::split(file) {
                plan.statement(catalogue, &statement);
            }
            let what = format!("record version {version}");
            plan.add(&what, Lock::None, vec![Run::Transaction(note_version(*version, name))]);
            plan.names.push(format!("{version:04}_{name}"));
        }
        for index in &catalogue.by_subject {
            plan.replace(catalogue, index);
            plan.names.push(format!("{} replaced", index.name));
        }
        if !found.functions || !plan.names.is_empty() {
            plan.add("replace the functions", Lock::None, vec![Run::Transaction(functions())]);
            plan.names.push("functions".to_owned());
        }
        if plan.steps.iter().any(|step| step.lock != Lock::None) && !catalogue.foreign.is_empty() {
            return Err(StoreError::new(
                Verdict::Halt,
                format!(
                    "this role does not own {}: run `standpipe migrate` as the owner, or as a member of its role",
                    catalogue.foreign.join(", ")
                ),
            ));
        }
        if !catalogue.foreign_keys.is_empty() {
            plan.warnings.push(format!(
                "foreign keys refuse records that arrive before the row that they refer to, which become dead letters; \
                 drop them: {}",
                catalogue.foreign_keys.join("; ")
            ));
        }
        Ok(plan)
    }

    fn add(&mut self, what: &str, lock: Lock, runs: Vec<Run>) {
        self.steps.push(Step { what: what.to_owned(), lock, runs });
    }

    /// Adds a migration's statement, unless it has nothing to do.
    fn statement(&mut self, catalogue: &Catalogue, statement: &Statement) {
        let sql = statement.sql.clone();
        let there = |relation: &str| catalogue.relations.contains_key(relation);
        let of = |relation: &str| catalogue.relations.get(relation);
        match &statement.kind {
            Kind::Table(name) if !there(name) => {
                self.add(&format!("create table {name}"), Lock::None, vec![Run::Transaction(sql)]);
            }
            Kind::Type(name) if !there(name) => {
                self.add(&format!("create type {name}"), Lock::None, vec![Run::Transaction(sql)]);
            }
            Kind::Attribute { of: name, name: attribute }
                if !of(name).is_some_and(|has| has.contains(attribute)) =>
            {
                let what = format!("{name}: add attribute {attribute}");
                self.add(&what, Lock::None, vec![Run::Transaction(sql)]);
            }
            Kind::Columns { table, columns } => self.columns(catalogue, table, columns, sql),
            Kind::Index { name, table, everywhere } => {
                self.index(catalogue, name, table, *everywhere, statement);
            }
            Kind::Other => self.add(&first_words(&sql), Lock::None, vec![Run::Transaction(sql)]),
            Kind::Table(_) | Kind::Type(_) | Kind::Attribute { .. } => {}
        }
    }

    /// Adds the columns that a table lacks.
    fn columns(&mut self, catalogue: &Catalogue, table: &str, columns: &[String], sql: String) {
        let has = catalogue.relations.get(table);
        let missing: Vec<&str> = columns
            .iter()
            .filter(|column| !has.is_some_and(|has| has.contains(*column)))
            .map(String::as_str)
            .collect();
        if missing.is_empty() {
            return;
        }
        // In the same transaction: recorded if and only if we added it.
        let note = |column: &&str| {
            let (table, column) = (literal(table), literal(column));
            format!("INSERT INTO standpipe.added_columns VALUES ({table}, {column}) ON CONFLICT DO NOTHING")
        };
        let mut sql = vec![sql];
        if catalogue.before.contains(table) {
            sql.extend(missing.iter().map(note));
        }
        let sql = sql.join(";\n");
        let what = format!("{table}: add {}", missing.join(", "));
        self.add(&what, lock_of(catalogue, table, Lock::Moment), vec![Run::Transaction(sql)]);
    }

    /// Builds a missing index, or one whose build was interrupted.
    fn index(
        &mut self,
        catalogue: &Catalogue,
        name: &str,
        table: &str,
        everywhere: bool,
        statement: &Statement,
    ) {
        let whole = catalogue.indexes.get(&index_key(name, table));
        if whole == Some(&true) || catalogue.before.contains(table) && !everywhere {
            return;
        }
        let mut runs = Vec::new();
        if whole.is_some() {
            runs.push(drop_index(catalogue, name));
        }
        runs.push(if is_used(catalogue, table) {
            let plain = plain_index(statement);
            Run::Alone(plain.replacen("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1))
        } else {
            Run::Transaction(plain_index(statement))
        });
        self.add(&format!("{table}: build index {name}"), lock_of(catalogue, table, Lock::Beside), runs);
    }

    /// Replaces a unique index by a plain one. The new one comes first, so that there is always an index.
    fn replace(&mut self, catalogue: &Catalogue, index: &UniqueIndex) {
        let UniqueIndex { name, quoted, table, definition, .. } = index;
        let new = replacement_name(name);
        let whole = catalogue.indexes.get(&new).copied();
        let ours = whole.is_some() || index.equivalent.is_none();
        let mut runs = vec![Run::Transaction(format!(
            // An interrupted undo may have rebuilt the index, but not its constraint.
            "INSERT INTO standpipe.replaced_indexes AS r VALUES ({}, {}, {}, ARRAY[{}], {}, {}, {})
             ON CONFLICT (name) DO UPDATE SET
                 table_name = excluded.table_name, definition = excluded.definition, keys = excluded.keys,
                 predicate = excluded.predicate,
                 constraint_words = coalesce(excluded.constraint_words, r.constraint_words),
                 replacement = excluded.replacement",
            literal(name),
            literal(table),
            literal(definition),
            index.keys.iter().map(|key| literal(key)).collect::<Vec<_>>().join(", "),
            index.predicate.as_deref().map_or("NULL".to_owned(), literal),
            index.constraint.as_deref().map_or("NULL".to_owned(), literal),
            if ours { literal(&new) } else { "NULL".to_owned() },
        ))];
        if whole == Some(false) {
            runs.push(drop_index(catalogue, &new));
        }
        if ours && whole != Some(true) {
            let on = definition
                .strip_prefix(&format!("CREATE UNIQUE INDEX {quoted} ON "))
                .unwrap_or_default()
                .replace(" NULLS NOT DISTINCT", "");
            runs.push(Run::Alone(format!("CREATE INDEX CONCURRENTLY {} ON {on}", identifier(&new))));
        }
        let by = if ours { format!("by the plain {new}") } else { "(there is a plain one)".to_owned() };
        let (what, lock) = if index.constraint.is_some() {
            runs.push(Run::Transaction(format!(
                "ALTER TABLE {}.{} DROP CONSTRAINT IF EXISTS {quoted}",
                identifier(&catalogue.schema),
                identifier(table)
            )));
            (
                format!("{table}: replace the unique constraint {name} {by}"),
                Lock::BesideThenMoment(table.clone()),
            )
        } else {
            runs.push(drop_index(catalogue, name));
            (format!("{table}: replace the unique index {name} {by}"), Lock::Beside(table.clone()))
        };
        self.add(&what, lock, runs);
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for warning in &self.warnings {
            writeln!(f, "mind: {warning}")?;
        }
        if self.steps.is_empty() {
            return write!(f, "nothing to do");
        }
        write!(f, "{} steps, in this order:", self.steps.len())?;
        for (index, step) in self.steps.iter().enumerate() {
            write!(f, "\n  {:>2}  {}\n      {}", index + 1, step.what, step.lock)?;
        }
        Ok(())
    }
}

/// The SQL that creates all functions and records their fingerprint.
fn functions() -> String {
    format!(
        "{};\nINSERT INTO standpipe.migrations (version, name) VALUES (0, '{}')
         ON CONFLICT (version) DO UPDATE SET name = excluded.name, applied_at = now()",
        FUNCTIONS.join("\n"),
        fingerprint()
    )
}

fn note_version(version: i32, name: &str) -> String {
    format!(
        "INSERT INTO standpipe.migrations (version, name) VALUES ({version}, {}) ON CONFLICT (version) DO NOTHING",
        literal(name)
    )
}

/// The statement, in a form that is allowed in a transaction.
fn plain_index(statement: &Statement) -> String {
    statement.sql.replacen("CREATE INDEX CONCURRENTLY", "CREATE INDEX", 1)
}

fn drop_index(catalogue: &Catalogue, name: &str) -> Run {
    Run::Alone(format!(
        "DROP INDEX CONCURRENTLY IF EXISTS {}.{}",
        identifier(&catalogue.schema),
        identifier(name)
    ))
}

/// An index's name in [`Catalogue::indexes`].
fn index_key(name: &str, table: &str) -> String {
    if table.starts_with("standpipe.") { format!("standpipe.{name}") } else { name.to_owned() }
}

/// `unique_like_user_post` becomes `standpipe_like_user_post`.
fn replacement_name(name: &str) -> String {
    let new = format!("standpipe_{}", name.strip_prefix("unique_").unwrap_or(name));
    // PostgreSQL truncates names to 63 bytes.
    if new.len() <= 63 { new } else { format!("standpipe_{}", hash(name.bytes())) }
}

fn first_words(sql: &str) -> String {
    sql.split_whitespace().take(6).collect::<Vec<_>>().join(" ")
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn literal(text: &str) -> String {
    // Standard-conforming strings: a backslash needs no escape.
    format!("'{}'", text.replace('\'', "''"))
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

/// A hash of all the functions' texts.
fn fingerprint() -> String {
    hash(FUNCTIONS.iter().flat_map(|sql| sql.bytes()))
}

/// FNV-1a: the hash must be stable, not strong.
fn hash(bytes: impl Iterator<Item = u8>) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in bytes {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}
