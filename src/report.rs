//! `/status` and `standpipe status`: stream, group, pipelines, reader, dead letters; from Redis, and from the process
//! if there is one.

pub mod table;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use crate::mutex::lock;
use crate::status::{
    HandlerStatus, OriginStatus, OutputStatus, PipelineStatus, ReaderStatus, Repositories, Settings, Status,
    SubscribersReport, TaskStatus,
};
use crate::stream::accounts::Backlog;
use crate::stream::gap::Missed;
use crate::stream::group::ConsumerInfo;
use crate::stream::tasks::Tasks;
use crate::stream::{Stream, StreamResult};
use crate::time::now_ms;

/// The complete status.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The program's version.
    pub version: &'static str,
    /// The stream and its group.
    pub stream: StreamReport,
    /// The group's consumers, including those of other processes and programs.
    pub consumers: Vec<ConsumerInfo>,
    /// Messages for functions.
    pub tasks: Tasks,
    /// Dead letters.
    pub dead_letters: u64,
    /// Known gaps and losses.
    pub missing: Missed,
    /// What verification remembers and has left to do.
    pub verification: Backlog,
    /// The process's own report; absent if only Redis was queried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessReport>,
}

/// The stream and its group.
#[derive(Debug, Serialize, Deserialize)]
pub struct StreamReport {
    /// The key.
    pub key: String,
    /// The consumer group.
    pub group: String,
    /// Whether the stream exists.
    pub exists: bool,
    /// Whether the group exists.
    pub group_exists: bool,
    /// Entries in the stream.
    pub length: u64,
    /// Entries among them that every group has acknowledged.
    pub acknowledged: u64,
    /// Entries not yet delivered; null when Redis does not know.
    pub waiting: Option<u64>,
    /// Entries delivered and not acknowledged.
    pub pending: u64,
    /// Age of the oldest entry that is not acknowledged.
    pub oldest_waiting_seconds: Option<f64>,
    /// The group whose progress bounds the trim.
    pub trim_held_by: String,
    /// The relay position up to which everything is in the stream.
    pub cursor: Option<i64>,
    /// The relay it belongs to.
    pub relay: Option<String>,
}

/// The process's own report.
#[derive(Debug, Serialize)]
pub struct ProcessReport {
    /// Seconds since its start.
    pub uptime_seconds: f64,
    /// Entries finished since its start.
    pub entries: u64,
    /// Entries per second over about the last ten seconds.
    pub entries_per_second: f64,
    /// The pipelines' settings.
    #[serde(flatten)]
    pub settings: Settings,
    /// Each pipeline.
    pub pipelines: Vec<PipelineStatus>,
    /// The reader, if this process has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reader: Option<ReaderStatus>,
    /// Its other sources of events.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub origins: Vec<OriginStatus>,
    /// Where it sends what is applied, besides `/subscribe`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<OutputStatus>,
    /// Its pipelines for tasks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub handlers: Vec<HandlerStatus>,
    /// Connections to PostgreSQL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolReport>,
    /// The repositories that were ever queued, if this process has counted them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repositories: Option<Repositories>,
    /// Who reads `/subscribe`, if it is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subscribers: Option<SubscribersReport>,
    /// The background tasks by name.
    pub tasks: BTreeMap<&'static str, TaskStatus>,
}

/// Connections to PostgreSQL.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PoolReport {
    /// Open.
    pub size: usize,
    /// In use.
    pub in_use: usize,
    /// Upper bound.
    pub max: usize,
}

/// The status as Redis knows it.
///
/// # Errors
///
/// It cannot be reached.
pub async fn report(stream: &mut Stream) -> StreamResult<Report> {
    let look = stream.look().await?;
    let (cursor, relay) = stream.cursor_and_relay().await?;
    let missing = stream.missed().await?;
    let consumers = if look.group { stream.consumers().await? } else { Vec::new() };
    let tasks = stream.of_tasks().count_tasks().await?;
    let dead_letters = stream.count_dead_letters().await?;
    let verification = stream.verification_backlog().await?;
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        stream: StreamReport {
            key: stream.keys().stream.clone(),
            group: stream.keys().group.clone(),
            exists: look.exists,
            group_exists: look.group,
            length: look.length,
            acknowledged: look.acknowledged,
            waiting: look.waiting(),
            pending: look.pending,
            oldest_waiting_seconds: look.oldest_seconds(),
            trim_held_by: look.held_by,
            cursor: cursor.and_then(|cursor| cursor.parse().ok()),
            relay,
        },
        consumers,
        tasks,
        dead_letters,
        missing,
        verification,
        process: None,
    })
}

/// This process's own report.
#[must_use]
pub fn process(status: &Status, pool: Option<PoolReport>) -> ProcessReport {
    let uptime = now_ms().saturating_sub(status.started_ms) as f64 / 1000.0;
    let entries = status.entries.load(Ordering::Relaxed);
    ProcessReport {
        uptime_seconds: uptime,
        entries,
        entries_per_second: lock(&status.pace).unwrap_or(entries as f64 / uptime.max(1.0)),
        settings: status.settings,
        pipelines: status.pipelines.iter().map(|pipeline| lock(pipeline).clone()).collect(),
        reader: status.reader.as_ref().map(|reader| lock(reader).clone()),
        origins: lock(&status.origins).values().cloned().collect(),
        outputs: lock(&status.outputs).values().cloned().collect(),
        handlers: lock(&status.handlers).values().cloned().collect(),
        pool,
        repositories: lock(&status.repositories).clone(),
        subscribers: None,
        tasks: lock(&status.tasks).clone(),
    }
}
