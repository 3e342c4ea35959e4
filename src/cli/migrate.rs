//! `standpipe migrate`: the tables, forwards and back.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use anyhow::Result;
use standpipe::config::Config;
use standpipe::out;
use standpipe::store::migrate::undo;
use standpipe::store::{Store, migrate};

use super::{EX_USAGE, unavailable};

/// What to do.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Print the steps and their locks; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Restore a database that was taken over, so that the earlier workers can run again
    #[arg(long)]
    undo: bool,
    /// Undo without asking
    #[arg(long, requires = "undo")]
    yes: bool,
}

/// Creates or upgrades the tables, or restores those of the earlier workers.
///
/// # Errors
///
/// PostgreSQL refuses a step.
pub async fn migrate(config: Config, options: &Options) -> Result<ExitCode> {
    let store = Store::new(&config)?;
    let mut session = match store.session().await {
        Ok(session) => session,
        Err(error) => return Ok(unavailable("PostgreSQL", &error)),
    };
    let say = &mut |line: &str| out::note(format_args!("{line}"));
    if options.undo {
        let plan = undo::plan(session.client()).await?;
        if options.dry_run || !options.yes {
            out::line(plan)?;
        }
        if options.dry_run {
            return Ok(ExitCode::SUCCESS);
        }
        if !options.yes {
            match confirm("Undo?") {
                Some(true) => {}
                Some(false) => return Ok(ExitCode::FAILURE),
                None => {
                    out::note("standpipe: nothing was changed: no terminal for the confirmation; add --yes");
                    return Ok(ExitCode::from(EX_USAGE));
                }
            }
        }
        undo::undo(session.client(), say).await?;
        out::line("done: the database is as it was; `standpipe migrate` takes it over again")?;
        return Ok(ExitCode::SUCCESS);
    }
    if options.dry_run {
        out::line(migrate::plan(session.client()).await?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let done = migrate::migrate_and_say(session.client_mut(), say).await?;
    if done.is_empty() {
        out::line(format_args!("nothing to do: the database is at version {}", migrate::wanted()))?;
    }
    for name in done {
        out::line(format_args!("done: {name}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks the person at the terminal; `None` when there is none.
fn confirm(question: &str) -> Option<bool> {
    if !std::io::stdin().is_terminal() {
        return None;
    }
    let _ = write!(std::io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).ok()?;
    Some(matches!(answer.trim(), "y" | "Y" | "yes"))
}
