//! The entry point for events: which statement applies an event, in which transaction, and what is retried differently.
//!
//! In event mode, a batch takes `apply_each`: one call for all events, with a transaction for each. If any of them is
//! refused or loses to another transaction, they take `apply`, one call per event, so that each gets its own result. In
//! batch mode, they first share a transaction (`bulk`); those that claim handles have one of their own, and events that
//! shared a transaction with one that failed continue as in event mode.

use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use tokio_postgres::{Row, Statement};

use super::call::Call;
use super::plan;
use super::verdict::Verdict;
use super::{Session, StoreError};
use crate::config::TransactionMode;
use crate::crash::{self, Point};
use crate::event::{Event, Kind, Reject};
use crate::metrics;

const APPLY: &str = include_str!("../../sql/store/apply.sql");
const APPLY_EACH: &str = include_str!("../../sql/store/apply_each.sql");
const NOTE_EPOCHS: &str = include_str!("../../sql/store/note_epochs.sql");

/// An event of so many operations is written like many events, in its own transaction: its statements cost less than one
/// for each operation.
const MANY_OPS: usize = 16;
/// Handles that are claimed in one transaction: it holds two locks for each, and the server's table of locks is limited.
const CLAIMS: usize = 500;

/// Operations by kind, and how many of them changed something; the others were older than what was there.
pub type Counts = Vec<(Kind, u32, u32)>;

/// The outcome for an event.
#[derive(Clone, Debug)]
pub enum Fate {
    /// Committed.
    Applied(Counts),
    /// The database refuses these operations, given by index, and would apply the others.
    Rejected(Vec<(usize, Reject)>),
    /// It lost to another transaction, and must be retried.
    Lost(StoreError),
}

/// The outcome of a call.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Applied(Counts),
    Rejected(Vec<(usize, Reject)>),
}

