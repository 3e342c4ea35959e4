//! The settings that we rely on: set on every new connection, and read back. None is inherited from the
//! database, the role, a startup parameter or a pooler.

use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::{Client, SimpleQueryMessage};

use super::StoreError;
use super::verdict::Verdict;
use crate::config::{Config, DatabaseUrl};

/// Time limit for a new connection's first answers.
const ANSWER: Duration = Duration::from_secs(8);

/// Settings of every connection by name, with the value that each must have. The functions lock first and read afterwards: at
/// any other isolation level they would read the state from before the lock.
const COMMON: &[(&str, &str)] = &[
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_deferrable", "off"),
    ("client_encoding", "UTF8"),
    ("standard_conforming_strings", "on"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
    ("idle_in_transaction_session_timeout", "1min"),
    ("transform_null_equals", "off"),
    ("check_function_bodies", "on"),
];

/// Settings of connections that only run our own statements. Plans are made once and kept (generic); on young tables
/// without statistics the planner would choose sequential scans and hash joins, and keep those, although every access
/// here is by key.
const OURS: &[(&str, &str)] = &[
    ("lock_timeout", "10s"),
    ("row_security", "off"),
    ("jit", "off"),
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_indexscan", "on"),
    ("enable_bitmapscan", "on"),
    ("enable_nestloop", "on"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
];

/// Settings that only a superuser may change, with the required value: if it differs, we refuse to work.
const REQUIRED: &[(&str, &str, &str)] = &[(
    "session_replication_role",
    "origin",
    "triggers and foreign keys would be skipped; ALTER ROLE ... RESET session_replication_role, and the same for the database",
)];

/// The statements that make the settings of a connection for events.
#[must_use]
pub fn of(config: &Config, url: &DatabaseUrl) -> String {
    settings(config, url, &[COMMON, OURS].concat(), config.db_statement_timeout)
}

/// The statements that make the settings of a connection for the operator's functions, which may need any plan.
#[must_use]
pub fn for_handlers(config: &Config, url: &DatabaseUrl) -> String {
    let mut sql = settings(config, url, COMMON, config.handler_timeout);
    // Events wait for the disk in a transaction of their own (flush.sql), these in each.
    sql.push_str(
        "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
             WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false);\n",
    );
    sql
}

fn settings(config: &Config, url: &DatabaseUrl, fixed: &[(&str, &str)], timeout: Duration) -> String {
    let mut sql = String::new();
    let mut set = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(sql, "SELECT set_config('{name}', '{}', false);", value.replace('\'', "''"));
    };
    for (name, value) in fixed {
        set(name, value);
    }
    set("statement_timeout", &format!("{}ms", timeout.as_millis()));
    // Only the flushing transaction decides on this at its end: see `Session::flush`.
    let notifications = match (config.notifications, config.notify_within) {
        (false, _) => "off".to_owned(),
        (true, None) => "on".to_owned(),
        (true, Some(within)) => within.as_secs().to_string(),
    };
    set("standpipe.notifications", &notifications);
    match url.schema() {
        Some(schema) => set("search_path", &format!("\"{}\"", schema.replace('"', "\"\""))),
        // A role named standpipe has our own schema first on its default search path ("$user", public), but the
        // application's tables are elsewhere. The operator's setting for role or database is resolved to actual
        // schemas.
        None => sql.push_str(
            "SELECT set_config('search_path', coalesce(
                 (SELECT string_agg(quote_ident(s), ', ') FROM unnest(current_schemas(false)) s
                  WHERE s NOT IN ('standpipe', 'pg_catalog')),
                 'public'), false);\n",
        ),
    }
    sql.push_str("SELECT name, setting FROM pg_settings WHERE name IN ('session_replication_role');\n");
    sql.push_str("SELECT 'server_encoding', getdatabaseencoding();\n");
    sql
}

/// Makes the settings and verifies the result.
///
/// # Errors
///
/// The connection broke, or the server or a pooler on the way does not let us work; then the verdict is
/// [`Verdict::Halt`].
pub async fn apply(client: &Client, settings: &str) -> Result<(), StoreError> {
    let late =
        |_| StoreError::new(Verdict::Reconnect, format!("no answer within {ANSWER:?} to the first request"));
    tokio::time::timeout(ANSWER, make(client, settings)).await.map_err(late)?
}

async fn make(client: &Client, settings: &str) -> Result<(), StoreError> {
    // A message of its own: the limit in force counts from the beginning of a message.
    client.batch_execute("SET statement_timeout = '8s'").await?;
    let answers = client.simple_query(settings).await?;
    for row in answers.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) if row.len() == 2 => Some(row),
        _ => None,
    }) {
        let (name, value) = (row.get(0).unwrap_or_default(), row.get(1).unwrap_or_default());
        if let Some((_, wanted, why)) = REQUIRED.iter().find(|(required, ..)| *required == name)
            && value != *wanted
        {
            return Err(StoreError::new(
                Verdict::Halt,
                format!("{name} is {value} on our connections, but must be {wanted}: {why}"),
            ));
        }
        if name == "server_encoding" && value != "UTF8" {
            return Err(StoreError::new(
                Verdict::Halt,
                format!(
                    "the database's encoding is {value}, which cannot store characters that most records contain: \
                     recreate it, CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
                ),
            ));
        }
    }
    session_is_ours(client, &format!("{:016x}", fastrand::u64(..))).await
}

/// Whether a setting made in one transaction is still there in the next.
async fn session_is_ours(client: &Client, token: &str) -> Result<(), StoreError> {
    client.batch_execute(&format!("SELECT set_config('standpipe.session', '{token}', false)")).await?;
    let answers = client.simple_query("SELECT current_setting('standpipe.session', true)").await?;
    let same = answers
        .iter()
        .any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some(token)));
    if same { Ok(()) } else { Err(StoreError::new(Verdict::Halt, TRANSACTION_MODE)) }
}

/// Detects reliably what [`apply`] detects only if the pooler happens to choose another server process: while one
/// connection holds a transaction open, the other must still have its own server process.
///
/// # Errors
///
/// As for [`apply`].
pub async fn refuse_transaction_pooling(one: &Client, other: &Client) -> Result<(), StoreError> {
    const PID: &str = include_str!("../../sql/store/backend_pid.sql");
    let pid = async |client: &Client| -> Result<Option<String>, StoreError> {
        let answers = client.simple_query(PID).await?;
        Ok(answers.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        }))
    };
    let before = pid(one).await?;
    other.batch_execute("BEGIN").await?;
    let held = pid(other).await?;
    let after = pid(one).await?;
    other.batch_execute("ROLLBACK").await?;
    if before == after && held != after {
        Ok(())
    } else {
        Err(StoreError::new(Verdict::Halt, TRANSACTION_MODE))
    }
}

/// The explanation for an operator with such a pooler.
pub const TRANSACTION_MODE: &str = "a pooler between here and PostgreSQL gives each transaction a different server process (pool_mode = transaction or \
     statement): locks, settings and prepared statements would be lost; point DATABASE_URL at PostgreSQL itself, or set \
     pool_mode = session for this database";

/// For `standpipe check`: the settings that differ, with their name, actual value and required value.
///
/// # Errors
///
/// The server cannot be reached.
pub async fn different(client: &Client) -> Result<Vec<(String, String, &'static str)>, StoreError> {
    let mut different = Vec::new();
    for (name, wanted) in COMMON.iter().chain(OURS) {
        let is: String = client.query_one("SELECT current_setting($1)", &[name]).await?.get(0);
        if is != *wanted {
            different.push(((*name).to_owned(), is, *wanted));
        }
    }
    Ok(different)
}
