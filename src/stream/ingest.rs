//! Appending what clients send, once for each request, and waiting until it is durable.

use std::fmt;
use std::sync::LazyLock;
use std::time::Duration;

use redis::{RedisResult, Script, Value};

use super::positions::Moves;
use super::server::{Memory, field};
use super::{Keys, Stream};
use crate::event::EntryId;

static SCRIPT: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!(include_str!("own.lua"), include_str!("ingest.lua"))));

/// For how long the name of a request is remembered.
const REMEMBER: Duration = Duration::from_hours(24);

/// A request to append entries, all or none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Its name; a second one of the same name appends nothing.
    pub name: Option<String>,
    /// What it consists of, in short: one with the same name must be the same.
    pub print: String,
    /// The accounts that it is about.
    pub accounts: Vec<String>,
    /// The entries.
    pub entries: Vec<New>,
    /// The positions of its origin that move with it, and the topic that they are in.
    pub moves: Option<(String, Moves)>,
}

/// An entry to be appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct New {
    /// Its type.
    pub event_type: String,
    /// JSON.
    pub data: String,
    /// Whether it is a task, which goes to a stream of its own.
    pub is_task: bool,
}

/// The id of an entry that was appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Id {
    /// In the stream of events.
    Event(EntryId),
    /// In the stream of tasks.
    Task(EntryId),
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Event(id) | Self::Task(id) => id.fmt(f),
        }
    }
}

impl Id {
    fn read(text: &str) -> Option<Self> {
        match text.strip_prefix('t') {
            Some(task) => task.parse().ok().map(Self::Task),
            None => text.parse().ok().map(Self::Event),
        }
    }
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The entries, appended now or by the same request before.
    Appended {
        /// Their ids.
        ids: Vec<Id>,
        /// Whether that was before.
        before: bool,
    },
    /// Another request had this name.
    Other,
    /// A position is not where it was: another process appends, or Redis has lost something.
    Moved,
    /// There is no room in the stream.
    Full,
    /// There is no stream yet.
    NoStream,
}

/// How the server makes writes durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Durability {
    /// When they are on its disk.
    pub disk: Disk,
    /// Whether it has a replica.
    pub replicated: bool,
    /// What tells this server, and this start of it, from others.
    pub server: String,
}

/// When a write is on the server's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// It is asked (WAITAOF, since Redis 7.2).
    Asked,
    /// Before it answers (`appendfsync always`).
    AtOnce,
    /// Once a second, and it says nothing about it.
    WithinASecond,
    /// It has no append-only file, or leaves it to its system when that is written: nobody knows what a crash of its machine
    /// loses.
    Unknown,
}

impl Keys {
    /// Where the answer to a request of this name is kept.
    fn request(&self, name: &str) -> String {
        format!("{}:request:{name}", self.stream)
    }
}

impl Stream {
    /// Appends the entries of a request.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or refuses: then it is not known whether they were appended.
    pub async fn ingest(&mut self, request: &Request, max_length: u64) -> RedisResult<Answer> {
        let Self { connection, keys } = self;
        let named = request.name.as_ref().map_or_else(|| keys.stream.clone(), |name| keys.request(name));
        let mut invocation = SCRIPT.key(&keys.stream);
        invocation
            .key(&keys.watch)
            .key(&keys.epoch)
            .key(named)
            .key(&keys.fed)
            .key(keys.tasks())
            .key(request.moves.as_ref().map_or_else(|| keys.stream.clone(), |(topic, _)| keys.kafka(topic)))
            .arg(max_length)
            .arg(&request.print)
            .arg(REMEMBER.as_secs())
            .arg(request.accounts.len())
            .arg(&request.accounts);
        let moves = request.moves.as_ref().map(|(_, moves)| moves);
        invocation.arg(moves.map_or(0, Moves::len));
        for (partition, (from, to)) in moves.into_iter().flatten() {
            invocation.arg(partition).arg(from.map(|from| from.to_string()).unwrap_or_default()).arg(to);
        }
        for New { event_type, data, is_task } in &request.entries {
            invocation.arg(event_type).arg(data).arg(u8::from(*is_task));
        }
        let answer: Vec<String> = invocation.invoke_async(connection).await?;
        let mut answer = answer.iter();
        let word = answer.next();
        let ids = answer.filter_map(|id| Id::read(id)).collect();
        Ok(match word.map(String::as_str) {
            Some("new") => Answer::Appended { ids, before: false },
            Some("known") => Answer::Appended { ids, before: true },
            Some("other") => Answer::Other,
            Some("moved") => Answer::Moved,
            Some("full") => Answer::Full,
            _ => Answer::NoStream,
        })
    }

