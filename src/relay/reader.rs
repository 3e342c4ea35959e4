//! The reader: relay -> stream. It never waits for PostgreSQL, and slows down instead of discarding.
//!
//! A session is one websocket and one connection to Redis. Whatever goes wrong with either ends the session, and the
//! next one starts from the cursor that Redis has: it may have lost its last second, stream and cursor together, and a
//! reader that carried on from its own memory would leave a hole under a clean cursor.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use redis::aio::MultiplexedConnection;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message as WsMessage};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::decode::{Message, decode};
use crate::config::{Config, MemoryMark, OnFutureCursor};
use crate::crash::{self, Point};
use crate::metrics;
use crate::status::{State, Status, now_ms};
use crate::stream::append::{self, AppendError, Cursor, NewEntry};
use crate::stream::{Keys, Redis, backoff, group, is_oom, lease};

/// What may wait between the socket and Redis. A slow Redis then slows the socket.
const QUEUE_BYTES: u32 = 16 * 1024 * 1024;
/// What one append carries at the most: a longer script would hold up the server, and by so much Redis may go beyond its
/// memory limit, which it looks at before a script and not within.
const APPEND_BYTES: usize = 512 * 1024;
const APPEND_ENTRIES: usize = 500;
/// The largest message that a relay may send is 5 MB (<https://atproto.com/specs/sync>).
const MESSAGE_BYTES: usize = 8 * 1024 * 1024;
/// How often the cursor, the lease and the marks are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often an undecodable frame may cost the connection before it is passed over.
const BAD_FRAME_TRIES: u32 = 3;
/// The same trouble is told again after this time.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// The reader and what it needs.
pub struct Reader {
    config: Arc<Config>,
    keys: Keys,
    redis: Redis,
    status: Arc<Status>,
    /// Who we are to the lease.
    token: String,
    /// Whether the operator wants us to rest.
    pause: watch::Receiver<bool>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("Redis: {0}")]
    Redis(#[from] redis::RedisError),
    #[error("{0}")]
    Append(#[from] AppendError),
    #[error("relay: {0}")]
    Relay(String),
    #[error("{0}")]
    FutureCursor(String),
}

/// What the reader remembers from one session to the next.
#[derive(Default)]
struct Memory {
    /// The last known position before the lowest that was not acknowledged, should Redis lose everything.
    acked: Option<i64>,
    /// Where an undecodable frame was met, and how often.
    bad_frame: Option<(Option<i64>, u32)>,
    /// The operator's way out of a cursor that lies in the relay's future.
    restart_at: Option<Restart>,
    /// The lease was ours.
    leased: bool,
}

#[derive(Clone, Copy)]
enum Restart {
    Live,
    Oldest,
}

/// What goes from the socket to the stream: the entries of one frame, with its place.
struct Item {
    seq: i64,
    entries: Vec<NewEntry>,
    _room: OwnedSemaphorePermit,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

impl Reader {
    /// A reader for the configured relay.
    #[must_use]
    pub fn new(config: Arc<Config>, redis: Redis, status: Arc<Status>, pause: watch::Receiver<bool>) -> Self {
        let token = lease::token(&config.consumer_id);
        Self { keys: Keys::new(&config), config, redis, status, token, pause }
    }

    /// Reads until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut memory = Memory::default();
        let mut delays = backoff();
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
                delays = backoff();
            }
            let reason = end.to_string();
            self.status.reader(|reader| {
                reader.enter(match &end {
                    End::Redis(_) | End::Append(_) => State::WaitingForRedis { reason: reason.clone() },
                    End::Relay(_) => State::WaitingForRelay { reason: reason.clone() },
                    End::FutureCursor(_) => State::Halted { reason: reason.clone() },
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
            let delay = delays.next().unwrap_or(Duration::from_secs(5));
            // An outage is a line a minute, not one per attempt.
            if said.as_ref().is_none_or(|(before, at)| *before != reason || at.elapsed() > SAY_AGAIN) {
                warn!(reason, "the reader waits and starts again from the cursor in Redis; nothing is lost");
                said = Some((reason, Instant::now()));
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

    /// Whether the operator wants us to rest. Nobody left to say so is nobody who could end it.
    fn is_paused(&self) -> bool {
        *self.pause.borrow() && self.pause.has_changed().is_ok()
    }

    /// Resolves when the operator wants us to rest.
    async fn pause_begins(&self) {
        if self.pause.clone().wait_for(|paused| *paused).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the operator wants it otherwise. A lease that was ours stays ours: nobody else is to read meanwhile.
    async fn rest(&self, leased: bool, stop: &CancellationToken) {
        info!("the reader is paused by hand; the relay keeps what comes meanwhile");
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
            _ = pause.wait_for(|paused| !paused) => info!("the reader goes on"),
            () = stop.cancelled() => {}
        }
    }

    fn enter(&self, state: State) {
        self.status.reader(|reader| {
            reader.enter(state);
        });
    }

    /// Whether the operator wants to go on, and from where.
    fn future_cursor(&self, memory: &mut Memory) -> bool {
        memory.restart_at = match self.config.on_future_cursor {
            OnFutureCursor::Stop => return false,
            OnFutureCursor::Live => Some(Restart::Live),
            OnFutureCursor::Oldest => Some(Restart::Oldest),
        };
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
        let from = self.resume_position(&mut cursor, memory);
        if cursor.position.is_none() && memory.acked.is_some() {
            warn!(
                position = memory.acked,
                "Redis lost the cursor: going back to what was last known to be applied"
            );
        }
        memory.acked = cursor.acked.or(memory.acked);

        let mut socket = self.open(from).await?;
        metrics::count(metrics::RELAY_CONNECTS, 1);
        info!(relay = self.config.relay_url.relay(), cursor = from, "connected to the relay");
        self.status.reader(|reader| {
            reader.enter(State::Running);
            reader.connected = true;
            reader.cursor = cursor.position;
        });

        let (sender, receiver) = mpsc::channel(4096);
        let room = Arc::new(Semaphore::new(QUEUE_BYTES as usize));
        let ended = {
            let frames = self.frames(&mut socket, sender, room, from, memory, stop);
            let stream = self.append(&mut connection, receiver, &mut cursor, from, stop);
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
        memory.acked = cursor.acked.or(memory.acked);
        ended
    }

    /// Waits for the lease; `false` when it is time to stop.
    async fn take_lease(
        &self,
        connection: &mut MultiplexedConnection,
        stop: &CancellationToken,
    ) -> Result<bool, End> {
        let mut said = false;
        while !lease::take(connection, &self.keys.lease, &self.token).await? {
            if !std::mem::replace(&mut said, true) {
                let reason = format!("another reader holds the lease {}", self.keys.lease);
                info!(reason, "the reader waits; a lease that nobody renews runs out after 10 s");
                self.enter(State::WaitingForLease { reason });
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
                () = stop.cancelled() => return Ok(false),
            }
        }
        Ok(true)
    }

    /// The position to ask the relay for. `None` is from now on.
    fn resume_position(&self, cursor: &mut Cursor, memory: &mut Memory) -> Option<i64> {
        match memory.restart_at.take() {
            Some(Restart::Live) => {
                self.gap(
                    "the cursor lies in the relay's future and ON_FUTURE_CURSOR=live: going on from now",
                );
                return None;
            }
            Some(Restart::Oldest) => {
                self.gap("the cursor lies in the relay's future and ON_FUTURE_CURSOR=oldest: going on from its oldest");
                return Some(0);
            }
            None => {}
        }
        let relay = self.config.relay_url.relay();
        match &cursor.relay {
            // Sequence numbers mean nothing at another relay.
            Some(before) if *before != relay && cursor.position.is_some() => {
                self.gap(&format!(
                    "the cursor belongs to {before}, not to {relay}: events between the two are not known; \
                     going on from now"
                ));
                cursor.acked = None;
                memory.acked = None;
                None
            }
            _ => cursor.position.or(memory.acked),
        }
    }

    fn gap(&self, what: &str) {
        warn!(what, "gap");
        metrics::count(metrics::RELAY_GAPS, 1);
        self.status.reader(|reader| reader.gaps += 1);
    }

    async fn open(&self, from: Option<i64>) -> Result<Socket, End> {
        let mut url = self.config.relay_url.expose().to_owned();
        if let Some(cursor) = from {
            url.push(if url.contains('?') { '&' } else { '?' });
            url.push_str("cursor=");
            url.push_str(&cursor.to_string());
        }
        let limits = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_BYTES))
            .max_frame_size(Some(MESSAGE_BYTES));
        let connect = tokio_tungstenite::connect_async_with_config(url, Some(limits), true);
        match tokio::time::timeout(Duration::from_secs(15), connect).await {
            Ok(Ok((socket, _))) => Ok(socket),
            Ok(Err(tungstenite::Error::Http(response))) => Err(End::Relay(format!(
                "{} answered HTTP {}",
                self.config.relay_url.relay(),
                response.status()
            ))),
            Ok(Err(error)) => Err(End::Relay(error.to_string())),
            Err(_) => Err(End::Relay("no connection within 15 s".to_owned())),
        }
    }

    /// Socket -> queue, until the relay ends it or `stop`.
    async fn frames(
        &self,
        socket: &mut Socket,
        queue: mpsc::Sender<Item>,
        room: Arc<Semaphore>,
        from: Option<i64>,
        memory: &mut Memory,
        stop: &CancellationToken,
    ) -> Result<(), End> {
        let mut last_data = Instant::now();
        let mut last_seq = from;
        loop {
            let idle = self.config.relay_idle_timeout.unwrap_or(Duration::from_secs(u64::MAX / 4));
            let message = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                message = socket.next() => message,
                // Only data counts: a dead feed can go on answering pings.
                () = sleep_until(last_data, idle) => {
                    return Err(End::Relay(format!("no event within {idle:?} (RELAY_IDLE_TIMEOUT)")));
                }
            };
            let frame = match message {
                Some(Ok(WsMessage::Binary(frame))) => frame,
                Some(Ok(WsMessage::Close(reason))) => {
                    let reason = reason.map(|r| format!(": {} {}", r.code, shorten(&r.reason)));
                    return Err(End::Relay(format!("closed by the relay{}", reason.unwrap_or_default())));
                }
                Some(Ok(_)) => continue,
                Some(Err(error)) => return Err(End::Relay(error.to_string())),
                None => return Err(End::Relay("the connection ended".to_owned())),
            };
            last_data = Instant::now();
            self.status.reader(|reader| {
                reader.frames += 1;
                reader.last_frame_ms = Some(now_ms());
            });
            let item = match decode(&frame, &self.config.collections) {
                Ok(Message::Event { event_type, seq, entries, bad_records }) => {
                    metrics::frame(event_type);
                    if bad_records > 0 {
                        metrics::count(metrics::RELAY_BAD_RECORDS, bad_records.into());
                    }
                    last_seq = Some(seq);
                    let bytes: usize = entries.iter().map(|entry| entry.data.len() + 64).sum();
                    let bytes = u32::try_from(bytes).unwrap_or(QUEUE_BYTES).clamp(64, QUEUE_BYTES);
                    let Ok(permit) = Arc::clone(&room).acquire_many_owned(bytes).await else { return Ok(()) };
                    Item { seq, entries, _room: permit }
                }
                Ok(Message::Info { name, message }) => {
                    metrics::frame("info");
                    self.gap_or_info(&name, &message);
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
                    let tries = match memory.bad_frame {
                        Some((at, tries)) if at == last_seq => tries + 1,
                        _ => 1,
                    };
                    if tries >= BAD_FRAME_TRIES {
                        memory.bad_frame = None;
                        self.gap(&format!(
                            "passing over a frame that stays undecodable after {last_seq:?}: {error}"
                        ));
                        continue;
                    }
                    memory.bad_frame = Some((last_seq, tries));
                    return Err(End::Relay(error.to_string()));
                }
            };
            if queue.send(item).await.is_err() {
                return Ok(());
            }
        }
    }

    fn gap_or_info(&self, name: &str, message: &str) {
        if name == "OutdatedCursor" {
            self.gap(&format!(
                "the relay no longer has what was asked for (OutdatedCursor): {}",
                shorten(message)
            ));
        } else {
            info!(name = shorten(name), message = shorten(message), "the relay says");
        }
    }

    fn relay_error(&self, error: &str, message: &str, from: Option<i64>) -> End {
        if error == "FutureCursor" {
            return End::FutureCursor(format!(
                "{} says that the cursor {} lies in its future: it was reset, or the cursor comes from another relay. \
                 Set ON_FUTURE_CURSOR=live or oldest to go on with a gap, or correct {}",
                self.config.relay_url.relay(),
                from.map_or_else(|| "none".to_owned(), |cursor| cursor.to_string()),
                self.keys.cursor,
            ));
        }
        End::Relay(format!("the relay ended the connection: {} {}", shorten(error), shorten(message)))
    }

    /// Queue -> stream, until the queue is closed and empty.
    async fn append(
        &self,
        connection: &mut MultiplexedConnection,
        mut queue: mpsc::Receiver<Item>,
        cursor: &mut Cursor,
        from: Option<i64>,
        stop: &CancellationToken,
    ) -> Result<(), End> {
        let relay = self.config.relay_url.relay();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut run_id = None;
        // Repeats of what is in the stream already do not set the cursor back.
        let mut position = from;
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
            let entries: Vec<NewEntry> = items.iter_mut().flat_map(|item| item.entries.drain(..)).collect();
            let last = items.iter().map(|item| item.seq).max().unwrap_or_default();
            position = Some(position.map_or(last, |before| before.max(last)));
            let length = loop {
                let target = position.unwrap_or(last);
                match append::append(
                    connection,
                    &self.keys,
                    &self.token,
                    &relay,
                    cursor.position,
                    target,
                    &entries,
                )
                .await
                {
                    Ok(length) => break length,
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
            cursor.position = position;
            items.clear();
            ::metrics::gauge!(metrics::CURSOR).set(position.unwrap_or_default() as f64);
            self.status.reader(|reader| {
                reader.cursor = position;
                if reader.state != State::Running {
                    reader.enter(State::Running);
                }
            });
            if length >= self.config.max_stream_len {
                self.look(connection, cursor, &mut run_id, stop).await?;
            }
        }
    }

    /// Checks that Redis is the Redis that we know, and waits while the stream or the memory is at its mark.
    async fn look(
        &self,
        connection: &mut MultiplexedConnection,
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
            if gauge.cursor.as_deref().and_then(|text| text.parse().ok()) != cursor.position {
                return Err(AppendError::CursorMoved.into());
            }
            // Another relay's numbers mean nothing here.
            if gauge.relay.as_ref().is_none_or(|relay| *relay == self.config.relay_url.relay()) {
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

async fn sleep_until(since: Instant, limit: Duration) {
    match since.checked_add(limit) {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// What a relay says may be of any length.
fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}
