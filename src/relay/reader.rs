//! The reader: relay -> stream. It never waits for PostgreSQL, and slows down instead of discarding.
//!
//! A session is one websocket and one connection to Redis. Whatever goes wrong with either ends the session, and the
//! next one starts from the cursor that Redis has: it may have lost its last second, stream and cursor together, and a
//! reader that carried on from its own memory would leave a hole under a clean cursor.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result as AnyResult;
use futures_util::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_tungstenite::Connector;
use tokio_tungstenite::tungstenite::error::CapacityError;
use tokio_tungstenite::tungstenite::{Error as WsError, Message as WsMessage};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::connect::{self, MESSAGE_BYTES, PASSED_OVER_BYTES, Socket};
use super::decode::{Message, decode};
use super::sequence::{Place, QUIET, Sequence};
use crate::config::{Config, MemoryMark, OnFutureCursor};
use crate::crash::{self, Point};
use crate::event::check_rev;
use crate::metrics;
use crate::status::{State, Status};
use crate::stream::append::{
    self, AppendError, Appendix, Budget, Cursor, CursorError, Move, NewEntry, NewLetter,
};
use crate::stream::gap::Gap;
use crate::stream::{Connection, Keys, Redis, StreamError, group, is_oom, lease};
use crate::time::{Backoff, now_ms};

/// Queue between the socket and Redis. A slow Redis then slows the socket.
const QUEUE_BYTES: u32 = 16 * 1024 * 1024;
/// Maximum size of one append. A longer script would hold up the server, and Redis may exceed its memory limit by this much,
/// because it checks the limit before a script and not within.
const APPEND_BYTES: usize = 512 * 1024;
const APPEND_ENTRIES: usize = 500;
/// Beyond this an append is cut into pieces: what was gathered, and then one commit that is larger than all of it.
const PIECE_BYTES: usize = 2 * APPEND_BYTES;
/// How often the cursor, the lease and the marks are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often an unusable frame may cost the connection before it is skipped.
const BAD_FRAME_TRIES: u32 = 3;
/// The same trouble is reported again after this time.
const SAY_AGAIN: Duration = Duration::from_mins(1);
/// A condition that needs operator action is checked again after this time.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A connection that has lasted this long without a frame counts as idle, not as stuck.
const STEADY: Duration = Duration::from_secs(30);
/// Dead letters that the reader keeps of one account.
const LETTERS_PER_ACCOUNT: u64 = 100;

