//! A Jetstream instead of a relay: the same tables, and no event missed that it still has.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::StreamExt as _;
use serde_json::{Value, json};
use standpipe_lab::simulate::NetworkOptions;

use crate::support::chain::{CURSOR, Chain, Program, RUN, SOON, Variables, network, purged, redis_command};
use crate::support::model::{self, Event, Kind};
use crate::support::scripted::{Connection, ScriptedRelay, rev};
use crate::support::{Signal, Standpipe, connect, query_rows, query_value, traffic, wait_for, wait_until};

/// What a connection asked for: the query of its URL, and what it sent first.
type Asked = (String, Option<Value>);

/// When the first event happened, in microseconds.
const BEGIN: i64 = 1_795_000_000_000_000;
/// The time between two messages.
const STEP: i64 = 10_000;
/// What is asked for again of the time before a position.
const MARGIN: i64 = 5_000_000;

/// The messages of events, each with its position.
fn messages(events: &[Event]) -> Vec<(i64, String)> {
    let mut messages = Vec::new();
    let mut push = |message: &dyn Fn(i64) -> Value| {
        let position = BEGIN + i64::try_from(messages.len()).unwrap() * STEP;
        messages.push((position, message(position).to_string()));
    };
    for event in events {
        match &event.kind {
            Kind::Commit { repo, ops } => {
                for op in ops {
                    let (collection, rkey) = op.path.split_once('/').unwrap();
                    push(&|at| {
                        let mut commit = json!({
                            "rev": event.version.rev, "operation": op.action, "collection": collection, "rkey": rkey,
                        });
                        if let Some(cid) = &op.cid {
                            commit["cid"] = json!(cid);
                            commit["record"] = op.record.clone();
                        }
                        json!({"did": repo, "time_us": at, "kind": "commit", "commit": commit})
                    });
                }
            }
            Kind::Identity { did, handle } => push(&|at| {
                let identity =
                    json!({"did": did, "handle": handle, "seq": 1, "time": "2026-11-21T04:17:51.287Z"});
                json!({"did": did, "time_us": at, "kind": "identity", "identity": identity})
            }),
            Kind::Account { did, active, status, time } => push(&|at| {
                let mut account = json!({"did": did, "active": active, "seq": 1, "time": time});
                if let Some(status) = status {
                    account["status"] = json!(status);
                }
                json!({"did": did, "time_us": at, "kind": "account", "account": account})
            }),
        }
    }
    messages
}

/// A post of an account, at a position.
fn post(position: i64, name: &str) -> (i64, String) {
    let record =
        json!({"$type": "app.bsky.feed.post", "text": name, "createdAt": "2026-11-21T04:17:51.287Z"});
    let commit = json!({
        "rev": rev(u64::try_from((position - BEGIN) / 1000).unwrap()), "operation": "create",
        "collection": "app.bsky.feed.post", "rkey": name, "record": record,
        "cid": "bafyreidxkskkoafhrzsxtjwapsmnaqft7ntyoepjexjyw4zivcyej7qo3i",
    });
    let did = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
    let message = json!({"did": did, "time_us": position, "kind": "commit", "commit": commit});
    (position, message.to_string())
}

async fn send_after_cursor(connection: &mut Connection, messages: &[(i64, String)], most: usize) {
    let cursor = connection.cursor.unwrap_or_default();
    for (_, message) in messages.iter().filter(|(position, _)| *position > cursor).take(most) {
        if !connection.send_text(message).await {
            return;
        }
    }
}

async fn sending(messages: Vec<(i64, String)>) -> ScriptedRelay {
    let messages = Arc::new(messages);
    ScriptedRelay::start(move |mut connection| {
        let messages = Arc::clone(&messages);
        async move {
            send_after_cursor(&mut connection, &messages, usize::MAX).await;
            connection.stay().await;
        }
    })
    .await
}

async fn chain_of(server: &ScriptedRelay) -> (Chain, Variables) {
    let chain = Chain::start(&network(1), None).await;
    let variables = chain.variables().with("RELAY_URL", format!("{}/subscribe", server.url()));
    (chain, variables)
}

async fn cursor_is(chain: &Chain, position: i64) {
    wait_for(&format!("the cursor to be {position}"), RUN, async || {
        let cursor: Option<String> = redis_command(&chain.redis, &["GET", CURSOR]).await;
        if cursor.as_deref() == Some(&position.to_string()) { Ok(()) } else { Err(format!("{cursor:?}")) }
    })
    .await;
    wait_until("everything to be applied", RUN, async || chain.look().await.is_drained()).await;
}

