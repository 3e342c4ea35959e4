//! The entry point for events: which statement applies an event, in which transaction, and what is retried differently.
//!
//! In event mode, a batch takes `apply_each`: one call for all events, with a transaction for each. If any of them is
//! refused or loses to another transaction, they take `apply`, one call per event, so that each gets its own result. In
//! batch mode, they first share transactions, as many as their operations need, with separate ones for events that
//! claim handles; events that shared a transaction with one that failed continue as in event mode.

use std::borrow::Cow;
use std::collections::HashSet;

use futures_util::StreamExt as _;
use futures_util::future::join;
use futures_util::stream::FuturesOrdered;
use tokio_postgres::{Row, Statement};

use super::call::Call;
use super::plan::{Planned, locks_of};
use super::verdict::Verdict;
use super::{Session, StoreError};
use crate::config::TransactionMode;
use crate::event::{Event, Kind, Reject};
use crate::metrics;

/// Maximum operations per transaction: five pipelines then use less than half of the locks available with PostgreSQL's
/// default settings.
const TRANSACTION_OPERATIONS: usize = 400;

const APPLY: &str = include_str!("../../sql/store/apply.sql");
const APPLY_EACH: &str = include_str!("../../sql/store/apply_each.sql");
const TRY_LOCK: &str = include_str!("../../sql/store/try_lock.sql");
const NOTE_EPOCHS: &str = include_str!("../../sql/store/note_epochs.sql");

/// Operations by kind, and how many of them changed something; the others were older than what was there.
pub type Counts = Vec<(Kind, u32, u32)>;

/// The outcome for an event.
#[derive(Clone, Debug)]
pub enum Fate {
    /// Committed.
    Applied(Counts),
    /// The database refuses these operations, given by index, and would apply the others.
    Rejected(Vec<(usize, Reject)>),
    /// Others hold locks on its accounts: it is deferred to the next batch.
    Deferred,
    /// It lost to another transaction, and must be retried.
    Lost(StoreError),
}

/// What to do with an event if others hold locks on its accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contended {
    /// Wait for the locks.
    Wait,
    /// Defer it to the next batch, if events share a transaction.
    Defer,
}

