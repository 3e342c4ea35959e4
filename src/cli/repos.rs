//! `standpipe repos`: repositories that are repaired, or were.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::Subcommand;
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use standpipe::config::Config;
use standpipe::event::{is_did, tid_text};
use standpipe::out;
use standpipe::repair::{Repairer, Verdict};
use standpipe::report::table::{self, age, columns, grouped};
use standpipe::store::backfills::Progress;
use standpipe::store::repos::{self, Comparison, Repo};
use standpipe::store::{Session, Store, StoreError};
use standpipe::stream::Redis;
use standpipe::time::now_ms;

use super::{EX_USAGE, unavailable};

/// The states that a repository can be in.
const STATES: [&str; 4] = ["queued", "synced", "gone", "error"];

/// What to do with them.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// List them, those that changed last first: state, reason, and what was found
    List {
        /// Only those in this state
        #[arg(long, value_parser = PossibleValuesParser::new(STATES))]
        state: Option<String>,
        /// Maximum number to list
        #[arg(long, default_value_t = 100)]
        limit: u32,
        /// One JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Show how complete accounts are: unseen, proven (every commit since the first one seen), whole (compared), or to be compared
    Show {
        /// The accounts
        #[arg(required = true, value_name = "DID")]
        dids: Vec<String>,
        /// One JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Compare repositories with the tables now, and change nothing; exits with 1 if anything differs
    Verify {
        /// The accounts
        #[arg(required = true, value_name = "DID")]
        dids: Vec<String>,
        /// One JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Queue repositories: compare each with the tables, and repair what differs
    Add {
        /// The accounts
        #[arg(required = true, value_name = "DID")]
        dids: Vec<String>,
    },
    /// Queue again the repositories in state error
    Retry,
}

/// Runs `standpipe repos`.
pub async fn run(config: &Config, action: Action) -> Result<ExitCode> {
    let store = Store::new(config)?;
    let session = match store.session().await {
        Ok(session) => session,
        Err(error) => return Ok(unavailable("PostgreSQL", &error)),
    };
    match act(config, &store, &session, action).await {
        Err(error) if error.downcast_ref::<StoreError>().is_some_and(StoreError::is_missing_table) => {
            anyhow::bail!("the database has no queue of repositories yet: run standpipe migrate")
        }
        done => done,
    }
}

async fn act(config: &Config, store: &Store, session: &Session, action: Action) -> Result<ExitCode> {
    let client = session.client();
    let named = match &action {
        Action::Show { dids, .. } | Action::Verify { dids, .. } | Action::Add { dids } => dids.as_slice(),
        Action::List { .. } | Action::Retry => &[],
    };
    if let Some(bad) = named.iter().find(|did| !is_did(did)) {
        out::note(format_args!("standpipe: {bad} is not a DID, such as did:plc:ewvi7nxzyoun6zhxrhs64oiz"));
        return Ok(ExitCode::from(EX_USAGE));
    }
    match action {
        Action::List { state, limit, json } => {
            let found = repos::list(client, state.as_deref().unwrap_or_default(), limit.into()).await?;
            if json {
                for repo in &found {
                    let text = serde_json::to_string(repo)?;
                    out::line(out::safe_json(&text))?;
                }
                return Ok(ExitCode::SUCCESS);
            }
            let counts = repos::counts(client).await?;
            for backfill in session.backfills().await? {
                let Progress { what, listed, is_listed, left, .. } = &backfill;
                out::line(table::backfill(what, *listed, *is_listed, *left, backfill.per_minute()))?;
            }
            out::raw(&page(&found, &counts))?;
        }
        Action::Show { dids, json } => return show(config, session, &dids, json).await,
        Action::Verify { dids, json } => return verify(config, store, session, &dids, json).await,
        Action::Add { dids } => {
            for did in &dids {
                repos::queue(client, did, 1, "asked for", "").await?;
            }
            out::line(format_args!("{} queued; standpipe repos list shows what comes of it", dids.len()))?;
        }
        Action::Retry => {
            let given_up = repos::list(client, "error", i64::MAX).await?;
            for repo in &given_up {
                repos::queue(client, &repo.did, 0, &repo.reason, "").await?;
            }
            out::line(format_args!("{} queued", given_up.len()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Paths that are shown of each account.
const PATHS: usize = 20;

async fn verify(
    config: &Config,
    store: &Store,
    session: &Session,
    dids: &[String],
    json: bool,
) -> Result<ExitCode> {
    let repairer = Repairer::new(Arc::new(config.clone()), Redis::open(config)?, store.clone())?;
    let mut all_equal = true;
    for did in dids {
        let found = repairer.verify(session, did).await?;
        all_equal &= found.as_ref().is_ok_and(Verdict::is_equal);
        if json {
            let line = match &found {
                Ok(verdict) => {
                    serde_json::json!({ "did": did, "equal": verdict.is_equal(), "compared": verdict })
                }
                Err(reason) => serde_json::json!({ "did": did, "equal": null, "reason": reason }),
            };
            out::line(out::safe_json(&line.to_string()))?;
            continue;
        }
        match found {
            Ok(verdict) if verdict.is_equal() => {
                let Verdict { rev, records, not_comparable, .. } = &verdict;
                let but = match not_comparable {
                    0 => String::new(),
                    count => format!("; {} of them are there and cannot be compared", grouped(*count as u64)),
                };
                out::line(format_args!(
                    "{did}: equal, {} records at revision {rev}{but}",
                    grouped(*records as u64)
                ))?;
            }
            Ok(Verdict { rev, missing, surplus, .. }) => {
                out::line(format_args!(
                    "{did}: {} records of revision {rev} are missing or different, {} rows have no record",
                    grouped(missing.len() as u64),
                    grouped(surplus.len() as u64)
                ))?;
                let marked =
                    missing.iter().map(|path| ('-', path)).chain(surplus.iter().map(|path| ('+', path)));
                for (mark, path) in marked.take(PATHS) {
                    out::line(format_args!("  {mark} {}", out::safe(path, out::LINE)))?;
                }
            }
            Err(reason) => {
                out::line(format_args!("{did}: cannot be compared: {}", out::safe(&reason, out::LINE)))?;
            }
        }
    }
    if !all_equal && !json {
        out::note(
            "What was written in the last seconds may be on its way: compare again, or repair with standpipe repos add",
        );
    }
    Ok(if all_equal { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// An account, and how much of it is known to be there.
#[derive(Serialize)]
struct Shown {
    did: String,
    state: &'static str,
    /// Its newest verified commit in the stream.
    newest: Option<String>,
    #[serde(flatten)]
    comparison: Comparison,
}

async fn show(config: &Config, session: &Session, dids: &[String], json: bool) -> Result<ExitCode> {
    let mut stream = match Redis::open(config)?.connect().await {
        Ok(stream) => stream,
        Err(error) => return Ok(unavailable("Redis", &error)),
    };
    let all: Vec<&str> = dids.iter().map(String::as_str).collect();
    let known = stream.known(&all).await?;
    let mut shown = Vec::new();
    for did in dids {
        let comparison = repos::comparison(session.client(), did).await?;
        let head = known.get(did.as_str()).and_then(|known| known.head);
        let state = match (&comparison.compared, head) {
            _ if comparison.queue.as_deref() == Some("queued") => "to be compared",
            (Some(_), _) => "whole",
            (None, Some(_)) => "proven",
            (None, None) => "unseen",
        };
        shown.push(Shown {
            did: did.clone(),
            state,
            newest: head.map(|head| tid_text(head.rev)),
            comparison,
        });
    }
    if json {
        for one in &shown {
            out::line(out::safe_json(&serde_json::to_string(one)?))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let text =
        |text: &Option<String>| text.as_deref().map_or("-".to_owned(), |text| out::safe(text, out::LINE));
    let rows = shown.iter().map(|Shown { did, state, newest, comparison }| {
        let Comparison { compared, queue, reason, message } = comparison;
        let note: Vec<&str> =
            [queue, reason, message].into_iter().filter_map(|part| part.as_deref()).collect();
        [
            out::safe(did, out::LINE),
            (*state).to_owned(),
            text(compared),
            text(newest),
            out::safe(&note.join(": "), out::LINE),
        ]
    });
    out::raw(&columns(["ACCOUNT", "STATE", "COMPARED AT", "NEWEST COMMIT", "NOTE"], rows))?;
    Ok(ExitCode::SUCCESS)
}

fn page(found: &[Repo], counts: &[(String, i64)]) -> String {
    let now = i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX);
    let number = |number: Option<i64>| number.map_or_else(|| "-".to_owned(), |n| grouped(n.unsigned_abs()));
    let seconds = |from: i64, to: i64| age((to - from).max(0) as f64);
    let rows = found.iter().map(|repo| {
        let next = match repo.state.as_str() {
            "queued" if repo.retry_at > now => format!("next try in {}", seconds(now, repo.retry_at)),
            _ => String::new(),
        };
        let message = repo.message.as_deref().map(|text| out::safe(text, out::LINE)).unwrap_or_default();
        [
            out::safe(&repo.did, out::LINE),
            repo.state.clone(),
            out::safe(&repo.reason, out::LINE),
            seconds(repo.updated_at, now),
            number(repo.records),
            number(repo.healed),
            number(repo.deleted),
            [next, message].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; "),
        ]
    });
    let total: Vec<String> =
        counts.iter().map(|(state, count)| format!("{} {state}", grouped(count.unsigned_abs()))).collect();
    let total =
        if total.is_empty() { "no repository was ever to be repaired".to_owned() } else { total.join(", ") };
    let heads = ["ACCOUNT", "STATE", "REASON", "SINCE", "RECORDS", "HEALED", "DELETED", "NOTE"];
    let table = if found.is_empty() { String::new() } else { columns(heads, rows) };
    format!("{total}\n{table}")
}
