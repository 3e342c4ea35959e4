//! Tasks: messages whose type is the name of one of the operator's functions. They have a stream of their own, so that one that
//! takes a minute holds up no event, and are handled in the database, in one transaction with the result.
//!
//! - `hand`: the tasks that this process has begun with
//! - `list`: what is waiting, running, done or failed

mod hand;
pub mod list;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::config::Config;
use crate::crash::{self, Point};
use crate::event::{Entry, EntryId, Reason, Reject, Task};
use crate::metrics;
use crate::mutex::lock;
use crate::pipeline::{Ended, Names};
use crate::status::{RunningTask, State, Status};
use crate::stop::{Stopped, or_stop};
use crate::store::handlers::{Handled, Handlers};
use crate::store::verdict::Verdict;
use crate::stream::dead_letters::Buried;
use crate::stream::{Redis, Stream, StreamError, is_nogroup};
use crate::time::{Backoff, now_ms};
use hand::Hand;

/// How often to look after the tasks in hand, and to tell others that they are.
const KEEP_FRESH: Duration = Duration::from_secs(3);
/// The most tasks in hand that are looked after.
const IN_HAND: usize = 10_000;
/// The pause after the first failure; doubled by each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_mins(5);
/// How long to leave a task to somebody else who works on it.
const BUSY: Duration = Duration::from_secs(1);
/// How long to wait for room among the dead letters, or for an operator.
const OPERATOR: Duration = Duration::from_secs(10);

/// Works on tasks, with one pipeline per `HANDLER_PIPELINES`. All share one name in the consumer group.
pub struct Worker {
    consumer: String,
    pipelines: usize,
    redis: Redis,
    handlers: Handlers,
    dead_letter_budget: u64,
    claim_idle: Duration,
    status: Arc<Status>,
    hand: Mutex<Hand>,
    /// Whether this process has its consumer name to itself.
    names: watch::Receiver<Names>,
    /// Whether an operator has paused us.
    pause: watch::Receiver<bool>,
}

impl Worker {
    /// A worker that has not begun yet.
    #[must_use]
    pub fn new(
        config: &Config,
        redis: &Redis,
        handlers: Handlers,
        status: Arc<Status>,
        names: watch::Receiver<Names>,
        pause: watch::Receiver<bool>,
    ) -> Self {
        for index in 0..config.handler_pipelines {
            status.handler(index, |handler| handler.since_ms = now_ms());
        }
        Self {
            consumer: config.consumer_id.clone(),
            pipelines: config.handler_pipelines,
            redis: redis.of_tasks(),
            handlers,
            dead_letter_budget: config.dead_letter_max_bytes,
            claim_idle: config.claim_idle,
            status,
            hand: Mutex::default(),
            names,
            pause,
        }
    }

    /// Works until `stop`, then finishes the tasks that are being worked on.
    pub async fn run(self, stop: CancellationToken) {
        let worker = Arc::new(self);
        let mut parts = JoinSet::new();
        for index in 0..worker.pipelines {
            parts.spawn(Arc::clone(&worker).pipeline(index, stop.clone()));
        }
        // Longer than they: what is being worked on is kept fresh to the end.
        let end = CancellationToken::new();
        let keeper = tokio::spawn(Arc::clone(&worker).keep(end.clone()));
        while let Some(ended) = parts.join_next().await {
            if let Err(panic) = ended {
                error!(%panic, "a pipeline for tasks ended unexpectedly");
                return;
            }
        }
        end.cancel();
        let _ = keeper.await;
        if let Ok(mut stream) = worker.redis.connect().await {
            // If this fails, the name stays: it holds nothing.
            let _ = stream.remove_idle_consumers(Duration::ZERO, Some(&worker.consumer)).await;
        }
    }

    async fn pipeline(self: Arc<Self>, index: usize, stop: CancellationToken) {
        let (mut names, mut delays) = (self.names.clone(), Backoff::default());
        while or_stop(&stop, names.wait_for(|names| *names == Names::Ours))
            .await
            .is_ok_and(|names| names.is_ok())
        {
            let began = Instant::now();
            let Err(Ended::Redis(error)) = self.session(index, &stop).await else { continue };
            metrics::count(metrics::REDIS_RECONNECTS, 1);
            if began.elapsed() > Duration::from_secs(30) {
                delays.reset();
            }
            self.say(index, State::WaitingForRedis { reason: error.to_string() });
            let _ = or_stop(&stop, tokio::time::sleep(delays.pause())).await;
        }
        self.say(index, State::Stopped);
    }

