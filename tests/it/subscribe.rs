//! `GET /subscribe`: everything that is applied, in order, to clients of a Jetstream.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use standpipe::origin::jetstream::compressed::Decompressor;
use standpipe_lab::simulate::NetworkOptions;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::support::chain::{Chain, Program, RUN, SOON, Variables, network, purged, redis_command};
use crate::support::model::{self, Event, Kind};
use crate::support::{
    Redis, Signal, Standpipe, connect, free_port, query_value, traffic, wait_for, wait_until,
};

/// The long version of a test takes minutes; it runs with `make long`.
fn is_long() -> bool {
    std::env::var_os("STANDPIPE_LONG").is_some()
}

/// A subscriber.
struct Client(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Client {
    /// Connects; the status of the answer if that is refused, and its text.
    async fn connect(http: SocketAddr, query: &str) -> Result<Self, (u16, String)> {
        Self::with_token(http, query, None).await
    }

    async fn with_token(http: SocketAddr, query: &str, token: Option<&str>) -> Result<Self, (u16, String)> {
        let mut request = format!("ws://{http}/subscribe?{query}").into_client_request().unwrap();
        if let Some(token) = token {
            request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        match tokio_tungstenite::connect_async(request).await {
            Ok((socket, _)) => Ok(Self(socket)),
            Err(Error::Http(response)) => {
                let body = response.body().as_deref().unwrap_or_default();
                Err((response.status().as_u16(), String::from_utf8_lossy(body).into_owned()))
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Connects as soon as the server answers.
    async fn patient(http: SocketAddr, query: &str) -> Self {
        loop {
            let request = format!("ws://{http}/subscribe?{query}").into_client_request().unwrap();
            if let Ok((socket, _)) = tokio_tungstenite::connect_async(request).await {
                return Self(socket);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The next event; the close frame's reason at the end.
    async fn next(&mut self) -> Result<Value, String> {
        loop {
            let message = tokio::time::timeout(RUN, self.0.next()).await.expect("nothing comes");
            match message {
                Some(Ok(Message::Text(text))) => return Ok(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Close(frame))) => {
                    return Err(frame.map(|frame| frame.reason.to_string()).unwrap_or_default());
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("the end".to_owned()),
            }
        }
    }

    async fn take(&mut self, count: usize) -> Vec<Value> {
        let mut events = Vec::new();
        while events.len() < count {
            events.push(self.next().await.unwrap());
        }
        events
    }

    async fn send(&mut self, message: &Value) {
        self.0.send(Message::text(message.to_string())).await.unwrap();
    }
}

/// What a message says, without its time.
pub fn essence(message: &Value) -> String {
    let commit = &message["commit"];
    let kind = message["kind"].as_str().unwrap();
    match kind {
        "commit" => format!(
            "{} {} {} {}/{} {}",
            message["did"],
            commit["rev"],
            commit["operation"],
            commit["collection"],
            commit["rkey"],
            commit["record"]
        ),
        kind => {
            let inner = &message[kind];
            format!("{} {kind} {} {}", message["did"], inner["seq"], inner["handle"])
        }
    }
}

pub fn expected(events: &[Event]) -> Vec<String> {
    let mut messages = Vec::new();
    for event in events {
        let seq = event.version.seq;
        match &event.kind {
            Kind::Commit { repo, ops } => {
                for op in ops {
                    let (collection, rkey) = op.path.split_once('/').unwrap();
                    let commit = json!({
                        "rev": event.version.rev, "operation": op.action, "collection": collection, "rkey": rkey,
                        "record": op.record,
                    });
                    messages.push(json!({"did": repo, "kind": "commit", "commit": commit}));
                }
            }
            Kind::Identity { did, handle } => {
                let mut identity = json!({"seq": seq});
                if let Some(handle) = handle {
                    identity["handle"] = json!(handle);
                }
                messages.push(json!({"did": did, "kind": "identity", "identity": identity}));
            }
            Kind::Account { did, .. } => {
                messages.push(json!({"did": did, "kind": "account", "account": {"seq": seq}}));
            }
        }
    }
    messages.iter().map(essence).collect()
}

fn position(message: &Value) -> u64 {
    message["time_us"].as_u64().unwrap()
}

/// A chain whose program serves subscribers at a port that stays.
pub async fn serving(network: &NetworkOptions) -> (Chain, Variables, SocketAddr) {
    let chain = Chain::start(network, None).await;
    let http: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
    let variables = chain.variables().with("SUBSCRIBE", "on").with("HTTP_ADDR", http.to_string());
    (chain, variables, http)
}

/// Twenty times (or six) one of the two is killed, at random.
#[tokio::test(flavor = "multi_thread")]
async fn two_in_a_row_end_with_the_same_tables() {
    let (events, kills) = if is_long() { (50_000, 20) } else { (5_000, 6) };
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let options = NetworkOptions { accounts: 150, events, deletions: true, ..network(9) };
    let traffic = traffic::events(&options);
    let (chain, first_variables, http) = serving(&options).await;
    // It is the same stream all the time; nothing of it may go before the second has read it.
    let first_variables = first_variables.with("STREAM_KEEP", "1h");
    let second = Chain::start(&network(1), None).await;
    let second_variables = second.variables().with("RELAY_URL", format!("ws://{http}/subscribe"));
    // Without a position it would begin with what is applied after it has connected.
    let now = standpipe::time::now_ms() * 1000;
    let _: String = redis_command(&second.redis, &["SET", "firehose:cursor", &now.to_string()]).await;
    let name = format!("{http}/subscribe");
    let _: String = redis_command(&second.redis, &["SET", "firehose:cursor:relay", &name]).await;
    let mut programs =
        [Program::start("run", &first_variables).await, Program::start("run", &second_variables).await];
    let mut killed = [0, 0];
    for kill in 1..=kills {
        let goal = events * kill / (kills + 2);
        wait_for(&format!("{goal} events to be applied"), RUN, async || {
            let cursor: Option<i64> = redis_command(&chain.redis, &["GET", "firehose:cursor"]).await;
            let all = chain.relay.last_seq as f64;
            let reached = cursor.map_or(0.0, |cursor| cursor as f64 / all) * events as f64;
            if reached >= goal as f64 { Ok(()) } else { Err(format!("{reached}")) }
        })
        .await;
        let which = rng.usize(0..2);
        killed[which] += 1;
        programs[which].signal(Signal::Kill);
        assert_eq!(programs[which].wait_exit(SOON).await, 128 + 9);
        let variables = if which == 0 { &first_variables } else { &second_variables };
        programs[which] = Program::start("run", variables).await;
    }
    println!("killed: {killed:?}");
    chain.finished().await;
    purged(&chain.database).await;
    let wanted = model::expected(&traffic).without_versions();
    let found = model::read(&connect(&chain.database).await).await.without_versions();
    model::assert_same("the first", &wanted, &found);
    wait_for("the second to have the same tables", RUN, async || {
        purged(&second.database).await;
        let found = model::read(&connect(&second.database).await).await.without_versions();
        let differences = model::differences(&wanted, &found);
        if differences.is_empty() { Ok(()) } else { Err(model::summary(&differences)) }
    })
    .await;
    let audit = second.audit(&[]).await;
    assert_eq!(audit.code, 0, "{}", audit.stdout);
    assert_eq!(programs[1].metric("standpipe_relay_gaps_total").await, 0.0);
}

/// Each breaks its connection again and again, and continues at the last time that it saw.
#[tokio::test(flavor = "multi_thread")]
async fn those_who_come_back_miss_nothing() {
    let (events, subscribers, most) = if is_long() { (100_000, 20, 5_000) } else { (6_000, 5, 400) };
    let options = NetworkOptions { accounts: 200, events, deletions: true, ..network(5) };
    let wanted = std::sync::Arc::new(expected(&traffic::events(&options)));
    let (chain, variables, http) = serving(&options).await;
    let program = Program::start("run", &variables.with("STREAM_KEEP", "1h")).await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..subscribers {
        let wanted = std::sync::Arc::clone(&wanted);
        // Some are there from the start, the others begin with what is kept.
        if number > subscribers / 2 {
            chain.finished().await;
        }
        tasks.spawn(async move {
            let mut seen: HashSet<String> = HashSet::new();
            let mut order = Vec::new();
            let (mut cursor, mut connections) = (0, 0);
            while seen.len() < wanted.len() {
                let mut client = Client::patient(http, &format!("cursor={cursor}")).await;
                connections += 1;
                let mut received = 0;
                let began = cursor;
                while received < most && seen.len() < wanted.len() {
                    let message = client.next().await.unwrap();
                    let at = position(&message);
                    assert!(at >= cursor, "{at} after {cursor}");
                    let text = essence(&message);
                    if seen.insert(text.clone()) {
                        order.push(text);
                    } else {
                        assert_eq!(at, began, "{text} came twice");
                    }
                    cursor = at;
                    received += 1;
                }
            }
            assert!(connections > wanted.len() / most, "{connections} connections");
            assert!(order == *wanted, "not in the order of the relay");
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    program.metric_is("standpipe_subscribers", 0.0).await;
}

/// A transaction is held open in which the row is written already: nobody may hear of it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_before_it_is_in_the_tables() {
    let events = if is_long() { 10_000 } else { 1_500 };
    let options = NetworkOptions { accounts: 100, events, ..network(3) };
    let (chain, variables, http) = serving(&options).await;
    // Its tables are there, and its stream is empty.
    let migrated = Standpipe::run(&["migrate"], &variables, SOON).await;
    assert_eq!(migrated.code, 0, "{}", migrated.stderr);
    let client = connect(&chain.database).await;
    let lock = connect(&chain.database).await;
    lock.batch_execute("BEGIN; LOCK TABLE likes IN EXCLUSIVE MODE").await.unwrap();
    let _program = Program::start("run", &variables).await;
    let mut subscriber = Client::patient(http, "cursor=0").await;
    wait_until("a like to wait for the lock", RUN, async || {
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'likes'::regclass";
        query_value(&chain.database, waiting).await != "0"
    })
    .await;
    let (mut checked, mut locked) = (0, Some(lock));
    let last = traffic::events(&options).len();
    let mut messages = 0;
    while checked < events / 3 && messages < last {
        let patience = if locked.is_some() { Duration::from_secs(3) } else { RUN };
        let Ok(message) = tokio::time::timeout(patience, subscriber.next()).await else {
            // Nothing comes any more, because the likes are locked.
            let lock = locked.take().expect("nothing comes");
            lock.batch_execute("ROLLBACK").await.unwrap();
            continue;
        };
        let message = message.unwrap();
        messages += 1;
        let commit = &message["commit"];
        if commit["operation"] != "create" {
            continue;
        }
        let collection = commit["collection"].as_str().unwrap();
        let table = match collection {
            "app.bsky.feed.post" => "posts",
            "app.bsky.feed.like" => "likes",
            "app.bsky.graph.follow" => "follows",
            _ => continue,
        };
        if table == "likes" {
            assert!(locked.is_none(), "a like was sent while nobody could write it");
        }
        let uri = format!(
            "at://{}/{collection}/{}",
            message["did"].as_str().unwrap(),
            commit["rkey"].as_str().unwrap()
        );
        let deleted = "SELECT count(*) FROM standpipe.tombstones WHERE uri = $1";
        let found: i64 = client
            .query_one(&format!("SELECT count(*) FROM {table} WHERE uri = $1"), &[&uri])
            .await
            .unwrap()
            .get(0);
        // It may be deleted by now.
        if found == 0 {
            let gone: i64 = client.query_one(deleted, &[&uri]).await.unwrap().get(0);
            assert_eq!(gone, 1, "{uri} is not there");
        }
        checked += 1;
    }
    assert!(locked.is_none() && checked > events / 10, "{checked}");
    println!("{checked} rows were there when they were announced");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_never_reads_costs_the_others_nothing() {
    let options =
        NetworkOptions { accounts: 500, events: if is_long() { 100_000 } else { 30_000 }, ..network(4) };
    let (chain, variables, http) = serving(&options).await;
    let program = Program::start("run", &variables).await;
    chain.finished().await;
    // One that reads everything, so that what it takes is not counted below.
    let count = expected(&traffic::events(&options)).len();
    Client::patient(http, "cursor=0").await.take(count).await;
    program.metric_is("standpipe_subscribers", 0.0).await;
    let before = program.rss_bytes();
    let mut lazy = Vec::new();
    for _ in 0..5 {
        let mut stream = TcpStream::connect(http).await.unwrap();
        let request = "GET /subscribe?cursor=0 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                       Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 101");
        lazy.push(stream);
    }
    program.metric_is("standpipe_subscribers", 5.0).await;
    let began = Instant::now();
    Client::patient(http, "cursor=0").await.take(count).await;
    println!("{count} messages beside five that do not read: {:?}", began.elapsed());
    let more = program.rss_bytes().saturating_sub(before) >> 10;
    println!("{more} KiB more memory");
    assert!(more < 8 << 10, "{more} KiB more memory");
    program.metric_with_is("standpipe_subscribers_disconnected_total", "\"slow\"", 5.0).await;
    drop(lazy);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_wrongly_is_refused_with_a_reason() {
    let (chain, variables, http) = serving(&network(50)).await;
    let token = "sixteen letters!".replace(' ', "-");
    let variables = variables.with("SUBSCRIBE_CONNECTIONS", "1").with("SUBSCRIBE_TOKEN", &token);
    let mut program = Program::start("run", &variables).await;
    chain.finished().await;
    let many = vec!["wantedCollections=a.b"; 101].join("&");
    for (query, code, says) in [
        ("", 401, "SUBSCRIBE_TOKEN"),
        ("token=wrong", 401, "wrong token"),
        ("token=T&cursor=yesterday", 400, "cursor"),
        ("token=T&wantedDids=alice", 400, "alice is not a DID"),
        ("token=T&wantedCollections=*", 400, "*"),
        (&format!("token=T&{many}"), 400, "more than 100"),
    ] {
        let (status, text) =
            Client::connect(http, &query.replace("=T", &format!("={token}"))).await.err().unwrap();
        assert_eq!(status, code, "{query}: {text}");
        assert!(text.contains(says), "{query}: {text}");
    }
    let (status, text) = program.get(&format!("/subscribe?token={token}")).await;
    assert_eq!(status, 426, "{text}");
    // A page of another site, in the browser of somebody who can reach it.
    let open = Program::start(
        "worker",
        &variables
            .clone()
            .with("SUBSCRIBE_TOKEN", "")
            .with("CONSUMER_ID", "open")
            .with("HTTP_ADDR", "127.0.0.1:0"),
    )
    .await;
    let mut request = format!("ws://{}/subscribe", open.http).into_client_request().unwrap();
    request.headers_mut().insert("origin", "https://elsewhere.example".parse().unwrap());
    let Err(Error::Http(response)) = tokio_tungstenite::connect_async(request).await else {
        panic!("it is let in")
    };
    assert_eq!(response.status(), 403);
    drop(open);

    let mut client = Client::with_token(http, "cursor=0", Some(&token)).await.ok().unwrap();
    client.take(20).await;
    let (status, text) = Client::connect(http, &format!("token={token}")).await.err().unwrap();
    assert_eq!(status, 503, "{text}");
    assert!(text.contains("SUBSCRIBE_CONNECTIONS"), "{text}");
    client.send(&json!({"type": "options_update", "payload": {"wantedDids": ["alice"]}})).await;
    let reason = loop {
        if let Err(reason) = client.next().await {
            break reason;
        }
    };
    assert!(reason.contains("alice is not a DID"), "{reason}");
    program.metric_with_is("standpipe_subscribers_disconnected_total", "\"invalid\"", 1.0).await;

    // Who is connected when it ends is told so.
    let mut client = Client::with_token(http, "", Some(&token)).await.ok().unwrap();
    program.metric_is("standpipe_subscribers", 1.0).await;
    assert_eq!(program.status().await["process"]["subscribers"]["connected"], 1);
    program.signal(Signal::Term);
    let reason = client.next().await.unwrap_err();
    assert!(reason.contains("draining"), "{reason}");
    assert_eq!(program.wait_exit(SOON).await, 0);

    // Without it, nobody is served.
    for (command, off) in [("run", variables.clone().with("SUBSCRIBE", "off")), ("reader", variables.clone())]
    {
        let mut program = Program::start(command, &off).await;
        let (status, text) = program.get("/subscribe").await;
        assert_eq!(status, 404, "{text}");
        assert!(text.contains("SUBSCRIBE=on"), "{text}");
        program.signal(Signal::Term);
        assert_eq!(program.wait_exit(SOON).await, 0);
    }
}

/// Clients that compress by default get frames that they can read.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_for_compression_gets_frames() {
    let options = NetworkOptions { accounts: 20, events: 300, ..network(13) };
    let (chain, variables, http) = serving(&options).await;
    let _program = Program::start("run", &variables).await;
    chain.finished().await;
    let wanted = expected(&traffic::events(&options));
    let mut plain = Client::patient(http, "cursor=0").await;
    let messages = plain.take(wanted.len()).await;
    let mut framed = Client::patient(http, "cursor=0&compress=true").await;
    let mut decompressor = Decompressor::new(1 << 20).unwrap();
    for message in &messages {
        let frame = tokio::time::timeout(RUN, framed.0.next()).await.unwrap().unwrap().unwrap();
        let Message::Binary(frame) = frame else { panic!("{frame:?}") };
        let text = decompressor.text(&frame).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), *message);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_can_be_given_and_changed() {
    let options = NetworkOptions { accounts: 20, events: 600, ..network(2) };
    let (chain, variables, http) = serving(&options).await;
    let _program = Program::start("run", &variables).await;
    chain.finished().await;
    let all = Client::patient(http, "cursor=0").await.take(expected(&traffic::events(&options)).len()).await;
    let essences = |keep: &dyn Fn(&Value) -> bool| -> Vec<String> {
        all.iter().filter(|message| keep(message)).map(essence).collect()
    };
    let collection =
        |message: &Value| message["commit"]["collection"].as_str().unwrap_or_default().to_owned();
    let did = all[0]["did"].as_str().unwrap().to_owned();
    let is_commit = |message: &Value| message["kind"] == "commit";
    assert!(all.iter().any(|message| message["kind"] == "identity"), "there is nothing to filter");

    let likes = essences(&|message| !is_commit(message) || collection(message) == "app.bsky.feed.like");
    let mut client = Client::patient(http, "cursor=0&wantedCollections=app.bsky.feed.like").await;
    let got: Vec<String> = client.take(likes.len()).await.iter().map(essence).collect();
    assert!(got == likes && likes.len() < all.len());

    // A cursor in the future stands for the present, whoever's clock is wrong.
    let mut present = Client::patient(http, "cursor=9000000000000000").await;
    let identity = json!({"did": did, "handle": "late.test"}).to_string();
    let _: String = redis_command(
        &chain.redis,
        &["XADD", "firehose:events", "*", "type", "identity", "data", &identity, "seq", ""],
    )
    .await;
    assert_eq!(present.next().await.unwrap()["identity"]["handle"], "late.test");

    // As many accounts as the documentation says fit into a URL.
    let many: Vec<String> = (0..299).map(|n| format!("wantedDids=did:plc:{n:0>24}")).collect();
    let mut some =
        Client::connect(http, &format!("cursor=0&{}&wantedDids={did}", many.join("&"))).await.ok().unwrap();
    assert_eq!(some.next().await.unwrap()["did"], did.as_str());

    let one = essences(&|message| {
        message["did"] == did.as_str()
            && (!is_commit(message) || collection(message).starts_with("app.bsky.graph."))
    });
    let update = json!({"type": "options_update", "payload": {
        "wantedCollections": ["app.bsky.graph.*"], "wantedDids": [did], "maxMessageSizeBytes": 0,
    }});
    let mut client = Client::patient(http, "cursor=0&requireHello=true&wantedCollections=x.y").await;
    client.send(&update).await;
    let got: Vec<String> = client.take(one.len()).await.iter().map(essence).collect();
    assert_eq!(got, one);
    assert!(!one.is_empty());
}

/// What could not be applied is told apart, and what an account forbids to collect is not passed on.
#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_labelled_and_forbidden_records_left_out() {
    let (chain, variables, http) = serving(&network(30)).await;
    let program = Program::start("run", &variables).await;
    chain.finished().await;
    let quiet = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
    let client = connect(&chain.database).await;
    client
        .batch_execute(&format!(
            "INSERT INTO users (did, handle) VALUES ('{quiet}', 'q.test') ON CONFLICT DO NOTHING;
             INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ('{quiet}', true)"
        ))
        .await
        .unwrap();
    let mut subscriber = Client::patient(http, "").await;
    program.metric_is("standpipe_subscribers", 1.0).await;
    let add = async |data: Value| {
        let _: String = redis_command(
            &chain.redis,
            &["XADD", "firehose:events", "*", "type", "commit", "data", &data.to_string(), "seq", ""],
        )
        .await;
    };
    let post = |text: Value| json!({"$type": "app.bsky.feed.post", "text": text, "createdAt": "2026-11-21T04:17:51.287Z"});
    let cid = "bafyreidxkskkoafhrzsxtjwapsmnaqft7ntyoepjexjyw4zivcyej7qo3i";
    let create = |rkey: &str, record: &Value| json!({"action": "create", "path": format!("app.bsky.feed.post/{rkey}"), "cid": cid, "record": record});
    let other = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb";
    add(json!({"repo": quiet, "rev": "3n2samfdihk2n", "ops": [create("a", &post(json!("secret")))]})).await;
    add(json!({"repo": other, "rev": "3n2samfdihk2n", "ops": [
        create("good", &post(json!("good"))), create("bad", &post(json!(["no text"]))),
    ]}))
    .await;
    add(json!({"repo": other, "rev": "3n2samfdihk2o", "ops": [create("last", &post(json!("last")))]})).await;
    let got: Vec<(String, bool)> = subscriber
        .take(3)
        .await
        .iter()
        .map(|message| {
            let commit = &message["commit"];
            (commit["rkey"].as_str().unwrap().to_owned(), commit["deadLetter"] == true)
        })
        .collect();
    let wanted = [("good", false), ("bad", true), ("last", false)];
    assert_eq!(got, wanted.map(|(rkey, dead)| (rkey.to_owned(), dead)));
    assert_eq!(chain.look().await.dead_letters, 1);
}

/// Whoever has not read what is gone is told so, and never passes it over in silence.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_further_behind_than_the_stream_is_told() {
    let (chain, variables, http) = serving(&network(400)).await;
    let program = Program::start("run", &variables).await;
    chain.finished().await;
    let mut subscriber = Client::patient(http, "cursor=0").await;
    subscriber.take(100).await;
    let _: u64 = redis_command(&chain.redis, &["XTRIM", "firehose:events", "MAXLEN", "0"]).await;
    let reason = loop {
        if let Err(reason) = subscriber.next().await {
            break reason;
        }
    };
    assert!(reason.contains("STREAM_KEEP"), "{reason}");
    program.metric_with_is("standpipe_subscribers_disconnected_total", "\"behind\"", 1.0).await;
}

/// What waited for an hour before it was applied is kept as long as everything else.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_is_kept_from_the_moment_it_was_applied() {
    let redis = Redis::start().await;
    let database = crate::support::Postgres::shared().await.fresh_database().await;
    let mut pipe = redis::pipe();
    let an_hour_ago = standpipe::time::now_ms() - 3_600_000;
    for number in 0..1_000 {
        let data = json!({"did": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "handle": "a.test"}).to_string();
        pipe.cmd("XADD").arg("firehose:events").arg(format!("{}-0", an_hour_ago + number));
        pipe.arg(&["type", "identity", "data", &data, "seq", &(number + 1).to_string()]).ignore();
    }
    pipe.query_async::<()>(&mut redis.connection().await).await.unwrap();
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("STREAM_KEEP", "20s");
    let program = Program::start("worker", &variables).await;
    wait_until("everything to be applied", RUN, async || program.entries().await >= 1_000.0).await;
    // The janitor has looked at it some times; its first mark of what is applied is younger than twenty seconds.
    let applied = Instant::now();
    wait_for("some marks", RUN, async || {
        let marks: Option<String> = redis_command(&redis, &["HGET", "firehose:cursor:watch", "marks"]).await;
        let count = marks.as_deref().unwrap_or_default().split(' ').count();
        if count >= 3 { Ok(()) } else { Err(format!("{marks:?}")) }
    })
    .await;
    let now = kept(&redis).await;
    assert!(applied.elapsed() < Duration::from_secs(20), "too late to see anything");
    assert_eq!(now, (1_000, 1_000));
    wait_for("it to be trimmed in the end", RUN, async || {
        let (length, _) = kept(&redis).await;
        if length < 200 { Ok(()) } else { Err(format!("{length}")) }
    })
    .await;
    assert!(
        kept(&redis).await.0 > 0,
        "the last one stays, so that subscribers can tell that nothing is gone"
    );
}

/// The entries kept, and whether anything has held the reader up.
async fn kept(redis: &Redis) -> (u64, u64) {
    let length: u64 = redis_command(redis, &["XLEN", "firehose:events"]).await;
    let kept: Option<u64> = redis_command(redis, &["HGET", "firehose:cursor:watch", "acknowledged"]).await;
    (length, kept.unwrap_or(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_holds_up_nobody_and_goes_when_memory_is_short() {
    let (chain, variables, _) = serving(&network(3_000)).await;
    let variables = variables.with("REDIS_MAX_STREAM_LEN", "500").with("STREAM_KEEP", "1h");
    let mut program = Program::start("run", &variables).await;
    chain.finished().await;
    wait_for("everything to be kept", SOON, async || {
        let (length, kept) = kept(&chain.redis).await;
        if length > 2_000 && kept == length { Ok(()) } else { Err(format!("{kept} of {length}")) }
    })
    .await;
    let check = Standpipe::run(&["check"], &variables, SOON).await;
    assert!(!check.stdout.contains("at its mark"), "{}", check.stdout);

    // Another process, which keeps nothing, leaves it alone.
    let other = variables.clone().with("CONSUMER_ID", "other").with("HTTP_ADDR", "127.0.0.1:0");
    let other = other.with("SUBSCRIBE", "off").with("STREAM_KEEP", "0");
    let beside = Program::start("worker", &other).await;
    wait_until("its janitor to have been there twice", SOON, async || {
        beside.status().await["process"]["tasks"]["janitor"]["last_ms"].is_u64()
            && beside.metric("standpipe_acknowledged_entries").await > 2_000.0
    })
    .await;
    assert!(kept(&chain.redis).await.0 > 2_000);
    drop(beside);

    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);
    // A size keeps about as much.
    let mut program = Program::start("run", &variables.clone().with("STREAM_KEEP", "1MiB")).await;
    wait_for("a megabyte to be left", SOON, async || {
        let (length, _) = kept(&chain.redis).await;
        let bytes: u64 =
            redis_command(&chain.redis, &["MEMORY", "USAGE", "firehose:events", "SAMPLES", "0"]).await;
        if (600_000..1_300_000).contains(&bytes) {
            Ok(())
        } else {
            Err(format!("{length} entries, {bytes} bytes"))
        }
    })
    .await;
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);

    let mut program = Program::start("run", &variables.with("REDIS_MEMORY_MARK", "4MiB")).await;
    let _: String = redis_command(&chain.redis, &["SET", "ballast", &"x".repeat(4 << 20)]).await;
    program.wait_for_line("short of memory", SOON).await;
    wait_for("nothing to be kept", SOON, async || {
        let now = kept(&chain.redis).await;
        if now.0 < 200 { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
}

/// npm's client. `make test-clients` installs it and runs this.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs node and npm: make test-clients"]
async fn a_client_for_jetstreams_connects_unchanged() {
    let options = NetworkOptions { accounts: 50, events: 2_000, deletions: true, ..network(6) };
    let (chain, variables, http) = serving(&options).await;
    let _program = Program::start("run", &variables).await;
    chain.finished().await;
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/clients");
    let script = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/skyware.mjs")).unwrap();
    std::fs::write(folder.join("skyware.mjs"), script).unwrap();
    let messages =
        Client::patient(http, "cursor=0").await.take(expected(&traffic::events(&options)).len()).await;
    let count = |keep: &dyn Fn(&Value) -> bool| messages.iter().filter(|message| keep(message)).count();
    let of = |collection: &'static str, operation: &'static str| {
        move |message: &Value| {
            let commit = &message["commit"];
            commit["collection"] == collection && commit["operation"] == operation
        }
    };
    let wanted = json!({
        "posts": count(&of("app.bsky.feed.post", "create")),
        "deleted": count(&of("app.bsky.feed.post", "delete")),
        "identities": count(&|message| message["kind"] == "identity"),
        "accounts": count(&|message| message["kind"] == "account"),
        "errors": 0,
        "cursor": position(messages.last().unwrap()),
    });
    let output = tokio::process::Command::new("node")
        .arg("skyware.mjs")
        .args([format!("ws://{http}/subscribe"), wanted["cursor"].to_string()])
        .current_dir(&folder)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let found: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}"));
    assert_eq!(found, wanted);
}
