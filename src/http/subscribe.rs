//! `GET /subscribe`: what has been applied, over a websocket, in the format of a Jetstream (version 1). Its clients connect
//! unchanged.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State as Shared};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message as WsMessage, Utf8Bytes};
use tracing::{debug, info};

use super::admin::is_foreign;
use super::connections::Peer;
use super::{Server, bearer};
use crate::config::{AccessToken, Config};
use crate::control::Control;
use crate::metrics;
use crate::output::feed::{Ended, Feed, Subscriber};
use crate::output::jetstream::{Filter, Options};

/// The longest message that a subscriber may send: a list of accounts.
const MESSAGE_BYTES: usize = 1 << 20;
/// How often a subscriber is asked whether it is still there, and how long it has to answer.
const PING: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_secs(90);
/// Time limit for saying goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Serves subscribers, if `SUBSCRIBE` is on and this process has pipelines.
pub struct Outlet {
    feed: Arc<Feed>,
    token: Option<AccessToken>,
    places: Arc<Semaphore>,
    connections: usize,
    /// Ended together with the server.
    sessions: Mutex<JoinSet<()>>,
}

impl Outlet {
    /// An outlet without subscribers.
    #[must_use]
    pub fn new(config: &Config, feed: Feed) -> Self {
        Self {
            feed: Arc::new(feed),
            token: config.subscribe_token.clone(),
            places: Arc::new(Semaphore::new(config.subscribe_connections)),
            connections: config.subscribe_connections,
            sessions: Mutex::new(JoinSet::new()),
        }
    }

    /// Reads the stream for the subscribers, for as long as it is polled.
    pub async fn run(&self) {
        self.feed.run().await;
    }

    /// How far each subscriber is.
    #[must_use]
    pub fn feed(&self) -> &Feed {
        &self.feed
    }
}

/// What the URL asks for.
struct Asked {
    options: Options,
    cursor: Option<u64>,
    require_hello: bool,
    compress: bool,
    token: Option<String>,
}

impl Asked {
    fn read(query: &str) -> Result<Self, String> {
        let mut asked = Self {
            options: Options::default(),
            cursor: None,
            require_hello: false,
            compress: false,
            token: None,
        };
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let number = || value.parse::<i64>().map_err(|_| format!("{name}: {value:.50} is not a number"));
            match &*name {
                "wantedCollections" => asked.options.wanted_collections.push(value.into_owned()),
                "wantedDids" => asked.options.wanted_dids.push(value.into_owned()),
                "maxMessageSizeBytes" => asked.options.max_message_size_bytes = number()?,
                // Before there was anything is the beginning.
                "cursor" => asked.cursor = Some(u64::try_from(number()?).unwrap_or(0)),
                "requireHello" => asked.require_hello = value == "true",
                "compress" => asked.compress = value == "true",
                "token" => asked.token = Some(value.into_owned()),
                // As in a Jetstream, what is unknown changes nothing.
                _ => {}
            }
        }
        Ok(asked)
    }
}

fn refuse(code: StatusCode, message: impl Into<String>) -> Response {
    let mut text: String = message.into();
    text.push('\n');
    (code, text).into_response()
}

/// Answers a request to subscribe.
pub(super) async fn subscribe(Shared(server): Shared<Arc<Server>>, request: Request) -> Response {
    let Some(outlet) = &server.outlet else {
        return refuse(
            StatusCode::NOT_FOUND,
            "this process does not serve subscribers: run standpipe run or worker with SUBSCRIBE=on",
        );
    };
    let (asked, filter, accept) = match outlet.understand(&request) {
        Ok(understood) => understood,
        Err(answer) => return answer,
    };
    if server.control.is_draining() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "this process is draining");
    }
    let Ok(place) = Arc::clone(&outlet.places).try_acquire_owned() else {
        let message =
            format!("the limit of {} subscribers is reached (SUBSCRIBE_CONNECTIONS)", outlet.connections);
        return ([(header::RETRY_AFTER, "5")], refuse(StatusCode::SERVICE_UNAVAILABLE, message))
            .into_response();
    };
    let session = Session {
        feed: Arc::clone(&outlet.feed),
        control: Arc::clone(&server.control),
        peer: request.extensions().get::<Peer>().map(|Peer(address)| address.to_string()).unwrap_or_default(),
        cursor: asked.cursor,
        hello: !asked.require_hello,
        framed: asked.compress,
        filter,
        place,
    };
    let upgrade = hyper::upgrade::on(request);
    let mut sessions = outlet.sessions.lock().await;
    while sessions.try_join_next().is_some() {}
    sessions.spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            session.run(TokioIo::new(upgraded)).await;
        }
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("Upgrade")),
        (header::UPGRADE, HeaderValue::from_static("websocket")),
        (header::SEC_WEBSOCKET_ACCEPT, accept),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

