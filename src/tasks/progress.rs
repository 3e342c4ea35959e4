//! Keeps the histograms small, and logs progress every ten seconds.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use metrics_exporter_prometheus::PrometheusHandle;
use tracing::info;

use super::Task;
use crate::mutex::lock;
use crate::status::Status;

const ROUND: Duration = Duration::from_secs(5);

/// One per process.
pub struct Progress {
    metrics: PrometheusHandle,
    status: Arc<Status>,
    /// The counts of the last two rounds, with their times.
    before: [(u64, Instant); 2],
    /// When the next round is due; `None` before the first.
    due: Option<tokio::time::Instant>,
    /// Every other round is logged.
    says: bool,
}

impl Progress {
    /// Starts counting.
    #[must_use]
    pub fn new(metrics: PrometheusHandle, status: Arc<Status>) -> Self {
        Self { metrics, status, before: [(0, Instant::now()); 2], due: None, says: false }
    }
}

impl Task for Progress {
    const NAME: &'static str = "progress";

    async fn round(&mut self) -> Result<Duration> {
        // The first round is due after one period, and later ones do not drift.
        let due = *self.due.get_or_insert_with(|| tokio::time::Instant::now() + ROUND);
        tokio::time::sleep_until(due).await;
        self.due = Some(due + ROUND);
        self.metrics.run_upkeep();
        let now = self.status.entries.load(Ordering::Relaxed);
        let (entries, since) = self.before[0];
        let rate = (now - entries) as f64 / since.elapsed().as_secs_f64();
        self.before = [self.before[1], (now, Instant::now())];
        *lock(&self.status.pace) = Some(rate);
        self.says = !self.says;
        if !self.says {
            let look = self.status.look().map(|(look, _)| look).unwrap_or_default();
            info!(
                events_per_second = format_args!("{rate:.0}"),
                entries = now,
                waiting = look.waiting().map_or_else(|| "unknown".to_owned(), |n| n.to_string()),
                pending = look.pending,
                oldest_seconds = format_args!("{:.1}", look.oldest_seconds().unwrap_or(0.0)),
                "progress"
            );
        }
        Ok(Duration::ZERO)
    }
}
