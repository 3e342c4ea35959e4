//! The destination, format and level of the log.

use std::io::IsTerminal as _;

use anyhow::{Context as _, Result};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{Config, LogFormat, LogLevel, no_colour};
use crate::control::SetLevel;

/// Starts logging to standard error; returns the handle that changes the level. Once per process.
///
/// # Errors
///
/// `RUST_LOG` is not a filter.
pub fn install(config: &Config) -> Result<SetLevel> {
    // Below warnings, only our own messages matter. The parts that use them report broken
    // connections better than the pool and Kafka's client do.
    let at = |level: LogLevel| {
        EnvFilter::new(format!("warn,deadpool.postgres=error,krafka=error,standpipe={}", level.as_filter()))
    };
    let filter = match &config.rust_log {
        Some(filter) => filter.parse::<EnvFilter>().context("RUST_LOG")?,
        None => at(config.log_level),
    };
    let (filter, reload) = tracing_subscriber::reload::Layer::new(filter);
    let layer = tracing_subscriber::fmt::layer().with_target(false).with_writer(std::io::stderr);
    // Writes that fail are ignored: reporting them on the same closed output would panic.
    let layer = layer.log_internal_errors(false);
    match config.log_format {
        LogFormat::Json => {
            tracing_subscriber::registry().with(filter).with(layer.json().flatten_event(true)).init();
        }
        LogFormat::Text => {
            let layer = layer.with_ansi(std::io::stderr().is_terminal() && !no_colour());
            tracing_subscriber::registry().with(filter).with(layer).init();
        }
    }
    Ok(Box::new(move |level| reload.reload(at(level)).map_err(|error| error.to_string())))
}
