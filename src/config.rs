//! The environment becomes a [`Config`], or a list of everything that is wrong with it.
//!
//! This is the only file that knows the names of environment variables. [`VARIABLES`] holds each of them
//! once, with its default and its meaning; the defaults used here, `--help`, `config.example.env` and
//! `docs/configuration.md` all come from it or are tested against it.
//!
//! Two rules shape the code. All problems are reported at once, because an operator who fixes one variable
//! per restart loses an evening. And no message holds a secret: a URL that does not parse is not printed at
//! all, since nobody can tell which part of it is the password.

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;
use url::Url;

/// The path at which a relay serves its event stream (AT Protocol, `com.atproto.sync.subscribeRepos`).
const SUBSCRIBE_PATH: &str = "/xrpc/com.atproto.sync.subscribeRepos";

/// One environment variable that this program reads.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its exact name; names are upper case.
    pub name: &'static str,
    /// The value that is used when it is unset or empty; empty when there is none.
    pub default: &'static str,
    /// What it does, in one line.
    pub meaning: &'static str,
    /// Whether its value can hold a password. Such a value is printed only redacted.
    pub secret: bool,
}

const fn variable(name: &'static str, default: &'static str, meaning: &'static str) -> Variable {
    Variable { name, default, meaning, secret: false }
}

const fn secret(name: &'static str, default: &'static str, meaning: &'static str) -> Variable {
    Variable { name, default, meaning, secret: true }
}

/// Every environment variable that this program reads, in the order in which the documentation shows them.
pub const VARIABLES: &[Variable] = &[
    secret(
        "RELAY_URL",
        "wss://bsky.network",
        "the relay to read from, ws:// or wss://; the path of subscribeRepos is added when there is none",
    ),
    variable(
        "RELAY_CA_FILE",
        "",
        "a PEM file with the authorities that wss:// trusts; the system's when unset",
    ),
    secret(
        "REDIS_URL",
        "redis://localhost:6379",
        "the Redis or Valkey server: redis://, rediss:// (TLS), or unix:///path of a socket",
    ),
    variable(
        "REDIS_CA_FILE",
        "",
        "a PEM file with the authorities that rediss:// trusts; Mozilla's when unset",
    ),
    secret(
        "DATABASE_URL",
        "",
        "the PostgreSQL database, postgres:// or postgresql://; needed by run and worker",
    ),
    variable(
        "PGSSLROOTCERT",
        "",
        "a PEM file with the authorities that TLS to PostgreSQL trusts; the system's when unset",
    ),
    variable(
        "REDIS_STREAM_KEY",
        "firehose:events",
        "the stream between reader and pipelines; dead letters are in <key>:dead",
    ),
    variable(
        "REDIS_CURSOR_KEY",
        "firehose:cursor",
        "where the relay position is kept; firehose:python_cursor takes over from the Python reader",
    ),
    variable(
        "REDIS_MAX_STREAM_LEN",
        "500000",
        "the stream length, in entries, at which the reader slows down",
    ),
    variable(
        "REDIS_MEMORY_MARK",
        "75%",
        "the use of Redis memory at which the reader slows down: up to 80% of maxmemory, or a size",
    ),
    variable("REDIS_CONSUMER_GROUP", "firehose-processors", "the consumer group of the pipelines"),
    variable(
        "CONSUMER_ID",
        "",
        "name of this process, the host's name when unset; its pipelines are CONSUMER_ID-0, CONSUMER_ID-1, ...",
    ),
    variable("PARALLEL_CONSUMERS", "5", "how many pipelines work side by side, 1 to 1024"),
    variable("BATCH_SIZE", "200", "entries that a pipeline reads at a time, 1 to 10000"),
    variable("DB_POOL_SIZE", "20", "maximum connections to PostgreSQL, 1 to 1000"),
    variable(
        "DB_STATEMENT_TIMEOUT",
        "30s",
        "how long one statement may run before PostgreSQL cancels it and it is tried again",
    ),
    variable(
        "TRANSACTION",
        "event",
        "event: each event is a transaction of its own; batch: a batch shares one",
    ),
    variable(
        "COLLECTIONS",
        "app.bsky.*,chat.bsky.*,com.atproto.*",
        "the collections that the reader keeps, separated by commas; * keeps all",
    ),
    variable(
        "CLAIM_IDLE",
        "60s",
        "how long an entry must be untouched before another pipeline takes it over, 10s or more",
    ),
    variable(
        "MAX_ATTEMPTS",
        "5",
        "deliveries after which an entry is processed alone instead of with its batch",
    ),
    variable(
        "DRAIN_TIMEOUT",
        "25s",
        "how long a stop waits for work in progress; keep stop_grace_period larger",
    ),
    variable("TOMBSTONE_RETENTION", "30d", "minimum time to keep the tombstone of a deleted record"),
    variable(
        "RELAY_IDLE_TIMEOUT",
        "60s",
        "reconnect after this long without a frame from the relay; off disables",
    ),
    variable(
        "ON_FUTURE_CURSOR",
        "stop",
        "when the relay reports a cursor in its future: stop, resume live, or from the oldest event",
    ),
    variable("AUTO_MIGRATE", "true", "create or upgrade the tables at start"),
    variable("NOTIFICATIONS", "true", "keep the table notifications; false leaves it alone"),
    variable(
        "LEGACY_STATUS",
        "auto",
        "write the keys of the old application's pages; auto: on a database of the old workers",
    ),
    variable(
        "DEAD_LETTER_MAX_BYTES",
        "256MiB",
        "the room in Redis for dead letters; beyond it entries stay pending",
    ),
    variable(
        "HTTP_ADDR",
        "127.0.0.1:9464",
        "where health, metrics and the dashboard are served, as ip:port; off disables",
    ),
    secret(
        "ADMIN_TOKEN",
        "",
        "token for pausing, draining, retrying and purging over HTTP, 16 characters or more; unset disables them",
    ),
    variable("LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR"),
    variable("LOG_FORMAT", "text", "text or json"),
    variable("RUST_LOG", "", "a tracing filter such as standpipe=debug,redis=info; wins over LOG_LEVEL"),
];

/// The role of a process: it decides which variables are required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `run`: the reader and the pipelines.
    All,
    /// `reader`: from the relay into Redis; never touches PostgreSQL.
    Reader,
    /// `worker`: from Redis into PostgreSQL.
    Worker,
    /// `check`, `status` and the other tools: they say themselves what they miss.
    Tool,
}

impl Role {
    fn has_pipelines(self) -> bool {
        matches!(self, Role::All | Role::Worker)
    }
}

/// Everything that the environment decides, checked.
///
/// `Debug` is safe to print: the URLs redact themselves.
#[derive(Clone, Debug)]
pub struct Config {
    /// `RELAY_URL`, with its path.
    pub relay_url: RelayUrl,
    /// `RELAY_CA_FILE`.
    pub relay_ca: Option<CaFile>,
    /// `REDIS_URL`.
    pub redis_url: RedisUrl,
    /// `REDIS_CA_FILE`.
    pub redis_ca: Option<CaFile>,
    /// `DATABASE_URL`. Always there for [`Role::All`] and [`Role::Worker`].
    pub database_url: Option<DatabaseUrl>,
    /// `sslrootcert` of `DATABASE_URL`, else PGSSLROOTCERT.
    pub database_ca: Option<CaFile>,
    /// `REDIS_STREAM_KEY`.
    pub stream_key: String,
    /// `REDIS_CURSOR_KEY`.
    pub cursor_key: String,
    /// `REDIS_MAX_STREAM_LEN`, in entries.
    pub max_stream_len: u64,
    /// `REDIS_MEMORY_MARK`.
    pub memory_mark: MemoryMark,
    /// `REDIS_CONSUMER_GROUP`.
    pub consumer_group: String,
    /// `CONSUMER_ID`, or the host's name.
    pub consumer_id: String,
    /// `PARALLEL_CONSUMERS`: the number of pipelines.
    pub parallel_consumers: usize,
    /// `BATCH_SIZE`, in entries.
    pub batch_size: usize,
    /// `DB_POOL_SIZE`, in connections.
    pub db_pool_size: usize,
    /// `DB_STATEMENT_TIMEOUT`.
    pub db_statement_timeout: Duration,
    /// TRANSACTION.
    pub transaction: TransactionMode,
    /// COLLECTIONS.
    pub collections: Collections,
    /// `CLAIM_IDLE`.
    pub claim_idle: Duration,
    /// `MAX_ATTEMPTS`, in deliveries.
    pub max_attempts: u32,
    /// `DRAIN_TIMEOUT`.
    pub drain_timeout: Duration,
    /// `TOMBSTONE_RETENTION`.
    pub tombstone_retention: Duration,
    /// `RELAY_IDLE_TIMEOUT`; `None` when it is off.
    pub relay_idle_timeout: Option<Duration>,
    /// `ON_FUTURE_CURSOR`.
    pub on_future_cursor: OnFutureCursor,
    /// `AUTO_MIGRATE`.
    pub auto_migrate: bool,
    /// `NOTIFICATIONS`.
    pub notifications: bool,
    /// `LEGACY_STATUS`; `None` for auto.
    pub legacy_status: Option<bool>,
    /// `DEAD_LETTER_MAX_BYTES`.
    pub dead_letter_max_bytes: u64,
    /// `HTTP_ADDR`; `None` when it is off.
    pub http_addr: Option<SocketAddr>,
    /// `ADMIN_TOKEN`; `None`: nobody may control the process over HTTP.
    pub admin_token: Option<AdminToken>,
    /// `LOG_LEVEL`.
    pub log_level: LogLevel,
    /// `LOG_FORMAT`.
    pub log_format: LogFormat,
    /// `RUST_LOG`, as given.
    pub rust_log: Option<String>,
}

