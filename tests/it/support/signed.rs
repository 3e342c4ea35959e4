//! Accounts with real keys, trees and signatures, and the directory that knows their keys.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, Response, StatusCode};
use axum::routing::get;
use k256::ecdsa::signature::hazmat::PrehashSigner as _;
use serde_json::{Value as Json, json};
use shrike::car::{Block, write_all};
use shrike::cbor::{Cid, Codec, Value, encode_value};
use shrike::mst::DetachedTree;
use standpipe::verify::Key;
use tokio::net::TcpListener;

use super::scripted::{Op, cid, frame};

/// A signing key of either curve.
#[derive(Clone)]
enum Signer {
    K256(k256::ecdsa::SigningKey),
    P256(p256::ecdsa::SigningKey),
}

impl Signer {
    /// The key number `number`; odd ones are of P-256.
    fn new(number: u32) -> Self {
        let mut bytes = [1; 32];
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        match number % 2 {
            0 => Self::K256(k256::ecdsa::SigningKey::from_slice(&bytes).unwrap()),
            _ => Self::P256(p256::ecdsa::SigningKey::from_slice(&bytes).unwrap()),
        }
    }

    fn sign(&self, hash: &[u8]) -> Vec<u8> {
        match self {
            Self::K256(key) => {
                let signature: k256::ecdsa::Signature = key.sign_prehash(hash).unwrap();
                signature.normalize_s().to_bytes().to_vec()
            }
            Self::P256(key) => {
                let signature: p256::ecdsa::Signature = key.sign_prehash(hash).unwrap();
                signature.normalize_s().to_bytes().to_vec()
            }
        }
    }

    fn public(&self) -> Key {
        match self {
            Self::K256(key) => Key::K256(*key.verifying_key()),
            Self::P256(key) => Key::P256(*key.verifying_key()),
        }
    }
}

/// An account that signs what it does.
#[derive(Clone)]
pub struct Signed {
    pub did: String,
    signer: Signer,
    /// Its records, by path.
    records: BTreeMap<String, Cid>,
    /// Every record that it ever had.
    blocks: HashMap<Cid, Vec<u8>>,
    rev: Option<String>,
    data: Option<Cid>,
    /// The handle that it claims.
    pub handle: Option<String>,
}

impl Signed {
    /// The account number `number`, below 1000.
    pub fn new(number: u32) -> Self {
        let letter = |place: u32| char::from(b"abcdefghij"[(number / 10_u32.pow(place) % 10) as usize]);
        let did = format!("did:plc:signed{}{}{}aaaaaaaaaaaaaaa", letter(2), letter(1), letter(0));
        Self {
            did,
            signer: Signer::new(number),
            records: BTreeMap::new(),
            blocks: HashMap::new(),
            rev: None,
            data: None,
            handle: None,
        }
    }

    /// From now on, it signs with another key.
    pub fn rotate(&mut self, number: u32) {
        self.signer = Signer::new(number);
    }

    /// Its document, with the key that it signs with and the server that it is on.
    pub fn document(&self, server: &str) -> Json {
        json!({
            "id": self.did,
            "alsoKnownAs": self.handle.iter().map(|handle| format!("at://{handle}")).collect::<Vec<_>>(),
            "verificationMethod": [{
                "id": format!("{}#atproto", self.did),
                "type": "Multikey",
                "controller": self.did,
                "publicKeyMultibase": self.signer.public().to_multikey(),
            }],
            "service": [{
                "id": "#atproto_pds",
                "type": "AtprotoPersonalDataServer",
                "serviceEndpoint": server,
            }],
        })
    }

