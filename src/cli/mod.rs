//! The subcommands.

mod audit;
mod check;
mod control;
mod dead_letters;
mod emit;
mod generate;
mod migrate;
mod repos;
mod status;
mod tasks;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use standpipe::config::{self, Config, ConfigError, Role, VARIABLES};
use standpipe::control::Control;
use standpipe::run::{self, Parts};
use standpipe::{logging, metrics, out};
use tracing::{debug, warn};

/// Bad command line or configuration (sysexits.h).
pub const EX_USAGE: u8 = 64;
/// A required service cannot be reached (sysexits.h).
pub const EX_UNAVAILABLE: u8 = 69;

/// Reads the AT Protocol firehose into a Redis stream and applies it to PostgreSQL with N consumer-group pipelines: nothing lost,
/// nothing counted twice.
///
/// Settings come from the environment; `standpipe help-env` lists them.
#[derive(Debug, Parser)]
#[command(version = env!("STANDPIPE_VERSION"), about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the reader and the pipelines in one process
    Run,
    /// Run only the reader: relay -> Redis stream
    Reader,
    /// Run only the pipelines: Redis stream -> PostgreSQL
    Worker,
    /// Create or upgrade the tables while others work with them (also done at start unless `AUTO_MIGRATE=false`)
    Migrate(migrate::Options),
    /// Check configuration, Redis, PostgreSQL, permissions and settings; report problems and remedies
    Check {
        /// Print JSON, on one line
        #[arg(long)]
        json: bool,
    },
    /// Show the state of the stream, group and pipelines, waiting and pending entries, and dead letters
    Status(status::Options),
    /// Inspect, retry or purge events that could not be applied
    DeadLetters {
        #[command(subcommand)]
        action: dead_letters::Action,
    },
    /// List, show, verify, add or retry repositories, which are compared with their accounts' servers and repaired
    Repos {
        #[command(subcommand)]
        action: repos::Action,
    },
    /// List messages for functions (`HANDLERS`): waiting, running, done or failed, and what came of them
    Tasks {
        #[command(subcommand)]
        action: tasks::Action,
    },
    /// Recount every counter and feed item from the rows; exit 0 when all agree
    Audit {
        /// Repair the differences, then check again
        #[arg(long)]
        repair: bool,
    },
    /// Send events from a file to the running process (POST /events); uses `HTTP_ADDR` and `INGEST_TOKEN`
    Emit(emit::Options),
    /// Pause, resume or drain the running process, or change its log level; uses `HTTP_ADDR` and `ADMIN_TOKEN`
    Control {
        #[command(subcommand)]
        action: control::Action,
    },
    /// Exit 0 if the running process is ready, or only paused by an operator
    Healthcheck,
    /// List the environment variables
    HelpEnv,
    /// Print a shell completion script
    Completions {
        /// The shell
        shell: generate::Shell,
    },
    /// Print the manual page, or write one for each command into a folder
    Man {
        /// The folder; created if missing
        #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
        folder: Option<PathBuf>,
    },
}

/// Runs the command.
///
/// # Errors
///
/// The command failed; configuration errors and unreachable services have exit codes of their own.
pub async fn execute(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run => serve(Parts::All, Role::All).await,
        Command::Reader => serve(Parts::Reader, Role::Reader).await,
        Command::Worker => serve(Parts::Worker, Role::Worker).await,
        Command::Migrate(options) => {
            with_config(Role::Worker, async move |config| migrate::migrate(config, &options).await).await
        }
        Command::Check { json } => check::check(json).await,
        Command::Status(options) => {
            with_config(Role::Tool, async move |config| status::status(config, options).await).await
        }
        Command::DeadLetters { action } => {
            with_config(Role::Tool, async move |config| dead_letters::dead_letters(config, action).await)
                .await
        }
        Command::Repos { action } => {
            with_config(Role::Worker, async move |config| repos::run(&config, action).await).await
        }
        Command::Tasks { action } => {
            with_config(Role::Worker, async move |config| tasks::run(&config, action).await).await
        }
        Command::Audit { repair } => {
            with_config(Role::Worker, async move |config| audit::audit(config, repair).await).await
        }
        Command::Emit(options) => {
            with_config(Role::Tool, async move |config| emit::emit(config, options).await).await
        }
        Command::Control { action } => {
            with_config(Role::Tool, async move |config| control::control(config, &action).await).await
        }
        Command::Healthcheck => with_config(Role::Tool, control::healthcheck).await,
        Command::HelpEnv => {
            help_env()?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Completions { shell } => generate::completions(shell),
        Command::Man { folder } => generate::man(folder.as_deref()),
    }
}

/// Reads the environment; reports every problem.
fn load(role: Role) -> Result<(Config, Vec<String>), ExitCode> {
    config::from_env(std::env::vars_os(), role).map_err(|error| unusable(&error))
}

/// Reports the problems with the configuration.
fn unusable(error: &ConfigError) -> ExitCode {
    for line in error.report() {
        out::note(line);
    }
    ExitCode::from(EX_USAGE)
}

async fn with_config(role: Role, work: impl AsyncFnOnce(Config) -> Result<ExitCode>) -> Result<ExitCode> {
    match load(role) {
        Ok((config, warnings)) => {
            for warning in warnings {
                out::note(format_args!("standpipe: {warning}"));
            }
            work(config).await
        }
        Err(code) => Ok(code),
    }
}

async fn serve(parts: Parts, role: Role) -> Result<ExitCode> {
    let (config, warnings) = match load(role) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let set_level = logging::install(&config)?;
    for warning in warnings {
        warn!("{warning}");
    }
    for line in config.describe() {
        debug!("{line}");
    }
    let handle = metrics::install().context("metrics")?;
    run::run(config, parts, handle, Control::new(Some(set_level))).await
}

fn unavailable(what: &str, error: &dyn std::fmt::Display) -> ExitCode {
    out::note(format_args!("standpipe: {what} cannot be reached: {error}"));
    ExitCode::from(EX_UNAVAILABLE)
}

fn help_env() -> Result<()> {
    for variable in VARIABLES {
        let default = if variable.default.is_empty() { "no default" } else { variable.default };
        out::line(format_args!("{} ({default})\n    {}", variable.name, variable.meaning))?;
    }
    Ok(())
}