/// Everything that is wrong with the environment; displayed as one line per problem.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.lines())]
pub struct ConfigError {
    /// In the order of [`VARIABLES`]; never empty.
    pub problems: Vec<Problem>,
    /// Warnings, such as a name that looks like one of ours: one may be the cause.
    pub warnings: Vec<String>,
}

impl ConfigError {
    /// What to print for the operator, line by line.
    pub fn report(&self) -> impl Iterator<Item = String> + '_ {
        // The warnings too: one may be the cause.
        std::iter::once("standpipe: the configuration cannot be used:".to_owned())
            .chain(self.problems.iter().flat_map(|problem| {
                problem.to_string().lines().map(|line| format!("  {line}")).collect::<Vec<_>>()
            }))
            .chain(self.warnings.iter().map(|warning| format!("  warning: {warning}")))
    }

    fn lines(&self) -> String {
        self.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }
}

/// One variable, or one combination, that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The variable to change.
    pub variable: &'static str,
    /// The problem and the remedy, without any secret.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.variable, self.message)
    }
}

/// Reads the configuration from `vars`, usually `std::env::vars_os()`.
///
/// Returns the configuration with warnings that the caller should log, or every problem at once.
///
/// # Errors
///
/// [`ConfigError`] when any variable is malformed, a required one is missing, or a combination is unsafe.
pub fn from_env<K, V>(
    vars: impl IntoIterator<Item = (K, V)>,
    role: Role,
) -> Result<(Config, Vec<String>), ConfigError>
where
    K: Into<OsString>,
    V: Into<OsString>,
{
    let mut read = Reading { problems: Vec::new(), warnings: Vec::new() };
    let mut ours: Vec<(String, String)> = Vec::new();
    let mut host = None;
    for (name, value) in vars {
        // A name that is not UTF-8 is neither ours nor close to ours.
        let Ok(name) = name.into().into_string() else {
            continue;
        };
        let value = value.into();
        if let Some(variable) = VARIABLES.iter().find(|v| v.name == name) {
            match value.into_string() {
                Ok(text) if text.trim().is_empty() => {}
                Ok(text) => {
                    ours.retain(|(earlier, _)| *earlier != name);
                    ours.push((name, text.trim().to_owned()));
                }
                Err(_) => read
                    .problem(variable.name, "is not valid UTF-8; write it in UTF-8 (not shown)".to_owned()),
            }
        } else if name == "HOSTNAME" {
            host = value.into_string().ok().filter(|text| !text.trim().is_empty());
        } else if let Some(meant) = did_you_mean(&name) {
            read.warnings
                .push(format!("{name} is not a variable of standpipe and is ignored: did you mean {meant}?"));
        }
    }
    read.warnings.sort();

    // envy stops at the first field that it cannot parse and prints its value, so it only sorts texts into
    // fields here; a field that is an optional text cannot fail.
    let raw: Raw = match envy::from_iter(ours) {
        Ok(raw) => raw,
        Err(error) => {
            read.problem("environment", format!("could not be read ({error})"));
            return Err(ConfigError { problems: read.problems, warnings: read.warnings });
        }
    };
    let config = read.config(&raw, host.as_deref(), role);
    match config {
        Some(config) if read.problems.is_empty() => {
            read.warn_of_combinations(&config, role);
            Ok((config, read.warnings))
        }
        _ => {
            read.problems.sort_by_key(|problem| VARIABLES.iter().position(|v| v.name == problem.variable));
            Err(ConfigError { problems: read.problems, warnings: read.warnings })
        }
    }
}

/// The environment as texts: the field names are the variables' names in lower case.
#[derive(Deserialize)]
struct Raw {
    relay_url: Option<String>,
    relay_ca_file: Option<String>,
    redis_url: Option<String>,
    redis_ca_file: Option<String>,
    database_url: Option<String>,
    pgsslrootcert: Option<String>,
    redis_stream_key: Option<String>,
    redis_cursor_key: Option<String>,
    redis_max_stream_len: Option<String>,
    redis_memory_mark: Option<String>,
    redis_consumer_group: Option<String>,
    consumer_id: Option<String>,
    parallel_consumers: Option<String>,
    batch_size: Option<String>,
    db_pool_size: Option<String>,
    db_statement_timeout: Option<String>,
    transaction: Option<String>,
    collections: Option<String>,
    claim_idle: Option<String>,
    max_attempts: Option<String>,
    drain_timeout: Option<String>,
    tombstone_retention: Option<String>,
    relay_idle_timeout: Option<String>,
    on_future_cursor: Option<String>,
    auto_migrate: Option<String>,
    notifications: Option<String>,
    legacy_status: Option<String>,
    dead_letter_max_bytes: Option<String>,
    http_addr: Option<String>,
    admin_token: Option<String>,
    log_level: Option<String>,
    log_format: Option<String>,
    rust_log: Option<String>,
}

/// A problem with a value, and the remedy. The variable's name and its value are added by
/// [`Reading`].
struct Wrong {
    what: String,
    right: String,
}

impl Wrong {
    fn new(what: impl Into<String>, right: impl Into<String>) -> Self {
        Self { what: what.into(), right: right.into() }
    }
}

