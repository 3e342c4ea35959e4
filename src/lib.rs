//! standpipe: the AT Protocol firehose into a Redis stream and, through N consumer-group pipelines, into PostgreSQL,
//! one transaction per event.
//!
//! Each module imports only from those above it in this list; a test reads the `use` lines.
//!
//! - [`mutex`]: locks that survive a panic
//! - [`stop`]: stopping a loop
//! - [`time`]: the clock, and the pauses between attempts
//! - [`out`]: the commands' output
//! - [`crash`]: the points at which tests make the process die
//! - [`event`]: the common vocabulary: entries, events, operations, versions; pure
//! - [`apply`]: interprets each kind of event; pure
//! - [`verify`]: whether a commit is what its account signed; pure
//! - [`config`]: the only place that reads the environment
//! - [`stream`]: the only place that knows Redis
//! - [`status`]: what the parts are doing
//! - [`metrics`]: names and help of the Prometheus metrics
//! - [`control`]: pause, resume, drain
//! - [`logging`]: the log
//! - [`directory`]: the documents of accounts; the only place that asks other people's servers over HTTP
//! - [`amqp`]: the only place that knows RabbitMQ; only with the feature of this name
//! - [`kafka`]: the only place that knows Kafka; only with the feature of this name
//! - [`store`]: the only place that knows PostgreSQL
//! - [`output`]: what has been applied, for others to read
//! - [`origin`]: the relay, and the reader that appends its events to the stream
//! - [`pipeline`]: the loop: take, apply, settle
//! - [`handlers`]: tasks: messages for the operator's functions
//! - [`report`]: the state of stream and process, for people and programs
//! - [`dead_letters`]: inspecting, retrying and purging dead letters
//! - [`repair`]: repairing repositories that differ from what arrived
//! - [`tasks`]: background tasks
//! - [`doctor`]: `standpipe check`
//! - [`health`]: the health of this process, judged in one place
//! - [`http`]: health, metrics, status, the dashboard, the operator's commands
//! - [`run`]: starts the parts and drains them in order

// Anything that could panic needs a stated reason. Tests are exempt.
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo, clippy::dbg_macro)]

#[cfg(feature = "amqp")]
pub mod amqp;
pub mod apply;
pub mod config;
pub mod control;
pub mod crash;
pub mod dead_letters;
pub mod directory;
pub mod doctor;
pub mod event;
pub mod handlers;
pub mod health;
pub mod http;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod logging;
pub mod metrics;
pub mod mutex;
pub mod origin;
pub mod out;
pub mod output;
pub mod pipeline;
pub mod repair;
pub mod report;
pub mod run;
pub mod status;
pub mod stop;
pub mod store;
pub mod stream;
pub mod tasks;
pub mod time;
pub mod verify;
