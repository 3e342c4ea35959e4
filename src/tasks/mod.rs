//! The background tasks: one file each, all with the same shape. A task does a round and returns when the next one is
//! due; errors are retried with growing pauses.
//!
//! - `prepare`: before the first entry: `schema`, `takeover`, then the lease on the consumer names, which it keeps
//! - `janitor`: trims the stream, and records its state for all parts
//! - `acknowledged`: records in PostgreSQL what was acknowledged, and notices when PostgreSQL has gone back in time
//! - `tombstones`, `purge`: delete expired tombstones and the records of deleted accounts
//! - `repairs`: repositories that differ from what arrived
//! - `results`: forgets what came of tasks (messages for functions) long ago
//! - `tracked`: the accounts that the reader keeps, if not all are wanted
//! - `standings`: how many repositories are queued, and how many done
//! - `backfill`: the accounts whose whole repositories are to be fetched
//! - `gaps`: the accounts that may lack something since a gap
//! - `legacy`: the keys of the old application's pages
//! - `progress`: the progress line in the log

pub mod acknowledged;
pub mod backfill;
pub mod gaps;
pub mod janitor;
pub mod legacy;
pub mod prepare;
pub mod progress;
pub mod purge;
pub mod repairs;
pub mod results;
mod schema;
pub mod standings;
mod takeover;
pub mod tombstones;
pub mod tracked;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::status::Status;
use crate::time::{Backoff, now_ms};

/// A task that has failed for this long is logged. Shorter outages are reported by the parts that wait for the server.
const FAILING: Duration = Duration::from_mins(1);

/// A background task.
pub trait Task: Send {
    /// Its name in `/status` and the log.
    const NAME: &'static str;

    /// Does one round. Returns how long to wait before the next.
    ///
    /// # Errors
    ///
    /// A server cannot be reached, or refuses.
    fn round(&mut self) -> impl Future<Output = Result<Duration>> + Send;

    /// Runs once at the end.
    fn last(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// Runs a task until `end`.
pub async fn run<T: Task>(mut task: T, status: Arc<Status>, end: CancellationToken) {
    let mut delays = Backoff::default();
    let mut failing: Option<Failing> = None;
    status.task(T::NAME, |_| {});
    while !end.is_cancelled() {
        let pause = match task.round().await {
            Ok(pause) => {
                delays.reset();
                if failing.take().is_some_and(|failing| failing.reported) {
                    info!(task = T::NAME, "works again");
                }
                status.task(T::NAME, |task| {
                    task.last_ms = Some(now_ms());
                    task.error = None;
                });
                pause
            }
            Err(error) => {
                let reason = format!("{error:#}");
                let failing = failing.get_or_insert_with(Failing::default);
                let lasts = failing.since.elapsed();
                if lasts > FAILING && !std::mem::replace(&mut failing.reported, true) {
                    warn!(task = T::NAME, reason, seconds = lasts.as_secs(), "keeps failing");
                }
                status.task(T::NAME, |task| task.error = Some(reason));
                delays.pause()
            }
        };
        end.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
    task.last().await;
}

/// A failing task.
struct Failing {
    since: Instant,
    reported: bool,
}

impl Default for Failing {
    fn default() -> Self {
        Self { since: Instant::now(), reported: false }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::mutex::lock;

    /// Each round ends as the test decides.
    struct Told(mpsc::Receiver<Result<Duration>>);

    impl Task for Told {
        const NAME: &'static str = "told";

        async fn round(&mut self) -> Result<Duration> {
            self.0.recv().await.unwrap_or(Ok(Duration::from_hours(1)))
        }
    }

    #[tokio::test]
    async fn a_failing_task_shows_its_error_until_it_succeeds() {
        let status = Arc::new(Status::default());
        let (tell, told) = mpsc::channel(1);
        let end = CancellationToken::new();
        let task = tokio::spawn(run(Told(told), Arc::clone(&status), end.clone()));
        let shown = async |wanted: Option<&str>, succeeded: bool| {
            loop {
                let shown = lock(&status.tasks).get("told").cloned().unwrap_or_default();
                if shown.error.as_deref() == wanted && shown.last_ms.is_some() == succeeded {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        tell.send(Err(anyhow::anyhow!("no right to delete"))).await.unwrap();
        shown(Some("no right to delete"), false).await;
        tell.send(Ok(Duration::ZERO)).await.unwrap();
        shown(None, true).await;
        end.cancel();
        drop(tell);
        task.await.unwrap();
    }
}
