//! The source of entries: an origin behind three verbs (`open`, `next`, `settled`), and the reader, which appends the
//! origin's arrivals to the stream.
//!
//! - `connect`: the websocket of both
//! - `jetstream`: the same events as JSON, from a Jetstream
//! - `ingest`: events that clients send over HTTP; no origin, since they wait for the answer
//! - `amqp`: events from a RabbitMQ queue, which keeps its own positions
//! - `kafka`: events from a Kafka topic, whose positions are kept in Redis
//! - `messages`: what the messages of both hold
//! - `relay`: `com.atproto.sync.subscribeRepos`
//! - `reader`: one session after another: lease, cursor, origin
//! - `plan`: where a session starts
//! - `verifier`: whether what arrives is what its account signed
//! - `checker`: signatures that could not be checked on arrival
//! - `recent`: what both know about the accounts that arrived last
//! - `handles`: looking up the handles that relays do not send
//! - `rounds`: how often the last two do that
//! - `wanted`: leaves out accounts that are not wanted
//! - `append`: queue -> stream, and the marks at which the reader slows down

#[cfg(feature = "amqp")]
pub mod amqp;
mod append;
mod checker;
mod connect;
mod handles;
pub mod ingest;
pub mod jetstream;
#[cfg(feature = "kafka")]
pub mod kafka;
#[cfg(any(feature = "amqp", feature = "kafka"))]
mod messages;
mod plan;
pub mod reader;
mod recent;
pub mod relay;
mod rounds;
mod verifier;
mod wanted;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::stream::accounts::Changes;
use crate::stream::append::{NewEntry, NewLetter};
use crate::stream::gap::Gap;

pub use reader::Reader;

/// A source of entries.
///
/// The reader manages the lease, the cursor and the queue; an origin only connects and reads. An origin updates its own
/// part of [`crate::status::ReaderStatus`]: `frames` and `last_frame_ms` for everything that it receives, and
/// `taking_in_ms` while it is steadily connected and there is nothing to receive.
pub trait Origin: Send {
    /// Its name, `host` or `host:port`: positions are meaningful only together with it.
    fn name(&self) -> String;

    /// Connects. The first arrival is the one after `from`: `None` starts from now, `Some(0)` from the oldest
    /// available. It may send the one at `from` again.
    fn open(&mut self, from: Option<i64>) -> impl Future<Output = Result<(), OriginError>> + Send;

    /// The next arrival. Cancel-safe: dropping the future loses nothing.
    fn next(&mut self) -> impl Future<Output = Result<Arrival, OriginError>> + Send;

    /// Everything up to `position` is in the stream, whether or not it has been applied: the moment to acknowledge
    /// upstream. Called as the stream grows and once more at the end, so a position may be repeated.
    fn settled(&mut self, position: i64) -> impl Future<Output = Result<(), OriginError>> + Send {
        let _ = position;
        std::future::ready(Ok(()))
    }

    /// Disconnects gracefully.
    fn close(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// One event from an origin, with its position.
#[derive(Clone, Debug, Default)]
pub struct Arrival {
    /// Positions grow by one or more; an earlier one is a repeat.
    pub position: i64,
    /// The account that it belongs to; empty if none does.
    pub did: String,
    /// The entries for the stream, in order. `data` is a JSON object that ends with its brace; `seq` is a position.
    pub entries: Vec<NewEntry>,
    /// Dead letters: what can never be applied.
    pub letters: Vec<NewLetter>,
    /// Counts of what could not be used, by reason.
    pub missed: BTreeMap<&'static str, u64>,
    /// Its newest revision, or empty.
    pub rev: String,
    /// The gap before it.
    pub gap: Option<Gap>,
    /// The frame that it came in, if it can be verified.
    pub frame: Option<Bytes>,
    /// What verification remembers about it.
    pub accounts: Changes,
}

/// Why an origin delivers nothing more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OriginError {
    /// It cannot be reached, or ended the connection. It is retried.
    #[error("relay: {reason}")]
    Away {
        /// In words.
        reason: String,
        /// How long it asks us to wait.
        retry_after: Option<Duration>,
    },
    /// Its numbering restarted: it is read from its oldest event, in a new epoch.
    #[error("{0}")]
    Reset(String),
    /// The requested position is in its future.
    #[error("{0}")]
    Future(String),
    /// Operator action needed.
    #[error("{0}")]
    Operator(String),
}

impl OriginError {
    /// An error that is retried after the usual pause.
    pub fn away(reason: impl Into<String>) -> Self {
        Self::Away { reason: reason.into(), retry_after: None }
    }
}

/// Resolves when so much time has passed.
async fn sleep_until(since: Instant, limit: Duration) {
    match since.checked_add(limit) {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
