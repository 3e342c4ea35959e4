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
use crate::config::Config;
use crate::crash::{self, Point};
use crate::event::EntryId;
use crate::stream::ingest::{Answer, Disk, Durability, Request};
use crate::stream::{Redis, Stream, StreamResult};

/// How long a server that writes to its disk once a second, and says nothing about it, has for that: Redis delays a write by up to
/// two seconds if the one before is not done.
const A_SECOND: Duration = Duration::from_secs(2);
/// How long to wait for the server's disk and its replica.
const COPIES: Duration = Duration::from_secs(10);
/// How often to look whether something is applied.
const LOOK: Duration = Duration::from_millis(20);

/// Takes events in.
pub struct Ingest {
    redis: Redis,
    max_length: u64,
    stream: Mutex<Option<Stream>>,
    copies: Mutex<Copies>,
    /// Writes that somebody waits for, so far.
    tickets: AtomicU64,
}

/// The connection on which the server is asked what it has written.
#[derive(Default)]
struct Copies {
    stream: Option<Stream>,
    /// All tickets up to this one are durable.
    done: u64,
}

/// What was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The entries' ids, in the order of the lines.
    pub ids: Vec<String>,
    /// Whether the same request had been accepted before.
    pub before: bool,
    /// Whether they are on the disk; if not, Redis has no append-only file.
    pub durable: bool,
}

/// Why a request is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The request is wrong.
    #[error("another request had this Idempotency-Key: choose a new one for other events")]
    OtherRequest,
    /// It is not the request's fault; nothing was appended.
    #[error("{0}")]
    NotNow(&'static str),
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

impl Ingest {
    /// Takes events into the configured stream.
    #[must_use]
    pub fn new(config: &Config, redis: Redis) -> Self {
        Self {
            redis,
            max_length: config.max_stream_len,
            stream: Mutex::new(None),
            copies: Mutex::default(),
            tickets: 0.into(),
        }
    }

    /// Appends the events of a request, all or none, and returns when they are durable. `key`: its Idempotency-Key; `body`: its
    /// text.
    ///
    /// # Errors
    ///
    /// [`IngestError`].
    pub async fn accept(
        &self,
        key: Option<&str>,
        body: &[u8],
        lines: Vec<Line>,
    ) -> Result<Accepted, IngestError> {
        let mut accounts: Vec<String> = lines.iter().map(|line| line.did.clone()).collect();
        accounts.sort_unstable();
        accounts.dedup();
        let request = Request {
            name: key.map(|key| print(key.as_bytes())),
            print: print(body),
            accounts,
            entries: lines.into_iter().map(|line| (line.event_type.to_owned(), line.data)).collect(),
        };
        let (answer, durability) = {
            let mut kept = self.stream.lock().await;
            let mut stream = self.redis.reuse(&mut kept).await?;
            let durability = stream.durability().await?;
            let answer = stream.ingest(&request, self.max_length).await?;
            *kept = Some(stream);
            (answer, durability)
        };
        let (ids, before) = match answer {
            Answer::Appended { ids, before } => (ids, before),
            Answer::Other => return Err(IngestError::OtherRequest),
            Answer::Full => {
                return Err(IngestError::NotNow("the stream is full (REDIS_MAX_STREAM_LEN)"));
            }
            Answer::NoStream => return Err(IngestError::NotNow("there is no stream yet")),
        };
        crash::at(Point::AfterIngest);
        self.wait_until_durable(&durability).await?;
        Ok(Accepted { ids, before, durable: durability.disk != Disk::Unknown })
    }

    async fn wait_until_durable(&self, durability: &Durability) -> Result<(), IngestError> {
        let Durability { disk, replicated, .. } = *durability;
        let mut waits = disk == Disk::WithinASecond;
        if disk == Disk::Asked || replicated {
            // Without the right to ask, time has to do.
            waits |= !self.ask_for_copies(disk == Disk::Asked, replicated).await?;
        }
        if waits {
            tokio::time::sleep(A_SECOND).await;
        }
        // A server that restarted in between may have lost what came last.
        let mut kept = self.stream.lock().await;
        let mut stream = self.redis.reuse(&mut kept).await?;
        let now = stream.durability().await?;
        *kept = Some(stream);
        if now.server == durability.server {
            Ok(())
        } else {
            Err(IngestError::Unknown("Redis was restarted".to_owned()))
        }
    }

    /// Waits until the server's disk, and a replica, have everything that was written before. Many that wait share one answer.
    /// `false` if our user may not ask.
    async fn ask_for_copies(&self, asked: bool, replicated: bool) -> Result<bool, IngestError> {
        let ticket = self.tickets.fetch_add(1, Ordering::SeqCst) + 1;
        let mut copies = self.copies.lock().await;
        if copies.done >= ticket {
            return Ok(true);
        }
        let covered = self.tickets.load(Ordering::SeqCst);
        let mut stream = self.redis.reuse(&mut copies.stream).await?;
        match stream.wait_for_copies(asked, replicated, COPIES).await {
            Ok(true) => {}
            Ok(false) => {
                let what = if replicated { "its disk and a replica" } else { "its disk" };
                return Err(IngestError::Unknown(format!("Redis needs longer than {COPIES:?} for {what}")));
            }
            Err(error) if error.code() == Some("NOPERM") => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        copies.stream = Some(stream);
        copies.done = covered;
        Ok(true)
    }

    /// Waits until entries are applied, at most until `deadline`; `None` if it takes longer. Returns what of them ended as dead
    /// letters, by their ids.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn applied(
        &self,
        ids: &[String],
        deadline: Instant,
    ) -> StreamResult<Option<Vec<(String, Vec<String>)>>> {
        let Some(last) = ids.last().and_then(|id| id.parse::<EntryId>().ok()) else {
            return Ok(Some(Vec::new()));
        };
        let mut stream = self.redis.connect().await?;
        while !stream.is_settled(last).await? {
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(LOOK).await;
        }
        let refused = stream.refused(ids).await?;
        let paths = |text: String| serde_json::from_str(&text).unwrap_or_else(|_| vec!["*".to_owned()]);
        let refused = ids.iter().zip(refused).filter_map(|(id, text)| Some((id.clone(), paths(text?))));
        Ok(Some(refused.collect()))
    }
}
