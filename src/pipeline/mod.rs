//! The loop: take entries from the group, apply them, settle them.
//!
//! - `work`: an entry on its way through
//! - `apply`: applying to the database, however long that takes
//! - `settle`: acknowledgements and dead letters
//! - `claim`: taking over the pending entries of other consumers
//! - `lanes`: dealing entries to the pipelines by account
//! - `shared`: what the pipelines of a process have in common
//! - `read`: taking turns to read new entries
//! - `replay`: working alongside another program
//! - `state`: whether the pipeline may run, and its reported state

mod apply;
mod claim;
mod lanes;
mod read;
mod replay;
mod settle;
mod shared;
mod state;
mod work;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, TransactionMode};
use crate::crash::{self, Point};
use crate::event::Entry;
use crate::event::{EntryId, Epochs};
use crate::metrics;
use crate::mutex::lock;
use crate::status::{State, Status};
use crate::stop::{Stopped, or_stop};
use crate::store::Store;
use crate::stream::entry::Batch;
use crate::stream::{Redis, Stream, StreamError, StreamResult, epochs, is_nogroup};
use crate::time::Backoff;
use lanes::LANE_BATCH;
use read::Next;
use work::Work;

pub use shared::Shared;

/// Entries in hand are kept fresh this often: the Node.js workers claim entries that are idle for ten seconds.
const KEEP_FRESH: Duration = Duration::from_secs(3);
/// A batch larger than this halves the next read: entries can be of any size, memory is limited.
const BATCH_BYTES: usize = 8 * 1024 * 1024;

/// One of N pipelines: a consumer of the group with its own connection to Redis.
pub struct Pipeline {
    index: usize,
    consumer: String,
    /// The names of all pipelines of this process.
    consumers: Vec<String>,
    redis: Redis,
    store: Store,
    status: Arc<Status>,
    batch_size: usize,
    transaction: TransactionMode,
    dead_letter_budget: u64,
    claim_idle: Duration,
    max_attempts: u64,
    shared: Arc<Shared>,
    /// Whether this process has its consumer names to itself.
    names: watch::Receiver<Names>,
    /// Whether an operator has paused us.
    pause: watch::Receiver<bool>,
}

/// Why a loop over the stream ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// It was asked to stop.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// Redis cannot be reached, or refuses.
    #[error(transparent)]
    Redis(#[from] StreamError),
}