    /// Works over one connection to Redis.
    async fn session(&self, index: usize, stop: &CancellationToken) -> Result<(), Ended> {
        let mut stream = self.redis.connect().await?;
        while !stop.is_cancelled() && *self.names.borrow() == Names::Ours {
            if *self.pause.borrow() && self.pause.has_changed().is_ok() {
                self.say(index, State::Paused);
                let _ = or_stop(stop, self.pause.clone().wait_for(|paused| !paused)).await?;
                continue;
            }
            self.say(index, State::Running);
            let Some(entry) = self.next(&mut stream, stop).await? else { continue };
            let id = entry.id;
            let worked = self.work(index, &mut stream, &entry, stop).await;
            self.status.handler(index, |handler| handler.task = None);
            let again = match &worked {
                Ok(pause) => pause.map(|pause| Instant::now() + pause),
                // It may be done: that is seen when it is begun again.
                Err(_) => Some(Instant::now()),
            };
            lock(&self.hand).end(id, again);
            worked?;
        }
        Ok(())
    }

    /// The next task: one whose time for another attempt has come, or a new one.
    async fn next(&self, stream: &mut Stream, stop: &CancellationToken) -> Result<Option<Entry>, Ended> {
        let due = lock(&self.hand).due(Instant::now());
        if let Some(id) = due {
            let entry = self.fetch(stream, id).await;
            match &entry {
                Ok(Some(_)) => {}
                Ok(None) => lock(&self.hand).end(id, None),
                Err(_) => lock(&self.hand).end(id, Some(Instant::now())),
            }
            return Ok(entry?);
        }
        let full = lock(&self.hand).full(Instant::now());
        if let Some(pause) = full {
            or_stop(stop, tokio::time::sleep(pause.min(BUSY))).await?;
            return Ok(None);
        }
        let batch = match stream.read_new(&self.consumer, 1, true).await {
            Err(error) if is_nogroup(&error) => {
                stream.ensure_tasks().await?;
                return Ok(None);
            }
            batch => batch?,
        };
        let entry = batch.entries.into_iter().next();
        // Otherwise somebody here works on it already.
        Ok(entry.filter(|entry| lock(&self.hand).begin(entry.id)))
    }

    /// A task that was begun before; `None` if it is finished.
    async fn fetch(&self, stream: &mut Stream, id: EntryId) -> Result<Option<Entry>, StreamError> {
        let entry = stream.task(id).await?;
        if entry.is_none() {
            stream.finish_task(id).await?;
        }
        Ok(entry)
    }

    /// Works on a task until it is finished, or has to wait for so long.
    async fn work(
        &self,
        index: usize,
        stream: &mut Stream,
        entry: &Entry,
        stop: &CancellationToken,
    ) -> Result<Option<Duration>, Ended> {
        let task = match Task::of(entry) {
            Ok(task) => task,
            Err(message) => {
                let reject = Reject::new(Reason::Undecodable, message);
                return self.bury(stream, entry, &entry.id.to_string(), reject).await;
            }
        };
        let (function, id) = (&task.function, &task.id);
        let running = RunningTask { function: function.clone(), since_ms: now_ms() };
        self.status.handler(index, |handler| handler.task = Some(running));
        let handled = self.handle(index, &task, &entry.id.to_string(), stop).await?;
        match handled {
            Handled::Done | Handled::Before => {
                crash::at(Point::AfterTask);
                stream.finish_task(entry.id).await?;
                let outcome = if handled == Handled::Done { "done" } else { "repeated" };
                metrics::task(outcome);
                self.status.handler(index, |handler| handler.done += u64::from(handled == Handled::Done));
                Ok(None)
            }
            Handled::Busy => Ok(Some(BUSY)),
            Handled::Failed(times, reject) => {
                metrics::task("retried");
                let pause = FIRST_PAUSE.saturating_mul(1 << (times - 1).min(12)).min(LONGEST_PAUSE);
                debug!(
                    function,
                    id,
                    times,
                    reason = reject.message,
                    ?pause,
                    "a task failed: it is tried again"
                );
                Ok(Some(pause.mul_f64(1.0 + fastrand::f64() / 10.0)))
            }
            Handled::Refused(reject) => {
                debug!(
                    function,
                    id,
                    reason = reject.message,
                    "a task failed for good: it becomes a dead letter"
                );
                let buried = self.bury(stream, entry, id, reject).await?;
                self.status.handler(index, |handler| handler.failed += u64::from(buried.is_none()));
                Ok(buried)
            }
        }
    }

