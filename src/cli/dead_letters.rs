//! `standpipe dead-letters`: events that could not be applied.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use clap::builder::PossibleValuesParser;
use standpipe::config::Config;
use standpipe::dead_letters::{self, Filter, Retries, Walk};
use standpipe::event::Reason;
use standpipe::out;
use standpipe::store::Store;
use standpipe::store::handlers::Handlers;
use standpipe::stream::Redis;

use super::{EX_USAGE, unavailable};

/// What to do with them.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// List dead letters, oldest first
    List {
        #[command(flatten)]
        which: Which,
        /// Maximum number to list
        #[arg(long, default_value_t = 100)]
        limit: usize,
        /// One JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Show one: its error, its origin and its operation, with long lines cut
    Show {
        /// Its id
        id: String,
        /// Print all of it, as JSON
        #[arg(long)]
        json: bool,
    },
    /// Apply them again; those that succeed are removed
    Retry {
        #[command(flatten)]
        which: Which,
        /// All that match; required when no ids are given
        #[arg(long)]
        all: bool,
    },
    /// Delete them
    Purge {
        #[command(flatten)]
        which: Which,
        /// All that match; required when no ids are given
        #[arg(long)]
        all: bool,
    },
}

/// Which of them; everything that is given must fit.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// Their ids
    ids: Vec<String>,
    /// The reason class
    #[arg(long, value_parser = PossibleValuesParser::new(Reason::ALL.map(Reason::name)))]
    reason: Option<String>,
    /// A type (commit, identity, account) or a collection such as app.bsky.feed.like
    #[arg(long)]
    kind: Option<String>,
    /// With this text in the message, the record, the repository or an id; case does not matter
    #[arg(long)]
    text: Option<String>,
    /// Only those last tried no longer ago than this, such as 1h or 2d
    #[arg(long, value_parser = humantime::parse_duration)]
    since: Option<Duration>,
}

impl From<Which> for Filter {
    fn from(which: Which) -> Self {
        let Which { ids, reason, kind, text, since } = which;
        Self { ids, reason, kind, text, since }
    }
}

/// Lists, shows, retries or purges dead letters.
///
/// # Errors
///
/// Redis or PostgreSQL fails midway, or the output cannot be written.
pub async fn dead_letters(config: Config, action: Action) -> Result<ExitCode> {
    let redis = Redis::open(&config).context("REDIS_URL")?;
    let mut stream = match redis.connect().await {
        Ok(stream) => stream,
        Err(error) => return Ok(unavailable("Redis", &error)),
    };
    match action {
        Action::List { which, limit, json } => {
            list(Walk::new(stream, which.into()).await?, limit, json).await
        }
        Action::Show { id, json } => {
            let Some(letter) = stream.dead_letter(&id).await? else {
                out::note(format_args!("standpipe: there is no dead letter {id}"));
                return Ok(ExitCode::FAILURE);
            };
            if json {
                out::line(out::safe_json(&serde_json::to_string_pretty(&letter)?))?;
            } else {
                out::line(dead_letters::page(&letter))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Action::Retry { which, all } | Action::Purge { which, all } if which.ids.is_empty() && !all => {
            out::note(
                "standpipe: give ids, or --all (with --reason, --kind, --text or --since for some of them)",
            );
            Ok(ExitCode::from(EX_USAGE))
        }
        Action::Retry { which, .. } => {
            let (store, handlers) = (Store::new(&config)?, Handlers::new(&config)?);
            let mut counts = Retries::default();
            let mut walk = Walk::new(stream, which.into()).await?;
            walk.retry_all((&store, handlers.as_ref()), &mut counts, |id, why| {
                let why = out::safe(why, out::LINE);
                out::line(format_args!("{id}  still cannot be applied: {why}"))
            })
            .await?;
            out::line(format_args!("{} applied, {} kept", counts.applied, counts.kept))?;
            Ok(if counts.kept == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Action::Purge { which, .. } => {
            let mut removed = 0;
            Walk::new(stream, which.into()).await?.purge_all(&mut removed).await?;
            out::line(format_args!("purged {removed}"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn list(mut walk: Walk, limit: usize, json: bool) -> Result<ExitCode> {
    let mut listed = 0;
    while listed < limit
        && let Some(letter) = walk.next().await?
    {
        listed += 1;
        if json {
            out::line(out::safe_json(&serde_json::to_string(&letter)?))?;
        } else {
            out::line(dead_letters::line(&letter))?;
        }
    }
    if listed == 0 && !json {
        out::line("no dead letters")?;
    }
    Ok(ExitCode::SUCCESS)
}
