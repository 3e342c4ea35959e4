//! Dead letters: what can never be applied, kept with everything needed to judge it and to apply it after a fix.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use redis::aio::MultiplexedConnection;
use redis::streams::{StreamId, StreamRangeReply};
use redis::{RedisResult, Script};
use serde::Serialize;

use super::Stream;
use super::append::NewLetter;
use crate::event::{Entry, EntryId, InvalidEntryId, Reason, Reject, Rejected};

static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("dead_letter.lua")));
/// The most entries that outputs can be told about; see settled.lua.
const MAX_REFUSED: u64 = 100_000;

static REPLACE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("replace_dead_letter.lua")));

impl Stream {
    /// The number of dead letters.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn count_dead_letters(&mut self) -> RedisResult<u64> {
        let Self { connection, keys } = self;
        redis::cmd("XLEN").arg(&keys.dead).query_async(connection).await
    }

    /// Their total size in bytes.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn dead_letter_bytes(&mut self) -> RedisResult<u64> {
        let Self { connection, keys } = self;
        let bytes: Option<u64> = redis::cmd("GET").arg(keys.dead_bytes()).query_async(connection).await?;
        Ok(bytes.unwrap_or(0))
    }

    /// A page of letters, oldest first, after the one with this id.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn dead_letters(&mut self, after: Option<&str>, count: usize) -> RedisResult<Vec<Letter>> {
        let Self { connection, keys } = self;
        let from = after.map_or_else(|| "-".to_owned(), |id| format!("({id}"));
        let page = range(connection, &keys.dead, &from, count).await?;
        Ok(page.ids.iter().map(Letter::from_stream).collect())
    }

    /// A page of letters, newest first, before the one with this id.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn dead_letters_before(
        &mut self,
        before: Option<&str>,
        count: usize,
    ) -> RedisResult<Vec<Letter>> {
        let Self { connection, keys } = self;
        let from = before.map_or_else(|| "+".to_owned(), |id| format!("({id}"));
        let page: StreamRangeReply = redis::cmd("XREVRANGE")
            .arg(&keys.dead)
            .arg(from)
            .arg("-")
            .arg("COUNT")
            .arg(count)
            .query_async(connection)
            .await?;
        Ok(page.ids.iter().map(Letter::from_stream).collect())
    }

    /// The id of the newest letter.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn newest_dead_letter(&mut self) -> RedisResult<Option<EntryId>> {
        let Self { connection, keys } = self;
        let found: StreamRangeReply = redis::cmd("XREVRANGE")
            .arg(&keys.dead)
            .arg("+")
            .arg("-")
            .arg("COUNT")
            .arg(1)
            .query_async(connection)
            .await?;
        Ok(found.ids.first().and_then(|letter| letter.id.parse().ok()))
    }

    /// The number of letters per reason, among the newest `count`.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn dead_letter_reasons(&mut self, count: usize) -> RedisResult<Vec<(String, u64)>> {
        let Self { connection, keys } = self;
        let mut reasons = BTreeMap::new();
        let mut until = "+".to_owned();
        let mut left = count;
        while left > 0 {
            let page: StreamRangeReply = redis::cmd("XREVRANGE")
                .arg(&keys.dead)
                .arg(&until)
                .arg("-")
                .arg("COUNT")
                .arg(left.min(100))
                .query_async(connection)
                .await?;
            let Some(last) = page.ids.last() else { break };
            until = format!("({}", last.id);
            left = left.saturating_sub(page.ids.len());
            for letter in &page.ids {
                *reasons.entry(letter.get::<String>("reason").unwrap_or_default()).or_default() += 1;
            }
        }
        Ok(reasons.into_iter().collect())
    }

    /// The letter with this id.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or the text is not an id.
    pub async fn dead_letter(&mut self, id: &str) -> RedisResult<Option<Letter>> {
        let Self { connection, keys } = self;
        let found: StreamRangeReply =
            redis::cmd("XRANGE").arg(&keys.dead).arg(id).arg(id).query_async(connection).await?;
        Ok(found.ids.first().map(Letter::from_stream))
    }

    /// Removes a letter; `false` if another process already did.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn remove_dead_letter(&mut self, letter: &Letter) -> RedisResult<bool> {
        let Self { connection, keys } = self;
        REPLACE
            .key(&keys.dead)
            .key(keys.dead_bytes())
            .key(keys.dead_keys())
            .key(keys.dead_accounts())
            .arg(&letter.id)
            .invoke_async(connection)
            .await
    }

    /// Records that another attempt at a letter failed, and why.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn update_dead_letter(&mut self, letter: Letter, reject: &Reject) -> RedisResult<bool> {
        let Self { connection, keys } = self;
        let mut invocation = REPLACE.prepare_invoke();
        invocation
            .key(&keys.dead)
            .key(keys.dead_bytes())
            .key(keys.dead_keys())
            .key(keys.dead_accounts())
            .arg(&letter.id);
        for (name, value) in letter.tried(reject, jiff::Timestamp::now().to_string()).fields() {
            invocation.arg(name).arg(value);
        }
        invocation.invoke_async(connection).await
    }

    /// Acknowledges an entry and keeps its bad operations, in one transaction.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or its memory is full; the entry then stays pending.
    pub async fn bury(&mut self, entry: &Entry, rejected: &[Rejected], budget: u64) -> RedisResult<Buried> {
        let letters = rejected.iter().map(|rejected| Letter::new(entry, rejected)).collect();
        self.replace_by(entry, &paths(entry, rejected), MAX_REFUSED, letters, budget).await
    }

    /// The same with a task that can never be done; `id`: its own. It is removed from its stream.
    ///
    /// # Errors
    ///
    /// As for [`Stream::bury`].
    pub async fn bury_task(
        &mut self,
        entry: &Entry,
        id: &str,
        reject: Reject,
        budget: u64,
    ) -> RedisResult<Buried> {
        let letter = Letter::new(entry, &Rejected { reject, op: entry.data.clone() });
        self.replace_by(entry, "", 0, vec![Letter { task: id.to_owned(), ..letter }], budget).await
    }

    async fn replace_by(
        &mut self,
        entry: &Entry,
        paths: &str,
        max_refused: u64,
        letters: Vec<Letter>,
        budget: u64,
    ) -> RedisResult<Buried> {
        let Self { connection, keys } = self;
        let mut invocation = SCRIPT.prepare_invoke();
        invocation
            .key(&keys.stream)
            .key(&keys.dead)
            .key(keys.dead_bytes())
            .key(&keys.refused)
            .arg(&keys.group)
            .arg(entry.id.to_string())
            .arg(budget)
            .arg(paths)
            .arg(max_refused);
        for letter in letters {
            let fields = letter.fields();
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

    /// The time of the oldest entry that may still be applied, in the stream or among the dead letters; Unix
    /// milliseconds.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn oldest_dead_letter_source(&mut self) -> RedisResult<Option<u64>> {
        let Self { connection, keys } = self;
        let mut oldest =
            range(connection, &keys.stream, "-", 1).await?.ids.first().map(|entry| id_ms(&entry.id));
        let mut from = "-".to_owned();
        loop {
            // Dead letters are in the order in which they were buried, not in that of their sources, so all are read.
            let page = range(connection, &keys.dead, &from, 200).await?.ids;
            let Some(last) = page.last() else { return Ok(oldest) };
            from = format!("({}", last.id);
            for letter in &page {
                // Tombstones decide neither about tasks nor about what is older than those that are gone.
                let is_too_old =
                    letter.get("reason").is_some_and(|reason: String| reason == Reason::TooOld.name());
                if is_too_old || letter.get::<String>("task").is_some() {
                    continue;
                }
                let source: Option<String> = letter.get("source_id");
                let ms = source.map_or(0, |id| id_ms(&id));
                oldest = Some(oldest.map_or(ms, |before| before.min(ms)));
            }
        }
    }
}