/// Collects what is wrong while the variables are parsed one by one.
struct Reading {
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl Reading {
    fn problem(&mut self, variable: &'static str, message: String) {
        self.problems.push(Problem { variable, message });
    }

    /// Parses the given text or, when there is none, the variable's default. `None` when that is a problem,
    /// which is then in the list.
    fn take<T>(
        &mut self,
        name: &'static str,
        given: Option<&str>,
        parse: impl FnOnce(&str) -> Result<T, Wrong>,
    ) -> Option<T> {
        let variable = VARIABLES.iter().find(|v| v.name == name)?;
        let text = given.unwrap_or(variable.default);
        let quoted = ['"', '\''].iter().any(|quote| text.starts_with(*quote) && text.ends_with(*quote));
        let parsed = if quoted {
            // Shells remove them, env files of containers mostly do not.
            Err(Wrong::new("has quotation marks around it", "remove them"))
        } else {
            parse(text)
        };
        match parsed {
            Ok(value) => Some(value),
            Err(Wrong { what, right }) => {
                let value = if variable.secret { String::new() } else { format!("{} ", shown(text)) };
                self.problem(name, format!("{value}{what}; {right}"));
                None
            }
        }
    }

    /// Parses every variable before it looks at any result, so that no problem hides another.
    fn config(&mut self, raw: &Raw, host: Option<&str>, role: Role) -> Option<Config> {
        let relay_url = self.take("RELAY_URL", raw.relay_url.as_deref(), RelayUrl::parse);
        let relay_ca = self.take("RELAY_CA_FILE", raw.relay_ca_file.as_deref(), CaFile::parse);
        let redis_url = self.take("REDIS_URL", raw.redis_url.as_deref(), RedisUrl::parse);
        let redis_ca = self.take("REDIS_CA_FILE", raw.redis_ca_file.as_deref(), CaFile::parse);
        let database_url = self.take("DATABASE_URL", raw.database_url.as_deref(), |t| match t {
            "" => Ok(None),
            url => DatabaseUrl::parse(url).map(Some),
        });
        let in_url = database_url.as_ref().and_then(Option::as_ref).and_then(DatabaseUrl::root_cert);
        let database_ca = match in_url {
            // The nearer word wins, as with libpq.
            Some(path) => self.take("DATABASE_URL", Some(&path), CaFile::parse),
            None => self.take("PGSSLROOTCERT", raw.pgsslrootcert.as_deref(), CaFile::parse),
        };
        let stream_key = self.take("REDIS_STREAM_KEY", raw.redis_stream_key.as_deref(), parse_key);
        let cursor_key = self.take("REDIS_CURSOR_KEY", raw.redis_cursor_key.as_deref(), parse_key);
        // Stream nodes are trimmed whole and hold 100 entries by default, so a lower mark might never be
        // reached again.
        let max_stream_len = self.take("REDIS_MAX_STREAM_LEN", raw.redis_max_stream_len.as_deref(), |t| {
            parse_whole(t, 100..=1_000_000_000)
        });
        let memory_mark = self.take("REDIS_MEMORY_MARK", raw.redis_memory_mark.as_deref(), MemoryMark::parse);
        let consumer_group =
            self.take("REDIS_CONSUMER_GROUP", raw.redis_consumer_group.as_deref(), parse_key);
        let host = host_name(host);
        let consumer_id =
            self.take("CONSUMER_ID", raw.consumer_id.as_deref().or(Some(&host)), parse_consumer_id);
        let parallel_consumers =
            self.take("PARALLEL_CONSUMERS", raw.parallel_consumers.as_deref(), |t| parse_whole(t, 1..=1024));
        let batch_size = self.take("BATCH_SIZE", raw.batch_size.as_deref(), |t| parse_whole(t, 1..=10_000));
        let db_pool_size =
            self.take("DB_POOL_SIZE", raw.db_pool_size.as_deref(), |t| parse_whole(t, 1..=1000));
        let db_statement_timeout =
            self.take("DB_STATEMENT_TIMEOUT", raw.db_statement_timeout.as_deref(), parse_statement_timeout);
        let transaction = self.take("TRANSACTION", raw.transaction.as_deref(), TransactionMode::from_word);
        let collections = self.take("COLLECTIONS", raw.collections.as_deref(), Collections::parse);
        let claim_idle = self.take("CLAIM_IDLE", raw.claim_idle.as_deref(), parse_claim_idle);
        let max_attempts =
            self.take("MAX_ATTEMPTS", raw.max_attempts.as_deref(), |t| parse_whole(t, 1..=1000));
        let drain_timeout = self.take("DRAIN_TIMEOUT", raw.drain_timeout.as_deref(), parse_drain_timeout);
        let tombstone_retention =
            self.take("TOMBSTONE_RETENTION", raw.tombstone_retention.as_deref(), parse_tombstone_retention);
        let relay_idle_timeout =
            self.take("RELAY_IDLE_TIMEOUT", raw.relay_idle_timeout.as_deref(), parse_idle_timeout);
        let on_future_cursor =
            self.take("ON_FUTURE_CURSOR", raw.on_future_cursor.as_deref(), OnFutureCursor::from_word);
        let auto_migrate = self.take("AUTO_MIGRATE", raw.auto_migrate.as_deref(), parse_yes_or_no);
        let notifications = self.take("NOTIFICATIONS", raw.notifications.as_deref(), parse_yes_or_no);
        let legacy_status = self.take("LEGACY_STATUS", raw.legacy_status.as_deref(), |text| match text {
            "auto" => Ok(None),
            text => parse_yes_or_no(text).map(Some),
        });
        let dead_letter_max_bytes =
            self.take("DEAD_LETTER_MAX_BYTES", raw.dead_letter_max_bytes.as_deref(), |t| parse_size(t, 1));
        let http_addr = self.take("HTTP_ADDR", raw.http_addr.as_deref(), parse_http_addr);
        let admin_token = self.take("ADMIN_TOKEN", raw.admin_token.as_deref(), |t| match t {
            "" => Ok(None),
            token => AdminToken::parse(token).map(Some),
        });
        let log_level = self.take("LOG_LEVEL", raw.log_level.as_deref(), LogLevel::from_word);
        let log_format = self.take("LOG_FORMAT", raw.log_format.as_deref(), LogFormat::from_word);

        if role.has_pipelines() && matches!(database_url, Some(None)) && !self.is_wrong("DATABASE_URL") {
            self.problem(
                "DATABASE_URL",
                "is not set and is needed here; write postgres://user:password@host:5432/database".to_owned(),
            );
        }
        if let (Some(stream), Some(cursor)) = (&stream_key, &cursor_key) {
            self.refuse_shared_keys(stream, cursor);
        }

        Some(Config {
            relay_url: relay_url?,
            relay_ca: relay_ca?,
            redis_url: redis_url?,
            redis_ca: redis_ca?,
            database_url: database_url?,
            database_ca: database_ca?,
            stream_key: stream_key?,
            cursor_key: cursor_key?,
            max_stream_len: max_stream_len?,
            memory_mark: memory_mark?,
            consumer_group: consumer_group?,
            consumer_id: consumer_id?,
            parallel_consumers: parallel_consumers?,
            batch_size: batch_size?,
            db_pool_size: db_pool_size?,
            db_statement_timeout: db_statement_timeout?,
            transaction: transaction?,
            collections: collections?,
            claim_idle: claim_idle?,
            max_attempts: max_attempts?,
            drain_timeout: drain_timeout?,
            tombstone_retention: tombstone_retention?,
            relay_idle_timeout: relay_idle_timeout?,
            on_future_cursor: on_future_cursor?,
            auto_migrate: auto_migrate?,
            notifications: notifications?,
            legacy_status: legacy_status?,
            dead_letter_max_bytes: dead_letter_max_bytes?,
            http_addr: http_addr?,
            admin_token: admin_token?,
            log_level: log_level?,
            log_format: log_format?,
            rust_log: raw.rust_log.clone(),
        })
    }

    fn is_wrong(&self, variable: &str) -> bool {
        self.problems.iter().any(|problem| problem.variable == variable)
    }

    /// Two uses of one Redis key would destroy each other: SET replaces a stream without a word.
    fn refuse_shared_keys(&mut self, stream: &str, cursor: &str) {
        let clash = if cursor == stream {
            Some((
                "REDIS_CURSOR_KEY",
                "is the same key as REDIS_STREAM_KEY: storing the cursor would replace the stream",
            ))
        } else if cursor.strip_prefix(stream) == Some(":dead") {
            Some(("REDIS_CURSOR_KEY", "is the key of the dead letters (REDIS_STREAM_KEY + \":dead\")"))
        } else if stream.strip_prefix(cursor) == Some(":relay") {
            Some((
                "REDIS_STREAM_KEY",
                "is the key where the relay's host is kept (REDIS_CURSOR_KEY + \":relay\")",
            ))
        } else {
            None
        };
        if let Some((variable, why)) = clash {
            let value = if variable == "REDIS_CURSOR_KEY" { cursor } else { stream };
            self.problem(variable, format!("{} {why}; choose another key", shown(value)));
        }
    }

    /// Settings that work, but probably not as intended.
    fn warn_of_combinations(&mut self, config: &Config, role: Role) {
        if config.relay_ca.is_some() && !config.relay_url.is_tls() {
            self.warnings
                .push("RELAY_CA_FILE is set, and RELAY_URL does not use TLS: write wss://".to_owned());
        }
        if config.redis_ca.is_some() && !config.redis_url.is_tls() {
            self.warnings
                .push("REDIS_CA_FILE is set, and REDIS_URL does not use TLS: write rediss://".to_owned());
        }
        if !role.has_pipelines() {
            return;
        }
        let Config { parallel_consumers, batch_size, db_pool_size, max_stream_len, .. } = config;
        if *batch_size == 10 {
            self.warnings.push(
                "BATCH_SIZE is 10, the older workers' default, which costs throughput here: unset it or use 200"
                    .to_owned(),
            );
        }
        if parallel_consumers > db_pool_size {
            self.warnings.push(format!(
                "PARALLEL_CONSUMERS is {parallel_consumers} and DB_POOL_SIZE only {db_pool_size}: \
                 pipelines will wait for connections"
            ));
        }
        let in_hand = (*parallel_consumers as u64).saturating_mul(*batch_size as u64);
        if in_hand > *max_stream_len {
            self.warnings.push(format!(
                "REDIS_MAX_STREAM_LEN is {max_stream_len}, less than one batch for each pipeline ({in_hand} entries): \
                 some pipelines will stay idle"
            ));
        }
        // Relays repeat up to three days; while they repeat an older create, its delete must still be known.
        if config.tombstone_retention < Duration::from_hours(72) {
            self.warnings.push(format!(
                "TOMBSTONE_RETENTION is {}, less than the three days that a relay can repeat: \
                 a deleted record may come back until its delete is repeated too",
                humantime::format_duration(config.tombstone_retention)
            ));
        }
    }
}

impl Config {
    /// One `NAME=value` line per variable, in the order of [`VARIABLES`], as in force. Passwords are
    /// redacted.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        self.values().into_iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    fn values(&self) -> Vec<(&'static str, String)> {
        let duration = |d: Duration| humantime::format_duration(d).to_string();
        vec![
            ("RELAY_URL", self.relay_url.to_string()),
            ("RELAY_CA_FILE", CaFile::path(self.relay_ca.as_ref())),
            ("REDIS_URL", self.redis_url.to_string()),
            ("REDIS_CA_FILE", CaFile::path(self.redis_ca.as_ref())),
            ("DATABASE_URL", self.database_url.as_ref().map(ToString::to_string).unwrap_or_default()),
            ("PGSSLROOTCERT", CaFile::path(self.database_ca.as_ref())),
            ("REDIS_STREAM_KEY", self.stream_key.clone()),
            ("REDIS_CURSOR_KEY", self.cursor_key.clone()),
            ("REDIS_MAX_STREAM_LEN", self.max_stream_len.to_string()),
            ("REDIS_MEMORY_MARK", self.memory_mark.to_string()),
            ("REDIS_CONSUMER_GROUP", self.consumer_group.clone()),
            ("CONSUMER_ID", self.consumer_id.clone()),
            ("PARALLEL_CONSUMERS", self.parallel_consumers.to_string()),
            ("BATCH_SIZE", self.batch_size.to_string()),
            ("DB_POOL_SIZE", self.db_pool_size.to_string()),
            ("DB_STATEMENT_TIMEOUT", duration(self.db_statement_timeout)),
            ("TRANSACTION", self.transaction.to_string()),
            ("COLLECTIONS", self.collections.to_string()),
            ("CLAIM_IDLE", duration(self.claim_idle)),
            ("MAX_ATTEMPTS", self.max_attempts.to_string()),
            ("DRAIN_TIMEOUT", duration(self.drain_timeout)),
            ("TOMBSTONE_RETENTION", duration(self.tombstone_retention)),
            ("RELAY_IDLE_TIMEOUT", self.relay_idle_timeout.map_or_else(|| "off".to_owned(), duration)),
            ("ON_FUTURE_CURSOR", self.on_future_cursor.to_string()),
            ("AUTO_MIGRATE", self.auto_migrate.to_string()),
            ("NOTIFICATIONS", self.notifications.to_string()),
            ("LEGACY_STATUS", self.legacy_status.map_or_else(|| "auto".to_owned(), |on| on.to_string())),
            ("DEAD_LETTER_MAX_BYTES", format_size(self.dead_letter_max_bytes)),
            ("HTTP_ADDR", self.http_addr.map_or_else(|| "off".to_owned(), |a| a.to_string())),
            ("ADMIN_TOKEN", self.admin_token.as_ref().map(ToString::to_string).unwrap_or_default()),
            ("LOG_LEVEL", self.log_level.to_string()),
            ("LOG_FORMAT", self.log_format.to_string()),
            ("RUST_LOG", self.rust_log.clone().unwrap_or_default()),
        ]
    }

