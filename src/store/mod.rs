//! The only place that knows PostgreSQL: connections, the apply call, the flush, migrations and the meaning of errors.

pub mod acknowledged;
pub mod audit;
mod known;
pub mod migrate;
pub mod purge;
pub mod settings;
pub mod statements;
pub mod takeover;
pub mod tls;
pub mod tombstones;
mod types;
pub mod verdict;

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use deadpool_postgres::{
    Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime, TimeoutType,
    Timeouts,
};
use futures_util::StreamExt as _;
use futures_util::future::join;
use futures_util::stream::FuturesOrdered;
use tokio::sync::watch;
use tokio_postgres::{Error, Statement};
use tokio_postgres_rustls::MakeRustlsConnect;

pub use tokio_postgres::{Client, Row};

use crate::config::Config;
use crate::crash::{self, Point};
use crate::event::{Event, Kind, Reason, Reject};
use crate::metrics;
use known::KnownAccounts;
use types::{Call, Planned, locks_of};
use verdict::{Verdict, describe, judge};

/// The server ends a statement at its own limit; an answer that takes this much longer never comes. Without that, a
/// connection whose other end is gone but still acknowledged, by a proxy for example, would be waited on for ever.
const ANSWER_MARGIN: Duration = Duration::from_secs(5);

/// How long a server may take to end a cancelled statement.
const CANCEL: Duration = Duration::from_secs(5);

const APPLY: &str = "SELECT standpipe.apply($1, $2, $3, $4, $5, $6, $7)";
const APPLY_EACH: &str = "CALL standpipe.apply_each($1, $2)";
const TRY_LOCK: &str = "SELECT standpipe.try_lock($1)";
const NOTE_EPOCHS: &str = "INSERT INTO standpipe.epochs SELECT unnest($1::bigint[]) ON CONFLICT DO NOTHING";
const FLUSH: &str = "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true),
    pg_logical_emit_message(true, 'standpipe', '')";

/// The bounded pool.
#[derive(Clone)]
pub struct Store {
    pool: Pool,
    known: Arc<KnownAccounts>,
    answer_limit: Duration,
    /// Cancels the work of a discarded connection.
    cancel: Arc<Cancel>,
}

/// The outcome of applying an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Committed: operations by kind, and how many of them changed something; the others met something newer.
    Applied(Vec<(Kind, u32, u32)>),
    /// The database refuses some of its operations, by their index, and would apply the others.
    Rejected(Vec<(usize, Reject)>),
}

/// Why a call to the store did not do its work.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// What to do about it.
    pub verdict: Verdict,
    /// What happened, without secrets.
    pub message: String,
    /// The SQLSTATE, when PostgreSQL reported it.
    pub sqlstate: Option<String>,
    /// The function of the operator's that it comes from, a trigger's for example.
    pub function: Option<String>,
}

impl StoreError {
    /// An error that PostgreSQL did not report.
    #[must_use]
    pub fn new(verdict: Verdict, message: impl Into<String>) -> Self {
        Self { verdict, message: message.into(), sqlstate: None, function: None }
    }

    /// The event's side of a refusal.
    fn reject(&self) -> Reject {
        let (reason, message) = match &self.function {
            Some(function) => {
                (Reason::Trigger, format!("the function {function} refused it: {}", self.message))
            }
            None => (Reason::Database, self.message.clone()),
        };
        Reject { reason, message, sqlstate: self.sqlstate.clone() }
    }
}

impl From<&Error> for StoreError {
    fn from(error: &Error) -> Self {
        Self {
            verdict: judge(error),
            message: describe(error),
            sqlstate: error.code().map(|code| code.code().to_owned()),
            function: verdict::operators_function(error),
        }
    }
}

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

impl From<PoolError> for StoreError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => {
                Self::from(&error)
            }
            PoolError::Timeout(TimeoutType::Wait) => Self::new(
                Verdict::Retry,
                "all connections were in use for 10 s: DB_POOL_SIZE may be too small",
            ),
            PoolError::Timeout(_) => {
                Self::new(Verdict::Reconnect, "no answer to an attempt to connect, for 10 s")
            }
            PoolError::PostCreateHook(HookError::Message(message)) => match message.strip_prefix(HALT) {
                Some(message) => Self::new(Verdict::Halt, message),
                None => Self::new(Verdict::Reconnect, message),
            },
            other => Self::new(Verdict::Reconnect, other.to_string()),
        }
    }
}

