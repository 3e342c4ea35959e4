//! `standpipe status` for people: a [`super::Report`] as a page of text.

use std::fmt::Write as _;

use serde_json::Value;

use crate::{metrics, out};

/// Facts from the command line in addition to the report.
#[derive(Clone, Debug, Default)]
pub struct Beside {
    /// Dead letters by reason.
    pub reasons: Vec<(String, u64)>,
    /// The number of newest letters that the reasons cover.
    pub newest: Option<u64>,
    /// PostgreSQL's answer, if no process reported it.
    pub database: Option<String>,
}

/// Gaps, and events from the relay that could not be used; empty if there are none.
fn missing(missing: &Value) -> Option<String> {
    let mut parts = Vec::new();
    let gaps = number(&missing["gaps"]);
    if gaps > 0 {
        let last = &missing["last_gap"];
        let size = match (last["after"].as_i64(), last["until"].as_i64()) {
            (Some(after), Some(until)) if until > after + 1 => {
                format!(", up to {} events", grouped(u64::try_from(until - after - 1).unwrap_or(0)))
            }
            _ => String::new(),
        };
        let (time, reason) =
            (text(&last["time"]).unwrap_or_default(), text(&last["reason"]).unwrap_or_default());
        parts.push(format!("{} gaps, the last at {time}{size}: {reason}", grouped(gaps)));
    }
    if let Some(reasons) = missing["by_reason"].as_object() {
        for (reason, count) in reasons {
            parts.push(format!("{} {}", grouped(number(count)), reason.replace('_', " ")));
        }
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// Messages for functions; nothing if there are none, and nobody works on any.
fn tasks_line(tasks: &Value, process: &Value) -> Option<String> {
    let (waiting, begun) = (number(&tasks["waiting"]), number(&tasks["begun"]));
    let handlers: Vec<&Value> = list(&process["handlers"]).collect();
    if waiting + begun == 0 && handlers.is_empty() {
        return None;
    }
    let oldest = tasks["oldest_seconds"].as_f64();
    let oldest = oldest.map_or_else(String::new, |seconds| format!(", the oldest for {}", age(seconds)));
    let mut line = format!("{} waiting{oldest}, {} begun", grouped(waiting), grouped(begun));
    if !handlers.is_empty() {
        let busy = handlers.iter().filter(|handler| handler["task"].is_object()).count();
        let sum = |name: &str| grouped(handlers.iter().map(|handler| number(&handler[name])).sum());
        let _ = write!(
            line,
            "; {busy} of {} pipelines busy, {} done, {} failed",
            handlers.len(),
            sum("done"),
            sum("failed")
        );
        let stuck = handlers.iter().find(|handler| handler["reason"].is_string());
        if let Some(handler) = stuck {
            let _ = write!(line, "; {}", state(handler));
        }
    }
    Some(line)
}

/// What verification remembers and has left to do; nothing if it never began.
fn verification(backlog: &Value) -> Option<String> {
    let [accounts, unchecked, repairs] =
        ["accounts", "unchecked", "repairs"].map(|name| number(&backlog[name]));
    if accounts == 0 {
        return None;
    }
    Some(format!(
        "{} accounts, {} with a signature to check, {} to repair",
        grouped(accounts),
        grouped(unchecked),
        grouped(repairs)
    ))
}

/// The repositories that were ever queued, and the backfills; nothing if there are none.
fn repositories(counted: &Value) -> Vec<(&'static str, String)> {
    let parts: Vec<String> = [
        ("to_repair", "to repair"),
        ("after_gap", "to compare"),
        ("to_backfill", "to backfill"),
        ("synced", "synced"),
        ("gone", "gone"),
        ("error", "given up"),
    ]
    .into_iter()
    .filter_map(|(name, words)| match number(&counted[name]) {
        0 => None,
        count => Some(format!("{} {words}", grouped(count))),
    })
    .collect();
    let total = (!parts.is_empty()).then(|| ("repositories", parts.join(", ")));
    let backfills = list(&counted["backfills"]).map(|one| {
        let what = out::safe(text(&one["what"]).unwrap_or_default(), out::LINE);
        let (listed, left) = (number(&one["listed"]), number(&one["left"]));
        let is_listed = one["is_listed"] == Value::Bool(true);
        ("", backfill(&what, listed, is_listed, left, one["per_minute"].as_f64().unwrap_or(0.0)))
    });
    total.into_iter().chain(backfills).collect()
}

/// How far a backfill is, and how long it will take at its average rate.
#[must_use]
pub fn backfill(what: &str, listed: u64, is_listed: bool, left: u64, per_minute: f64) -> String {
    if what.starts_with("gap ") {
        let more = if is_listed { "" } else { ", and the relay's list is not at its end" };
        return format!("after {what}: {} accounts queued that may lack something{more}", grouped(listed));
    }
    let mut rest =
        if left == 0 && is_listed { "complete".to_owned() } else { format!("{} to compare", grouped(left)) };
    if left > 0 && per_minute > 0.0 {
        let seconds = left as f64 / per_minute * 60.0;
        rest = format!("{rest}, {per_minute:.0} a minute, about {} left", age(seconds));
    }
    let more = if is_listed { "" } else { " so far" };
    format!("backfill {what}: {} listed{more}; {rest}", grouped(listed))
}

/// The page. `status` is the JSON of `/status`, a serialised [`super::Report`]; absent fields are left out.
#[must_use]
pub fn table(status: &Value, beside: &Beside, now_ms: u64) -> String {
    let mut lines: Vec<(&str, String)> = Vec::new();
    let stream = &status["stream"];
    let process = &status["process"];
    if let Some(error) = text(&status["error"]) {
        lines.push(("trouble", sentence(error)));
    }
    if stream.is_object() {
        lines.extend(stream_lines(stream, process.is_object()));
        lines.push(("dead letters", dead_letters(status, beside)));
        lines.extend(tasks_line(&status["tasks"], process).map(|line| ("tasks", line)));
        lines.extend(missing(&status["missing"]).map(|line| ("missing", line)));
        lines.extend(verification(&status["verification"]).map(|line| ("verification", line)));
    }
    lines.extend(repositories(&process["repositories"]));
    if let Some(reader) = process.get("reader") {
        lines.push(("reader", reader_line(reader, now_ms)));
    }
    lines.extend(sources_and_sinks(process, now_ms));
    lines.extend(process.get("pool").map(|pool| ("PostgreSQL", pool_line(pool))));
    if let Some(database) = &beside.database {
        lines.push(("PostgreSQL", sentence(database)));
    }
    lines.push(("process", process_line(process)));
    if let (Some(transaction), Some(batch), count @ 1..) =
        (text(&process["transaction"]), process["batch_size"].as_u64(), list(&process["pipelines"]).count())
    {
        let of = format!("{} entries at a time, one transaction per {transaction}", grouped(batch));
        lines.push(("pipelines", format!("{count}, {of}")));
    }

    let mut page = format!("standpipe {}\n\n", text(&status["version"]).unwrap_or_default());
    for (name, line) in lines {
        let _ = writeln!(page, "{name:<13} {line}");
    }
    let pipelines: Vec<&Value> = list(&process["pipelines"]).collect();
    if !pipelines.is_empty() {
        let rows = pipelines.iter().map(|pipeline| {
            [
                name(&pipeline["consumer"]),
                grouped(number(&pipeline["in_flight"])),
                grouped(number(&pipeline["entries"])),
                since(&pipeline["last_ack_ms"], now_ms),
                state(pipeline),
            ]
        });
        page.push_str(&columns(["PIPELINE", "IN HAND", "FINISHED", "LAST", "STATE"], rows));
    }
    let own = |consumer: &Value| pipelines.iter().any(|pipeline| pipeline["consumer"] == consumer["name"]);
    let others: Vec<&Value> = list(&status["consumers"]).filter(|consumer| !own(consumer)).collect();
    if !others.is_empty() {
        let rows = others.iter().map(|consumer| {
            [
                name(&consumer["name"]),
                grouped(number(&consumer["pending"])),
                age(consumer["idle_seconds"].as_f64().unwrap_or(0.0)),
            ]
        });
        page.push_str(&columns(["CONSUMER", "PENDING", "IDLE"], rows));
    }
    page
}

fn stream_lines(stream: &Value, running: bool) -> Vec<(&'static str, String)> {
    let key = name(&stream["key"]);
    let group = name(&stream["group"]);
    let mut lines = Vec::new();
    if stream["exists"] == Value::Bool(false) {
        lines.push(("stream", format!("{key} does not exist yet")));
    } else {
        let applied = match number(&stream["acknowledged"]) {
            0 => String::new(),
            applied => format!(", {} of them applied", grouped(applied)),
        };
        lines.push(("stream", format!("{key}: {} entries{applied}", grouped(number(&stream["length"])))));
        let missing =
            if stream["group_exists"] == Value::Bool(false) { ", which does not exist" } else { "" };
        lines.push(("group", format!("{group}{missing}")));
        let waiting = stream["waiting"].as_u64().map_or_else(|| "unknown to Redis".to_owned(), grouped);
        let oldest = stream["oldest_waiting_seconds"].as_f64();
        let oldest = oldest.map_or_else(String::new, |seconds| format!(", the oldest for {}", age(seconds)));
        lines.push(("waiting", format!("{waiting}{oldest}")));
        lines.push(("pending", grouped(number(&stream["pending"]))));
        if let Some(holder) = text(&stream["trim_held_by"])
            && !holder.is_empty()
            && holder != group
        {
            lines.push(("trim", format!("held back by the group {}", plain(holder))));
        }
    }
    let cursor = stream["cursor"].as_i64().map_or_else(
        || if running { "none yet".to_owned() } else { "none".to_owned() },
        |cursor| cursor.to_string(),
    );
    let relay = text(&stream["relay"]).map_or_else(String::new, |relay| format!(" at {}", plain(relay)));
    lines.push(("cursor", format!("{cursor}{relay}")));
    lines
}

fn dead_letters(status: &Value, beside: &Beside) -> String {
    let total = number(&status["dead_letters"]);
    let reasons: Vec<String> = beside
        .reasons
        .iter()
        .map(|(reason, count)| format!("{} {}", grouped(*count), plain(reason)))
        .collect();
    match (reasons.is_empty(), beside.newest) {
        (true, _) => grouped(total),
        (false, None) => format!("{}: {}", grouped(total), reasons.join(", ")),
        (false, Some(newest)) => {
            format!("{}; of the newest {}: {}", grouped(total), grouped(newest), reasons.join(", "))
        }
    }
}

fn reader_line(reader: &Value, now_ms: u64) -> String {
    let connected =
        if reader["connected"] == Value::Bool(true) { "connected to" } else { "not connected to" };
    let gaps = match number(&reader["gaps"]) {
        0 => String::new(),
        gaps => format!(", {} gaps", grouped(gaps)),
    };
    format!(
        "{}, {connected} {}, {} frames, the last {}{gaps}",
        state(reader),
        name(&reader["relay"]),
        grouped(number(&reader["frames"])),
        since(&reader["last_frame_ms"], now_ms)
    )
}

/// The lines about where else events come from, and where they go to.
fn sources_and_sinks(process: &Value, now_ms: u64) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    lines.extend(
        list(&process["origins"]).map(|origin| (broker(&origin["origin"]), origin_line(origin, now_ms))),
    );
    lines.extend(
        list(&process["outputs"]).map(|output| (broker(&output["output"]), output_line(output, now_ms))),
    );
    lines
        .extend(process.get("subscribers").map(|subscribers| ("subscribers", subscribers_line(subscribers))));
    lines
}

fn is_kafka(kind: &Value) -> bool {
    text(kind) == Some(metrics::KAFKA)
}

fn broker(kind: &Value) -> &'static str {
    if is_kafka(kind) { "Kafka" } else { "RabbitMQ" }
}

