//! The group's consumers and what they left pending.

use std::collections::BTreeSet;

use crate::config::Config;
use crate::doctor::{Findings, rough, some_of};
use crate::report::Report;
use crate::stream::group::Pending;
use crate::stream::{Stream, StreamResult};

/// Consumers whose entries have been idle for long.
pub(super) fn consumers(
    config: &Config,
    report: &Report,
    pending: &[Pending],
    leased: &BTreeSet<&str>,
    findings: &mut Findings,
) {
    const WHAT: &str = "consumers";
    let has_lease = |name: &str| name.rsplit_once('-').is_some_and(|(id, _)| leased.contains(id));
    let left =
        |name: &str| pending.iter().any(|entry| entry.consumer == name && entry.idle > config.claim_idle);
    let dead: Vec<_> = report
        .consumers
        .iter()
        .filter(|consumer| left(&consumer.name) && !has_lease(&consumer.name))
        .collect();
    if dead.is_empty() {
        let at_work = match leased.len() {
            0 => "no standpipe process is running".to_owned(),
            1 => "1 standpipe process is running".to_owned(),
            count => format!("{count} standpipe processes are running"),
        };
        findings.ok(WHAT, format!("{} in the group, none of them dead; {at_work}", report.consumers.len()));
        return;
    }
    let names: Vec<String> = dead
        .iter()
        .map(|consumer| {
            format!(
                "{} ({} pending, idle for {})",
                consumer.name,
                consumer.pending,
                rough(consumer.idle_seconds)
            )
        })
        .collect();
    findings.warning(
        WHAT,
        format!("dead: {}", some_of(&names)),
        format!(
            "start a worker: it takes their entries over after CLAIM_IDLE ({}), or at once under their CONSUMER_ID; \
             never XGROUP DELCONSUMER, which loses them",
            humantime::format_duration(config.claim_idle)
        ),
    );
}

/// Pending entries that are no longer in the stream.
pub(super) async fn dangling(
    pending: &[Pending],
    connection: &mut Stream,
    findings: &mut Findings,
) -> StreamResult<()> {
    const WHAT: &str = "pending entries";
    let gone: Vec<&String> = connection.dangling(pending).await?.into_iter().map(|entry| &entry.id).collect();
    if gone.is_empty() {
        findings.ok(WHAT, "all of them are still in the stream");
    } else {
        findings.warning(
            WHAT,
            format!(
                "{} of {} are no longer in the stream: something else trims it or deletes from it ({})",
                gone.len(),
                pending.len(),
                some_of(&gone)
            ),
            "stop it (the old reader's MAXLEN, for example); a running worker sends the reader back for them",
        );
    }
    Ok(())
}
