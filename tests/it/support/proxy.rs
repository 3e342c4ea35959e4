//! A TCP proxy that breaks connections, and counts what it broke.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Sits between the program under test and a server. It belongs to the runtime of the test that started it.
///
/// Every fault has a counter, so that a test can prove that the fault really happened.
pub struct TcpProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: CancellationToken,
}

struct Shared {
    target: String,
    /// The open connections, and the means to cut them.
    open: Mutex<Connections>,
    refuse: AtomicBool,
    black_hole: AtomicBool,
    delay_micros: AtomicU64,
    connections: AtomicU64,
    refused: AtomicU64,
    cuts: AtomicU64,
    swallowed_bytes: AtomicU64,
    forwarded_bytes: AtomicU64,
}

#[derive(Clone, Default)]
struct Connections {
    tasks: TaskTracker,
    cut: CancellationToken,
}

impl TcpProxy {
    /// Starts a proxy for `target` (`host:port`) on a free port of 127.0.0.1.
    pub async fn start(target: impl Into<String>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target: target.into(),
            open: Mutex::default(),
            refuse: AtomicBool::new(false),
            black_hole: AtomicBool::new(false),
            delay_micros: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            swallowed_bytes: AtomicU64::new(0),
            forwarded_bytes: AtomicU64::new(0),
        });
        let accepting = CancellationToken::new();
        tokio::spawn(accepting.clone().run_until_cancelled_owned(accept(listener, shared.clone())));
        Self { address, shared, accepting }
    }

    /// Starts a proxy for the server that a URL names.
    pub async fn for_url(url: &str) -> Self {
        let url = url::Url::parse(url).unwrap();
        Self::start(format!("{}:{}", url.host_str().unwrap(), url.port().unwrap())).await
    }

    /// The same URL with the proxy's address in it.
    pub fn url_through(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(self.address.port())).unwrap();
        url.to_string()
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resets all open connections and, once the last one is gone, returns how many there were. New ones are
    /// accepted as before.
    pub async fn cut_all(&self) -> u64 {
        let before = self.cuts();
        let open = std::mem::take(&mut *self.shared.open.lock().unwrap());
        open.cut.cancel();
        open.tasks.close();
        open.tasks.wait().await;
        self.cuts() - before
    }

    /// Sets whether new connections are reset immediately, as when nobody listens; open ones are kept.
    pub fn refuse(&self, on: bool) {
        self.shared.refuse.store(on, SeqCst);
    }

    /// Sets whether all data is read and discarded, in both directions, as when the cable is cut. New
    /// connections are accepted. A connection that has lost data never works again: it is cut when the black
    /// hole is closed.
    pub async fn black_hole(&self, on: bool) {
        if on {
            self.shared.black_hole.store(true, SeqCst);
            return;
        }
        // Cut first: data that follows a swallowed piece must not get through in between.
        self.cut_all().await;
        self.shared.black_hole.store(false, SeqCst);
        // Those accepted in the meantime reach nothing.
        self.cut_all().await;
    }

    /// Delays all data by this much; zero for no delay. The delay applies to each read of up to 64 KiB, so it
    /// also limits the throughput.
    pub fn delay(&self, delay: Duration) {
        self.shared.delay_micros.store(u64::try_from(delay.as_micros()).unwrap(), SeqCst);
    }

    /// Connections accepted so far, not counting the refused ones.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(SeqCst)
    }

    /// Connections refused so far.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(SeqCst)
    }

    /// Connections that were open when they were cut.
    pub fn cuts(&self) -> u64 {
        self.shared.cuts.load(SeqCst)
    }

    /// Bytes that the black hole has swallowed.
    pub fn swallowed_bytes(&self) -> u64 {
        self.shared.swallowed_bytes.load(SeqCst)
    }

    /// Bytes forwarded, both directions together.
    pub fn forwarded_bytes(&self) -> u64 {
        self.shared.forwarded_bytes.load(SeqCst)
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.accepting.cancel();
        if let Ok(open) = self.shared.open.lock() {
            open.cut.cancel();
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            continue;
        };
        if shared.refuse.load(SeqCst) {
            shared.refused.fetch_add(1, SeqCst);
            reset(client);
            continue;
        }
        shared.connections.fetch_add(1, SeqCst);
        // Cloned and used under the lock, so that `cut_all` finds either the task or no connection yet.
        let open = shared.open.lock().unwrap();
        let cut = open.cut.clone();
        open.tasks.spawn(serve(client, shared.clone(), cut));
    }
}

/// Closes a connection so that the other end sees a reset, not an end.
fn reset(stream: TcpStream) {
    let _ = stream.set_zero_linger();
    drop(stream);
}

async fn serve(client: TcpStream, shared: Arc<Shared>, cut: CancellationToken) {
    if shared.black_hole.load(SeqCst) {
        // A connection made now reaches nothing.
        let (reader, writer) = client.into_split();
        if cut.run_until_cancelled(swallow(reader, &shared)).await.is_none() {
            shared.cuts.fetch_add(1, SeqCst);
            reset_half(writer);
        }
        return;
    }
    let Ok(server) = TcpStream::connect(&shared.target).await else {
        return reset(client);
    };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (client_reader, mut client_writer) = client.into_split();
    let (server_reader, mut server_writer) = server.into_split();
    let pumps = async {
        tokio::join!(
            pump(client_reader, &mut server_writer, &shared),
            pump(server_reader, &mut client_writer, &shared),
        )
    };
    if cut.run_until_cancelled(pumps).await.is_none() {
        shared.cuts.fetch_add(1, SeqCst);
        reset_half(client_writer);
        reset_half(server_writer);
    }
}

/// Like [`reset`], for when the other half is already gone.
fn reset_half(writer: OwnedWriteHalf) {
    let _ = writer.as_ref().set_zero_linger();
    // Dropping it would send an orderly shutdown first.
    writer.forget();
}

/// Copies one direction until its end, and passes the end on.
async fn pump(mut from: OwnedReadHalf, to: &mut OwnedWriteHalf, shared: &Shared) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let delay = Duration::from_micros(shared.delay_micros.load(SeqCst));
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let length_as_count = u64::try_from(length).unwrap();
        if shared.black_hole.load(SeqCst) {
            shared.swallowed_bytes.fetch_add(length_as_count, SeqCst);
            continue;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            break;
        }
        shared.forwarded_bytes.fetch_add(length_as_count, SeqCst);
    }
    // Not while the cable is cut: the other end would notice.
    if !shared.black_hole.load(SeqCst) {
        let _ = to.shutdown().await;
    }
}

async fn swallow(mut from: OwnedReadHalf, shared: &Shared) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        shared.swallowed_bytes.fetch_add(u64::try_from(length).unwrap(), SeqCst);
    }
}
