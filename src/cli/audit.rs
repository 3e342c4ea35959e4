//! `standpipe audit`: recounts counters and feed items from the rows.

use std::process::ExitCode;

use anyhow::Result;
use standpipe::config::Config;
use standpipe::out;
use standpipe::store::{Store, audit};

use super::unavailable;

/// Prints every difference; repairs them first if asked to.
///
/// # Errors
///
/// PostgreSQL refuses a query.
pub async fn audit(config: Config, repair: bool) -> Result<ExitCode> {
    let store = Store::new(&config)?;
    let mut session = match store.session().await {
        Ok(session) => session,
        Err(error) => return Ok(unavailable("PostgreSQL", &error)),
    };
    let say = &mut |line: &str| out::note(format_args!("{line}"));
    if repair {
        for repaired in audit::repair_and_say(session.client_mut(), say).await? {
            if repaired.count > 0 {
                out::line(format_args!("{:>12}  repaired: {}", repaired.count, repaired.rule))?;
            }
        }
    }
    let findings = audit::audit_and_say(session.client_mut(), say).await?;
    for finding in &findings {
        out::unless_closed(out::line(finding))?;
    }
    let clean = findings.iter().all(|finding| finding.count == 0);
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
