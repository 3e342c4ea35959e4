//! A relay: `com.atproto.sync.subscribeRepos` over a websocket.
//!
//! A frame that cannot be used costs the connection, as the specification requires. A frame that keeps doing so is
//! skipped, as a counted gap.

pub mod decode;
mod sequence;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result as AnyResult;
use futures_util::StreamExt as _;
use tokio::time::Instant;
use tokio_tungstenite::Connector;
use tokio_tungstenite::tungstenite::error::CapacityError;
use tokio_tungstenite::tungstenite::{Bytes, Error as WsError, Message as WsMessage};
use tracing::{debug, info};

use super::connect::{self, GOODBYE, MESSAGE_BYTES, PASSED_OVER_BYTES, STEADY, Socket};
use super::{Arrival, Origin, OriginError, sleep_until};
use crate::config::{Config, VerifyMode};
use crate::event::check_rev;
use crate::metrics;
use crate::status::Status;
use crate::stream::gap::Gap;
use crate::time::now_ms;
use decode::{Message, decode};
use sequence::{Place, QUIET, Sequence};

/// How often an unusable frame may cost the connection before it is skipped.
const BAD_FRAME_TRIES: u32 = 3;
/// Messages from the relay are logged at most once per this interval.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// The configured relay.
pub struct Relay {
    name: String,
    config: Arc<Config>,
    status: Arc<Status>,
    tls: Connector,
    /// The connection; `None` before the first.
    connection: Option<Subscription>,
    /// The position before an unusable frame, and how often that frame was seen.
    bad_frame: Option<(Option<i64>, u32)>,
    /// When a message from the relay was last logged, and how many were suppressed since.
    info: Option<(Instant, u64)>,
    /// Whether a connection has been logged since the last event.
    announced: bool,
}

/// A connection and its progress.
struct Subscription {
    socket: Socket,
    /// The position that it was opened with.
    from: Option<i64>,
    since: Instant,
    last_data: Instant,
    last_seq: Option<i64>,
    sequence: Sequence,
    /// The gap before the next usable frame.
    gap: Option<Gap>,
    missed: BTreeMap<&'static str, u64>,
    /// Whether the relay has reported `OutdatedCursor`.
    outdated: bool,
}

impl Subscription {
    fn new(socket: Socket, from: Option<i64>) -> Self {
        Self {
            socket,
            from,
            since: Instant::now(),
            last_data: Instant::now(),
            last_seq: from,
            sequence: Sequence::new(from),
            gap: None,
            missed: BTreeMap::new(),
            outdated: false,
        }
    }
}

impl Origin for Relay {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn open(&mut self, from: Option<i64>) -> Result<(), OriginError> {
        let tries = self.bad_frame.map_or(0, |(_, tries)| tries);
        let mut url = self.config.relay_url.expose().to_owned();
        if let Some(cursor) = from {
            // A frame too large even to be read and skipped is bypassed, in growing steps.
            let step = match tries.checked_sub(2 * BAD_FRAME_TRIES) {
                Some(times) => 1 << times.min(20),
                None => 0,
            };
            url.push(if url.contains('?') { '&' } else { '?' });
            url.push_str("cursor=");
            url.push_str(&(cursor + step).to_string());
        }
        let limit = if tries >= BAD_FRAME_TRIES { PASSED_OVER_BYTES } else { MESSAGE_BYTES };
        let socket = connect::open(url, &self.name, self.tls.clone(), limit).await.map_err(|refused| {
            OriginError::Away { reason: refused.reason, retry_after: refused.retry_after }
        })?;
        self.connection = Some(Subscription::new(socket, from));
        metrics::count(metrics::RELAY_CONNECTS, 1);
        // A relay that accepts every connection and sends nothing must not fill the log.
        if std::mem::replace(&mut self.announced, true) {
            debug!(relay = self.name, cursor = from, "connected to the relay again");
        } else {
            info!(relay = self.name, cursor = from, "connected to the relay");
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Arrival, OriginError> {
        loop {
            let frame = self.frame().await?;
            self.status.reader(|reader| {
                reader.frames += 1;
                reader.last_frame_ms = Some(now_ms());
            });
            if let Some(arrival) = self.read(&frame)? {
                return Ok(arrival);
            }
        }
    }

    async fn close(&mut self) {
        if let Some(mut connection) = self.connection.take() {
            let _ = tokio::time::timeout(GOODBYE, connection.socket.close(None)).await;
        }
    }
}

impl Relay {
    /// The configured relay, not connected yet.
    ///
    /// # Errors
    ///
    /// There is no authority for `wss://` to trust.
    pub fn new(config: Arc<Config>, status: Arc<Status>) -> AnyResult<Self> {
        let tls = connect::tls(&config)?;
        Ok(Self {
            name: config.relay_url.relay(),
            config,
            status,
            tls,
            connection: None,
            bad_frame: None,
            info: None,
            announced: false,
        })
    }

