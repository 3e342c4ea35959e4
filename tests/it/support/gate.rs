//! A proxy in front of PostgreSQL that knows just enough of its protocol to stop a connection at a chosen
//! moment: before a flush reaches the server, or after a commit and before its answer reaches the client.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Distinguishes a pipeline's flush from every other statement.
const FLUSH: &[u8] = b"pg_logical_emit_message";
/// The other statement that flushes the server's WAL: once a second, the acknowledged position is stored
/// durably.
const NOTE: &[u8] = b"INSERT INTO standpipe.acknowledged";
/// Not a protocol version but a request that precedes it: `SSLRequest`, `GSSENCRequest`.
const REQUESTS: [u32; 2] = [80_877_103, 80_877_104];

/// What is currently held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// Flushes do not reach the server, nor does anything else that flushes its WAL.
    pub flushes: bool,
    /// Nothing that the server sends reaches the client.
    pub answers: bool,
    /// New connections are accepted but reach nothing.
    pub newcomers: bool,
}

/// The proxy. It belongs to the runtime of the test that started it.
pub struct Gate {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: CancellationToken,
}

struct Shared {
    target: String,
    hold: watch::Sender<Hold>,
    cut: Mutex<CancellationToken>,
    connections: AtomicU64,
    /// Connections with a lower number are never answered again.
    silenced: AtomicU64,
    flushes_held: AtomicU64,
    answer_bytes_held: AtomicU64,
    cuts: AtomicU64,
}

impl Gate {
    /// Starts a gate for the server that a URL names; it is open at first.
    pub async fn for_url(url: &str) -> Self {
        let url = url::Url::parse(url).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target: format!("{}:{}", url.host_str().unwrap(), url.port().unwrap()),
            hold: watch::Sender::new(Hold::default()),
            cut: Mutex::default(),
            connections: AtomicU64::new(0),
            silenced: AtomicU64::new(0),
            flushes_held: AtomicU64::new(0),
            answer_bytes_held: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
        });
        let accepting = CancellationToken::new();
        tokio::spawn(accepting.clone().run_until_cancelled_owned(accept(listener, shared.clone())));
        Self { address, shared, accepting }
    }

    /// The same URL with the gate's address in it.
    pub fn url_through(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(self.address.port())).unwrap();
        url.to_string()
    }

    /// Holds this from now on, and releases whatever is no longer held.
    pub fn hold(&self, hold: Hold) {
        self.shared.hold.send_replace(hold);
    }

    /// Closes all connections that are open now: held data is never delivered.
    pub fn cut_all(&self) {
        std::mem::take(&mut *self.shared.cut.lock().unwrap()).cancel();
    }

    /// Lets the connections that are open now hang forever: their requests are carried out, but the answers
    /// never arrive. New connections work.
    pub fn silence_all(&self) {
        self.shared.silenced.store(self.shared.connections.load(SeqCst), SeqCst);
    }

    /// Flushes of pipelines held so far.
    pub fn flushes_held(&self) -> u64 {
        self.shared.flushes_held.load(SeqCst)
    }

    /// Bytes of answers held so far.
    pub fn answer_bytes_held(&self) -> u64 {
        self.shared.answer_bytes_held.load(SeqCst)
    }

    /// Connections that were open when they were cut.
    pub fn cuts(&self) -> u64 {
        self.shared.cuts.load(SeqCst)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.accepting.cancel();
        self.cut_all();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        let cut = shared.cut.lock().unwrap().clone();
        let shared = shared.clone();
        tokio::spawn(async move {
            if cut.run_until_cancelled(serve(client, &shared)).await.is_none() {
                shared.cuts.fetch_add(1, SeqCst);
            }
        });
    }
}

/// One connection, until either end of it is gone.
async fn serve(client: TcpStream, shared: &Shared) {
    shared.open(|hold| !hold.newcomers).await;
    let Ok(server) = TcpStream::connect(&shared.target).await else { return };
    let number = shared.connections.fetch_add(1, SeqCst);
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (client_reader, client_writer) = client.into_split();
    let (server_reader, server_writer) = server.into_split();
    tokio::select! {
        _ = questions(client_reader, server_writer, shared) => {}
        _ = answers(number, server_reader, client_writer, shared) => {}
    }
}

impl Shared {
    async fn open(&self, is_open: impl Fn(&Hold) -> bool) {
        let mut hold = self.hold.subscribe();
        // The sender lives as long as we do.
        hold.wait_for(|hold| is_open(hold)).await.unwrap();
    }
}

async fn answers(
    connection: u64,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    shared: &Shared,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        if connection < shared.silenced.load(SeqCst) {
            shared.answer_bytes_held.fetch_add(length as u64, SeqCst);
            continue;
        }
        if shared.hold.borrow().answers {
            shared.answer_bytes_held.fetch_add(length as u64, SeqCst);
            shared.open(|hold| !hold.answers).await;
        }
        to.write_all(&buffer[..length]).await?;
    }
}

/// Message by message, so that whatever precedes a flush in the same packet is not held with it.
async fn questions(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared) -> io::Result<()> {
    // The statements of this connection that flush, by the names that the client gave them.
    let mut flushing = HashMap::new();
    let mut greeted = false;
    loop {
        let kind = if greeted { Some(from.read_u8().await?) } else { None };
        let length = from.read_u32().await?;
        let mut body = vec![0; length as usize - 4];
        from.read_exact(&mut body).await?;
        let flush = match kind {
            None => {
                greeted = !REQUESTS.iter().any(|request| body.starts_with(&request.to_be_bytes()));
                None
            }
            Some(b'P') => {
                let (name, rest) = text(&body);
                match Flush::of(text(rest).0) {
                    Some(flush) => flushing.insert(name.to_vec(), flush),
                    None => flushing.remove(name),
                };
                None
            }
            // A portal's name, then the statement's.
            Some(b'B') => flushing.get(text(text(&body).1).0).copied(),
            Some(b'Q') => Flush::of(&body),
            Some(_) => None,
        };
        if let Some(flush) = flush
            && shared.hold.borrow().flushes
        {
            shared.flushes_held.fetch_add(u64::from(flush == Flush::Pipeline), SeqCst);
            shared.open(|hold| !hold.flushes).await;
        }
        let mut message = Vec::with_capacity(body.len() + 5);
        message.extend(kind);
        message.extend(length.to_be_bytes());
        message.extend(body);
        to.write_all(&message).await?;
    }
}

/// Which kind of flush a statement is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flush {
    Pipeline,
    Note,
}

impl Flush {
    fn of(query: &[u8]) -> Option<Self> {
        let has = |what: &[u8]| query.windows(what.len()).any(|part| part == what);
        if has(FLUSH) {
            Some(Self::Pipeline)
        } else if has(NOTE) {
            Some(Self::Note)
        } else {
            None
        }
    }
}

/// The bytes before the first zero byte, and those after it.
fn text(bytes: &[u8]) -> (&[u8], &[u8]) {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    (&bytes[..end], bytes.get(end + 1..).unwrap_or_default())
}
