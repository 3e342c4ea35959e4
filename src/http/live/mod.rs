//! The dashboard's data: one snapshot a second, shared by all viewers; the last ten minutes for a new viewer; and the
//! last day, minute by minute, on request.

mod day;
mod sample;
mod snapshot;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::time::MissedTickBehavior;

use self::day::{COLUMNS, Day, Point};
use self::sample::Samples;
use self::snapshot::snapshot;
use super::Server;
use crate::mutex::lock;

/// Maximum concurrent viewers: their connections stay open, and other requests need room.
pub const MAX_WATCHERS: usize = 16;
/// Ten minutes.
const HISTORY: usize = 600;
/// The number of dead letters is unknown.
const UNKNOWN: u64 = u64::MAX;

/// The snapshots and their viewers.
pub struct Live {
    /// The latest snapshot, as a server-sent event.
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
    /// The history, then a snapshot a second. A slow viewer misses snapshots; one that reads nothing is disconnected.
    pub fn events(&self) -> Response {
        let Ok(place) = Arc::clone(&self.watchers).try_acquire_owned() else {
            let body = format!("{MAX_WATCHERS} pages are open already; try again when one is closed\n");
            return (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "5")], body).into_response();
        };
        let first = {
            let history = lock(&self.history);
            event("history", &json!({ "columns": COLUMNS, "points": &*history }))
        };
        let mut snapshots = self.latest.subscribe();
        // Sends the latest snapshot immediately, so that the page is never empty.
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
            // Tells proxies not to buffer the stream.
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

/// Takes a snapshot every second, for as long as it is polled.
pub async fn look(server: &Server) {
    let mut samples = Samples::default();
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
        if let Ok(mut stream) = server.redis.connect().await {
            loop {
                let count = stream.count_dead_letters().await;
                let Ok(count) = count else { break };
                server.live.dead_letters.store(count, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}