fn origin_line(origin: &Value, now_ms: u64) -> String {
    let waiting = origin["waiting"]
        .as_u64()
        .map_or_else(String::new, |waiting| format!(", {} in it", grouped(waiting)));
    let wrong = match number(&origin["unusable"]) {
        0 => String::new(),
        wrong => format!(", {} of them unusable", grouped(wrong)),
    };
    format!(
        "{}, {} {}{waiting}, {} messages taken{wrong}, the last {}",
        state(origin),
        if is_kafka(&origin["origin"]) { "topic" } else { "queue" },
        name(&origin["source"]),
        grouped(number(&origin["messages"])),
        since(&origin["last_ms"], now_ms)
    )
}

fn output_line(output: &Value, now_ms: u64) -> String {
    format!(
        "{}, {} {}, {} messages published, the last {}, {} behind",
        state(output),
        if is_kafka(&output["output"]) { "topic" } else { "exchange" },
        name(&output["target"]),
        grouped(number(&output["messages"])),
        since(&output["last_ms"], now_ms),
        age(output["behind_seconds"].as_f64().unwrap_or(0.0))
    )
}

fn pool_line(pool: &Value) -> String {
    let (size, used, max) = (number(&pool["size"]), number(&pool["in_use"]), number(&pool["max"]));
    format!("{used} of {size} connections in use, at most {max}")
}