    /// The name of the pipeline with this number, as Redis knows it.
    #[must_use]
    pub fn consumer_name(&self, pipeline: usize) -> String {
        format!("{}-{pipeline}", self.consumer_id)
    }

    /// The names of all pipelines.
    #[must_use]
    pub fn consumer_names(&self) -> Vec<String> {
        (0..self.parallel_consumers).map(|pipeline| self.consumer_name(pipeline)).collect()
    }

    /// The stream of dead letters.
    #[must_use]
    pub fn dead_letter_key(&self) -> String {
        format!("{}:dead", self.stream_key)
    }

    /// Where the name of the relay is kept that the cursor belongs to.
    #[must_use]
    pub fn cursor_relay_key(&self) -> String {
        format!("{}:relay", self.cursor_key)
    }
}

/// The relay's WebSocket URL. `Display` and `Debug` hide what may be secret in it.
#[derive(Clone, PartialEq, Eq)]
pub struct RelayUrl(Url);

impl RelayUrl {
    fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write wss://host, or ws:// for a relay without TLS";
        let mut url = Url::parse(text)
            .map_err(|error| Wrong::new(format!("is not a URL ({error}; its value is not shown)"), right))?;
        if !matches!(url.scheme(), "ws" | "wss") {
            return Err(Wrong::new("is neither ws:// nor wss://", right));
        }
        if url.query_pairs().any(|(name, _)| name == "cursor") {
            let what = "has a cursor of its own, but the cursor is kept in Redis";
            return Err(Wrong::new(what, "remove the cursor from the URL"));
        }
        if url.path().trim_end_matches('/').ends_with("/subscribe") {
            return Err(Wrong::new(
                "is the address of a Jetstream, which speaks JSON and not the protocol of a relay",
                "write the address of a relay, such as wss://bsky.network",
            ));
        }
        if url.path() == "/" {
            url.set_path(SUBSCRIBE_PATH);
        }
        url.set_fragment(None);
        Ok(Self(url))
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.0.scheme() == "wss"
    }

    /// The URL with everything that is secret in it, to connect with; never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.as_str()
    }

    /// The relay's name, `host` or `host:port`: sequence numbers have a meaning only together with it. A port
    /// that the scheme implies is left out.
    #[must_use]
    pub fn relay(&self) -> String {
        let host = self.0.host_str().unwrap_or_default();
        match self.0.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }
}

/// The URL of Redis. `Display` and `Debug` hide its password.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl(String);

impl RedisUrl {
    fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write redis://:password@host:6379, rediss:// for TLS, or unix:///path for a socket";
        let url = Url::parse(text).map_err(|error| {
            let what = format!("is not a URL ({error}; its value is not shown)");
            Wrong::new(what, format!("{right}; percent-encode special characters of the password"))
        })?;
        match url.scheme() {
            "redis" | "rediss" | "valkey" | "valkeys" => {
                if url.host_str().is_none_or(str::is_empty) {
                    return Err(Wrong::new("names no host", right));
                }
                let database = url.path().trim_start_matches('/');
                if !database.is_empty() && database.parse::<u32>().is_err() {
                    let what = "has a path that is not the number of a database";
                    return Err(Wrong::new(what, "end it with /0, or with nothing"));
                }
            }
            "unix" | "redis+unix" | "valkey+unix" => {
                if url.host_str().is_some_and(|host| !host.is_empty()) || url.path().len() < 2 {
                    return Err(Wrong::new(
                        "names no socket",
                        "write unix:///run/redis.sock, with three slashes",
                    ));
                }
            }
            _ => return Err(Wrong::new("has a scheme that is not one of Redis", right)),
        }
        Ok(Self(text.to_owned()))
    }

    /// The URL with its password, to connect with; never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl RedisUrl {
    /// Whether it asks for TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.0.starts_with("rediss:") || self.0.starts_with("valkeys:")
    }
}

/// Certificates of authorities, read from a file.
#[derive(Clone, PartialEq, Eq)]
pub struct CaFile {
    path: String,
    pem: Vec<u8>,
}

impl fmt::Debug for CaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CaFile({:?})", self.path)
    }
}

impl CaFile {
    /// `None` for libpq's word for the system's own.
    fn parse(text: &str) -> Result<Option<Self>, Wrong> {
        let right = "write the path of a PEM file, such as /etc/ssl/certs/our-ca.pem";
        if text.is_empty() || text == "system" {
            return Ok(None);
        }
        let pem = std::fs::read(text).map_err(|error| {
            Wrong::new(format!("names a file of certificates that cannot be read ({})", error.kind()), right)
        })?;
        let count = CertificateDer::pem_slice_iter(&pem).flatten().count();
        if count == 0 {
            return Err(Wrong::new("names a file without any certificate in PEM form", right));
        }
        Ok(Some(Self { path: text.to_owned(), pem }))
    }

    fn path(this: Option<&Self>) -> String {
        this.map(|file| file.path.clone()).unwrap_or_default()
    }

    /// The file's content.
    #[must_use]
    pub fn pem(&self) -> &[u8] {
        &self.pem
    }
}

/// The URL of PostgreSQL, as given. `Display` and `Debug` hide its password.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// libpq's spellings. The client library knows only three of them; the store translates.
    const SSL_MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];

    /// The parameters that the client library knows, and those that are translated for it.
    const PARAMETERS: [&str; 21] = [
        "user",
        "password",
        "dbname",
        "options",
        "application_name",
        "sslmode",
        "sslnegotiation",
        "sslrootcert",
        "host",
        "hostaddr",
        "port",
        "connect_timeout",
        "tcp_user_timeout",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_retries",
        "target_session_attrs",
        "channel_binding",
        "load_balance_hosts",
        "schema",
    ];

    /// What to write in place of parameters that other libraries know.
    fn instead_of(parameter: &str) -> &'static str {
        match parameter {
            "ssl" => "write sslmode=require, or sslmode=disable",
            "currentSchema" | "search_path" => "write schema=NAME",
            "pgbouncer" | "statement_cache_size" | "prepared_statements" | "binary_parameters" => {
                "remove it: a pooler works in session mode, and needs no parameter here"
            }
            "connection_limit" | "pool_max_conns" | "pool_size" | "max_connections" | "pool_timeout" => {
                "remove it: DB_POOL_SIZE limits the connections"
            }
            "statement_timeout" => "remove it: DB_STATEMENT_TIMEOUT limits each statement",
            "sslcert" | "sslkey" | "sslpassword" | "sslidentity" => {
                "remove it: client certificates are not supported; use a password"
            }
            "gssencmode" | "krbsrvname" | "gsslib" => "remove it: GSSAPI is not supported; sslmode encrypts",
            "timezone" | "TimeZone" | "client_encoding" | "charset" => {
                "remove it: standpipe sets what it needs"
            }
            "ssl_mode" | "sslMode" => "write sslmode=...",
            _ => "remove it, or set it in options, such as options=-c%20work_mem%3D16MB",
        }
    }

    /// Checks what `url::Url` cannot: PostgreSQL's URLs may name several hosts, or none but in a parameter.
    /// The parts are cut as the client library cuts them.
    fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write postgres://user:password@host:5432/database";
        let hidden = |what: &str| Wrong::new(format!("{what} (its value is not shown)"), right);
        let Some(rest) = text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://"))
        else {
            return Err(hidden("does not start with postgres:// or postgresql://"));
        };
        let (user_info, rest) = match rest.split_once('@') {
            Some((user_info, rest)) => (user_info, rest),
            None => ("", rest),
        };
        let user = user_info.split(':').next().unwrap_or_default();
        let (hosts, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        if hosts.contains('@') || user.contains(['/', '?', '#']) {
            return Err(Wrong::new(
                "has an @ or / where none can be (its value is not shown)",
                "percent-encode special characters of the password: %40 for @, %2F for /",
            ));
        }
        let parameters = rest.split_once('?').map_or("", |(_, parameters)| parameters);
        let parameters: Vec<_> = parameters
            .split('&')
            .filter(|p| !p.is_empty())
            .map(|p| p.split_once('=').unwrap_or((p, "")))
            .collect();
        if hosts.is_empty() {
            if !parameters.iter().any(|(name, _)| matches!(*name, "host" | "hostaddr")) {
                return Err(hidden("names no host"));
            }
        } else if !hosts.split(',').all(is_host_and_port) {
            return Err(hidden("has a host or port that cannot be"));
        }
        for (name, value) in &parameters {
            let translated = *name == "ssl" && matches!(*value, "true" | "1" | "false" | "0");
            if !translated && !Self::PARAMETERS.contains(name) {
                let name: String = name.chars().filter(|c| !c.is_control()).take(40).collect();
                return Err(Wrong::new(
                    format!("has the parameter {name}, which is not known here (the URL is not shown)"),
                    Self::instead_of(&name),
                ));
            }
        }
        if parameters.iter().any(|(name, mode)| *name == "sslmode" && !Self::SSL_MODES.contains(mode)) {
            let right = format!("write one of {}", Self::SSL_MODES.join(", "));
            return Err(Wrong::new("has an sslmode that PostgreSQL does not know", right));
        }
        Ok(Self(text.to_owned()))
    }

    /// The URL with its password, to connect with; never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// The secret for control over HTTP. `Display` and `Debug` hide it.
