//! The relay: a websocket server, and HTTP for those who verify what it sends.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode, header};
use axum::routing::get;
use axum::serve::ListenerExt as _;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::error::Error as WsError;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::NetworkOptions;
use super::frame::{Frame, future_cursor, outdated_cursor};
use super::network::{Network, Seek};
use super::recording::is_error;
use super::server::{self, Server};

/// Frames between two flushes, so that the kernel is not called for each.
const BATCH: u64 = 64;
/// Frames skipped between two looks at the other tasks.
const SKIP: u64 = 4096;
/// A cursor beyond this is in the future of an endless network, too: somebody who asks for it would wait minutes.
const ENDLESS: u64 = 200_000_000;
const PING: Duration = Duration::from_secs(10);
/// How long a client may take to answer a close.
const GOODBYE: Duration = Duration::from_secs(1);

/// Where frames come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Made up as it goes.
    Network(NetworkOptions),
    /// What a real server sent once.
    Recording(Arc<[Frame]>),
}

/// What a simulated relay does.
#[derive(Clone, Debug)]
pub struct RelayOptions {
    /// Where its frames come from.
    pub source: Source,
    /// Frames per second and connection; None or 0 is as fast as the consumer takes them. A consumer that falls
    /// behind is sent the backlog as fast as it takes it, as by a real relay.
    pub rate: Option<u32>,
    /// The number of the oldest frame that it still has, as far as consumers with a cursor are concerned; 0 has all.
    pub oldest: u64,
}

/// What the relay has done so far, of all connections together.
#[derive(Debug, Default)]
pub struct Counters {
    /// Consumers that are connected now.
    pub connections: AtomicU64,
    /// Consumers that ever were.
    pub connections_total: AtomicU64,
    /// Frames on their way: never fewer than what consumers have received.
    pub frames_sent: AtomicU64,
    /// The highest sequence number among them.
    pub last_seq_sent: AtomicU64,
    /// Whole repositories that were asked for.
    pub repositories_sent: AtomicU64,
}

/// What all connections share.
pub(super) struct Shared {
    options: RelayOptions,
    pub(super) counters: Arc<Counters>,
    /// What is known about the accounts, if they sign.
    pub(super) server: Option<Server>,
    consumers: TaskTracker,
    shutdown: CancellationToken,
}

/// Serves the stream to every consumer that connects, until `shutdown`; then closes all connections and returns.
///
/// A consumer is sent the frames whose `seq` is at least its `cursor`, without one every frame: this relay's window is
/// everything, unless `oldest` says otherwise. Each connection has its own network, which is why one that resumes sees the
/// same frames again. A cursor before `oldest` is answered with `OutdatedCursor`, one beyond the last frame with the error
/// `FutureCursor`, one that is not a number with HTTP 400, another path with HTTP 404. After the last frame the connection
/// stays open.
///
/// Frames of a recording that have no number are sent in their place, unless the consumer's cursor shows that it has
/// come that far already: otherwise nobody would ever get past a recorded error. After an error frame the connection
/// is closed.
///
/// If the network signs, the same address also answers as the directory of its accounts (`/did:plc:...`) and as their
/// server (getRepo, getRepoStatus, listRepos). Accounts that move do so to a server at another port of the same address.
///
/// # Errors
/// The listener fails.
pub async fn serve(
    listener: TcpListener,
    options: RelayOptions,
    counters: Arc<Counters>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let address = listener.local_addr().context("the simulated relay's listener has no address")?;
    tracing::debug!(%address, "simulated relay listens");
    let second = TcpListener::bind((address.ip(), 0)).await.context("no port for the second server")?;
    let server = match &options.source {
        Source::Network(network) => Server::new(network, Arc::clone(&counters), second.local_addr()?.port()),
        Source::Recording(_) => None,
    };
    let consumers = TaskTracker::new();
    let shared = Arc::new(Shared {
        options,
        counters,
        server,
        consumers: consumers.clone(),
        shutdown: shutdown.clone(),
    });
    let router = Router::new()
        .route("/xrpc/com.atproto.sync.subscribeRepos", get(subscribe))
        .route("/xrpc/com.atproto.sync.getRepo", get(server::repository))
        .route("/xrpc/com.atproto.sync.getRepoStatus", get(server::repository_status))
        .route("/xrpc/com.atproto.sync.listRepos", get(server::repositories))
        .route("/{did}", get(server::document))
        .with_state(shared);
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a consumer of the simulated relay is gone");
        }
    });
    let serving =
        axum::serve(listener, router.clone()).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    let serving_second = axum::serve(second, router).with_graceful_shutdown(shutdown.cancelled_owned());
    tokio::try_join!(serving.into_future(), serving_second.into_future())?;
    consumers.close();
    consumers.wait().await;
    Ok(())
}