    /// The next data frame.
    async fn frame(&mut self) -> Result<Bytes, OriginError> {
        let Self { name, config, status, connection, bad_frame, .. } = self;
        let connection = connected(connection)?;
        let idle = config.relay_idle_timeout.unwrap_or(Duration::from_secs(u64::MAX / 4));
        let quiet = if connection.sequence.set_aside() > 0 { QUIET } else { idle };
        loop {
            // A relay that always has a frame ready must not starve the lease and the queue.
            tokio::task::coop::consume_budget().await;
            let message = tokio::select! {
                biased;
                message = connection.socket.next() => message,
                () = sleep_until(connection.last_data, quiet), if connection.sequence.set_aside() > 0 => {
                    return Err(restarted(name, &connection.sequence));
                }
                // Only data counts: a dead feed can still answer pings.
                () = sleep_until(connection.last_data, idle) => {
                    return Err(OriginError::away(format!("no event within {idle:?} (RELAY_IDLE_TIMEOUT)")));
                }
            };
            if connection.since.elapsed() > STEADY {
                status.reader(|reader| reader.taking_in_ms = now_ms());
            }
            match message {
                Some(Ok(WsMessage::Binary(frame))) => {
                    connection.last_data = Instant::now();
                    return Ok(frame);
                }
                Some(Ok(WsMessage::Text(_))) => {
                    return Err(OriginError::Operator(format!(
                        "{name} sends text, which relays do not: is it a Jetstream? Then write its path, /subscribe, in RELAY_URL"
                    )));
                }
                Some(Ok(WsMessage::Close(reason))) => {
                    let reason = reason.map(|r| format!(": {} {}", r.code, shorten(&r.reason)));
                    return Err(OriginError::away(format!(
                        "closed by the relay{}",
                        reason.unwrap_or_default()
                    )));
                }
                Some(Ok(_)) => {}
                Some(Err(WsError::Capacity(CapacityError::MessageTooLong { size, max_size }))) => {
                    failed_after(bad_frame, connection.last_seq);
                    metrics::count(metrics::RELAY_BAD_FRAMES, 1);
                    return Err(OriginError::away(format!(
                        "a frame of {size} bytes; at most {max_size} are read"
                    )));
                }
                Some(Err(error)) => return Err(OriginError::away(error.to_string())),
                None => return Err(OriginError::away("the connection ended")),
            }
        }
    }

    /// The arrival in a frame; `None` if it has nothing for the stream.
    fn read(&mut self, frame: &Bytes) -> Result<Option<Arrival>, OriginError> {
        let decoded = if frame.len() > MESSAGE_BYTES {
            Err(format!("a frame of {} bytes; at most {MESSAGE_BYTES} are read", frame.len()))
        } else {
            decode(frame, &self.config.collections).map_err(|error| error.to_string())
        };
        match decoded {
            Ok(Message::Event { event_type, seq, did, entries, letters, missed, rev }) => {
                metrics::frame(event_type);
                // A revision ahead of the clock is refused when it is applied, and must not set a time here.
                let rev = if check_rev(&rev, now_ms()).is_ok() { rev } else { String::new() };
                let frame = (self.config.verify != VerifyMode::Off).then(|| frame.clone());
                self.place(Arrival {
                    position: seq,
                    did,
                    entries,
                    letters,
                    missed,
                    rev,
                    frame,
                    ..Arrival::default()
                })
            }
            Ok(Message::Info { name, message }) => {
                metrics::frame("info");
                if name == "OutdatedCursor" {
                    self.outdated_cursor(&message)?;
                } else {
                    self.say_info(&name, &message);
                }
                Ok(None)
            }
            Ok(Message::Error { error, message }) => Err(self.relay_error(&error, &message)),
            Ok(Message::Unknown) => {
                metrics::frame("other");
                Ok(None)
            }
            Err(error) => self.unusable(error),
        }
    }