fn subscribers_line(subscribers: &Value) -> String {
    let behind = subscribers["furthest_behind_seconds"].as_f64().unwrap_or(0.0);
    let last = match number(&subscribers["connected"]) {
        0 => String::new(),
        _ => format!(", the slowest {} behind", age(behind)),
    };
    format!("{} connected{last}", grouped(number(&subscribers["connected"])))
}

fn process_line(process: &Value) -> String {
    if !process.is_object() {
        return "no process answers at HTTP_ADDR; this is what Redis and PostgreSQL report".to_owned();
    }
    format!(
        "up for {}, {} entries finished, {:.0} per second now",
        age(process["uptime_seconds"].as_f64().unwrap_or(0.0)),
        grouped(number(&process["entries"])),
        process["entries_per_second"].as_f64().unwrap_or(0.0)
    )
}

/// The state's word, with the reason if there is one.
fn state(part: &Value) -> String {
    let words = text(&part["state"]).unwrap_or("unknown").replace('_', " ");
    let words =
        words.replace("postgres", "PostgreSQL").replace("redis", "Redis").replace("broker", "the broker");
    match text(&part["reason"]) {
        Some(reason) => format!("{words}: {}", sentence(reason)),
        None => words,
    }
}

/// A table with a heading: first and last column left-aligned, those between right-aligned.
/// Lines up columns under their headings.
#[must_use]
pub fn columns<const N: usize>(heading: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(heading.map(str::to_owned)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut page = "\n".to_owned();
    for row in &rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            if column == 0 || column == N - 1 && N > 3 {
                let _ = write!(line, "{cell:<width$}  ");
            } else {
                let _ = write!(line, "{cell:>width$}  ");
            }
        }
        page.push_str(line.trim_end());
        page.push('\n');
    }
    page
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn text(value: &Value) -> Option<&str> {
    value.as_str()
}

