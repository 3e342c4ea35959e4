//! Applies a batch to the database, however long that takes.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::Pipeline;
use super::work::{Work, panicked};
use crate::config::TransactionMode;
use crate::crash::{self, Point};
use crate::event::{Event, Reject};
use crate::metrics;
use crate::status::State;
use crate::stop::{Stopped, or_stop};
use crate::store::verdict::Verdict;
use crate::store::{Fate, Session, StoreError};
use crate::time::Backoff;

/// Fewer events than this do not share a transaction: its own statements would cost more than it saves.
const SHARED: usize = 32;
/// How long a halted pipeline waits before it tries again.
pub(super) const HALTED: Duration = Duration::from_secs(10);
/// Report PostgreSQL as unresponsive after this long.
const NO_ANSWER: Duration = Duration::from_secs(5);

impl Pipeline {
    /// Applies entries until each is durable or rejected. Waits for the database as long as necessary.
    ///
    /// [`Stopped`] when it is time to stop while the database is down: the entries stay pending.
    pub(super) async fn apply<'a>(
        &self,
        mut batch: Vec<Work<'a>>,
        stop: &CancellationToken,
    ) -> Result<Vec<Work<'a>>, Stopped> {
        let mut delays = Backoff::default();
        loop {
            let error = match self.store.session().await {
                Ok(session) => {
                    let attempt = AssertUnwindSafe(self.answered(self.attempt(&session, &mut batch, stop)));
                    let error = match attempt.catch_unwind().await {
                        Ok(Ok(())) => return Ok(batch),
                        Ok(Err(error)) => Ok(error),
                        Err(panic) => Err(panicked(panic.as_ref())),
                    };
                    // Commits that this connection confirmed may be lost: start over with the whole batch.
                    session.discard();
                    for work in &mut batch {
                        work.reopen();
                    }
                    match error {
                        Ok(error) => error,
                        Err(reject) => return Box::pin(self.apply_alone(batch, reject, stop)).await,
                    }
                }
                Err(error) => error,
            };
            self.wait_for_postgres(error, delays.pause(), stop).await?;
        }
    }

    /// After a panic: applies each entry alone, so that only the one that causes it is lost.
    async fn apply_alone<'a>(
        &self,
        mut batch: Vec<Work<'a>>,
        reject: Reject,
        stop: &CancellationToken,
    ) -> Result<Vec<Work<'a>>, Stopped> {
        if let [work] = batch.as_mut_slice() {
            error!(
                entry = %work.entry.id,
                reason = reject.message,
                "an entry made the program panic: it becomes a dead letter"
            );
            work.reject_all(reject);
            return Ok(batch);
        }
        let mut done = Vec::with_capacity(batch.len());
        for work in batch {
            done.extend(self.apply(vec![work], stop).await?);
        }
        Ok(done)
    }

    /// Waits for the database, and reports a slow answer. It never gives up: that is up to the statement timeout.
    async fn answered<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(NO_ANSWER) => {}
        }
        self.say(State::WaitingForPostgres { reason: format!("no answer within {} s", NO_ANSWER.as_secs()) });
        work.await
    }

    /// One attempt on one connection: applies the events, repeats those that lost to other transactions, then flushes.
    async fn attempt(
        &self,
        session: &Session,
        batch: &mut [Work<'_>],
        stop: &CancellationToken,
    ) -> Result<(), StoreError> {
        let began = Instant::now();
        let mut delays = Backoff::default();
        let apart = batch.len() < SHARED || self.shared.others.load(Ordering::Relaxed);
        let mut mode = if apart { TransactionMode::Event } else { self.transaction };
        loop {
            let open: Vec<usize> = (0..batch.len()).filter(|&index| batch[index].is_open()).collect();
            if open.is_empty() {
                break;
            }
            let events: Vec<&Event<'_>> = open.iter().filter_map(|&index| batch[index].event()).collect();
            for &index in &open {
                crash::panic_over("apply", &batch[index].entry.data);
            }
            let fates = session.apply(&events, mode).await?;
            // Transactions are shared only in the first round; the remaining events are applied one by one.
            mode = TransactionMode::Event;
            let mut again = None;
            for (&index, fate) in open.iter().zip(fates) {
                match fate {
                    Fate::Applied(counts) => batch[index].applied(counts),
                    Fate::Rejected(bad) => batch[index].reject(bad),
                    Fate::Lost(error) => again = Some(error),
                }
            }
            if let Some(error) = again
                && self.wait_for_postgres(error.clone(), delays.pause(), stop).await.is_err()
            {
                return Err(error);
            }
        }
        ::metrics::histogram!(metrics::TRANSACTION_SECONDS).record(began.elapsed().as_secs_f64());
        crash::at(Point::AfterCommit);
        let events: Vec<&Event<'_>> = batch.iter().filter_map(Work::event).collect();
        session.flush(&events).await?;
        crash::at(Point::AfterFlush);
        ::metrics::histogram!(metrics::BATCH_SECONDS).record(began.elapsed().as_secs_f64());
        self.say(State::Running);
        Ok(())
    }

    /// Reports the problem and waits, unless it is time to stop.
    async fn wait_for_postgres(
        &self,
        error: StoreError,
        delay: Duration,
        stop: &CancellationToken,
    ) -> Result<(), Stopped> {
        let StoreError { verdict, message: reason, .. } = error;
        let (label, delay, state) = match verdict {
            // The store has already singled out the rejects; any other refusal is our own fault.
            Verdict::Halt | Verdict::Reject => ("halt", HALTED, State::Halted { reason: reason.clone() }),
            Verdict::Reconnect => ("reconnect", delay, State::WaitingForPostgres { reason: reason.clone() }),
            Verdict::Retry => ("retry", delay, State::WaitingForPostgres { reason: reason.clone() }),
        };
        metrics::retry(label);
        self.status.pipeline(self.index, |status| status.retries += 1);
        // Occasionally losing to another transaction is not an outage.
        if verdict != Verdict::Retry || delay > Duration::from_millis(500) {
            self.say(state);
        }
        or_stop(stop, tokio::time::sleep(delay)).await
    }
}