    /// Checks that an event follows the previous ones; `None` if it does not.
    fn place(&mut self, mut arrival: Arrival) -> Result<Option<Arrival>, OriginError> {
        let seq = arrival.position;
        let connection = connected(&mut self.connection)?;
        match connection.sequence.judge(seq, connection.last_data) {
            Place::Follows => {}
            Place::Elsewhere => return Ok(None),
            Place::Reset => return Err(restarted(&self.name, &connection.sequence)),
            Place::Impossible => {
                let why = format!("its sequence number is {seq}");
                passed_over(&mut connection.gap, connection.last_seq, &why);
                metrics::count(metrics::RELAY_BAD_FRAMES, 1);
                return Ok(None);
            }
        }
        connection.last_seq = Some(seq);
        if let Some(mut gap) = connection.gap.take() {
            gap.until = gap.after.is_some().then_some(seq);
            arrival.gap = Some(gap);
        }
        for (class, count) in std::mem::take(&mut connection.missed) {
            *arrival.missed.entry(class).or_default() += count;
        }
        self.announced = false;
        Ok(Some(arrival))
    }

    /// The gap that the relay reports, once however often it says so. If the next event is not appended, it is reported again on
    /// the next connection.
    fn outdated_cursor(&mut self, message: &str) -> Result<(), OriginError> {
        let connection = connected(&mut self.connection)?;
        let from = connection.from;
        if std::mem::replace(&mut connection.outdated, true) || from == Some(0) {
            return Ok(());
        }
        let reason =
            format!("the relay no longer has the requested events (OutdatedCursor): {}", shorten(message));
        connection.gap.get_or_insert(Gap::new(reason, from));
        Ok(())
    }

    /// Drops the connection, as the specification requires. The same frame will be sent again; once it has cost enough
    /// connections, it is skipped.
    fn unusable(&mut self, error: String) -> Result<Option<Arrival>, OriginError> {
        metrics::count(metrics::RELAY_BAD_FRAMES, 1);
        let connection = connected(&mut self.connection)?;
        let last_seq = connection.last_seq;
        if failed_after(&mut self.bad_frame, last_seq) < BAD_FRAME_TRIES {
            return Err(OriginError::away(error));
        }
        self.bad_frame = None;
        *connection.missed.entry("frame").or_default() += 1;
        passed_over(&mut connection.gap, last_seq, &error);
        Ok(None)
    }

    fn relay_error(&self, error: &str, message: &str) -> OriginError {
        if error == "FutureCursor" {
            let from = self.connection.as_ref().and_then(|connection| connection.from);
            return OriginError::Future(format!(
                "{} reports that the cursor {} lies in its future: it was reset, or the cursor comes from another \
                 relay. Set ON_FUTURE_CURSOR=live or oldest to resume with a gap, or correct {}",
                self.name,
                from.map_or_else(|| "none".to_owned(), |cursor| cursor.to_string()),
                self.config.cursor_key,
            ));
        }
        OriginError::away(format!("the relay ended the connection: {} {}", shorten(error), shorten(message)))
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

fn connected(connection: &mut Option<Subscription>) -> Result<&mut Subscription, OriginError> {
    connection.as_mut().ok_or_else(|| OriginError::away("not connected"))
}

/// Records that the frame after this position could not be used; returns how often so far.
fn failed_after(bad_frame: &mut Option<(Option<i64>, u32)>, position: Option<i64>) -> u32 {
    let tries = match bad_frame {
        Some((at, tries)) if *at == position => *tries + 1,
        _ => 1,
    };
    *bad_frame = Some((position, tries));
    tries
}

/// The numbering restarted: the relay is read from its oldest event, in a new epoch.
fn restarted(relay: &str, sequence: &Sequence) -> OriginError {
    OriginError::Reset(format!(
        "{relay} restarted its numbering: its numbers are far from {}; reading from its oldest event",
        sequence.high().unwrap_or_default()
    ))
}

/// Starts a gap at a skipped frame, unless there is one already.
fn passed_over(gap: &mut Option<Gap>, after: Option<i64>, why: &str) {
    gap.get_or_insert(Gap::new(format!("skipped a frame that cannot be used: {why}"), after));
}

/// Text from a relay may be of any length.
fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}
