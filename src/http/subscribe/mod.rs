//! `GET /subscribe`: what has been applied, over a websocket, in the format of a Jetstream (version 1), and
//! `GET /xrpc/network.bsky.jetstream.subscribeEvents`, in that of version 2. Their clients connect unchanged.

mod asked;
mod frame;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::json;
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
use crate::output::events;
use crate::output::feed::{Ended, Feed, Subscriber};
use crate::output::filter::Filter;
use asked::{Asked, FromSubscriber, Version};
use frame::{Format, text};

/// The longest message that a subscriber may send: a list of accounts.
const MESSAGE_BYTES: usize = 1 << 20;
/// How often a subscriber is asked whether it is still there, and how long it has to answer.
const PING: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_secs(90);
/// Time limit for saying goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// The subprotocol of version 2.
const PROTOCOL: &str = "xrpc.v1.json";

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

/// Refuses a request: in version 2 as an XRPC error.
fn refuse(version: Version, code: StatusCode, message: &str) -> Response {
    let name = match code {
        StatusCode::UNAUTHORIZED => "AuthenticationRequired",
        StatusCode::FORBIDDEN => "Forbidden",
        StatusCode::NOT_FOUND => "MethodNotImplemented",
        StatusCode::SERVICE_UNAVAILABLE => "NotEnoughResources",
        _ => "InvalidRequest",
    };
    match version {
        Version::One => (code, format!("{message}\n")).into_response(),
        Version::Two => (code, Json(json!({"error": name, "message": message}))).into_response(),
    }
}

/// Answers a request to subscribe in version 1.
pub(super) async fn version_1(Shared(server): Shared<Arc<Server>>, request: Request) -> Response {
    subscribe(Version::One, &server, request).await
}

/// Answers a request to subscribe in version 2.
pub(super) async fn version_2(Shared(server): Shared<Arc<Server>>, request: Request) -> Response {
    subscribe(Version::Two, &server, request).await
}

async fn subscribe(version: Version, server: &Server, request: Request) -> Response {
    let Some(outlet) = &server.outlet else {
        return refuse(
            version,
            StatusCode::NOT_FOUND,
            "this process does not serve subscribers: run standpipe run or worker with SUBSCRIBE=on",
        );
    };
    let (asked, filter, accept) = match outlet.understand(version, &request) {
        Ok(understood) => understood,
        Err(answer) => return answer,
    };
    if server.control.is_draining() {
        return refuse(version, StatusCode::SERVICE_UNAVAILABLE, "this process is draining");
    }
    let Ok(place) = Arc::clone(&outlet.places).try_acquire_owned() else {
        let message =
            format!("the limit of {} subscribers is reached (SUBSCRIBE_CONNECTIONS)", outlet.connections);
        return ([(header::RETRY_AFTER, "5")], refuse(version, StatusCode::SERVICE_UNAVAILABLE, &message))
            .into_response();
    };
    let session = Session {
        feed: Arc::clone(&outlet.feed),
        control: Arc::clone(&server.control),
        peer: request.extensions().get::<Peer>().map(|Peer(address)| address.to_string()).unwrap_or_default(),
        cursor: asked.cursor,
        hello: !asked.require_hello,
        format: match version {
            Version::One if asked.compress => Format::Framed,
            Version::One => Format::Plain,
            Version::Two => Format::Events { from: 0 },
        },
        filter,
        place,
    };
    let offered = request.headers().get(header::SEC_WEBSOCKET_PROTOCOL).and_then(|value| value.to_str().ok());
    let speaks = offered.is_some_and(|names| names.split(',').any(|name| name.trim() == PROTOCOL));
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
    let mut answer = (StatusCode::SWITCHING_PROTOCOLS, headers).into_response();
    if version == Version::Two && speaks {
        answer.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOCOL));
    }
    answer
}