#[derive(Clone)]
pub struct AdminToken(String);

impl AdminToken {
    /// Fewer characters than this can be guessed.
    const MIN_LENGTH: usize = 16;

    fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write 16 characters or more, such as what `openssl rand -hex 24` prints";
        if text.len() < Self::MIN_LENGTH {
            return Err(Wrong::new("is too short (its value is not shown)", right));
        }
        // It travels in a header.
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Wrong::new(
                "has a character that a header cannot carry (its value is not shown)",
                "write letters, digits and punctuation of ASCII",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// Whether this is the token. How long it takes does not tell how much of it is right.
    #[must_use]
    pub fn is(&self, given: &str) -> bool {
        use subtle::ConstantTimeEq as _;
        self.0.as_bytes().ct_eq(given.as_bytes()).into()
    }

    /// The token, to send it; never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminToken(***)")
    }
}

impl DatabaseUrl {
    fn parameters(&self) -> impl Iterator<Item = (&str, &str)> {
        let parameters = self.0.split_once('?').map_or("", |(_, parameters)| parameters);
        parameters.split('&').filter_map(|parameter| parameter.split_once('='))
    }

    /// The last `sslmode` that it gives, which is the one that counts.
    #[must_use]
    pub fn ssl_mode(&self) -> Option<&str> {
        let words = self.parameters().filter_map(|parameter| match parameter {
            ("sslmode", mode) => Some(mode),
            ("ssl", "true" | "1") => Some("require"),
            ("ssl", _) => Some("disable"),
            _ => None,
        });
        words.last()
    }

    /// The schema of the application's tables, where the URL names one.
    #[must_use]
    pub fn schema(&self) -> Option<String> {
        let (_, schema) = self.parameters().filter(|(name, _)| *name == "schema").last()?;
        let schema = schema.replace('+', "%2B");
        let decoded = url::form_urlencoded::parse(schema.as_bytes()).next()?.0.into_owned();
        (!decoded.is_empty()).then_some(decoded)
    }

    fn root_cert(&self) -> Option<String> {
        let (_, path) = self.parameters().filter(|(name, _)| *name == "sslrootcert").last()?;
        // As a query's value would be read, but for the plus sign, which libpq leaves alone.
        let path = path.replace('+', "%2B");
        let decoded = url::form_urlencoded::parse(path.as_bytes()).next()?.0.into_owned();
        (!decoded.is_empty()).then_some(decoded)
    }

    /// The URL in the words of the client library, which knows three modes and no file of certificates:
    /// [`DatabaseUrl::ssl_mode`] holds what to check of TLS. With the password; never log it.
    #[must_use]
    pub fn for_driver(&self) -> String {
        let Some((url, parameters)) = self.0.split_once('?') else { return self.0.clone() };
        let kept: Vec<String> = parameters
            .split('&')
            .filter(|parameter| !parameter.starts_with("sslrootcert=") && !parameter.starts_with("schema="))
            .map(|parameter| match parameter {
                "sslmode=allow" => "sslmode=prefer".to_owned(),
                "sslmode=verify-ca" | "sslmode=verify-full" | "ssl=true" | "ssl=1" => {
                    "sslmode=require".to_owned()
                }
                "ssl=false" | "ssl=0" => "sslmode=disable".to_owned(),
                _ => parameter.to_owned(),
            })
            .collect();
        if kept.is_empty() { url.to_owned() } else { format!("{url}?{}", kept.join("&")) }
    }
}

/// `name`, `name:5432`, `1.2.3.4`, `[::1]:5432`, or a percent-encoded directory of sockets.
fn is_host_and_port(text: &str) -> bool {
    let (host, port) = if let Some(bracketed) = text.strip_prefix('[') {
        let Some((address, rest)) = bracketed.split_once(']') else {
            return false;
        };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match rest.strip_prefix(':') {
            Some(port) => ("v6", Some(port)),
            None if rest.is_empty() => ("v6", None),
            None => return false,
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    !host.is_empty()
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._%".contains(&b))
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

macro_rules! redacted_display {
    ($($url:ident)*) => {$(
        impl fmt::Display for $url {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&redacted(self.expose()))
            }
        }

        impl fmt::Debug for $url {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($url), "({})"), redacted(self.expose()))
            }
        }
    )*};
}

redacted_display!(RelayUrl RedisUrl DatabaseUrl);

/// `scheme://user:***@host/path?parameter=value`, with `***` for whatever may be secret. It works on any
/// text: where the parts cannot be told apart it hides too much rather than too little.
fn redacted(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return "***".to_owned();
    };
    // The last @, since a password may hold others.
    let (user_info, rest) = match rest.rsplit_once('@') {
        Some((user_info, rest)) => (Some(user_info), rest),
        None => (None, rest),
    };
    let user_info = match user_info {
        None => String::new(),
        Some(text) if text.contains(['/', '?', '#']) => return format!("{scheme}://***"),
        Some(text) => match text.split_once(':') {
            Some((user, _)) => format!("{user}:***@"),
            // A name alone is a name in PostgreSQL; in Redis it is mostly a password at the wrong place.
            None if scheme.starts_with("postgres") => format!("{text}@"),
            None => "***@".to_owned(),
        },
    };
    let (path, query) = match rest.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (rest, None),
    };
    let query = query.map_or_else(String::new, |query| {
        let shown = query.split('&').map(|parameter| match parameter.split_once('=') {
            Some((name, _)) if hides(name) => format!("{name}=***"),
            Some(_) => parameter.to_owned(),
            None => "***".to_owned(),
        });
        format!("?{}", shown.collect::<Vec<_>>().join("&"))
    });
    format!("{scheme}://{user_info}{path}{query}")
}

/// Whether a parameter of this name may hold a secret: `password`, `pass` (Redis sockets), `sslpassword`,
/// `token`, or a name in disguise.
fn hides(parameter: &str) -> bool {
    let name = parameter.to_ascii_lowercase();
    ["pass", "secret", "token", "key", "%"].iter().any(|part| name.contains(part))
}

/// A value of a variable that is not secret, quoted, on one line and short. A value that looks like a secret in the wrong
/// variable is not shown.
fn shown(value: &str) -> String {
    if value.contains("://") || value.contains('@') || value.to_ascii_lowercase().contains("password") {
        return "(value not shown)".to_owned();
    }
    match value.char_indices().nth(60) {
        Some((end, _)) => format!("{:?}...", &value[..end]),
        None => format!("{value:?}"),
    }
}

/// The mark of Redis memory at which the reader slows down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryMark {
    /// A percentage of Redis's `maxmemory`, 1 to 80.
    Percent(u8),
    /// A size in bytes.
    Bytes(u64),
}

impl MemoryMark {
    /// Redis refuses the keys that everything else needs when memory is full; everything else must keep room to proceed.
    const MAX_PERCENT: u8 = 80;

    fn parse(text: &str) -> Result<Self, Wrong> {
        let Some(percent) = text.strip_suffix('%') else {
            // Redis itself needs some megabytes: under a lower mark the reader would never read.
            return parse_size(text, 4 << 20).map(Self::Bytes);
        };
        match percent.trim().parse::<u8>() {
            Ok(percent @ 1..=Self::MAX_PERCENT) => Ok(Self::Percent(percent)),
            Ok(81..=100) => Err(Wrong::new(
                "is more than 80%: the pipelines need the rest of Redis's memory to continue when the reader stops",
                "write 75%",
            )),
            _ => Err(Wrong::new("is not a percentage from 1% to 80%", "write 75%, or a size such as 512MiB")),
        }
    }
}

impl fmt::Display for MemoryMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Bytes(bytes) => f.write_str(&format_size(*bytes)),
        }
    }
}

/// Which collections the reader keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collections(Vec<Wanted>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    All,
    /// With its last dot: `app.bsky.`.
    Under(String),
    Exactly(String),
}

