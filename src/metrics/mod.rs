//! Every metric's name and help, once. Counters exist at zero from the start: absence is never ambiguous.

mod describe;
pub mod totals;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

pub use self::totals::{count, dead_letter, operations, retry};
use crate::status::{Repositories, SubscribersReport};
use crate::stream::accounts::Backlog;
use crate::stream::group::Ensured;
use crate::stream::janitor::Look;
use crate::stream::tasks::Tasks;
use crate::verify::Fault;

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
/// Entries that another client removed before they were known to be acknowledged.
pub const LOST: &str = "standpipe_entries_lost_total";
/// Times that the reader was set back for such entries.
pub const SET_BACK: &str = "standpipe_reader_set_back_total";
/// Deleted accounts whose records have been removed.
pub const PURGED_ACCOUNTS: &str = "standpipe_purged_accounts_total";
/// Records of deleted accounts that have been removed.
pub const PURGED_RECORDS: &str = "standpipe_purged_records_total";
/// Entries taken over from dead consumers.
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
/// Events of accounts that are not wanted.
pub const RELAY_UNWANTED: &str = "standpipe_relay_unwanted_events_total";
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
/// Commits verified, by result.
pub const VERIFIED: &str = "standpipe_verified_commits_total";
/// Repositories that have to be repaired, by reason.
pub const REPAIRS_REQUESTED: &str = "standpipe_repairs_requested_total";
/// Accounts with a commit whose signature is still to be checked.
pub const UNCHECKED: &str = "standpipe_unchecked_accounts";
/// Accounts whose head is known.
pub const ACCOUNTS: &str = "standpipe_verified_accounts";
/// Repositories that have to be repaired.
pub const REPAIRS: &str = "standpipe_repairs_waiting";
/// Repositories by state.
pub const REPOSITORIES: &str = "standpipe_repositories";
/// Their states.
const REPOSITORY_STATES: [&str; 6] = ["to_repair", "after_gap", "to_backfill", "synced", "gone", "error"];
/// Repairs that ended, by result.
pub const REPAIRED: &str = "standpipe_repairs_total";
/// Lookups of handles, by result.
pub const HANDLES: &str = "standpipe_handle_lookups_total";
/// Lookups of DID documents, by result.
pub const LOOKUPS: &str = "standpipe_identity_lookups_total";
/// Entries before the first that some group has not acknowledged.
pub const ACKNOWLEDGED: &str = "standpipe_acknowledged_entries";
/// Subscribers connected.
pub const SUBSCRIBERS: &str = "standpipe_subscribers";
/// How far the last subscriber is behind.
pub const SUBSCRIBERS_BEHIND: &str = "standpipe_subscribers_behind_seconds";
/// Messages sent to subscribers.
pub const SUBSCRIBER_MESSAGES: &str = "standpipe_subscriber_messages_total";
/// Subscribers disconnected, by reason.
pub const SUBSCRIBERS_ENDED: &str = "standpipe_subscribers_disconnected_total";
/// Entries that could not be made into messages.
pub const SUBSCRIBERS_UNREADABLE: &str = "standpipe_subscriber_unreadable_entries_total";
/// Messages taken from an origin, by result.
pub const ORIGIN_MESSAGES: &str = "standpipe_origin_messages_total";
/// Messages that wait at an origin.
pub const ORIGIN_WAITING: &str = "standpipe_origin_waiting_messages";
/// Whether an origin is disconnected.
pub const ORIGIN_DISCONNECTED: &str = "standpipe_origin_disconnected";
/// Gaps at an origin: messages that were deleted there before they were taken.
pub const ORIGIN_GAPS: &str = "standpipe_origin_gaps_total";
/// Messages that an output delivered.
pub const OUTPUT_MESSAGES: &str = "standpipe_output_messages_total";
/// How far an output is behind.
pub const OUTPUT_BEHIND: &str = "standpipe_output_behind_seconds";
/// Whether an output is disconnected.
pub const OUTPUT_DISCONNECTED: &str = "standpipe_output_disconnected";
/// Tasks that ended, and attempts to be repeated, by outcome.
pub const TASKS: &str = "standpipe_tasks_total";
/// The outcomes.
const TASK_OUTCOMES: [&str; 4] = ["done", "repeated", "retried", "failed"];
/// How long an attempt took.
pub const TASK_SECONDS: &str = "standpipe_task_seconds";
/// Tasks that nobody has begun with.
pub const TASKS_WAITING: &str = "standpipe_tasks_waiting";
/// Tasks that somebody has begun with.
pub const TASKS_BEGUN: &str = "standpipe_tasks_begun";
/// How long the oldest task has been waiting.
pub const TASKS_OLDEST: &str = "standpipe_tasks_oldest_waiting_seconds";
/// Entries that outputs did not get.
pub const OUTPUT_SKIPPED: &str = "standpipe_output_skipped_entries_total";
/// Requests to `POST /events`, by result.
pub const INGESTS: &str = "standpipe_ingest_requests_total";
/// Events accepted over HTTP.
pub const INGESTED: &str = "standpipe_ingested_events_total";
/// Build.
pub const BUILD: &str = "standpipe_build_info";

