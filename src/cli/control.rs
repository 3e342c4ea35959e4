//! `standpipe control` and `standpipe healthcheck`: requests to the running process.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Subcommand;
use standpipe::config::Config;
use standpipe::{http, out};

use super::{EX_USAGE, unavailable};

/// What the running process is to do.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Finish the work in hand, then read nothing more until resumed or restarted
    Pause {
        /// What to pause
        #[arg(value_parser = ["reader", "pipelines", "all"], default_value = "all")]
        part: String,
    },
    /// Resume
    Resume {
        /// What to resume
        #[arg(value_parser = ["reader", "pipelines", "all"], default_value = "all")]
        part: String,
    },
    /// Set the log level until the next start
    LogLevel {
        /// The level
        #[arg(value_parser = ["DEBUG", "INFO", "WARNING", "ERROR"], ignore_case = true)]
        level: String,
    },
    /// Finish the work in hand and exit, as on SIGTERM
    Drain,
}

/// Exits with 0 if the running process is ready, or only paused by an operator.
///
/// # Errors
///
/// It does not answer.
pub async fn healthcheck(config: Config) -> Result<ExitCode> {
    let Some(address) = config.http_addr else {
        // There is nothing to ask: that this program runs at all has to do.
        return Ok(ExitCode::SUCCESS);
    };
    let (code, body) = http::client::get(address, "/readyz", Duration::from_secs(5)).await?;
    // The exit code is the answer, so a closed output does not matter.
    let _ = out::line(out::safe_json(&body));
    // An orchestrator restarts unhealthy containers; a deliberate pause must not look unhealthy.
    let paused = || {
        let answer: Option<serde_json::Value> = serde_json::from_str(&body).ok();
        answer.is_some_and(|answer| answer["only_paused"] == true)
    };
    Ok(if code == 200 || paused() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sends the operator's command to the running process.
///
/// # Errors
///
/// The output cannot be written.
pub async fn control(config: Config, action: &Action) -> Result<ExitCode> {
    let Some(address) = config.http_addr else {
        out::note("standpipe: HTTP_ADDR is off: the process has no address to connect to");
        return Ok(ExitCode::from(EX_USAGE));
    };
    let Some(token) = &config.admin_token else {
        out::note("standpipe: ADMIN_TOKEN is not set: use the running process's value");
        return Ok(ExitCode::from(EX_USAGE));
    };
    let path = match action {
        Action::Pause { part } => format!("/control/pause?part={part}"),
        Action::Resume { part } => format!("/control/resume?part={part}"),
        Action::LogLevel { level } => format!("/control/log-level?level={level}"),
        Action::Drain => "/control/drain".to_owned(),
    };
    let (code, body) = match http::client::post(address, &path, token, Duration::from_secs(10)).await {
        Ok(answer) => answer,
        Err(error) => return Ok(unavailable("the running process", &format!("{error:#}"))),
    };
    let answer: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
    if code >= 300 {
        out::note(format_args!(
            "standpipe: refused ({code}): {}",
            answer["error"].as_str().unwrap_or(body.trim())
        ));
        return Ok(ExitCode::FAILURE);
    }
    out::line(answer["done"].as_str().unwrap_or(body.trim()))?;
    Ok(ExitCode::SUCCESS)
}
