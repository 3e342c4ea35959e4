use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use shrike::cbor::{Cid, Decoder, Value};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};
use tokio_util::sync::CancellationToken;

use super::*;

fn options(events: u64) -> NetworkOptions {
    NetworkOptions { seed: 7, accounts: 500, events, ..NetworkOptions::default() }
}

fn frames(options: &NetworkOptions) -> Vec<Frame> {
    Network::new(options).collect()
}

/// A frame's `t` and body.
pub(super) fn parts(frame: &[u8]) -> (String, BTreeMap<&str, Value<'_>>) {
    let mut decoder = Decoder::new(frame);
    let Value::Map(header) = decoder.decode().unwrap() else { panic!("the header is not a map") };
    let Value::Map(body) = decoder.decode().unwrap() else { panic!("the body is not a map") };
    assert!(decoder.is_empty(), "bytes after the body");
    let kind = header.iter().find(|(key, _)| *key == "t").map(|(_, kind)| text(kind).to_owned());
    (kind.unwrap_or_default(), body.into_iter().collect())
}

pub(super) fn text<'a>(value: &Value<'a>) -> &'a str {
    match value {
        Value::Text(text) => text,
        other => panic!("{other:?} is not a text"),
    }
}

fn operations<'a, 'b>(body: &'b BTreeMap<&'a str, Value<'a>>) -> Vec<BTreeMap<&'a str, &'b Value<'a>>> {
    let Value::Array(ops) = &body["ops"] else { panic!("ops is not an array") };
    ops.iter()
        .map(|op| match op {
            Value::Map(entries) => entries.iter().map(|(key, value)| (*key, value)).collect(),
            other => panic!("{other:?} is not an operation"),
        })
        .collect()
}

#[test]
fn the_same_options_give_the_same_bytes_and_another_seed_gives_different_ones() {
    let first = frames(&options(3000));
    assert_eq!(first.len(), 3000);
    assert_eq!(first, frames(&options(3000)));
    assert_ne!(first, frames(&NetworkOptions { seed: 8, ..options(3000) }));
}

#[test]
fn a_shorter_run_is_a_prefix_of_a_longer_one() {
    assert_eq!(frames(&options(500)), frames(&options(2000))[..500]);
}

#[test]
fn every_frame_decodes_and_every_block_matches_its_cid() {
    for frame in frames(&NetworkOptions { pad: 2000, deletions: true, ..options(5000) }) {
        let (kind, body) = parts(&frame.bytes);
        assert_eq!(body["seq"], Value::Unsigned(frame.seq.unwrap()));
        text(&body["time"]).parse::<jiff::Timestamp>().unwrap();
        let Some(Value::Bytes(blocks)) = body.get("blocks") else {
            assert!(["#identity", "#account"].contains(&kind.as_str()), "{kind} has no blocks");
            continue;
        };
        shrike::car::verify(*blocks).unwrap();
        let (roots, blocks) = shrike::car::read_slice(blocks).unwrap();
        let blocks: HashMap<Cid, &[u8]> = blocks.into_iter().map(|block| (block.cid, block.data)).collect();
        for data in blocks.values() {
            shrike::cbor::decode(data).unwrap();
        }
        assert!(blocks.contains_key(&roots[0]));
        if kind != "#commit" {
            assert_eq!(kind, "#sync");
            continue;
        }
        let fields: Vec<&str> = body.keys().copied().collect();
        let wanted =
            ["blobs", "blocks", "commit", "ops", "rebase", "repo", "rev", "seq", "since", "time", "tooBig"];
        assert_eq!(fields, wanted);
        assert_eq!(body["commit"], Value::Cid(roots[0]));
        for op in operations(&body) {
            match (text(op["action"]), op["cid"]) {
                ("delete", cid) => assert_eq!(*cid, Value::Null),
                (_, Value::Cid(cid)) => {
                    let Value::Map(record) = shrike::cbor::decode(blocks[cid]).unwrap() else {
                        panic!("not a map")
                    };
                    let kind =
                        record.iter().find(|(key, _)| *key == "$type").map(|(_, kind)| text(kind)).unwrap();
                    assert!(text(op["path"]).starts_with(kind));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn sequence_numbers_and_the_revisions_of_each_repository_increase() {
    let mut last_seq = 0;
    let mut revs: HashMap<String, String> = HashMap::new();
    for frame in frames(&options(20_000)) {
        assert!(frame.seq.unwrap() > last_seq);
        last_seq = frame.seq.unwrap();
        let (kind, body) = parts(&frame.bytes);
        if kind != "#commit" {
            continue;
        }
        let rev = text(&body["rev"]);
        assert_eq!(rev.len(), 13);
        let before = revs.insert(text(&body["repo"]).to_owned(), rev.to_owned());
        match before {
            None => assert_eq!(body["since"], Value::Null),
            Some(before) => {
                assert_eq!(text(&body["since"]), before);
                assert!(*rev > *before);
            }
        }
    }
    assert!(last_seq > 20_000, "no gaps");
}

#[test]
fn accounts_change_only_records_that_exist() {
    let mut known = HashSet::new();
    let mut inactive = HashSet::new();
    let mut alive = HashSet::new();
    let mut kinds: BTreeMap<String, u32> = BTreeMap::new();
    for frame in frames(&NetworkOptions { deletions: true, ..options(60_000) }) {
        let (kind, body) = parts(&frame.bytes);
        let did = body.get("did").or(body.get("repo")).map(|did| text(did).to_owned()).unwrap();
        match kind.as_str() {
            "#identity" => _ = known.insert(did),
            "#account" if body["active"] == Value::Bool(true) => _ = inactive.remove(&did),
            "#account" => _ = inactive.insert(did),
            "#commit" => {
                assert!(known.contains(&did) && !inactive.contains(&did));
                for op in operations(&body) {
                    let path = text(op["path"]);
                    let uri = format!("{did}/{path}");
                    let collection = path.split('/').next().unwrap();
                    *kinds.entry(format!("{collection} {}", text(op["action"]))).or_default() += 1;
                    match text(op["action"]) {
                        "create" => assert!(alive.insert(uri), "{path} is created twice"),
                        "update" => assert!(alive.contains(&uri), "{path} is not there to be changed"),
                        _ => assert!(alive.remove(&uri), "{path} is not there to be deleted"),
                    }
                }
            }
            _ => {}
        }
        *kinds.entry(kind).or_default() += 1;
    }
    println!("{kinds:#?}");
    for wanted in [
        "#sync",
        "app.bsky.feed.post update",
        "app.bsky.feed.post delete",
        "app.bsky.feed.repost delete",
        "app.bsky.graph.follow delete",
        "app.bsky.graph.block delete",
        "app.bsky.actor.profile update",
        "app.bsky.graph.listitem create",
        "com.example.thing create",
    ] {
        assert!(kinds.contains_key(wanted), "no {wanted}");
    }
}

#[test]
fn seeking_gives_exactly_the_tail_of_the_full_run() {
    let all = frames(&options(20_000));
    let last = all.last().unwrap().seq.unwrap();
    for cursor in [0, 1, 2, 777, 19_000, last] {
        let mut network = Network::new(&options(20_000));
        assert!(network.seek(cursor));
        let tail: Vec<Frame> = network.collect();
        let from = all.iter().position(|frame| frame.seq >= Some(cursor)).unwrap();
        assert!(tail == all[from..], "cursor {cursor}");
    }
    assert!(!Network::new(&options(20_000)).seek(last + 1));
}

#[test]
fn tiny_networks_produce_every_frame() {
    for accounts in [0, 1, 2] {
        let options = NetworkOptions { accounts, deletions: true, ..options(3000) };
        assert_eq!(frames(&options).len(), 3000);
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

#[test]
fn recorded_frames_are_read_with_their_sequence_numbers() {
    let frames = read_frames(&fixture("pds-live.frames")).unwrap();
    assert_eq!(frames.len(), 145);
    assert_eq!(frames[0].seq, Some(1));
    assert!(frames.iter().all(|frame| frame.seq.is_some()));
    let frames = read_frames(&fixture("info-outdated-cursor.frames")).unwrap();
    assert_eq!(frames[0].seq, None);
    assert!(frames[1].seq.is_some());
}

#[test]
fn a_truncated_or_oversized_frame_is_refused_with_its_offset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.frames");
    let refusal = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        read_frames(&path).unwrap_err().to_string()
    };
    assert!(refusal(&[0, 0, 0, 1, 0xa0, 0, 0]).contains("offset 5"));
    assert!(refusal(&[0, 0, 0, 1, 0xa0, 0, 0, 0, 9, 1, 2]).contains("offset 5"));
    assert!(refusal(&5_000_001_u32.to_be_bytes()).contains("offset 0"));
}

type Client = WebSocketStream<MaybeTlsStream<TcpStream>>;

struct Relay {
    address: std::net::SocketAddr,
    counters: Arc<Counters>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Relay {
    async fn start(source: Source, rate: Option<u32>) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let counters = Arc::new(Counters::default());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(serve(
            listener,
            RelayOptions { source, rate, oldest: 0 },
            counters.clone(),
            shutdown.clone(),
        ));
        Relay { address, counters, shutdown, task }
    }

    async fn connect(&self, rest: &str) -> Result<Client, tungstenite::Error> {
        let url = format!("ws://{}/xrpc/com.atproto.sync.{rest}", self.address);
        connect_async(url).await.map(|(client, _)| client)
    }

    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(5), self.task).await.unwrap().unwrap().unwrap();
    }
}

/// The next binary message; None when the relay has closed the connection.
async fn receive(client: &mut Client) -> Option<Bytes> {
    let next = async {
        loop {
            match client.next().await {
                Some(Ok(Message::Binary(bytes))) => return Some(bytes),
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                Some(Ok(_)) => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), next).await.unwrap()
}

async fn expect_frames(client: &mut Client, wanted: &[Frame]) {
    for (at, frame) in wanted.iter().enumerate() {
        assert!(receive(client).await.as_ref() == Some(&frame.bytes), "frame {at} is another");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_receive_everything_from_their_cursor_onwards() {
    let all = frames(&options(3000));
    let relay = Relay::start(Source::Network(options(3000)), None).await;
    let mut first = relay.connect("subscribeRepos").await.unwrap();
    let cursor = all[2000].seq.unwrap();
    let mut second = relay.connect(&format!("subscribeRepos?x=y&cursor={cursor}")).await.unwrap();
    expect_frames(&mut second, &all[2000..]).await;
    expect_frames(&mut first, &all).await;
    assert_eq!(relay.counters.frames_sent.load(Ordering::Relaxed), 4000);
    assert_eq!(relay.counters.last_seq_sent.load(Ordering::Relaxed), all[2999].seq.unwrap());
    assert_eq!(relay.counters.connections.load(Ordering::Relaxed), 2);
    // The connections stay open after the last frame, until the relay stops.
    relay.stop().await;
    assert_eq!(receive(&mut first).await, None);
}

#[tokio::test]
async fn a_cursor_in_the_future_gets_a_future_cursor_error() {
    let endless = Relay::start(Source::Network(options(0)), None).await;
    let finite = Relay::start(Source::Network(options(100)), None).await;
    let recorded = read_frames(&fixture("pds-live.frames")).unwrap();
    let recording = Relay::start(Source::Recording(recorded.into()), None).await;
    // An endless network has no last frame, but one that nobody would wait for.
    for (relay, cursor) in [(&endless, u64::MAX), (&finite, 300), (&finite, u64::MAX), (&recording, 300)] {
        let mut client = relay.connect(&format!("subscribeRepos?cursor={cursor}")).await.unwrap();
        let bytes = receive(&mut client).await.unwrap();
        let (kind, body) = parts(&bytes);
        assert_eq!(kind, "");
        assert_eq!(text(&body["error"]), "FutureCursor");
        assert_eq!(receive(&mut client).await, None);
    }
}

#[tokio::test]
async fn other_paths_and_bad_cursors_are_refused() {
    let relay = Relay::start(Source::Network(options(10)), None).await;
    for (rest, wanted) in
        [("listRepos", 404), ("subscribeRepos?cursor=-1", 400), ("subscribeRepos?cursor=", 400)]
    {
        match relay.connect(rest).await {
            Err(tungstenite::Error::Http(response)) => assert_eq!(response.status(), wanted, "{rest}"),
            other => panic!("{rest}: {other:?}"),
        }
    }
    relay.stop().await;
}

#[tokio::test]
async fn a_recorded_error_closes_the_connection_and_is_skipped_on_reconnect() {
    let mut recorded = read_frames(&fixture("pds-live.frames")).unwrap();
    recorded.truncate(10);
    let error = read_frames(&fixture("error-consumer-too-slow.frames")).unwrap().remove(0);
    recorded.insert(5, error);
    let relay = Relay::start(Source::Recording(recorded.clone().into()), None).await;
    let mut client = relay.connect("subscribeRepos").await.unwrap();
    expect_frames(&mut client, &recorded[..6]).await;
    assert_eq!(receive(&mut client).await, None);
    let mut client =
        relay.connect(&format!("subscribeRepos?cursor={}", recorded[4].seq.unwrap())).await.unwrap();
    expect_frames(&mut client, &recorded[4..5]).await;
    expect_frames(&mut client, &recorded[6..]).await;
    relay.stop().await;
}

#[tokio::test]
async fn the_configured_rate_is_not_exceeded() {
    let relay = Relay::start(Source::Network(options(0)), Some(200)).await;
    let mut client = relay.connect("subscribeRepos").await.unwrap();
    let started = std::time::Instant::now();
    for _ in 0..61 {
        receive(&mut client).await.unwrap();
    }
    let taken = started.elapsed();
    // 60 frames after the first are due 300 ms later; a slow machine only makes it longer.
    assert!(taken >= Duration::from_millis(250), "{taken:?}");
    relay.stop().await;
}