/// The paths of the operations, as JSON; `*` for the whole entry, and for one that does not tell.
fn paths(entry: &Entry, rejected: &[Rejected]) -> String {
    #[derive(serde::Deserialize)]
    struct Op {
        path: String,
    }
    let path = |rejected: &Rejected| {
        let op = serde_json::from_str(&rejected.op).ok().filter(|_| rejected.op != entry.data);
        op.map_or_else(|| "*".to_owned(), |op: Op| op.path)
    };
    serde_json::Value::from(rejected.iter().map(path).collect::<Vec<_>>()).to_string()
}

/// The outcome for an entry with bad operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buried {
    /// It is acknowledged, and its bad parts are among the dead letters.
    Done,
    /// Another process had acknowledged it already.
    Already,
    /// The dead letters have reached their budget; the entry stays pending.
    Full,
}

/// A dead letter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Letter {
    /// Its own id.
    pub id: String,
    /// The id of the entry that it came from.
    pub source_id: String,
    /// commit, identity, account.
    #[serde(rename = "type")]
    pub event_type: String,
    /// The relay's sequence number.
    pub seq: String,
    /// The reason class.
    pub reason: String,
    /// PostgreSQL's SQLSTATE, if the database refused.
    pub sqlstate: String,
    /// The problem, for a person.
    pub message: String,
    /// The operation; the whole entry if it is not a readable commit.
    pub op: String,
    /// The commit around the operation, without its other operations.
    pub data: String,
    /// How often it was tried.
    pub attempts: u64,
    /// When it was tried first.
    pub first_time: String,
    /// When it was tried last.
    pub last_time: String,
    /// The version of the program that tried it last.
    pub version: String,
    /// In a letter from the reader: the record and version that it is about.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub key: String,
    /// In a letter from the reader: the account that it is about.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub account: String,
    /// In a letter about a task: its id.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub task: String,
}

