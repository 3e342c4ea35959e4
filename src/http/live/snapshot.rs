//! The page's data, once a second.

use std::sync::atomic::Ordering;

use metrics_process::collector::{self, Metrics as Used};
use serde_json::{Value, json};

use super::UNKNOWN;
use super::day::{Point, tidy};
use super::sample::{Rates, Sample, Samples};
use crate::config::LogLevel;
use crate::event::Kind;
use crate::health::{Facts, Level, health, words};
use crate::http::Server;
use crate::metrics::{self, totals};
use crate::mutex::lock;
use crate::stream::janitor::Look;

/// This second's data for the page, and its point in the history.
pub fn snapshot(server: &Server, samples: &mut Samples) -> (Value, Point) {
    // Read here and not from the metrics, which hold processor time in whole seconds.
    let used = collector::collect();
    let look = server.status.look();
    let mut facts = Facts::of(&server.status, look.as_ref(), server.control.is_draining());
    let sample = Sample::of(&server.status, &facts, used.cpu_seconds_total.unwrap_or_default());
    let rates = samples.rates(&sample);
    (facts.rate, facts.frames) = (rates.events, rates.frames);
    (facts.shrinking, facts.p99_ms) = (rates.shrinking, rates.p99_ms);
    let health = health(&facts);
    let point = point(&facts, look.as_ref().map(|(look, _)| look), &rates, &used, health.level);
    let snapshot = json!({
        "time_ms": facts.now_ms,
        "version": env!("CARGO_PKG_VERSION"),
        // The repository with the runbook; empty if unknown.
        "repository": env!("CARGO_PKG_REPOSITORY"),
        "process": process(server, &facts, &used, rates.cpu_percent),
        "health": health,
        "control": control(server),
        "events": {
            "finished": sample.entries,
            "per_second": rates.events,
            "p50_ms": rates.p50_ms,
            "p99_ms": rates.p99_ms,
        },
        "stream": look.as_ref().map(|(look, at)| stream(server, look, *at)),
        "pipelines": pipelines(&facts, &rates),
        "reader": reader(&facts),
        "origins": origins(&facts),
        "outputs": outputs(&facts),
        "tasks": tasks(server),
        "pool": server.pool(),
        "kinds": kinds(&sample, &rates),
        "retries": totals::retries().map(|(reason, count)| (reason, json!(count))).collect::<Value>(),
        "dead_letters": dead_letters(server),
        "repositories": *lock(&server.status.repositories),
        "subscribers": server.outlet.as_ref().map(|outlet| outlet.feed().report()),
        "totals": counters(),
        "point": point,
    });
    samples.push(sample);
    (snapshot, point)
}

fn point(facts: &Facts, look: Option<&Look>, rates: &Rates, used: &Used, level: Level) -> Point {
    let level = match level {
        Level::Well => 0.0,
        Level::Busy => 1.0,
        Level::Paused => 2.0,
        Level::Waiting => 3.0,
        Level::Bad => 4.0,
    };
    [
        Some(facts.now_ms as f64),
        Some(rates.events),
        facts.reader.as_ref().map(|_| rates.frames),
        rates.p50_ms,
        rates.p99_ms,
        facts.waiting.map(|count| count as f64),
        look.map(|look| look.pending as f64),
        look.and_then(Look::oldest_seconds).map(tidy),
        Some(memory_bytes(used)),
        Some(level),
    ]
}

fn memory_bytes(used: &Used) -> f64 {
    used.resident_memory_bytes.unwrap_or_default() as f64
}

fn process(server: &Server, facts: &Facts, used: &Used, cpu_percent: f64) -> Value {
    json!({
        "name": server.name,
        "transaction": server.status.settings.transaction,
        "batch_size": server.status.settings.batch_size,
        "uptime_seconds": facts.now_ms.saturating_sub(facts.started_ms) / 1000,
        "memory_bytes": memory_bytes(used),
        "cpu_percent": cpu_percent,
        "open_files": used.open_fds,
    })
}

fn control(server: &Server) -> Value {
    let control = &server.control;
    json!({
        "enabled": server.token.is_some(),
        "reader": server.status.reader.is_some(),
        "pipelines": !server.status.pipelines.is_empty(),
        "reader_paused": *control.reader().borrow(),
        "pipelines_paused": *control.pipelines().borrow(),
        "draining": control.is_draining(),
        "log_level": control.level().map_or(server.level.as_str(), LogLevel::as_str),
    })
}

