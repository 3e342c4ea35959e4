//! Events that clients send themselves: read from lines of JSON, appended once for each request, and acknowledged when they are
//! durable.

pub mod car;
mod cid;
pub mod lines;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use shrike::cbor::{Cid, Codec};
use tokio::sync::Mutex;
use tokio::time::Instant;

use self::lines::Line;
use crate::config::{Config, MemoryMark};
use crate::crash::{self, Point};
use crate::event::EntryId;
use crate::stream::ingest::{Answer, Disk, Durability, Id, New, Request};
use crate::stream::positions::Moves;
use crate::stream::{Redis, Stream, StreamResult};

/// How long a server that writes to its disk once a second, and says nothing about it, has for that: Redis delays a write by up to
/// two seconds if the one before is not done.
const A_SECOND: Duration = Duration::from_secs(2);
/// How long to wait for the server's disk and its replica: less than for an answer.
const COPIES: Duration = Duration::from_secs(8);
/// How often to look whether something is applied.
const LOOK: Duration = Duration::from_millis(20);

/// Takes events in.
pub struct Ingest {
    redis: Redis,
    max_length: u64,
    memory_mark: MemoryMark,
    stream: Mutex<Option<Stream>>,
    copies: Mutex<Copies>,
    /// Writes that somebody waits for, so far.
    tickets: AtomicU64,
}

/// The connection on which the server is asked what it has written.
#[derive(Default)]
struct Copies {
    stream: Option<Stream>,
    /// All tickets up to this one are durable,
    done: u64,
    /// on this server,
    server: String,
    /// and on a replica, if this is set.
    replicated: bool,
}

/// Events that are in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    ids: Vec<Id>,
    before: bool,
    durability: Durability,
}

/// What was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The entries' ids, in the order of the lines.
    pub ids: Vec<Id>,
    /// Whether the same request had been accepted before.
    pub before: bool,
    /// Whether they are on the disk; if not, Redis has no append-only file, or does not flush it itself (`appendfsync no`).
    pub durable: bool,
}

/// Why a request is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The request is wrong.
    #[error("this Idempotency-Key was used for a different request: use a new key")]
    OtherRequest,
    /// Nothing was appended.
    #[error("another process takes from the same source, or Redis has lost something")]
    Moved,
    /// It is not the request's fault; nothing was appended.
    #[error("{0}")]
    NotNow(&'static str),
    /// It may have been appended, and lost.
    #[error(
        "Redis was restarted, or replaced by another server: send it again, with the same Idempotency-Key"
    )]
    Replaced,
    /// It may have been appended.
    #[error("{0}: send it again, with the same Idempotency-Key")]
    Unknown(String),
}

impl From<crate::stream::StreamError> for IngestError {
    fn from(error: crate::stream::StreamError) -> Self {
        if crate::stream::is_oom(&error) {
            return Self::NotNow("Redis refuses writes: its memory is full");
        }
        Self::Unknown(format!("Redis: {error}"))
    }
}

/// What tells a text from others.
fn print(text: &[u8]) -> String {
    Cid::compute(Codec::Raw, text).to_string()
}

/// A server that restarted in between, or another one, may lack what came last.
fn is_same_server(durability: &Durability, now: &str) -> Result<(), IngestError> {
    if now == durability.server { Ok(()) } else { Err(IngestError::Replaced) }
}

impl Ingest {
    /// Takes events into the configured stream.
    #[must_use]
    pub fn new(config: &Config, redis: Redis) -> Self {
        Self {
            redis,
            max_length: config.max_stream_len,
            memory_mark: config.memory_mark,
            stream: Mutex::new(None),
            copies: Mutex::default(),
            tickets: 0.into(),
        }
    }

    /// Appends the events of a request, all or none. `key`: its Idempotency-Key; `body`: its text; `moves`: the positions of its
    /// origin that move with them.
    ///
    /// # Errors
    ///
    /// [`IngestError`].
    pub async fn append(
        &self,
        key: Option<&str>,
        body: &[u8],
        lines: Vec<Line>,
        moves: Option<(String, Moves)>,
    ) -> Result<Appended, IngestError> {
        let mut accounts: Vec<String> =
            lines.iter().map(|line| line.did.clone()).filter(|did| !did.is_empty()).collect();
        accounts.sort_unstable();
        accounts.dedup();
        let request = Request {
            name: key.map(|key| print(key.as_bytes())),
            print: print(body),
            accounts,
            entries: lines
                .into_iter()
                .map(|Line { event_type, is_task, data, .. }| New {
                    event_type: event_type.into_owned(),
                    data,
                    is_task,
                })
                .collect(),
            moves,
        };
        let mut kept = self.stream.lock().await;
        let mut stream = self.redis.reuse(&mut kept).await?;
        let (durability, memory) = stream.durability().await?;
        if self.memory_mark.bytes(memory.max).is_some_and(|mark| memory.used >= mark) {
            *kept = Some(stream);
            return Err(IngestError::NotNow("Redis is short of memory (REDIS_MEMORY_MARK)"));
        }
        let answer = stream.ingest(&request, self.max_length).await?;
        *kept = Some(stream);
        drop(kept);
        crash::at(Point::AfterIngest);
        match answer {
            Answer::Appended { ids, before } => Ok(Appended { ids, before, durability }),
            Answer::Other => Err(IngestError::OtherRequest),
            Answer::Moved => Err(IngestError::Moved),
            Answer::Full => {
                Err(IngestError::NotNow("the stream, or that of tasks, is full (REDIS_MAX_STREAM_LEN)"))
            }
            Answer::NoStream => Err(IngestError::NotNow("there is no stream yet")),
        }
    }

