//! Appending to the stream, with the cursor in the same transaction, under a lease: one reader at a time.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use redis::{RedisError, RedisResult, Script};

use super::accounts::Changes;
use super::gap::Gap;
use super::{Stream, dead_letters, lease};
use crate::event::Reject;
use crate::verify::known::Generation;

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

/// A dead letter from the reader: a part of a frame that can never be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewLetter {
    /// The account that it is about.
    pub account: String,
    /// Identifies the record and version, so that it is kept only once.
    pub key: String,
    /// commit, identity, account.
    pub event_type: &'static str,
    /// The relay's sequence number.
    pub seq: i64,
    /// Why.
    pub reject: Reject,
    /// The operation without its record.
    pub op: String,
    /// The commit without its operations.
    pub data: String,
}

/// Everything that one append adds.
#[derive(Debug, Default)]
pub struct Appendix {
    /// The entries.
    pub entries: Vec<NewEntry>,
    /// Dead letters.
    pub letters: Vec<NewLetter>,
    /// Counts of what is missing, by class; see [`super::gap::MISSED`].
    pub missed: BTreeMap<&'static str, u64>,
    /// A gap before the entries.
    pub gap: Option<Gap>,
    /// The newest revision of the entries; empty for none.
    pub rev: String,
    /// What verification remembers.
    pub accounts: Changes,
}

/// The outcome of an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Entries in the stream that cannot be trimmed yet.
    pub length: u64,
    /// New dead letters.
    pub letters: u64,
    /// Dead letters for which there was no room.
    pub refused: u64,
}

/// The limits on the reader's dead letters.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// For all of them, in bytes.
    pub bytes: u64,
    /// Per account, in letters.
    pub per_account: u64,
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
    /// The epoch that the position belongs to; `None` before our reader named one.
    pub epoch: Option<u64>,
    /// The earliest time at which a new epoch can begin: now, by Redis's clock, and later than all entries.
    pub next_epoch: u64,
    /// Whether `acked` belongs to the current numbering.
    pub is_current: bool,
    /// The highest position that there ever was in the epoch.
    pub high: Option<i64>,
    /// That of the heads.
    pub generation: Generation,
}

/// Why the cursor cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CursorError {
    /// Redis could not be reached or refused.
    #[error(transparent)]
    Redis(#[from] RedisError),
    /// Something else is stored there.
    #[error(
        "the cursor in Redis, {key}, holds {text}, which is not a sequence number: SET it to a whole number, or DEL it to \
         start from the relay's live position"
    )]
    Unreadable {
        /// The key.
        key: String,
        /// What it holds, quoted and shortened.
        text: String,
    },
}

/// Why an append changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Another reader is active, or Redis lost the lease.
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

