//! The counters that the page shows: kept here, where the page can read them, and passed to the exporter before each
//! scrape.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{
    BACKPRESSURE, CLAIMED, DATABASE_WENT_BACK, DEAD_LETTERS, DEAD_LETTERS_FULL, EVENTS, GROUP_RECREATED,
    INGESTED, LOST, ORIGIN_GAPS, OUTPUT_SKIPPED, PURGED_ACCOUNTS, PURGED_RECORDS, REDIS_RECONNECTS,
    RELAY_BAD_FRAMES, RELAY_BAD_RECORDS, RELAY_CONNECTS, RELAY_GAPS, RELAY_UNWANTED, RETRIES, RETRY_REASONS,
    SET_BACK, STREAM_LOST, SUBSCRIBER_MESSAGES, SUBSCRIBERS_UNREADABLE, TRIMMED,
};
use crate::event::{Kind, Reason};

/// Counters without labels.
const PLAIN: [&str; 21] = [
    DEAD_LETTERS_FULL,
    LOST,
    SET_BACK,
    PURGED_ACCOUNTS,
    PURGED_RECORDS,
    CLAIMED,
    GROUP_RECREATED,
    STREAM_LOST,
    TRIMMED,
    REDIS_RECONNECTS,
    RELAY_BAD_FRAMES,
    RELAY_BAD_RECORDS,
    RELAY_CONNECTS,
    RELAY_GAPS,
    RELAY_UNWANTED,
    DATABASE_WENT_BACK,
    SUBSCRIBER_MESSAGES,
    SUBSCRIBERS_UNREADABLE,
    INGESTED,
    OUTPUT_SKIPPED,
    ORIGIN_GAPS,
];

/// The outcome of one kind's operations.
struct Operations {
    applied: AtomicU64,
    stale: AtomicU64,
}

static OPERATIONS: [Operations; Kind::ALL.len()] =
    [const { Operations { applied: AtomicU64::new(0), stale: AtomicU64::new(0) } }; Kind::ALL.len()];
static LETTERS: [AtomicU64; Reason::ALL.len()] = [const { AtomicU64::new(0) }; Reason::ALL.len()];
static REPETITIONS: [AtomicU64; RETRY_REASONS.len()] = [const { AtomicU64::new(0) }; RETRY_REASONS.len()];
static COUNTS: [AtomicU64; PLAIN.len()] = [const { AtomicU64::new(0) }; PLAIN.len()];
static BACKPRESSURE_MS: AtomicU64 = AtomicU64::new(0);

fn plain(name: &str) -> Option<&'static AtomicU64> {
    let place = PLAIN.iter().position(|known| *known == name);
    debug_assert!(place.is_some(), "{name} is not a counter without labels");
    place.map(|place| &COUNTS[place])
}

/// Counts operations of one kind.
pub fn operations(kind: Kind, total: u32, applied: u32) {
    let counts = &OPERATIONS[kind as usize];
    counts.applied.fetch_add(applied.into(), Ordering::Relaxed);
    counts.stale.fetch_add(total.saturating_sub(applied).into(), Ordering::Relaxed);
}

/// Counts a dead letter.
pub fn dead_letter(reason: Reason) {
    LETTERS[reason as usize].fetch_add(1, Ordering::Relaxed);
}

/// Counts a repetition; `reason` is one of [`RETRY_REASONS`].
pub fn retry(reason: &str) {
    let place = RETRY_REASONS.iter().position(|known| *known == reason);
    debug_assert!(place.is_some(), "{reason} is not one of the reasons");
    if let Some(place) = place {
        REPETITIONS[place].fetch_add(1, Ordering::Relaxed);
    }
}

/// Adds to a counter without labels.
pub fn count(name: &'static str, by: u64) {
    if let Some(count) = plain(name) {
        count.fetch_add(by, Ordering::Relaxed);
    }
}

/// Adds to the time that the reader waited for room.
pub fn backpressure(waited: Duration) {
    BACKPRESSURE_MS.fetch_add(u64::try_from(waited.as_millis()).unwrap_or(0), Ordering::Relaxed);
}

/// How many operations of a kind were applied, and how many were stale.
#[must_use]
pub fn of_kind(kind: Kind) -> (u64, u64) {
    let counts = &OPERATIONS[kind as usize];
    (counts.applied.load(Ordering::Relaxed), counts.stale.load(Ordering::Relaxed))
}

/// Dead letters by reason.
pub fn dead_letters() -> impl Iterator<Item = (&'static str, u64)> {
    Reason::ALL.into_iter().map(|reason| (reason.name(), LETTERS[reason as usize].load(Ordering::Relaxed)))
}

/// Repetitions by reason.
pub fn retries() -> impl Iterator<Item = (&'static str, u64)> {
    RETRY_REASONS.into_iter().zip(&REPETITIONS).map(|(reason, count)| (reason, count.load(Ordering::Relaxed)))
}

/// A counter without labels.
#[must_use]
pub fn total(name: &str) -> u64 {
    plain(name).map_or(0, |count| count.load(Ordering::Relaxed))
}

/// Whole seconds that the reader waited for room.
#[must_use]
pub fn backpressure_seconds() -> u64 {
    BACKPRESSURE_MS.load(Ordering::Relaxed) / 1000
}

/// Passes them all to the exporter.
pub fn export() {
    for kind in Kind::ALL {
        let (applied, stale) = of_kind(kind);
        metrics::counter!(EVENTS, "kind" => kind.name(), "outcome" => "applied").absolute(applied);
        metrics::counter!(EVENTS, "kind" => kind.name(), "outcome" => "stale").absolute(stale);
    }
    for (reason, count) in dead_letters() {
        metrics::counter!(DEAD_LETTERS, "reason" => reason).absolute(count);
    }
    for (reason, count) in retries() {
        metrics::counter!(RETRIES, "reason" => reason).absolute(count);
    }
    for name in PLAIN {
        metrics::counter!(name).absolute(total(name));
    }
    metrics::counter!(BACKPRESSURE).absolute(backpressure_seconds());
}
