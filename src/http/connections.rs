//! Accepting connections, with bounds on everything that a client controls: the number of connections, the time to send
//! a request, the time to read an answer.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future as _;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse as _;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

/// Maximum concurrent connections. Beyond it, connections that are waiting for a request are closed, longest idle
/// first.
pub const MAX_CONNECTIONS: usize = 64;
/// Extra connections for health and metrics while all others are busy.
const RESERVED: usize = 16;
/// The paths served on the extra connections.
const RESERVED_PATHS: [&str; 4] = ["/livez", "/readyz", "/health", "/metrics"];
/// Time limit for the headers of a request; also closes idle connections.
const HEADER_READ: Duration = Duration::from_secs(10);
/// Drop a client that has read nothing for this long.
const STALLED: Duration = Duration::from_secs(10);
/// Buffer size of one connection, in and out.
const BUFFER: usize = 16 * 1024;
/// Kernel buffer of one connection: small, so that a client that reads nothing is noticed sooner.
const SEND_BUFFER: u32 = 32 * 1024;

/// The client's address.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// Listens on an address.
///
/// # Errors
///
/// The address is in use, or does not belong to this machine.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    // Accepted sockets inherit it.
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(address)?;
    socket.listen(128)
}

/// An open connection, and what decides whether it can be closed for another one.
#[derive(Default)]
struct Slot {
    /// Requests in progress.
    busy: AtomicBool,
    /// Tells the connection to end.
    close: CancellationToken,
}

/// Serves connections for as long as it is polled.
pub async fn serve(listener: TcpListener, routes: Router) {
    // All in one task, so that dropping it drops every connection.
    let mut open = FuturesUnordered::new();
    // Longest open first.
    let mut slots: VecDeque<Arc<Slot>> = VecDeque::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if open.len() < MAX_CONNECTIONS + RESERVED => match accepted {
                Ok((stream, peer)) => {
                    slots.retain(|slot| !slot.close.is_cancelled());
                    let full = slots.len() >= MAX_CONNECTIONS;
                    let idle = slots.iter().position(|slot| !slot.busy.load(Ordering::Relaxed));
                    if let Some(slot) = idle.filter(|_| full).and_then(|idle| slots.remove(idle)) {
                        slot.close.cancel();
                    }
                    let slot = Arc::<Slot>::default();
                    let reserved = full && idle.is_none();
                    slots.push_back(Arc::clone(&slot));
                    open.push(answer(stream, peer, routes.clone(), slot, reserved));
                }
                // Possibly out of file descriptors: an immediate retry would not help.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
            Some(()) = open.next() => {}
        }
    }
}

/// `reserved`: for a single request, and only for health and metrics.
async fn answer(stream: TcpStream, peer: SocketAddr, routes: Router, slot: Arc<Slot>, reserved: bool) {
    let service = service_fn(|mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        let refused = reserved && !RESERVED_PATHS.contains(&request.uri().path());
        let (routes, slot) = (routes.clone(), Arc::clone(&slot));
        async move {
            if refused {
                return Ok((StatusCode::SERVICE_UNAVAILABLE, "all connections are in use\n").into_response());
            }
            slot.busy.store(true, Ordering::Relaxed);
            let response = TowerToHyperService::new(routes).call(request).await?;
            // An event stream lasts as long as the client listens.
            let endless = response
                .headers()
                .get(header::CONTENT_TYPE)
                .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
            slot.busy.store(endless, Ordering::Relaxed);
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ)
        .max_buf_size(BUFFER)
        .keep_alive(!reserved)
        .serve_connection(TokioIo::new(Impatient::new(stream)), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    tokio::select! {
        // The error is the client's: it disconnected, or did not speak HTTP.
        _ = &mut connection => {}
        () = slot.close.cancelled() => {
            // A request in progress is still answered.
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
    slot.close.cancel();
}

/// A connection that ends when the other side has read nothing for [`STALLED`].
struct Impatient {
    stream: TcpStream,
    /// The deadline by which the client must have read something; set only while output is pending.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn new(stream: TcpStream) -> Self {
        Self { stream, deadline: None }
    }

    fn limit<T>(&mut self, written: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let deadline =
            self.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + STALLED)));
        ready!(deadline.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.limit(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.limit(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
