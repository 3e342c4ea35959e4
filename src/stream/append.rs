//! Appending to the stream, with the cursor in the same transaction, under a lease: one reader at a time.

use std::sync::LazyLock;

use redis::aio::MultiplexedConnection;
use redis::{RedisError, RedisResult, Script};

use super::{Keys, lease};

static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("append.lua")));

/// An entry to append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewEntry {
    /// commit, identity, account, sync.
    pub event_type: &'static str,
    /// JSON.
    pub data: String,
    /// The relay's sequence number.
    pub seq: i64,
}

/// The position from which a reader resumes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// The relay position up to which everything is in the stream; `None` on a first start.
    pub position: Option<i64>,
    /// The relay that the position belongs to; `None` when another program wrote it.
    pub relay: Option<String>,
    /// The position before the lowest that the group has not acknowledged.
    pub acked: Option<i64>,
}

/// Why an append changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Somebody else reads the relay, or Redis lost the lease.
    #[error("the reader's lease is gone")]
    LeaseLost,
    /// Redis rolled back, or somebody set the cursor.
    #[error("the cursor in Redis is not where this reader left it")]
    CursorMoved,
    /// Somebody deleted the stream.
    #[error("the stream is gone")]
    StreamGone,
    /// Redis could not be reached or refused, for example because its memory is full.
    #[error(transparent)]
    Redis(RedisError),
}

impl From<RedisError> for AppendError {
    fn from(error: RedisError) -> Self {
        match error.code() {
            Some("LEASELOST") => Self::LeaseLost,
            Some("CURSORMOVED") => Self::CursorMoved,
            Some("STREAMGONE") => Self::StreamGone,
            _ => Self::Redis(error),
        }
    }
}

/// Reads where to resume.
///
/// # Errors
///
/// Redis cannot be reached.
pub async fn read_cursor(connection: &mut MultiplexedConnection, keys: &Keys) -> RedisResult<Cursor> {
    let (position, relay, acked): (Option<String>, Option<String>, Option<String>) = redis::cmd("MGET")
        .arg(&keys.cursor)
        .arg(&keys.relay)
        .arg(&keys.acked)
        .query_async(connection)
        .await?;
    let number = |text: Option<String>| text.and_then(|text| text.trim().parse().ok());
    Ok(Cursor { position: number(position), relay, acked: number(acked) })
}

/// The cursor as it stands in Redis, to be compared with what this reader wrote; and what is needed to slow down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gauge {
    /// The cursor's text; `None` when there is none.
    pub cursor: Option<String>,
    /// Whether the lease was still ours (and has been prolonged).
    pub lease: bool,
    /// Entries in the stream.
    pub length: u64,
    /// Bytes that Redis uses.
    pub used_memory: u64,
    /// Bytes that it may use; 0 for no limit.
    pub max_memory: u64,
    /// The position before the lowest that the group has not acknowledged.
    pub acked: Option<i64>,
    /// The relay that both positions belong to; `None` when another program wrote them.
    pub relay: Option<String>,
    /// The server's identity since its last start.
    pub run_id: String,
}

/// Prolongs the lease and looks at the marks.
///
/// # Errors
///
/// Redis cannot be reached.
pub async fn gauge(connection: &mut MultiplexedConnection, keys: &Keys, token: &str) -> RedisResult<Gauge> {
    type Answers = (Option<String>, Option<String>, Option<String>, Option<String>, u64, String);
    let (cursor, holder, acked, relay, length, info): Answers = redis::pipe()
        .get(&keys.cursor)
        .get(&keys.lease)
        .get(&keys.acked)
        .get(&keys.relay)
        .xlen(&keys.stream)
        .cmd("INFO")
        .query_async(connection)
        .await?;
    let field = |name: &str| {
        info.lines()
            .find_map(|line| line.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')))
            .unwrap_or("")
    };
    let lease = holder.as_deref() == Some(token);
    if lease {
        // PEXPIRE works when memory is full, SET does not.
        redis::cmd("PEXPIRE")
            .arg(&keys.lease)
            .arg(lease::LIFE.as_millis() as u64)
            .query_async::<i64>(connection)
            .await?;
    }
    Ok(Gauge {
        cursor,
        lease,
        acked: acked.and_then(|text| text.parse().ok()),
        relay,
        length,
        used_memory: field("used_memory").trim().parse().unwrap_or(0),
        max_memory: field("maxmemory").trim().parse().unwrap_or(0),
        run_id: field("run_id").trim().to_owned(),
    })
}

/// Appends entries and sets the cursor, in one transaction.
///
/// `believed` is the cursor as this reader left it. Returns the length of the stream.
///
/// # Errors
///
/// [`AppendError`]; nothing was written, except that after [`AppendError::Redis`] nobody knows.
pub async fn append(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    token: &str,
    relay: &str,
    believed: Option<i64>,
    position: i64,
    entries: &[NewEntry],
) -> Result<u64, AppendError> {
    let mut invocation = SCRIPT.prepare_invoke();
    invocation
        .key(&keys.stream)
        .key(&keys.cursor)
        .key(&keys.relay)
        .key(&keys.acked)
        .key(&keys.lease)
        .key(&keys.start)
        .key(&keys.watch)
        .key(&keys.trimmed)
        .arg(believed.map_or_else(String::new, |cursor| cursor.to_string()))
        .arg(position)
        .arg(relay)
        .arg(token)
        .arg(lease::LIFE.as_millis() as u64);
    for entry in entries {
        invocation.arg(entry.event_type).arg(&entry.data).arg(entry.seq);
    }
    Ok(invocation.invoke_async(connection).await?)
}
