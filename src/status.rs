//! The status of the parts, for readiness, `/status`, the page and the progress line.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::mutex::lock;
use crate::stream::janitor::Look;
use crate::stream::legacy::Counts;
use crate::stream::noted::Refill;
use crate::stream::tasks::Tasks;
use crate::time::now_ms;

/// What a part is doing, with the reason if that is not normal operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Not connected yet.
    #[default]
    Starting,
    /// Working, or waiting for work.
    Running,
    /// Redis is down.
    WaitingForRedis {
        /// The error.
        reason: String,
    },
    /// PostgreSQL is down, or temporarily refuses.
    WaitingForPostgres {
        /// The error.
        reason: String,
    },
    /// The relay is down.
    WaitingForRelay {
        /// The error.
        reason: String,
    },
    /// The stream or Redis's memory is at its mark.
    WaitingForRoom {
        /// Which mark.
        reason: String,
    },
    /// RabbitMQ is down, or refuses.
    WaitingForBroker {
        /// The error.
        reason: String,
    },
    /// Another reader holds the lease.
    WaitingForLease {
        /// Why.
        reason: String,
    },
    /// Paused by an operator.
    Paused,
    /// Needs operator action.
    Halted {
        /// What it is.
        reason: String,
    },
    /// Ended.
    Stopped,
}

impl State {
    /// The states that a pipeline can be in, as named on the status page and in the metrics.
    pub const OF_PIPELINES: [&str; 8] = [
        "starting",
        "running",
        "waiting_for_redis",
        "waiting_for_postgres",
        "waiting_for_lease",
        "paused",
        "halted",
        "stopped",
    ];

    /// Its name on the status page and in the metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::WaitingForRedis { .. } => "waiting_for_redis",
            Self::WaitingForPostgres { .. } => "waiting_for_postgres",
            Self::WaitingForRelay { .. } => "waiting_for_relay",
            Self::WaitingForRoom { .. } => "waiting_for_room",
            Self::WaitingForBroker { .. } => "waiting_for_broker",
            Self::WaitingForLease { .. } => "waiting_for_lease",
            Self::Paused => "paused",
            Self::Halted { .. } => "halted",
            Self::Stopped => "stopped",
        }
    }
}

/// One pipeline.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PipelineStatus {
    /// Its name in the consumer group.
    pub consumer: String,
    /// What it is doing.
    #[serde(flatten)]
    pub state: State,
    /// Since when, Unix milliseconds.
    pub since_ms: u64,
    /// Entries in hand.
    pub in_flight: u64,
    /// Entries finished since the start.
    pub entries: u64,
    /// Repeated attempts since the start.
    pub retries: u64,
    /// Finished entries that left dead letters.
    pub dead_letters: u64,
    /// When it last acknowledged something, Unix milliseconds.
    pub last_ack_ms: Option<u64>,
}

/// The reader.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ReaderStatus {
    /// What it is doing.
    #[serde(flatten)]
    pub state: State,
    /// Since when, Unix milliseconds.
    pub since_ms: u64,
    /// The relay's host.
    pub relay: String,
    /// Whether the websocket is open.
    pub connected: bool,
    /// When it was last open, Unix milliseconds; initially the start of the process.
    pub connected_ms: u64,
    /// The position up to which everything is in the stream.
    pub cursor: Option<i64>,
    /// Data frames since the start.
    pub frames: u64,
    /// When the last one arrived, Unix milliseconds.
    pub last_frame_ms: Option<u64>,
    /// Gaps since the start: events that the relay no longer had.
    pub gaps: u64,
    /// When the reader last received something, or was last steadily connected to a relay that had nothing to send,
    /// Unix milliseconds; initially the start of the process.
    pub taking_in_ms: u64,
}

