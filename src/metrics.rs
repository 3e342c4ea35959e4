//! Every metric's name and help, once. Counters exist at zero from the start: absence is never ambiguous.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::event::{Kind, Reason};
use crate::stream::group::Ensured;
use crate::stream::janitor::Look;

/// Operations by kind and outcome: applied, or stale where something newer was there.
pub const EVENTS: &str = "standpipe_operations_total";
/// Entries finished, by type.
pub const ENTRIES: &str = "standpipe_entries_total";
/// From XADD to durable in PostgreSQL.
pub const EVENT_SECONDS: &str = "standpipe_event_seconds";
/// From sending a batch's calls to its flush.
pub const BATCH_SECONDS: &str = "standpipe_batch_seconds";
/// From sending a batch's calls to their commits, flush not included.
pub const TRANSACTION_SECONDS: &str = "standpipe_transaction_seconds";
/// Entries per batch.
pub const BATCH_SIZE: &str = "standpipe_batch_entries";
/// Repetitions, by reason.
pub const RETRIES: &str = "standpipe_retries_total";
/// Dead letters, by reason.
pub const DEAD_LETTERS: &str = "standpipe_dead_letters_total";
/// Entries kept pending because the dead letters are full.
pub const DEAD_LETTERS_FULL: &str = "standpipe_dead_letters_overflow_total";
/// Entries that another client trimmed while they were pending.
pub const LOST: &str = "standpipe_entries_lost_total";
/// Times that the reader was set back for such entries.
pub const SET_BACK: &str = "standpipe_reader_set_back_total";
/// Deleted accounts whose records have been removed.
pub const PURGED_ACCOUNTS: &str = "standpipe_purged_accounts_total";
/// Records of deleted accounts that have been removed.
pub const PURGED_RECORDS: &str = "standpipe_purged_records_total";
/// Entries taken over from consumers that are gone.
pub const CLAIMED: &str = "standpipe_claimed_entries_total";
/// Group recreations.
pub const GROUP_RECREATED: &str = "standpipe_group_recreations_total";
/// Stream losses.
pub const STREAM_LOST: &str = "standpipe_stream_losses_total";
/// Stream length.
pub const STREAM_LENGTH: &str = "standpipe_stream_entries";
/// Entries not delivered yet.
pub const WAITING: &str = "standpipe_waiting_entries";
/// Whether the number of waiting entries is known.
pub const LAG_KNOWN: &str = "standpipe_lag_known";
/// Entries delivered and not acknowledged.
pub const PENDING: &str = "standpipe_pending_entries";
/// Age of the oldest entry that is not durable.
pub const OLDEST: &str = "standpipe_oldest_waiting_seconds";
/// Entries trimmed.
pub const TRIMMED: &str = "standpipe_trimmed_entries_total";
/// Pipelines in each state.
pub const PIPELINES: &str = "standpipe_pipelines";
/// Whether an operator paused a part.
pub const PAUSED: &str = "standpipe_paused";
/// Connections in the pool.
pub const POOL_SIZE: &str = "standpipe_pool_connections";
/// Connections in use.
pub const POOL_IN_USE: &str = "standpipe_pool_in_use_connections";
/// Time spent waiting for a connection.
pub const POOL_WAIT: &str = "standpipe_pool_wait_seconds";
/// Redis connections reopened after an error.
pub const REDIS_RECONNECTS: &str = "standpipe_redis_reconnects_total";
/// Frames by type.
pub const RELAY_FRAMES: &str = "standpipe_relay_frames_total";
/// Frames that broke the protocol.
pub const RELAY_BAD_FRAMES: &str = "standpipe_relay_undecodable_frames_total";
/// Records that could not be decoded.
pub const RELAY_BAD_RECORDS: &str = "standpipe_relay_undecodable_records_total";
/// Missing data because events from the relay could not be used, by reason.
pub const RELAY_MISSED: &str = "standpipe_relay_missed_total";
/// Connections to the relay.
pub const RELAY_CONNECTS: &str = "standpipe_relay_connects_total";
/// Gaps that the relay or a change of relay left.
pub const RELAY_GAPS: &str = "standpipe_relay_gaps_total";
/// Age of the last data frame.
pub const RELAY_FRAME_AGE: &str = "standpipe_relay_last_frame_age_seconds";
/// Cursor.
pub const CURSOR: &str = "standpipe_cursor";
/// Time that the reader spent waiting for room.
pub const BACKPRESSURE: &str = "standpipe_backpressure_seconds_total";
/// Times that PostgreSQL knew less than it had acknowledged.
pub const DATABASE_WENT_BACK: &str = "standpipe_database_went_back_total";
/// Whether events that PostgreSQL lost are being read again.
pub const REFILLING: &str = "standpipe_refilling";
/// Build.
pub const BUILD: &str = "standpipe_build_info";