fn stream(server: &Server, look: &Look, seen_ms: u64) -> Value {
    json!({
        "key": server.redis.keys().stream,
        "group": server.redis.keys().group,
        "seen_ms": seen_ms,
        "exists": look.exists,
        "group_exists": look.group,
        "length": look.length,
        "acknowledged": look.acknowledged,
        "waiting": look.waiting(),
        "pending": look.pending,
        "oldest_seconds": look.oldest_seconds().map(tidy),
        "trim_held_by": look.held_by,
    })
}

fn pipelines(facts: &Facts, rates: &Rates) -> Value {
    let pipelines = facts.pipelines.iter().zip(&rates.pipelines);
    pipelines
        .map(|(pipeline, rate)| {
            let more = [("words", json!(words(&pipeline.state))), ("events_per_second", json!(rate))];
            with(pipeline, &more)
        })
        .collect()
}

fn reader(facts: &Facts) -> Option<Value> {
    let reader = facts.reader.as_ref()?;
    let age = reader.last_frame_ms.map(|at| tidy(facts.now_ms.saturating_sub(at) as f64 / 1000.0));
    Some(with(
        reader,
        &[
            ("words", json!(words(&reader.state))),
            ("frames_per_second", json!(facts.frames)),
            ("frame_age_seconds", json!(age)),
            ("backpressure_seconds", json!(totals::backpressure_seconds())),
            ("connects", json!(totals::total(metrics::RELAY_CONNECTS))),
        ],
    ))
}

fn origins(facts: &Facts) -> Value {
    facts.origins.iter().map(|origin| with(origin, &[("words", json!(words(&origin.state)))])).collect()
}

fn outputs(facts: &Facts) -> Value {
    facts.outputs.iter().map(|output| with(output, &[("words", json!(words(&output.state)))])).collect()
}

/// The tasks of this process and their pipelines; nothing if it has none.
fn tasks(server: &Server) -> Option<Value> {
    let handlers = lock(&server.status.handlers);
    if handlers.is_empty() {
        return None;
    }
    let seen = (*lock(&server.status.tasks_seen)).unwrap_or_default();
    Some(json!({
        "waiting": seen.waiting,
        "begun": seen.begun,
        "pipelines": handlers.len(),
        "busy": handlers.values().filter(|handler| handler.task.is_some()).count(),
        "done": handlers.values().map(|handler| handler.done).sum::<u64>(),
        "failed": handlers.values().map(|handler| handler.failed).sum::<u64>(),
    }))
}

fn kinds(sample: &Sample, rates: &Rates) -> Value {
    let counts = Kind::ALL.iter().zip(&sample.kinds).zip(&rates.kinds);
    counts
        .map(|((kind, (applied, stale)), rate)| {
            json!({ "kind": kind.name(), "applied": applied, "stale": stale, "per_second": rate })
        })
        .collect()
}

fn dead_letters(server: &Server) -> Value {
    let count = match server.live.dead_letters.load(Ordering::Relaxed) {
        UNKNOWN => None,
        count => Some(count),
    };
    json!({
        "count": count,
        "by_reason": totals::dead_letters().map(|(reason, count)| (reason, json!(count))).collect::<Value>(),
        "overflow": totals::total(metrics::DEAD_LETTERS_FULL),
    })
}

fn counters() -> Value {
    json!({
        "claimed": totals::total(metrics::CLAIMED),
        "trimmed": totals::total(metrics::TRIMMED),
        "lost": totals::total(metrics::LOST),
        "group_recreations": totals::total(metrics::GROUP_RECREATED),
        "stream_losses": totals::total(metrics::STREAM_LOST),
        "redis_reconnects": totals::total(metrics::REDIS_RECONNECTS),
        "undecodable_frames": totals::total(metrics::RELAY_BAD_FRAMES),
        "undecodable_records": totals::total(metrics::RELAY_BAD_RECORDS),
    })
}

/// Adds fields to a value's own.
fn with(value: &impl serde::Serialize, more: &[(&str, Value)]) -> Value {
    let mut value = serde_json::to_value(value).unwrap_or_default();
    for (name, extra) in more {
        value[name] = extra.clone();
    }
    value
}
