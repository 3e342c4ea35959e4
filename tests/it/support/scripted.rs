//! A relay that does what a test tells it, well-behaved or not.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::SinkExt as _;
use shrike::car::{Block, write_all};
use shrike::cbor::{Cid, Codec, Decoder, Value, encode_value};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_util::sync::{CancellationToken, DropGuard};

/// One consumer's connection.
pub struct Connection {
    /// The cursor that it asks for.
    pub cursor: Option<i64>,
    /// The query of the URL.
    pub query: String,
    pub socket: WebSocketStream<TcpStream>,
}

impl Connection {
    /// Sends a frame; `false` when the consumer is gone.
    pub async fn send(&mut self, frame: &[u8]) -> bool {
        self.socket.send(Message::Binary(frame.to_vec().into())).await.is_ok()
    }

    /// Sends a text; `false` when the consumer is gone.
    pub async fn send_text(&mut self, text: &str) -> bool {
        self.socket.send(Message::text(text)).await.is_ok()
    }

    /// Sends those of these frames that come after the cursor.
    pub async fn send_after_cursor(&mut self, frames: &[(i64, Vec<u8>)]) -> bool {
        for (seq, frame) in frames {
            if self.cursor.is_none_or(|cursor| *seq > cursor) && !self.send(frame).await {
                return false;
            }
        }
        true
    }

    /// Stays open and silent until the consumer disconnects.
    pub async fn stay(mut self) {
        use futures_util::StreamExt as _;
        while let Some(Ok(_)) = self.socket.next().await {}
    }
}

/// The relay; it stops on drop.
pub struct ScriptedRelay {
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    _stop: DropGuard,
}

impl ScriptedRelay {
    /// Runs the script for every connection.
    pub async fn start<S, F>(script: S) -> Self
    where
        S: Fn(Connection) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::listen(listener, script)
    }

    pub fn listen<S, F>(listener: TcpListener, script: S) -> Self
    where
        S: Fn(Connection) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let stop = CancellationToken::new();
        let (script, count, ended) = (Arc::new(script), Arc::clone(&connections), stop.clone());
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = ended.cancelled() => break,
                };
                let Ok((stream, _)) = accepted else { continue };
                count.fetch_add(1, Ordering::SeqCst);
                let (script, ended) = (Arc::clone(&script), ended.clone());
                tokio::spawn(async move {
                    let (mut cursor, mut asked) = (None, String::new());
                    #[expect(clippy::result_large_err, reason = "the library's own type")]
                    let look = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
                        let query = request.uri().query().unwrap_or_default();
                        cursor = query
                            .split('&')
                            .find_map(|part| part.strip_prefix("cursor="))
                            .map(|cursor| cursor.parse().unwrap());
                        query.clone_into(&mut asked);
                        Ok(response)
                    };
                    let Ok(socket) = tokio_tungstenite::accept_hdr_async(stream, look).await else { return };
                    tokio::select! {
                        () = script(Connection { cursor, query: asked, socket }) => {}
                        () = ended.cancelled() => {}
                    }
                });
            }
        });
        Self { address, connections, _stop: stop.drop_guard() }
    }

    pub fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    /// How many connections there have been.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// An operation of a made-up commit.
#[derive(Clone)]
pub struct Op {
    pub action: &'static str,
    pub path: String,
    /// The record's bytes, good or bad; `None` for a delete.
    pub record: Option<Arc<Vec<u8>>>,
    /// Whether the archive contains them.
    pub in_archive: bool,
}

/// Creates a record.
pub fn create(path: &str, record: &Value<'_>) -> Op {
    create_bytes(path, encode_value(record).unwrap())
}

/// Creates a record of these bytes, whatever they are.
pub fn create_bytes(path: &str, record: impl Into<Arc<Vec<u8>>>) -> Op {
    Op { action: "create", path: path.to_owned(), record: Some(record.into()), in_archive: true }
}

/// Deletes a record.
pub fn delete(path: &str) -> Op {
    Op { action: "delete", path: path.to_owned(), record: None, in_archive: true }
}

/// A post with this text.
pub fn post(text: &str) -> Value<'_> {
    Value::Map(vec![
        ("text", Value::Text(text)),
        ("$type", Value::Text("app.bsky.feed.post")),
        ("createdAt", Value::Text("2026-11-21T04:17:51.287Z")),
    ])
}

/// The CID of a record's bytes.
pub fn cid(record: &[u8]) -> Cid {
    Cid::compute(Codec::Drisl, record)
}