impl Outlet {
    /// What a request asks for, and the answer to its handshake.
    #[expect(clippy::result_large_err, reason = "the error is the answer")]
    fn understand(
        &self,
        version: Version,
        request: &Request,
    ) -> Result<(Asked, Filter, HeaderValue), Response> {
        let headers = request.headers();
        let mut asked = Asked::read(version, request.uri().query().unwrap_or_default())
            .map_err(|message| refuse(version, StatusCode::BAD_REQUEST, &message))?;
        if let Some(token) = &self.token {
            let given = bearer(headers).or(asked.token.as_deref());
            if !given.is_some_and(|given| token.is(given)) {
                let what = if given.is_some() { "wrong token" } else { "a token is required" };
                let message = format!("{what} (SUBSCRIBE_TOKEN): Authorization: Bearer, or ?token=");
                let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
                return Err((challenge, refuse(version, StatusCode::UNAUTHORIZED, &message)).into_response());
            }
        }
        if self.token.is_none() && is_foreign(headers) {
            // Browsers let every page open websockets to every address.
            let message = "web pages of other sites need a token: set SUBSCRIBE_TOKEN";
            return Err(refuse(version, StatusCode::FORBIDDEN, message));
        }
        asked.compress |= headers.get("socket-encoding").is_some_and(|value| value == "zstd");
        let filter = asked.filter().map_err(|message| refuse(version, StatusCode::BAD_REQUEST, &message))?;
        let accept = accept_key(headers).ok_or_else(|| {
            let headers = [(header::UPGRADE, "websocket"), (header::SEC_WEBSOCKET_VERSION, "13")];
            let message = "this endpoint speaks WebSocket: connect with ws:// or wss://";
            (headers, refuse(version, StatusCode::UPGRADE_REQUIRED, message)).into_response()
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

    /// In version 2, the last frame, if there is something to say.
    fn frame(&self) -> Option<WsMessage> {
        let name = match self {
            Self::Left | Self::Draining | Self::Silent => return None,
            Self::Slow | Self::Ended(Ended::Behind) => "ConsumerTooSlow",
            Self::Invalid(_) => "InvalidRequest",
        };
        events::error(name, &self.to_string()).ok().and_then(text)
    }

    /// Clients for version 2 take "away" for the end, and do not come back.
    fn code(&self, is_version_2: bool) -> CloseCode {
        match self {
            Self::Draining if is_version_2 => CloseCode::Restart,
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
    format: Format,
    filter: Filter,
    place: OwnedSemaphorePermit,
}

impl Session {
    async fn run(self, io: TokioIo<Upgraded>) {
        let Self { feed, control, peer, cursor, hello, format, filter, place } = self;
        let limits = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_BYTES))
            .max_frame_size(Some(MESSAGE_BYTES));
        let socket = Socket::from_raw_socket(io, Role::Server, Some(limits)).await;
        let (sink, source) = socket.split();
        info!(peer, cursor, "a subscriber connected");
        let (tell, filters) = watch::channel(hello.then_some(filter));
        let heard = watch::Sender::new(Instant::now());
        let sink = Mutex::new(sink);
        let numbered = matches!(format, Format::Events { .. });
        let subscriber = Subscriber::new(feed, cursor);
        let end = tokio::select! {
            end = listen(source, &tell, &heard, numbered) => end,
            Err(end) = send(&sink, subscriber, filters, format, cursor) => end,
            end = ping(&sink, &heard) => end,
            () = control.drain_begun() => End::Draining,
        };
        metrics::subscriber_ended(end.name());
        if matches!(end, End::Left) {
            debug!(peer, "a subscriber left");
        } else {
            info!(peer, reason = %end, "a subscriber was disconnected");
        }
        let code = end.code(numbered);
        let goodbye = CloseFrame { code, reason: Utf8Bytes::from(format!("{:.120}", end.to_string())) };
        let _ = tokio::time::timeout(GOODBYE, async {
            let mut sink = sink.into_inner();
            if let Some(last) = end.frame().filter(|_| numbered) {
                let _ = sink.send(last).await;
            }
            let _ = sink.send(WsMessage::Close(Some(goodbye))).await;
            sink.close().await
        })
        .await;
        drop(place);
    }
}

/// Reads what the subscriber sends: new options, except in version 2 (`is_silent`), and answers to pings.
async fn listen(
    mut source: SplitStream<Socket>,
    filters: &watch::Sender<Option<Filter>>,
    heard: &watch::Sender<Instant>,
    is_silent: bool,
) -> End {
    loop {
        let message = match source.next().await {
            None | Some(Ok(WsMessage::Close(_))) => return End::Left,
            Some(Err(error)) => return error.into(),
            Some(Ok(message)) => message,
        };
        heard.send_replace(Instant::now());
        if is_silent && (message.is_text() || message.is_binary()) {
            return End::Invalid("this endpoint takes no messages".to_owned());
        }
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
    mut format: Format,
    cursor: Option<u64>,
) -> Result<Infallible, End> {
    if let Format::Events { from } = &mut format {
        let begun = subscriber.begin(cursor).await;
        *from = begun.from;
        if let Some(notice) = begun.notice.and_then(frame::notice) {
            sink.lock().await.send(notice).await?;
        }
    }
    let _ = filters.wait_for(Option::is_some).await;
    loop {
        let items = subscriber.next().await?;
        let mut sink = sink.lock().await;
        let mut sent = 0;
        for item in items {
            for message in &item.messages {
                let Some(message) =
                    filters.borrow().as_ref().and_then(|filter| format.of(&item, message, filter))
                else {
                    continue;
                };
                sink.feed(message).await?;
                sent += 1;
            }
        }
        sink.flush().await?;
        metrics::count(metrics::SUBSCRIBER_MESSAGES, sent);
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