/// A source of events besides the relay.
#[derive(Clone, Debug, Default, Serialize)]
pub struct OriginStatus {
    /// Its kind, as in the metrics.
    pub origin: &'static str,
    /// Where the events come from.
    pub source: String,
    /// What it is doing.
    #[serde(flatten)]
    pub state: State,
    /// Since when, Unix milliseconds.
    pub since_ms: u64,
    /// Messages taken and acknowledged since the start.
    pub messages: u64,
    /// Those of them that could not be used, and are dead letters.
    pub unusable: u64,
    /// Those of them that may have been delivered before.
    pub redelivered: u64,
    /// Messages that nobody has taken yet; `None` before that is known.
    pub waiting: Option<u64>,
    /// When messages were last acknowledged, Unix milliseconds.
    pub last_ms: Option<u64>,
}

/// Where applied events are sent, besides `/subscribe`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct OutputStatus {
    /// Its kind, as in the metrics.
    pub output: &'static str,
    /// Where the events go to.
    pub target: String,
    /// What it is doing.
    #[serde(flatten)]
    pub state: State,
    /// Since when, Unix milliseconds.
    pub since_ms: u64,
    /// Messages confirmed since the start.
    pub messages: u64,
    /// How far it is behind what is applied.
    pub behind_seconds: f64,
    /// When messages were last confirmed, Unix milliseconds.
    pub last_ms: Option<u64>,
}

/// A pipeline for tasks.
#[derive(Clone, Debug, Default, Serialize)]
pub struct HandlerStatus {
    /// What it is doing.
    #[serde(flatten)]
    pub state: State,
    /// Since when, Unix milliseconds.
    pub since_ms: u64,
    /// The task that it works on.
    pub task: Option<RunningTask>,
    /// Tasks done since the start.
    pub done: u64,
    /// Tasks that failed for good.
    pub failed: u64,
}

/// A task that is being worked on.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RunningTask {
    /// The function's name.
    #[serde(rename = "type")]
    pub function: String,
    /// Since when, Unix milliseconds.
    pub since_ms: u64,
}

impl HandlerStatus {
    /// Changes the state; returns the one before.
    pub fn enter(&mut self, state: State) -> State {
        enter(&mut self.state, &mut self.since_ms, state)
    }
}

impl OutputStatus {
    /// Changes the state.
    pub fn enter(&mut self, state: State) {
        enter(&mut self.state, &mut self.since_ms, state);
    }
}

/// A background task.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TaskStatus {
    /// When a round last succeeded, Unix milliseconds.
    pub last_ms: Option<u64>,
    /// Why the last round failed; `None` if it succeeded.
    pub error: Option<String>,
}

/// The repositories that were ever queued.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Repositories {
    /// Known to differ from what arrived.
    pub to_repair: u64,
    /// May lack something since a gap, or somebody asked for them.
    pub after_gap: u64,
    /// Queued by a backfill.
    pub to_backfill: u64,
    /// Compared.
    pub synced: u64,
    /// There is nothing to fetch.
    pub gone: u64,
    /// Given up.
    pub error: u64,
    /// How far each backfill is.
    pub backfills: Vec<BackfillStatus>,
}

/// Who reads `/subscribe` of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SubscribersReport {
    /// How many are connected.
    pub connected: u64,
    /// How far the last of them is behind the newest entry that is in the tables.
    pub furthest_behind_seconds: f64,
}

/// How far a backfill is.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BackfillStatus {
    /// The value of `BACKFILL`, or the gap.
    pub what: String,
    /// Accounts listed so far.
    pub listed: u64,
    /// Whether the list is complete.
    pub is_listed: bool,
    /// Repositories of all backfills that are still to be compared.
    pub left: u64,
    /// Repositories compared in a minute, on average since it began.
    pub per_minute: f64,
}

