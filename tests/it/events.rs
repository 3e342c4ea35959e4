//! `GET /xrpc/network.bsky.jetstream.subscribeEvents`: the same events, in version 2 of the protocol.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use standpipe_lab::simulate::NetworkOptions;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::subscribe::{expected, serving};
use crate::support::chain::{Program, RUN, SOON, STREAM, network, redis_command};
use crate::support::{Redis, Signal, traffic, wait_until};

const NAME: &str = "network.bsky.jetstream.subscribeEvents";

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Connects; the status of the answer if that is refused, and its body.
async fn connect(http: SocketAddr, query: &str) -> Result<Socket, (u16, Value)> {
    let mut request = format!("ws://{http}/xrpc/{NAME}?{query}").into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", "xrpc.v1.json".parse().unwrap());
    match tokio_tungstenite::connect_async(request).await {
        Ok((socket, answer)) => {
            assert_eq!(answer.headers()["sec-websocket-protocol"], "xrpc.v1.json");
            Ok(socket)
        }
        Err(Error::Http(response)) => {
            let body = response.body().as_deref().unwrap_or_default();
            Err((response.status().as_u16(), serde_json::from_slice(body).unwrap()))
        }
        Err(error) => panic!("{error}"),
    }
}

/// The next frame's text; the close frame's reason at the end.
async fn next(socket: &mut Socket) -> Result<String, String> {
    loop {
        match tokio::time::timeout(RUN, socket.next()).await.expect("nothing comes") {
            Some(Ok(Message::Text(text))) => return Ok(text.to_string()),
            Some(Ok(Message::Close(frame))) => {
                return Err(frame.map(|frame| frame.reason.to_string()).unwrap_or_default());
            }
            Some(Ok(_)) => {}
            end => panic!("{end:?}"),
        }
    }
}

async fn take(socket: &mut Socket, count: usize) -> Vec<String> {
    let mut frames = Vec::new();
    while frames.len() < count {
        frames.push(next(socket).await.unwrap());
    }
    frames
}

fn payload(frame: &str) -> Value {
    let frame: Value = serde_json::from_str(frame).unwrap();
    assert_eq!(frame["$type"], "message", "{frame}");
    frame["payload"].clone()
}

fn seq(frame: &str) -> u64 {
    payload(frame)["seq"].as_u64().unwrap()
}

fn name(frame: &str) -> String {
    let payload = payload(frame);
    let kind = payload["$type"].as_str().unwrap().strip_prefix(NAME).unwrap().to_owned();
    if kind == "#info" { format!("{kind} {}", payload["name"].as_str().unwrap()) } else { kind }
}

/// An identity event.
async fn announce(redis: &Redis, did: &str) {
    let data = json!({"did": did, "handle": "new.test", "time": "2026-11-21T04:17:51.287Z"}).to_string();
    let words = ["XADD", STREAM, "*", "type", "identity", "data", &data, "seq", ""];
    let _: String = redis_command(redis, &words).await;
}

/// Announces until the subscriber hears of it; how often.
async fn hears(socket: &mut Socket, redis: &Redis) -> usize {
    for sent in 1.. {
        announce(redis, "did:plc:heard").await;
        if let Ok(frame) = tokio::time::timeout(Duration::from_millis(300), next(socket)).await {
            assert_eq!(payload(&frame.unwrap())["did"], "did:plc:heard");
            return sent;
        }
    }
    unreachable!()
}

/// The next frame about another account than that.
async fn other(socket: &mut Socket) -> String {
    loop {
        let frame = next(socket).await.unwrap();
        if payload(&frame)["did"] != "did:plc:heard" {
            return frame;
        }
    }
}

