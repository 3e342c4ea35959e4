//! The integration tests: the real binary against real servers. `cargo test --test it claims::` runs one module.

// A test that tells one story from top to bottom is clearer in one piece.
#![allow(clippy::too_many_lines)]

mod support;

mod accounts;
mod amqp;
mod backfill;
mod batches;
mod bulk;
mod chaos;
mod check;
mod claims;
mod command_line;
mod configuration;
mod convergence;
mod crash_points;
mod dashboard;
mod dashboard_browser;
mod database;
mod decoders;
mod docs;
mod durability;
mod epochs;
mod events;
mod frozen;
mod handlers;
mod healing;
mod hosts;
mod ingest;
mod jetstream;
#[cfg(feature = "kafka")]
mod kafka;
mod latency;
mod layers;
mod lost;
mod monitoring;
mod notified;
mod origins;
mod output;
mod packaging;
mod poison;
mod private_servers;
mod recorded;
mod recovery;
mod removed_by_others;
mod repairs;
mod side_by_side;
mod sql;
mod status;
mod stream;
mod subscribe;
mod takeover;
mod tls;
mod tombstones;
mod upgrade;
mod upstream;
mod verified;
mod verify;
mod wanted;