/// A name from elsewhere, made safe for a terminal.
fn name(value: &Value) -> String {
    plain(text(value).unwrap_or_default())
}

fn plain(text: &str) -> String {
    out::safe(text, out::CELL)
}

/// As `plain`, for longer texts.
fn sentence(text: &str) -> String {
    out::safe(text, out::LINE)
}

fn since(ms: &Value, now_ms: u64) -> String {
    match ms.as_u64() {
        Some(ms) => format!("{} ago", age(now_ms.saturating_sub(ms) as f64 / 1000.0)),
        None => "never".to_owned(),
    }
}

/// `0.3 s`, `12 s`, `3 min`, `5 h`, `2 d`.
/// A duration in seconds, for people.
#[must_use]
pub fn age(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

/// `1,234,567`.
/// A number with its digits in groups of three.
#[must_use]
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_page_is_complete_and_aligned() {
        let status = serde_json::json!({
            "version": "1.2.3",
            "stream": {"key": "firehose:events", "group": "g", "exists": true, "group_exists": true, "length": 1_234_567,
                       "acknowledged": 1_000_000, "waiting": null, "pending": 3, "oldest_waiting_seconds": 75.0, "trim_held_by": "other",
                       "cursor": 42, "relay": "bsky.network"},
            "consumers": [{"name": "a-0", "pending": 3, "idle_seconds": 0.5},
                          {"name": "dead\u{1b}-0", "pending": 2, "idle_seconds": 86_400.0}],
            "dead_letters": 3,
            "process": {"uptime_seconds": 7300.0, "entries": 1000, "entries_per_second": 12.3,
                        "transaction": "event", "batch_size": 200,
                        "pipelines": [{"consumer": "a-0", "state": "waiting_for_postgres", "reason": "refused",
                                       "in_flight": 200, "entries": 1000, "last_ack_ms": 9000}],
                        "reader": {"state": "running", "relay": "bsky.network", "connected": true, "frames": 12_345,
                                   "last_frame_ms": 9900, "gaps": 1},
                        "subscribers": {"connected": 3, "furthest_behind_seconds": 12.0},
                        "pool": {"size": 5, "in_use": 2, "max": 20}},
        });
        let beside = Beside { reasons: vec![("undecodable".to_owned(), 3)], ..Beside::default() };
        let expected = "\
standpipe 1.2.3

stream        firehose:events: 1,234,567 entries, 1,000,000 of them applied
group         g
waiting       unknown to Redis, the oldest for 75 s
pending       3
trim          held back by the group other
cursor        42 at bsky.network
dead letters  3: 3 undecodable
reader        running, connected to bsky.network, 12,345 frames, the last 0.1 s ago, 1 gaps
subscribers   3 connected, the slowest 12 s behind
PostgreSQL    2 of 5 connections in use, at most 20
process       up for 2 h, 1,000 entries finished, 12 per second now
pipelines     1, 200 entries at a time, one transaction per event

PIPELINE  IN HAND  FINISHED       LAST  STATE
a-0           200     1,000  1.0 s ago  waiting for PostgreSQL: refused

CONSUMER      PENDING  IDLE
dead\\u{1b}-0        2  24 h
";
        assert_eq!(table(&status, &beside, 10_000), expected);
    }

    #[test]
    fn missing_parts_are_left_out() {
        let page = table(&serde_json::json!({"version": "1", "error": "Redis: down"}), &Beside::default(), 0);
        assert!(page.contains("trouble       Redis: down") && page.contains("no process answers"), "{page}");
        assert!(!page.contains("dead letters") && !page.contains("PIPELINE"), "{page}");
    }
}