/// The status of the whole process.
#[derive(Debug, Default)]
pub struct Status {
    /// `None` in a process without a reader.
    pub reader: Option<Mutex<ReaderStatus>>,
    /// The sources of events besides the relay, by kind.
    pub origins: Mutex<BTreeMap<&'static str, OriginStatus>>,
    /// Where applied events are sent, by kind.
    pub outputs: Mutex<BTreeMap<&'static str, OutputStatus>>,
    /// The pipelines for tasks, by number.
    pub handlers: Mutex<BTreeMap<usize, HandlerStatus>>,
    /// How many tasks there are, at the last look; `None` before the first.
    pub tasks_seen: Mutex<Option<Tasks>>,
    /// Empty in a process without pipelines.
    pub pipelines: Vec<Mutex<PipelineStatus>>,
    /// The stream at the last look, and when that was; `None` before the first.
    pub stream: Mutex<Option<(Look, u64)>>,
    /// The background tasks by name.
    pub tasks: Mutex<BTreeMap<&'static str, TaskStatus>>,
    /// The repositories that were ever queued; `None` before they were counted.
    pub repositories: Mutex<Option<Repositories>>,
    /// The refill in progress, because PostgreSQL lost events.
    pub refill: Mutex<Option<Refill>>,
    /// Entries finished by all pipelines since the start.
    pub entries: AtomicU64,
    /// Entries finished per second over the last ten seconds; `None` in the first five.
    pub pace: Mutex<Option<f64>>,
    /// Entries finished, by type and outcome; see [`Counts`].
    pub commits: AtomicU64,
    /// As `commits`.
    pub identities: AtomicU64,
    /// As `commits`.
    pub accounts: AtomicU64,
    /// As `commits`.
    pub errors: AtomicU64,
    /// How long events took from XADD until they were durable.
    pub latency: Latency,
    /// When anything was last acknowledged, Unix milliseconds; 0 for never.
    pub last_ack_ms: AtomicU64,
    /// When the process started, Unix milliseconds.
    pub started_ms: u64,
    /// How the pipelines work.
    pub settings: Settings,
}

/// The settings that determine a worker's pace.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Settings {
    /// `TRANSACTION`.
    pub transaction: &'static str,
    /// `BATCH_SIZE`.
    pub batch_size: usize,
}

impl PipelineStatus {
    /// Changes the state; returns the one before.
    pub fn enter(&mut self, state: State) -> State {
        enter(&mut self.state, &mut self.since_ms, state)
    }
}

impl OriginStatus {
    /// Changes the state.
    pub fn enter(&mut self, state: State) {
        enter(&mut self.state, &mut self.since_ms, state);
    }
}

impl ReaderStatus {
    /// Changes the state; returns the one before.
    pub fn enter(&mut self, state: State) -> State {
        let before = enter(&mut self.state, &mut self.since_ms, state);
        let held_up = |state: &State| {
            matches!(
                state,
                State::Paused
                    | State::WaitingForRedis { .. }
                    | State::WaitingForRoom { .. }
                    | State::WaitingForLease { .. }
            )
        };
        // It could not receive anything until now.
        if held_up(&before) && !held_up(&self.state) {
            self.taking_in_ms = now_ms();
        }
        before
    }
}

/// A change of the reason alone is not a new state.
fn enter(state: &mut State, since_ms: &mut u64, new: State) -> State {
    if std::mem::discriminant(state) != std::mem::discriminant(&new) {
        *since_ms = now_ms();
    }
    std::mem::replace(state, new)
}

/// Buckets of [`Latency`]: four per doubling, up to a day and a half.
const LATENCIES: usize = 110;

/// A histogram of how long events took, in buckets that grow by a fifth. The difference of two snapshots gives the
/// percentiles of the time between them, and counting costs next to nothing.
#[derive(Debug)]
pub struct Latency([AtomicU64; LATENCIES]);

impl Default for Latency {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Latency {
    /// Counts an event.
    pub fn add(&self, ms: u64) {
        // The first bucket holds times below a millisecond.
        let bucket = if ms == 0 { 0 } else { 1 + ((ms as f64).log2() * 4.0) as usize };
        self.0[bucket.min(LATENCIES - 1)].fetch_add(1, Ordering::Relaxed);
    }