impl Collections {
    /// Whether events of this collection are wanted. Names are compared exactly; `app.bsky.*` keeps
    /// everything below `app.bsky`, at any depth.
    #[must_use]
    pub fn keeps(&self, collection: &str) -> bool {
        self.0.iter().any(|wanted| match wanted {
            Wanted::All => true,
            Wanted::Under(prefix) => collection.starts_with(prefix.as_str()),
            Wanted::Exactly(name) => collection == name,
        })
    }

    fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write names such as app.bsky.feed.post, app.bsky.* or *, separated by commas";
        let mut wanted = Vec::new();
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            wanted.push(match name.strip_suffix(".*") {
                _ if name == "*" => Wanted::All,
                Some(prefix) if prefix.split('.').all(is_domain_segment) => {
                    Wanted::Under(format!("{prefix}."))
                }
                None if is_nsid(name) => Wanted::Exactly(name.to_owned()),
                _ => {
                    return Err(Wrong::new(format!("has {}, which is not a collection", shown(name)), right));
                }
            });
        }
        if wanted.is_empty() {
            return Err(Wrong::new("names no collection", right));
        }
        Ok(Self(wanted))
    }
}

impl fmt::Display for Collections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, wanted) in self.0.iter().enumerate() {
            let comma = if number > 0 { "," } else { "" };
            match wanted {
                Wanted::All => write!(f, "{comma}*")?,
                Wanted::Under(prefix) => write!(f, "{comma}{prefix}*")?,
                Wanted::Exactly(name) => write!(f, "{comma}{name}")?,
            }
        }
        Ok(())
    }
}

/// The NSID syntax of the AT Protocol: at least two domain segments, then a name of letters and digits.
fn is_nsid(text: &str) -> bool {
    let segments: Vec<_> = text.split('.').collect();
    let Some((name, domain)) = segments.split_last() else {
        return false;
    };
    text.len() <= 317
        && domain.len() >= 2
        && domain.iter().all(|segment| is_domain_segment(segment))
        && name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric())
}

fn is_domain_segment(segment: &str) -> bool {
    (1..=63).contains(&segment.len())
        && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !segment.starts_with('-')
        && !segment.ends_with('-')
}

/// An enumeration whose values are words; the first spelling of each is the one that is printed.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident {
        $($(#[$variant_doc:meta])* $variant:ident = $word:literal $(| $other:literal)*,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// The word that stands for it in the environment.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }

            /// Upper and lower case do not matter.
            fn from_word(text: &str) -> Result<Self, Wrong> {
                $(if [$word $(, $other)*].iter().any(|word| text.eq_ignore_ascii_case(word)) {
                    return Ok(Self::$variant);
                })*
                let words = [$($word),*].join(", ");
                Err(Wrong::new("is not a known value", format!("write one of {words}")))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words! {
    /// `LOG_LEVEL`.
    LogLevel {
        /// Everything that helps to find a fault.
        Debug = "DEBUG",
        /// Normal operation.
        Info = "INFO",
        /// Worth an operator's attention.
        Warning = "WARNING" | "WARN",
        /// Operator action needed.
        Error = "ERROR",
    }
}

impl LogLevel {
    /// The level of this name, however it is spelled in `LOG_LEVEL`.
    #[must_use]
    pub fn named(text: &str) -> Option<Self> {
        Self::from_word(text).ok()
    }

    /// The level's name in a tracing filter.
    #[must_use]
    pub fn as_filter(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warn",
            Self::Error => "error",
        }
    }
}

words! {
    /// `LOG_FORMAT`.
    LogFormat {
        /// One readable line per message.
        Text = "text",
        /// One JSON object per message.
        Json = "json",
    }
}

words! {
    /// `ON_FUTURE_CURSOR`: what the reader does when the relay says that the stored cursor is in its future.
    OnFutureCursor {
        /// Stop and report it: an operator decides about the gap.
        Stop = "stop",
        /// Resume with what the relay sends now.
        Live = "live",
        /// Resume with the oldest event that the relay still has.
        Oldest = "oldest",
    }
}

words! {
    /// TRANSACTION: how many events share a transaction.
    TransactionMode {
        /// Each event has its own.
        Event = "event",
        /// A batch shares one, or a few; events that fail together are applied one by one.
        Batch = "batch",
    }
}

fn parse_yes_or_no(text: &str) -> Result<bool, Wrong> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Ok(true),
        "false" | "0" | "no" => Ok(false),
        _ => Err(Wrong::new("is neither yes nor no", "write true or false")),
    }
}

fn parse_whole<T>(text: &str, range: RangeInclusive<T>) -> Result<T, Wrong>
where
    T: FromStr + PartialOrd + fmt::Display,
{
    let (low, high) = (range.start(), range.end());
    match text.parse::<T>() {
        Ok(number) if range.contains(&number) => Ok(number),
        Ok(_) => Err(Wrong::new("is out of range", format!("write a whole number from {low} to {high}"))),
        Err(_) => Err(Wrong::new("is not a usable whole number", format!("write one from {low} to {high}"))),
    }
}

/// Upper bound for any duration: implausibly long, yet safe to add to an `Instant`.
const LONGEST: Duration = Duration::from_hours(24 * 3650);

/// Zero needs no unit; every caller decides what it means.
fn parse_duration(text: &str) -> Result<Duration, Wrong> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    if text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(Wrong::new("has no unit", format!("{text} what? write {text}s, or use m, h or d")));
    }
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= LONGEST => Ok(duration),
        Ok(_) => Err(Wrong::new("is longer than ten years", "write a shorter time, such as 30d")),
        Err(_) => {
            Err(Wrong::new("is not a duration", "write a number and a unit, such as 30s, 5m, 24h or 30d"))
        }
    }
}

fn parse_claim_idle(text: &str) -> Result<Duration, Wrong> {
    match parse_duration(text)? {
        idle if idle < Duration::from_secs(10) => Err(Wrong::new(
            "is less than 10s: a pipeline marks the entries that it works on every 3 s at the latest, so a \
             shorter time could take over work that is still running",
            "write 10s or more",
        )),
        idle => Ok(idle),
    }
}

fn parse_drain_timeout(text: &str) -> Result<Duration, Wrong> {
    match parse_duration(text)? {
        Duration::ZERO => Err(Wrong::new("would cut off work in progress at every stop", "write 25s")),
        timeout => Ok(timeout),
    }
}

fn parse_tombstone_retention(text: &str) -> Result<Duration, Wrong> {
    match parse_duration(text)? {
        Duration::ZERO => Err(Wrong::new("would let a late create bring a deleted record back", "write 30d")),
        retention => Ok(retention),
    }
}

fn parse_statement_timeout(text: &str) -> Result<Duration, Wrong> {
    let right = "write a time from 100ms to 24h";
    match parse_duration(text)? {
        Duration::ZERO => {
            Err(Wrong::new("means no limit to PostgreSQL: a stuck statement would hold its pipeline", right))
        }
        timeout if timeout < Duration::from_millis(100) => Err(Wrong::new(
            "is so short that ordinary work would be cancelled and tried again without end",
            right,
        )),
        timeout if timeout > Duration::from_hours(24) => Err(Wrong::new("is longer than 24h", right)),
        timeout => Ok(timeout),
    }
}

fn parse_idle_timeout(text: &str) -> Result<Option<Duration>, Wrong> {
    if text.eq_ignore_ascii_case("off") {
        return Ok(None);
    }
    match parse_duration(text)? {
        Duration::ZERO => Ok(None),
        timeout if timeout < Duration::from_secs(1) => {
            Err(Wrong::new("is so short that the reader would reconnect without end", "write 60s, or off"))
        }
        timeout => Ok(Some(timeout)),
    }
}

const SIZE_UNITS: [(&str, u64); 7] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("B", 1),
];

/// A pebibyte: more than any Redis holds, and far from where a sum of sizes would overflow.
const LARGEST: u64 = 1 << 50;

/// A size of at least `least` bytes.
fn parse_size(text: &str, least: u64) -> Result<u64, Wrong> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if unit.is_empty() && digits > 0 {
        return Err(Wrong::new("has no unit", format!("{text} what? write {text}B or {text}MiB")));
    }
    let size = SIZE_UNITS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(unit.trim()))
        .and_then(|(_, bytes)| number.parse::<u64>().ok()?.checked_mul(*bytes));
    match size {
        Some(size) if size < least => {
            Err(Wrong::new("is too small", format!("write {} or more", format_size(least))))
        }
        Some(size) if size <= LARGEST => Ok(size),
        Some(_) => Err(Wrong::new("is too large", "write a size such as 512MiB")),
        None => Err(Wrong::new(
            "is not a size",
            "write a whole number and B, KiB, MiB, GiB, KB, MB or GB, such as 512MiB",
        )),
    }
}

