//! Reading what the group has applied, without being part of it.

use std::collections::HashMap;
use std::sync::LazyLock;

use redis::streams::StreamRangeReply;
use redis::{RedisResult, Script, Value};

use super::Stream;
use super::entry::Batch;
use crate::event::{Entry, EntryId};

static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("settled.lua")));

/// A place in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Behind the last entry that is settled.
    Now,
    /// Behind everything with this id or a lower one, whether or not there ever was such an entry. Where nothing that is settled
    /// is behind it, as with an id in the future, the same as now.
    Behind(EntryId),
    /// Behind this entry, which was read. Unless it is still there, others behind it may be gone, too.
    Read(EntryId),
}

/// An entry that the group has acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The entry.
    pub entry: Entry,
    /// The paths of its operations that ended as dead letters; a single `*` for the whole entry.
    pub refused: Vec<String>,
}

impl Stream {
    /// The last entry; or the last one up to this id.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn last_entry(&mut self, until: Option<EntryId>) -> RedisResult<Option<EntryId>> {
        let Self { connection, keys } = self;
        let until = until.map_or("+".to_owned(), |id| id.to_string());
        let last: StreamRangeReply = redis::cmd("XREVRANGE")
            .arg(&keys.stream)
            .arg(&[&*until, "-", "COUNT", "1"])
            .query_async(connection)
            .await?;
        Ok(last.ids.first().and_then(|entry| entry.id.parse().ok()))
    }

    /// Whether nothing was ever removed, as far as the server tells (Redis 7.0).
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn is_whole(&mut self) -> RedisResult<bool> {
        let Self { connection, keys } = self;
        let info: HashMap<String, Value> =
            redis::cmd("XINFO").arg("STREAM").arg(&keys.stream).query_async(connection).await?;
        let (length, added) = (info.get("length"), info.get("entries-added"));
        Ok(length.is_some() && length == added)
    }

    /// Forgets what was refused of entries that are no longer in the stream.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn forget_refused(&mut self) -> RedisResult<()> {
        let Self { connection, keys } = self;
        let first: StreamRangeReply = redis::cmd("XRANGE")
            .arg(&keys.stream)
            .arg(&["-", "+", "COUNT", "1"])
            .query_async(connection)
            .await?;
        let first = first.ids.first().and_then(|entry| entry.id.parse::<EntryId>().ok());
        let mut cursor = 0;
        loop {
            let (next, page) = super::page::<String>(connection, &keys.refused, cursor).await?;
            let gone = page.iter().map(|(id, _)| id).filter(|id| id.parse().ok() < first || first.is_none());
            let gone: Vec<&String> = gone.collect();
            if !gone.is_empty() {
                redis::cmd("HDEL").arg(&keys.refused).arg(gone).query_async::<()>(connection).await?;
            }
            cursor = next;
            if cursor == 0 {
                return Ok(());
            }
        }
    }

    /// Reads entries that the group has acknowledged, up to the first one that it has not, and moves the place behind them.
    /// Returns `None` if some of those after the place may have been removed.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or refuses.
    pub async fn settled(&mut self, place: &mut Place, count: usize) -> RedisResult<Option<Vec<Settled>>> {
        let Self { connection, keys } = self;
        let (after, anchor) = match place {
            Place::Now => (String::new(), String::new()),
            Place::Behind(id) => (id.to_string(), String::new()),
            Place::Read(id) => (id.to_string(), id.to_string()),
        };
        let (is_there, last_settled, entries, refused): (u8, String, Value, Vec<String>) = SCRIPT
            .key(&keys.stream)
            .key(&keys.refused)
            .arg(&keys.group)
            .arg(after)
            .arg(anchor)
            .arg(count)
            .invoke_async(connection)
            .await?;
        if is_there == 0 {
            return Ok(None);
        }
        let mut batch = Batch::default();
        batch.extend(entries)?;
        if let Some(last) = batch.entries.last() {
            *place = Place::Read(last.id);
        } else if let Ok(id) = last_settled.parse::<EntryId>() {
            // From now on, it shows whether something is missing. Whatever is behind it is not settled yet, so that nobody
            // can have read it.
            *place = if id == EntryId::default() { Place::Behind(id) } else { Place::Read(id) };
        }
        let mut refused = refused.into_iter();
        let settled = batch.entries.into_iter().map(|entry| Settled {
            entry,
            refused: refused.next().map(|text| paths(&text)).unwrap_or_default(),
        });
        Ok(Some(settled.collect()))
    }

    /// The paths of the operations that ended as dead letters, of each of these entries; a single `*` for a whole entry.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn refused(&mut self, ids: &[String]) -> RedisResult<Vec<Vec<String>>> {
        let Self { connection, keys } = self;
        let found: Vec<Option<String>> =
            redis::cmd("HMGET").arg(&keys.refused).arg(ids).query_async(connection).await?;
        Ok(found.into_iter().map(|text| paths(&text.unwrap_or_default())).collect())
    }
}

/// As `dead_letter.lua` notes them; nothing for an empty text.
fn paths(text: &str) -> Vec<String> {
    if text.is_empty() {
        return Vec::new();
    }
    serde_json::from_str(text).unwrap_or_else(|_| vec!["*".to_owned()])
}
