//! The loop: read, apply, acknowledge.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use redis::RedisResult;
use redis::aio::MultiplexedConnection;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::apply::{Context, interpret};
use crate::config::{Config, TransactionMode};
use crate::crash::{self, Point};
use crate::event::{EntryId, Epochs, Event, Kind, Op, Reason, Reject, Rejected};
use crate::metrics;
use crate::status::{State, Status, lock, now_ms};
use crate::store::verdict::Verdict;
use crate::store::{Outcome, Session, Store, StoreError};
use crate::stream::dead_letters::{Buried, bury};
use crate::stream::entry::{Batch, Entry};
use crate::stream::group::LeaveOut;
use crate::stream::{Keys, Redis, backoff, epochs, group, is_nogroup};

/// Entries in hand are kept fresh this often: the Node.js workers claim what is idle for ten seconds.
const KEEP_FRESH: Duration = Duration::from_secs(3);
/// A batch larger than this halves the next read: entries are of any size, memory is not.
const BATCH_BYTES: usize = 8 * 1024 * 1024;
/// Entries claimed at a time: more than a batch, because one search for another program's later work covers all of them.
const CLAIM_BYTES: usize = 16 * 1024 * 1024;
/// Maximum operations per transaction: five pipelines then use less than half of the locks that a server with PostgreSQL's
/// defaults can hold.
const TRANSACTION_OPERATIONS: usize = 400;
/// How many batches in a row may defer events to the next one; after that the pipeline waits for the locks.
const LEAVE_ROUNDS: u32 = 4;
/// How long a halted pipeline waits before it tries again.
const HALTED: Duration = Duration::from_secs(10);
/// Report PostgreSQL as unresponsive after this long.
const NO_ANSWER: Duration = Duration::from_secs(5);

/// One of N: a consumer of the group with a connection to Redis of its own.
pub struct Pipeline {
    index: usize,
    consumer: String,
    /// All names of this process.
    consumers: Vec<String>,
    keys: Keys,
    redis: Redis,
    store: Store,
    status: Arc<Status>,
    batch_size: usize,
    transaction: TransactionMode,
    dead_letter_budget: u64,
    claim_idle: Duration,
    max_attempts: u64,
    in_hand: InHand,
    /// Whether our consumer names are ours.
    names: watch::Receiver<Names>,
    /// Whether an operator has paused us.
    pause: watch::Receiver<bool>,
}

/// The entries that the pipelines of this process hold.
pub type InHand = Arc<Mutex<HashSet<EntryId>>>;

/// Whether this process has its consumer names to itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Names {
    /// It has.
    Ours,
    /// Not yet, or no longer: the reason for waiting.
    Waiting(State),
}

/// An entry on its way through.
struct Work<'a> {
    entry: &'a Entry,
    /// `None` when the whole entry is unreadable.
    event: Option<Event<'a>>,
    rejected: Vec<Rejected>,
    /// The database's outcome; `None` until it is committed.
    outcome: Option<Outcome>,
    /// Whether it is left to the next batch.
    left: bool,
}

/// The scope of a replay of delivered entries.
#[derive(Default)]
struct Replay {
    /// Hashes of URIs of records and accounts: entries about one of them.
    touched: HashSet<u64>,
    /// Also everything that was acknowledged, and then whatever came after it about the same.
    acknowledged: bool,
}

impl Replay {
    fn wants(&mut self, op: &Op<'_>, pending: bool) -> bool {
        let uri = hash(&op.uri);
        if self.acknowledged && !pending {
            self.touched.insert(uri);
        }
        self.touched.contains(&uri)
    }
}

impl Pipeline {
    /// The pipeline with this number.
    #[must_use]
    pub fn new(
        index: usize,
        config: &Config,
        redis: Redis,
        store: Store,
        status: Arc<Status>,
        in_hand: InHand,
        names: watch::Receiver<Names>,
    ) -> Self {
        Self {
            claim_idle: config.claim_idle,
            max_attempts: config.max_attempts.into(),
            in_hand,
            names,
            pause: watch::channel(false).1,
            index,
            consumer: config.consumer_name(index),
            consumers: config.consumer_names(),
            keys: Keys::new(config),
            redis,
            store,
            status,
            batch_size: config.batch_size,
            transaction: config.transaction,
            dead_letter_budget: config.dead_letter_max_bytes,
        }
    }