impl Outlet {
    /// What a request asks for, and the answer to its handshake.
    #[expect(clippy::result_large_err, reason = "the error is the answer")]
    fn understand(&self, request: &Request) -> Result<(Asked, Filter, HeaderValue), Response> {
        let bad = |message| refuse(StatusCode::BAD_REQUEST, message);
        let headers = request.headers();
        let mut asked = Asked::read(request.uri().query().unwrap_or_default()).map_err(bad)?;
        if let Some(token) = &self.token {
            let given = bearer(headers).or(asked.token.as_deref());
            if !given.is_some_and(|given| token.is(given)) {
                let what = if given.is_some() { "wrong token" } else { "a token is required" };
                let message = format!("{what} (SUBSCRIBE_TOKEN): Authorization: Bearer, or ?token=");
                let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
                return Err((challenge, refuse(StatusCode::UNAUTHORIZED, message)).into_response());
            }
        }
        if self.token.is_none() && is_foreign(headers) {
            // Browsers let every page open websockets to every address.
            let message = "web pages of other sites need a token: set SUBSCRIBE_TOKEN";
            return Err(refuse(StatusCode::FORBIDDEN, message));
        }
        asked.compress |= headers.get("socket-encoding").is_some_and(|value| value == "zstd");
        let filter = Filter::new(std::mem::take(&mut asked.options)).map_err(bad)?;
        let accept = accept_key(headers).ok_or_else(|| {
            let headers = [(header::UPGRADE, "websocket"), (header::SEC_WEBSOCKET_VERSION, "13")];
            let message = "this endpoint speaks WebSocket: connect with ws:// or wss://";
            (headers, refuse(StatusCode::UPGRADE_REQUIRED, message)).into_response()
        })?;
        Ok((asked, filter, accept))
    }
}

/// The answer to a websocket's handshake (RFC 6455, 4.2); `None` if the request is not one.
fn accept_key(headers: &HeaderMap) -> Option<HeaderValue> {
    let has = |name: header::HeaderName, word: &str| {
        let values = headers.get_all(name);
        let mut words =
            values.iter().filter_map(|value| value.to_str().ok()).flat_map(|text| text.split(','));
        words.any(|text| text.trim().eq_ignore_ascii_case(word))
    };
    let is_handshake = has(header::CONNECTION, "upgrade")
        && has(header::UPGRADE, "websocket")
        && has(header::SEC_WEBSOCKET_VERSION, "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| is_handshake)?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok()
}

/// A message from a subscriber.
#[derive(Deserialize)]
struct FromSubscriber {
    r#type: String,
    #[serde(default)]
    payload: Options,
}

/// Why a session ends.
#[derive(Debug, thiserror::Error)]
enum End {
    /// The subscriber closed it, or its connection broke.
    #[error("the subscriber left")]
    Left,
    /// The subscriber has read nothing for too long.
    #[error("nothing was read for 10 seconds")]
    Slow,
    /// The subscriber does not answer.
    #[error("no answer to pings for 90 seconds")]
    Silent,
    #[error("{0}")]
    Ended(#[from] Ended),
    /// The subscriber sent something wrong.
    #[error("{0}")]
    Invalid(String),
    /// This process ends.
    #[error("the server is draining: reconnect with the last cursor")]
    Draining,
}

impl End {
    /// The label of the metric.
    fn name(&self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Slow => "slow",
            Self::Silent => "silent",
            Self::Ended(Ended::Behind) => "behind",
            Self::Invalid(_) => "invalid",
            Self::Draining => "draining",
        }
    }

    fn code(&self) -> CloseCode {
        match self {
            Self::Left | Self::Draining => CloseCode::Away,
            Self::Invalid(_) | Self::Slow | Self::Silent | Self::Ended(_) => CloseCode::Policy,
        }
    }
}

impl From<tungstenite::Error> for End {
    fn from(error: tungstenite::Error) -> Self {
        match error {
            // connections.rs ends a connection in which nothing moves.
            tungstenite::Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut => Self::Slow,
            tungstenite::Error::Capacity(error) => Self::Invalid(error.to_string()),
            _ => Self::Left,
        }
    }
}

/// A subscriber's connection.
struct Session {
    feed: Arc<Feed>,
    control: Arc<Control>,
    peer: String,
    cursor: Option<u64>,
    /// Whether it may begin: no `requireHello`.
    hello: bool,
    /// Whether it wants Zstandard frames.
    framed: bool,
    filter: Filter,
    place: OwnedSemaphorePermit,
}

impl Session {
    async fn run(self, io: TokioIo<Upgraded>) {
        let Self { feed, control, peer, cursor, hello, framed, filter, place } = self;
        let limits = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_BYTES))
            .max_frame_size(Some(MESSAGE_BYTES));
        let socket = Socket::from_raw_socket(io, Role::Server, Some(limits)).await;
        let (sink, source) = socket.split();
        info!(peer, cursor, "a subscriber connected");
        let (tell, filters) = watch::channel(hello.then_some(filter));
        let heard = watch::Sender::new(Instant::now());
        let sink = Mutex::new(sink);
        let end = tokio::select! {
            end = listen(source, &tell, &heard) => end,
            end = send(&sink, Subscriber::new(feed, cursor), filters, framed) => end,
            end = ping(&sink, &heard) => end,
            () = control.drain_begun() => End::Draining,
        };
        metrics::subscriber_ended(end.name());
        if matches!(end, End::Left) {
            debug!(peer, "a subscriber left");
        } else {
            info!(peer, reason = %end, "a subscriber was disconnected");
        }
        let frame =
            CloseFrame { code: end.code(), reason: Utf8Bytes::from(format!("{:.120}", end.to_string())) };
        let _ = tokio::time::timeout(GOODBYE, async {
            let mut sink = sink.into_inner();
            let _ = sink.send(WsMessage::Close(Some(frame))).await;
            sink.close().await
        })
        .await;
        drop(place);
    }
}