/// RabbitMQ, as an origin and as an output.
pub const RABBITMQ: &str = "rabbitmq";
/// Kafka.
pub const KAFKA: &str = "kafka";
/// The reasons that [`RETRIES`] is counted by.
pub const RETRY_REASONS: [&str; 4] = ["reconnect", "retry", "halt", "split"];
/// The types that [`RELAY_FRAMES`] and [`ENTRIES`] are counted by; everything else is `other`.
pub const TYPES: [&str; 6] = ["commit", "identity", "account", "sync", "info", "other"];

/// The label for an event or frame type: never upstream's own text.
#[must_use]
pub fn type_label(event_type: &str) -> &'static str {
    TYPES.iter().find(|known| **known == event_type).copied().unwrap_or("other")
}

/// Counts relay events that could not be used, by class.
pub fn missed(class: &'static str, by: u64) {
    metrics::counter!(RELAY_MISSED, "reason" => class).increment(by);
}

/// The results that [`VERIFIED`] is counted by, besides the names of faults.
pub const RESULTS: [&str; 5] = ["valid", "no_previous_tree", "unchecked", "proved_later", "disproved"];
/// The reasons that [`REPAIRS_REQUESTED`] is counted by, besides the names of faults.
pub const REPAIR_REASONS: [&str; 4] = ["chain", "sync", "gap", "no_key"];
/// The results that [`LOOKUPS`] is counted by.
pub const LOOKUP_RESULTS: [&str; 3] = ["found", "none", "away"];

/// Counts a verified commit.
pub fn verified(result: &'static str) {
    metrics::counter!(VERIFIED, "result" => result).increment(1);
}

/// Counts a repository that has to be repaired.
pub fn repair_requested(reason: &'static str) {
    metrics::counter!(REPAIRS_REQUESTED, "reason" => reason).increment(1);
}

/// The results that [`REPAIRED`] is counted by.
pub const REPAIR_RESULTS: [&str; 4] = ["synced", "gone", "error", "postponed"];

/// Counts a repair.
pub fn repaired(result: &'static str) {
    metrics::counter!(REPAIRED, "result" => result).increment(1);
}

/// The results that [`HANDLES`] is counted by.
pub const HANDLE_RESULTS: [&str; 3] = ["confirmed", "unconfirmed", "away"];

/// Counts the lookup of a handle.
pub fn handle(result: &'static str) {
    metrics::counter!(HANDLES, "result" => result).increment(1);
}

/// Counts a lookup.
pub fn lookup(result: &'static str) {
    metrics::counter!(LOOKUPS, "result" => result).increment(1);
}

/// The reasons that [`SUBSCRIBERS_ENDED`] is counted by.
pub const ENDS: [&str; 6] = ["left", "slow", "silent", "behind", "invalid", "draining"];

/// Counts a subscriber's end.
pub fn subscriber_ended(reason: &'static str) {
    metrics::counter!(SUBSCRIBERS_ENDED, "reason" => reason).increment(1);
}