/// The reasons that [`RETRIES`] is counted by.
pub const RETRY_REASONS: [&str; 4] = ["reconnect", "retry", "halt", "split"];
/// The types that [`RELAY_FRAMES`] and [`ENTRIES`] are counted by; everything else is `other`.
pub const TYPES: [&str; 6] = ["commit", "identity", "account", "sync", "info", "other"];

/// The label for an event or frame type: never upstream's own words.
#[must_use]
pub fn type_label(event_type: &str) -> &'static str {
    TYPES.iter().find(|known| **known == event_type).copied().unwrap_or("other")
}

/// Counts what of the relay's events could not be used, by class.
pub fn missed(class: &'static str, by: u64) {
    metrics::counter!(RELAY_MISSED, "reason" => class).increment(by);
}

/// Counts a dead letter.
pub fn dead_letter(reason: Reason) {
    metrics::counter!(DEAD_LETTERS, "reason" => reason.name()).increment(1);
}

/// Sets whether events that PostgreSQL lost are being read again.
pub fn refilling(refilling: bool) {
    metrics::gauge!(REFILLING).set(if refilling { 1.0 } else { 0.0 });
}

/// Adds to a counter without labels.
pub fn count(name: &'static str, by: u64) {
    metrics::counter!(name).increment(by);
}

/// Counts a run of operations of one kind.
pub fn operations(kind: Kind, total: u32, applied: u32) {
    let name = kind.name();
    metrics::counter!(EVENTS, "kind" => name, "outcome" => "applied").increment(applied.into());
    metrics::counter!(EVENTS, "kind" => name, "outcome" => "stale")
        .increment(total.saturating_sub(applied).into());
}

/// Exports the state of the stream.
pub fn look(look: &Look) {
    let waiting = look.waiting();
    metrics::gauge!(STREAM_LENGTH).set(look.length as f64);
    metrics::gauge!(PENDING).set(look.pending as f64);
    metrics::gauge!(LAG_KNOWN).set(if waiting.is_some() { 1.0 } else { 0.0 });
    metrics::gauge!(WAITING).set(waiting.map_or(f64::NAN, |waiting| waiting as f64));
    metrics::gauge!(OLDEST).set(look.oldest_seconds().unwrap_or(0.0));
    count(TRIMMED, look.trimmed);
    note_removed(look.removed);
    if look.set_back {
        count(SET_BACK, 1);
        tracing::warn!(
            "the reader goes back to the lowest position that is not acknowledged, for what was removed"
        );
    }
}

/// Counts and logs that somebody else removed entries that may not have been acknowledged.
pub fn note_removed(entries: u64) {
    if entries > 0 {
        count(LOST, entries);
        tracing::error!(
            entries,
            "somebody else removed entries from the stream that may not have been acknowledged"
        );
    }
}

/// Counts a frame.
pub fn frame(event_type: &str) {
    metrics::counter!(RELAY_FRAMES, "type" => type_label(event_type)).increment(1);
}

/// Adds to [`BACKPRESSURE`]. Counters hold whole numbers: the rest below a second waits for the next.
pub fn backpressure(waited: Duration) {
    static MILLISECONDS: AtomicU64 = AtomicU64::new(0);
    let waited = u64::try_from(waited.as_millis()).unwrap_or(0);
    let total = MILLISECONDS.fetch_add(waited, Ordering::Relaxed) + waited;
    metrics::counter!(BACKPRESSURE).absolute(total / 1000);
}

/// Counts and logs that the stream or the group had to be created again.
pub fn note_ensured(ensured: Ensured) {
    if ensured.stream_lost {
        count(STREAM_LOST, 1);
        tracing::warn!(
            "the stream was gone: the reader goes back to the lowest position that was not acknowledged"
        );
    }
    if ensured.group_created {
        count(GROUP_RECREATED, 1);
        tracing::info!("created the missing consumer group");
    }
}

/// Installs the recorder, describes every metric and sets the counters to zero.
///
/// # Errors
///
/// A recorder is installed already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let seconds = [
        0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
        60.0, 600.0,
    ];
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &seconds)?
        .set_buckets_for_metric(
            Matcher::Full(BATCH_SIZE.to_owned()),
            &[1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0],
        )?
        .install_recorder()?;
    describe();
    zero();
    Ok(handle)
}