impl Stream {
    /// Reads where to resume, and notes where another program's reader appended since ours did.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or the cursor holds something else than a number.
    pub async fn cursor(&mut self) -> Result<Cursor, CursorError> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("open.lua")));
        type Answers = (Vec<u8>, String, String, String, u64, String, u64, u64);
        let Self { connection, keys } = self;
        let (cursor, relay, acked, epoch, next_epoch, high, current, lossy): Answers = SCRIPT
            .key(&keys.stream)
            .key(&keys.cursor)
            .key(&keys.relay)
            .key(&keys.acked)
            .key(&keys.epoch)
            .key(&keys.epochs)
            .invoke_async(connection)
            .await?;
        Ok(Cursor {
            position: position(&cursor, &keys.cursor)?,
            relay: Some(relay).filter(|relay| !relay.is_empty()),
            acked: acked.parse().ok(),
            epoch: epoch.parse().ok(),
            next_epoch,
            is_current: false,
            high: high.parse().ok(),
            generation: Generation { current, lossy },
        })
    }

    /// Prolongs the lease and reads the figures for the marks.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn gauge(&mut self, token: &str) -> RedisResult<Gauge> {
        type Answers =
            (Option<String>, Option<String>, Option<String>, Option<String>, u64, Option<u64>, String);
        let Self { connection, keys } = self;
        let (cursor, holder, acked, relay, length, acknowledged, info): Answers = redis::pipe()
            .get(&keys.cursor)
            .get(&keys.lease)
            .get(&keys.acked)
            .get(&keys.relay)
            .xlen(&keys.stream)
            .hget(&keys.watch, "acknowledged")
            .cmd("INFO")
            .query_async(connection)
            .await?;
        let field = |name: &str| super::server::field(&info, name);
        let lease = holder.as_deref() == Some(token);
        if lease {
            // PEXPIRE works even when memory is full; SET does not.
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
            length: length.saturating_sub(acknowledged.unwrap_or(0)),
            used_memory: field("used_memory").parse().unwrap_or(0),
            max_memory: field("maxmemory").parse().unwrap_or(0),
            run_id: field("run_id").to_owned(),
        })
    }

    /// Appends entries and sets the cursor, in one transaction.
    ///
    /// # Errors
    ///
    /// [`AppendError`]; nothing was written, except that after [`AppendError::Redis`] this is unknown.
    pub async fn append(
        &mut self,
        to: Move<'_>,
        budget: Budget,
        what: &Appendix,
    ) -> Result<Appended, AppendError> {
        let Self { connection, keys } = self;
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
            .key(&keys.epoch)
            .key(&keys.epochs)
            .key(&keys.dead)
            .key(keys.dead_bytes())
            .key(keys.dead_keys())
            .key(keys.dead_accounts())
            .key(&keys.missed)
            .key(&keys.gaps)
            .arg(to.believed.map_or_else(String::new, |cursor| cursor.to_string()))
            .arg(to.position)
            .arg(to.relay)
            .arg(to.token)
            .arg(lease::LIFE.as_millis() as u64)
            .arg(to.epoch)
            .arg(&what.rev)
            .arg(budget.bytes)
            .arg(budget.per_account)
            .arg(what.entries.len());
        for entry in &what.entries {
            invocation.arg(entry.event_type).arg(&entry.data).arg(entry.seq);
        }
        invocation.arg(what.letters.len());
        for letter in &what.letters {
            let fields = dead_letters::fields_of(letter);
            invocation.arg(&letter.account).arg(&letter.key).arg(fields.len() * 2);
            for (name, value) in fields {
                invocation.arg(name).arg(value);
            }
        }
        what.accounts.add_to(&mut invocation, keys);
        for (name, count) in &what.missed {
            invocation.arg(*name).arg(*count);
        }
        if let Some(gap) = &what.gap {
            // Texts and numbers can always be written as JSON.
            invocation.arg("gap").arg(serde_json::to_string(gap).unwrap_or_default());
        }
        let (length, letters, _, refused): (u64, u64, u64, u64) = invocation.invoke_async(connection).await?;
        Ok(Appended { length, letters, refused })
    }

    /// The cursor, and the relay that it belongs to.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn cursor_and_relay(&mut self) -> RedisResult<(Option<String>, Option<String>)> {
        let Self { connection, keys } = self;
        redis::cmd("MGET").arg(&keys.cursor).arg(&keys.relay).query_async(connection).await
    }
}

/// The number in the cursor's text. Strict: an append would not match a text that is not exactly as we write it.
fn position(text: &[u8], key: &str) -> Result<Option<i64>, CursorError> {
    if text.is_empty() {
        return Ok(None);
    }
    let number = std::str::from_utf8(text).ok().and_then(|text| {
        let number: i64 = text.parse().ok()?;
        (number >= 0 && number.to_string() == text).then_some(number)
    });
    number.map(Some).ok_or_else(|| {
        let text: String = String::from_utf8_lossy(text).chars().take(40).collect();
        CursorError::Unreadable { key: key.to_owned(), text: format!("{text:?}") }
    })
}

/// The cursor in Redis, for comparison with what this reader wrote, and the figures that decide when to slow down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gauge {
    /// The cursor's text; `None` when there is none.
    pub cursor: Option<String>,
    /// Whether the lease was still ours (and has been prolonged).
    pub lease: bool,
    /// Entries in the stream.
    pub length: u64,
    /// Bytes of memory that Redis uses.
    pub used_memory: u64,
    /// Its memory limit in bytes; 0 for none.
    pub max_memory: u64,
    /// The position before the lowest that the group has not acknowledged.
    pub acked: Option<i64>,
    /// The relay that both positions belong to; `None` when another program wrote them.
    pub relay: Option<String>,
    /// The server's identity since its last start.
    pub run_id: String,
}

/// The cursor before and after an append.
#[derive(Clone, Copy, Debug)]
pub struct Move<'a> {
    /// Our identity as the lease's holder.
    pub token: &'a str,
    /// The relay's name.
    pub relay: &'a str,
    /// The epoch of the new position.
    pub epoch: u64,
    /// The cursor as this reader left it.
    pub believed: Option<i64>,
    /// The new one.
    pub position: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_must_be_a_plain_number() {
        let read = |text: &str| position(text.as_bytes(), "firehose:cursor");
        assert_eq!(read("").unwrap(), None);
        assert_eq!(read("12345").unwrap(), Some(12345));
        for text in ["7\n", "12345.0", "\"12345\"", "-1", "+5", "007", "1e5", " 5"] {
            let said = read(text).unwrap_err().to_string();
            assert!(said.contains("firehose:cursor") && said.contains("not a sequence number"), "{said}");
        }
    }
}