/// The results that [`INGESTS`] is counted by.
pub const INGEST_RESULTS: [&str; 6] = ["accepted", "repeated", "unauthorized", "wrong", "later", "unknown"];

/// Counts a request to `POST /events`.
pub fn ingest(result: &'static str) {
    metrics::counter!(INGESTS, "result" => result).increment(1);
}

/// Exports who subscribes.
pub fn subscribers(now: SubscribersReport) {
    metrics::gauge!(SUBSCRIBERS).set(now.connected as f64);
    metrics::gauge!(SUBSCRIBERS_BEHIND).set(now.furthest_behind_seconds);
}

/// Exports what verification has left to do.
pub fn verification_backlog(backlog: &Backlog) {
    metrics::gauge!(ACCOUNTS).set(backlog.accounts as f64);
    metrics::gauge!(UNCHECKED).set(backlog.unchecked as f64);
    metrics::gauge!(REPAIRS).set(backlog.repairs as f64);
}

/// Exports how many repositories are queued and how many are done.
pub fn repositories(now: &Repositories) {
    let Repositories { to_repair, after_gap, to_backfill, synced, gone, error, .. } = now;
    for (state, count) in
        REPOSITORY_STATES.into_iter().zip([to_repair, after_gap, to_backfill, synced, gone, error])
    {
        metrics::gauge!(REPOSITORIES, "state" => state).set(*count as f64);
    }
}

/// Sets whether events that PostgreSQL lost are being read again.
pub fn refilling(refilling: bool) {
    metrics::gauge!(REFILLING).set(if refilling { 1.0 } else { 0.0 });
}

/// Exports the state of the stream.
pub fn look(look: &Look) {
    let waiting = look.waiting();
    metrics::gauge!(STREAM_LENGTH).set(look.length as f64);
    metrics::gauge!(ACKNOWLEDGED).set(look.acknowledged as f64);
    metrics::gauge!(PENDING).set(look.pending as f64);
    metrics::gauge!(LAG_KNOWN).set(if waiting.is_some() { 1.0 } else { 0.0 });
    metrics::gauge!(WAITING).set(waiting.map_or(f64::NAN, |waiting| waiting as f64));
    metrics::gauge!(OLDEST).set(look.oldest_seconds().unwrap_or(0.0));
    count(TRIMMED, look.trimmed);
    note_removed(look.removed);
    if look.skipped > 0 {
        count(OUTPUT_SKIPPED, look.skipped);
        tracing::warn!(entries = look.skipped, "an output is too far behind (OUT_MAX_LAG): entries skipped");
    }
    if look.set_back {
        count(SET_BACK, 1);
        tracing::warn!(
            "the reader goes back to the lowest unacknowledged position to re-read the removed entries"
        );
    }
}

/// Counts and logs entries that somebody else removed and that may not have been acknowledged.
pub fn note_removed(entries: u64) {
    if entries > 0 {
        count(LOST, entries);
        tracing::error!(
            entries,
            "somebody else removed entries from the stream that may not have been acknowledged"
        );
    }
}

/// Counts a task that ended, or an attempt that is to be repeated.
pub fn task(outcome: &'static str) {
    metrics::counter!(TASKS, "outcome" => outcome).increment(1);
}

/// Records how long an attempt at a task took.
pub fn task_took(time: std::time::Duration) {
    metrics::histogram!(TASK_SECONDS).record(time.as_secs_f64());
}

/// Sets how many tasks there are.
pub fn tasks(tasks: Tasks) {
    metrics::gauge!(TASKS_WAITING).set(tasks.waiting as f64);
    metrics::gauge!(TASKS_BEGUN).set(tasks.begun as f64);
    metrics::gauge!(TASKS_OLDEST).set(tasks.oldest_seconds.unwrap_or(0.0));
}

/// Sets whether an origin is disconnected.
pub fn origin_disconnected(kind: &'static str, disconnected: bool) {
    metrics::gauge!(ORIGIN_DISCONNECTED, "origin" => kind).set(f64::from(u8::from(disconnected)));
}

