//! The reader: origin -> stream. It never waits for PostgreSQL, and slows down instead of discarding.
//!
//! A session is one connection to the origin and one to Redis. An error on either ends the session, and the next one
//! starts from the cursor in Redis: Redis may have lost its last second, stream and cursor together, and a reader that
//! continued from its own memory would leave a hole below a valid cursor.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt as _};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::append::{Appender, Item};
use super::checker::Checker;
use super::handles::Handles;
use super::plan::{Plan, Restart};
use super::rounds;
use super::verifier::Verifier;
use super::wanted::{CHUNK, Filter};
use super::{Origin, OriginError};
use crate::config::{Config, OnFutureCursor, VerifyMode};
use crate::directory::Directory;
use crate::metrics;
use crate::status::{State, Status};
use crate::stream::append::{AppendError, Cursor, CursorError};
use crate::stream::gap::Gap;
use crate::stream::lease::{self, Lease};
use crate::stream::{Redis, Stream, StreamError};
use crate::time::{Backoff, now_ms};

/// Queue between origin and Redis. A slow Redis then slows the origin.
const QUEUE_BYTES: u32 = 16 * 1024 * 1024;
/// A persistent problem is logged again after this time.
const SAY_AGAIN: Duration = Duration::from_mins(1);
/// A condition that needs operator action is checked again after this time.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// The reader and what it needs.
pub struct Reader {
    pub(super) config: Arc<Config>,
    redis: Redis,
    pub(super) status: Arc<Status>,
    /// Our identity as a holder of the lease.
    pub(super) token: String,
    /// Whether an operator has paused us.
    pause: watch::Receiver<bool>,
    /// Where accounts are looked up; `None` when nothing is verified.
    directory: Option<Arc<Directory>>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("Redis: {0}")]
    Redis(#[from] StreamError),
    #[error("{0}")]
    Append(#[from] AppendError),
    #[error("{0}")]
    Origin(#[from] OriginError),
    /// Operator action needed.
    #[error("{0}")]
    Operator(String),
    /// It is not known which accounts are wanted.
    #[error(
        "no worker has listed the accounts of standpipe.repos in Redis (WANTED_DIDS=tracked); one with the same setting does"
    )]
    Untracked,
}

impl End {
    /// Identifies repeated log lines: digits, such as times and ports, may differ.
    fn cause(&self) -> String {
        self.to_string().replace(|c: char| c.is_ascii_digit(), "")
    }
}

impl From<CursorError> for End {
    fn from(error: CursorError) -> Self {
        match error {
            CursorError::Redis(error) => Self::Redis(error),
            CursorError::Unreadable { .. } => Self::Operator(error.to_string()),
        }
    }
}

/// State that the reader keeps between sessions.
#[derive(Default)]
struct Memory {
    /// The last known position before the lowest unacknowledged one, in case Redis loses everything.
    acked: Option<i64>,
    /// Where to start in a new numbering, until the stream has an entry of it.
    restart: Option<Restart>,
    /// Whether we held the lease.
    leased: bool,
    /// The last logged reason for the end of a session, and when it was logged.
    said: Option<(String, Instant)>,
}

impl Reader {
    /// A reader that pauses while `pause` is true.
    ///
    /// # Errors
    ///
    /// It is to verify, and there is no authority for https:// to trust.
    pub fn new(
        config: Arc<Config>,
        redis: Redis,
        status: Arc<Status>,
        pause: watch::Receiver<bool>,
    ) -> anyhow::Result<Self> {
        let token = lease::token(&config.consumer_id);
        let directory = match config.verify {
            VerifyMode::Off => None,
            VerifyMode::Log | VerifyMode::On => Some(Arc::new(Directory::new(&config)?)),
        };
        Ok(Self { config, redis, status, token, pause, directory })
    }