impl Session {
    /// Applies events. The fates are in the order of the events.
    ///
    /// Nothing is durable before [`Session::flush`] has answered on this same connection.
    ///
    /// # Errors
    ///
    /// The connection is unusable, or the database refuses for a reason that is not an event's fault. Which events were
    /// applied is unknown.
    pub async fn apply(&self, events: &[&Event<'_>], mode: TransactionMode) -> Result<Vec<Fate>, StoreError> {
        let mut fates: Vec<Option<Fate>> = vec![None; events.len()];
        if mode == TransactionMode::Batch && events.len() > 1 {
            self.share(events, &mut fates).await?;
        }
        for (index, event) in events.iter().enumerate() {
            if fates[index].is_none() && event.ops.len() >= MANY_OPS {
                self.share(&[event], &mut fates[index..=index]).await?;
            }
        }
        let alone: Vec<usize> = (0..events.len()).filter(|&index| fates[index].is_none()).collect();
        if !alone.is_empty() {
            let chosen: Vec<&Event<'_>> = alone.iter().map(|&index| events[index]).collect();
            for (&index, result) in alone.iter().zip(self.apart(&chosen).await) {
                fates[index] = Some(match result {
                    Ok(Outcome::Applied(counts)) => Fate::Applied(counts),
                    Ok(Outcome::Rejected(bad)) => Fate::Rejected(bad),
                    Err(error) if error.verdict == Verdict::Retry => Fate::Lost(error),
                    Err(error) => return Err(error),
                });
            }
            crash::at(Point::BeforeJudging);
            self.judge_gates(&chosen).await?;
            self.judge_posts(&seen_before(&chosen, &alone, &fates)).await?;
        }
        fates.into_iter().collect::<Option<_>>().ok_or_else(too_few)
    }

    /// Applies events in shared transactions. Events that shared one with an event that the database refused, or that
    /// lost to another transaction, are left without a fate.
    async fn share(&self, events: &[&Event<'_>], fates: &mut [Option<Fate>]) -> Result<(), StoreError> {
        let (claims, others): (Vec<usize>, Vec<usize>) =
            (0..events.len()).partition(|&index| events[index].claims_handle());
        let parts = claims.chunks(CLAIMS).map(|indexes| (indexes, true));
        for (indexes, claims) in std::iter::once((others.as_slice(), false)).chain(parts) {
            if indexes.is_empty() {
                continue;
            }
            let chosen: Vec<&Event<'_>> = indexes.iter().map(|&index| events[index]).collect();
            let done = if claims { self.claims(&chosen).await } else { Box::pin(self.bulk(&chosen)).await };
            match done {
                Ok(outcomes) => {
                    for (&index, outcome) in indexes.iter().zip(outcomes) {
                        fates[index] = outcome.map(|outcome| match outcome {
                            Outcome::Applied(counts) => Fate::Applied(counts),
                            Outcome::Rejected(bad) => Fate::Rejected(bad),
                        });
                    }
                }
                Err(error) if matches!(error.verdict, Verdict::Reject | Verdict::Retry) => {
                    metrics::retry("split");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Applies events, each in its own transaction. The results are in the order of the events.
    ///
    /// Nothing is durable before [`Session::flush`] has answered on this same connection.
    async fn apart(&self, events: &[&Event<'_>]) -> Vec<Result<Outcome, StoreError>> {
        if let Err(error) = self.note_epochs(events).await {
            return vec![Err(error); events.len().max(1)];
        }
        let statement = match self.in_time(self.client.prepare_cached(APPLY)).await {
            Ok(statement) => statement,
            Err(error) => return vec![Err(error); events.len().max(1)],
        };
        match self.apply_each(events).await {
            Ok(outcomes) => return outcomes.into_iter().map(Ok).collect(),
            // One of them failed. Sent one by one, each gets its own result.
            Err(error) if matches!(error.verdict, Verdict::Reject | Verdict::Retry) => {
                if events.len() > 1 {
                    metrics::retry("split");
                }
            }
            Err(error) => return vec![Err(error); events.len()],
        }
        self.apply_singly(&statement, events).await
    }

    /// Applies events with a single message, as long as none is refused.
    async fn apply_each(&self, events: &[&Event<'_>]) -> Result<Vec<Outcome>, StoreError> {
        let statement = self.in_time(self.client.prepare_cached(APPLY_EACH)).await?;
        let calls: Vec<Call<'_>> = events.iter().map(|event| plan::fast(event, &self.known)).collect();
        let row = self.in_time(self.client.query_one(&statement, &[&calls, &Vec::<bool>::new()])).await?;
        let answers: Vec<bool> = row.get(0);
        let mut rest = answers.as_slice();
        let mut outcomes = Vec::with_capacity(events.len());
        for event in events {
            let (own, others) = rest.split_at_checked(event.ops.len()).ok_or_else(too_few)?;
            outcomes.push(outcome(event, own));
            rest = others;
        }
        Ok(outcomes)
    }

    /// Applies events with one message each, all sent at once.
    async fn apply_singly(
        &self,
        statement: &Statement,
        events: &[&Event<'_>],
    ) -> Vec<Result<Outcome, StoreError>> {
        let calls: Vec<Call<'_>> = events.iter().map(|event| plan::careful(&[event], &self.known)).collect();
        let parameters: Vec<_> = calls.iter().map(Call::parameters).collect();
        // Answers arrive in the order of the calls, so each is due within the limit after the previous one.
        let mut answers: FuturesOrdered<_> =
            parameters.iter().map(|parameters| self.client.query_one(statement, parameters)).collect();
        let mut results = Vec::with_capacity(events.len());
        let mut refused = Vec::new();
        while results.len() < events.len() {
            let answer = self.in_time(async { answers.next().await.transpose() }).await;
            results.push(match answer {
                Ok(Some(row)) => answered(events[results.len()], &row),
                // Cannot happen: there are as many answers as calls.
                Ok(None) => Err(self.no_answer()),
                Err(error) => {
                    if error.verdict == Verdict::Reject {
                        refused.push(results.len());
                    }
                    let broken = error.verdict == Verdict::Reconnect;
                    let result = Err(error);
                    if broken {
                        // This connection yields no more answers.
                        results.resize(events.len(), result);
                        return results;
                    }
                    result
                }
            });
        }
        drop(answers);
        for index in refused {
            if let Err(error) = results[index].clone() {
                results[index] = self.isolate(events[index], &error).await;
            }
        }
        results
    }

    /// Finds the operations that the database refuses, by trying each alone in a transaction that is rolled back.
    async fn isolate(&self, event: &Event<'_>, error: &StoreError) -> Result<Outcome, StoreError> {
        // Without operations, the index is that of the event itself: one past the operations.
        if event.ops.len() <= 1 {
            return Ok(Outcome::Rejected(vec![(0, error.reject())]));
        }
        let statement = self.in_time(self.client.prepare_cached(APPLY)).await?;
        let mut bad = Vec::new();
        for index in 0..event.ops.len() {
            let mut alone = event.clone();
            let mut places = 0..;
            alone.keep(|_| places.next() == Some(index));
            let call = plan::careful(&[&alone], &self.known);
            self.in_time(self.client.batch_execute("BEGIN")).await?;
            let tried = self.in_time(self.client.query_one(&statement, &call.parameters())).await;
            self.in_time(self.client.batch_execute("ROLLBACK")).await?;
            match tried {
                Ok(_) => {}
                Err(error) if error.verdict == Verdict::Reject => bad.push((index, error.reject())),
                Err(error) => return Err(error),
            }
        }
        if bad.is_empty() {
            // The refused operation may pass by now, because something newer has arrived that makes it stale.
            let call = plan::careful(&[event], &self.known);
            match self.in_time(self.client.query_one(&statement, &call.parameters())).await {
                Ok(row) => return answered(event, &row),
                Err(error) if error.verdict == Verdict::Reject => {}
                Err(error) => return Err(error),
            }
            // Each passes alone but not together: none can be singled out.
            bad = (0..event.ops.len()).map(|index| (index, error.reject())).collect();
        }
        Ok(Outcome::Rejected(bad))
    }

    /// Makes sure that the database knows the epochs of these events.
    pub(super) async fn note_epochs(&self, events: &[&Event<'_>]) -> Result<(), StoreError> {
        let new = self.known.new_epochs(events.iter().map(|event| event.version.epoch));
        if new.is_empty() {
            return Ok(());
        }
        let epochs: Vec<i64> = new.iter().filter_map(|epoch| i64::try_from(*epoch).ok()).collect();
        self.in_time(self.client.execute(NOTE_EPOCHS, &[&epochs])).await?;
        self.known.insert_epochs(&new);
        Ok(())
    }
}

/// Events with posts that were there already: the process may have ended before they were judged.
fn seen_before<'s, 'e>(
    chosen: &[&'s Event<'e>],
    indexes: &[usize],
    fates: &[Option<Fate>],
) -> Vec<&'s Event<'e>> {
    let is_old = |index: &usize| {
        let Some(Fate::Applied(counts)) = &fates[*index] else { return false };
        counts.iter().any(|(kind, total, applied)| *kind == Kind::Post && applied < total)
    };
    chosen.iter().zip(indexes).filter(|(_, index)| is_old(index)).map(|(event, _)| *event).collect()
}

pub(super) fn too_few() -> StoreError {
    StoreError::new(Verdict::Halt, "standpipe.apply returned fewer results than it was given operations")
}

/// The function's answer for one event.
fn answered(event: &Event<'_>, row: &Row) -> Result<Outcome, StoreError> {
    let answers: Vec<bool> = row.get(0);
    if answers.len() == event.ops.len() { Ok(outcome(event, &answers)) } else { Err(too_few()) }
}

/// Sums up the function's results by kind.
pub(super) fn outcome(event: &Event<'_>, changed: &[bool]) -> Outcome {
    let mut kinds: Counts = Vec::with_capacity(1);
    for (op, changed) in event.ops.iter().zip(changed) {
        match kinds.last_mut() {
            Some((kind, total, applied)) if *kind == op.kind => {
                *total += 1;
                *applied += u32::from(*changed);
            }
            _ => kinds.push((op.kind, 1, u32::from(*changed))),
        }
    }
    Outcome::Applied(kinds)
}
