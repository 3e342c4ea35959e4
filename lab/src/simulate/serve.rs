//! The websocket server.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::error::Error as WsError;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::StatusCode;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_util::sync::CancellationToken;

use super::NetworkOptions;
use super::frame::{Frame, future_cursor};
use super::network::{Network, Seek};
use super::recording::is_error;

const PATH: &str = "/xrpc/com.atproto.sync.subscribeRepos";
/// Frames between two flushes, so that the kernel is not called for each.
const BATCH: u64 = 64;
/// Frames skipped between two looks at the other tasks.
const SKIP: u64 = 4096;
/// A cursor beyond this is in the future of an endless network, too: somebody who asks for it would wait minutes.
const ENDLESS: u64 = 200_000_000;
const PING: Duration = Duration::from_secs(10);
const HANDSHAKE: Duration = Duration::from_secs(10);
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
}

/// Serves the stream to every consumer that connects, until `shutdown`; then closes all connections and returns.
///
/// A consumer is sent the frames whose `seq` is at least its `cursor`, without one every frame: this relay's window is
/// everything. Each connection has its own network, which is why one that resumes sees the same frames again. A cursor
/// beyond the last frame is answered with the error `FutureCursor`, one that is not a number with HTTP 400, another path
/// with HTTP 404. After the last frame the connection stays open.
///
/// Frames of a recording that have no number are sent in their place, unless the consumer's cursor shows that it has
/// come that far already: otherwise nobody would ever get past a recorded error. After an error frame the connection
/// is closed.
///
/// # Errors
/// Never after it has begun to listen; a connection's troubles are its own.
pub async fn serve(
    listener: TcpListener,
    options: RelayOptions,
    counters: Arc<Counters>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let address = listener.local_addr().context("the simulated relay's listener has no address")?;
    tracing::debug!(%address, "simulated relay listens");
    let options = Arc::new(options);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let connection = connection(stream, options.clone(), counters.clone(), shutdown.clone());
                    connections.spawn(async move {
                        if let Err(error) = connection.await {
                            tracing::debug!(%peer, %error, "a consumer of the simulated relay is gone");
                        }
                    });
                }
                Err(error) => {
                    // Out of file descriptors, or the client was gone already: neither is helped by trying at once.
                    tracing::debug!(%error, "the simulated relay could not accept a connection");
                    sleep(Duration::from_millis(100)).await;
                }
            },
            // Only so that the set does not grow for ever.
            Some(_) = connections.join_next() => {}
        }
    }
    while connections.join_next().await.is_some() {}
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

type Sink = SplitSink<WebSocketStream<TcpStream>, Message>;

async fn connection(
    stream: TcpStream,
    options: Arc<RelayOptions>,
    counters: Arc<Counters>,
    shutdown: CancellationToken,
) -> Result<(), WsError> {
    let mut cursor = None;
    let handshake = handshake(stream, &mut cursor);
    let socket = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        done = timeout(HANDSHAKE, handshake) => match done {
            Ok(socket) => socket?,
            Err(_) => return Ok(()),
        },
    };
    let _connected = Connected::new(counters.clone());
    let (mut sink, mut stream) = socket.split();
    {
        let mut leaving = pin!(drain(&mut stream));
        let mut sending = pin!(send(&mut sink, &options, cursor, &counters));
        tokio::select! {
            () = shutdown.cancelled() => {}
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
async fn drain(stream: &mut SplitStream<WebSocketStream<TcpStream>>) {
    while let Some(Ok(_)) = stream.next().await {}
}

async fn handshake(
    stream: TcpStream,
    cursor: &mut Option<u64>,
) -> Result<WebSocketStream<TcpStream>, WsError> {
    stream.set_nodelay(true)?;
    let config = WebSocketConfig::default()
        // Consumers say next to nothing.
        .read_buffer_size(4096)
        .max_message_size(Some(64 * 1024))
        .max_frame_size(Some(64 * 1024))
        .write_buffer_size(256 * 1024);
    #[expect(clippy::result_large_err, reason = "the websocket library's callback returns a whole response")]
    let judge = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
        let refuse = |status: StatusCode, reason: &str| {
            let mut refusal = ErrorResponse::new(Some(format!("{reason}\n")));
            *refusal.status_mut() = status;
            Err(refusal)
        };
        if request.uri().path() != PATH {
            return refuse(StatusCode::NOT_FOUND, "not found");
        }
        let query = request.uri().query().unwrap_or_default();
        let given = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "cursor");
        if let Some((_, number)) = given {
            match number.parse() {
                Ok(number) => *cursor = Some(number),
                Err(_) => return refuse(StatusCode::BAD_REQUEST, "cursor must be a number"),
            }
        }
        Ok(response)
    };
    tokio_tungstenite::accept_hdr_async_with_config(stream, judge, Some(config)).await
}

/// Sends what there is to send and then pings; returns only when the relay has to close the connection.
async fn send(
    sink: &mut Sink,
    options: &RelayOptions,
    cursor: Option<u64>,
    counters: &Counters,
) -> Result<(), WsError> {
    let Some(mut frames) = Frames::from(&options.source, cursor).await else {
        return sink.send(Message::Binary(future_cursor())).await;
    };
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
    async fn from(source: &Source, cursor: Option<u64>) -> Option<Frames> {
        match source {
            Source::Network(options) => {
                let mut network = Box::new(Network::new(options));
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