impl Store {
    /// A pool of at most `DB_POOL_SIZE` connections; none is opened yet.
    ///
    /// # Errors
    ///
    /// `DATABASE_URL` cannot be parsed.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let url = config.database_url.as_ref().ok_or_else(|| anyhow::anyhow!("DATABASE_URL is not set"))?;
        let options = connect_options(&url.for_driver())?;
        let settings: Arc<str> = settings::of(config, url).into();
        let connector = tls::connector(config)?;
        let cancel = Arc::new(Cancel::new(connector.clone()));
        let manager = Manager::from_config(
            options,
            connector,
            ManagerConfig {
                // A connection in doubt is never returned, so a returned one needs no check.
                recycling_method: RecyclingMethod::Fast,
            },
        );
        let pool = Pool::builder(manager)
            .max_size(config.db_pool_size)
            .post_create(Hook::async_fn(move |client, _| {
                let settings = Arc::clone(&settings);
                Box::pin(async move {
                    settings::apply(client, &settings).await.map_err(|error| hook_error(&error))
                })
            }))
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts {
                wait: Some(Duration::from_secs(10)),
                create: Some(Duration::from_secs(10)),
                recycle: Some(Duration::from_secs(5)),
            })
            .build()?;
        Ok(Self {
            pool,
            known: Arc::default(),
            answer_limit: config.db_statement_timeout + ANSWER_MARGIN,
            cancel,
        })
    }

    /// A connection out of the pool.
    ///
    /// # Errors
    ///
    /// The server cannot be reached or refuses, or all connections are in use.
    pub async fn session(&self) -> Result<Session, StoreError> {
        let asked = Instant::now();
        let client = self.pool.get().await?;
        ::metrics::histogram!(metrics::POOL_WAIT).record(asked.elapsed().as_secs_f64());
        let uses = Object::metrics(&client).recycle_count;
        if uses >= 8 && uses.is_power_of_two() {
            // Plans are kept, and those that were made while a table was empty are often the wrong ones a second later.
            client.batch_execute("DISCARD PLANS").await?;
        }
        Ok(Session {
            client: Lent {
                object: Some(client),
                unanswered: AtomicUsize::new(0),
                discarded: false,
                cancel: Arc::clone(&self.cancel),
            },
            known: Arc::clone(&self.known),
            answer_limit: self.answer_limit,
        })
    }

    /// Whether the server answers, within `limit`.
    ///
    /// # Errors
    ///
    /// It does not.
    pub async fn ping(&self, limit: Duration) -> Result<(), StoreError> {
        let late = |_| StoreError::new(Verdict::Reconnect, format!("no answer within {limit:?}"));
        let session = tokio::time::timeout(limit, self.session()).await.map_err(late)??;
        match tokio::time::timeout(limit, session.client.simple_query("SELECT 1")).await {
            Ok(answer) => Ok(answer.map(drop)?),
            Err(elapsed) => {
                // Returned to the pool, its answer would hold up the next user.
                session.give_up();
                Err(late(elapsed))
            }
        }
    }

    /// Connections that exist, and those in use.
    #[must_use]
    pub fn pool_status(&self) -> (usize, usize) {
        let status = self.pool.status();
        (status.size, status.size.saturating_sub(status.available))
    }

    /// Whether a pooler between here and the server gives each transaction another server process, which nothing of ours
    /// survives.
    ///
    /// # Errors
    ///
    /// It does, with [`Verdict::Halt`]; or the server cannot be reached.
    pub async fn refuse_transaction_pooling(&self) -> Result<(), StoreError> {
        if self.pool.status().max_size < 2 {
            return Ok(());
        }
        let (one, other) = (self.session().await?, self.session().await?);
        let limit = Duration::from_secs(10);
        let asked = settings::refuse_transaction_pooling(one.client(), other.client());
        let late = |_| StoreError::new(Verdict::Reconnect, format!("no answer within {limit:?}"));
        let answer = tokio::time::timeout(limit, asked).await.map_err(late).flatten();
        if answer.is_err() {
            one.give_up();
            other.give_up();
        }
        answer
    }

    /// Closes every connection. What the server is still doing for one of them is cancelled: it would not notice that we
    /// are gone.
    pub async fn close(&self) {
        self.pool.close();
        self.cancel.ended().await;
    }
}