/// In the largest binary unit that needs no fraction.
fn format_size(bytes: u64) -> String {
    let unit = SIZE_UNITS[..3].iter().rev().find(|(_, unit)| bytes > 0 && bytes.is_multiple_of(*unit));
    match unit {
        Some((name, unit)) => format!("{}{name}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

/// `None` when it is off.
fn parse_http_addr(text: &str) -> Result<Option<SocketAddr>, Wrong> {
    if text.eq_ignore_ascii_case("off") {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        Wrong::new(
            "is not an IP address with a port",
            "write 127.0.0.1:9464, 0.0.0.0:9464 for all interfaces, or off",
        )
    })
}

/// A key or a group of Redis: any text, as long as it is not obviously something else.
fn parse_key(text: &str) -> Result<String, Wrong> {
    let right = "write a name such as firehose:events";
    if text.contains("://") {
        return Err(Wrong::new("is a URL", right));
    }
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(Wrong::new("holds a blank or a control character", right));
    }
    if text.len() > 256 {
        return Err(Wrong::new("is longer than 256 bytes", right));
    }
    Ok(text.to_owned())
}

fn parse_consumer_id(text: &str) -> Result<String, Wrong> {
    parse_key(text)
        .map_err(|Wrong { what, .. }| Wrong::new(what, "write a name that stays the same over restarts"))
}

/// The host's name, which mostly stays the same over restarts; HOSTNAME is exported by containers, seldom by
/// shells.
fn host_name(variable: Option<&str>) -> String {
    let file = || std::fs::read_to_string("/etc/hostname").ok();
    let name = variable.map(str::to_owned).or_else(file).unwrap_or_default();
    match name.trim() {
        "" => "standpipe".to_owned(),
        name => name.to_owned(),
    }
}

/// Whether a person wants no colours, in no program: <https://no-color.org>.
#[must_use]
pub fn no_colour() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Names that are near one of ours, but belong to other programs.
const FOREIGN: &[&str] = &["BATCH_TIME", "REDIS_SSL", "REDIS_TTL", "RUSTC_LOG"];

/// The variable that a person may have meant by `name`, which is none of ours.
fn did_you_mean(name: &str) -> Option<&'static str> {
    if FOREIGN.contains(&name) {
        return None;
    }
    let limit = if name.len() < 6 { 1 } else { 2 };
    let upper = name.to_ascii_uppercase();
    VARIABLES
        .iter()
        .filter(|v| v.name.len().abs_diff(upper.len()) <= limit)
        .map(|v| (edits(upper.as_bytes(), v.name.as_bytes()), v.name))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, meant)| meant)
}

