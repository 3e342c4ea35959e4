//! The dashboard's data: one snapshot a second, made once for all viewers; the last ten minutes for a new viewer; and the last
//! day, minute by minute, on request.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::time::MissedTickBehavior;

use super::Server;
use super::health::{Facts, Level, health, words};
use crate::event::{Kind, Reason};
use crate::metrics;
use crate::mutex::lock;
use crate::status::{PipelineStatus, ReaderStatus, State, percentile};
use crate::stream::dead_letters as letters;
use crate::time::now_ms;

/// Maximum concurrent viewers: their connections stay open, and other requests need room.
pub const MAX_WATCHERS: usize = 16;
/// Ten minutes.
const HISTORY: usize = 600;
/// A day.
const MINUTES: usize = 1_440;
/// Seconds over which rates are taken: batches make a single second jump.
const RATE_SECONDS: usize = 3;
/// Seconds over which percentiles are taken.
const LATENCY_SECONDS: usize = 10;
/// The number of dead letters is unknown.
const UNKNOWN: u64 = u64::MAX;

/// The columns of a history point.
const COLUMNS: [&str; 10] = [
    "time_ms",
    "events_per_second",
    "frames_per_second",
    "p50_ms",
    "p99_ms",
    "waiting",
    "pending",
    "oldest_seconds",
    "memory_bytes",
    "level",
];

type Point = [Option<f64>; COLUMNS.len()];

/// Columns whose minute is a mean. For the others it is the maximum: the worst must not vanish in a day.
const MEANS: [&str; 3] = ["events_per_second", "frames_per_second", "p50_ms"];

/// The last day, a point a minute: at most 300 kB or so.
#[derive(Debug, Default)]
struct Day {
    minutes: VecDeque<Point>,
    /// The points of the minute that is not over.
    minute: Vec<Point>,
}

impl Day {
    fn add(&mut self, point: Point) {
        let minute = |point: &Point| point[0].map(|ms| (ms / 60_000.0).floor());
        if self.minute.first().is_some_and(|first| minute(first) != minute(&point)) {
            if self.minutes.len() == MINUTES {
                self.minutes.pop_front();
            }
            self.minutes.extend(one(&self.minute));
            self.minute.clear();
        }
        // Should the clock stand still, a minute still has an end.
        if self.minute.len() < 120 {
            self.minute.push(point);
        }
    }

    /// Every minute, the one that is not over as it is so far.
    fn points(&self) -> Vec<Point> {
        self.minutes.iter().copied().chain(one(&self.minute)).collect()
    }
}

/// One point instead of several, at the time of the last.
fn one(points: &[Point]) -> Option<Point> {
    let mut whole = *points.last()?;
    for (place, name) in COLUMNS.iter().enumerate().skip(1) {
        let known = move || points.iter().filter_map(move |point| point[place]);
        let most = known().reduce(f64::max);
        whole[place] = if MEANS.contains(name) {
            most.map(|_| tidy(known().sum::<f64>() / known().count() as f64))
        } else {
            most
        };
    }
    Some(whole)
}

/// The counters at one moment.
struct Sample {
    at: Instant,
    entries: u64,
    frames: u64,
    waiting: Option<u64>,
    /// Whether a pipeline is at work: what grows while none is does not show that they are too slow.
    at_work: bool,
    pipelines: Vec<u64>,
    kinds: Vec<f64>,
    latency: Vec<u64>,
    cpu_seconds: f64,
}

/// The snapshots and who watches them.
pub struct Live {
    /// The latest, as an event of the stream.
    latest: watch::Sender<Bytes>,
    history: Mutex<VecDeque<Point>>,
    day: Mutex<Day>,
    watchers: Arc<Semaphore>,
    dead_letters: AtomicU64,
}

