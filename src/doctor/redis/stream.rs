//! How the stream is, what it lacks, and what could not be applied.

use crate::config::Config;
use crate::doctor::{Findings, rough, size};
use crate::report::{Report, StreamReport};
use crate::stream::noted::Refill;
use crate::stream::{Stream, StreamResult};

pub(super) fn stream(config: &Config, report: &Report, findings: &mut Findings) {
    const WHAT: &str = "stream";
    let stream = &report.stream;
    if !stream.exists {
        findings.ok(WHAT, format!("{} does not exist yet: the start creates it with its group", stream.key));
    } else if stream.group_exists {
        let waiting =
            stream.waiting.map_or_else(|| "an unknown number".to_owned(), |count| count.to_string());
        findings.ok(
            WHAT,
            format!(
                "{} holds {} entries; in group {} {waiting} wait and {} are pending",
                stream.key, stream.length, stream.group, stream.pending
            ),
        );
        if let Some(oldest) = stream.oldest_waiting_seconds.filter(|oldest| *oldest > 60.0) {
            findings.warning(
                WHAT,
                format!("the oldest entry that is not finished came {} ago", rough(oldest)),
                "see that a worker runs; docs/operations.md, \"Growing queue\", says what to look at",
            );
        }
    } else {
        findings.warning(
            WHAT,
            format!(
                "{} holds {} entries and there is no group {}: nothing is trimmed until it exists",
                stream.key, stream.length, stream.group
            ),
            "the start creates it and reads from the beginning; if there should be one, correct REDIS_CONSUMER_GROUP",
        );
    }
    if stream.length >= config.max_stream_len {
        findings.warning(
            WHAT,
            format!("at its mark of {} entries: the reader waits for room", config.max_stream_len),
            "find out what holds the pipelines up, or raise REDIS_MAX_STREAM_LEN and Redis's memory with it",
        );
    }
    trim(stream, findings);
    cursor(config, stream, findings);
}

/// Whose progress bounds the trim.
fn trim(stream: &StreamReport, findings: &mut Findings) {
    if stream.group_exists && !stream.trim_held_by.is_empty() && stream.trim_held_by != stream.group {
        findings.warning(
            "trim",
            format!(
                "group {} has acknowledged the least and holds the trim back: the stream only grows up to its mark",
                stream.trim_held_by
            ),
            format!(
                "let it catch up; if nothing reads it any more: redis-cli XGROUP DESTROY {} {}",
                stream.key, stream.trim_held_by
            ),
        );
    } else if stream.group_exists {
        findings.ok("trim", "held back by no other group");
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
                "{cursor} belongs to {relay}, and RELAY_URL names {}: its numbering differs, and the change is a gap",
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
            "none yet: the reader starts with what the relay sends at that moment",
            "to take over from another reader set REDIS_CURSOR_KEY to its key",
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
                "PostgreSQL had lost acknowledged events; they are read again from {} to {}",
                refill.from, refill.until
            ),
            "let reader and worker run; the process is ready again when it is done",
        );
    }
    if let Some(gap) = &missing.last_gap {
        let size = gap.size().map(|size| format!(", up to {size} events")).unwrap_or_default();
        findings.warning(
            WHAT,
            format!("{} gaps, the last at {}{size}: {}", missing.gaps, gap.time, gap.reason),
            "what the relay no longer sends can only be read from the accounts' own servers",
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
            format!("of the relay's events could not be used: {}", lost.join(", ")),
            "records among them are dead letters: standpipe dead-letters list",
        );
    }
    if let Some(count) = missing.by_reason.get("no_handle") {
        findings.note(
            "handles",
            format!("{count} identities came without a handle: those accounts are shown as handle.invalid"),
            "today's relays send no handles; they would have to be looked up",
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
                "{} of them take {} of their budget of {}: entries that cannot be applied stay pending",
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
            "standpipe dead-letters list shows why; retry after a correction, or purge",
        );
    }
    Ok(())
}
