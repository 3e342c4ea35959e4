//! Turns the environment into a [`Config`], or a list of everything that is wrong with it.
//!
//! This is the only module that reads environment variables. [`VARIABLES`] holds each of them once, with its default
//! and its meaning; the defaults used here, `--help`, `config.example.env` and
//! `docs/configuration.md` all come from it or are tested against it.
//!
//! Two rules shape the code. All problems are reported at once, because an operator who fixes one variable
//! per restart loses an evening. And no message contains a secret: a URL that does not parse is not printed at
//! all, since there is no telling which part of it is the password.
//!
//! - `settings`: one entry per variable
//! - `read`: parses all values, and collects all problems
//! - `rules`: combinations that are refused or cause a warning
//! - `url`, `database_url`, `amqp`, `kafka`, `collections`, `wanted`, `unit`, `words`, `text`: the types of values

mod amqp;
mod collections;
mod database_url;
mod kafka;
mod read;
mod rules;
mod settings;
#[cfg(test)]
mod tests;
mod text;
mod unit;
mod url;
mod wanted;
mod words;

pub use amqp::{AmqpOrigin, AmqpOutput, AmqpServer, RoutingKey};
pub use collections::Collections;
pub use database_url::DatabaseUrl;
pub use kafka::{KafkaCluster, KafkaOrigin, KafkaOutput, Sasl};
pub use read::{ConfigError, Problem, from_env};
pub use settings::{Config, VARIABLES, Variable};
pub use unit::{MemoryMark, StreamKeep};
pub use url::{AccessToken, CaFile, PlcUrl, RedisUrl, RelayUrl};
pub use wanted::WantedDids;
pub use words::{Backfill, LogFormat, LogLevel, OnFutureCursor, TransactionMode, VerifyMode};

/// The role of a process: it decides which variables are required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `run`: the reader and the pipelines.
    All,
    /// `reader`: from the relay into Redis; never touches PostgreSQL.
    Reader,
    /// `worker`: from Redis into PostgreSQL.
    Worker,
    /// `check`, `status` and the other tools: they report themselves what is missing.
    Tool,
}

impl Role {
    fn has_pipelines(self) -> bool {
        matches!(self, Role::All | Role::Worker)
    }
}

impl Config {
    /// One `NAME=value` line per variable with its effective value, in the order of [`VARIABLES`]. Passwords are
    /// redacted.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        self.values().into_iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    /// The consumer name of the pipeline with this number.
    #[must_use]
    pub fn consumer_name(&self, pipeline: usize) -> String {
        format!("{}-{pipeline}", self.consumer_id)
    }

    /// The names of all pipelines.
    #[must_use]
    pub fn consumer_names(&self) -> Vec<String> {
        (0..self.parallel_consumers).map(|pipeline| self.consumer_name(pipeline)).collect()
    }

    /// What stays in the stream after it was applied. Subscribers need some of it: what they have not read yet may be applied
    /// already.
    #[must_use]
    pub fn keeps(&self) -> Option<StreamKeep> {
        self.stream_keep.or(self.subscribe.then_some(StreamKeep::FOR_SUBSCRIBERS))
    }

    /// The stream of dead letters.
    #[must_use]
    pub fn dead_letter_key(&self) -> String {
        format!("{}:dead", self.stream_key)
    }

    /// How many repositories are repaired at a time: each takes a connection to PostgreSQL for as long as that lasts, and
    /// those that the pipelines and the tasks need come first.
    #[must_use]
    pub fn repairers(&self) -> usize {
        (2 * self.repair_concurrency).min(self.db_pool_size.saturating_sub(self.parallel_consumers + 2))
    }

    /// The key with the name of the relay that the cursor belongs to.
    #[must_use]
    pub fn cursor_relay_key(&self) -> String {
        format!("{}:relay", self.cursor_key)
    }
}

/// Whether the user disabled colours in all programs: <https://no-color.org>.
#[must_use]
pub fn no_colour() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}
