//! Errors of the store.

use deadpool_postgres::{HookError, PoolError, TimeoutType};
use tokio_postgres::Error;

use super::verdict::{self, Verdict, describe, judge};
use crate::event::{Reason, Reject};

/// The SQLSTATE with which `standpipe.is_dead` refuses an operation.
const TOO_OLD: &str = "22S01";
/// Prefix of a message that needs operator action.
const HALT: &str = "halt: ";

/// Why a call to the store failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// What to do about it.
    pub verdict: Verdict,
    /// What happened, without secrets.
    pub message: String,
    /// The SQLSTATE, when PostgreSQL reported it.
    pub sqlstate: Option<String>,
    /// The operator's own function that raised it, such as a trigger's.
    pub function: Option<String>,
    /// Whether it ended the connection.
    pub fatal: bool,
}

impl StoreError {
    /// An error that PostgreSQL did not report.
    #[must_use]
    pub fn new(verdict: Verdict, message: impl Into<String>) -> Self {
        Self { verdict, message: message.into(), sqlstate: None, function: None, fatal: false }
    }

    /// Whether a table is not there.
    #[must_use]
    pub fn is_missing_table(&self) -> bool {
        self.sqlstate.as_deref() == Some("42P01")
    }

    /// The refusal as a reject of the event.
    pub(super) fn reject(&self) -> Reject {
        let (reason, message) = match &self.function {
            Some(function) => {
                (Reason::Trigger, format!("the function {function} refused it: {}", self.message))
            }
            None if self.sqlstate.as_deref() == Some(TOO_OLD) => {
                let message =
                    "it is older than TOMBSTONE_RETENTION, and the record may have been deleted since";
                (Reason::TooOld, message.to_owned())
            }
            None => (Reason::Database, self.message.clone()),
        };
        Reject { reason, message, sqlstate: self.sqlstate.clone() }
    }
}

impl From<&Error> for StoreError {
    fn from(error: &Error) -> Self {
        Self {
            verdict: judge(error),
            message: describe(error),
            sqlstate: error.code().map(|code| code.code().to_owned()),
            function: verdict::operators_function(error),
            fatal: verdict::is_fatal(error),
        }
    }
}

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

impl From<PoolError> for StoreError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => {
                Self::from(&error)
            }
            PoolError::Timeout(TimeoutType::Wait) => Self::new(
                Verdict::Retry,
                "all connections were in use for 10 s: DB_POOL_SIZE may be too small",
            ),
            PoolError::Timeout(_) => {
                Self::new(Verdict::Reconnect, "no answer to a connection attempt for 10 s")
            }
            PoolError::PostCreateHook(HookError::Message(message)) => match message.strip_prefix(HALT) {
                Some(message) => Self::new(Verdict::Halt, message),
                None => Self::new(Verdict::Reconnect, message),
            },
            other => Self::new(Verdict::Reconnect, other.to_string()),
        }
    }
}

pub(super) fn hook_error(error: &StoreError) -> HookError {
    // The pool's error carries only text, so the verdict is put in front of it, for `From<PoolError>`.
    let verdict = if error.verdict == Verdict::Halt { HALT } else { "" };
    HookError::message(format!("{verdict}{}", error.message))
}