fn describe() {
    describe_counter!(
        EVENTS,
        "Operations finished, by kind and outcome (applied; stale: something newer was there)"
    );
    describe_counter!(ENTRIES, "Stream entries finished, by type");
    describe_histogram!(EVENT_SECONDS, Unit::Seconds, "From XADD to durable in PostgreSQL");
    describe_histogram!(BATCH_SECONDS, Unit::Seconds, "From sending a batch's calls to the end of its flush");
    describe_histogram!(TRANSACTION_SECONDS, Unit::Seconds, "From sending a batch's calls to their commits");
    describe_histogram!(BATCH_SIZE, "Entries per batch");
    describe_counter!(RETRIES, "Repeated attempts, by reason");
    describe_counter!(DEAD_LETTERS, "Operations and entries that can never be applied, by reason");
    describe_counter!(
        DEAD_LETTERS_FULL,
        "Entries left pending because the dead letters reached their budget"
    );
    describe_counter!(
        LOST,
        "Entries that somebody else removed from the stream and that may not have been acknowledged; a reader goes back for them"
    );
    describe_counter!(
        SET_BACK,
        "Times the reader was set back to re-read entries that somebody else removed"
    );
    describe_counter!(PURGED_ACCOUNTS, "Deleted accounts whose records have been removed");
    describe_counter!(PURGED_RECORDS, "Records of deleted accounts that have been removed");
    describe_counter!(CLAIMED, "Entries taken over from consumers that are gone");
    describe_counter!(GROUP_RECREATED, "Times that the consumer group had to be created");
    describe_counter!(STREAM_LOST, "Times that the stream was found deleted");
    describe_gauge!(STREAM_LENGTH, "Entries in the stream");
    describe_gauge!(
        WAITING,
        "Entries not yet delivered to any consumer; meaningless while standpipe_lag_known is 0"
    );
    describe_gauge!(LAG_KNOWN, "1 when Redis knows how many entries wait");
    describe_gauge!(PENDING, "Entries delivered and not acknowledged");
    describe_gauge!(OLDEST, Unit::Seconds, "Age of the oldest entry that is not acknowledged");
    describe_counter!(TRIMMED, "Entries trimmed after every group had acknowledged them");
    describe_gauge!(PIPELINES, "Pipelines, by state: at work, or what they wait for");
    describe_gauge!(PAUSED, "1 while a part is paused manually: reader or pipelines");
    describe_gauge!(POOL_SIZE, "Connections to PostgreSQL");
    describe_gauge!(POOL_IN_USE, "Connections to PostgreSQL in use");
    describe_histogram!(POOL_WAIT, Unit::Seconds, "Time spent waiting for a connection from the pool");
    describe_counter!(REDIS_RECONNECTS, "Connections to Redis given up after an error");
    describe_counter!(RELAY_FRAMES, "Frames from the relay, by type");
    describe_counter!(RELAY_BAD_FRAMES, "Frames that broke the protocol; each costs the connection");
    describe_counter!(RELAY_BAD_RECORDS, "Records left out because they could not be decoded");
    describe_counter!(
        RELAY_MISSED,
        "What is missing from the tables because events of the relay could not be used, by reason"
    );
    describe_counter!(RELAY_CONNECTS, "Connections to the relay");
    describe_counter!(
        RELAY_GAPS,
        "Gaps: the relay no longer had the requested events, or the relay was changed"
    );
    describe_gauge!(RELAY_FRAME_AGE, Unit::Seconds, "Age of the last data frame");
    describe_gauge!(CURSOR, "The relay position up to which everything is in the stream");
    describe_counter!(BACKPRESSURE, Unit::Seconds, "Time that the reader waited for room in Redis");
    describe_counter!(
        DATABASE_WENT_BACK,
        "Times PostgreSQL knew less than it had acknowledged: a restored backup, a failover, another database"
    );
    describe_gauge!(REFILLING, "1 while what PostgreSQL had lost is being read again from the relay");
    describe_gauge!(BUILD, "1, with the version and the commit");
}

fn zero() {
    for kind in Kind::ALL {
        for outcome in ["applied", "stale"] {
            metrics::counter!(EVENTS, "kind" => kind.name(), "outcome" => outcome).absolute(0);
        }
    }
    for reason in Reason::ALL {
        metrics::counter!(DEAD_LETTERS, "reason" => reason.name()).absolute(0);
    }
    for class in crate::stream::gap::MISSED {
        metrics::counter!(RELAY_MISSED, "reason" => class).absolute(0);
    }
    for reason in RETRY_REASONS {
        metrics::counter!(RETRIES, "reason" => reason).absolute(0);
    }
    for name in TYPES {
        metrics::counter!(RELAY_FRAMES, "type" => name).absolute(0);
        metrics::counter!(ENTRIES, "type" => name).absolute(0);
    }
    for name in [
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
        BACKPRESSURE,
        DATABASE_WENT_BACK,
    ] {
        metrics::counter!(name).absolute(0);
    }
    for part in ["reader", "pipelines"] {
        metrics::gauge!(PAUSED, "part" => part).set(0.0);
    }
    metrics::gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION"), "commit" => env!("STANDPIPE_COMMIT"))
        .set(1.0);
}
