//! From an error to the fate of the event: a closed set, decided here and nowhere else.

use tokio_postgres::Error;
use tokio_postgres::error::{DbError, Severity, SqlState};

/// What an error means for the event that ran into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection, or our assumptions about it, are in doubt: everything since the last flush is applied again on a
    /// new one.
    Reconnect,
    /// The transaction lost to another, or the server was short of resources: retried after a pause.
    Retry,
    /// The values can never be stored: the operation becomes a dead letter.
    Reject,
    /// Our own fault, or the operator's: halt and report it. Turning the whole stream into dead letters would be worse.
    Halt,
}

/// The verdict on an error of the driver.
#[must_use]
pub fn judge(error: &Error) -> Verdict {
    match error.code() {
        // Whatever its code, the operator's function refused these values.
        Some(code)
            if !matches!(judge_code(code), Verdict::Reconnect | Verdict::Retry) && is_operators(error) =>
        {
            Verdict::Reject
        }
        // A NOT NULL column that we never write was added by the operator; every row would be refused.
        Some(&SqlState::NOT_NULL_VIOLATION) if is_foreign_column(error) => Verdict::Halt,
        Some(code) => judge_code(code),
        // A value that does not fit its parameter never left this process: our own fault. Everything else without a
        // code is a connection that broke or was never established.
        None if is_conversion(error) => Verdict::Halt,
        None => Verdict::Reconnect,
    }
}

fn judge_code(code: &SqlState) -> Verdict {
    let code = code.code();
    match code {
        // serialization_failure, deadlock_detected, lock_not_available, query_canceled (statement_timeout)
        "40001" | "40P01" | "55P03" | "57014" => Verdict::Retry,
        // untranslatable_character: the database's encoding is not UTF8, so that other texts would fail, too
        "22P05" => Verdict::Halt,
        // read_only_sql_transaction (a standby after a failover), in_failed_sql_transaction,
        // invalid_sql_statement_name (a pooler gave us another session), feature_not_supported (a cached plan whose
        // tables changed)
        // Also admin_shutdown, crash_shutdown, cannot_connect_now.
        "25006" | "25P02" | "26000" | "0A000" | "57P01" | "57P02" | "57P03" => Verdict::Reconnect,
        _ => match code.get(..2) {
            // connection exceptions; system errors such as I/O
            Some("08" | "58") => Verdict::Reconnect,
            // insufficient resources: disk full, out of memory, too many connections
            Some("53") => Verdict::Retry,
            // cardinality, data, integrity; program limits such as an index row that is too long
            Some("21" | "22" | "23" | "54") => Verdict::Reject,
            // 42 undefined or forbidden, 28 authorisation, 3D no such database, and whatever is not listed
            _ => Verdict::Halt,
        },
    }
}

/// The operator's own function that raised the error, if any, such as a trigger's.
#[must_use]
pub fn operators_function(error: &Error) -> Option<String> {
    let context = error.as_db_error()?.where_()?;
    // "PL/pgSQL function name(arguments) line 3 at RAISE", "SQL function "name" statement 1", innermost first.
    context.lines().find_map(|line| {
        let rest = line.strip_prefix("PL/pgSQL function ").or_else(|| line.strip_prefix("SQL function "))?;
        let name = rest.split(['(', ' ']).next()?.trim_matches('"');
        (!name.is_empty() && !super::migrate::is_our_function(name) && name != "inline_code_block")
            .then(|| name.to_owned())
    })
}

/// Whether the server has ended the connection with this error.
#[must_use]
pub fn is_fatal(error: &Error) -> bool {
    let severity = error.as_db_error().and_then(DbError::parsed_severity);
    matches!(severity, Some(Severity::Fatal | Severity::Panic))
}

fn is_operators(error: &Error) -> bool {
    operators_function(error).is_some()
}

fn is_foreign_column(error: &Error) -> bool {
    let column = error.as_db_error().and_then(|error| Some((error.table()?, error.column()?)));
    column.is_some_and(|(table, column)| !super::migrate::is_ours(table, column))
}

fn is_conversion(error: &Error) -> bool {
    // The driver has no code for it; its text is fixed.
    error.to_string().starts_with("error serializing parameter")
}

/// The error with its causes on one line: the driver's own text is only "db error". Never holds the password.
#[must_use]
pub fn describe(error: &Error) -> String {
    if let Some(db) = error.as_db_error() {
        let detail = db.detail().map(|detail| format!(" ({detail})")).unwrap_or_default();
        return format!("{}: {}{detail}", db.code().code(), db.message());
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_sqlstate_has_its_verdict() {
        let verdict = |code: &str| judge_code(&SqlState::from_code(code));
        for code in ["40001", "40P01", "53100", "53200", "53300", "55P03", "57014"] {
            assert_eq!(verdict(code), Verdict::Retry, "{code}");
        }
        for code in ["08006", "08000", "25006", "25P02", "26000", "0A000", "57P01", "57P02", "57P03", "58030"]
        {
            assert_eq!(verdict(code), Verdict::Reconnect, "{code}");
        }
        for code in ["21000", "22001", "22021", "23502", "23505", "23514", "54000"] {
            assert_eq!(verdict(code), Verdict::Reject, "{code}");
        }
        for code in ["22P05", "42P01", "42501", "28P01", "3D000", "XX000", "20000", "P0001"] {
            assert_eq!(verdict(code), Verdict::Halt, "{code}");
        }
    }
}
