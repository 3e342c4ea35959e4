//! `standpipe tasks`: messages for the operator's functions.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use clap::builder::PossibleValuesParser;
use standpipe::config::Config;
use standpipe::handlers::list::{Filter, STATES, list};
use standpipe::out;
use standpipe::report::table::{age, columns, grouped};
use standpipe::store::Store;
use standpipe::store::handlers::ResultRow;
use standpipe::stream::Redis;

use super::unavailable;

/// What to do with them.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// List tasks: first those that are waiting, then those running or retrying, then those done or failed; the newest first in
    /// each of these groups
    List {
        /// Only those in this state
        #[arg(long, value_parser = PossibleValuesParser::new(STATES))]
        state: Option<String>,
        /// Only those of this type, which is the name of the function
        #[arg(long = "type", value_name = "NAME")]
        function: Option<String>,
        /// Maximum number to list
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
        limit: u16,
        /// One JSON object per line
        #[arg(long)]
        json: bool,
    },
}

/// Lists tasks.
///
/// # Errors
///
/// Redis or PostgreSQL fails midway, or the output cannot be written.
pub async fn run(config: &Config, action: Action) -> Result<ExitCode> {
    let Action::List { state, function, limit, json } = action;
    let redis = Redis::open(config).context("REDIS_URL")?;
    let stream = match redis.connect().await {
        Ok(stream) => stream,
        Err(error) => return Ok(unavailable("Redis", &error)),
    };
    let store = Store::new(config)?;
    let filter = Filter {
        state: state.unwrap_or_default(),
        function: function.unwrap_or_default(),
        limit: limit.into(),
    };
    let found = list(&stream, &store, &filter).await?;
    if json {
        for task in &found.tasks {
            out::line(out::safe_json(&serde_json::to_string(task)?))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (waiting, begun) = (grouped(found.counts.waiting), grouped(found.counts.begun));
    out::line(format_args!("{waiting} waiting, {begun} begun"))?;
    if !found.tasks.is_empty() {
        let table = columns(["TYPE", "ID", "TIMES", "TOOK", "BY", "STATE"], found.tasks.iter().map(row));
        out::line(table.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(task: &ResultRow) -> [String; 6] {
    let cell = |text: &str| out::safe(text, out::CELL);
    let state = match (task.state.as_str(), &task.error) {
        ("retrying" | "failed", Some(error)) => format!("{}: {}", task.state, cell(error)),
        _ => task.state.clone(),
    };
    [
        cell(&task.function),
        cell(&task.id),
        task.attempts.to_string(),
        age(task.seconds),
        cell(task.by.as_deref().unwrap_or("-")),
        state,
    ]
}
