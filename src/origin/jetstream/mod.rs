//! A Jetstream (v1, <https://github.com/bluesky-social/jetstream>): the relay's events as JSON, one operation in each message, and
//! without signatures. A position is a time in microseconds.

pub mod compressed;
pub mod decode;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result as AnyResult;
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::json;
use tokio::time::Instant;
use tokio_tungstenite::Connector;
use tokio_tungstenite::tungstenite::Message as WsMessage;
use tracing::{debug, info, warn};

use self::compressed::Decompressor;
use self::decode::{Message, decode};
use super::connect::{self, GOODBYE, MESSAGE_BYTES, PASSED_OVER_BYTES, STEADY, Socket};
use super::{Arrival, Origin, OriginError, sleep_until};
use crate::config::{Config, WantedDids};
use crate::event::check_rev;
use crate::metrics;
use crate::status::Status;
use crate::stream::gap::Gap;
use crate::time::now_ms;

/// Events are numbered by the clock of the server, and several servers may stand behind one name: what comes this long before the
/// position is read again. It is applied already, and changes nothing.
const MARGIN_MICROS: i64 = 5_000_000;
/// The next event after a position that the server still has comes within this time; see [`Jetstream::gap`].
const NEXT_MICROS: i64 = 60_000_000;
/// A message that is so far ahead of our clock is not believed.
const AHEAD_MICROS: i64 = 60_000_000;
/// Unusable messages are logged again after this time.
const SAY_AGAIN: Duration = Duration::from_mins(1);
/// The most accounts that are named in the URL. The list of more is sent once the connection is open.
const IN_URL: usize = 50;
/// The most collections and accounts that a Jetstream accepts. Beyond that, everything is asked for, and left out here.
const MAX_COLLECTIONS: usize = 100;
const MAX_DIDS: usize = 10_000;

/// The configured Jetstream.
pub struct Jetstream {
    name: String,
    config: Arc<Config>,
    status: Arc<Status>,
    tls: Connector,
    /// If it was asked to compress.
    decompressor: Option<Decompressor>,
    connection: Option<Subscription>,
    announced: bool,
    /// When it was first connected, in microseconds since 1970.
    began: Option<i64>,
    /// When an unusable message was last logged.
    said: Option<Instant>,
}

/// A connection and its progress.
struct Subscription {
    socket: Socket,
    since: Instant,
    last_data: Instant,
    /// The position that it was opened with, until the first event.
    from: Option<i64>,
    missed: BTreeMap<&'static str, u64>,
    /// Whether the last message could not be used.
    unusable: bool,
}