/// One connection, held for one batch: what is applied on it is flushed on it.
pub struct Session {
    client: Lent,
    known: Arc<KnownAccounts>,
    answer_limit: Duration,
}

impl Session {
    /// The driver's client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The driver's client, for transactions of one's own.
    pub fn client_mut(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Takes the connection out of the pool and closes it. For every connection that an error left in doubt.
    ///
    /// Its running statement is cancelled first, and the connection keeps its place in the pool until that is
    /// done: a server process that waits, for a standby for example, does not notice that its client is gone, and there
    /// would be one more with each attempt.
    pub fn discard(mut self) {
        self.known.clear();
        self.client.discarded = true;
    }

    /// As [`Session::discard`], where an answer has not come.
    pub fn give_up(self) {
        self.client.unanswered.fetch_add(1, Ordering::Relaxed);
        self.discard();
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

    /// Applies events, each in a transaction of its own. The results stand in the order of the events.
    ///
    /// Nothing is durable before [`Session::flush`] has answered on this same connection.
    pub async fn apply(&self, events: &[&Event<'_>]) -> Vec<Result<Outcome, StoreError>> {
        if let Err(error) = self.note_epochs(events).await {
            return vec![Err(error); events.len().max(1)];
        }
        let statement = match self.in_time(self.client.prepare_cached(APPLY)).await {
            Ok(statement) => statement,
            Err(error) => return vec![Err(error); events.len().max(1)],
        };
        if crash::is_due(Point::InTransaction)
            && let Some(first) = events.first()
            && self.client.batch_execute("BEGIN").await.is_ok()
        {
            let plan = Planned::careful(first, &self.known, |_| true);
            if self.client.query_one(&statement, &plan.call.parameters()).await.is_ok() {
                crash::now(Point::InTransaction);
            }
        }
        match self.apply_each(events).await {
            Ok(outcomes) => return outcomes.into_iter().map(Ok).collect(),
            // One of them. Which, they say themselves when they are sent one by one.
            Err(error) if matches!(error.verdict, Verdict::Reject | Verdict::Retry) => {
                if events.len() > 1 {
                    ::metrics::counter!(metrics::RETRIES, "reason" => "split").increment(1);
                }
            }
            Err(error) => return vec![Err(error); events.len()],
        }
        self.apply_singly(&statement, events).await
    }

    /// Applies events with one message for all of them, as long as none is refused.
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

    /// Applies events with a message for each, all sent at once.
    async fn apply_singly(
        &self,
        statement: &Statement,
        events: &[&Event<'_>],
    ) -> Vec<Result<Outcome, StoreError>> {
        let plans: Vec<Planned<'_>> =
            events.iter().map(|event| Planned::careful(event, &self.known, |_| true)).collect();
        let parameters: Vec<_> = plans.iter().map(|plan| plan.call.parameters()).collect();
        // Answers come in the order of the calls, so that each is due within the limit after the one before.
        let mut answers: FuturesOrdered<_> =
            parameters.iter().map(|parameters| self.client.query_one(statement, parameters)).collect();
        let mut results = Vec::with_capacity(events.len());
        let mut refused = Vec::new();
        while results.len() < events.len() {
            let answer = self.in_time(async { answers.next().await.transpose() }).await;
            results.push(match answer {
                Ok(Some(row)) => answered(events[results.len()], &plans[results.len()], &row),
                // There are as many answers as calls.
                Ok(None) => Err(self.no_answer()),
                Err(error) => {
                    if error.verdict == Verdict::Reject {
                        refused.push(results.len());
                    }
                    let broken = error.verdict == Verdict::Reconnect;
                    let result = Err(error);
                    if broken {
                        // Nothing more comes on this connection.
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

    /// Applies a batch in at most two all-or-nothing transactions: first the events whose locks are free, then, if `may_leave`
    /// is false, the contended ones. Deferred events get no outcome. This keeps accounts that appear in every batch from
    /// serialising all pipelines.
    ///
    /// None of them may claim a handle ([`Event::claims_handle`]): its locks depend on what other claims have just written,
    /// so that it may have to be tried again, and all others with it. They have [`Session::apply_claims`].
    ///
    /// The outcomes stand in the order of the events. Nothing is durable before [`Session::flush`] has answered on this
    /// same connection.
    ///
    /// # Errors
    ///
    /// Not all of it was applied. Where the verdict is not [`Verdict::Reconnect`] they can be tried one by one.
    pub async fn apply_together(
        &self,
        events: &[&Event<'_>],
        may_leave: bool,
    ) -> Result<Vec<Option<Outcome>>, StoreError> {
        self.note_epochs(events).await?;
        let mut outcomes: Vec<Option<Outcome>> = vec![None; events.len()];
        let mut take = |indexes: Vec<usize>, done: Vec<Outcome>| {
            for (index, outcome) in indexes.into_iter().zip(done) {
                outcomes[index] = Some(outcome);
            }
        };
        // Before anything that is sent side by side: what waits for its preparation would come too late.
        let statement = self.in_time(self.client.prepare_cached(APPLY)).await?;
        let (free, rest) = self.lock_free(events).await?;
        let chosen = |indexes: &[usize]| -> Vec<&Event<'_>> { indexes.iter().map(|&i| events[i]).collect() };
        // A transaction that failed ends with COMMIT all the same: it is rolled back.
        let (done, ended) = join(
            self.apply_at_once(&statement, &chosen(&free), true),
            self.in_time(self.client.batch_execute("COMMIT")),
        )
        .await;
        take(free, done?);
        ended?;
        if !may_leave {
            let done = self.apply_at_once(&statement, &chosen(&rest), false).await?;
            take(rest, done);
        }
        Ok(outcomes)
    }

    /// Applies events that claim handles in one transaction: all of them or none. The outcomes stand in the order of the
    /// events. Nothing is durable before [`Session::flush`] has answered on this same connection.
    ///
    /// # Errors
    ///
    /// None of it was applied. Where the verdict is not [`Verdict::Reconnect`] they can be tried one by one.
    pub async fn apply_claims(&self, events: &[&Event<'_>]) -> Result<Vec<Option<Outcome>>, StoreError> {
        self.note_epochs(events).await?;
        let statement = self.in_time(self.client.prepare_cached(APPLY)).await?;
        Ok(self.apply_at_once(&statement, events, false).await?.into_iter().map(Some).collect())
    }

    /// Begins a transaction and takes the locks that nobody has. Returns the events that have all of theirs, and the
    /// others, by their index.
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

    /// Applies events with one call. `locked`: it is in a transaction that has their locks.
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

    /// Waits for an answer, but not for ever.
    async fn in_time<T>(&self, answer: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
        self.client.unanswered.fetch_add(1, Ordering::Relaxed);
        match tokio::time::timeout(self.answer_limit, answer).await {
            Ok(answer) => {
                self.client.unanswered.fetch_sub(1, Ordering::Relaxed);
                Ok(answer?)
            }
            Err(_) => Err(self.no_answer()),
        }
    }

    fn no_answer(&self) -> StoreError {
        StoreError::new(Verdict::Reconnect, format!("no answer within {:?}", self.answer_limit))
    }

    /// Finds the operations that the database refuses, each tried alone in a transaction that is rolled back.
    async fn isolate(&self, event: &Event<'_>, error: &StoreError) -> Result<Outcome, StoreError> {
        // Without operations it is the event itself, whose index is one past them.
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
            // What was refused may pass by now, because something newer has come that it gives way to.
            let plan = Planned::careful(event, &self.known, |_| true);
            match self.in_time(self.client.query_one(&statement, &plan.call.parameters())).await {
                Ok(row) => return answered(event, &plan, &row),
                Err(error) if error.verdict == Verdict::Reject => {}
                Err(error) => return Err(error),
            }
            // Each one passes alone, together they do not: none can be singled out.
            bad = (0..event.ops.len()).map(|index| (index, error.reject())).collect();
        }
        Ok(Outcome::Rejected(bad))
    }

    /// Makes everything that was committed on this connection durable, `events` among it.
    ///
    /// The transactions themselves commit without waiting for the disk. This one waits, and the log is written in
    /// order: when it has answered, all of them are on disk. It must write something of its own: a transaction
    /// that writes nothing flushes nothing.
    ///
    /// # Errors
    ///
    /// The flush has not answered: everything since the last one counts as not applied.
    pub async fn flush(&self, events: &[&Event<'_>]) -> Result<(), StoreError> {
        let statement = self.in_time(self.client.prepare_cached(FLUSH)).await?;
        self.in_time(self.client.query_one(&statement, &[])).await?;
        let dids = events.iter().flat_map(|event| std::iter::once(&event.repo).chain(&event.mentions));
        self.known.insert(dids.map(|did| &**did));
        Ok(())
    }
}

fn too_few() -> StoreError {
    StoreError::new(Verdict::Halt, "standpipe.apply answered for fewer operations than it was given")
}

/// What the function answered about one event.
fn answered(event: &Event<'_>, plan: &Planned<'_>, row: &Row) -> Result<Outcome, StoreError> {
    let answers: Vec<bool> = row.get(0);
    if answers.len() == plan.len() { Ok(outcome(event, &plan.in_order(&answers))) } else { Err(too_few()) }
}

/// Adds up what the function says of each operation.
fn outcome(event: &Event<'_>, changed: &[bool]) -> Outcome {
    let mut kinds: Vec<(Kind, u32, u32)> = Vec::with_capacity(1);
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

/// The driver's options from the operator's URL. Nothing of ours is among them: poolers refuse or drop what they do not know,
/// so that our settings are made on the connection (settings.rs).
fn connect_options(url: &str) -> anyhow::Result<tokio_postgres::Config> {
    // The parser's error may quote what it could not read, a password among it.
    let mut options: tokio_postgres::Config = url.parse().map_err(|_| {
        anyhow::anyhow!("DATABASE_URL is not a connection string that the driver understands")
    })?;
    options
        .application_name("standpipe")
        .connect_timeout(Duration::from_secs(5))
        .tcp_user_timeout(Duration::from_secs(20))
        .keepalives_idle(Duration::from_secs(15))
        .keepalives_interval(Duration::from_secs(5))
        .keepalives_retries(3);
    Ok(options)
}

fn hook_error(error: &StoreError) -> HookError {
    // The pool's error carries text alone: the verdict goes in front of it, for `From<PoolError>`.
    let verdict = if error.verdict == Verdict::Halt { HALT } else { "" };
    HookError::message(format!("{verdict}{}", error.message))
}

/// Prefix of a message that needs operator action.
const HALT: &str = "halt: ";

/// A connection out of the pool. It goes back unless a request on it is unanswered, whatever the reason: then it is closed.
struct Lent {
    /// There until the drop.
    object: Option<Object>,
    unanswered: AtomicUsize,
    discarded: bool,
    cancel: Arc<Cancel>,
}

impl Deref for Lent {
    type Target = Object;

    fn deref(&self) -> &Object {
        match &self.object {
            Some(object) => object,
            None => unreachable!("only the drop takes it"),
        }
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Object {
        match &mut self.object {
            Some(object) => object,
            None => unreachable!("only the drop takes it"),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        if self.unanswered.load(Ordering::Relaxed) > 0 {
            self.cancel.end(object);
        } else if self.discarded {
            drop(Object::take(object));
        }
    }
}

/// Ends connections on which the server is still busy. Only those: a cancellation that has nothing to cancel may meet what
/// is asked next, and poolers have been seen to fall over it.
struct Cancel {
    tls: MakeRustlsConnect,
    /// How many are being ended.
    ending: watch::Sender<usize>,
}

impl Cancel {
    fn new(tls: MakeRustlsConnect) -> Self {
        Self { tls, ending: watch::channel(0).0 }
    }

    /// Waits until those that are being ended have ended, but not for long.
    async fn ended(&self) {
        let mut ending = self.ending.subscribe();
        let _ =
            tokio::time::timeout(Duration::from_millis(1500), ending.wait_for(|ending| *ending == 0)).await;
    }

    /// Has the server stop what it does for a connection, and closes that. Until then it counts as one of the pool's.
    fn end(self: &Arc<Self>, client: Object) {
        let runtime = tokio::runtime::Handle::try_current();
        let (Ok(runtime), false) = (runtime, client.is_closed()) else {
            drop(Object::take(client));
            return;
        };
        let cancel = Arc::clone(self);
        cancel.ending.send_modify(|ending| *ending += 1);
        runtime.spawn(async move {
            let cancelled = async {
                // The answer to whatever is asked next comes after that to what was cancelled.
                client.cancel_token().cancel_query(cancel.tls.clone()).await.ok()?;
                client.simple_query("SELECT 1").await.ok()
            };
            let _ = tokio::time::timeout(CANCEL, cancelled).await;
            drop(Object::take(client));
            cancel.ending.send_modify(|ending| *ending -= 1);
        });
    }
}