    /// Pauses while this is true.
    #[must_use]
    pub fn paused_by(mut self, pause: watch::Receiver<bool>) -> Self {
        self.pause = pause;
        self
    }

    /// Works until `stop`, then finishes what is in hand.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut delays = backoff();
        while !stop.is_cancelled() {
            if !self.wait_for_name(&stop).await {
                break;
            }
            let began = Instant::now();
            let Err(error) = self.session(&stop).await else { continue };
            // A connection in doubt is dropped: a read whose answer was lost has still moved entries to us.
            metrics::count(metrics::REDIS_RECONNECTS, 1);
            if began.elapsed() > Duration::from_secs(30) {
                delays = backoff();
            }
            self.say(State::WaitingForRedis { reason: error.to_string() });
            self.sleep(delays.next(), &stop).await;
        }
        self.leave().await;
        self.say(State::Stopped);
    }

    /// Waits until this process has its consumer names to itself; `false` when it is time to stop.
    async fn wait_for_name(&mut self, stop: &CancellationToken) -> bool {
        loop {
            let names = self.names.borrow_and_update().clone();
            match names {
                Names::Ours => return true,
                // It is the same for all pipelines: one reports it.
                Names::Waiting(state) if self.index > 0 => {
                    self.status.pipeline(self.index, |status| {
                        status.enter(state);
                    });
                }
                Names::Waiting(state) => self.say(state),
            }
            let changed = tokio::select! {
                changed = self.names.changed() => changed.is_ok(),
                () = stop.cancelled() => false,
            };
            if !changed {
                return false;
            }
        }
    }

    /// Removes our consumer from the group when nothing is pending under it, so that the next start under this name need not
    /// wait to see whether we are still running.
    async fn leave(&self) {
        if let Ok(mut connection) = self.redis.connect().await {
            let name = Some(self.consumer.as_str());
            // If it fails the name stays, and the next start waits for it to fall silent.
            let _ = group::remove_idle_consumers(&mut connection, &self.keys, Duration::ZERO, name).await;
        }
    }

    /// One connection to Redis. Entries unfinished when it breaks are pending, and the next one starts with them.
    async fn session(&self, stop: &CancellationToken) -> RedisResult<()> {
        let mut left = Vec::new();
        let ended = self.read_and_work(&mut left, stop).await;
        let mut in_hand = lock(&self.in_hand);
        for entry in left {
            in_hand.remove(&entry.id);
        }
        ended
    }

    /// First the entries that we received earlier and never acknowledged, then new ones. `left`: entries that a batch defers to
    /// the next, because other pipelines hold locks on the same accounts.
    async fn read_and_work(&self, left: &mut Vec<Entry>, stop: &CancellationToken) -> RedisResult<()> {
        let mut rounds = 0;
        let mut connection = self.redis.connect().await?;
        let mut missing = backoff();
        let mut after = Some(EntryId::default());
        let mut count = self.batch_size;
        // Pipelines take turns, so that not all of them scan at once.
        let every = self.claim_idle / 2;
        let mut next_claim = Instant::now() + every.mul_f64(fastrand::f64());
        while !stop.is_cancelled() && *self.names.borrow() == Names::Ours {
            if self.is_paused() {
                self.finish_left(&mut connection, left, stop).await?;
                self.rest(stop).await;
                continue;
            }
            if after.is_none() && Instant::now() >= next_claim {
                self.finish_left(&mut connection, left, stop).await?;
                self.claim(&mut connection, stop).await?;
                next_claim = Instant::now() + every;
            }
            let read = if let Some(id) = after {
                group::read_pending(&mut connection, &self.keys, &self.consumer, count, id).await
            } else {
                let room = count.saturating_sub(left.len()).max(1);
                group::read_new(&mut connection, &self.keys, &self.consumer, room, left.is_empty()).await
            };
            let mut batch = match read {
                Ok(batch) => batch,
                Err(error) if is_nogroup(&error) => {
                    metrics::note_ensured(group::ensure(&mut connection, &self.keys).await?);
                    // Without a pause, a group that is destroyed again and again would keep a processor busy.
                    self.sleep(missing.next(), stop).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.say(State::Running);
            if let Some(id) = &mut after {
                match batch.entries.iter().map(|entry| entry.id).chain(batch.gone.iter().copied()).max() {
                    Some(last) => *id = last,
                    None => after = None,
                }
            }
            if after.is_some() {
                count = self.next_count(&batch, count);
                self.work_again(&mut connection, batch, stop).await?;
                continue;
            }
            let anything_new = !batch.entries.is_empty();
            if anything_new {
                missing = backoff();
            }
            let may_leave = anything_new && rounds < LEAVE_ROUNDS && left.len() <= count / 2;
            batch.entries.append(left);
            count = self.next_count(&batch, count);
            *left = self.work(&mut connection, batch, may_leave, stop).await?;
            rounds = if left.is_empty() { 0 } else { rounds + 1 };
        }
        if *self.names.borrow() == Names::Ours {
            self.finish_left(&mut connection, left, stop).await?;
        }
        Ok(())
    }

    /// Works on deferred entries until they are done, however long others hold locks on the same accounts.
    async fn finish_left(
        &self,
        connection: &mut MultiplexedConnection,
        left: &mut Vec<Entry>,
        stop: &CancellationToken,
    ) -> RedisResult<()> {
        let batch = Batch { entries: std::mem::take(left), gone: Vec::new() };
        self.work(connection, batch, false, stop).await.map(drop)
    }

    /// True while an operator has paused us. If the control side is gone, we count as running: nobody could resume us.
    fn is_paused(&self) -> bool {
        *self.pause.borrow() && self.pause.has_changed().is_ok()
    }

    /// Waits until resumed. Everything in hand is acknowledged; the names stay ours.
    async fn rest(&self, stop: &CancellationToken) {
        let (mut pause, mut names) = (self.pause.clone(), self.names.clone());
        self.say(State::Paused);
        tokio::select! {
            _ = pause.wait_for(|paused| !paused) => self.say(State::Running),
            _ = names.wait_for(|names| *names != Names::Ours) => {}
            () = stop.cancelled() => {}
        }
    }

    /// Takes over entries of consumers that are gone. Not while PostgreSQL is down: every holder is waiting for it too, and
    /// taking entries from each other would not help.
    async fn claim(
        &self,
        connection: &mut MultiplexedConnection,
        stop: &CancellationToken,
    ) -> RedisResult<()> {
        let mut start = Some("0-0".to_owned());
        while start.is_some() && !stop.is_cancelled() && !self.is_paused() {
            // As many as fit into memory: one search for another program's later work covers all of them. A search per page
            // would read the whole stream each time.
            let mut batch = Batch::default();
            let mut bytes = 0;
            while bytes < CLAIM_BYTES
                && let Some(from) = start.take()
            {
                if self.store.ping(Duration::from_secs(2)).await.is_err() {
                    break;
                }
                let page = group::claim(
                    connection,
                    &self.keys,
                    &self.consumer,
                    self.claim_idle,
                    &from,
                    self.batch_size,
                );
                let page = match page.await {
                    Ok(page) => page,
                    // The next read meets it and has the group created.
                    Err(error) if is_nogroup(&error) => break,
                    Err(error) => return Err(error),
                };
                start = page.next;
                bytes += page.batch.entries.iter().map(Entry::size).sum::<usize>();
                batch.entries.extend(page.batch.entries);
                batch.gone.extend(page.batch.gone);
            }
            if !batch.entries.is_empty() {
                crash::at(Point::WhileClaiming);
            }
            {
                // Entries held by another pipeline of this process are being worked on, whichever consumer owns them by now.
                let in_hand = lock(&self.in_hand);
                batch.entries.retain(|entry| !in_hand.contains(&entry.id));
            }
            if !batch.entries.is_empty() {
                metrics::count(metrics::CLAIMED, batch.entries.len() as u64);
                info!(
                    consumer = self.consumer,
                    entries = batch.entries.len(),
                    "took over entries of a consumer that is gone"
                );
            }
            self.work_again(connection, batch, stop).await?;
        }
        Ok(())
    }

    /// Works on entries that were delivered before. An entry that was delivered often is processed alone: if it crashed the
    /// process, its neighbours get through. The count alone never makes a dead letter.
    async fn work_again(
        &self,
        connection: &mut MultiplexedConnection,
        mut batch: Batch,
        stop: &CancellationToken,
    ) -> RedisResult<()> {
        if let (Some(first), Some(last)) = (batch.entries.first(), batch.entries.last()) {
            let (first, last, count) = (first.id, last.id, batch.entries.len());
            let times = group::deliveries(connection, &self.keys, &self.consumer, first, last, count).await?;
            let often: HashSet<EntryId> =
                times.into_iter().filter(|(_, times)| *times > self.max_attempts).map(|(id, _)| id).collect();
            let (alone, together) = batch.entries.into_iter().partition(|entry| often.contains(&entry.id));
            batch.entries = together;
            self.work(connection, batch, false, stop).await?;
            for entry in Vec::<Entry>::into_iter(alone) {
                let batch = Batch { entries: vec![entry], gone: Vec::new() };
                self.work(connection, batch, false, stop).await?;
            }
            return Ok(());
        }
        self.work(connection, batch, false, stop).await.map(drop)
    }

    /// Applies a batch and acknowledges it: the only place from which an acknowledgement starts. Returns what is left,
    /// where `may_leave` allows it.
    async fn work(
        &self,
        connection: &mut MultiplexedConnection,
        batch: Batch,
        may_leave: bool,
        stop: &CancellationToken,
    ) -> RedisResult<Vec<Entry>> {
        if !batch.gone.is_empty() {
            metrics::note_removed(batch.gone.len() as u64);
            group::give_up(connection, &self.keys, &batch.gone).await?;
        }
        if batch.entries.is_empty() {
            return Ok(Vec::new());
        }
        ::metrics::histogram!(metrics::BATCH_SIZE).record(batch.entries.len() as f64);
        self.status.pipeline(self.index, |status| status.in_flight = batch.entries.len() as u64);
        let ids: Vec<EntryId> = batch.entries.iter().map(|entry| entry.id).collect();
        lock(&self.in_hand).extend(&ids);
        crash::at(Point::AfterRead);
        let done = tokio::select! {
            done = self.finish(connection.clone(), &batch.entries, may_leave, stop) => done,
            never = self.keep_fresh(connection.clone(), &ids) => never,
        };
        let acknowledged = match done {
            Ok(Some((done, left))) => self.acknowledge(connection, &done).await.map(|()| left),
            Ok(None) => Ok(HashSet::new()),
            Err(error) => Err(error),
        };
        {
            let left = acknowledged.as_ref().ok();
            let mut in_hand = lock(&self.in_hand);
            for id in ids.iter().filter(|id| !left.is_some_and(|left| left.contains(id))) {
                in_hand.remove(id);
            }
        }
        let left = acknowledged?;
        self.status.pipeline(self.index, |status| status.in_flight = left.len() as u64);
        Ok(batch.entries.into_iter().filter(|entry| left.contains(&entry.id)).collect())
    }

    /// Keeps entries fresh while they are being applied. A failure is not handled here: the acknowledgement fails too.
    async fn keep_fresh<T>(&self, mut connection: MultiplexedConnection, ids: &[EntryId]) -> T {
        loop {
            tokio::time::sleep(KEEP_FRESH).await;
            let _ = group::keep_fresh(&mut connection, &self.keys, &self.consumer, ids).await;
        }
    }

    /// Applies entries, and where another program works beside us, what it has made of the same records since. Returns
    /// what is done, and which are left.
    ///
    /// `None` when it is time to stop and the database is down: the entries stay pending.
    async fn finish<'a>(
        &self,
        mut connection: MultiplexedConnection,
        entries: &'a [Entry],
        may_leave: bool,
        stop: &CancellationToken,
    ) -> RedisResult<Option<(Vec<Work<'a>>, HashSet<EntryId>)>> {
        let epochs = self.epochs_of(&mut connection, entries).await?;
        let mut worked = Vec::with_capacity(entries.len());
        for part in entries.chunks(self.batch_size.max(entries.len().min(2 * self.batch_size))) {
            let works = part.iter().map(|entry| Work::new(entry, &epochs)).collect();
            let Some(part) = self.apply(works, may_leave, stop).await else { return Ok(None) };
            worked.extend(part);
        }
        let (left, done): (Vec<_>, Vec<_>) = worked.into_iter().partition(|work| work.left);
        let left = left.iter().map(|work| work.entry.id).collect();
        // Asked after the commit: entries delivered to another program from now on find our rows, even if it has only just
        // started.
        let others = match group::has_others(&mut connection, &self.keys).await {
            Err(error) if is_nogroup(&error) => false,
            others => others?,
        };
        if others && !self.apply_later(connection, &done, stop).await? {
            return Ok(None);
        }
        Ok(Some((done, left)))
    }

    /// The epochs of the stream, where one of these entries does not say which it belongs to.
    async fn epochs_of(
        &self,
        connection: &mut MultiplexedConnection,
        entries: &[Entry],
    ) -> RedisResult<Epochs> {
        if entries.iter().all(epochs::is_named) {
            return Ok(Epochs::default());
        }
        epochs::read(connection, &self.keys).await
    }

    /// Applies again what came after these entries about the same records and accounts, and was delivered already: to
    /// another program perhaps, which leaves no revisions and no tombstones by which we could know that it is newer. What
    /// is delivered from now on finds our rows. `false` when it is time to stop.
    async fn apply_later(
        &self,
        mut connection: MultiplexedConnection,
        done: &[Work<'_>],
        stop: &CancellationToken,
    ) -> RedisResult<bool> {
        let touched = done
            .iter()
            .filter_map(|work| work.event.as_ref())
            .flat_map(|event| event.ops.iter().map(|op| hash(&op.uri)))
            .collect();
        let Some(first) = done.iter().map(|work| work.entry.id).min() else { return Ok(true) };
        let replay = Replay { touched, acknowledged: false };
        Ok(self.replay_delivered(&mut connection, first, replay, stop).await?.is_some())
    }

    /// Before the first entry: applies what was acknowledged between the first entry that is pending and the last that was
    /// delivered, when another program has worked in the group. It may be newer than what is pending, and the other program
    /// left nothing by which we could know. Pending entries are applied when they are claimed or read again.
    ///
    /// Returns how many entries were looked at; `None` when it is time to stop.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn take_over(&self, stop: &CancellationToken) -> RedisResult<Option<u64>> {
        let mut connection = self.redis.connect().await?;
        let first = group::first_pending(&mut connection, &self.keys).await?;
        let Some(first) = first else { return Ok(Some(0)) };
        info!(%first, "replaying what another program did after entries that are still pending");
        let replay = Replay { acknowledged: true, ..Replay::default() };
        self.replay_delivered(&mut connection, first.before(), replay, stop).await
    }

    /// Applies the entries delivered after `after`, to any consumer, that are part of the replay; acknowledges nothing. Repeats
    /// this with entries delivered meanwhile, because the other program may have removed again what the replay restored, until
    /// there are no more; later deliveries find our rows. Entries pending with this process are left out: they are applied
    /// anyway, and leave what shows how old they are.
    ///
    /// Returns how many entries were looked at; `None` when it is time to stop.
    async fn replay_delivered(
        &self,
        connection: &mut MultiplexedConnection,
        mut after: EntryId,
        mut replay: Replay,
        stop: &CancellationToken,
    ) -> RedisResult<Option<u64>> {
        let mut looked_at = 0;
        loop {
            let until = group::last_delivered(connection, &self.keys).await?;
            let mut found = false;
            while after < until {
                let leave_out =
                    LeaveOut { consumers: &self.consumers, pending_at_first: replay.touched.is_empty() };
                let page = group::delivered(connection, &self.keys, after, until, self.batch_size, leave_out)
                    .await?;
                let Some(last) = page.last else { break };
                after = last;
                looked_at += page.looked_at;
                let (entries, pending): (Vec<_>, Vec<_>) = page.entries.into_iter().unzip();
                let epochs = self.epochs_of(connection, &entries).await?;
                let mut batch = Vec::new();
                for (entry, pending) in entries.iter().zip(pending) {
                    let mut work = Work::new(entry, &epochs);
                    if work.event.as_mut().is_some_and(|event| event.keep(|op| replay.wants(op, pending))) {
                        batch.push(work);
                    }
                }
                found |= !batch.is_empty();
                if !batch.is_empty() && self.apply(batch, false, stop).await.is_none() {
                    return Ok(None);
                }
            }
            if !found {
                return Ok(Some(looked_at));
            }
            replay.acknowledged = false;
        }
    }

    /// Applies entries until every one is durable, among the rejected, or left. Waits for the database as long as it takes.
    ///
    /// `None` when it is time to stop and the database is down: the entries stay pending.
    async fn apply<'a>(
        &self,
        mut batch: Vec<Work<'a>>,
        may_leave: bool,
        stop: &CancellationToken,
    ) -> Option<Vec<Work<'a>>> {
        let mut delays = backoff();
        loop {
            let error = match self.store.session().await {
                Ok(session) => {
                    let attempt =
                        AssertUnwindSafe(self.answered(self.attempt(&session, &mut batch, may_leave, stop)));
                    let error = match attempt.catch_unwind().await {
                        Ok(Ok(())) => return Some(batch),
                        Ok(Err(error)) => Ok(error),
                        Err(panic) => Err(panicked(panic.as_ref())),
                    };
                    // Commits that were answered on this connection may be gone: all of it again, from the first.
                    session.discard();
                    for work in &mut batch {
                        work.outcome = None;
                        work.left = false;
                    }
                    match error {
                        Ok(error) => error,
                        Err(reject) => return Box::pin(self.apply_alone(batch, reject, stop)).await,
                    }
                }
                Err(error) => error,
            };
            if !self.wait_for_postgres(error, delays.next(), stop).await {
                return None;
            }
        }
    }

    /// After a panic over these entries: each alone, so that it costs only the one that it is over.
    async fn apply_alone<'a>(
        &self,
        mut batch: Vec<Work<'a>>,
        reject: Reject,
        stop: &CancellationToken,
    ) -> Option<Vec<Work<'a>>> {
        if let [work] = batch.as_mut_slice() {
            error!(entry = %work.entry.id, reason = reject.message, "an entry made the program panic: it is a dead letter");
            work.reject_all(reject);
            return Some(batch);
        }
        let mut done = Vec::with_capacity(batch.len());
        for work in batch {
            done.extend(self.apply(vec![work], false, stop).await?);
        }
        Some(done)
    }

    /// Waits for the database, and reports when it takes long. It never gives up: the statement timeout decides that.
    async fn answered<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(NO_ANSWER) => {}
        }
        self.say(State::WaitingForPostgres { reason: format!("no answer within {} s", NO_ANSWER.as_secs()) });
        work.await
    }

    /// One connection: every event in its own transaction, repetitions of those that lost to others, then the flush.
    async fn attempt(
        &self,
        session: &Session,
        batch: &mut [Work<'_>],
        may_leave: bool,
        stop: &CancellationToken,
    ) -> Result<(), StoreError> {
        let began = Instant::now();
        let mut delays = backoff();
        let mut together = self.transaction == TransactionMode::Batch;
        loop {
            let open: Vec<usize> = (0..batch.len()).filter(|&index| batch[index].is_open()).collect();
            if open.is_empty() {
                break;
            }
            if together && open.len() > 1 {
                // Once. Events that fail together are applied one by one.
                together = false;
                self.attempt_together(session, batch, open, may_leave).await?;
                continue;
            }
            let events: Vec<&Event<'_>> =
                open.iter().filter_map(|&index| batch[index].event.as_ref()).collect();
            for &index in &open {
                crash::panic_over("apply", &batch[index].entry.data);
            }
            let results = session.apply(&events).await;
            let mut again = None;
            for (&index, result) in open.iter().zip(results) {
                match result {
                    Ok(Outcome::Rejected(bad)) => batch[index].reject(bad),
                    Ok(applied) => batch[index].outcome = Some(applied),
                    Err(error) if error.verdict == Verdict::Retry => again = Some(error),
                    Err(error) => return Err(error),
                }
            }
            if let Some(error) = again
                && !self.wait_for_postgres(error.clone(), delays.next(), stop).await
            {
                return Err(error);
            }
        }
        ::metrics::histogram!(metrics::TRANSACTION_SECONDS).record(began.elapsed().as_secs_f64());
        crash::at(Point::AfterCommit);
        let events: Vec<&Event<'_>> =
            batch.iter().filter(|work| !work.left).filter_map(|work| work.event.as_ref()).collect();
        session.flush(&events).await?;
        crash::at(Point::AfterFlush);
        ::metrics::histogram!(metrics::BATCH_SECONDS).record(began.elapsed().as_secs_f64());
        self.say(State::Running);
        Ok(())
    }

    /// Applies what is open in as few transactions as the locks allow. Still open afterwards is everything that shared one
    /// with an event which the database refused, or for which it had not room. `may_leave`: what others are at work on is
    /// left to the next batch.
    async fn attempt_together(
        &self,
        session: &Session,
        batch: &mut [Work<'_>],
        open: Vec<usize>,
        may_leave: bool,
    ) -> Result<(), StoreError> {
        let (claims, others): (Vec<usize>, Vec<usize>) = open
            .into_iter()
            .partition(|&index| batch[index].event.as_ref().is_some_and(Event::claims_handle));
        let parts = by_operations(batch, &others).into_iter().map(|part| (part, false));
        let parts: Vec<_> =
            parts.chain(by_operations(batch, &claims).into_iter().map(|part| (part, true))).collect();
        for (indexes, claims) in parts {
            let events: Vec<&Event<'_>> =
                indexes.iter().filter_map(|&index| batch[index].event.as_ref()).collect();
            let done = if claims {
                session.apply_claims(&events).await
            } else {
                session.apply_together(&events, may_leave).await
            };
            match done {
                Ok(outcomes) => {
                    for (&index, outcome) in indexes.iter().zip(outcomes) {
                        batch[index].left = outcome.is_none();
                        batch[index].outcome = outcome;
                    }
                }
                Err(error) if matches!(error.verdict, Verdict::Reject | Verdict::Retry) => {
                    ::metrics::counter!(metrics::RETRIES, "reason" => "split").increment(1);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Everything in `done` is durable or rejected.
    async fn acknowledge(
        &self,
        connection: &mut MultiplexedConnection,
        done: &[Work<'_>],
    ) -> RedisResult<()> {
        let good: Vec<EntryId> =
            done.iter().filter(|work| work.rejected.is_empty()).map(|work| work.entry.id).collect();
        group::acknowledge(connection, &self.keys, &good).await?;
        let mut finished = good.len() as u64;
        for work in done.iter().filter(|work| !work.rejected.is_empty()) {
            crash::at(Point::BeforeDeadLetter);
            match bury(connection, &self.keys, work.entry, &work.rejected, self.dead_letter_budget).await? {
                Buried::Done => {
                    crash::at(Point::AfterDeadLetter);
                    finished += 1;
                    self.status.pipeline(self.index, |status| status.dead_letters += 1);
                    for letter in &work.rejected {
                        metrics::dead_letter(letter.reject.reason);
                    }
                }
                Buried::Already => finished += 1,
                Buried::Full => metrics::count(metrics::DEAD_LETTERS_FULL, 1),
            }
        }
        let now = now_ms();
        let seconds = ::metrics::histogram!(metrics::EVENT_SECONDS);
        // Looking up a counter by its labels costs more than counting.
        let mut types: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut operations: BTreeMap<Kind, (u32, u32)> = BTreeMap::new();
        for work in done {
            let took = now.saturating_sub(work.entry.id.ms);
            seconds.record(took as f64 / 1000.0);
            self.status.latency.add(took);
            self.status.count(&work.entry.event_type, !work.rejected.is_empty());
            *types.entry(metrics::type_label(&work.entry.event_type)).or_default() += 1;
            if let Some(Outcome::Applied(kinds)) = &work.outcome {
                for (kind, total, applied) in kinds {
                    let sum = operations.entry(*kind).or_default();
                    *sum = (sum.0 + total, sum.1 + applied);
                }
            }
        }
        for (event_type, count) in types {
            ::metrics::counter!(metrics::ENTRIES, "type" => event_type).increment(count);
        }
        for (kind, (total, applied)) in operations {
            metrics::operations(kind, total, applied);
        }
        self.status.acknowledged(self.index, finished);
        Ok(())
    }

    /// Reports the problem and waits; `false` when it is time to stop instead.
    async fn wait_for_postgres(
        &self,
        error: StoreError,
        delay: Option<Duration>,
        stop: &CancellationToken,
    ) -> bool {
        let StoreError { verdict, message: reason, .. } = error;
        let (label, delay, state) = match verdict {
            // The store has singled out what can be rejected; a refusal of everything else is our own fault.
            Verdict::Halt | Verdict::Reject => {
                ("halt", Some(HALTED), State::Halted { reason: reason.clone() })
            }
            Verdict::Reconnect => ("reconnect", delay, State::WaitingForPostgres { reason: reason.clone() }),
            Verdict::Retry => ("retry", delay, State::WaitingForPostgres { reason: reason.clone() }),
        };
        ::metrics::counter!(metrics::RETRIES, "reason" => label).increment(1);
        self.status.pipeline(self.index, |status| status.retries += 1);
        // Losing to another transaction now and then is not an outage.
        if verdict != Verdict::Retry || delay.is_none_or(|delay| delay > Duration::from_millis(500)) {
            self.say(state);
        }
        !self.sleep(delay, stop).await
    }

    /// Sleeps; `true` when it is time to stop.
    async fn sleep(&self, delay: Option<Duration>, stop: &CancellationToken) -> bool {
        tokio::select! {
            () = tokio::time::sleep(delay.unwrap_or(Duration::from_secs(5))) => false,
            () = stop.cancelled() => true,
        }
    }

    /// Notes the state, and logs it where it is a new one: an outage is one line, not one per attempt.
    fn say(&self, state: State) {
        let mut before = State::default();
        self.status.pipeline(self.index, |status| before = status.enter(state.clone()));
        if std::mem::discriminant(&before) == std::mem::discriminant(&state) {
            return;
        }
        let consumer = &self.consumer;
        match state {
            State::WaitingForRedis { reason } => {
                warn!(consumer, reason, "waiting for Redis; nothing is lost");
            }
            State::WaitingForPostgres { reason } => {
                warn!(
                    consumer,
                    reason, "waiting for PostgreSQL; nothing is lost, and this pipeline reads nothing more"
                );
            }
            State::Halted { reason } => {
                error!(consumer, reason, "halted: operator action needed; retrying every {HALTED:?}");
            }
            State::Paused => info!(consumer, "paused manually; entries in hand are acknowledged"),
            State::Running if !matches!(before, State::Starting | State::WaitingForLease { .. }) => {
                // At the same level as the outage that it ends.
                warn!(consumer, "running again");
            }
            _ => {}
        }
    }

    fn next_count(&self, batch: &Batch, count: usize) -> usize {
        let bytes: usize = batch.entries.iter().map(Entry::size).sum();
        if bytes > BATCH_BYTES {
            (count / 2).max(1)
        } else if bytes < BATCH_BYTES / 4 {
            (count * 2).min(self.batch_size)
        } else {
            count
        }
    }
}

/// A panic's message, as the reason for a dead letter.
fn panicked(panic: &(dyn std::any::Any + Send)) -> Reject {
    let said = panic.downcast_ref::<String>().map(String::as_str);
    let said = said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    let said: String = said.chars().take(500).collect();
    Reject::new(Reason::Panic, format!("the program panicked: {said}; please report it with this entry"))
}

/// Stands for a URI: one that is taken for another is applied once more than it has to be.
fn hash(uri: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    uri.hash(&mut hasher);
    hasher.finish()
}

/// Cuts a batch where its operations become too many for one transaction. Each takes a lock or a few.
fn by_operations(batch: &[Work<'_>], open: &[usize]) -> Vec<Vec<usize>> {
    let mut parts: Vec<Vec<usize>> = Vec::new();
    let mut operations = TRANSACTION_OPERATIONS;
    for &index in open {
        let count = batch[index].event.as_ref().map_or(0, |event| event.ops.len());
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

impl<'a> Work<'a> {
    fn new(entry: &'a Entry, epochs: &Epochs) -> Self {
        let read = catch_unwind(AssertUnwindSafe(|| {
            crash::panic_over("interpret", &entry.data);
            interpret(entry, Context::now(epochs))
        }));
        match read.unwrap_or_else(|panic| Err(panicked(panic.as_ref()))) {
            Ok(mut event) => {
                let rejected = std::mem::take(&mut event.rejected);
                Self { entry, event: Some(event), rejected, outcome: None, left: false }
            }
            Err(reject) => {
                let mut work = Self { entry, event: None, rejected: Vec::new(), outcome: None, left: false };
                work.reject_all(reject);
                work
            }
        }
    }

    /// Nothing of the entry can be applied.
    fn reject_all(&mut self, reject: Reject) {
        self.rejected.push(Rejected { reject, op: self.entry.data.clone() });
        self.event = None;
    }

    /// Whether the database still has work to do. An event of no interest has no repository and needs none.
    fn is_open(&self) -> bool {
        self.outcome.is_none()
            && !self.left
            && self.event.as_ref().is_some_and(|event| !event.repo.is_empty())
    }

    /// Sets aside the operations that the database refuses; the others are retried without them.
    fn reject(&mut self, mut bad: Vec<(usize, Reject)>) {
        let Some(event) = &mut self.event else { return };
        bad.sort_by_key(|(index, _)| std::cmp::Reverse(*index));
        for (index, reject) in bad {
            if index < event.ops.len() {
                event.ops.remove(index);
                let op = event.sources.remove(index).to_owned();
                self.rejected.push(Rejected { reject, op });
            } else {
                // Not an operation: the event itself.
                self.reject_all(reject);
                return;
            }
        }
    }
}