/// Sets whether an output is disconnected.
pub fn output_disconnected(kind: &'static str, disconnected: bool) {
    metrics::gauge!(OUTPUT_DISCONNECTED, "output" => kind).set(f64::from(u8::from(disconnected)));
}

/// Counts messages that an output delivered, and sets how far it is behind.
pub fn output(kind: &'static str, messages: u64, behind_seconds: f64) {
    metrics::counter!(OUTPUT_MESSAGES, "output" => kind).increment(messages);
    metrics::gauge!(OUTPUT_BEHIND, "output" => kind).set(behind_seconds);
}

/// Counts messages taken from an origin.
pub fn origin_messages(kind: &'static str, accepted: u64, unusable: u64) {
    metrics::counter!(ORIGIN_MESSAGES, "origin" => kind, "result" => "accepted").increment(accepted);
    metrics::counter!(ORIGIN_MESSAGES, "origin" => kind, "result" => "unusable").increment(unusable);
}

/// Sets how many messages wait at an origin.
pub fn origin_waiting(kind: &'static str, messages: u64) {
    metrics::gauge!(ORIGIN_WAITING, "origin" => kind).set(messages as f64);
}

/// Counts a frame.
pub fn frame(event_type: &str) {
    metrics::counter!(RELAY_FRAMES, "type" => type_label(event_type)).increment(1);
}

/// Counts and logs that the stream or the group had to be created again.
pub fn note_ensured(ensured: Ensured) {
    if ensured.stream_lost {
        count(STREAM_LOST, 1);
        tracing::warn!("the stream was gone: the reader goes back to the lowest unacknowledged position");
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
    describe::describe();
    zero();
    Ok(handle)
}

fn zero() {
    totals::export();
    for class in crate::stream::gap::MISSED {
        metrics::counter!(RELAY_MISSED, "reason" => class).absolute(0);
    }
    for name in TYPES {
        metrics::counter!(RELAY_FRAMES, "type" => name).absolute(0);
        metrics::counter!(ENTRIES, "type" => name).absolute(0);
    }
    for result in RESULTS.into_iter().chain(Fault::ALL.map(Fault::name)) {
        metrics::counter!(VERIFIED, "result" => result).absolute(0);
    }
    for reason in REPAIR_REASONS.into_iter().chain(Fault::ALL.map(Fault::name)) {
        metrics::counter!(REPAIRS_REQUESTED, "reason" => reason).absolute(0);
    }
    for result in REPAIR_RESULTS {
        metrics::counter!(REPAIRED, "result" => result).absolute(0);
    }
    for outcome in TASK_OUTCOMES {
        metrics::counter!(TASKS, "outcome" => outcome).absolute(0);
    }
    tasks(Tasks::default());
    for result in HANDLE_RESULTS {
        metrics::counter!(HANDLES, "result" => result).absolute(0);
    }
    for result in LOOKUP_RESULTS {
        metrics::counter!(LOOKUPS, "result" => result).absolute(0);
    }
    for result in INGEST_RESULTS {
        metrics::counter!(INGESTS, "result" => result).absolute(0);
    }
    for reason in ENDS {
        metrics::counter!(SUBSCRIBERS_ENDED, "reason" => reason).absolute(0);
    }
    for gauge in [ACCOUNTS, UNCHECKED, REPAIRS, SUBSCRIBERS, SUBSCRIBERS_BEHIND] {
        metrics::gauge!(gauge).set(0.0);
    }
    for state in REPOSITORY_STATES {
        metrics::gauge!(REPOSITORIES, "state" => state).set(0.0);
    }
    for broker in [RABBITMQ, KAFKA] {
        output_disconnected(broker, false);
        output(broker, 0, 0.0);
        origin_disconnected(broker, false);
        origin_messages(broker, 0, 0);
        origin_waiting(broker, 0);
    }
    for part in ["reader", "pipelines"] {
        metrics::gauge!(PAUSED, "part" => part).set(0.0);
    }
    metrics::gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION"), "commit" => env!("STANDPIPE_COMMIT"))
        .set(1.0);
}