    /// Its next commit, as a frame.
    pub fn commit(&mut self, seq: i64, rev: &str, ops: &[Op]) -> Vec<u8> {
        let mut prevs = Vec::new();
        for op in ops {
            let prev = match &op.record {
                Some(record) => {
                    self.blocks.insert(cid(record), record.to_vec());
                    self.records.insert(op.path.clone(), cid(record))
                }
                None => self.records.remove(&op.path),
            };
            prevs.push(prev);
        }
        let (mut tree, data, nodes) = self.tree();
        let mut proof = tree.covering_proof(&nodes, ops.iter().map(|op| op.path.as_str())).unwrap();
        proof.push(data);
        proof.sort_unstable();
        proof.dedup();
        let (root, commit) = self.object(rev, data);
        let mut blocks = vec![Block { cid: root, data: commit }];
        blocks.extend(proof.into_iter().map(|cid| Block { cid, data: nodes[&cid].clone() }));
        let records = ops.iter().filter_map(|op| op.record.as_ref());
        blocks.extend(records.map(|record| Block { cid: cid(record), data: record.to_vec() }));
        let car = write_all(&[root], &blocks).unwrap();

        let link = |cid: Option<Cid>| cid.map_or(Value::Null, Value::Cid);
        let ops = ops.iter().zip(prevs).map(|(op, prev)| {
            let mut fields = vec![
                ("cid", link(op.record.as_ref().map(|record| cid(record)))),
                ("path", Value::Text(&op.path)),
                ("action", Value::Text(op.action)),
            ];
            fields.extend(prev.map(|prev| ("prev", Value::Cid(prev))));
            Value::Map(fields)
        });
        let (since, prev_data) = (self.rev.take(), self.data.take());
        let mut body = vec![
            ("ops", Value::Array(ops.collect())),
            ("rev", Value::Text(rev)),
            ("seq", Value::Signed(seq)),
            ("repo", Value::Text(&self.did)),
            ("time", Value::Text("2026-11-21T04:17:51.287Z")),
            ("since", since.as_deref().map_or(Value::Null, Value::Text)),
            ("blocks", Value::Bytes(&car)),
            ("commit", Value::Cid(root)),
        ];
        body.extend(prev_data.map(|data| ("prevData", Value::Cid(data))));
        let frame = frame("#commit", body);
        (self.rev, self.data) = (Some(rev.to_owned()), Some(data));
        frame
    }

    /// A `#sync` with what the repository is now, under a new revision.
    pub fn sync(&mut self, seq: i64, rev: &str) -> Vec<u8> {
        let data = self.data.unwrap();
        let (root, commit) = self.object(rev, data);
        let car = write_all(&[root], &[Block { cid: root, data: commit }]).unwrap();
        self.rev = Some(rev.to_owned());
        frame(
            "#sync",
            vec![
                ("did", Value::Text(&self.did)),
                ("rev", Value::Text(rev)),
                ("seq", Value::Signed(seq)),
                ("time", Value::Text("2026-11-21T04:17:51.287Z")),
                ("blocks", Value::Bytes(&car)),
            ],
        )
    }

    /// The tree of its records. They are few, so it is made anew each time.
    fn tree(&self) -> (DetachedTree, Cid, HashMap<Cid, Vec<u8>>) {
        let mut tree = DetachedTree::new();
        for (path, cid) in &self.records {
            tree.insert(&shrike::mst::NoBlocks, path.clone(), *cid).unwrap();
        }
        let written = tree.flush().unwrap();
        (tree, written.root, written.new_blocks.into_iter().collect())
    }

    /// The whole repository, as its server answers.
    pub fn repository(&self) -> Vec<u8> {
        let (_, data, nodes) = self.tree();
        let (root, commit) = self.object(self.rev.as_deref().unwrap(), data);
        let mut blocks = vec![Block { cid: root, data: commit }];
        blocks.extend(nodes.into_iter().map(|(cid, data)| Block { cid, data }));
        let records = self.records.values().map(|cid| Block { cid: *cid, data: self.blocks[cid].clone() });
        blocks.extend(records);
        write_all(&[root], &blocks).unwrap()
    }

    /// The same without every second record: signed, and not whole.
    pub fn repository_with_half(&self) -> Vec<u8> {
        let (_, data, nodes) = self.tree();
        let (root, commit) = self.object(self.rev.as_deref().unwrap(), data);
        let mut blocks = vec![Block { cid: root, data: commit }];
        blocks.extend(nodes.into_iter().map(|(cid, data)| Block { cid, data }));
        let records = self.records.values().step_by(2);
        blocks.extend(records.map(|cid| Block { cid: *cid, data: self.blocks[cid].clone() }));
        write_all(&[root], &blocks).unwrap()
    }

    fn object(&self, rev: &str, data: Cid) -> (Cid, Vec<u8>) {
        let mut fields = vec![
            ("did", Value::Text(&self.did)),
            ("rev", Value::Text(rev)),
            ("data", Value::Cid(data)),
            ("prev", Value::Null),
            ("version", Value::Unsigned(3)),
        ];
        let unsigned = encode_value(&Value::Map(fields.clone())).unwrap();
        let signature = self.signer.sign(Cid::compute(Codec::Drisl, &unsigned).hash());
        fields.push(("sig", Value::Bytes(&signature)));
        let signed = encode_value(&Value::Map(fields)).unwrap();
        (Cid::compute(Codec::Drisl, &signed), signed)
    }
}