    /// Reads from `origin` until `stop`.
    pub async fn run(self, mut origin: impl Origin, stop: CancellationToken) {
        let mut memory = Memory::default();
        let mut delays = Backoff::default();
        while !stop.is_cancelled() {
            if self.is_paused() {
                self.rest(memory.leased, &stop).await;
                continue;
            }
            let began = Instant::now();
            let ended = self.until_paused(&mut origin, &mut memory, &stop).await;
            self.status.reader(|reader| {
                if std::mem::take(&mut reader.connected) {
                    reader.connected_ms = now_ms();
                }
            });
            let Err(end) = ended else { continue };
            if stop.is_cancelled() && matches!(end, End::Untracked) {
                break;
            }
            if began.elapsed() > Duration::from_secs(30) {
                delays.reset();
            }
            match &end {
                End::Origin(OriginError::Reset(reason)) => {
                    memory.restart = Some(Restart { from: Some(0), gap: Gap::new(reason.clone(), None) });
                    memory.acked = None;
                    continue;
                }
                End::Origin(OriginError::Future(reason)) => {
                    self.enter(State::Halted { reason: reason.clone() });
                    if self.future_cursor(&mut memory) {
                        continue;
                    }
                    error!(reason, "the reader has stopped");
                    stop.cancelled().await;
                    break;
                }
                _ => {}
            }
            let delay = self.report(&end, delays.pause(), &mut memory);
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.pause_begins() => {}
                () = stop.cancelled() => {}
            }
        }
        if let Ok(mut stream) = self.redis.connect().await {
            // If this fails, the lease expires by itself.
            let _ = stream.release_lease(Lease::Reader, &self.token).await;
        }
        self.enter(State::Stopped);
    }

    /// Runs a session. A pause ends it like a stop: queued items are still appended, and the origin is disconnected.
    async fn until_paused(
        &self,
        origin: &mut impl Origin,
        memory: &mut Memory,
        stop: &CancellationToken,
    ) -> Result<(), End> {
        let until = stop.child_token();
        let session = self.session(origin, memory, &until);
        tokio::pin!(session);
        tokio::select! {
            ended = &mut session => ended,
            () = self.pause_begins() => {
                until.cancel();
                session.await
            }
        }
    }

    /// Enters the state, and logs it if it is news: an outage is one line per minute, not one per attempt. Returns how
    /// long to wait.
    fn report(&self, end: &End, delay: Duration, memory: &mut Memory) -> Duration {
        let reason = end.to_string();
        self.enter(match end {
            End::Redis(_) | End::Append(_) => State::WaitingForRedis { reason: reason.clone() },
            End::Operator(_)
            | End::Untracked
            | End::Origin(OriginError::Operator(_) | OriginError::Future(_)) => {
                State::Halted { reason: reason.clone() }
            }
            End::Origin(_) => State::WaitingForRelay { reason: reason.clone() },
        });
        let cause = end.cause();
        let news = memory.said.as_ref().is_none_or(|(said, at)| *said != cause || at.elapsed() > SAY_AGAIN);
        if news {
            memory.said = Some((cause, Instant::now()));
        }
        match end {
            End::Operator(_) | End::Origin(OriginError::Operator(_)) => {
                if news {
                    error!(reason, "the reader has stopped; operator action needed");
                }
                LOOK_AGAIN
            }
            End::Origin(OriginError::Away { retry_after: Some(wanted), .. }) => {
                let delay = delay.max(*wanted);
                if news {
                    warn!(reason, wait = ?delay, "the relay asks us to back off; nothing is lost");
                }
                delay
            }
            _ => {
                if news {
                    warn!(reason, "the reader waits, then resumes from the cursor in Redis; nothing is lost");
                }
                delay
            }
        }
    }

    /// True while an operator has paused us. If the control side is gone, we count as running: nobody could resume us.
    fn is_paused(&self) -> bool {
        *self.pause.borrow() && self.pause.has_changed().is_ok()
    }

    /// Resolves when an operator pauses us.
    async fn pause_begins(&self) {
        if self.pause.clone().wait_for(|paused| *paused).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until resumed. We keep our lease, so that nobody else reads in the meantime.
    async fn rest(&self, leased: bool, stop: &CancellationToken) {
        info!("the reader is paused manually; the relay keeps new events");
        self.enter(State::Paused);
        let hold = async {
            if !leased {
                return std::future::pending::<()>().await;
            }
            loop {
                if let Ok(mut stream) = self.redis.connect().await {
                    while stream.take_lease(Lease::Reader, &self.token).await.is_ok() {
                        tokio::time::sleep(lease::LIFE / 4).await;
                    }
                }
                tokio::time::sleep(lease::LIFE / 10).await;
            }
        };
        let mut pause = self.pause.clone();
        tokio::select! {
            () = hold => {}
            _ = pause.wait_for(|paused| !paused) => info!("the reader resumes"),
            () = stop.cancelled() => {}
        }
    }

    pub(super) fn enter(&self, state: State) {
        self.status.reader(|reader| {
            reader.enter(state);
        });
    }

    /// Whether the configuration lets us resume, and from where.
    fn future_cursor(&self, memory: &mut Memory) -> bool {
        let (from, what) = match self.config.on_future_cursor {
            OnFutureCursor::Stop => return false,
            OnFutureCursor::Live => (None, "continuing from now (ON_FUTURE_CURSOR=live)"),
            OnFutureCursor::Oldest => (Some(0), "continuing from its oldest event (ON_FUTURE_CURSOR=oldest)"),
        };
        memory.restart = Some(Restart {
            from,
            gap: Gap::new(format!("the cursor was in the relay's future; {what}"), None),
        });
        true
    }

    async fn session(
        &self,
        origin: &mut impl Origin,
        memory: &mut Memory,
        stop: &CancellationToken,
    ) -> Result<(), End> {
        let mut stream = self.redis.connect().await?;
        let ensured = stream.ensure().await?;
        metrics::note_ensured(ensured);
        memory.leased = self.take_lease(&mut stream, stop).await?;
        if !memory.leased {
            return Ok(());
        }
        let filter = match &self.config.wanted_dids {
            Some(wanted) => Some(Filter::new(wanted.clone(), self.redis.connect().await?, stop).await?),
            None => None,
        };
        let mut cursor = stream.cursor().await?;
        let plan = Plan::new(origin.name(), &mut cursor, &mut memory.acked, memory.restart.as_ref());
        if let (None, Some(position)) = (cursor.position, memory.acked) {
            warn!(position, "Redis lost the cursor: going back to the last position known to be applied");
        }
        if cursor.is_current {
            memory.acked = cursor.acked.or(memory.acked);
        }

        origin.open(plan.from).await?;
        self.status.reader(|reader| {
            reader.enter(State::Running);
            reader.connected = true;
            reader.cursor = cursor.position;
        });

        let (sender, arrived) = mpsc::channel(4096);
        let (settle, mut settled) = watch::channel(None);
        let (filtered, arrived) = filtered(filter, arrived);
        let (verified, receiver) = self.verified(arrived, &cursor).await?;
        let ended = {
            let arrivals = Self::arrivals(origin, sender, &mut settled, &plan, stop);
            let appender = Appender {
                reader: self,
                stream: &mut stream,
                cursor: &mut cursor,
                plan: &plan,
                run_id: None,
                stop,
            };
            let stream = both(filtered, both(verified, appender.run(receiver, settle)));
            tokio::pin!(arrivals, stream);
            // An error of the stream ends the session at once; after one of the origin, queued items are still
            // appended.
            tokio::select! {
                ended = &mut stream => ended,
                read = &mut arrivals => stream.await.and(read),
            }
        };
        let last = *settled.borrow_and_update();
        Self::leave(origin, last, &ended).await?;
        if plan.appended.load(Ordering::Relaxed) && !matches!(ended, Err(End::Origin(OriginError::Reset(_))))
        {
            memory.restart = None;
        }
        if cursor.is_current {
            memory.acked = cursor.acked.or(memory.acked);
        }
        ended
    }

    /// Tells the origin what was settled last, and disconnects gracefully.
    async fn leave(
        origin: &mut impl Origin,
        settled: Option<i64>,
        ended: &Result<(), End>,
    ) -> Result<(), End> {
        if let Some(position) = settled
            && !matches!(ended, Err(End::Origin(_)))
        {
            origin.settled(position).await?;
        }
        if ended.is_ok() {
            origin.close().await;
        }
        Ok(())
    }

    /// Verifies what arrives, if it is to be: the work, and the queue of what has been verified.
    async fn verified(
        &self,
        arrived: mpsc::Receiver<Item>,
        cursor: &Cursor,
    ) -> Result<(BoxFuture<'static, Result<(), End>>, mpsc::Receiver<Item>), End> {
        let Some(directory) = self.directory.clone() else {
            return Ok((std::future::ready(Ok(())).boxed(), arrived));
        };
        // Redis may have lost its last second: nothing is carried over from the previous session.
        let recent = Arc::default();
        let verifier = Verifier::new(
            self.config.verify,
            self.redis.connect().await?,
            Arc::clone(&directory),
            Arc::clone(&recent),
            cursor,
        );
        let checker = Checker::new(self.redis.connect().await?, Arc::clone(&directory), recent);
        let handles = Handles::new(self.redis.connect().await?, directory, self.config.max_stream_len);
        let (to, queue) = mpsc::channel(4096);
        let work = async move {
            tokio::select! {
                ended = verifier.run(arrived, to) => ended,
                ended = rounds::run(checker) => ended.map_err(End::from),
                ended = rounds::run(handles) => ended.map_err(End::from),
            }
        };
        Ok((work.boxed(), queue))
    }

    /// Origin -> queue, until the origin ends it or `stop`.
    async fn arrivals(
        origin: &mut impl Origin,
        queue: mpsc::Sender<Item>,
        settled: &mut watch::Receiver<Option<i64>>,
        plan: &Plan,
        stop: &CancellationToken,
    ) -> Result<(), End> {
        let room = Arc::new(Semaphore::new(QUEUE_BYTES as usize));
        // The gap before the first arrival.
        let mut gap = plan.gap.clone();
        loop {
            let mut arrival = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                Ok(()) = settled.changed() => {
                    let position = *settled.borrow_and_update();
                    if let Some(position) = position {
                        origin.settled(position).await?;
                    }
                    continue;
                }
                arrival = origin.next() => arrival?,
            };
            arrival.gap = gap.take().or(arrival.gap);
            let entries: usize = arrival.entries.iter().map(|entry| entry.data.len() + 64).sum();
            let bytes = entries + arrival.frame.as_ref().map_or(0, Bytes::len);
            let bytes = u32::try_from(bytes).unwrap_or(QUEUE_BYTES).clamp(64, QUEUE_BYTES);
            let Ok(room) = Arc::clone(&room).acquire_many_owned(bytes).await else { return Ok(()) };
            if queue.send(Item { arrival, _room: room }).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Waits for the lease; `false` when it is time to stop.
    async fn take_lease(&self, stream: &mut Stream, stop: &CancellationToken) -> Result<bool, End> {
        let mut said = false;
        while !stream.take_lease(Lease::Reader, &self.token).await? {
            if !std::mem::replace(&mut said, true) {
                let reason = format!("another reader holds the lease {}", self.redis.keys().lease);
                info!(reason, "the reader waits; a lease that is not renewed expires after 10 s");
                self.enter(State::WaitingForLease { reason });
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
                () = stop.cancelled() => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// Leaves out what is not wanted: the work, and the queue of what is.
fn filtered(
    filter: Option<Filter>,
    arrived: mpsc::Receiver<Item>,
) -> (BoxFuture<'static, Result<(), End>>, mpsc::Receiver<Item>) {
    let Some(filter) = filter else { return (std::future::ready(Ok(())).boxed(), arrived) };
    let (to, queue) = mpsc::channel(CHUNK);
    (filter.run(arrived, to).boxed(), queue)
}

/// Runs both until the appender ends, or the other one fails. What it has passed on is still appended.
async fn both(
    before: impl Future<Output = Result<(), End>>,
    appended: impl Future<Output = Result<(), End>>,
) -> Result<(), End> {
    tokio::pin!(appended);
    tokio::select! {
        ended = &mut appended => ended,
        ended = before => {
            ended?;
            appended.await
        }
    }
}