    /// The current counts.
    #[must_use]
    pub fn counts(&self) -> Vec<u64> {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }
}

/// The time, in milliseconds, within which this share of the events between two snapshots finished; `None` without any.
#[must_use]
pub fn percentile(before: &[u64], now: &[u64], share: f64) -> Option<f64> {
    let counts = || now.iter().zip(before).map(|(now, before)| now.saturating_sub(*before));
    let total: u64 = counts().sum();
    let mut left = (total as f64 * share).max(1.0);
    for (bucket, count) in counts().enumerate().filter(|(_, count)| *count > 0) {
        let count = count as f64;
        if left <= count {
            // Assumes an even spread within a bucket.
            let bound = |bucket: usize| 2_f64.powf(bucket as f64 / 4.0);
            let (low, high) = if bucket == 0 { (0.0, 1.0) } else { (bound(bucket - 1), bound(bucket)) };
            return Some(low + (high - low) * left / count);
        }
        left -= count;
    }
    None
}

impl Status {
    /// A status before the parts report anything.
    #[must_use]
    pub fn new(reader: Option<String>, consumers: Vec<String>, settings: Settings) -> Self {
        Self {
            settings,
            reader: reader.map(|relay| {
                Mutex::new(ReaderStatus {
                    relay,
                    connected_ms: now_ms(),
                    taking_in_ms: now_ms(),
                    since_ms: now_ms(),
                    ..ReaderStatus::default()
                })
            }),
            pipelines: consumers
                .into_iter()
                .map(|consumer| {
                    Mutex::new(PipelineStatus { consumer, since_ms: now_ms(), ..PipelineStatus::default() })
                })
                .collect(),
            started_ms: now_ms(),
            ..Self::default()
        }
    }

    /// Updates a task's status.
    pub fn task(&self, name: &'static str, change: impl FnOnce(&mut TaskStatus)) {
        change(lock(&self.tasks).entry(name).or_default());
    }

    /// Updates the status of an output.
    pub fn output(&self, kind: &'static str, change: impl FnOnce(&mut OutputStatus)) {
        change(lock(&self.outputs).entry(kind).or_default());
    }

    /// Updates the status of a pipeline for tasks.
    pub fn handler(&self, index: usize, change: impl FnOnce(&mut HandlerStatus)) {
        change(lock(&self.handlers).entry(index).or_default());
    }

    /// Updates the status of a source of events.
    pub fn origin(&self, kind: &'static str, change: impl FnOnce(&mut OriginStatus)) {
        change(lock(&self.origins).entry(kind).or_default());
    }

    /// Updates the reader's status.
    pub fn reader(&self, change: impl FnOnce(&mut ReaderStatus)) {
        if let Some(reader) = &self.reader {
            change(&mut lock(reader));
        }
    }

    /// Updates one pipeline's status.
    pub fn pipeline(&self, index: usize, change: impl FnOnce(&mut PipelineStatus)) {
        if let Some(pipeline) = self.pipelines.get(index) {
            change(&mut lock(pipeline));
        }
    }

    /// Records that a pipeline acknowledged entries.
    pub fn acknowledged(&self, index: usize, entries: u64) {
        let now = now_ms();
        self.pipeline(index, |pipeline| {
            pipeline.entries += entries;
            pipeline.last_ack_ms = Some(now);
        });
        self.entries.fetch_add(entries, Ordering::Relaxed);
        self.last_ack_ms.store(now, Ordering::Relaxed);
    }

    /// Counts a finished entry.
    pub fn count(&self, event_type: &str, dead_letter: bool) {
        let counter = match event_type {
            "commit" => Some(&self.commits),
            "identity" => Some(&self.identities),
            "account" => Some(&self.accounts),
            _ => None,
        };
        for counter in counter.into_iter().chain(dead_letter.then_some(&self.errors)) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The number of finished entries.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            commits: load(&self.commits),
            identities: load(&self.identities),
            accounts: load(&self.accounts),
            total: load(&self.entries),
            errors: load(&self.errors),
        }
    }

    /// The stream as last seen.
    #[must_use]
    pub fn look(&self) -> Option<(Look, u64)> {
        lock(&self.stream).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_serialises_to_its_name() {
        let reason = String::new;
        for state in [
            State::Starting,
            State::Running,
            State::WaitingForRedis { reason: reason() },
            State::WaitingForPostgres { reason: reason() },
            State::WaitingForRelay { reason: reason() },
            State::WaitingForRoom { reason: reason() },
            State::WaitingForBroker { reason: reason() },
            State::WaitingForLease { reason: reason() },
            State::Paused,
            State::Halted { reason: reason() },
            State::Stopped,
        ] {
            assert_eq!(serde_json::to_value(&state).unwrap()["state"], state.name());
        }
    }
}