    /// Calls the function, and waits for the database as long as necessary.
    async fn handle(
        &self,
        index: usize,
        task: &Task,
        entry: &str,
        stop: &CancellationToken,
    ) -> Result<Handled, Stopped> {
        let mut delays = Backoff::default();
        loop {
            let began = Instant::now();
            let error = match self.handlers.handle(task, &self.consumer, entry).await {
                Ok(handled) => {
                    self.say(index, State::Running);
                    if !matches!(handled, Handled::Busy | Handled::Before) {
                        metrics::task_took(began.elapsed());
                    }
                    return Ok(handled);
                }
                Err(error) => error,
            };
            let (reason, mut pause) = (error.message, delays.pause());
            if error.verdict == Verdict::Halt {
                pause = OPERATOR;
                self.say(index, State::Halted { reason });
            } else {
                self.say(index, State::WaitingForPostgres { reason });
            }
            or_stop(stop, tokio::time::sleep(pause)).await?;
        }
    }

    async fn bury(
        &self,
        stream: &mut Stream,
        entry: &Entry,
        id: &str,
        reject: Reject,
    ) -> Result<Option<Duration>, Ended> {
        let reason = reject.reason;
        match stream.bury_task(entry, id, reject, self.dead_letter_budget).await? {
            Buried::Done => {
                metrics::dead_letter(reason);
                metrics::task("failed");
                Ok(None)
            }
            Buried::Already => Ok(None),
            Buried::Full => {
                metrics::count(metrics::DEAD_LETTERS_FULL, 1);
                Ok(Some(OPERATOR))
            }
        }
    }

    /// Looks after the tasks in hand until `end`: tells other processes that they are, finds those that a broken connection or an
    /// earlier process left behind, and takes over those of processes that are gone.
    async fn keep(self: Arc<Self>, end: CancellationToken) {
        let mut kept: Option<Stream> = None;
        let (mut claimed, mut from) = (Instant::now(), String::new());
        while !end.is_cancelled() {
            if *self.names.borrow() == Names::Ours {
                // If it fails, the pipelines say so.
                let _ = self.look_after(&mut kept, &mut claimed, &mut from).await;
            }
            let pause = if kept.is_some() { KEEP_FRESH } else { BUSY };
            let _ = or_stop(&end, tokio::time::sleep(pause)).await;
        }
    }

    async fn look_after(
        &self,
        kept: &mut Option<Stream>,
        claimed: &mut Instant,
        from: &mut String,
    ) -> Result<(), StreamError> {
        let mut stream = self.redis.reuse(kept).await?;
        let in_hand = lock(&self.hand).all();
        let begun = match stream.begun_tasks(&self.consumer, IN_HAND).await {
            Err(error) if is_nogroup(&error) => {
                stream.ensure_tasks().await?;
                Vec::new()
            }
            begun => begun?,
        };
        lock(&self.hand).add(begun, Instant::now());
        stream.keep_fresh(&self.consumer, &in_hand).await?;
        let takes_more = !*self.pause.borrow() && lock(&self.hand).full(Instant::now()).is_none();
        if takes_more && (claimed.elapsed() >= self.claim_idle / 2 || !from.is_empty()) {
            let (abandoned, next) = stream.claim_tasks(&self.consumer, self.claim_idle, from).await?;
            (*claimed, *from) = (Instant::now(), next);
            let tasks = lock(&self.hand).add(abandoned, Instant::now());
            if tasks > 0 {
                metrics::count(metrics::CLAIMED, tasks as u64);
                info!(tasks, "took over tasks of a process that is gone");
            }
        }
        *kept = Some(stream);
        Ok(())
    }

    /// Records the state, and logs it if it is new.
    fn say(&self, index: usize, state: State) {
        let mut before = State::default();
        self.status.handler(index, |handler| before = handler.enter(state.clone()));
        if std::mem::discriminant(&before) == std::mem::discriminant(&state) {
            return;
        }
        match state {
            State::WaitingForRedis { reason } => warn!(reason, "tasks wait for Redis; nothing is lost"),
            State::WaitingForPostgres { reason } => {
                warn!(reason, "tasks wait for PostgreSQL; nothing is lost");
            }
            State::Halted { reason } => {
                error!(reason, "tasks halted: operator action needed; retrying every {OPERATOR:?}");
            }
            State::Running if !matches!(before, State::Starting) => warn!("tasks: running again"),
            _ => {}
        }
    }
}
