//! The help of every metric.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

use super::{
    ACCOUNTS, ACKNOWLEDGED, BACKPRESSURE, BATCH_SECONDS, BATCH_SIZE, BUILD, CLAIMED, CURSOR,
    DATABASE_WENT_BACK, DEAD_LETTERS, DEAD_LETTERS_FULL, ENTRIES, EVENT_SECONDS, EVENTS, GROUP_RECREATED,
    HANDLES, INGESTED, INGESTS, LAG_KNOWN, LOOKUPS, LOST, OLDEST, ORIGIN_DISCONNECTED, ORIGIN_GAPS,
    ORIGIN_MESSAGES, ORIGIN_WAITING, OUTPUT_BEHIND, OUTPUT_DISCONNECTED, OUTPUT_MESSAGES, OUTPUT_SKIPPED,
    PAUSED, PENDING, PIPELINES, POOL_IN_USE, POOL_SIZE, POOL_WAIT, PURGED_ACCOUNTS, PURGED_RECORDS,
    REDIS_RECONNECTS, REFILLING, RELAY_BAD_FRAMES, RELAY_BAD_RECORDS, RELAY_CONNECTS, RELAY_FRAME_AGE,
    RELAY_FRAMES, RELAY_GAPS, RELAY_MISSED, RELAY_UNWANTED, REPAIRED, REPAIRS, REPAIRS_REQUESTED,
    REPOSITORIES, RETRIES, SET_BACK, STREAM_LENGTH, STREAM_LOST, SUBSCRIBER_MESSAGES, SUBSCRIBERS,
    SUBSCRIBERS_BEHIND, SUBSCRIBERS_ENDED, SUBSCRIBERS_UNREADABLE, TASK_SECONDS, TASKS, TASKS_BEGUN,
    TASKS_OLDEST, TASKS_WAITING, TRANSACTION_SECONDS, TRIMMED, UNCHECKED, VERIFIED, WAITING,
};

/// Describes all metrics to the recorder.
pub(super) fn describe() {
    describe_work();
    describe_stream();
    describe_reader();
    describe_subscribers();
}

/// Events and their transactions.
fn describe_work() {
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
}

/// The stream, the pipelines and the pool.
fn describe_stream() {
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
        ACKNOWLEDGED,
        "Entries among them that could be trimmed, because every group has acknowledged them, such as those that STREAM_KEEP keeps"
    );
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
}

/// The relay and the reader.
fn describe_reader() {
    describe_counter!(REDIS_RECONNECTS, "Connections to Redis given up after an error");
    describe_counter!(RELAY_FRAMES, "Frames from the relay, by type");
    describe_counter!(RELAY_BAD_FRAMES, "Frames that broke the protocol; each costs the connection");
    describe_counter!(RELAY_BAD_RECORDS, "Records left out because they could not be decoded");
    describe_counter!(RELAY_UNWANTED, "Events of accounts that WANTED_DIDS does not name");
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
    describe_verification();
    describe_gauge!(BUILD, "1, with the version and the commit");
}

/// Those who read `/subscribe`, and those who send events.
fn describe_subscribers() {
    describe_counter!(INGESTS, "Requests to POST /events, by result");
    describe_counter!(INGESTED, "Events accepted at POST /events and from brokers");
    describe_counter!(
        ORIGIN_MESSAGES,
        "Messages taken from a broker, by result; unusable ones become dead letters"
    );
    describe_gauge!(
        ORIGIN_WAITING,
        "Messages at a broker that nobody has taken: ready in the RabbitMQ queue (updated every five seconds), or in Kafka after our offsets"
    );
    describe_counter!(
        ORIGIN_GAPS,
        "Gaps in Kafka: records that were deleted before they were taken, or lost in the cluster"
    );
    describe_counter!(OUTPUT_MESSAGES, "Messages that a broker has confirmed");
    describe_gauge!(
        OUTPUT_BEHIND,
        Unit::Seconds,
        "Age of the last entry whose messages the broker has confirmed; 0 while nothing newer is waiting"
    );
    describe_gauge!(OUTPUT_DISCONNECTED, "1 while events cannot be published to the broker");
    describe_counter!(
        OUTPUT_SKIPPED,
        "Entries that an output skipped, because they had waited longer than OUT_MAX_LAG; 1 each time that others had removed entries before they were published; and messages that are too large for the topic"
    );
    describe_gauge!(ORIGIN_DISCONNECTED, "1 while the connection to the broker is down");
    describe_counter!(
        TASKS,
        "Tasks by outcome (done; repeated: they had been done before; failed: dead letters), and attempts that are retried"
    );
    describe_histogram!(TASK_SECONDS, Unit::Seconds, "How long an attempt at a task took");
    describe_gauge!(TASKS_WAITING, "Tasks in the stream that no process has begun with");
    describe_gauge!(TASKS_BEGUN, "Tasks that are being worked on, or wait for another attempt");
    describe_gauge!(
        TASKS_OLDEST,
        Unit::Seconds,
        "Age of the oldest task that no process has begun with; 0 if there is none"
    );
    describe_gauge!(SUBSCRIBERS, "Subscribers connected to this process");
    describe_gauge!(
        SUBSCRIBERS_BEHIND,
        Unit::Seconds,
        "How far the slowest subscriber is behind the newest entry in the tables"
    );
    describe_counter!(SUBSCRIBER_MESSAGES, "Messages sent to subscribers");
    describe_counter!(SUBSCRIBERS_ENDED, "Subscribers disconnected, by reason");
    describe_counter!(SUBSCRIBERS_UNREADABLE, "Entries of another form that were not sent to subscribers");
}

/// What `VERIFY` checks.
fn describe_verification() {
    describe_counter!(VERIFIED, "Commits verified, by result");
    describe_counter!(REPAIRS_REQUESTED, "Repositories found to differ from what arrived, by reason");
    describe_counter!(REPAIRED, "Repairs of repositories that ended, by result");
    describe_gauge!(REPOSITORIES, "Repositories that were ever queued, by what becomes of them");
    describe_counter!(HANDLES, "Lookups of handles that the relay did not send, by result");
    describe_counter!(LOOKUPS, "Lookups of DID documents, by result");
    describe_gauge!(ACCOUNTS, "Accounts whose newest commit is remembered for verification");
    describe_gauge!(UNCHECKED, "Accounts with a commit whose signature could not be checked yet");
    describe_gauge!(REPAIRS, "Repositories that wait for a repair");
}
