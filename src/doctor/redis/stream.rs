//! The state of the stream, what is missing from it, and the dead letters.

use crate::config::Config;
use crate::doctor::{Findings, rough, size};
use crate::report::{Report, StreamReport};
use crate::stream::noted::Refill;
use crate::stream::tasks::Tasks;
use crate::stream::{Stream, StreamResult};

pub(super) fn stream(config: &Config, report: &Report, findings: &mut Findings) {
    const WHAT: &str = "stream";
    let stream = &report.stream;
    if !stream.exists {
        findings.ok(
            WHAT,
            format!("{} does not exist yet: the first process to start creates it and its group", stream.key),
        );
    } else if stream.group_exists {
        let waiting =
            stream.waiting.map_or_else(|| "an unknown number".to_owned(), |count| count.to_string());
        findings.ok(
            WHAT,
            format!(
                "{} holds {} entries; in group {}, {waiting} are waiting and {} pending",
                stream.key, stream.length, stream.group, stream.pending
            ),
        );
        if let Some(oldest) = stream.oldest_waiting_seconds.filter(|oldest| *oldest > 60.0) {
            findings.warning(
                WHAT,
                format!("the oldest unfinished entry arrived {} ago", rough(oldest)),
                "make sure that a worker is running; see docs/operations.md, \"Growing queue\"",
            );
        }
    } else {
        findings.warning(
            WHAT,
            format!(
                "{} holds {} entries, but there is no group {}: nothing is trimmed until it exists",
                stream.key, stream.length, stream.group
            ),
            "a worker creates it and reads from the beginning; if it should exist, correct REDIS_CONSUMER_GROUP",
        );
    }
    if stream.length.saturating_sub(stream.acknowledged) >= config.max_stream_len {
        findings.warning(
            WHAT,
            format!("at its mark of {} entries: the reader waits for room", config.max_stream_len),
            "find out what is holding up the pipelines, or raise REDIS_MAX_STREAM_LEN and Redis's memory with it",
        );
    }
    tasks(config, &report.tasks, findings);
    trim(stream, findings);
    cursor(config, stream, findings);
}

/// The messages for functions.
fn tasks(config: &Config, tasks: &Tasks, findings: &mut Findings) {
    const WHAT: &str = "tasks";
    let Tasks { waiting, begun, oldest_seconds } = tasks;
    let found = format!("{waiting} are waiting, and {begun} begun");
    if config.handlers.is_none() {
        if waiting + begun > 0 {
            let remedy = "set HANDLERS to the schema that contains their functions, on every process";
            findings.warning(WHAT, format!("{found}, but HANDLERS is not set: nobody works on them"), remedy);
        }
    } else if let Some(oldest) = oldest_seconds.filter(|oldest| *oldest > 600.0) {
        findings.warning(
            WHAT,
            format!("{found}; the oldest arrived {} ago", rough(oldest)),
            "make sure that a worker is running; raise HANDLER_PIPELINES, or start more workers",
        );
    } else {
        findings.ok(WHAT, found);
    }
}

/// The group whose progress bounds the trim.
fn trim(stream: &StreamReport, findings: &mut Findings) {
    if stream.group_exists && !stream.trim_held_by.is_empty() && stream.trim_held_by != stream.group {
        findings.warning(
            "trim",
            format!(
                "group {} has acknowledged the least and holds back the trim: the stream grows up to its mark",
                stream.trim_held_by
            ),
            format!(
                "let it catch up; if nothing reads it any longer: redis-cli XGROUP DESTROY {} {}",
                stream.key, stream.trim_held_by
            ),
        );
    } else if stream.group_exists {
        findings.ok("trim", "not held back by another group");
    }
}

/// Where the reader resumes.
fn cursor(config: &Config, stream: &StreamReport, findings: &mut Findings) {
    match (&stream.relay, stream.cursor) {
        (Some(relay), Some(cursor)) if *relay == config.relay_url.relay() => {
            findings.ok("cursor", format!("{cursor} at {relay}"));
        }
        (Some(relay), Some(cursor)) => findings.warning(
            "cursor",
            format!(
                "{cursor} belongs to {relay}, but RELAY_URL names {}: its numbering differs, so this leaves a gap",
                config.relay_url.relay()
            ),
            "keep RELAY_URL if you can; else accept the gap, which is counted",
        ),
        (None, Some(cursor)) => findings.note(
            "cursor",
            format!("{cursor}, written by another program, which does not record the relay"),
            "make sure that RELAY_URL names the relay that it read",
        ),
        (_, None) => findings.note(
            "cursor",
            "none yet: the reader starts from the relay's live position",
            "to take over from another reader, set REDIS_CURSOR_KEY to its key",
        ),
    }
}

/// Gaps, and events that could not be used.
pub(super) fn missing(report: &Report, refill: Option<Refill>, findings: &mut Findings) {
    const WHAT: &str = "missing";
    let missing = &report.missing;
    if let Some(refill) = refill {
        findings.warning(
            WHAT,
            format!(
                "PostgreSQL lost acknowledged events; they are being re-read from {} to {}",
                refill.from, refill.until
            ),
            "keep reader and worker running; the process becomes ready when this is done",
        );
    }
    if let Some(gap) = &missing.last_gap {
        let size = gap.size().map(|size| format!(", up to {size} events")).unwrap_or_default();
        findings.warning(
            WHAT,
            format!("{} gaps, the last at {}{size}: {}", missing.gaps, gap.time, gap.reason),
            "events that the relay no longer has can only be fetched from the accounts' own servers",
        );
    }
    let lost: Vec<String> = missing
        .by_reason
        .iter()
        .filter(|(reason, count)| **count > 0 && *reason != "no_handle")
        .map(|(reason, count)| format!("{count} {}", reason.replace('_', " ")))
        .collect();
    if !lost.is_empty() {
        findings.note(
            WHAT,
            format!("events from the relay that could not be used: {}", lost.join(", ")),
            "records among them are kept as dead letters: standpipe dead-letters list",
        );
    }
    if let Some(count) = missing.by_reason.get("no_handle") {
        findings.note(
            "handles",
            format!("{count} identity events had no handle: current relays send none"),
            "with VERIFY=log or VERIFY=on the reader looks them up; without it, those accounts are shown as handle.invalid",
        );
    }
}

pub(super) async fn dead_letters(
    config: &Config,
    report: &Report,
    connection: &mut Stream,
    findings: &mut Findings,
) -> StreamResult<()> {
    const WHAT: &str = "dead letters";
    let bytes = connection.dead_letter_bytes().await?;
    let budget = config.dead_letter_max_bytes;
    if report.dead_letters == 0 {
        findings.ok(WHAT, "none");
    } else if bytes / 9 >= budget / 10 {
        findings.error(
            WHAT,
            format!(
                "{} of them use {} of their budget of {}: entries that cannot be applied stay pending",
                report.dead_letters,
                size(bytes),
                size(budget)
            ),
            "standpipe dead-letters list, then retry or purge; or raise DEAD_LETTER_MAX_BYTES",
        );
    } else {
        findings.note(
            WHAT,
            format!("{} ({} of {})", report.dead_letters, size(bytes), size(budget)),
            "standpipe dead-letters list shows why; retry after a fix, or purge",
        );
    }
    Ok(())
}
