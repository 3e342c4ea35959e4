//! standpipe: the AT Protocol firehose into a Redis stream and, through N consumer-group pipelines, into PostgreSQL,
//! one transaction per event.
//!
//! Imports point up this list; a test reads the `use` lines.
//!
//! - [`mutex`]: locks that outlive a panic
//! - [`stop`]: the end of a loop
//! - [`time`]: the clock, and the pauses between attempts
//! - [`out`]: what commands print
//! - [`crash`]: the points at which tests make the process die
//! - [`event`]: the common language: entries, events, operations, versions; pure
//! - [`apply`]: what each kind of event means; pure
//! - [`config`]: the only place that reads the environment
//! - [`stream`]: the only place that knows Redis
//! - [`status`]: what the parts are doing
//! - [`metrics`]: names and meanings of what Prometheus scrapes
//! - [`control`]: pause, resume, drain
//! - [`logging`]: where log lines go
//! - [`store`]: the only place that knows PostgreSQL
//! - [`origin`]: entries in: the relay, and the reader that appends
//! - [`pipeline`]: the loop: take, apply, settle
//! - [`report`]: the state of stream and process, for people and programs
//! - [`dead_letters`]: inspecting, retrying and purging what could not be applied
//! - [`tasks`]: what else has to be done now and then
//! - [`doctor`]: `standpipe check`
//! - [`health`]: how this process is, judged in one place
//! - [`http`]: health, metrics, status, the dashboard, the operator's commands
//! - [`run`]: starts the parts and drains them in order

// Anything that would end the process or a pipeline needs a reason in place. Tests are exempt.
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo, clippy::dbg_macro)]

pub mod apply;
pub mod config;
pub mod control;
pub mod crash;
pub mod dead_letters;
pub mod doctor;
pub mod event;
pub mod health;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod mutex;
pub mod origin;
pub mod out;
pub mod pipeline;
pub mod report;
pub mod run;
pub mod status;
pub mod stop;
pub mod store;
pub mod stream;
pub mod tasks;
pub mod time;