/// The reader and what it needs.
pub struct Reader {
    config: Arc<Config>,
    keys: Keys,
    redis: Redis,
    status: Arc<Status>,
    /// Our identity to the lease.
    token: String,
    /// Whether an operator has paused us.
    pause: watch::Receiver<bool>,
    tls: Connector,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("Redis: {0}")]
    Redis(#[from] StreamError),
    #[error("{0}")]
    Append(#[from] AppendError),
    #[error("relay: {reason}")]
    Relay { reason: String, retry_after: Option<Duration> },
    #[error("the relay restarted its numbering")]
    Reset,
    /// Operator action needed.
    #[error("{0}")]
    Operator(String),
    #[error("{0}")]
    FutureCursor(String),
}

impl End {
    fn relay(reason: impl Into<String>) -> Self {
        Self::Relay { reason: reason.into(), retry_after: None }
    }

    /// The key of a repeated log line: digits, such as times and ports, may differ.
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
    /// The last known position before the lowest that was not acknowledged, should Redis lose everything.
    acked: Option<i64>,
    /// After which position a frame was met that could not be used, and how often.
    bad_frame: Option<(Option<i64>, u32)>,
    /// Where to begin with a new numbering, until something of it is in the stream.
    restart: Option<Restart>,
    /// The position for which the relay said that it no longer has what follows it.
    outdated: Option<i64>,
    /// When a message from the relay was last logged, and how many were suppressed since.
    info: Option<(Instant, u64)>,
    /// The lease was ours.
    leased: bool,
}

/// A new numbering: from which position of it to read, and the gap in front of it.
#[derive(Clone, Debug)]
struct Restart {
    from: Option<i64>,
    gap: Gap,
}

/// A session's starting point.
struct Plan {
    /// The position to ask the relay for; `None` is from now on.
    from: Option<i64>,
    epoch: u64,
    /// In front of what comes first.
    gap: Option<Gap>,
    /// Whether something has been appended.
    appended: AtomicBool,
}

/// One frame's contents and position, on the way from the socket to the stream.
struct Item {
    seq: i64,
    entries: Vec<NewEntry>,
    letters: Vec<NewLetter>,
    missed: BTreeMap<&'static str, u64>,
    rev: String,
    gap: Option<Gap>,
    _room: OwnedSemaphorePermit,
}

impl Reader {
    /// A reader for the configured relay.
    ///
    /// # Errors
    ///
    /// There is no authority for `wss://` to trust.
    pub fn new(
        config: Arc<Config>,
        redis: Redis,
        status: Arc<Status>,
        pause: watch::Receiver<bool>,
    ) -> AnyResult<Self> {
        let token = lease::token(&config.consumer_id);
        let tls = connect::tls(&config)?;
        Ok(Self { keys: Keys::new(&config), config, redis, status, token, pause, tls })
    }

    /// Reads until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut memory = Memory::default();
        let mut delays = Backoff::default();
        let mut said: Option<(String, Instant)> = None;
        while !stop.is_cancelled() {
            if self.is_paused() {
                self.rest(memory.leased, &stop).await;
                continue;
            }
            let began = Instant::now();
            // A pause ends the session like a stop: what is queued is still appended, and the websocket is closed.
            let until = stop.child_token();
            let ended = {
                let session = self.session(&mut memory, &until);
                tokio::pin!(session);
                tokio::select! {
                    ended = &mut session => ended,
                    () = self.pause_begins() => {
                        until.cancel();
                        session.await
                    }
                }
            };
            self.status.reader(|reader| {
                if std::mem::take(&mut reader.connected) {
                    reader.connected_ms = now_ms();
                }
            });
            let Err(end) = ended else { continue };
            if began.elapsed() > Duration::from_secs(30) {
                delays.reset();
            }
            if matches!(end, End::Reset) {
                continue;
            }
            let reason = end.to_string();
            self.status.reader(|reader| {
                reader.enter(match &end {
                    End::Redis(_) | End::Append(_) => State::WaitingForRedis { reason: reason.clone() },
                    End::Relay { .. } | End::Reset => State::WaitingForRelay { reason: reason.clone() },
                    End::FutureCursor(_) | End::Operator(_) => State::Halted { reason: reason.clone() },
                });
            });
            if let End::FutureCursor(_) = end {
                if !self.future_cursor(&mut memory) {
                    error!(reason, "the reader has stopped");
                    stop.cancelled().await;
                    break;
                }
                continue;
            }
            let mut delay = delays.pause();
            let news =
                said.as_ref().is_none_or(|(before, at)| *before != end.cause() || at.elapsed() > SAY_AGAIN);
            if news {
                said = Some((end.cause(), Instant::now()));
            }
            // An outage is a line a minute, not one per attempt.
            match &end {
                End::Operator(_) => {
                    delay = LOOK_AGAIN;
                    if news {
                        error!(reason, "the reader has stopped; operator action needed");
                    }
                }
                End::Relay { retry_after: Some(wanted), .. } => {
                    delay = delay.max(*wanted);
                    if news {
                        warn!(reason, wait = ?delay, "the relay asks us to back off; nothing is lost meanwhile");
                    }
                }
                _ if news => {
                    warn!(
                        reason,
                        "the reader waits and starts again from the cursor in Redis; nothing is lost"
                    );
                }
                _ => {}
            }
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.pause_begins() => {}
                () = stop.cancelled() => {}
            }
        }
        if let Ok(mut connection) = self.redis.connect().await {
            // If this fails the lease runs out by itself.
            let _ = lease::release(&mut connection, &self.keys.lease, &self.token).await;
        }
        self.enter(State::Stopped);
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

    /// Waits until resumed. We keep our lease: nobody else may read meanwhile.
    async fn rest(&self, leased: bool, stop: &CancellationToken) {
        info!("the reader is paused manually; the relay keeps what comes meanwhile");
        self.enter(State::Paused);
        let hold = async {
            if !leased {
                return std::future::pending::<()>().await;
            }
            loop {
                if let Ok(mut connection) = self.redis.connect().await {
                    while lease::take(&mut connection, &self.keys.lease, &self.token).await.is_ok() {
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

    fn enter(&self, state: State) {
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

    async fn session(&self, memory: &mut Memory, stop: &CancellationToken) -> Result<(), End> {
        let mut connection = self.redis.connect().await?;
        let ensured = group::ensure(&mut connection, &self.keys).await?;
        metrics::note_ensured(ensured);
        memory.leased = self.take_lease(&mut connection, stop).await?;
        if !memory.leased {
            return Ok(());
        }
        let mut cursor = append::read_cursor(&mut connection, &self.keys).await?;
        let plan = self.plan(&mut cursor, memory);
        if cursor.position.is_none() && memory.acked.is_some() {
            warn!(
                position = memory.acked,
                "Redis lost the cursor: going back to what was last known to be applied"
            );
        }
        if cursor.is_current {
            memory.acked = cursor.acked.or(memory.acked);
        }

        let tries = memory.bad_frame.map_or(0, |(_, tries)| tries);
        let mut socket = self.open(plan.from, tries).await?;
        metrics::count(metrics::RELAY_CONNECTS, 1);
        info!(relay = self.config.relay_url.relay(), cursor = plan.from, "connected to the relay");
        self.status.reader(|reader| {
            reader.enter(State::Running);
            reader.connected = true;
            reader.cursor = cursor.position;
        });

        let (sender, receiver) = mpsc::channel(4096);
        let room = Arc::new(Semaphore::new(QUEUE_BYTES as usize));
        let ended = {
            let frames = self.frames(&mut socket, sender, room, &plan, memory, stop);
            let stream = self.append(&mut connection, receiver, &mut cursor, &plan, stop);
            tokio::pin!(frames, stream);
            // The stream's error ends the session at once; after the socket's, what is queued is still appended.
            tokio::select! {
                ended = &mut stream => ended,
                read = &mut frames => stream.await.and(read),
            }
        };
        if ended.is_ok() {
            let _ = tokio::time::timeout(Duration::from_secs(1), socket.close(None)).await;
        }
        if plan.appended.load(Ordering::Relaxed) && !matches!(ended, Err(End::Reset)) {
            memory.restart = None;
        }
        if cursor.is_current {
            memory.acked = cursor.acked.or(memory.acked);
        }
        ended
    }

    /// Waits for the lease; `false` when it is time to stop.
    async fn take_lease(&self, connection: &mut Connection, stop: &CancellationToken) -> Result<bool, End> {
        let mut said = false;
        while !lease::take(connection, &self.keys.lease, &self.token).await? {
            if !std::mem::replace(&mut said, true) {
                let reason = format!("another reader holds the lease {}", self.keys.lease);
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

    /// Where to begin, and in which epoch. A new one begins where the numbering does, as far as we know: at a first start,
    /// after a reset, at another relay, and where Redis lost the cursor.
    fn plan(&self, cursor: &mut Cursor, memory: &mut Memory) -> Plan {
        let relay = self.config.relay_url.relay();
        let begin =
            |from, gap| Plan { from, epoch: cursor.next_epoch, gap, appended: AtomicBool::new(false) };
        if let Some(restart) = &memory.restart {
            return begin(restart.from, Some(restart.gap.clone()));
        }
        match &cursor.relay {
            // Sequence numbers mean nothing at another relay.
            Some(before) if *before != relay && cursor.position.is_some() => {
                memory.acked = None;
                let reason = format!(
                    "the cursor belongs to {before}, not to {relay}: the events between the two are unknown; continuing \
                     from now"
                );
                return begin(None, Some(Gap::new(reason, None)));
            }
            _ => {}
        }
        match (cursor.position, cursor.epoch) {
            (Some(position), Some(epoch)) => {
                cursor.is_current = true;
                Plan { from: Some(position), epoch, gap: None, appended: AtomicBool::new(false) }
            }
            // From a reader that knew no epochs, and of the numbering that is read.
            (Some(position), None) => {
                cursor.is_current = true;
                begin(Some(position), None)
            }
            (None, _) if memory.acked.is_some() => begin(memory.acked, None),
            (None, Some(_)) => begin(
                None,
                Some(Gap::new(
                    "the cursor is gone from Redis; continuing from what the relay sends now",
                    None,
                )),
            ),
            (None, None) => begin(None, None),
        }
    }

    fn note_gap(&self, gap: &Gap) {
        warn!(
            reason = gap.reason,
            after = gap.after,
            until = gap.until,
            events = gap.size(),
            "gap: events are missing that the relay no longer sends"
        );
        metrics::count(metrics::RELAY_GAPS, 1);
        self.status.reader(|reader| reader.gaps += 1);
    }

    /// `tries`: how often a frame behind this position could not be used.
    async fn open(&self, from: Option<i64>, tries: u32) -> Result<Socket, End> {
        let mut url = self.config.relay_url.expose().to_owned();
        if let Some(cursor) = from {
            // A frame too large even to be skipped is bypassed, in growing steps.
            let step = match tries.checked_sub(2 * BAD_FRAME_TRIES) {
                Some(times) => 1 << times.min(20),
                None => 0,
            };
            url.push(if url.contains('?') { '&' } else { '?' });
            url.push_str("cursor=");
            url.push_str(&(cursor + step).to_string());
        }
        let limit = if tries >= BAD_FRAME_TRIES { PASSED_OVER_BYTES } else { MESSAGE_BYTES };
        connect::open(url, &self.config.relay_url.relay(), self.tls.clone(), limit)
            .await
            .map_err(|refused| End::Relay { reason: refused.reason, retry_after: refused.retry_after })
    }

    /// Socket -> queue, until the relay ends it or `stop`.
    async fn frames(
        &self,
        socket: &mut Socket,
        queue: mpsc::Sender<Item>,
        room: Arc<Semaphore>,
        plan: &Plan,
        memory: &mut Memory,
        stop: &CancellationToken,
    ) -> Result<(), End> {
        let from = plan.from;
        let connected = Instant::now();
        let mut last_data = connected;
        let mut last_seq = from;
        let mut sequence = Sequence::new(from);
        // In front of the next frame that goes into the stream.
        let mut gap = plan.gap.clone();
        let mut missed: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut outdated = false;
        loop {
            // A relay that always has something must not keep the lease and what is queued waiting.
            tokio::task::coop::consume_budget().await;
            let idle = self.config.relay_idle_timeout.unwrap_or(Duration::from_secs(u64::MAX / 4));
            let quiet = if sequence.set_aside() > 0 { QUIET } else { idle };
            let message = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                message = socket.next() => message,
                () = sleep_until(last_data, quiet), if sequence.set_aside() > 0 => {
                    return Err(self.reset(&sequence, memory));
                }
                // Only data counts: a dead feed can still answer pings.
                () = sleep_until(last_data, idle) => {
                    return Err(End::relay(format!("no event within {idle:?} (RELAY_IDLE_TIMEOUT)")));
                }
            };
            if connected.elapsed() > STEADY {
                self.status.reader(|reader| reader.taking_in_ms = now_ms());
            }
            let frame = match message {
                Some(Ok(WsMessage::Binary(frame))) => frame,
                Some(Ok(WsMessage::Text(_))) => {
                    return Err(End::Operator(format!(
                        "{} sends text, which no relay does: is it a Jetstream? RELAY_URL has to name a relay",
                        self.config.relay_url.relay()
                    )));
                }
                Some(Ok(WsMessage::Close(reason))) => {
                    let reason = reason.map(|r| format!(": {} {}", r.code, shorten(&r.reason)));
                    return Err(End::relay(format!("closed by the relay{}", reason.unwrap_or_default())));
                }
                Some(Ok(_)) => continue,
                Some(Err(WsError::Capacity(CapacityError::MessageTooLong { size, max_size }))) => {
                    let what = format!("a frame of {size} bytes; {max_size} are read");
                    memory.failed_after(last_seq);
                    metrics::count(metrics::RELAY_BAD_FRAMES, 1);
                    return Err(End::relay(what));
                }
                Some(Err(error)) => return Err(End::relay(error.to_string())),
                None => return Err(End::relay("the connection ended")),
            };
            last_data = Instant::now();
            self.status.reader(|reader| {
                reader.frames += 1;
                reader.last_frame_ms = Some(now_ms());
            });
            let decoded = if frame.len() > MESSAGE_BYTES {
                Err(format!("a frame of {} bytes; {MESSAGE_BYTES} are read", frame.len()))
            } else {
                decode(&frame, &self.config.collections).map_err(|error| error.to_string())
            };
            let mut item = match decoded {
                Ok(Message::Event { event_type, seq, entries, letters, missed, rev }) => {
                    metrics::frame(event_type);
                    match sequence.judge(seq, last_data) {
                        Place::Follows => {}
                        Place::Elsewhere => continue,
                        Place::Reset => return Err(self.reset(&sequence, memory)),
                        Place::Impossible => {
                            passed_over(&mut gap, last_seq, &format!("its sequence number is {seq}"));
                            metrics::count(metrics::RELAY_BAD_FRAMES, 1);
                            continue;
                        }
                    }
                    last_seq = Some(seq);
                    let bytes: usize = entries.iter().map(|entry| entry.data.len() + 64).sum();
                    let bytes = u32::try_from(bytes).unwrap_or(QUEUE_BYTES).clamp(64, QUEUE_BYTES);
                    let Ok(permit) = Arc::clone(&room).acquire_many_owned(bytes).await else { return Ok(()) };
                    // What is ahead of the clock is refused where it is applied, and must not stand for a time here.
                    let rev = if check_rev(&rev, now_ms()).is_ok() { rev } else { String::new() };
                    Item { seq, entries, letters, missed, rev, gap: None, _room: permit }
                }
                Ok(Message::Info { name, message }) => {
                    metrics::frame("info");
                    if name != "OutdatedCursor" {
                        memory.say_info(&name, &message);
                    } else if !std::mem::replace(&mut outdated, true)
                        && from != Some(0)
                        && (from.is_none() || memory.outdated != from)
                    {
                        // However often it is repeated.
                        memory.outdated = from;
                        let reason = format!(
                            "the relay no longer has the requested events (OutdatedCursor): {}",
                            shorten(&message)
                        );
                        gap.get_or_insert(Gap::new(reason, from));
                    }
                    continue;
                }
                Ok(Message::Error { error, message }) => return Err(self.relay_error(&error, &message, from)),
                Ok(Message::Unknown) => {
                    metrics::frame("other");
                    continue;
                }
                Err(error) => {
                    metrics::count(metrics::RELAY_BAD_FRAMES, 1);
                    // The specification has the connection dropped. The same frame comes again after the same
                    // place; when it has cost enough connections it is passed over.
                    if memory.failed_after(last_seq) < BAD_FRAME_TRIES {
                        return Err(End::relay(error));
                    }
                    memory.bad_frame = None;
                    *missed.entry("frame").or_default() += 1;
                    passed_over(&mut gap, last_seq, &error);
                    continue;
                }
            };
            if let Some(mut gap) = gap.take() {
                gap.until = (gap.after.is_some() && plan.gap.is_none()).then_some(item.seq);
                item.gap = Some(gap);
            }
            for (class, count) in std::mem::take(&mut missed) {
                *item.missed.entry(class).or_default() += count;
            }
            if queue.send(item).await.is_err() {
                return Ok(());
            }
        }
    }

    /// The numbering restarts: read from the relay's oldest event, in a new epoch.
    fn reset(&self, sequence: &Sequence, memory: &mut Memory) -> End {
        let reason = format!(
            "{} restarted its numbering: its numbers are far from {}; reading from its oldest event",
            self.config.relay_url.relay(),
            sequence.high().unwrap_or_default()
        );
        memory.restart = Some(Restart { from: Some(0), gap: Gap::new(reason, None) });
        memory.acked = None;
        End::Reset
    }

    fn relay_error(&self, error: &str, message: &str, from: Option<i64>) -> End {
        if error == "FutureCursor" {
            return End::FutureCursor(format!(
                "{} says that the cursor {} lies in its future: it was reset, or the cursor comes from another relay. \
                 Set ON_FUTURE_CURSOR=live or oldest to resume with a gap, or correct {}",
                self.config.relay_url.relay(),
                from.map_or_else(|| "none".to_owned(), |cursor| cursor.to_string()),
                self.keys.cursor,
            ));
        }
        End::relay(format!("the relay ended the connection: {} {}", shorten(error), shorten(message)))
    }

    /// Queue -> stream, until the queue is closed and empty.
    async fn append(
        &self,
        connection: &mut Connection,
        mut queue: mpsc::Receiver<Item>,
        cursor: &mut Cursor,
        plan: &Plan,
        stop: &CancellationToken,
    ) -> Result<(), End> {
        let relay = self.config.relay_url.relay();
        let budget = Budget { bytes: self.config.dead_letter_max_bytes, per_account: LETTERS_PER_ACCOUNT };
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut run_id = None;
        // Repeats of events already in the stream do not set the cursor back.
        let mut position = plan.from;
        let mut items = Vec::new();
        loop {
            tokio::select! {
                item = queue.recv() => match item {
                    Some(item) => items.push(item),
                    None => return Ok(()),
                },
                _ = look.tick() => {
                    self.look(connection, cursor, &mut run_id, stop).await?;
                    continue;
                }
            }
            let size = |item: &Item| item.entries.iter().map(|entry| entry.data.len()).sum::<usize>();
            let mut bytes = size(&items[0]);
            while items.len() < APPEND_ENTRIES && bytes < APPEND_BYTES {
                let Ok(item) = queue.try_recv() else { break };
                bytes += size(&item);
                items.push(item);
            }
            let last = items.iter().map(|item| item.seq).max().unwrap_or_default();
            position = Some(position.map_or(last, |before| before.max(last)));
            let mut length = 0;
            let pieces = in_pieces(gather(&mut items, plan.epoch));
            let count = pieces.len();
            for (number, what) in pieces.into_iter().enumerate() {
                let to = if number + 1 == count {
                    position.unwrap_or(last)
                } else {
                    // Until the last piece is there, all of them have to come again. Another relay's numbers mean nothing.
                    cursor.position.filter(|_| cursor.is_current).unwrap_or(what.entries[0].seq - 1)
                };
                let appended = loop {
                    let to = Move {
                        token: &self.token,
                        relay: &relay,
                        epoch: plan.epoch,
                        believed: cursor.position,
                        position: to,
                    };
                    match append::append(connection, &self.keys, to, budget, &what).await {
                        Ok(appended) => break appended,
                        Err(AppendError::Redis(error)) if is_oom(&error) => {
                            // Refused before anything was written.
                            if !self.wait_for_room("Redis refuses writes: its memory is full", stop).await {
                                return Ok(());
                            }
                            self.look(connection, cursor, &mut run_id, stop).await?;
                        }
                        Err(error) => return Err(error.into()),
                    }
                };
                crash::at(Point::AfterAppend);
                cursor.position = Some(to);
                cursor.is_current = true;
                plan.appended.store(true, Ordering::Relaxed);
                self.note(&what, appended);
                length = appended.length;
            }
            items.clear();
            ::metrics::gauge!(metrics::CURSOR).set(position.unwrap_or_default() as f64);
            self.status.reader(|reader| {
                reader.cursor = position;
                reader.taking_in_ms = now_ms();
                if reader.state != State::Running {
                    reader.enter(State::Running);
                }
            });
            if length >= self.config.max_stream_len {
                self.look(connection, cursor, &mut run_id, stop).await?;
            }
        }
    }

    /// Counts what was appended besides entries.
    fn note(&self, what: &Appendix, appended: append::Appended) {
        if let Some(gap) = &what.gap {
            self.note_gap(gap);
        }
        for (class, count) in &what.missed {
            metrics::missed(class, *count);
        }
        metrics::count(metrics::RELAY_BAD_RECORDS, what.letters.len() as u64);
        if appended.letters > 0 {
            for letter in &what.letters {
                metrics::dead_letter(letter.reject.reason);
            }
        }
        if appended.refused > 0 {
            metrics::missed("no_room", appended.refused);
        }
    }

    /// Checks that Redis is still the same server, and waits while the stream or the memory is at its mark.
    async fn look(
        &self,
        connection: &mut Connection,
        cursor: &mut Cursor,
        run_id: &mut Option<String>,
        stop: &CancellationToken,
    ) -> Result<(), End> {
        let mut waiting = false;
        loop {
            let gauge = append::gauge(connection, &self.keys, &self.token).await?;
            if run_id.get_or_insert_with(|| gauge.run_id.clone()) != &gauge.run_id {
                return Err(AppendError::CursorMoved.into());
            }
            if !gauge.lease {
                return Err(AppendError::LeaseLost.into());
            }
            if gauge.cursor != cursor.position.map(|position| position.to_string()) {
                return Err(AppendError::CursorMoved.into());
            }
            // Another numbering's positions mean nothing here.
            if cursor.is_current
                && gauge.relay.as_ref().is_none_or(|relay| *relay == self.config.relay_url.relay())
            {
                cursor.acked = gauge.acked.or(cursor.acked);
            }
            let Some(reason) = self.full(&gauge, waiting) else {
                if waiting {
                    self.enter(State::Running);
                }
                return Ok(());
            };
            waiting = true;
            if !self.wait_for_room(&reason, stop).await {
                return Ok(());
            }
        }
    }

    /// Which mark is reached. Once waiting, a little below the mark: no stuttering.
    fn full(&self, gauge: &append::Gauge, waiting: bool) -> Option<String> {
        let margin = |mark: u64| if waiting { mark - mark / 20 } else { mark };
        let length = self.config.max_stream_len;
        if gauge.length >= margin(length) {
            return Some(format!(
                "the stream holds {} entries (REDIS_MAX_STREAM_LEN={length})",
                gauge.length
            ));
        }
        let memory = match self.config.memory_mark {
            MemoryMark::Bytes(bytes) => bytes,
            MemoryMark::Percent(percent) => gauge.max_memory / 100 * u64::from(percent),
        };
        if memory > 0 && gauge.used_memory >= margin(memory) {
            return Some(format!(
                "Redis uses {} MiB of memory (REDIS_MEMORY_MARK={})",
                gauge.used_memory >> 20,
                self.config.memory_mark
            ));
        }
        None
    }

    /// Waits a moment; `false` when it is time to stop.
    async fn wait_for_room(&self, reason: &str, stop: &CancellationToken) -> bool {
        let mut first = false;
        self.status.reader(|reader| {
            first = !matches!(reader.state, State::WaitingForRoom { .. });
            reader.enter(State::WaitingForRoom { reason: reason.to_owned() });
        });
        if first {
            info!(reason, "the reader waits for room; the relay keeps what comes meanwhile");
        }
        let began = Instant::now();
        let go_on = tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(200)) => true,
            () = stop.cancelled() => false,
        };
        metrics::backpressure(began.elapsed());
        go_on
    }
}

impl Memory {
    /// Records that the frame behind this position could not be used; returns how often by now.
    fn failed_after(&mut self, position: Option<i64>) -> u32 {
        let tries = match self.bad_frame {
            Some((at, tries)) if at == position => tries + 1,
            _ => 1,
        };
        self.bad_frame = Some((position, tries));
        tries
    }

    /// Logs messages from the relay, at most once a minute.
    fn say_info(&mut self, name: &str, message: &str) {
        match &mut self.info {
            Some((at, unsaid)) if at.elapsed() < SAY_AGAIN => *unsaid += 1,
            before => {
                let unsaid = before.map_or(0, |(_, unsaid)| unsaid);
                info!(name = shorten(name), message = shorten(message), unsaid, "message from the relay");
                *before = Some((Instant::now(), 0));
            }
        }
    }
}

/// Begins a gap at a skipped frame, unless there is one already.
fn passed_over(gap: &mut Option<Gap>, after: Option<i64>, why: &str) {
    gap.get_or_insert(Gap::new(format!("skipped a frame that cannot be used: {why}"), after));
}

/// The items' contents combined, in order, with the epoch in every entry.
fn gather(items: &mut [Item], epoch: u64) -> Appendix {
    let mut what = Appendix::default();
    for item in items {
        for mut entry in item.entries.drain(..) {
            // An object always ends with a brace. Last, where the pipelines look for it.
            entry.data.pop();
            entry.data.push_str(",\"epoch\":");
            entry.data.push_str(&epoch.to_string());
            entry.data.push('}');
            what.entries.push(entry);
        }
        what.letters.append(&mut item.letters);
        for (class, count) in &item.missed {
            *what.missed.entry(class).or_default() += count;
        }
        if item.rev > what.rev {
            what.rev = std::mem::take(&mut item.rev);
        }
        what.gap = what.gap.take().or(item.gap.take());
    }
    what
}

/// Cuts what one append would carry too much of. A gap goes with the first piece, which may begin an epoch; what is counted,
/// and must not be twice, with the last, which moves the cursor.
fn in_pieces(mut what: Appendix) -> Vec<Appendix> {
    if what.entries.iter().map(|entry| entry.data.len()).sum::<usize>() <= PIECE_BYTES {
        return vec![what];
    }
    let mut pieces = Vec::new();
    let mut bytes = 0;
    let mut entries = Vec::new();
    for entry in std::mem::take(&mut what.entries) {
        if !entries.is_empty() && bytes + entry.data.len() > PIECE_BYTES {
            let (rev, gap) = (what.rev.clone(), what.gap.take());
            pieces.push(Appendix { entries: std::mem::take(&mut entries), rev, gap, ..Appendix::default() });
            bytes = 0;
        }
        bytes += entry.data.len();
        entries.push(entry);
    }
    pieces.push(Appendix { entries, ..what });
    pieces
}

async fn sleep_until(since: Instant, limit: Duration) {
    match since.checked_add(limit) {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Text from a relay may be of any length.
fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}