    /// Whether others feed an account. Its repository in the network says nothing about what they sent.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn is_fed(&mut self, did: &str) -> RedisResult<bool> {
        let Self { connection, keys } = self;
        redis::cmd("HEXISTS").arg(&keys.fed).arg(did).query_async(connection).await
    }

    /// How the server makes writes durable, and how much memory it uses.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn durability(&mut self) -> RedisResult<(Durability, Memory)> {
        let info = self.server_info().await?;
        let number = |text: &str| text.split('.').map(|part| part.parse().unwrap_or(0)).collect::<Vec<u64>>();
        // Who may not ask gets the default, everysec.
        let disk = match self.setting("appendfsync").await?.as_deref() {
            _ if field(&info, "aof_enabled") != "1" => Disk::Unknown,
            Some("no") => Disk::Unknown,
            _ if number(field(&info, "redis_version")) >= vec![7, 2] => Disk::Asked,
            Some("always") => Disk::AtOnce,
            _ => Disk::WithinASecond,
        };
        // One that is still being filled does not count.
        let replicated = info.lines().any(|line| line.starts_with("slave") && line.contains("state=online"));
        let durability = Durability { disk, replicated, server: field(&info, "run_id").to_owned() };
        Ok((durability, Memory::of(&info)))
    }

    /// Waits until everything written so far is on the server's disk (`asked`), and with a replica (`replicated`); `None` if that
    /// takes longer than `limit`. Returns which server it was. Nothing else may use the connection meanwhile.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or the user may not ask.
    pub async fn wait_for_copies(
        &mut self,
        asked: bool,
        replicated: bool,
        limit: Duration,
    ) -> RedisResult<Option<String>> {
        let Self { connection, keys } = self;
        let limit = limit.as_millis() as u64;
        // It waits for what this connection has written, which comes after everything that others have.
        let mut pipe = redis::pipe();
        pipe.cmd("HSET").arg(&keys.watch).arg("ingest").arg(crate::time::now_ms()).ignore();
        if asked {
            // A replica may have no append-only file, so that only its memory counts.
            pipe.cmd("WAITAOF").arg(1).arg(0).arg(limit);
        }
        if replicated {
            pipe.cmd("WAIT").arg(1).arg(limit);
        }
        pipe.cmd("INFO").arg("server");
        let answers: Vec<Value> = pipe.query_async(connection).await?;
        let [waits @ .., info] = answers.as_slice() else { return Ok(None) };
        let is_done = |answer: &Value| match answer {
            Value::Int(copies) => *copies >= 1,
            Value::Array(counts) => matches!(counts.first(), Some(Value::Int(1..))),
            _ => false,
        };
        if !waits.iter().all(is_done) {
            return Ok(None);
        }
        let info: String = redis::from_redis_value(info.clone())?;
        Ok(Some(field(&info, "run_id").to_owned()))
    }

    /// Whether the group has acknowledged an entry and all before it.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or there is no group.
    pub async fn is_settled(&mut self, id: EntryId) -> RedisResult<bool> {
        let delivered = self.last_delivered().await?;
        Ok(delivered >= id && self.first_pending().await?.is_none_or(|first| first > id))
    }
}
