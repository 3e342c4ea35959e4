//! Samples of the counters, and the rates derived from them.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::day::tidy;
use crate::event::Kind;
use crate::health::Facts;
use crate::metrics::totals;
use crate::status::{State, Status, percentile};

/// Seconds over which rates are averaged: batches make single seconds jump.
const RATE_SECONDS: usize = 3;
/// Seconds over which percentiles are computed.
const LATENCY_SECONDS: usize = 10;

/// The counters at one moment.
pub struct Sample {
    at: Instant,
    /// Entries finished.
    pub entries: u64,
    frames: u64,
    waiting: Option<u64>,
    /// Whether a pipeline is running: a backlog that grows while none is does not mean that they are too slow.
    at_work: bool,
    pipelines: Vec<u64>,
    /// Operations applied and stale, in the order of [`Kind::ALL`].
    pub kinds: Vec<(u64, u64)>,
    latency: Vec<u64>,
    cpu_seconds: f64,
}

/// Rates over the last seconds.
pub struct Rates {
    /// Entries finished per second.
    pub events: f64,
    /// Frames per second.
    pub frames: f64,
    /// Entries per second by which the backlog shrinks.
    pub shrinking: f64,
    /// Processor time in percent of one processor.
    pub cpu_percent: f64,
    /// The median time until an event is durable, in milliseconds.
    pub p50_ms: Option<f64>,
    /// The 99th percentile.
    pub p99_ms: Option<f64>,
    /// Entries per second of each pipeline.
    pub pipelines: Vec<f64>,
    /// Operations applied per second of each kind.
    pub kinds: Vec<f64>,
}

impl Sample {
    /// Reads the counters.
    pub fn of(status: &Status, facts: &Facts, cpu_seconds: f64) -> Self {
        Self {
            at: Instant::now(),
            entries: status.entries.load(Ordering::Relaxed),
            frames: facts.reader.as_ref().map_or(0, |reader| reader.frames),
            waiting: facts.waiting,
            at_work: facts.pipelines.iter().any(|pipeline| pipeline.state == State::Running),
            pipelines: facts.pipelines.iter().map(|pipeline| pipeline.entries).collect(),
            kinds: Kind::ALL.map(totals::of_kind).to_vec(),
            latency: status.latency.counts(),
            cpu_seconds,
        }
    }
}

/// The samples of the last seconds, oldest first.
#[derive(Default)]
pub struct Samples(VecDeque<Sample>);

impl Samples {
    /// The rates up to this sample.
    pub fn rates(&self, now: &Sample) -> Rates {
        let base = self.before(RATE_SECONDS).unwrap_or(now);
        let seconds = now.at.duration_since(base.at).as_secs_f64();
        let per_second = |more: f64| if seconds > 0.0 { tidy(more / seconds) } else { 0.0 };
        let counted = |now: u64, before: u64| per_second(now.saturating_sub(before) as f64);
        let latency = &self.before(LATENCY_SECONDS).unwrap_or(now).latency;
        let within = |share: f64| percentile(latency, &now.latency, share).map(tidy);
        let pipelines = now.pipelines.iter().enumerate();
        let kinds = now.kinds.iter().zip(&base.kinds);
        Rates {
            events: counted(now.entries, base.entries),
            frames: counted(now.frames, base.frames),
            shrinking: self.shrinking(now),
            cpu_percent: per_second((now.cpu_seconds - base.cpu_seconds) * 100.0),
            p50_ms: within(0.5),
            p99_ms: within(0.99),
            pipelines: pipelines
                .map(|(index, now)| counted(*now, base.pipelines.get(index).copied().unwrap_or_default()))
                .collect(),
            kinds: kinds.map(|((now, _), (before, _))| counted(*now, *before)).collect(),
        }
    }

    /// Adds a sample, and drops the oldest.
    pub fn push(&mut self, sample: Sample) {
        self.0.push_back(sample);
        if self.0.len() > LATENCY_SECONDS {
            self.0.pop_front();
        }
    }

    /// The sample taken this many seconds ago, or the oldest.
    fn before(&self, seconds: usize) -> Option<&Sample> {
        self.0.len().checked_sub(seconds).map_or(self.0.front(), |place| self.0.get(place))
    }

    /// Entries per second by which the backlog shrinks, negative when it grows; 0 if unknown, or if no pipeline is
    /// running.
    fn shrinking(&self, now: &Sample) -> f64 {
        let at_work =
            self.0.iter().rev().take(RATE_SECONDS).take_while(|sample| sample.at_work && now.at_work);
        let Some(base) = at_work.last() else { return 0.0 };
        let seconds = now.at.duration_since(base.at).as_secs_f64();
        match (base.waiting, now.waiting) {
            (Some(before), Some(now)) if seconds > 0.0 => tidy((before as f64 - now as f64) / seconds),
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_backlog_grown_during_a_pause_does_not_count_as_falling_behind() {
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
        let paused =
            Samples(VecDeque::from([sample(0, 100, true), sample(1, 1_000, false), sample(2, 2_000, false)]));
        assert_eq!(paused.shrinking(&sample(3, 2_500, true)), 0.0);
        let resumed = Samples(paused.0.into_iter().chain([sample(3, 2_500, true)]).collect());
        assert_eq!(resumed.shrinking(&sample(4, 1_500, true)), 1_000.0);
        assert_eq!(resumed.shrinking(&sample(4, 2_900, true)), -400.0);
        assert_eq!(resumed.shrinking(&sample(4, 2_900, false)), 0.0);
    }
}