/// Whether this process has its consumer names to itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Names {
    /// It has.
    Ours,
    /// Not yet, or no longer: the reason for waiting.
    Waiting(State),
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
        shared: Arc<Shared>,
        names: watch::Receiver<Names>,
    ) -> Self {
        Self {
            claim_idle: config.claim_idle,
            max_attempts: config.max_attempts.into(),
            shared,
            names,
            pause: watch::channel(false).1,
            index,
            consumer: config.consumer_name(index),
            consumers: config.consumer_names(),
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

    /// Works until `stop`, then finishes the entries in hand.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut delays = Backoff::default();
        while !stop.is_cancelled() {
            if self.wait_for_name(&stop).await.is_err() {
                break;
            }
            let began = Instant::now();
            let error = match self.session(&stop).await {
                Ok(()) | Err(Ended::Stopped(_)) => continue,
                Err(Ended::Redis(error)) => error,
            };
            // A connection in doubt is dropped: a read whose answer was lost has still assigned entries to us.
            metrics::count(metrics::REDIS_RECONNECTS, 1);
            if began.elapsed() > Duration::from_secs(30) {
                delays.reset();
            }
            self.say(State::WaitingForRedis { reason: error.to_string() });
            let _ = or_stop(&stop, tokio::time::sleep(delays.pause())).await;
        }
        self.leave().await;
        self.say(State::Stopped);
    }

    /// Works over one connection to Redis: first on the entries that we received earlier and never acknowledged, then on
    /// new ones. Entries unfinished when it breaks stay pending, and the next session starts with them.
    async fn session(&self, stop: &CancellationToken) -> Result<(), Ended> {
        let mut stream = self.redis.connect().await?;
        let mut missing = Backoff::default();
        let mut after = Some(EntryId::default());
        let mut count = self.batch_size;
        // Pipelines take turns, so that not all of them scan at once.
        let every = self.claim_idle / 2;
        let mut next_claim = Instant::now() + every.mul_f64(fastrand::f64());
        while !stop.is_cancelled() && *self.names.borrow() == Names::Ours {
            if self.is_paused() {
                self.finish_lane(&mut stream, stop).await?;
                self.rest(stop).await;
                continue;
            }
            if after.is_none() && Instant::now() >= next_claim {
                self.claim(&mut stream, stop).await?;
                next_claim = Instant::now() + every;
            }
            let read = match after {
                Some(id) => stream.read_pending(&self.consumer, count, id).await,
                None => match self.turn(next_claim, stop).await {
                    Some(Next::Waiting(entries)) => Ok(Batch { entries, gone: Vec::new() }),
                    Some(Next::Read(turn)) => self.read(turn, &mut stream, count).await,
                    // Something else is to be done first.
                    None => continue,
                },
            };
            let mut batch = match read {
                Ok(batch) => batch,
                Err(error) if is_nogroup(&error) => {
                    metrics::note_ensured(stream.ensure().await?);
                    // Without a pause, a group that keeps being destroyed would keep a processor busy.
                    or_stop(stop, tokio::time::sleep(missing.pause())).await?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            self.say(State::Running);
            if let Some(id) = &mut after {
                match batch.entries.iter().map(|entry| entry.id).chain(batch.gone.iter().copied()).max() {
                    Some(last) => *id = last,
                    None => after = None,
                }
            }
            count = self.next_count(&batch, count);
            if after.is_some() {
                // Those that were dealt to another lane are being worked on.
                let in_hand = lock(&self.shared.in_hand).clone();
                batch.entries.retain(|entry| !in_hand.contains(&entry.id));
                self.work_again(&mut stream, batch, stop).await?;
                continue;
            }
            if !batch.entries.is_empty() {
                missing.reset();
            }
            self.work(&mut stream, batch, stop).await?;
        }
        if *self.names.borrow() == Names::Ours {
            self.finish_lane(&mut stream, stop).await?;
        }
        Ok(())
    }

    /// Works on what is waiting in our lane, which gets nothing more.
    async fn finish_lane(&self, stream: &mut Stream, stop: &CancellationToken) -> Result<(), Ended> {
        let entries = self.shared.lanes.as_ref().map(|lanes| lanes.close(self.index)).unwrap_or_default();
        self.work(stream, Batch { entries, gone: Vec::new() }, stop).await
    }

    /// Works on entries that were delivered before. An entry that was delivered many times is processed alone: if it is
    /// the one that crashes the process, its neighbours get through. The count alone never makes a dead letter.
    async fn work_again(
        &self,
        stream: &mut Stream,
        mut batch: Batch,
        stop: &CancellationToken,
    ) -> Result<(), Ended> {
        if let (Some(first), Some(last)) = (batch.entries.first(), batch.entries.last()) {
            let (first, last, count) = (first.id, last.id, batch.entries.len());
            let times = stream.deliveries(&self.consumer, first, last, count).await?;
            let often: HashSet<EntryId> =
                times.into_iter().filter(|(_, times)| *times > self.max_attempts).map(|(id, _)| id).collect();
            let (alone, together) = batch.entries.into_iter().partition(|entry| often.contains(&entry.id));
            batch.entries = together;
            self.work(stream, batch, stop).await?;
            for entry in Vec::<Entry>::into_iter(alone) {
                let batch = Batch { entries: vec![entry], gone: Vec::new() };
                self.work(stream, batch, stop).await?;
            }
            return Ok(());
        }
        self.work(stream, batch, stop).await
    }

    /// Applies a batch and acknowledges it: the only place that acknowledges.
    async fn work(&self, stream: &mut Stream, batch: Batch, stop: &CancellationToken) -> Result<(), Ended> {
        if !batch.gone.is_empty() {
            metrics::note_removed(batch.gone.len() as u64);
            stream.give_up(&batch.gone).await?;
        }
        if batch.entries.is_empty() {
            return Ok(());
        }
        ::metrics::histogram!(metrics::BATCH_SIZE).record(batch.entries.len() as f64);
        self.status.pipeline(self.index, |status| status.in_flight = batch.entries.len() as u64);
        let ids: Vec<EntryId> = batch.entries.iter().map(|entry| entry.id).collect();
        lock(&self.shared.in_hand).extend(&ids);
        crash::at(Point::AfterRead);
        let done = tokio::select! {
            done = self.finish(stream.clone(), &batch.entries, stop) => done,
            never = self.keep_fresh(stream.clone(), &ids) => never,
        };
        let acknowledged = match done {
            Ok(done) => self.acknowledge(stream, &done).await.map_err(Ended::from),
            Err(ended) => Err(ended),
        };
        if let (Err(Ended::Redis(_)), Some(lanes)) = (&acknowledged, &self.shared.lanes) {
            // Another pipeline may have read them, and will not read them again.
            lanes.put_back(self.index, batch.entries);
        } else {
            let mut in_hand = lock(&self.shared.in_hand);
            for id in &ids {
                in_hand.remove(id);
            }
        }
        acknowledged?;
        self.status.pipeline(self.index, |status| status.in_flight = 0);
        Ok(())
    }

    /// Keeps entries fresh while they are being applied. A failure is not handled here: the acknowledgement fails too.
    async fn keep_fresh<T>(&self, mut stream: Stream, ids: &[EntryId]) -> T {
        loop {
            tokio::time::sleep(KEEP_FRESH).await;
            let waiting =
                self.shared.lanes.as_ref().map(|lanes| lanes.waiting(self.index)).unwrap_or_default();
            let _ = stream.keep_fresh(&self.consumer, &[ids, &waiting].concat()).await;
        }
    }

    /// Applies entries and, if another program works alongside us, replays later entries about the same records.
    async fn finish<'a>(
        &self,
        mut stream: Stream,
        entries: &'a [Entry],
        stop: &CancellationToken,
    ) -> Result<Vec<Work<'a>>, Ended> {
        let epochs = self.epochs_of(&mut stream, entries).await?;
        let mut done = Vec::with_capacity(entries.len());
        let most = if self.shared.lanes.is_some() { LANE_BATCH } else { self.batch_size };
        for part in entries.chunks(most) {
            let works = part.iter().map(|entry| Work::new(entry, &epochs)).collect();
            done.extend(self.apply(works, stop).await?);
        }
        // Checked after the commit: entries delivered to another program from now on find our rows, even if it has only
        // just started.
        let others = match stream.has_others().await {
            Err(error) if is_nogroup(&error) => false,
            others => others?,
        };
        self.shared.others.store(others, Ordering::Relaxed);
        if others {
            self.apply_later(stream, &done, stop).await?;
        }
        Ok(done)
    }

    /// The epochs of the stream; read only if one of these entries does not name its epoch.
    async fn epochs_of(&self, stream: &mut Stream, entries: &[Entry]) -> StreamResult<Epochs> {
        if entries.iter().all(epochs::is_named) {
            return Ok(Epochs::default());
        }
        stream.epochs().await
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