impl Origin for Jetstream {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn open(&mut self, from: Option<i64>) -> Result<(), OriginError> {
        // Until there is a position, it is the time of the first connection: with few accounts, the first event may be far off.
        let from = from.or(self.began);
        self.began.get_or_insert_with(|| micros(now_ms()));
        let (url, update) = self.request(from);
        let socket = connect::open(url, &self.name, self.tls.clone(), PASSED_OVER_BYTES).await;
        let mut socket = socket.map_err(|refused| OriginError::Away {
            reason: refused.reason,
            retry_after: refused.retry_after,
        })?;
        if let Some(update) = update {
            let sent = socket.send(WsMessage::text(update)).await;
            sent.map_err(|error| OriginError::away(error.to_string()))?;
        }
        self.connection = Some(Subscription {
            socket,
            since: Instant::now(),
            last_data: Instant::now(),
            from: from.filter(|from| *from > 0),
            missed: BTreeMap::new(),
            unusable: false,
        });
        metrics::count(metrics::RELAY_CONNECTS, 1);
        if std::mem::replace(&mut self.announced, true) {
            debug!(jetstream = self.name, cursor = from, "connected to the Jetstream again");
        } else {
            info!(
                jetstream = self.name,
                cursor = from,
                "connected to the Jetstream; what it sends is not signed"
            );
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Arrival, OriginError> {
        loop {
            let text = self.message().await?;
            self.status.reader(|reader| {
                reader.frames += 1;
                reader.last_frame_ms = Some(now_ms());
            });
            if let Some(arrival) = self.read(text)? {
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

impl Jetstream {
    /// The configured Jetstream, not connected yet.
    ///
    /// # Errors
    ///
    /// There is no authority for `wss://` to trust.
    pub fn new(config: Arc<Config>, status: Arc<Status>) -> AnyResult<Self> {
        let tls = connect::tls(&config)?;
        let compresses = config.relay_url.is_compressed();
        let decompressor = compresses.then(|| Decompressor::new(MESSAGE_BYTES)).transpose();
        Ok(Self {
            name: config.relay_url.relay(),
            decompressor: decompressor.map_err(anyhow::Error::msg)?,
            config,
            status,
            tls,
            connection: None,
            announced: false,
            began: None,
            said: None,
        })
    }

    /// The URL to connect to, and what to send first, if anything.
    fn request(&self, from: Option<i64>) -> (String, Option<String>) {
        let collections = self.config.collections.patterns();
        let collections = collections.filter(|names| names.len() <= MAX_COLLECTIONS).unwrap_or_default();
        let mut dids: Vec<&str> = match &self.config.wanted_dids {
            Some(WantedDids::List(list)) if list.len() <= MAX_DIDS => {
                list.iter().map(String::as_str).collect()
            }
            _ => Vec::new(),
        };
        dids.sort_unstable();
        let mut query = Vec::new();
        if let Some(from) = from {
            // A position in the past that it does not have means the oldest that it has.
            query.push(format!("cursor={}", (from - MARGIN_MICROS).max(1)));
        }
        let update = (dids.len() > IN_URL).then(|| {
            query.push("requireHello=true".to_owned());
            let payload =
                json!({ "wantedCollections": collections, "wantedDids": dids, "maxMessageSizeBytes": 0 });
            json!({ "type": "options_update", "payload": payload }).to_string()
        });
        if update.is_none() {
            query.extend(collections.iter().map(|name| format!("wantedCollections={name}")));
            // A DID may contain `%`.
            query.extend(dids.iter().map(|did| format!("wantedDids={}", did.replace('%', "%25"))));
        }
        let mut url = self.config.relay_url.expose().to_owned();
        if !query.is_empty() {
            url.push(if url.contains('?') { '&' } else { '?' });
            url.push_str(&query.join("&"));
        }
        (url, update)
    }

    /// The next message, or what is wrong with it.
    async fn message(&mut self) -> Result<Result<String, String>, OriginError> {
        let Self { name, config, status, connection, decompressor, .. } = self;
        let connection = connection.as_mut().ok_or_else(|| OriginError::away("not connected"))?;
        // Of few accounts, there may be nothing for hours.
        let narrow = matches!(config.wanted_dids, Some(WantedDids::List(_)));
        let idle = config.relay_idle_timeout.unwrap_or(Duration::from_secs(u64::MAX / 4));
        loop {
            // A server that always has a message ready must not starve the lease and the queue.
            tokio::task::coop::consume_budget().await;
            let message = tokio::select! {
                biased;
                message = connection.socket.next() => message,
                () = sleep_until(connection.last_data, idle) => {
                    return Err(OriginError::away(format!("no event within {idle:?} (RELAY_IDLE_TIMEOUT)")));
                }
            };
            if connection.since.elapsed() > STEADY && !connection.unusable {
                status.reader(|reader| reader.taking_in_ms = now_ms());
            }
            match message {
                Some(Ok(WsMessage::Text(text))) => {
                    connection.last_data = Instant::now();
                    return Ok(Ok(text.as_str().to_owned()));
                }
                Some(Ok(WsMessage::Binary(frame))) => {
                    connection.last_data = Instant::now();
                    let Some(decompressor) = decompressor else {
                        return Err(OriginError::Operator(format!(
                            "{name} sends binary data, which a Jetstream does only when asked to: add compress=true to RELAY_URL, or \
                             write the address of a relay without /subscribe"
                        )));
                    };
                    return Ok(decompressor.text(&frame));
                }
                Some(Ok(WsMessage::Close(reason))) => {
                    let reason =
                        reason.map(|r| format!(": {} {:.200}", r.code, r.reason)).unwrap_or_default();
                    return Err(OriginError::away(format!("closed by the Jetstream{reason}")));
                }
                // Pings say little about a feed that always has something to send.
                Some(Ok(_)) if narrow => connection.last_data = Instant::now(),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(OriginError::away(error.to_string())),
                None => return Err(OriginError::away("the connection ended")),
            }
        }
    }

    /// The arrival in a message; `None` if it has nothing for the stream.
    fn read(&mut self, text: Result<String, String>) -> Result<Option<Arrival>, OriginError> {
        let decoded = text.and_then(|text| {
            if text.len() > MESSAGE_BYTES {
                return Err(format!("it has {} bytes; at most {MESSAGE_BYTES} are read", text.len()));
            }
            decode(&text, &self.config.collections)
        });
        let decoded = decoded.and_then(|message| {
            // Such a position would be asked for in vain until its time has come.
            let ahead = message.position > micros(now_ms()) + AHEAD_MICROS;
            if ahead { Err("its time is in the future".to_owned()) } else { Ok(message) }
        });
        let narrow = matches!(self.config.wanted_dids, Some(WantedDids::List(_)));
        let connection = self.connection.as_mut().ok_or_else(|| OriginError::away("not connected"))?;
        let Message { kind, position, did, entries, no_handle, rev } = match decoded {
            Ok(message) => message,
            Err(error) => {
                // It would be sent again like this.
                metrics::count(metrics::RELAY_BAD_FRAMES, 1);
                *connection.missed.entry("frame").or_default() += 1;
                connection.unusable = true;
                if self.said.is_none_or(|said| said.elapsed() > SAY_AGAIN) {
                    self.said = Some(Instant::now());
                    warn!(error = format_args!("{error:.200}"), "a message of the Jetstream cannot be used");
                }
                return Ok(None);
            }
        };
        metrics::frame(kind);
        connection.unusable = false;
        if no_handle {
            *connection.missed.entry("no_handle").or_default() += 1;
        }
        let from = connection.from.take();
        let gap = from.filter(|_| !narrow).and_then(|from| Self::gap(from, position));
        self.announced = false;
        // A revision ahead of the clock is refused when it is applied, and must not set a time here.
        let rev = if check_rev(&rev, now_ms()).is_ok() { rev } else { String::new() };
        let missed = std::mem::take(&mut connection.missed);
        Ok(Some(Arrival { position, did, entries, missed, rev, gap, ..Arrival::default() }))
    }

    /// A Jetstream does not say that it no longer has the requested events, and begins with the oldest that it has. Identity and
    /// account events pass every filter of collections, so that somewhere in the network there is one within a minute.
    fn gap(from: i64, first: i64) -> Option<Gap> {
        let seconds = (first - from) / 1_000_000;
        (first - from > NEXT_MICROS).then(|| {
            let reason = format!(
                "the Jetstream's first event is {seconds} s after the requested one: it no longer has those between"
            );
            // Its size in events is not known.
            Gap::new(reason, Some(from))
        })
    }
}

fn micros(ms: u64) -> i64 {
    i64::try_from(ms.saturating_mul(1000)).unwrap_or(i64::MAX)
}