/// Many operations appended in one moment have numbers that reach beyond it.
#[tokio::test(flavor = "multi_thread")]
async fn every_event_has_a_number_of_its_own_wherever_one_begins() {
    let options = NetworkOptions { accounts: 100, events: 2_000, deletions: true, ..network(5) };
    let (chain, variables, http) = serving(&options).await;
    let program = Program::start("run", &variables.with("STREAM_KEEP", "1h")).await;
    chain.finished().await;
    // From before the burst.
    let mut live = connect(http, "").await.unwrap();
    let heard = hears(&mut live, &chain.redis).await;
    let op = |n: usize| {
        json!({"action": "create", "path": format!("app.bsky.feed.post/{n}"), "cid": "bafy",
        "record": {"text": n.to_string(), "createdAt": "2026-11-21T04:17:51.287Z"}})
    };
    let ops: Vec<Value> = (0..50).map(op).collect();
    let burst = "for i = 1, 100 do redis.call('XADD', KEYS[1], '*', 'type', 'commit', 'seq', '',
                     'data', '{\"repo\":\"did:plc:burst' .. i .. '\",\"rev\":\"3l3qo2vutsw2b\",\"ops\":' .. ARGV[1] .. '}') end";
    let words = ["EVAL", burst, "1", STREAM, &json!(ops).to_string()];
    let _: Option<String> = redis_command(&chain.redis, &words).await;
    let wanted = expected(&traffic::events(&options)).len() + heard + 5_000;

    let all = take(&mut connect(http, "cursor=1").await.unwrap(), wanted).await;
    for frame in &all[wanted - 5_000..] {
        assert_eq!(other(&mut live).await, *frame, "those who were there see the same");
    }
    let numbers: Vec<u64> = all.iter().map(|frame| seq(frame)).collect();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "a number occurs twice");
    assert!(*numbers.last().unwrap() < 1 << 53, "JavaScript cannot hold it");
    let spilled = numbers[wanted - 1] / 1000 - numbers[wanted - 5_000] / 1000;
    assert!(spilled >= 4, "the burst fits into {spilled} ms");
    let mut rng = fastrand::Rng::with_seed(fastrand::u64(..));
    println!("seed {}", rng.get_seed());
    // Anywhere, and within the burst.
    let mut places: Vec<usize> = (0..10).map(|_| rng.usize(..wanted)).collect();
    places.extend((0..10).map(|_| wanted - 1 - rng.usize(..5_000)));
    for place in places {
        let mut again = connect(http, &format!("cursor={}", numbers[place])).await.unwrap();
        let frames = take(&mut again, (wanted - place).min(300)).await;
        assert_eq!(frames, all[place..place + frames.len()], "from {place}");
    }
    // Where the run-up is gone, numbers may change: whoever comes back is told, and gets all that is left.
    let ids: Vec<(String, redis::Value)> =
        redis_command(&chain.redis, &["XREVRANGE", STREAM, "+", "-", "COUNT", "60"]).await;
    let _: u64 = redis_command(&chain.redis, &["XTRIM", STREAM, "MINID", "=", &ids[59].0]).await;
    let mut edge = connect(http, &format!("cursor={}", numbers[wanted - 1])).await.unwrap();
    assert_eq!(name(&next(&mut edge).await.unwrap()), "#info OutdatedCursor");
    let left = take(&mut edge, 3_000).await;
    let content = |frame: &String| {
        let payload = payload(frame);
        format!("{} {}", payload["did"], payload["rkey"])
    };
    let wanted: Vec<String> = all[wanted - 3_000..].iter().map(content).collect();
    assert_eq!(left.iter().map(content).collect::<Vec<_>>(), wanted);
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_notices_and_errors_are_those_of_version_2() {
    let options = NetworkOptions { accounts: 50, events: 1_000, deletions: true, ..network(6) };
    let (chain, variables, http) = serving(&options).await;
    let program = Program::start("run", &variables.with("STREAM_KEEP", "1h")).await;
    chain.finished().await;
    let wanted = expected(&traffic::events(&options)).len();
    let all = take(&mut connect(http, "cursor=1").await.unwrap(), wanted).await;
    let did = payload(&all[0])["did"].as_str().unwrap().to_owned();
    let start = seq(&all[0]);
    for (query, keeps) in [
        (
            "kinds=identity&kinds=account",
            &(|name: &str, _: &Value| name != "#commit") as &dyn Fn(&str, &Value) -> bool,
        ),
        ("collections=app.bsky.feed.*&kinds=commit", &|name, payload| {
            name == "#commit" && payload["collection"].as_str().unwrap().starts_with("app.bsky.feed.")
        }),
        ("collections=app.bsky.feed.like", &|name, payload| {
            name != "#commit" || payload["collection"] == "app.bsky.feed.like"
        }),
        (&format!("dids={did}"), &|_, payload| payload["did"] == *did),
    ] {
        let kept = |frame: &&String| keeps(&name(frame), &payload(frame));
        let right: Vec<&String> = all.iter().filter(kept).collect();
        assert!(!right.is_empty() && right.len() < all.len(), "{query}");
        let mut some = connect(http, &format!("{query}&cursor={start}")).await.unwrap();
        let found = take(&mut some, right.len()).await;
        assert_eq!(found.iter().collect::<Vec<_>>(), right, "{query}");
    }
    let small = all.iter().map(String::len).min().unwrap();
    let query = format!("maxMessageSizeBytes={small}&cursor={start}");
    assert_eq!(next(&mut connect(http, &query).await.unwrap()).await.unwrap().len(), small);
    let mut future = connect(http, "cursor=4000000000000000").await.unwrap();
    assert_eq!(name(&next(&mut future).await.unwrap()), "#info FutureCursor");
    // After the last event, but not in the future.
    wait_until("the last event to be long ago", SOON, async || {
        standpipe::time::now_ms() * 1000 > seq(&all[wanted - 1]) + 4_000_000
    })
    .await;
    let recently = (standpipe::time::now_ms() - 1) * 1000 + 999;
    let mut live = connect(http, &format!("cursor={recently}")).await.unwrap();
    for socket in [&mut future, &mut live] {
        hears(socket, &chain.redis).await;
    }
    announce(&chain.redis, "did:plc:new").await;
    let new = other(&mut future).await;
    assert_eq!(payload(&new)["did"], "did:plc:new");
    assert_eq!(other(&mut live).await, new);

    for (query, message) in [
        ("wantedDids=did:plc:a", "wantedDids belongs to /subscribe"),
        ("kinds=commits", "kinds: commits is none of commit, identity, account, sync"),
        ("kinds=account&collections=a.b", "collections: only commits have one"),
        ("collections=*", "is not the name of a collection"),
        ("dids=alice", "alice is not a DID"),
        ("zstdDictionary=7", "does not compress"),
        ("cursor=x", "cursor: x is not a number"),
        ("maxMessageSizeBytes=-1", "is not between 0 and 4294967295"),
    ] {
        let (code, answer) = connect(http, query).await.unwrap_err();
        assert_eq!((code, answer["error"].as_str()), (400, Some("InvalidRequest")), "{query}");
        assert!(answer["message"].as_str().unwrap().contains(message), "{query}: {answer}");
    }
    let mut talks = connect(http, "").await.unwrap();
    talks.send(Message::text(r#"{"type":"options_update"}"#)).await.unwrap();
    let last: Value = serde_json::from_str(&next(&mut talks).await.unwrap()).unwrap();
    assert_eq!(
        last,
        json!({"$type": "error", "error": "InvalidRequest", "message": "this endpoint takes no messages"})
    );
    assert_eq!(next(&mut talks).await.unwrap_err(), "this endpoint takes no messages");
    // Clients take "away" for the end.
    program.signal(Signal::Term);
    let close = loop {
        if let Message::Close(frame) = live.next().await.unwrap().unwrap() {
            break frame.unwrap();
        }
    };
    assert_eq!(
        (close.code, &*close.reason),
        (CloseCode::Restart, "the server is draining: reconnect with the last cursor")
    );
}

/// A client from `PyPI`. `make test-clients` installs it and runs this.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python: make test-clients"]
async fn a_client_for_version_2_connects_unchanged() {
    let options = NetworkOptions { accounts: 50, events: 2_000, deletions: true, ..network(6) };
    let (chain, variables, http) = serving(&options).await;
    let _program = Program::start("run", &variables.with("STREAM_KEEP", "1h")).await;
    chain.finished().await;
    let wanted = expected(&traffic::events(&options)).len();
    let all = take(&mut connect(http, "cursor=1").await.unwrap(), wanted).await;
    let count = |kind: &str, collection: &str, operation: &str| {
        all.iter()
            .filter(|frame| name(frame) == kind)
            .filter(|frame| {
                kind != "#commit"
                    || payload(frame)["collection"] == collection && payload(frame)["operation"] == operation
            })
            .count()
    };
    let (posts, deleted) =
        (count("#commit", "app.bsky.feed.post", "create"), count("#commit", "app.bsky.feed.post", "delete"));
    let (identities, accounts) = (count("#identity", "", ""), count("#account", "", ""));
    let (start, last) = (seq(&all[0]), seq(&all[wanted - 1]));
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = tokio::process::Command::new(root.join("target/tools/clients/python/bin/python"))
        .arg(root.join("tests/clients/atproto_events.py"))
        .args([format!("ws://{http}/xrpc"), start.to_string(), last.to_string()])
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let found: Value = serde_json::from_str(&said)
        .unwrap_or_else(|_| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
    let wanted = json!({
        "posts": posts, "deleted": deleted, "identities": identities, "accounts": accounts,
        "others": wanted - posts - deleted - identities - accounts,
        "numbers": wanted, "connections": wanted.div_ceil(700), "cursor": last,
    });
    assert_eq!(found, wanted);
}