/// A directory of did:plc that is the accounts' server as well; it stops on drop.
pub struct Plc {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    documents: Mutex<HashMap<String, Json>>,
    repositories: Mutex<HashMap<String, Answer>>,
    handles: Mutex<HashMap<String, String>>,
    away: AtomicBool,
    hangs: AtomicBool,
    requests: AtomicU64,
    fetches: AtomicU64,
    /// Whether answers with repositories wait.
    held: tokio::sync::watch::Sender<bool>,
}

/// What the server answers to a request for a repository.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub retry_after: Option<u64>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn ok(body: Vec<u8>) -> Self {
        Self { status: 200, retry_after: None, body }
    }

    pub fn error(status: u16, error: &str) -> Self {
        let body = json!({ "error": error, "message": "for people" }).to_string().into_bytes();
        Self { status, retry_after: None, body }
    }
}

impl Plc {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let router = Router::new()
            .route("/{did}", get(document))
            .route("/xrpc/com.atproto.sync.getRepo", get(repository))
            .route("/.well-known/atproto-did", get(confirmation))
            .with_state(Arc::clone(&shared));
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, shared, server }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Publishes the document that the account has now.
    pub fn publish(&self, account: &Signed) {
        self.put(&account.did, account.document(&self.url()));
    }

    /// Serves the repository that the account has now.
    pub fn serve(&self, account: &Signed) {
        self.answer(&account.did, Answer::ok(account.repository()));
    }

    pub fn answer(&self, did: &str, answer: Answer) {
        self.shared.repositories.lock().unwrap().insert(did.to_owned(), answer);
    }

    /// The handle's own answer says that it is this account's.
    pub fn confirm(&self, handle: &str, did: &str) {
        self.shared.handles.lock().unwrap().insert(handle.to_owned(), did.to_owned());
    }

    /// Whether answers with repositories, made before, wait.
    pub fn hold(&self, on: bool) {
        self.shared.held.send_replace(on);
    }

    /// How often it was asked for a repository.
    pub fn fetches(&self) -> u64 {
        self.shared.fetches.load(Ordering::SeqCst)
    }

    pub fn put(&self, did: &str, document: Json) {
        self.shared.documents.lock().unwrap().insert(did.to_owned(), document);
    }

    /// Whether it answers every request with an error.
    pub fn set_away(&self, away: bool) {
        self.shared.away.store(away, Ordering::SeqCst);
    }

    /// Whether it accepts requests and never answers them.
    pub fn set_hangs(&self, hangs: bool) {
        self.shared.hangs.store(hangs, Ordering::SeqCst);
    }

    /// How often it was asked.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Plc {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn document(State(shared): State<Arc<Shared>>, Path(did): Path<String>) -> (StatusCode, String) {
    shared.requests.fetch_add(1, Ordering::SeqCst);
    if shared.hangs.load(Ordering::SeqCst) {
        std::future::pending::<()>().await;
    }
    if shared.away.load(Ordering::SeqCst) {
        return (StatusCode::BAD_GATEWAY, String::new());
    }
    match shared.documents.lock().unwrap().get(&did) {
        Some(document) => (StatusCode::OK, document.to_string()),
        None => (StatusCode::NOT_FOUND, "{}".to_owned()),
    }
}

async fn repository(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response<Body> {
    shared.fetches.fetch_add(1, Ordering::SeqCst);
    let answer = shared.repositories.lock().unwrap().get(&query["did"]).cloned();
    let answer = answer.unwrap_or_else(|| Answer::error(400, "RepoNotFound"));
    let mut held = shared.held.subscribe();
    held.wait_for(|held| !held).await.unwrap();
    let mut response = Response::builder().status(answer.status);
    if let Some(seconds) = answer.retry_after {
        response = response.header("retry-after", seconds);
    }
    response.body(Body::from(answer.body)).unwrap()
}

async fn confirmation(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> (StatusCode, String) {
    match shared.handles.lock().unwrap().get(headers["host"].to_str().unwrap()) {
        Some(did) => (StatusCode::OK, format!("{did}\n")),
        None => (StatusCode::NOT_FOUND, String::new()),
    }
}