/// A revision from a moment in 2026: the more microseconds, the newer.
pub fn rev(micros: u64) -> String {
    const ALPHABET: &[u8; 32] = b"234567abcdefghijklmnopqrstuvwxyz";
    let bits = (1_790_000_000_000_000 + micros) << 10;
    (0..13).rev().map(|digit| char::from(ALPHABET[(bits >> (5 * digit) & 31) as usize])).collect()
}

/// A `#commit` frame.
pub fn commit(seq: i64, did: &str, rev: &str, ops: &[Op]) -> Vec<u8> {
    // Many operations may name one large record.
    let mut cids: HashMap<*const Vec<u8>, Cid> = HashMap::new();
    let mut cid_of = |record: &Arc<Vec<u8>>| *cids.entry(Arc::as_ptr(record)).or_insert_with(|| cid(record));
    let blocks: Vec<Block> = ops
        .iter()
        .filter(|op| op.in_archive)
        .filter_map(|op| op.record.as_ref())
        .map(|record| Block { cid: cid_of(record), data: record.to_vec() })
        .collect();
    let root = blocks.first().map_or_else(|| cid(b"none"), |block| block.cid);
    let car = write_all(&[root], &blocks).unwrap();
    let ops = ops
        .iter()
        .map(|op| {
            Value::Map(vec![
                ("cid", op.record.as_ref().map_or(Value::Null, |record| Value::Cid(cid_of(record)))),
                ("path", Value::Text(&op.path)),
                ("action", Value::Text(op.action)),
            ])
        })
        .collect();
    frame(
        "#commit",
        vec![
            ("ops", Value::Array(ops)),
            ("rev", Value::Text(rev)),
            ("seq", Value::Signed(seq)),
            ("repo", Value::Text(did)),
            ("time", Value::Text("2026-11-21T04:17:51.287Z")),
            ("blocks", Value::Bytes(&car)),
            ("commit", Value::Cid(root)),
        ],
    )
}

/// An `#account` frame.
pub fn account(seq: i64, did: &str, status: Option<&str>) -> Vec<u8> {
    let mut body = vec![
        ("did", Value::Text(did)),
        ("seq", Value::Signed(seq)),
        ("time", Value::Text("2026-11-26T04:17:51.287Z")),
        ("active", Value::Bool(status.is_none())),
    ];
    if let Some(status) = status {
        body.push(("status", Value::Text(status)));
    }
    frame("#account", body)
}

/// An `#identity` frame.
pub fn identity(seq: i64, did: &str, handle: Option<&str>) -> Vec<u8> {
    let mut body = vec![
        ("did", Value::Text(did)),
        ("seq", Value::Signed(seq)),
        ("time", Value::Text("2026-11-21T04:17:51.287Z")),
    ];
    if let Some(handle) = handle {
        body.push(("handle", Value::Text(handle)));
    }
    frame("#identity", body)
}

/// An `#info` frame.
pub fn info(name: &str) -> Vec<u8> {
    frame("#info", vec![("name", Value::Text(name)), ("message", Value::Text("for people"))])
}

/// An error frame.
pub fn error(name: &str) -> Vec<u8> {
    let mut bytes = encode_value(&Value::Map(vec![("op", Value::Signed(-1))])).unwrap();
    bytes.extend(
        encode_value(&Value::Map(vec![("error", Value::Text(name)), ("message", Value::Text("for people"))]))
            .unwrap(),
    );
    bytes
}

/// A frame of this type.
pub fn frame(kind: &str, body: Vec<(&str, Value<'_>)>) -> Vec<u8> {
    let header = Value::Map(vec![("t", Value::Text(kind)), ("op", Value::Unsigned(1))]);
    let mut bytes = encode_value(&header).unwrap();
    bytes.extend(encode_value(&Value::Map(body)).unwrap());
    bytes
}

/// A frame with another number.
pub fn renumbered(frame: &[u8], seq: i64) -> Vec<u8> {
    let mut decoder = Decoder::new(frame);
    let (Value::Map(header), Value::Map(mut body)) = (decoder.decode().unwrap(), decoder.decode().unwrap())
    else {
        panic!("not a frame");
    };
    body.iter_mut().find(|(name, _)| *name == "seq").unwrap().1 = Value::Signed(seq);
    let mut bytes = encode_value(&Value::Map(header)).unwrap();
    bytes.extend(encode_value(&Value::Map(body)).unwrap());
    bytes
}