impl Default for Live {
    /// Nothing has been seen yet.
    fn default() -> Self {
        Self {
            latest: watch::Sender::new(Bytes::new()),
            history: Mutex::new(VecDeque::with_capacity(HISTORY)),
            day: Mutex::default(),
            watchers: Arc::new(Semaphore::new(MAX_WATCHERS)),
            dead_letters: AtomicU64::new(UNKNOWN),
        }
    }
}

impl Live {
    /// The history, then a snapshot a second. A slow viewer misses some; one that reads nothing loses the connection.
    pub fn events(&self) -> Response {
        let Ok(place) = Arc::clone(&self.watchers).try_acquire_owned() else {
            let body = format!("{MAX_WATCHERS} pages watch already; try again when one is closed\n");
            return (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "5")], body).into_response();
        };
        let first = {
            let history = lock(&self.history);
            event("history", &json!({ "columns": COLUMNS, "points": &*history }))
        };
        let mut snapshots = self.latest.subscribe();
        // No empty first second: the latest snapshot is sent immediately.
        snapshots.mark_changed();
        let events =
            stream::unfold((Some(first), snapshots, place), async |(first, mut snapshots, place)| {
                let bytes = if let Some(first) = first {
                    first
                } else {
                    snapshots.changed().await.ok()?;
                    snapshots.borrow_and_update().clone()
                };
                Some((Ok::<_, std::convert::Infallible>(bytes), (None, snapshots, place)))
            });
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-store"),
            // For proxies that would collect what comes before they pass it on.
            (header::HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        (headers, Body::from_stream(events)).into_response()
    }

    /// The last day, minute by minute.
    #[must_use]
    pub fn day(&self) -> Value {
        let points = lock(&self.day).points();
        json!({ "columns": COLUMNS, "step_seconds": 60, "points": points })
    }
}

fn event(name: &str, data: &Value) -> Bytes {
    Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
}

/// Looks every second, for as long as it is polled.
pub async fn look(server: &Server) {
    let mut samples: VecDeque<Sample> = VecDeque::new();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let (snapshot, point) = snapshot(server, &mut samples);
        {
            let mut history = lock(&server.live.history);
            if history.len() == HISTORY {
                history.pop_front();
            }
            history.push_back(point);
        }
        lock(&server.live.day).add(point);
        server.live.latest.send_replace(event("snapshot", &snapshot));
    }
}

