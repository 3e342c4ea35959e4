//! Events that clients send themselves: read from lines of JSON, appended once for each request, and acknowledged when they are
//! durable.

mod cid;
pub mod lines;

use std::time::Duration;

use shrike::cbor::{Cid, Codec};
use tokio::sync::Mutex;
use tokio::time::Instant;

use self::lines::Line;
use crate::config::Config;
use crate::crash::{self, Point};
use crate::event::EntryId;
use crate::stream::ingest::{Answer, Durability, Request};
use crate::stream::{Redis, Stream, StreamResult};

/// How long a server that writes to its disk once a second, and says nothing about it, has for that: Redis delays a write by up to
/// two seconds if the one before is not done.
const A_SECOND: Duration = Duration::from_secs(2);
/// How long to wait for the server's disk.
const DISK: Duration = Duration::from_secs(10);
/// How often to look whether something is applied.
const LOOK: Duration = Duration::from_millis(20);

/// Takes events in.
pub struct Ingest {
    redis: Redis,
    max_length: u64,
    stream: Mutex<Option<Stream>>,
    disk: Mutex<Disk>,
    /// Writes that somebody waits for, so far.
    tickets: std::sync::atomic::AtomicU64,
}

/// The connection on which the server is asked to write to its disk.
#[derive(Default)]
struct Disk {
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
            disk: Mutex::default(),
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
        let (answer, durability, server) = {
            let mut kept = self.stream.lock().await;
            let mut stream = self.redis.reuse(&mut kept).await?;
            let (durability, server) = stream.durability().await?;
            let answer = stream.ingest(&request, self.max_length).await?;
            *kept = Some(stream);
            (answer, durability, server)
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
        match durability {
            Durability::AtOnce | Durability::Never => {}
            Durability::Asked { replicas } => self.flush(replicas, &server).await?,
            Durability::WithinASecond => self.wait_a_second(&server).await?,
        }
        Ok(Accepted { ids, before, durable: durability != Durability::Never })
    }

    /// Waits until the server's disk has everything that was written before. Many that wait share one answer.
    async fn flush(&self, replicas: u8, server: &str) -> Result<(), IngestError> {
        use std::sync::atomic::Ordering;
        let ticket = self.tickets.fetch_add(1, Ordering::SeqCst) + 1;
        let mut disk = self.disk.lock().await;
        if disk.done >= ticket {
            return Ok(());
        }
        let covered = self.tickets.load(Ordering::SeqCst);
        let mut stream = self.redis.reuse(&mut disk.stream).await?;
        match stream.wait_for_disk(replicas, DISK).await {
            Ok(true) => {}
            Ok(false) => {
                let what = if replicas > 0 { "its disk and a replica's" } else { "its disk" };
                return Err(IngestError::Unknown(format!("Redis needs longer than {DISK:?} for {what}")));
            }
            // Without the right to ask.
            Err(error) if error.code() == Some("NOPERM") => {
                drop(disk);
                return self.wait_a_second(server).await;
            }
            Err(error) => return Err(error.into()),
        }
        disk.stream = Some(stream);
        disk.done = covered;
        drop(disk);
        self.is_same_server(server).await
    }

    async fn wait_a_second(&self, server: &str) -> Result<(), IngestError> {
        tokio::time::sleep(A_SECOND).await;
        self.is_same_server(server).await
    }

    /// A server that restarted in between may have lost what came last.
    async fn is_same_server(&self, server: &str) -> Result<(), IngestError> {
        let mut kept = self.stream.lock().await;
        let mut stream = self.redis.reuse(&mut kept).await?;
        let (_, now) = stream.durability().await?;
        *kept = Some(stream);
        if now == server { Ok(()) } else { Err(IngestError::Unknown("Redis was restarted".to_owned())) }
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