/// The connection breaks after every 1,500 messages, and the program is killed three times.
#[tokio::test(flavor = "multi_thread")]
async fn a_jetstream_gives_the_tables_that_the_relay_gives() {
    let options = NetworkOptions { accounts: 60, events: 4000, deletions: true, ..network(7) };
    let events = traffic::events(&options);
    let messages = Arc::new(messages(&events));
    let last = messages.last().unwrap().0;
    assert!(messages.len() > 3000, "{}", messages.len());
    let all = Arc::clone(&messages);
    let cursors: Arc<Mutex<Vec<Option<i64>>>> = Arc::default();
    let seen = Arc::clone(&cursors);
    let server = ScriptedRelay::start(move |mut connection| {
        let all = Arc::clone(&all);
        seen.lock().unwrap().push(connection.cursor);
        async move {
            send_after_cursor(&mut connection, &all, 1500).await;
            let _ = connection.socket.close(None).await;
        }
    })
    .await;
    let (chain, variables) = chain_of(&server).await;
    let mut program = Program::start("run", &variables).await;
    for kill in 1..=3_i64 {
        wait_until("some of it to be read", RUN, async || {
            let cursor: Option<i64> = redis_command(&chain.redis, &["GET", CURSOR]).await;
            cursor.is_some_and(|cursor| cursor > BEGIN + kill * (last - BEGIN) / 5)
        })
        .await;
        program.signal(Signal::Kill);
        assert_eq!(program.wait_exit(SOON).await, 128 + 9);
        program = Program::start("run", &variables).await;
    }
    cursor_is(&chain, last).await;
    purged(&chain.database).await;
    let expected = model::expected(&events).without_versions();
    let found = model::read(&connect(&chain.database).await).await.without_versions();
    model::assert_same("from a Jetstream", &expected, &found);
    let audit = Standpipe::run(&["audit"], &variables, RUN).await;
    assert_eq!(audit.code, 0, "{}", audit.stdout);
    assert_eq!(program.metric("standpipe_relay_gaps_total").await, 0.0);
    // Each connection began some seconds before the position that had been reached.
    let cursors = cursors.lock().unwrap();
    assert!(cursors.len() > 4 && cursors[0].is_none(), "{cursors:?}");
    let positions: Vec<i64> = cursors[1..].iter().map(|cursor| cursor.unwrap() + MARGIN).collect();
    assert!(positions.iter().all(|at| messages.iter().any(|(position, _)| position == at)), "{positions:?}");
    assert!(positions.is_sorted() && positions.first() < positions.last(), "{positions:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_are_passed_on() {
    let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
    let seen = Arc::clone(&asked);
    let server = ScriptedRelay::start(move |mut connection| {
        let seen = Arc::clone(&seen);
        async move {
            let query = connection.query.clone();
            let mut update = None;
            if query.contains("requireHello=true") {
                let Some(Ok(message)) = connection.socket.next().await else { return };
                update = Some(serde_json::from_str(message.to_text().unwrap()).unwrap());
            }
            seen.lock().unwrap().push((query, update));
            connection.send_text(&post(BEGIN, "one").1).await;
            connection.stay().await;
        }
    })
    .await;
    let many: Vec<String> = (0..60).map(|n| format!("did:web:{n:02}.example")).collect();
    let ours = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
    for (number, (collections, dids)) in [
        ("*", String::new()),
        ("app.bsky.feed.*,app.bsky.graph.follow", format!("did:web:b.example,{ours}")),
        ("app.bsky.feed.post", format!("{},{ours}", many.join(","))),
    ]
    .into_iter()
    .enumerate()
    {
        let (chain, variables) = chain_of(&server).await;
        let variables = variables.with("COLLECTIONS", collections).with("WANTED_DIDS", dids);
        let _program = Program::start("run", &variables).await;
        cursor_is(&chain, BEGIN).await;
        assert_eq!(query_value(&chain.database, "SELECT count(*) FROM posts").await, "1");
        assert_eq!(asked.lock().unwrap().len(), number + 1);
    }
    let asked = asked.lock().unwrap();
    assert_eq!(asked[0], (String::new(), None));
    let dids = format!("wantedDids={ours}&wantedDids=did:web:b.example");
    let query = format!("wantedCollections=app.bsky.feed.*&wantedCollections=app.bsky.graph.follow&{dids}");
    assert_eq!(asked[1], (query, None));
    assert_eq!(asked[2].0, "requireHello=true");
    let update = asked[2].1.as_ref().unwrap();
    assert_eq!(update["type"], "options_update");
    assert_eq!(update["payload"]["wantedCollections"], json!(["app.bsky.feed.post"]));
    assert_eq!(update["payload"]["wantedDids"].as_array().unwrap().len(), 61);
}

/// A Jetstream that no longer has the requested events begins with the oldest that it has, and does not say so.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_it_no_longer_has_are_reported_as_a_gap() {
    let later = BEGIN + 2 * 3600 * 1_000_000;
    let server = sending(vec![post(later, "later"), post(later + 1, "last")]).await;
    let (chain, variables) = chain_of(&server).await;
    let name = format!("{}/subscribe", server.address);
    let _: String = redis_command(&chain.redis, &["SET", CURSOR, &BEGIN.to_string()]).await;
    let _: String = redis_command(&chain.redis, &["SET", &format!("{CURSOR}:relay"), &name]).await;
    let program = Program::start("run", &variables).await;
    cursor_is(&chain, later + 1).await;
    program.metric_is("standpipe_relay_gaps_total", 1.0).await;
    let gap = program.status().await["missing"]["last_gap"].clone();
    assert_eq!((gap["after"].as_i64(), gap["until"].as_i64()), (Some(BEGIN), None), "{gap}");
    assert!(gap["reason"].as_str().unwrap().contains("7200 s"), "{gap}");
    let check = Standpipe::run(&["check"], &variables.with("VERIFY", "on"), SOON).await;
    assert!(check.stdout.contains("carry no signatures"), "{}", check.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_cannot_be_used_are_counted_and_hold_up_nothing() {
    let bad = [
        "",
        "not JSON",
        "{}",
        "[1]",
        r#"{"did":"alice","time_us":1,"kind":"commit"}"#,
        r#"{"did":"did:plc:a","time_us":-1,"kind":"commit"}"#,
        r#"{"did":"did:plc:a","time_us":1,"kind":"commit"}"#,
        r#"{"did":"did:plc:a","time_us":1,"kind":"account","account":{"active":"yes"}}"#,
        r#"{"did":"did:plc:a","time_us":1,"kind":"commit","commit":{"rev":"3l3qo2vutsw2b","operation":"drop","collection":"app.bsky.feed.post","rkey":"a"}}"#,
    ];
    let future = post(i64::MAX / 2, "future").1;
    let huge = "x".repeat(9 << 20);
    let bad: Vec<&str> = bad.into_iter().chain([future.as_str(), huge.as_str()]).collect();
    // A type of a newer version is none of these.
    let unknown = json!({"did": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "time_us": BEGIN + 1, "kind": "news"});
    let mut all = vec![post(BEGIN, "first"), (BEGIN + 1, unknown.to_string())];
    all.extend(bad.iter().map(|text| (BEGIN + 2, (*text).to_owned())));
    all.push(post(BEGIN + 3, "last"));
    let server = sending(all).await;
    let (chain, variables) = chain_of(&server).await;
    let mut program = Program::start("run", &variables).await;
    cursor_is(&chain, BEGIN + 3).await;
    let texts = query_rows(&chain.database, "SELECT text FROM posts ORDER BY text").await;
    assert_eq!(texts, [[Some("first".to_owned())], [Some("last".to_owned())]]);
    let count = bad.len() as f64;
    program.metric_is("standpipe_relay_undecodable_frames_total", count).await;
    program.metric_with_is("standpipe_relay_missed_total", "\"frame\"", count).await;
    assert_eq!(program.metric("standpipe_relay_gaps_total").await, 0.0);
    assert_eq!(server.connections(), 1, "it connected again");
    assert!(program.is_running());
}

/// What a Jetstream cannot do is said at once.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_jetstream_cannot_do_is_refused() {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let server = ScriptedRelay::start(move |mut connection| {
        let count = Arc::clone(&count);
        async move {
            count.fetch_add(1, Ordering::SeqCst);
            connection.send(b"compressed").await;
            connection.stay().await;
        }
    })
    .await;
    let (_chain, variables) = chain_of(&server).await;
    for (name, value, says) in [
        ("BACKFILL", "all", "RELAY_URL is a Jetstream"),
        ("RELAY_URL", "wss://jetstream.example/subscribe?wantedDids=did:plc:a", "WANTED_DIDS"),
    ] {
        let ended = Standpipe::run(&["run"], &variables.clone().with(name, value), SOON).await;
        assert_eq!(ended.code, 64, "{value}");
        assert!(ended.stderr.contains(says), "{}", ended.stderr);
    }
    let mut program = Program::start("run", &variables).await;
    program.wait_for_line("sends binary data", SOON).await;
    assert!(sent.load(Ordering::SeqCst) > 0);
}

/// Compressed by the reference implementation, with the dictionary; among them one that cannot be decompressed.
#[tokio::test(flavor = "multi_thread")]
async fn compressed_messages_are_read() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jetstream");
    let good = std::fs::read(folder.join("message.json.zst")).unwrap();
    let server = ScriptedRelay::start(move |mut connection| {
        let good = good.clone();
        async move {
            connection.send(b"not a frame").await;
            connection.send(&good).await;
            connection.stay().await;
        }
    })
    .await;
    let (chain, variables) = chain_of(&server).await;
    let url = format!("{}/subscribe?compress=true", server.url());
    let program = Program::start("run", &variables.with("RELAY_URL", url)).await;
    cursor_is(&chain, 1_767_225_600_000_000).await;
    assert_eq!(
        query_rows(&chain.database, "SELECT text FROM posts").await,
        [[Some("compressed".to_owned())]]
    );
    program.metric_with_is("standpipe_relay_missed_total", "\"frame\"", 1.0).await;
    assert_eq!(program.metric("standpipe_relay_undecodable_frames_total").await, 1.0);
}