/// Reads what the subscriber sends: new options, and answers to pings.
async fn listen(
    mut source: SplitStream<Socket>,
    filters: &watch::Sender<Option<Filter>>,
    heard: &watch::Sender<Instant>,
) -> End {
    loop {
        let message = match source.next().await {
            None | Some(Ok(WsMessage::Close(_))) => return End::Left,
            Some(Err(error)) => return error.into(),
            Some(Ok(message)) => message,
        };
        heard.send_replace(Instant::now());
        let WsMessage::Text(text) = message else { continue };
        let update: FromSubscriber = match serde_json::from_str(&text) {
            Ok(update) => update,
            Err(error) => return End::Invalid(format!("cannot parse the message: {error}")),
        };
        if update.r#type != "options_update" {
            return End::Invalid(format!("unknown message type {:.50}: send options_update", update.r#type));
        }
        match Filter::new(update.payload) {
            Ok(filter) => filters.send_replace(Some(filter)),
            Err(message) => return End::Invalid(message),
        };
    }
}

/// Sends what the subscriber wants, as soon as it has said hello.
async fn send(
    sink: &Mutex<SplitSink<Socket, WsMessage>>,
    mut subscriber: Subscriber,
    mut filters: watch::Receiver<Option<Filter>>,
    framed: bool,
) -> End {
    let _ = filters.wait_for(Option::is_some).await;
    loop {
        let items = match subscriber.next().await {
            Ok(items) => items,
            Err(ended) => return ended.into(),
        };
        let mut sink = sink.lock().await;
        let mut sent = 0;
        for item in items {
            for message in &item.messages {
                let wanted = filters.borrow().as_ref().is_some_and(|filter| filter.wants(message));
                let Some(message) = wanted.then(|| message_of(&message.text, framed)).flatten() else {
                    continue;
                };
                if let Err(error) = sink.feed(message).await {
                    return error.into();
                }
                sent += 1;
            }
        }
        if let Err(error) = sink.flush().await {
            return error.into();
        }
        metrics::count(metrics::SUBSCRIBER_MESSAGES, sent);
    }
}

/// A message as it is sent. Clients that ask for compression get Zstandard frames, which every Jetstream client can read; the
/// content is not compressed.
fn message_of(text: &Bytes, framed: bool) -> Option<WsMessage> {
    if framed {
        return Some(WsMessage::Binary(zstandard_frame(text).into()));
    }
    // Our own JSON is UTF-8.
    Utf8Bytes::try_from(text.clone()).ok().map(WsMessage::Text)
}

/// A Zstandard frame with this content, as it is (RFC 8878, 3.1.1: a single segment, its size, and raw blocks).
fn zstandard_frame(content: &[u8]) -> Vec<u8> {
    /// The largest block.
    const BLOCK: usize = 128 << 10;
    let mut frame = Vec::with_capacity(content.len() + 16);
    frame.extend_from_slice(&0xFD2F_B528_u32.to_le_bytes());
    frame.push(0b1010_0000);
    frame.extend_from_slice(&u32::try_from(content.len()).unwrap_or(u32::MAX).to_le_bytes());
    let mut rest = content;
    loop {
        let (block, after) = rest.split_at(rest.len().min(BLOCK));
        let header = u32::from(after.is_empty()) | (block.len() as u32) << 3;
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.extend_from_slice(block);
        rest = after;
        if rest.is_empty() {
            return frame;
        }
    }
}

/// Asks whether the subscriber is still there.
async fn ping(sink: &Mutex<SplitSink<Socket, WsMessage>>, heard: &watch::Sender<Instant>) -> End {
    loop {
        tokio::time::sleep(PING).await;
        if heard.borrow().elapsed() > ANSWER {
            return End::Silent;
        }
        if let Err(error) = sink.lock().await.send(WsMessage::Ping(Bytes::new())).await {
            return error.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::jetstream::compressed::Decompressor;

    #[test]
    fn a_frame_has_its_content() {
        let mut decompressor = Decompressor::new(1 << 20).unwrap();
        for length in [0, 1, 700, (128 << 10) - 1, 128 << 10, (128 << 10) + 1, 300_000] {
            let text = "x".repeat(length);
            assert_eq!(decompressor.text(&zstandard_frame(text.as_bytes())).unwrap(), text, "{length}");
        }
    }
}