/// The fields of a letter written by the reader, without its keys; see append.lua.
pub(super) fn fields_of(new: &NewLetter) -> Vec<(&'static str, String)> {
    let now = jiff::Timestamp::now().to_string();
    let letter = Letter {
        event_type: new.event_type.to_owned(),
        seq: new.seq.to_string(),
        op: new.op.clone(),
        data: new.data.clone(),
        first_time: now.clone(),
        ..Letter::default()
    };
    letter.tried(&new.reject, now).fields().into_iter().filter(|(name, _)| *name != "source_id").collect()
}

impl Letter {
    fn new(entry: &Entry, rejected: &Rejected) -> Self {
        let now = jiff::Timestamp::now().to_string();
        Self {
            id: String::new(),
            source_id: entry.id.to_string(),
            event_type: entry.event_type.clone(),
            seq: entry.seq.clone(),
            op: rejected.op.clone(),
            data: if rejected.op == entry.data { String::new() } else { without_ops(entry) },
            first_time: now.clone(),
            ..Self::default()
        }
        .tried(&rejected.reject, now)
    }

    /// The same letter after another attempt.
    fn tried(mut self, reject: &Reject, now: String) -> Self {
        reject.reason.name().clone_into(&mut self.reason);
        self.sqlstate = reject.sqlstate.clone().unwrap_or_default();
        self.message.clone_from(&reject.message);
        self.attempts += 1;
        self.last_time = now;
        env!("CARGO_PKG_VERSION").clone_into(&mut self.version);
        self
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("source_id", self.source_id.clone()),
            ("type", self.event_type.clone()),
            ("seq", self.seq.clone()),
            ("reason", self.reason.clone()),
            ("sqlstate", self.sqlstate.clone()),
            ("message", self.message.clone()),
            ("op", self.op.clone()),
            ("data", self.data.clone()),
            ("attempts", self.attempts.to_string()),
            ("first_time", self.first_time.clone()),
            ("last_time", self.last_time.clone()),
            ("version", self.version.clone()),
        ];
        for (name, value) in [("key", &self.key), ("account", &self.account), ("task", &self.task)] {
            if !value.is_empty() {
                fields.push((name, value.clone()));
            }
        }
        fields
    }

    fn from_stream(entry: &StreamId) -> Self {
        let field = |name: &str| entry.get::<String>(name).unwrap_or_default();
        Self {
            id: entry.id.clone(),
            source_id: field("source_id"),
            event_type: field("type"),
            seq: field("seq"),
            reason: field("reason"),
            sqlstate: field("sqlstate"),
            message: field("message"),
            op: field("op"),
            data: field("data"),
            attempts: field("attempts").parse().unwrap_or(1),
            first_time: field("first_time"),
            last_time: field("last_time"),
            version: field("version"),
            key: field("key"),
            account: field("account"),
            task: field("task"),
        }
    }

    /// The collection of the operation; empty if it has none.
    #[must_use]
    pub fn collection(&self) -> String {
        serde_json::from_str::<serde_json::Value>(&self.op)
            .ok()
            .and_then(|op| Some(op.get("path")?.as_str()?.split('/').next()?.to_owned()))
            .unwrap_or_default()
    }

    /// An entry with this operation alone, to be applied as the original would have been.
    ///
    /// # Errors
    ///
    /// The id of its source cannot be read.
    pub fn entry(&self) -> Result<Entry, InvalidEntryId> {
        let whole = match serde_json::from_str::<serde_json::Value>(&self.data) {
            Ok(serde_json::Value::Object(mut commit)) => match serde_json::from_str(&self.op) {
                Ok(op) => {
                    commit.insert("ops".to_owned(), serde_json::Value::Array(vec![op]));
                    serde_json::Value::Object(commit).to_string()
                }
                Err(_) => self.op.clone(),
            },
            _ => self.op.clone(),
        };
        Ok(Entry {
            id: self.source_id.parse()?,
            event_type: self.event_type.clone(),
            data: whole,
            seq: self.seq.clone(),
        })
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

/// The milliseconds of an entry's id; 0, older than everything, for an invalid id.
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