/// Counts a connection for as long as it lives.
struct Connected(Arc<Counters>);

impl Connected {
    fn new(counters: Arc<Counters>) -> Self {
        counters.connections.fetch_add(1, Ordering::Relaxed);
        counters.connections_total.fetch_add(1, Ordering::Relaxed);
        Connected(counters)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;
type Sink = SplitSink<Socket, Message>;

/// Answers a request for the stream, and sends it from then on.
async fn subscribe(State(shared): State<Arc<Shared>>, mut request: Request) -> Response<Body> {
    let refuse = |reason: &str| {
        let mut refusal = Response::new(Body::from(format!("{reason}\n")));
        *refusal.status_mut() = StatusCode::BAD_REQUEST;
        refusal
    };
    let query = request.uri().query().unwrap_or_default();
    let given = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "cursor");
    let cursor = match given.map(|(_, number)| number.parse()) {
        None => None,
        Some(Ok(number)) => Some(number),
        Some(Err(_)) => return refuse("cursor must be a number"),
    };
    let key = request.headers().get(header::SEC_WEBSOCKET_KEY).map(|key| derive_accept_key(key.as_bytes()));
    let (Some(key), Some(upgrade)) = (key, request.extensions_mut().remove::<OnUpgrade>()) else {
        return refuse("this is a websocket");
    };
    let consumers = shared.consumers.clone();
    consumers.spawn(async move {
        let connected = async { Ok(consume(upgrade.await?, &shared, cursor).await?) };
        let ended: anyhow::Result<()> = connected.await;
        if let Err(error) = ended {
            tracing::debug!(%error, "a consumer of the simulated relay is gone");
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, header::HeaderValue::from_static("websocket"));
    if let Ok(key) = key.try_into() {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, key);
    }
    response
}

async fn consume(upgraded: Upgraded, shared: &Shared, cursor: Option<u64>) -> Result<(), WsError> {
    let config = WebSocketConfig::default()
        // Consumers say next to nothing.
        .read_buffer_size(4096)
        .max_message_size(Some(64 * 1024))
        .max_frame_size(Some(64 * 1024))
        .write_buffer_size(256 * 1024);
    let socket = Socket::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
    let _connected = Connected::new(Arc::clone(&shared.counters));
    let (mut sink, mut stream) = socket.split();
    {
        let mut leaving = pin!(drain(&mut stream));
        let mut sending = pin!(send(&mut sink, shared, cursor));
        tokio::select! {
            () = shared.shutdown.cancelled() => {}
            () = &mut leaving => return Ok(()),
            sent = &mut sending => sent?,
        }
    }
    let goodbye = async {
        sink.close().await?;
        drain(&mut stream).await;
        Ok(())
    };
    timeout(GOODBYE, goodbye).await.unwrap_or(Ok(()))
}

/// Reads until the client is gone, which answers its pings too. What it says does not matter.
async fn drain(stream: &mut SplitStream<Socket>) {
    while let Some(Ok(_)) = stream.next().await {}
}

/// Sends what there is to send and then pings; returns only when the relay has to close the connection.
async fn send(sink: &mut Sink, shared: &Shared, cursor: Option<u64>) -> Result<(), WsError> {
    let Shared { options, counters, .. } = shared;
    let is_outdated = cursor.is_some_and(|cursor| cursor < options.oldest);
    let Some(mut frames) = Frames::from(shared, cursor.map(|cursor| cursor.max(options.oldest))).await else {
        return sink.send(Message::Binary(future_cursor())).await;
    };
    if is_outdated {
        sink.send(Message::Binary(outdated_cursor())).await?;
    }
    let rate = options.rate.filter(|&rate| rate > 0);
    let started = Instant::now();
    let mut sent: u64 = 0;
    loop {
        let batch = match rate {
            None => BATCH,
            Some(rate) => {
                // The first frame is due at once, the others at even distances.
                let elapsed = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                let due = elapsed.saturating_mul(rate.into()) / 1_000_000 + 1;
                if due <= sent {
                    // Rounded up, so that it is due then.
                    let next = Duration::from_micros((sent * 1_000_000).div_ceil(rate.into()));
                    sleep_until(started + next).await;
                    continue;
                }
                (due - sent).min(BATCH)
            }
        };
        let mut end = None;
        let mut fed: u64 = 0;
        while end.is_none() && fed < batch {
            match frames.next() {
                None => end = Some(End::NoMore),
                Some(frame) => {
                    if frame.seq.is_none() && is_error(&frame.bytes) {
                        end = Some(End::Error);
                    }
                    counters.frames_sent.fetch_add(1, Ordering::Relaxed);
                    counters.last_seq_sent.fetch_max(frame.seq.unwrap_or(0), Ordering::Relaxed);
                    sink.feed(Message::Binary(frame.bytes)).await?;
                    fed += 1;
                }
            }
        }
        sink.flush().await?;
        sent += fed;
        match end {
            None => tokio::task::yield_now().await,
            Some(End::Error) => return Ok(()),
            Some(End::NoMore) => break,
        }
    }
    loop {
        sleep(PING).await;
        sink.send(Message::Ping(bytes::Bytes::new())).await?;
    }
}

enum End {
    NoMore,
    Error,
}

/// The frames of one connection.
enum Frames {
    Network(Box<Network>),
    Recording { frames: Arc<[Frame]>, at: usize, cursor: Option<u64>, before: Option<u64> },
}

impl Frames {
    /// None when the cursor is in the future.
    async fn from(shared: &Shared, cursor: Option<u64>) -> Option<Frames> {
        match &shared.options.source {
            Source::Network(options) => {
                let mut network = Network::new(options);
                if let Some(server) = &shared.server {
                    network = network.publishing(Arc::clone(&server.published));
                }
                let mut network = Box::new(network);
                let Some(cursor) = cursor else {
                    return Some(Frames::Network(network));
                };
                // Numbers grow by at most four.
                let most = if options.events == 0 { ENDLESS } else { options.events.saturating_mul(4) };
                if cursor > most {
                    return None;
                }
                loop {
                    match network.seek_some(cursor, SKIP) {
                        Seek::Found => return Some(Frames::Network(network)),
                        Seek::End => return None,
                        Seek::Further => tokio::task::yield_now().await,
                    }
                }
            }
            Source::Recording(frames) => {
                let last = frames.iter().filter_map(|frame| frame.seq).max();
                if let (Some(cursor), Some(last)) = (cursor, last)
                    && cursor > last
                {
                    return None;
                }
                Some(Frames::Recording { frames: frames.clone(), at: 0, cursor, before: None })
            }
        }
    }

    fn next(&mut self) -> Option<Frame> {
        match self {
            Frames::Network(network) => network.next(),
            Frames::Recording { frames, at, cursor, before } => loop {
                let frame = frames.get(*at)?;
                *at += 1;
                let is_wanted = match (frame.seq, *cursor) {
                    (_, None) => true,
                    (Some(seq), Some(cursor)) => seq >= cursor,
                    // A cursor at the frame before it says that its consumer was here.
                    (None, Some(cursor)) => before.is_none_or(|before| before > cursor),
                };
                *before = frame.seq.or(*before);
                if is_wanted {
                    return Some(frame.clone());
                }
            },
        }
    }
}
