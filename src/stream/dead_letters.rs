//! What can never be applied, kept with everything needed to judge it and to apply it after a correction.

use std::sync::LazyLock;

use redis::aio::MultiplexedConnection;
use redis::streams::StreamRangeReply;
use redis::{RedisResult, Script};

use super::Keys;
use super::entry::Entry;
use crate::event::{EntryId, Rejected};

static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("dead_letter.lua")));

/// What became of an entry that has something bad in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buried {
    /// It is acknowledged, and its bad parts are among the dead letters.
    Done,
    /// Somebody else had acknowledged it already.
    Already,
    /// The dead letters have reached their budget; the entry stays pending.
    Full,
}

/// Acknowledges an entry and keeps its bad operations, in one transaction.
///
/// # Errors
///
/// Redis cannot be reached or its memory is full; the entry then stays pending.
pub async fn bury(
    connection: &mut MultiplexedConnection,
    keys: &Keys,
    entry: &Entry,
    rejected: &[Rejected],
    budget: u64,
) -> RedisResult<Buried> {
    let mut invocation = SCRIPT.prepare_invoke();
    invocation
        .key(&keys.stream)
        .key(&keys.dead)
        .key(format!("{}:bytes", keys.dead))
        .arg(&keys.group)
        .arg(entry.id.to_string())
        .arg(budget);
    let now = jiff::Timestamp::now().to_string();
    for letter in rejected {
        let fields = [
            ("source_id", entry.id.to_string()),
            ("type", entry.event_type.clone()),
            ("seq", entry.seq.clone()),
            ("reason", letter.reject.reason.name().to_owned()),
            ("sqlstate", letter.reject.sqlstate.clone().unwrap_or_default()),
            ("message", letter.reject.message.clone()),
            ("op", letter.op.clone()),
            ("data", without_ops(entry)),
            ("time", now.clone()),
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ];
        invocation.arg(fields.len() * 2);
        for (name, value) in fields {
            invocation.arg(name).arg(value);
        }
    }
    let answer: i64 = invocation.invoke_async(connection).await?;
    Ok(match answer {
        1 => Buried::Done,
        0 => Buried::Already,
        _ => Buried::Full,
    })
}

/// The oldest entry that may still be applied: in the stream or among the dead letters; Unix milliseconds.
///
/// # Errors
///
/// Redis cannot be reached.
pub async fn oldest_source(connection: &mut MultiplexedConnection, keys: &Keys) -> RedisResult<Option<u64>> {
    let mut oldest = range(connection, &keys.stream, "-", 1).await?.ids.first().map(|entry| id_ms(&entry.id));
    let mut from = "-".to_owned();
    loop {
        // Dead letters stand in the order in which they died, not in that of their sources: all are looked at.
        let page = range(connection, &keys.dead, &from, 200).await?.ids;
        let Some(last) = page.last() else { return Ok(oldest) };
        from = format!("({}", last.id);
        for letter in &page {
            let source: Option<String> = letter.get("source_id");
            let ms = source.map_or(0, |id| id_ms(&id));
            oldest = Some(oldest.map_or(ms, |before| before.min(ms)));
        }
    }
}

async fn range(
    connection: &mut MultiplexedConnection,
    key: &str,
    from: &str,
    count: usize,
) -> RedisResult<StreamRangeReply> {
    redis::cmd("XRANGE").arg(key).arg(from).arg("+").arg("COUNT").arg(count).query_async(connection).await
}

/// The milliseconds of an entry's id; 0, older than everything, for what is none.
fn id_ms(id: &str) -> u64 {
    id.parse::<EntryId>().map_or(0, |id| id.ms)
}

/// The event around the operation: a commit's `repo`, `rev` and the like without its other operations, which may be
/// large and have been applied.
fn without_ops(entry: &Entry) -> String {
    match serde_json::from_str::<serde_json::Value>(&entry.data) {
        Ok(serde_json::Value::Object(mut data)) => {
            data.remove("ops");
            serde_json::Value::Object(data).to_string()
        }
        _ => String::new(),
    }
}