    /// Looks again what it takes for them to be durable: a replica may be gone, or settings changed.
    ///
    /// # Errors
    ///
    /// [`IngestError::Replaced`], or Redis cannot be reached.
    pub async fn look_again(&self, appended: &mut Appended) -> Result<(), IngestError> {
        let mut kept = self.stream.lock().await;
        let mut stream = self.redis.reuse(&mut kept).await?;
        let (now, _) = stream.durability().await?;
        *kept = Some(stream);
        is_same_server(&appended.durability, &now.server)?;
        appended.durability = now;
        Ok(())
    }

    /// Waits until they are durable.
    ///
    /// # Errors
    ///
    /// It is not known whether they are.
    pub async fn settle(&self, appended: &Appended) -> Result<Accepted, IngestError> {
        let Appended { ids, before, durability } = appended;
        let disk = durability.disk;
        let is_asked = disk == Disk::Asked || durability.replicated;
        let is_told = is_asked && self.ask_for_copies(durability).await?;
        // Without the right to ask, time has to do.
        let waits = disk == Disk::WithinASecond || (is_asked && !is_told);
        if waits {
            tokio::time::sleep(A_SECOND).await;
        }
        if waits || !is_told {
            let mut kept = self.stream.lock().await;
            let mut stream = self.redis.reuse(&mut kept).await?;
            let (now, _) = stream.durability().await?;
            *kept = Some(stream);
            is_same_server(durability, &now.server)?;
        }
        Ok(Accepted { ids: ids.clone(), before: *before, durable: disk != Disk::Unknown })
    }

    /// Waits until the server's disk, and a replica, have everything that was written before. Many that wait share one answer.
    /// `false` if our user may not ask, or the server does not know.
    async fn ask_for_copies(&self, durability: &Durability) -> Result<bool, IngestError> {
        let Durability { disk, replicated, server } = durability;
        let ticket = self.tickets.fetch_add(1, Ordering::SeqCst) + 1;
        let mut copies = self.copies.lock().await;
        if copies.done >= ticket && copies.server == *server && copies.replicated >= *replicated {
            return Ok(true);
        }
        let covered = self.tickets.load(Ordering::SeqCst);
        let mut stream = self.redis.reuse(&mut copies.stream).await?;
        let told = match stream.wait_for_copies(*disk == Disk::Asked, *replicated, COPIES).await {
            Ok(Some(told)) => told,
            Ok(None) => {
                let what = if *replicated {
                    "the write to its disk and to a replica"
                } else {
                    "the write to its disk"
                };
                return Err(IngestError::Unknown(format!("Redis did not confirm {what} within {COPIES:?}")));
            }
            Err(error) if error.code() == Some("NOPERM") => return Ok(false),
            Err(error) if error.to_string().contains("unknown command") => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        is_same_server(durability, &told)?;
        *copies = Copies { stream: Some(stream), done: covered, server: told, replicated: *replicated };
        Ok(true)
    }

    /// Waits until entries are applied, at most until `deadline`; `None` if it takes longer. Tasks are not waited for. Returns what
    /// of them ended as dead letters, by their ids.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn applied(
        &self,
        ids: &[Id],
        deadline: Instant,
    ) -> StreamResult<Option<Vec<(String, Vec<String>)>>> {
        let events = |id: &Id| match id {
            Id::Event(id) => Some(*id),
            Id::Task(_) => None,
        };
        let ids: Vec<EntryId> = ids.iter().filter_map(events).collect();
        let Some(&last) = ids.last() else { return Ok(Some(Vec::new())) };
        let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
        let mut stream = self.redis.connect().await?;
        while !stream.is_settled(last).await? {
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(LOOK).await;
        }
        let refused = stream.refused(&ids).await?;
        let refused = ids.into_iter().zip(refused).filter(|(_, paths)| !paths.is_empty());
        Ok(Some(refused.collect()))
    }
}
