//! The health of this process: one snapshot of its parts, judged in one place, for the page's sentence and for
//! readiness.

mod ready;
mod rules;
mod words;

use std::sync::atomic::Ordering;

use serde::Serialize;

pub use self::ready::{Answers, Readiness, readiness};
pub use self::rules::health;
pub use self::words::state as words;
use crate::metrics;
use crate::mutex::lock;
use crate::status::{HandlerStatus, OriginStatus, OutputStatus, PipelineStatus, ReaderStatus, State, Status};
use crate::stream::janitor::Look;
use crate::stream::noted::Refill;
use crate::time::now_ms;

/// A backlog with no acknowledgement for this long counts as stalled. A part that has waited for its lease for this
/// long is not ready, and neither is a reader without a relay.
const NO_PROGRESS_MS: u64 = 30_000;
/// A reader that has received nothing for this long, without being steadily connected, is stuck.
const NOTHING_IN_MS: u64 = 60_000;

/// Severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Well,
    /// Running, but not keeping up.
    Busy,
    /// Paused by an operator.
    Paused,
    /// A server is down; work resumes by itself.
    Waiting,
    /// Operator action needed.
    Bad,
}

/// The state of the process in one sentence, for someone who has never seen it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Health {
    /// How bad it is.
    pub level: Level,
    /// The topic: while it stays the same, only the sentence's figures change.
    pub about: &'static str,
    /// In words.
    pub sentence: String,
    /// Further detail; empty for none.
    pub detail: String,
}

/// The facts that are judged.
#[derive(Debug, Default)]
pub struct Facts {
    /// Unix milliseconds.
    pub now_ms: u64,
    /// The pipelines of this process.
    pub pipelines: Vec<PipelineStatus>,
    /// Its pipelines for tasks.
    pub handlers: Vec<HandlerStatus>,
    /// Its reader.
    pub reader: Option<ReaderStatus>,
    /// Its other sources of events.
    pub origins: Vec<OriginStatus>,
    /// Where it sends what is applied.
    pub outputs: Vec<OutputStatus>,
    /// The process is shutting down.
    pub draining: bool,
    /// When the janitor last looked at the stream.
    pub look_ms: Option<u64>,
    /// When the process started.
    pub started_ms: u64,
    /// When anything was last acknowledged.
    pub last_ack_ms: u64,
    /// Entries not yet delivered; `None` when unknown.
    pub waiting: Option<u64>,
    /// Age of the oldest entry that is not acknowledged.
    pub oldest_seconds: f64,
    /// Events finished per second.
    pub rate: f64,
    /// Frames from the relay per second.
    pub frames: f64,
    /// Entries per second by which the backlog shrinks.
    pub shrinking: f64,
    /// The time within which 99% of events are durable, in milliseconds.
    pub p99_ms: Option<f64>,
    /// The refill in progress, because PostgreSQL lost events.
    pub refill: Option<Refill>,
}

impl Facts {
    /// The parts' own current reports. The caller adds the rates.
    #[must_use]
    pub fn of(status: &Status, look: Option<&(Look, u64)>, draining: bool) -> Self {
        Self {
            now_ms: now_ms(),
            pipelines: status.pipelines.iter().map(|pipeline| lock(pipeline).clone()).collect(),
            reader: status.reader.as_ref().map(|reader| lock(reader).clone()),
            handlers: lock(&status.handlers).values().cloned().collect(),
            origins: lock(&status.origins).values().cloned().collect(),
            outputs: lock(&status.outputs).values().cloned().collect(),
            draining,
            look_ms: look.map(|(_, at)| *at),
            started_ms: status.started_ms,
            last_ack_ms: status.last_ack_ms.load(Ordering::Relaxed),
            waiting: look.and_then(|(look, _)| look.waiting()),
            oldest_seconds: look.and_then(|(look, _)| look.oldest_seconds()).unwrap_or(0.0),
            refill: *lock(&status.refill),
            ..Self::default()
        }
    }

    /// Milliseconds since a point in time.
    fn since_ms(&self, since_ms: u64) -> u64 {
        self.now_ms.saturating_sub(since_ms)
    }

    /// The connections to brokers: the state of each, since when, what it cannot do while it is down, and where its messages stay.
    fn brokers(&self) -> impl Iterator<Item = (&State, u64, [&'static str; 2])> {
        let origins = self.origins.iter().map(|origin| {
            let what = match origin.origin {
                metrics::KAFKA => ["take records from Kafka", "records stay in the topic"],
                _ => ["take messages from RabbitMQ", "messages stay in the queue"],
            };
            (&origin.state, origin.since_ms, what)
        });
        let outputs = self.outputs.iter().map(|output| {
            let what =
                if output.output == metrics::KAFKA { "publish to Kafka" } else { "publish to RabbitMQ" };
            (&output.state, output.since_ms, [what, "events stay in the stream"])
        });
        origins.chain(outputs)
    }

    /// Since when nothing has been acknowledged although entries are waiting; `None` while there is progress.
    fn stalled_since_ms(&self) -> Option<u64> {
        let idle_since = self.last_ack_ms.max(self.started_ms);
        let stalled = !self.pipelines.is_empty()
            && self.oldest_seconds * 1000.0 > NO_PROGRESS_MS as f64
            && self.since_ms(idle_since) > NO_PROGRESS_MS;
        stalled.then_some(idle_since)
    }

    /// The reader, if it receives nothing although it should. Room, Redis and leases have states of their own.
    fn stuck_reader(&self) -> Option<&ReaderStatus> {
        let receives =
            |state: &State| matches!(state, State::Starting | State::Running | State::WaitingForRelay { .. });
        self.reader
            .as_ref()
            .filter(|reader| receives(&reader.state) && self.since_ms(reader.taking_in_ms) > NOTHING_IN_MS)
    }
}
