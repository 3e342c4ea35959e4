//! Every variable, once: its name, default and meaning, and how its value is parsed and shown.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;

use super::amqp::{AmqpOrigin, AmqpOutput};
use super::collections::Collections;
use super::database_url::DatabaseUrl;
use super::kafka::{KafkaOrigin, KafkaOutput};
use super::read::Reading;
use super::text::{any, consumer_id, key, optional, or, schema, unless};
use super::unit::{
    MemoryMark, StreamKeep, claim_idle, drain_timeout, duration, http_addr, idle_timeout, notify_within,
    on_off, or_hold, or_off, out_max_lag, results, size, size_from, statement_timeout, tombstone_retention,
    whole, yes_or_no,
};
use super::url::{AccessToken, CaFile, PlcUrl, RedisUrl, RelayUrl};
use super::wanted::WantedDids;
use super::words::{Backfill, LogFormat, LogLevel, OnFutureCursor, TransactionMode, VerifyMode};

/// One environment variable that this program reads.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its exact name; names are upper case.
    pub name: &'static str,
    /// The value used when it is unset or empty; empty if there is none.
    pub default: &'static str,
    /// What it does, in one line.
    pub meaning: &'static str,
    /// Whether its value can contain a password. Such a value is only printed redacted.
    pub secret: bool,
}