/// How many letters must be inserted, removed, replaced or swapped with their neighbour to make `a` into `b`
/// (Damerau-Levenshtein, optimal string alignment).
fn edits(a: &[u8], b: &[u8]) -> usize {
    let mut rows: [Vec<usize>; 3] = [Vec::new(), Vec::new(), (0..=b.len()).collect()];
    for (i, &from) in a.iter().enumerate() {
        rows.rotate_left(1);
        let [before, above, row] = &mut rows;
        row.clear();
        row.push(i + 1);
        for (j, &to) in b.iter().enumerate() {
            let mut least = (above[j] + usize::from(from != to)).min(above[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && from == b[j - 1] && a[i - 1] == to {
                least = least.min(before[j - 1] + 1);
            }
            row.push(least);
        }
    }
    rows[2].last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<(Config, Vec<String>), ConfigError> {
        from_env(vars.iter().copied(), Role::Tool)
    }

    /// The only problem that one variable with this value has.
    fn problem(name: &str, value: &str) -> String {
        let error = read(&[(name, value)]).expect_err("the value should be refused");
        assert_eq!(error.problems.len(), 1, "{error}");
        error.to_string()
    }

    #[test]
    fn an_empty_environment_gives_the_defaults_and_no_warning() {
        let (config, warnings) = read(&[("HOSTNAME", "tower")]).unwrap();
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!(config.consumer_id, "tower");
        assert_eq!(config.consumer_name(3), "tower-3");
        assert_eq!(config.relay_url.expose(), "wss://bsky.network/xrpc/com.atproto.sync.subscribeRepos");
        assert_eq!(config.relay_url.relay(), "bsky.network");
        assert_eq!(config.memory_mark, MemoryMark::Percent(75));
        assert_eq!(config.relay_idle_timeout, Some(Duration::from_mins(1)));
        assert_eq!(config.dead_letter_max_bytes, 256 << 20);
        assert_eq!(config.http_addr, Some(([127, 0, 0, 1], 9464).into()));
        assert_eq!(config.dead_letter_key(), "firehose:events:dead");
        assert_eq!(config.cursor_relay_key(), "firehose:cursor:relay");
    }

    #[test]
    fn every_variable_is_described_in_the_order_of_the_table() {
        let (config, _) = read(&[]).unwrap();
        let described: Vec<_> = config.values().into_iter().map(|(name, _)| name).collect();
        let known: Vec<_> = VARIABLES.iter().map(|v| v.name).collect();
        assert_eq!(described, known);
    }

    #[test]
    fn every_variable_changes_the_configuration() {
        let other = |name: &str| match name {
            "RELAY_URL" => "ws://localhost:7000",
            "REDIS_URL" => "redis://elsewhere",
            "DATABASE_URL" => "postgres://localhost/x",
            "REDIS_MEMORY_MARK" => "64MiB",
            "TRANSACTION" => "batch",
            "COLLECTIONS" => "*",
            "ON_FUTURE_CURSOR" => "live",
            "AUTO_MIGRATE" | "NOTIFICATIONS" | "LEGACY_STATUS" => "no",
            "DEAD_LETTER_MAX_BYTES" => "1GB",
            "HTTP_ADDR" | "RELAY_IDLE_TIMEOUT" => "off",
            "ADMIN_TOKEN" => "sixteen-and-more-characters",
            "RELAY_CA_FILE" | "REDIS_CA_FILE" | "PGSSLROOTCERT" => {
                concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/ca.pem")
            }
            "LOG_LEVEL" => "warn",
            "LOG_FORMAT" => "JSON",
            "CLAIM_IDLE" | "DRAIN_TIMEOUT" | "TOMBSTONE_RETENTION" | "DB_STATEMENT_TIMEOUT" => "77m",
            "MAX_ATTEMPTS"
            | "REDIS_MAX_STREAM_LEN"
            | "PARALLEL_CONSUMERS"
            | "BATCH_SIZE"
            | "DB_POOL_SIZE" => "777",
            _ => "other",
        };
        let defaults = read(&[]).unwrap().0.describe();
        for variable in VARIABLES {
            let (config, _) = read(&[(variable.name, other(variable.name))]).unwrap();
            assert_ne!(config.describe(), defaults, "{} has no effect", variable.name);
        }
    }

    #[test]
    fn an_empty_or_blank_value_counts_as_unset() {
        let (config, _) =
            read(&[("PARALLEL_CONSUMERS", ""), ("HTTP_ADDR", " \r"), ("RUST_LOG", "")]).unwrap();
        assert_eq!(config.parallel_consumers, 5);
        assert!(config.http_addr.is_some());
        assert_eq!(config.rust_log, None);
    }

    #[test]
    fn each_wrong_value_is_named_shown_and_corrected() {
        for (name, value, message) in [
            ("CLAIM_IDLE", "30", "CLAIM_IDLE: \"30\" has no unit; 30 what? write 30s, or use m, h or d"),
            (
                "DEAD_LETTER_MAX_BYTES",
                "512",
                "DEAD_LETTER_MAX_BYTES: \"512\" has no unit; 512 what? write 512B or 512MiB",
            ),
            ("BATCH_SIZE", "0", "BATCH_SIZE: \"0\" is out of range; write a whole number from 1 to 10000"),
            (
                "MAX_ATTEMPTS",
                "-1",
                "MAX_ATTEMPTS: \"-1\" is not a usable whole number; write one from 1 to 1000",
            ),
            (
                "TRANSACTION",
                "batches",
                "TRANSACTION: \"batches\" is not a known value; write one of event, batch",
            ),
            (
                "LOG_LEVEL",
                "TRACE",
                "LOG_LEVEL: \"TRACE\" is not a known value; write one of DEBUG, INFO, WARNING, ERROR",
            ),
            ("AUTO_MIGRATE", "maybe", "AUTO_MIGRATE: \"maybe\" is neither yes nor no; write true or false"),
        ] {
            assert_eq!(problem(name, value), message);
        }
    }

    #[test]
    fn what_cannot_be_safe_is_refused_with_the_reason() {
        assert!(problem("CLAIM_IDLE", "9s").contains("work that is still running"));
        assert!(problem("DRAIN_TIMEOUT", "0").contains("cut off work in progress"));
        assert!(problem("DRAIN_TIMEOUT", "0s").contains("cut off work in progress"));
        assert!(problem("DB_STATEMENT_TIMEOUT", "0").contains("means no limit"));
        assert!(problem("REDIS_MEMORY_MARK", "81%").contains("more than 80%"));
        assert!(problem("REDIS_CURSOR_KEY", "firehose:events").contains("would replace the stream"));
        assert!(problem("REDIS_CURSOR_KEY", "firehose:events:dead").contains("dead letters"));
        assert!(problem("REDIS_STREAM_KEY", "firehose:cursor:relay").contains("relay's host"));
        assert!(problem("TOMBSTONE_RETENTION", "0d").contains("deleted record"));
        assert!(problem("DRAIN_TIMEOUT", "999999y").contains("ten years"));
    }

    #[test]
    fn a_worker_needs_a_database_and_the_others_do_not() {
        let none: [(&str, &str); 0] = [];
        for role in [Role::All, Role::Worker] {
            let error = from_env(none, role).unwrap_err();
            assert!(error.to_string().starts_with("DATABASE_URL: is not set"), "{error}");
        }
        for role in [Role::Reader, Role::Tool] {
            assert!(from_env(none, role).unwrap().0.database_url.is_none());
        }
    }

    #[test]
    fn a_relay_keeps_its_path_and_is_named_by_host_and_port() {
        let url = |text| RelayUrl::parse(text).ok().unwrap();
        assert_eq!(url("ws://localhost:7000/").expose(), format!("ws://localhost:7000{SUBSCRIBE_PATH}"));
        assert_eq!(url("ws://localhost:7000").relay(), "localhost:7000");
        assert_eq!(url("wss://Relay.Example:443/firehose").expose(), "wss://relay.example/firehose");
        for wrong in
            ["https://bsky.network", "bsky.network", "bsky.network:443", "wss://", "wss://x/?cursor=3"]
        {
            assert!(RelayUrl::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn redis_urls_may_be_of_hosts_and_of_sockets() {
        for right in [
            "redis://localhost",
            "rediss://user:p%40ss@[::1]:6380/3",
            "rediss://cache.example/#insecure",
            "unix:///run/redis.sock?db=1&pass=x",
            "redis+unix:///run/redis.sock",
        ] {
            assert!(RedisUrl::parse(right).is_ok(), "{right}");
        }
        for wrong in [
            "localhost:6379",
            "http://localhost",
            "redis://",
            "redis://h/abc",
            "unix://run/redis.sock",
            "unix://",
        ] {
            assert!(RedisUrl::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn database_urls_are_those_of_libpq() {
        for right in [
            "postgres://localhost/app",
            "postgresql://user:p%40ss@h1:5432,h2:5433/app?sslmode=verify-full",
            "postgresql://user@/app?host=/run/postgresql",
            "postgres://user:a/b?c@[::1]:5432/app",
            "postgres://%2Frun%2Fpostgresql/app",
        ] {
            assert!(DatabaseUrl::parse(right).is_ok(), "{right}");
        }
        for mode in DatabaseUrl::SSL_MODES {
            assert!(DatabaseUrl::parse(&format!("postgres://h/d?sslmode={mode}")).is_ok());
        }
        for wrong in [
            "host=localhost user=app",
            "mysql://localhost/app",
            "postgres:///app",
            "postgres://user:hunter2/app",
            "postgres://user:p@ss@host/app",
            "postgres://h/d?sslmode=verify_full",
            "postgres://h:0/d",
        ] {
            assert!(DatabaseUrl::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_password_is_never_part_of_a_redacted_url() {
        for (url, expected) in [
            ("redis://:hunter2@h:6379/0", "redis://:***@h:6379/0"),
            ("redis://hunter2@h", "redis://***@h"),
            ("postgres://u:hunter2@h/d?sslmode=require", "postgres://u:***@h/d?sslmode=require"),
            ("postgres://u:x@hunter2@h/d", "postgres://u:***@h/d"),
            ("postgres://u:x/hunter2@h/d", "postgres://***"),
            ("postgres://u:x?a=hunter2@h/d", "postgres://***"),
            ("postgres://u@h/d?PASSWORD=hunter2#hunter2", "postgres://u@h/d?PASSWORD=***"),
            ("postgres://h/d?p%61ssword=hunter2&a=b", "postgres://h/d?p%61ssword=***&a=b"),
            ("unix:///run/r.sock?db=1&pass=hunter2", "unix:///run/r.sock?db=1&pass=***"),
            ("postgres://h/d?hunter2", "postgres://h/d?***"),
            ("hunter2", "***"),
        ] {
            assert_eq!(redacted(url), expected);
        }
    }

    #[test]
    fn collections_are_names_wildcards_or_all() {
        let keeps = |list, name| Collections::parse(list).ok().unwrap().keeps(name);
        assert!(keeps("app.bsky.*,com.example.thing", "app.bsky.feed.post"));
        assert!(keeps("app.bsky.*, com.example.thing,", "com.example.thing"));
        assert!(!keeps("app.bsky.*", "app.bskyx.feed.post"));
        assert!(!keeps("app.bsky.feed.post", "app.bsky.feed.postgate"));
        assert!(keeps("*", "anything.at.all"));
        for wrong in
            ["app.bsky.feed.", "post", "app.bsky*", "*.bsky", ".*", "app..bsky.*", "app.bsky.feed.1post", ","]
        {
            assert!(Collections::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("512MiB", 512 << 20), ("1GB", 1_000_000_000), ("4096B", 4096), ("1 kib", 1024)]
        {
            assert_eq!(parse_size(text, 1).ok(), Some(bytes));
        }
        for wrong in ["MiB", "1.5GiB", "-1B", "1M", "0B", "99999999999GiB", "18446744073709551615B"] {
            assert!(parse_size(wrong, 1).is_err(), "{wrong}");
        }
        assert_eq!(format_size(256 << 20), "256MiB");
        assert_eq!(format_size(1_000_001), "1000001B");
    }

    #[test]
    fn a_name_close_to_ours_is_pointed_out_without_its_value() {
        let (_, warnings) = read(&[
            ("PARALEL_CONSUMERS", "hunter2"),
            ("REDIS_URI", "redis://:hunter2@h"),
            ("relay_url", "wss://x"),
            ("REDIS_SSL", "1"),
            ("PATH", "/bin"),
            ("HTTP_PROXY", "x"),
            ("REDIS_HOST", "x"),
        ])
        .unwrap();
        assert_eq!(
            warnings,
            [
                "PARALEL_CONSUMERS is not a variable of standpipe and is ignored: did you mean PARALLEL_CONSUMERS?",
                "REDIS_URI is not a variable of standpipe and is ignored: did you mean REDIS_URL?",
                "relay_url is not a variable of standpipe and is ignored: did you mean RELAY_URL?",
            ]
        );
    }

    #[test]
    fn beside_a_mistake_a_name_close_to_ours_is_pointed_out_too() {
        let error = read(&[("BATCH_SIZE", "many"), ("BATCH_SIZES", "10")]).unwrap_err();
        assert_eq!(error.problems.len(), 1, "{error:?}");
        assert!(
            error.warnings.len() == 1 && error.warnings[0].ends_with("did you mean BATCH_SIZE?"),
            "{error:?}"
        );
    }

    #[test]
    fn edits_counts_a_swap_as_one() {
        for (a, b, distance) in
            [("", "abc", 3), ("abc", "acb", 1), ("abcd", "abxcd", 1), ("kitten", "sitting", 3)]
        {
            assert_eq!(edits(a.as_bytes(), b.as_bytes()), distance, "{a} {b}");
            assert_eq!(edits(b.as_bytes(), a.as_bytes()), distance, "{b} {a}");
        }
    }

    #[test]
    fn what_works_but_is_probably_not_wanted_is_a_warning() {
        let vars = [
            ("DATABASE_URL", "postgres://h/d"),
            ("BATCH_SIZE", "10"),
            ("PARALLEL_CONSUMERS", "21"),
            ("TOMBSTONE_RETENTION", "1h"),
            ("REDIS_MAX_STREAM_LEN", "100"),
            // A container's own name is a good one: it stays the same over restarts.
            ("HOSTNAME", "0123456789ab"),
        ];
        let (_, warnings) = from_env(vars, Role::Worker).unwrap();
        let about = ["BATCH_SIZE", "PARALLEL_CONSUMERS", "REDIS_MAX_STREAM_LEN", "TOMBSTONE_RETENTION"];
        assert_eq!(warnings.len(), about.len(), "{warnings:?}");
        for (warning, name) in warnings.iter().zip(about) {
            assert!(warning.starts_with(name), "{warning}");
        }
        assert!(from_env(vars, Role::Reader).unwrap().1.is_empty());
    }

    #[cfg(unix)]
    #[test]
    fn a_value_that_is_not_utf8_is_a_problem_of_its_variable_only() {
        use std::os::unix::ffi::OsStringExt;
        let broken = || OsString::from_vec(vec![b'x', 0xff]);
        let vars = [("DATABASE_URL", broken()), ("SOMETHING_ELSE", broken())];
        let error = from_env(vars, Role::Worker).unwrap_err();
        assert_eq!(error.problems.len(), 1, "{error}");
        assert!(error.to_string().starts_with("DATABASE_URL: is not valid UTF-8"), "{error}");
    }

    #[test]
    fn a_secret_in_the_wrong_place_is_not_shown() {
        // These two take any text, so a foreign URL is a valid value of theirs.
        for name in
            VARIABLES.iter().map(|v| v.name).filter(|name| !["RUST_LOG", "ADMIN_TOKEN"].contains(name))
        {
            if let Err(error) = read(&[(name, "mongodb://root:hunter2@db")]) {
                assert!(!error.to_string().contains("hunter2"), "{error}");
            } else {
                panic!("{name} accepts a foreign URL");
            }
        }
    }

    #[test]
    fn quotation_marks_of_an_env_file_are_pointed_out() {
        assert_eq!(
            problem("REDIS_URL", "\"redis://h\""),
            "REDIS_URL: has quotation marks around it; remove them"
        );
        assert!(problem("REDIS_STREAM_KEY", "'events'").contains("quotation marks"));
    }
}
