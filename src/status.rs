//! What the parts say of themselves, for readiness, `/status` and the progress line.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::stream::janitor::Look;

/// One word for what a part is doing, with the reason where it is not what it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Not connected yet.
    #[default]
    Starting,
    /// At work, or waiting for work.
    Running,
    /// Redis is away.
    WaitingForRedis {
        /// What it said.
        reason: String,
    },
    /// PostgreSQL is away, or refuses for a while.
    WaitingForPostgres {
        /// What it said.
        reason: String,
    },
    /// The relay is away.
    WaitingForRelay {
        /// What it said.
        reason: String,
    },
    /// The stream is at its mark, or Redis is.
    WaitingForRoom {
        /// Which mark.
        reason: String,
    },
    /// Another reader holds the lease.
    WaitingForLease {
        /// Why.
        reason: String,
    },
    /// Something that only the operator can mend.
    Halted {
        /// What it is.
        reason: String,
    },
    /// Ended.
    Stopped,
}

/// One pipeline.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PipelineStatus {
    /// Its name in the consumer group.
    pub consumer: String,
    /// What it is doing.
    #[serde(flatten)]
    pub state: State,
    /// Entries in hand.
    pub in_flight: u64,
    /// Entries finished since the start.
    pub entries: u64,
    /// When it last acknowledged something, Unix milliseconds.
    pub last_ack_ms: Option<u64>,
}

/// The reader.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ReaderStatus {
    /// What it is doing.
    #[serde(flatten)]
    pub state: State,
    /// The relay's host.
    pub relay: String,
    /// Whether the websocket is open.
    pub connected: bool,
    /// When it was last open, Unix milliseconds; the start of the process before that.
    pub connected_ms: u64,
    /// The position up to which everything is in the stream.
    pub cursor: Option<i64>,
    /// Data frames since the start.
    pub frames: u64,
    /// When the last one came, Unix milliseconds.
    pub last_frame_ms: Option<u64>,
    /// Gaps since the start: events that the relay no longer had.
    pub gaps: u64,
}

/// Everything.
#[derive(Debug, Default)]
pub struct Status {
    /// `None` in a process without a reader.
    pub reader: Option<Mutex<ReaderStatus>>,
    /// Empty in a process without pipelines.
    pub pipelines: Vec<Mutex<PipelineStatus>>,
    /// How the stream was at the last look, and when that was; `None` before the first.
    pub stream: Mutex<Option<(Look, u64)>>,
    /// Entries finished by all pipelines since the start.
    pub entries: AtomicU64,
    /// When anything was last acknowledged, Unix milliseconds; 0 for never.
    pub last_ack_ms: AtomicU64,
    /// When the process started, Unix milliseconds.
    pub started_ms: u64,
}

/// The lock's content, whoever panicked while holding it: every write leaves it whole.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Unix time in milliseconds.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl Status {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(reader: Option<String>, consumers: Vec<String>) -> Self {
        Self {
            reader: reader.map(|relay| {
                Mutex::new(ReaderStatus { relay, connected_ms: now_ms(), ..ReaderStatus::default() })
            }),
            pipelines: consumers
                .into_iter()
                .map(|consumer| Mutex::new(PipelineStatus { consumer, ..PipelineStatus::default() }))
                .collect(),
            started_ms: now_ms(),
            ..Self::default()
        }
    }

    /// Changes what is said of the reader.
    pub fn reader(&self, change: impl FnOnce(&mut ReaderStatus)) {
        if let Some(reader) = &self.reader {
            change(&mut lock(reader));
        }
    }

    /// Changes what is said of one pipeline.
    pub fn pipeline(&self, index: usize, change: impl FnOnce(&mut PipelineStatus)) {
        if let Some(pipeline) = self.pipelines.get(index) {
            change(&mut lock(pipeline));
        }
    }

    /// Notes that a pipeline acknowledged entries.
    pub fn acknowledged(&self, index: usize, entries: u64) {
        let now = now_ms();
        self.pipeline(index, |pipeline| {
            pipeline.entries += entries;
            pipeline.last_ack_ms = Some(now);
        });
        self.entries.fetch_add(entries, Ordering::Relaxed);
        self.last_ack_ms.store(now, Ordering::Relaxed);
    }

    /// The stream as last seen.
    #[must_use]
    pub fn look(&self) -> Option<(Look, u64)> {
        lock(&self.stream).clone()
    }
}