/// Counts the dead letters every two seconds: another process may retry or purge them.
pub async fn count_dead_letters(server: &Server) {
    loop {
        if let Ok(mut connection) = server.redis.connect().await {
            loop {
                let count = letters::count(&mut connection, &server.keys).await;
                let Ok(count) = count else { break };
                server.live.dead_letters.store(count, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// By how much the backlog shrinks in a second, negative where it grows; 0 where that cannot be told, or nobody is at work.
fn shrinking(samples: &VecDeque<Sample>, now: &Sample) -> f64 {
    let at_work = samples.iter().rev().take(RATE_SECONDS).take_while(|sample| sample.at_work && now.at_work);
    let Some(base) = at_work.last() else { return 0.0 };
    let seconds = now.at.duration_since(base.at).as_secs_f64();
    match (base.waiting, now.waiting) {
        (Some(before), Some(now)) if seconds > 0.0 => tidy((before as f64 - now as f64) / seconds),
        _ => 0.0,
    }
}

fn snapshot(server: &Server, samples: &mut VecDeque<Sample>) -> (Value, Point) {
    let status = &server.status;
    let now = now_ms();
    // Read here and not out of the metrics, where processor time is in whole seconds.
    let used = metrics_process::collector::collect();
    let text = server.metrics.render();
    let figures = Figures::of(&text);
    let pipelines: Vec<PipelineStatus> =
        status.pipelines.iter().map(|pipeline| lock(pipeline).clone()).collect();
    let reader: Option<ReaderStatus> = status.reader.as_ref().map(|reader| lock(reader).clone());
    let look = status.look();
    let waiting = look.as_ref().and_then(|(look, _)| look.waiting());
    let oldest = look.as_ref().and_then(|(look, _)| look.oldest_seconds());

    let sample = Sample {
        at: Instant::now(),
        entries: status.entries.load(Ordering::Relaxed),
        frames: reader.as_ref().map_or(0, |reader| reader.frames),
        waiting,
        at_work: pipelines.iter().any(|pipeline| pipeline.state == State::Running),
        pipelines: pipelines.iter().map(|pipeline| pipeline.entries).collect(),
        kinds: Kind::ALL
            .iter()
            .map(|kind| figures.get(metrics::EVENTS, &[("kind", kind.name()), ("outcome", "applied")]))
            .collect(),
        latency: status.latency.counts(),
        cpu_seconds: used.cpu_seconds_total.unwrap_or_default(),
    };
    // Since the first sample, while there are fewer.
    let before =
        |seconds: usize| samples.len().checked_sub(seconds).map_or(samples.front(), |n| samples.get(n));
    let base = before(RATE_SECONDS).unwrap_or(&sample);
    let seconds = sample.at.duration_since(base.at).as_secs_f64();
    let per_second = |more: f64| if seconds > 0.0 { tidy(more / seconds) } else { 0.0 };
    let rate = per_second((sample.entries - base.entries) as f64);
    let frames = per_second(sample.frames.saturating_sub(base.frames) as f64);
    let shrinking = shrinking(samples, &sample);
    let cpu = per_second((sample.cpu_seconds - base.cpu_seconds) * 100.0);
    let latency = &before(LATENCY_SECONDS).unwrap_or(&sample).latency;
    let share = |share: f64| percentile(latency, &sample.latency, share).map(tidy);
    let (p50, p99) = (share(0.5), share(0.99));

    let said = health(&Facts {
        now_ms: now,
        pipelines: &pipelines,
        reader: reader.as_ref(),
        draining: server.control.is_draining(),
        look_ms: look.as_ref().map(|(_, at)| *at),
        started_ms: status.started_ms,
        last_ack_ms: status.last_ack_ms.load(Ordering::Relaxed),
        waiting,
        oldest_seconds: oldest.unwrap_or(0.0),
        rate,
        frames,
        shrinking,
        p99_ms: p99,
        refill: *lock(&status.refill),
    });

    let per_pipeline: Vec<Value> = pipelines
        .iter()
        .enumerate()
        .map(|(index, pipeline)| {
            let before = base.pipelines.get(index).copied().unwrap_or_default();
            with(
                pipeline,
                &[
                    ("words", json!(words(&pipeline.state))),
                    ("events_per_second", json!(per_second(pipeline.entries.saturating_sub(before) as f64))),
                ],
            )
        })
        .collect();
    let kinds: Vec<Value> = Kind::ALL
        .iter()
        .enumerate()
        .map(|(index, kind)| {
            let stale = figures.get(metrics::EVENTS, &[("kind", kind.name()), ("outcome", "stale")]);
            json!({
                "kind": kind.name(),
                "applied": sample.kinds[index],
                "stale": stale,
                "per_second": per_second(sample.kinds[index] - base.kinds[index]),
            })
        })
        .collect();
    let by_reason = |name: &'static str, reasons: &[&str]| -> Value {
        reasons.iter().map(|reason| (*reason, json!(figures.get(name, &[("reason", reason)])))).collect()
    };
    let dead_letters = match server.live.dead_letters.load(Ordering::Relaxed) {
        UNKNOWN => None,
        count => Some(count),
    };
    let memory = used.resident_memory_bytes.unwrap_or_default() as f64;
    let total = |name: &'static str| figures.get(name, &[]);
    let level = match said.level {
        Level::Well => 0.0,
        Level::Busy => 1.0,
        Level::Paused => 2.0,
        Level::Waiting => 3.0,
        Level::Bad => 4.0,
    };
    let point = [
        Some(now as f64),
        Some(rate),
        reader.as_ref().map(|_| frames),
        p50,
        p99,
        waiting.map(|count| count as f64),
        look.as_ref().map(|(look, _)| look.pending as f64),
        oldest.map(tidy),
        Some(memory),
        Some(level),
    ];
    let snapshot = json!({
        "time_ms": now,
        "version": env!("CARGO_PKG_VERSION"),
        // Where the runbook can be read; empty where that is not known.
        "repository": env!("CARGO_PKG_REPOSITORY"),
        "process": {
            "name": server.name,
            "transaction": status.settings.transaction,
            "batch_size": status.settings.batch_size,
            "uptime_seconds": now.saturating_sub(status.started_ms) / 1000,
            "memory_bytes": memory,
            "cpu_percent": cpu,
            "open_files": used.open_fds,
        },
        "health": said,
        "control": {
            "enabled": server.token.is_some(),
            "reader": status.reader.is_some(),
            "pipelines": !status.pipelines.is_empty(),
            "reader_paused": *server.control.reader().borrow(),
            "pipelines_paused": *server.control.pipelines().borrow(),
            "draining": server.control.is_draining(),
            "log_level": server.control.level().map_or(server.level.as_str(), crate::config::LogLevel::as_str),
        },
        "events": {
            "finished": sample.entries,
            "per_second": rate,
            "p50_ms": p50,
            "p99_ms": p99,
        },
        "stream": look.as_ref().map(|(look, at)| json!({
            "key": server.keys.stream,
            "group": server.keys.group,
            "seen_ms": at,
            "exists": look.exists,
            "group_exists": look.group,
            "length": look.length,
            "waiting": waiting,
            "pending": look.pending,
            "oldest_seconds": oldest.map(tidy),
            "trim_held_by": look.held_by,
        })),
        "pipelines": per_pipeline,
        "reader": reader.as_ref().map(|reader| with(reader, &[
            ("words", json!(words(&reader.state))),
            ("frames_per_second", json!(frames)),
            ("frame_age_seconds", json!(reader.last_frame_ms.map(|at| tidy(now.saturating_sub(at) as f64 / 1000.0)))),
            ("backpressure_seconds", json!(total(metrics::BACKPRESSURE))),
            ("connects", json!(total(metrics::RELAY_CONNECTS))),
        ])),
        "pool": server.pool(),
        "kinds": kinds,
        "retries": by_reason(metrics::RETRIES, &metrics::RETRY_REASONS),
        "dead_letters": {
            "count": dead_letters,
            "by_reason": by_reason(metrics::DEAD_LETTERS, &Reason::ALL.map(Reason::name)),
            "overflow": total(metrics::DEAD_LETTERS_FULL),
        },
        "totals": {
            "claimed": total(metrics::CLAIMED),
            "trimmed": total(metrics::TRIMMED),
            "lost": total(metrics::LOST),
            "group_recreations": total(metrics::GROUP_RECREATED),
            "stream_losses": total(metrics::STREAM_LOST),
            "redis_reconnects": total(metrics::REDIS_RECONNECTS),
            "undecodable_frames": total(metrics::RELAY_BAD_FRAMES),
            "undecodable_records": total(metrics::RELAY_BAD_RECORDS),
        },
        "point": point,
    });
    samples.push_back(sample);
    if samples.len() > LATENCY_SECONDS {
        samples.pop_front();
    }
    (snapshot, point)
}

/// Three digits are enough for a person, and shorter to send.
fn tidy(number: f64) -> f64 {
    let unit = if number.abs() >= 100.0 { 1.0 } else { 100.0 };
    (number * unit).round() / unit
}

/// A value's fields, and more.
fn with(value: &impl serde::Serialize, more: &[(&str, Value)]) -> Value {
    let mut value = serde_json::to_value(value).unwrap_or_default();
    for (name, extra) in more {
        value[name] = extra.clone();
    }
    value
}

/// The figures of `/metrics`: the page shows the same values that alerts see.
struct Figures<'a>(Vec<(&'a str, &'a str, f64)>);

impl<'a> Figures<'a> {
    fn of(text: &'a str) -> Self {
        let figure = |line: &'a str| {
            let (name, value) = line.rsplit_once(' ')?;
            let (name, labels) = name.split_once('{').unwrap_or((name, ""));
            if name.ends_with("_bucket") {
                return None;
            }
            Some((name, labels.trim_end_matches('}'), value.parse().ok()?))
        };
        Self(text.lines().filter(|line| !line.starts_with('#')).filter_map(figure).collect())
    }

    /// The sum of those with these labels; 0 without any.
    fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |have: &str| {
            labels.iter().all(|(label, value)| {
                have.split(',').any(|pair| {
                    pair.split_once('=').is_some_and(|(l, v)| l == *label && v.trim_matches('"') == *value)
                })
            })
        };
        self.0.iter().filter(|(n, have, _)| *n == name && fits(have)).map(|(_, _, value)| value).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(second: u64, rate: f64, p99: Option<f64>) -> Point {
        let mut point: Point = [None; COLUMNS.len()];
        (point[0], point[1], point[4]) = (Some(second as f64 * 1000.0), Some(rate), p99);
        point
    }

    #[test]
    fn a_minute_has_its_mean_and_its_worst() {
        let mut day = Day::default();
        for second in 60..150 {
            let p99 = (second == 70).then_some(900.0);
            day.add(point(second, if second < 90 { 100.0 } else { 300.0 }, p99));
        }
        // The first minute is over, and the second is not.
        assert_eq!(day.points(), [point(119, 200.0, Some(900.0)), point(149, 300.0, None)]);
    }

    #[test]
    fn what_grew_during_a_pause_is_no_falling_behind() {
        let began = Instant::now();
        let sample = |second, waiting, at_work| Sample {
            at: began + Duration::from_secs(second),
            entries: 0,
            frames: 0,
            waiting: Some(waiting),
            at_work,
            pipelines: Vec::new(),
            kinds: Vec::new(),
            latency: Vec::new(),
            cpu_seconds: 0.0,
        };
        let paused = VecDeque::from([sample(0, 100, true), sample(1, 1_000, false), sample(2, 2_000, false)]);
        assert_eq!(shrinking(&paused, &sample(3, 2_500, true)), 0.0);
        let resumed: VecDeque<_> = paused.into_iter().chain([sample(3, 2_500, true)]).collect();
        assert_eq!(shrinking(&resumed, &sample(4, 1_500, true)), 1_000.0);
        assert_eq!(shrinking(&resumed, &sample(4, 2_900, true)), -400.0);
        assert_eq!(shrinking(&resumed, &sample(4, 2_900, false)), 0.0);
    }

    #[test]
    fn a_day_is_bounded() {
        let mut day = Day::default();
        for minute in 0..3_000 {
            day.add(point(minute * 60, minute as f64, None));
        }
        let points = day.points();
        assert_eq!(points.len(), MINUTES + 1);
        assert_eq!(points.last(), Some(&point(2_999 * 60, 2_999.0, None)));
        for _ in 0..1_000 {
            day.add(point(3_000 * 60, 1.0, None));
        }
        assert!(day.minute.len() <= 120);
        assert!(Day::default().points().is_empty());
    }

    #[test]
    fn figures_are_found_by_name_and_labels() {
        let text = "# TYPE a counter\na{kind=\"like\",outcome=\"applied\"} 3\na{kind=\"like\",outcome=\"stale\"} 1\nb 2.5\n\
                    c_bucket{le=\"1\"} 9\n";
        let figures = Figures::of(text);
        assert_eq!(figures.get("a", &[]), 4.0);
        assert_eq!(figures.get("a", &[("outcome", "stale")]), 1.0);
        assert_eq!(figures.get("b", &[]), 2.5);
        assert_eq!(figures.get("c_bucket", &[]), 0.0);
        assert_eq!(figures.get("d", &[]), 0.0);
    }
}