/// The outcome of a call.
#[derive(Clone, Debug)]
enum Outcome {
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
    pub async fn apply(
        &self,
        events: &[&Event<'_>],
        mode: TransactionMode,
        contended: Contended,
    ) -> Result<Vec<Fate>, StoreError> {
        let mut fates: Vec<Option<Fate>> = vec![None; events.len()];
        if mode == TransactionMode::Batch && events.len() > 1 {
            self.share(events, contended, &mut fates).await?;
        }
        let alone: Vec<usize> = (0..events.len()).filter(|&index| fates[index].is_none()).collect();
        if !alone.is_empty() {
            let chosen: Vec<&Event<'_>> = alone.iter().map(|&index| events[index]).collect();
            for (index, result) in alone.into_iter().zip(self.apart(&chosen).await) {
                fates[index] = Some(match result {
                    Ok(Outcome::Applied(counts)) => Fate::Applied(counts),
                    Ok(Outcome::Rejected(bad)) => Fate::Rejected(bad),
                    Err(error) if error.verdict == Verdict::Retry => Fate::Lost(error),
                    Err(error) => return Err(error),
                });
            }
        }
        fates.into_iter().collect::<Option<_>>().ok_or_else(too_few)
    }

    /// Applies events in as few transactions as the locks allow. Events that shared a transaction with one that the
    /// database refused, or that lost to another transaction, are left without a fate.
    async fn share(
        &self,
        events: &[&Event<'_>],
        contended: Contended,
        fates: &mut [Option<Fate>],
    ) -> Result<(), StoreError> {
        let (claims, others): (Vec<usize>, Vec<usize>) =
            (0..events.len()).partition(|&index| events[index].claims_handle());
        let parts = by_operations(events, &others).into_iter().map(|part| (part, false));
        for (indexes, claims) in
            parts.chain(by_operations(events, &claims).into_iter().map(|part| (part, true)))
        {
            let chosen: Vec<&Event<'_>> = indexes.iter().map(|&index| events[index]).collect();
            let done =
                if claims { self.claims(&chosen).await } else { self.together(&chosen, contended).await };
            match done {
                Ok(outcomes) => {
                    for (index, outcome) in indexes.into_iter().zip(outcomes) {
                        fates[index] = Some(match outcome {
                            Some(Outcome::Applied(counts)) => Fate::Applied(counts),
                            Some(Outcome::Rejected(bad)) => Fate::Rejected(bad),
                            None => Fate::Deferred,
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
        let plans: Vec<Planned<'_>> = events.iter().map(|event| Planned::fast(event, &self.known)).collect();
        let calls: Vec<&Call<'_>> = plans.iter().map(|plan| &plan.call).collect();
        let row = self.in_time(self.client.query_one(&statement, &[&calls, &Vec::<bool>::new()])).await?;
        let answers: Vec<bool> = row.get(0);
        let mut rest = answers.as_slice();
        let mut outcomes = Vec::with_capacity(events.len());
        for (event, plan) in events.iter().zip(&plans) {
            let (own, others) = rest.split_at_checked(plan.len()).ok_or_else(too_few)?;
            outcomes.push(outcome(event, &plan.in_order(own)));
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
        let plans: Vec<Planned<'_>> =
            events.iter().map(|event| Planned::careful(event, &self.known, |_| true)).collect();
        let parameters: Vec<_> = plans.iter().map(|plan| plan.call.parameters()).collect();
        // Answers arrive in the order of the calls, so each is due within the limit after the previous one.
        let mut answers: FuturesOrdered<_> =
            parameters.iter().map(|parameters| self.client.query_one(statement, parameters)).collect();
        let mut results = Vec::with_capacity(events.len());
        let mut refused = Vec::new();
        while results.len() < events.len() {
            let answer = self.in_time(async { answers.next().await.transpose() }).await;
            results.push(match answer {
                Ok(Some(row)) => answered(events[results.len()], &plans[results.len()], &row),
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

    /// Applies a batch in at most two all-or-nothing transactions: first the events whose locks are free, then, if
    /// `contended` is [`Contended::Wait`], the contended ones. Deferred events get no outcome. This keeps accounts that
    /// appear in every batch from serialising all pipelines.
    ///
    /// None of them may claim a handle ([`Event::claims_handle`]): the locks of a claim depend on what other claims
    /// have just written, so it may have to be retried together with all others. Those go to [`Session::claims`].
    ///
    /// The outcomes are in the order of the events. Nothing is durable before [`Session::flush`] has answered on this
    /// same connection.
    ///
    /// # Errors
    ///
    /// Some of the events were not applied. Unless the verdict is [`Verdict::Reconnect`], they can be tried one by one.
    async fn together(
        &self,
        events: &[&Event<'_>],
        contended: Contended,
    ) -> Result<Vec<Option<Outcome>>, StoreError> {
        self.note_epochs(events).await?;
        let mut outcomes: Vec<Option<Outcome>> = vec![None; events.len()];
        let mut take = |indexes: Vec<usize>, done: Vec<Outcome>| {
            for (index, outcome) in indexes.into_iter().zip(done) {
                outcomes[index] = Some(outcome);
            }
        };
        // Prepared before anything is pipelined: a call that waits for its preparation would be sent too late.
        let statement = self.in_time(self.client.prepare_cached(APPLY)).await?;
        let (free, rest) = self.lock_free(events).await?;
        let chosen = |indexes: &[usize]| -> Vec<&Event<'_>> { indexes.iter().map(|&i| events[i]).collect() };
        // COMMIT also ends a failed transaction, by rolling it back.
        let (done, ended) = join(
            self.apply_at_once(&statement, &chosen(&free), true),
            self.in_time(self.client.batch_execute("COMMIT")),
        )
        .await;
        take(free, done?);
        ended?;
        if contended == Contended::Wait {
            let done = self.apply_at_once(&statement, &chosen(&rest), false).await?;
            take(rest, done);
        }
        Ok(outcomes)
    }

    /// Applies events that claim handles in one transaction: all of them or none. The outcomes are in the order of the
    /// events. Nothing is durable before [`Session::flush`] has answered on this same connection.
    ///
    /// # Errors
    ///
    /// None of the events was applied. Unless the verdict is [`Verdict::Reconnect`], they can be tried one by one.
    async fn claims(&self, events: &[&Event<'_>]) -> Result<Vec<Option<Outcome>>, StoreError> {
        self.note_epochs(events).await?;
        let statement = self.in_time(self.client.prepare_cached(APPLY)).await?;
        Ok(self.apply_at_once(&statement, events, false).await?.into_iter().map(Some).collect())
    }

    /// Begins a transaction and takes the free locks. Returns the indexes of the events that got all of their locks,
    /// and those of the others.
    async fn lock_free(&self, events: &[&Event<'_>]) -> Result<(Vec<usize>, Vec<usize>), StoreError> {
        let statement = self.in_time(self.client.prepare_cached(TRY_LOCK)).await?;
        let of_each: Vec<Vec<Cow<'_, str>>> = events.iter().map(|event| locks_of(event).collect()).collect();
        let mut locks: Vec<&str> = of_each.iter().flatten().map(|lock| &**lock).collect();
        locks.sort_unstable();
        locks.dedup();
        let (began, busy) = join(
            self.in_time(self.client.batch_execute("BEGIN")),
            self.in_time(self.client.query_one(&statement, &[&locks])),
        )
        .await;
        began?;
        let busy: HashSet<String> = busy?.get::<_, Vec<String>>(0).into_iter().collect();
        Ok((0..events.len()).partition(|&index| of_each[index].iter().all(|lock| !busy.contains(&**lock))))
    }

    /// Applies events with one call. `locked`: the open transaction already holds their locks.
    async fn apply_at_once(
        &self,
        statement: &Statement,
        events: &[&Event<'_>],
        locked: bool,
    ) -> Result<Vec<Outcome>, StoreError> {
        if events.is_empty() {
            return Ok(Vec::new());
        }
        let plan = Planned::together(events, &self.known);
        let plan = if locked { plan.locked() } else { plan };
        let row = self.in_time(self.client.query_one(statement, &plan.call.parameters())).await?;
        let answers: Vec<bool> = row.get(0);
        if answers.len() != plan.len() {
            return Err(too_few());
        }
        let answers = plan.in_order(&answers);
        let mut rest = answers.as_slice();
        Ok(events
            .iter()
            .map(|event| {
                let (own, others) = rest.split_at(event.ops.len());
                rest = others;
                outcome(event, own)
            })
            .collect())
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
            let call = Planned::careful(event, &self.known, |other| other == index).call;
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
            let plan = Planned::careful(event, &self.known, |_| true);
            match self.in_time(self.client.query_one(&statement, &plan.call.parameters())).await {
                Ok(row) => return answered(event, &plan, &row),
                Err(error) if error.verdict == Verdict::Reject => {}
                Err(error) => return Err(error),
            }
            // Each passes alone but not together: none can be singled out.
            bad = (0..event.ops.len()).map(|index| (index, error.reject())).collect();
        }
        Ok(Outcome::Rejected(bad))
    }

    /// Makes sure that the database knows the epochs of these events.
    async fn note_epochs(&self, events: &[&Event<'_>]) -> Result<(), StoreError> {
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

/// Splits a batch where it has too many operations for one transaction. Each takes one or a few locks.
fn by_operations(events: &[&Event<'_>], chosen: &[usize]) -> Vec<Vec<usize>> {
    let mut parts: Vec<Vec<usize>> = Vec::new();
    let mut operations = TRANSACTION_OPERATIONS;
    for &index in chosen {
        let count = events[index].ops.len();
        operations += count;
        match parts.last_mut() {
            Some(part) if operations <= TRANSACTION_OPERATIONS => part.push(index),
            _ => {
                parts.push(vec![index]);
                operations = count;
            }
        }
    }
    parts
}

fn too_few() -> StoreError {
    StoreError::new(Verdict::Halt, "standpipe.apply returned fewer results than it was given operations")
}

/// The function's answer for one event.
fn answered(event: &Event<'_>, plan: &Planned<'_>, row: &Row) -> Result<Outcome, StoreError> {
    let answers: Vec<bool> = row.get(0);
    if answers.len() == plan.len() { Ok(outcome(event, &plan.in_order(&answers))) } else { Err(too_few()) }
}

/// Sums up the function's results by kind.
fn outcome(event: &Event<'_>, changed: &[bool]) -> Outcome {
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