/// `field: type = field_of_raw "NAME" variable|secret "default", parse, show, "meaning";`
macro_rules! settings {
    ($($(#[$doc:meta])* $field:ident: $type:ty = $raw:ident $name:literal $kind:ident $default:literal,
       $parse:expr, $show:expr, $meaning:literal;)*) => {
        /// Every environment variable that this program reads, in the order in which the documentation shows them.
        pub const VARIABLES: &[Variable] = &[$(
            Variable { name: $name, default: $default, meaning: $meaning, secret: settings!(@$kind) },
        )*];

        /// Everything that the environment decides, checked.
        ///
        /// `Debug` is safe to print: the URLs redact themselves.
        #[derive(Clone, Debug)]
        pub struct Config {
            $($(#[$doc])* pub $field: $type,)*
        }

        /// The environment as texts: the field names are the variables' names in lower case.
        #[derive(Deserialize)]
        pub(super) struct Raw {
            $(pub(super) $raw: Option<String>,)*
        }

        /// The values parsed so far; a field is `None` if it had a problem.
        pub(super) struct Parsed {
            $(pub(super) $field: Option<$type>,)*
        }

        impl Parsed {
            /// Parses every variable before any result is used, so that no problem hides another.
            pub(super) fn new(raw: &Raw, reading: &mut Reading) -> Self {
                Self { $($field: reading.take($name, raw.$raw.as_deref(), $parse),)* }
            }

            /// The configuration, if nothing is missing.
            pub(super) fn complete(self) -> Option<Config> {
                Some(Config { $($field: self.$field?,)* })
            }
        }

        impl Config {
            pub(super) fn values(&self) -> Vec<(&'static str, String)> {
                fn shown<T>(value: &T, show: impl Fn(&T) -> String) -> String {
                    show(value)
                }
                vec![$(($name, shown(&self.$field, $show)),)*]
            }
        }
    };
    (@variable) => { false };
    (@secret) => { true };
}

settings! {
    /// `RELAY_URL`, with its path.
    relay_url: RelayUrl = relay_url "RELAY_URL" secret "wss://bsky.network",
        RelayUrl::parse, ToString::to_string,
        "the relay to read from, ws:// or wss://; the path of subscribeRepos is added when there is none; or a Jetstream, with /subscribe";
    /// `RELAY_CA_FILE`.
    relay_ca: Option<CaFile> = relay_ca_file "RELAY_CA_FILE" variable "", CaFile::parse, or(""),
        "a PEM file with the authorities that wss:// trusts; the system's when unset";
    /// `REDIS_URL`.
    redis_url: RedisUrl = redis_url "REDIS_URL" secret "redis://localhost:6379",
        RedisUrl::parse, ToString::to_string,
        "the Redis or Valkey server: redis://, rediss:// (TLS), or unix:///path of a socket";
    /// `REDIS_CA_FILE`.
    redis_ca: Option<CaFile> = redis_ca_file "REDIS_CA_FILE" variable "", CaFile::parse, or(""),
        "a PEM file with the authorities that rediss:// trusts; Mozilla's when unset";
    /// `DATABASE_URL`. Always there for [`Role::All`] and [`Role::Worker`].
    database_url: Option<DatabaseUrl> = database_url "DATABASE_URL" secret "",
        optional(DatabaseUrl::parse), or(""),
        "the PostgreSQL database, postgres:// or postgresql://; needed by run and worker";
    /// `sslrootcert` of `DATABASE_URL`, else PGSSLROOTCERT.
    database_ca: Option<CaFile> = pgsslrootcert "PGSSLROOTCERT" variable "", CaFile::parse, or(""),
        "a PEM file with the authorities that TLS to PostgreSQL trusts; the system's when unset";
    /// `REDIS_STREAM_KEY`.
    stream_key: String = redis_stream_key "REDIS_STREAM_KEY" variable "firehose:events",
        key, ToString::to_string,
        "the stream between reader and pipelines; dead letters are in <key>:dead";
    /// `REDIS_CURSOR_KEY`.
    cursor_key: String = redis_cursor_key "REDIS_CURSOR_KEY" variable "firehose:cursor",
        key, ToString::to_string,
        "where the relay position is kept; firehose:python_cursor takes over from the Python reader";
    // Stream nodes are trimmed whole and hold 100 entries by default, so a lower mark might never be reached again.
    /// `REDIS_MAX_STREAM_LEN`, in entries.
    max_stream_len: u64 = redis_max_stream_len "REDIS_MAX_STREAM_LEN" variable "500000",
        whole(100..=1_000_000_000), ToString::to_string,
        "the stream length, in entries, at which the reader slows down";
    /// `REDIS_MEMORY_MARK`.
    memory_mark: MemoryMark = redis_memory_mark "REDIS_MEMORY_MARK" variable "75%",
        MemoryMark::parse, ToString::to_string,
        "the use of Redis memory at which the reader slows down: up to 80% of maxmemory, or a size";
    /// `STREAM_KEEP`; `None` when nothing is kept.
    stream_keep: Option<StreamKeep> = stream_keep "STREAM_KEEP" variable "0", StreamKeep::parse, or("0"),
        "what stays in the stream after it was applied, for subscribers that return: a time or a size; 10m with SUBSCRIBE=on";
    /// `REDIS_CONSUMER_GROUP`.
    consumer_group: String = redis_consumer_group "REDIS_CONSUMER_GROUP" variable "firehose-processors",
        key, ToString::to_string,
        "the consumer group of the pipelines";
    /// `CONSUMER_ID`, or the host's name.
    consumer_id: String = consumer_id "CONSUMER_ID" variable "", consumer_id, ToString::to_string,
        "name of this process, the host's name when unset; its pipelines are CONSUMER_ID-0, CONSUMER_ID-1, ...";
    /// `PARALLEL_CONSUMERS`: the number of pipelines.
    parallel_consumers: usize = parallel_consumers "PARALLEL_CONSUMERS" variable "5",
        whole(1..=1024), ToString::to_string,
        "how many pipelines work side by side, 1 to 1024";
    /// `BATCH_SIZE`, in entries.
    batch_size: usize = batch_size "BATCH_SIZE" variable "200", whole(1..=10_000), ToString::to_string,
        "entries that a pipeline reads at a time, 1 to 10000";
    /// `DB_POOL_SIZE`, in connections.
    db_pool_size: usize = db_pool_size "DB_POOL_SIZE" variable "20", whole(1..=1000), ToString::to_string,
        "maximum connections to PostgreSQL, 1 to 1000";
    /// `DB_STATEMENT_TIMEOUT`.
    db_statement_timeout: Duration = db_statement_timeout "DB_STATEMENT_TIMEOUT" variable "30s",
        statement_timeout, duration,
        "how long one statement may run before PostgreSQL cancels it and it is tried again";
    /// TRANSACTION.
    transaction: TransactionMode = transaction "TRANSACTION" variable "event",
        TransactionMode::from_word, ToString::to_string,
        "event: each event is a transaction of its own; batch: a batch shares one";
    /// COLLECTIONS.
    collections: Collections = collections "COLLECTIONS" variable "app.bsky.*,chat.bsky.*,com.atproto.*",
        Collections::parse, ToString::to_string,
        "the collections that the reader keeps, separated by commas; * keeps all";
    /// `WANTED_DIDS`; `None` when all are.
    wanted_dids: Option<WantedDids> = wanted_dids "WANTED_DIDS" variable "", optional(WantedDids::parse), or(""),
        "keep only these accounts: DIDs, separated by commas, or tracked for those in standpipe.repos";
    /// `CLAIM_IDLE`.
    claim_idle: Duration = claim_idle "CLAIM_IDLE" variable "60s", claim_idle, duration,
        "how long an entry must be untouched before another pipeline takes it over, 10s or more";
    /// `MAX_ATTEMPTS`, in deliveries.
    max_attempts: u32 = max_attempts "MAX_ATTEMPTS" variable "5", whole(1..=1000), ToString::to_string,
        "deliveries after which an entry is processed alone instead of with its batch";
    /// `DRAIN_TIMEOUT`.
    drain_timeout: Duration = drain_timeout "DRAIN_TIMEOUT" variable "25s", drain_timeout, duration,
        "how long a stop waits for work in progress; keep stop_grace_period larger";
    /// `TOMBSTONE_RETENTION`.
    tombstone_retention: Duration = tombstone_retention "TOMBSTONE_RETENTION" variable "30d",
        tombstone_retention, duration,
        "minimum time to keep the tombstone of a deleted record";
    /// `RELAY_IDLE_TIMEOUT`; `None` when it is off.
    relay_idle_timeout: Option<Duration> = relay_idle_timeout "RELAY_IDLE_TIMEOUT" variable "60s",
        idle_timeout, or_off,
        "reconnect after this long without a frame from the relay; off disables";
    /// `VERIFY`.
    verify: VerifyMode = verify "VERIFY" variable "on", VerifyMode::from_word, ToString::to_string,
        "check what the relay sends against the accounts' signatures: off, log (count), or on (withhold what is invalid)";
    /// `REPAIR_CONCURRENCY`.
    repair_concurrency: usize = repair_concurrency "REPAIR_CONCURRENCY" variable "4", whole(0..=64),
        ToString::to_string,
        "how many repositories the worker repairs at a time; 0 repairs none, and they stay queued";
    /// `BACKFILL`; `None` when there is none.
    backfill: Option<Backfill> = backfill "BACKFILL" variable "", optional(Backfill::parse), or(""),
        "fetch whole repositories: seen (accounts in the tables), all (that the relay lists), or collection:NSID";
    /// `PLC_URL`.
    plc_url: PlcUrl = plc_url "PLC_URL" secret "https://plc.directory", PlcUrl::parse, ToString::to_string,
        "where accounts with a did:plc are looked up";
    /// `ALLOW_PRIVATE_ADDRESSES`.
    allow_private_addresses: bool = allow_private_addresses "ALLOW_PRIVATE_ADDRESSES" variable "false",
        yes_or_no, ToString::to_string,
        "look accounts up at hosts with internal addresses, too; for development";
    /// `ON_FUTURE_CURSOR`.
    on_future_cursor: OnFutureCursor = on_future_cursor "ON_FUTURE_CURSOR" variable "stop",
        OnFutureCursor::from_word, ToString::to_string,
        "when the relay reports a cursor in its future: stop, resume live, or from the oldest event";
    /// `AUTO_MIGRATE`.
    auto_migrate: bool = auto_migrate "AUTO_MIGRATE" variable "true", yes_or_no, ToString::to_string,
        "create or upgrade the tables at start";
    /// `NOTIFICATIONS`.
    notifications: bool = notifications "NOTIFICATIONS" variable "true", yes_or_no, ToString::to_string,
        "keep the table notifications; false leaves it alone";
    /// `NOTIFY_WITHIN`; `None` when it is off.
    notify_within: Option<Duration> = notify_within "NOTIFY_WITHIN" variable "7d", notify_within, or_off,
        "nobody is notified of records that were older than this when they arrived, as in a backfill; off: of all";
    /// `LEGACY_STATUS`; `None` for auto.
    legacy_status: Option<bool> = legacy_status "LEGACY_STATUS" variable "auto",
        unless("auto", yes_or_no), or("auto"),
        "write the keys of the old application's pages; auto: on a database of the old workers";
    /// `DEAD_LETTER_MAX_BYTES`.
    dead_letter_max_bytes: u64 = dead_letter_max_bytes "DEAD_LETTER_MAX_BYTES" variable "256MiB",
        size_from(1), size,
        "the room in Redis for dead letters; beyond it entries stay pending";
    /// `HTTP_ADDR`; `None` when it is off.
    http_addr: Option<SocketAddr> = http_addr "HTTP_ADDR" variable "127.0.0.1:9464", http_addr, or("off"),
        "where health, metrics and the dashboard are served, as ip:port; off disables";
    /// `ADMIN_TOKEN`; `None`: nobody may control the process over HTTP.
    admin_token: Option<AccessToken> = admin_token "ADMIN_TOKEN" secret "", optional(AccessToken::parse), or(""),
        "token for pausing, draining, retrying and purging over HTTP, 16 characters or more; unset disables them";
    /// `INGEST_TOKEN`; `None`: nobody may send events over HTTP.
    ingest_token: Option<AccessToken> = ingest_token "INGEST_TOKEN" secret "", optional(AccessToken::parse), or(""),
        "token for sending events to POST /events, 16 characters or more; unset refuses them";
    /// `AMQP_ORIGIN_URL`; `None` when there is none.
    amqp_origin: Option<AmqpOrigin> = amqp_origin_url "AMQP_ORIGIN_URL" secret "", optional(AmqpOrigin::parse), or(""),
        "a RabbitMQ queue to take events from: amqp://user:password@host/vhost?queue=NAME&prefetch=500, amqps:// for TLS";
    /// `AMQP_OUTPUT_URL`; `None` when there is none.
    amqp_output: Option<AmqpOutput> = amqp_output_url "AMQP_OUTPUT_URL" secret "", optional(AmqpOutput::parse), or(""),
        "a RabbitMQ exchange to publish the applied events to: amqp://user:password@host/vhost?exchange=NAME&key=did";
    /// `KAFKA_ORIGIN_URL`; `None` when there is none.
    kafka_origin: Option<KafkaOrigin> = kafka_origin_url "KAFKA_ORIGIN_URL" secret "", optional(KafkaOrigin::parse), or(""),
        "a Kafka topic to take events from: kafka://user:password@host:9092,host:9092/topic?group=NAME, kafkas:// for TLS";
    /// `KAFKA_OUTPUT_URL`; `None` when there is none.
    kafka_output: Option<KafkaOutput> = kafka_output_url "KAFKA_OUTPUT_URL" secret "", optional(KafkaOutput::parse), or(""),
        "a Kafka topic to publish the applied events to: kafka://user:password@host:9092,host:9092/topic";
    /// `OUT_MAX_LAG`; `None` when there is no limit.
    out_max_lag: Option<Duration> = out_max_lag "OUT_MAX_LAG" variable "hold", unless("hold", out_max_lag), or_hold,
        "how long an entry may wait for an output before it is skipped; hold: no limit, and the reader waits when the stream is full";
    /// `HANDLERS`; `None` when there are none.
    handlers: Option<String> = handlers "HANDLERS" variable "", optional(schema), or(""),
        "the schema whose functions handle messages of other types (tasks): <schema>.<type>(jsonb) returns jsonb";
    /// `HANDLER_PIPELINES`.
    handler_pipelines: usize = handler_pipelines "HANDLER_PIPELINES" variable "2", whole(1..=100), ToString::to_string,
        "how many tasks a process works on at a time, each on a connection besides DB_POOL_SIZE, 1 to 100";
    /// `HANDLER_TIMEOUT`.
    handler_timeout: Duration = handler_timeout "HANDLER_TIMEOUT" variable "5m", statement_timeout, duration,
        "how long a function may take for a task before the attempt has failed";
    /// `HANDLER_ATTEMPTS`.
    handler_attempts: u32 = handler_attempts "HANDLER_ATTEMPTS" variable "5", whole(1..=100), ToString::to_string,
        "how often a task is tried before it becomes a dead letter";
    /// `HANDLER_RESULTS`.
    handler_results: Duration = handler_results "HANDLER_RESULTS" variable "30d", results, duration,
        "how long results are kept; a message with the same id that comes later is handled again";
    /// `SUBSCRIBE`.
    subscribe: bool = subscribe "SUBSCRIBE" variable "off", yes_or_no, on_off,
        "on: run and worker serve the applied events at /subscribe, in the format of a Jetstream";
    /// `SUBSCRIBE_TOKEN`; `None`: anybody who reaches `HTTP_ADDR` may subscribe.
    subscribe_token: Option<AccessToken> = subscribe_token "SUBSCRIBE_TOKEN" secret "",
        optional(AccessToken::parse), or(""),
        "token that subscribers must have, 16 characters or more; unset admits everybody";
    /// `SUBSCRIBE_CONNECTIONS`.
    subscribe_connections: usize = subscribe_connections "SUBSCRIBE_CONNECTIONS" variable "100",
        whole(1..=10_000), ToString::to_string,
        "maximum subscribers of one process, 1 to 10000";
    /// `LOG_LEVEL`.
    log_level: LogLevel = log_level "LOG_LEVEL" variable "INFO", LogLevel::from_word, ToString::to_string,
        "DEBUG, INFO, WARNING or ERROR";
    /// `LOG_FORMAT`.
    log_format: LogFormat = log_format "LOG_FORMAT" variable "text", LogFormat::from_word, ToString::to_string,
        "text or json";
    /// `RUST_LOG`, as given.
    rust_log: Option<String> = rust_log "RUST_LOG" variable "", optional(any), or(""),
        "a tracing filter such as standpipe=debug,redis=info; wins over LOG_LEVEL";
}
