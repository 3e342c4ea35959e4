//! standpipe: the AT Protocol firehose into a Redis stream and, through N consumer-group pipelines, into PostgreSQL,
//! one transaction per event.
//!
//! Data goes one way, and imports run down this list:
//!
//! 1. [`relay`]: frames in: subscribe, decode
//! 2. [`stream`]: the only place that knows Redis
//! 3. [`pipeline`]: the loop: read, apply, acknowledge
//! 4. [`apply`]: what each kind of event means
//! 5. [`store`]: the only place that knows PostgreSQL
//!
//! [`event`] is the language they share, [`config`] the only place that reads the environment, [`run`] the only place
//! that spawns.

// Anything that would end the process or a pipeline needs a reason in place. Tests are exempt.
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo, clippy::dbg_macro)]

pub mod apply;
pub mod config;
pub mod control;
pub mod crash;
pub mod dead_letters;
pub mod doctor;
pub mod event;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod out;
pub mod pipeline;
pub mod relay;
pub mod report;
pub mod run;
pub mod status;
pub mod stop;
pub mod store;
pub mod stream;
pub mod tasks;
pub mod time;
