//! What a relay sends that it should not, and what it leaves out: nothing goes missing without a trace, and
//! nothing takes the process down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::chain::{CURSOR, Chain, DEAD, Program, RUN, SOON, STREAM, network, redis_command};
use crate::support::scripted::{
    self, ScriptedRelay, account, commit, create, create_bytes, frame, identity, info, post, rev,
};
use crate::support::{Postgres, Redis, Standpipe, query_value, wait_for, wait_until};
use serde_json::Value as Json;
use shrike::cbor::{Value, encode_value};

const DID: &str = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";

/// Redis and a migrated database, and the variables to run with this relay.
async fn chain_of(relay: &ScriptedRelay) -> (Chain, crate::support::chain::Variables) {
    let database = Postgres::shared().await.fresh_database().await;
    let ended = Standpipe::run(&["migrate"], &[("DATABASE_URL", &database)], SOON).await;
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let chain = Chain::with_database(&network(1), None, database).await;
    let variables = chain.variables().with("RELAY_URL", relay.url());
    (chain, variables)
}

async fn sending(frames: Vec<(i64, Vec<u8>)>) -> ScriptedRelay {
    let frames = Arc::new(frames);
    ScriptedRelay::start(move |mut connection| {
        let frames = Arc::clone(&frames);
        async move {
            connection.send_after_cursor(&frames).await;
            connection.stay().await;
        }
    })
    .await
}

async fn letters(redis: &Redis) -> Vec<std::collections::BTreeMap<String, String>> {
    let entries: Vec<(String, Vec<(String, String)>)> =
        redis_command(redis, &["XRANGE", DEAD, "-", "+"]).await;
    entries.into_iter().map(|(_, fields)| fields.into_iter().collect()).collect()
}

async fn cursor_is(chain: &Chain, seq: i64) {
    wait_for(&format!("the cursor to be {seq}"), RUN, async || {
        let cursor: Option<String> = redis_command(&chain.redis, &["GET", CURSOR]).await;
        if cursor.as_deref() == Some(&seq.to_string()) { Ok(()) } else { Err(format!("{cursor:?}")) }
    })
    .await;
}

/// DAG-CBOR that no decoder may accept.
fn undecodable() -> Vec<(&'static str, Vec<u8>)> {
    let mut nested = vec![0x81_u8; 90];
    nested.push(0x80);
    let mut deep = vec![0xa1, 0x61, b'a'];
    deep.extend(nested);
    vec![
        ("nested too deeply", deep),
        (
            "an integer beyond 64 bits",
            vec![0xa1, 0x61, b'a', 0x3b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ),
        ("not a number", vec![0xa1, 0x61, b'a', 0xfb, 0x7f, 0xf8, 0, 0, 0, 0, 0, 0]),
        ("keys out of order", vec![0xa2, 0x61, b'b', 0x01, 0x61, b'a', 0x01]),
        ("a key twice", vec![0xa2, 0x61, b'a', 0x01, 0x61, b'a', 0x01]),
        ("broken off", vec![0xa2, 0x61, b'a', 0x01]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn only_operations_with_unreadable_or_missing_records_become_dead_letters() {
    let bad = undecodable();
    let mut frames = Vec::new();
    let mut expected = Vec::new();
    for n in 0..1000_i64 {
        let seq = n + 1;
        let good = create(&format!("app.bsky.feed.post/good{n}"), &post("good"));
        let mut ops = vec![good];
        // Enough accounts that none reaches its budget.
        let did = format!("did:plc:{:024}", n % 50);
        if n % 20 == 0 {
            let path = format!("app.bsky.feed.post/bad{n}");
            let which = usize::try_from(n / 20).unwrap() % (bad.len() + 1);
            let mut op = match bad.get(which) {
                Some((_, bytes)) => create_bytes(&path, bytes.clone()),
                None => create(&path, &post("missing")),
            };
            op.in_archive = which < bad.len();
            let reason = if op.in_archive { "undecodable" } else { "missing_block" };
            let cid = scripted::cid(op.record.as_ref().unwrap()).to_string();
            expected.push((reason.to_owned(), path, cid, rev(u64::try_from(n).unwrap())));
            ops.push(op);
        }
        frames.push((seq, commit(seq, &did, &rev(u64::try_from(n).unwrap()), &ops)));
    }
    let relay = sending(frames).await;
    let (chain, variables) = chain_of(&relay).await;
    let program = Program::start("run", &variables.clone().with("REDIS_CURSOR_KEY", CURSOR)).await;
    // From the beginning: without a cursor the relay sends everything.
    cursor_is(&chain, 1000).await;
    wait_until("everything to be applied", RUN, async || chain.look().await.is_drained()).await;
    assert_eq!(query_value(&chain.database, "SELECT count(*) FROM posts WHERE text = 'good'").await, "1000");
    assert_eq!(query_value(&chain.database, "SELECT count(*) FROM posts").await, "1000");
    let mut found: Vec<_> = letters(&chain.redis)
        .await
        .into_iter()
        .map(|letter| {
            let op: Json = serde_json::from_str(&letter["op"]).unwrap();
            let data: Json = serde_json::from_str(&letter["data"]).unwrap();
            let text = |value: &Json| value.as_str().unwrap_or_default().to_owned();
            (letter["reason"].clone(), text(&op["path"]), text(&op["cid"]), text(&data["rev"]))
        })
        .collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    let lines = program.stderr().lines().count();
    assert!(lines < 40, "{lines} lines:\n{}", program.stderr());
    let status = program.status().await;
    let counted = &status["missing"]["by_reason"];
    let count = |reason: &str| expected.iter().filter(|(is, ..)| is == reason).count();
    assert_eq!(
        (counted["undecodable"].as_u64(), counted["missing_block"].as_u64()),
        (Some(count("undecodable") as u64), Some(count("missing_block") as u64)),
        "{status}"
    );

    // The same frames again give no further letters.
    let _: String = redis_command(&chain.redis, &["SET", CURSOR, "0"]).await;
    wait_until("it to be read again", RUN, async || relay.connections() > 1).await;
    cursor_is(&chain, 1000).await;
    assert_eq!(letters(&chain.redis).await.len(), expected.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_account_cannot_fill_the_dead_letters() {
    let frames = (1..=300)
        .map(|seq| {
            let op = create_bytes(
                &format!("app.bsky.feed.post/{seq}"),
                vec![0xff, u8::try_from(seq % 250).unwrap()],
            );
            (seq, commit(seq, DID, &rev(u64::try_from(seq).unwrap()), &[op]))
        })
        .collect();
    let relay = sending(frames).await;
    let (chain, variables) = chain_of(&relay).await;
    let program = Program::start("run", &variables).await;
    cursor_is(&chain, 300).await;
    assert_eq!(letters(&chain.redis).await.len(), 100);
    assert_eq!(program.status().await["missing"]["by_reason"]["no_room"], 200);
    // Purging makes room.
    let purged = Standpipe::run(&["dead-letters", "purge", "--all"], &variables, SOON).await;
    assert_eq!(purged.code, 0, "{}", purged.stderr);
    let left: i64 =
        redis_command(&chain.redis, &["EXISTS", &format!("{DEAD}:keys"), &format!("{DEAD}:accounts")]).await;
    assert_eq!(left, 0);
    let bytes: String = redis_command(&chain.redis, &["GET", &format!("{DEAD}:bytes")]).await;
    assert_eq!(bytes, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_key_of_maximum_length_is_stored() {
    let path = format!("app.bsky.feed.post/{}", "k".repeat(512));
    let relay = sending(vec![(1, commit(1, DID, &rev(1), &[create(&path, &post("long"))]))]).await;
    let (chain, variables) = chain_of(&relay).await;
    let _program = Program::start("run", &variables).await;
    cursor_is(&chain, 1).await;
    wait_until("everything to be applied", SOON, async || chain.look().await.is_drained()).await;
    let uri = query_value(&chain.database, "SELECT uri FROM feed_items").await;
    assert_eq!(uri, format!("at://{DID}/{path}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_of_unknown_type_becomes_a_dead_letter() {
    let relay = sending(Vec::new()).await;
    let (chain, variables) = chain_of(&relay).await;
    let _program = Program::start("worker", &variables).await;
    let words = ["XADD", STREAM, "*", "type", "tree", "data", "{\"did\":\"did:plc:a\"}", "seq", "1"];
    let _: String = redis_command(&chain.redis, &words).await;
    wait_until("a dead letter", SOON, async || chain.look().await.dead_letters == 1).await;
    assert_eq!(letters(&chain.redis).await[0]["reason"], "unknown_type");
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_with_a_future_or_invalid_revision_become_dead_letters() {
    let relay = sending(vec![
        (1, commit(1, DID, "zzzzzzzzzzzzz", &[create("app.bsky.feed.post/a", &post("no TID"))])),
        (2, commit(2, DID, "3zzzzzzzzzzzz", &[create("app.bsky.feed.post/b", &post("future"))])),
        (3, commit(3, DID, &rev(3), &[create("app.bsky.feed.post/c", &post("now"))])),
    ])
    .await;
    let (chain, variables) = chain_of(&relay).await;
    let _program = Program::start("run", &variables).await;
    cursor_is(&chain, 3).await;
    wait_until("everything to be applied", SOON, async || chain.look().await.is_drained()).await;
    assert_eq!(query_value(&chain.database, "SELECT string_agg(text, ',') FROM posts").await, "now");
    let messages: Vec<String> =
        letters(&chain.redis).await.into_iter().map(|mut letter| letter.remove("message").unwrap()).collect();
    assert!(messages[0].contains("not a TID"), "{messages:?}");
    assert!(messages[1].contains("ahead of the clock"), "{messages:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_without_a_handle_and_sync_events_are_counted_and_reported() {
    let sync = frame(
        "#sync",
        vec![
            ("did", Value::Text(DID)),
            ("rev", Value::Text("3n2samfdihk2n")),
            ("seq", Value::Signed(3)),
            ("time", Value::Text("2026-11-21T04:17:51.287Z")),
        ],
    );
    let relay = sending(vec![(1, identity(1, DID, None)), (2, identity(2, DID, None)), (3, sync)]).await;
    let (chain, variables) = chain_of(&relay).await;
    let program = Program::start("run", &variables).await;
    cursor_is(&chain, 3).await;
    program.metric_with_is("standpipe_relay_missed_total", "no_handle", 2.0).await;
    program.metric_with_is("standpipe_relay_missed_total", "sync", 1.0).await;
    let check = Standpipe::run(&["check"], &variables, SOON).await;
    assert!(check.stdout.contains("2 identity events had no handle"), "{}", check.stdout);
    assert!(check.stdout.contains("1 sync"), "{}", check.stdout);
}

// ---------------------------------------------------------------------------------------------
// Stuck

/// The reasons why it is not ready; empty if it is.
async fn reasons(program: &Program) -> String {
    let (code, body) = program.readiness().await;
    if code == 200 { String::new() } else { body }
}

/// The first of the snapshots that the page displays, as text.
async fn shown_on_the_page(program: &Program) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(program.http).await.unwrap();
    stream.write_all(b"GET /events HTTP/1.1\r\nHost: page\r\n\r\n").await.unwrap();
    let mut text = String::new();
    let whole = async {
        let mut bytes = vec![0; 16 * 1024];
        while !text.contains("\"sentence\"") || !text.ends_with("\n\n\r\n") {
            let count = stream.read(&mut bytes).await.unwrap();
            assert!(count > 0, "{text}");
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    };
    tokio::time::timeout(SOON, whole).await.expect("a snapshot");
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversized_frame_is_skipped_at_the_third_attempt_and_counted_as_a_gap() {
    let mut frames: Vec<(i64, Vec<u8>)> = (1..=10)
        .map(|seq| {
            let op = create(&format!("app.bsky.feed.post/{seq}"), &post("good"));
            (seq, commit(seq, DID, &rev(u64::try_from(seq).unwrap()), &[op]))
        })
        .collect();
    let filler = vec![0; 9 << 20];
    frames[4].1 = frame("#commit", vec![("seq", Value::Signed(5)), ("blocks", Value::Bytes(&filler))]);
    let relay = sending(frames).await;
    let (chain, variables) = chain_of(&relay).await;
    let program = Program::start("run", &variables).await;
    cursor_is(&chain, 10).await;
    wait_until("everything to be applied", SOON, async || chain.look().await.is_drained()).await;
    assert_eq!(query_value(&chain.database, "SELECT count(*) FROM posts").await, "9");
    assert_eq!(relay.connections(), 4);
    program.metric_is("standpipe_relay_gaps_total", 1.0).await;
    let gap = program.status().await["missing"]["last_gap"].clone();
    assert_eq!((gap["after"].as_i64(), gap["until"].as_i64()), (Some(4), Some(6)), "{gap}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_reconnects_without_receiving_anything_is_not_ready_and_the_page_says_why() {
    let relay = ScriptedRelay::start(|mut connection| async move {
        connection.send(&scripted::error("ConsumerTooSlow")).await;
    })
    .await;
    let (_chain, variables) = chain_of(&relay).await;
    let program = Program::start("reader", &variables).await;
    wait_for("it not to be ready", Duration::from_secs(90), async || {
        let reasons = reasons(&program).await;
        if reasons.contains("has taken nothing in for") && reasons.contains("ConsumerTooSlow") {
            Ok(())
        } else {
            Err(reasons)
        }
    })
    .await;
    assert!(relay.connections() > 3);
    // The page shows the state of the last second.
    wait_for("the page to say so", SOON, async || {
        let shown = shown_on_the_page(&program).await;
        let says = shown.contains("The reader has taken nothing in for") && shown.contains("ConsumerTooSlow");
        if says { Ok(()) } else { Err(shown) }
    })
    .await;
    let lines = program.stderr().lines().count();
    assert!(lines < 20, "{lines} lines:\n{}", program.stderr());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_cursor_is_reported_and_the_reader_waits_for_a_valid_one() {
    let relay = sending(vec![(8, account(8, DID, None))]).await;
    let (chain, variables) = chain_of(&relay).await;
    for text in ["7\n", "12345.0", "\"12345\""] {
        let _: String = redis_command(&chain.redis, &["SET", CURSOR, text]).await;
        let mut program = Program::start("reader", &variables).await;
        let line = program.wait_for_line("not a sequence number", SOON).await;
        assert!(line.contains(CURSOR), "{line}");
        assert!(reasons(&program).await.contains("not a sequence number"));
        let _: String = redis_command(&chain.redis, &["SET", CURSOR, "7"]).await;
        cursor_is(&chain, 8).await;
        program.signal(crate::support::Signal::Term);
        assert_eq!(program.wait_exit(SOON).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absurd_sequence_number_never_becomes_the_cursor() {
    let relay = sending(vec![
        (1, account(1, DID, None)),
        (2, account(i64::MAX, DID, Some("takendown"))),
        (3, account(3, DID, None)),
    ])
    .await;
    let (chain, variables) = chain_of(&relay).await;
    let program = Program::start("run", &variables).await;
    cursor_is(&chain, 3).await;
    program.metric_is("standpipe_relay_gaps_total", 1.0).await;
    wait_until("everything to be applied", SOON, async || chain.look().await.is_drained()).await;
    assert_eq!(query_value(&chain.database, "SELECT account_active FROM users").await, "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_from_the_relay_is_respected() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let answer = "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 300\r\nContent-Length: 0\r\n\r\n";
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let other = sending(Vec::new()).await;
    let (_chain, variables) = chain_of(&other).await;
    let mut program = Program::start("reader", &variables.with("RELAY_URL", format!("ws://{address}"))).await;
    let line = program.wait_for_line("asks us to back off", SOON).await;
    assert!(line.contains("429") && line.contains("wait=300s"), "{line}");
    assert_eq!(requests.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_relay_address_is_explained() {
    // A port without TLS.
    let relay = sending(Vec::new()).await;
    let (_chain, variables) = chain_of(&relay).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("wss://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 512]).await;
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let mut program = Program::start("reader", &variables.clone().with("RELAY_URL", url)).await;
    program.wait_for_line("did you mean ws://", SOON).await;
    // A Jetstream, recognised by what it sends.
    let texts = ScriptedRelay::start(|mut connection| async move {
        use futures_util::SinkExt as _;
        let text = tokio_tungstenite::tungstenite::Message::Text("{\"did\":\"did:plc:a\"}".into());
        let _ = connection.socket.send(text).await;
        connection.stay().await;
    })
    .await;
    // The first reader still holds the lease of the other cursor.
    let variables = variables.with("RELAY_URL", texts.url()).with("REDIS_CURSOR_KEY", "another");
    let mut program = Program::start("reader", &variables).await;
    program.wait_for_line("is it a Jetstream?", SOON).await;
    assert!(reasons(&program).await.contains("Jetstream"));
}

// ---------------------------------------------------------------------------------------------
// Hostile

/// The peak memory that a reader uses for these frames under the limit that the compose file sets.
async fn memory_for(frames: Vec<(i64, Vec<u8>)>) -> u64 {
    let last = frames.last().unwrap().0;
    let mut frames = frames;
    frames.push((last + 1, account(last + 1, DID, None)));
    let relay = sending(frames).await;
    let (chain, variables) = chain_of(&relay).await;
    let mut program = Program::start("reader", &variables).await;
    limit_memory(program.pid(), 512 << 20);
    cursor_is(&chain, last + 1).await;
    assert!(program.is_running(), "{}", program.output());
    peak_memory(program.pid())
}

fn limit_memory(pid: u32, bytes: u64) {
    let limit = format!("--data={bytes}");
    let done = std::process::Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status();
    assert!(done.expect("prlimit is part of util-linux").success());
}

fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_bounded_for_hostile_frames() {
    const MOST: u64 = 256 << 20;
    // Two hundred operations, and two thousand, that all name one large record.
    let text = "x".repeat(990_000);
    for count in [200, 2_000] {
        let mut ops: Vec<scripted::Op> =
            (0..count).map(|n| create(&format!("app.bsky.feed.post/{n}"), &post(&text))).collect();
        for op in &mut ops[1..] {
            op.in_archive = false;
        }
        let frame = commit(1, DID, &rev(1), &ops);
        assert!(frame.len() < 5_000_000, "{}", frame.len());
        let peak = memory_for(vec![(1, frame)]).await;
        assert!(peak < MOST, "{count} operations took {} MiB", peak >> 20);
    }
    // A DID of one megabyte.
    let did = format!("did:plc:{}", "a".repeat(1_000_000));
    let ops: Vec<scripted::Op> =
        (0..200).map(|n| create(&format!("app.bsky.feed.post/{n}"), &post("short"))).collect();
    let peak = memory_for(vec![(1, commit(1, &did, &rev(1), &ops))]).await;
    assert!(peak < MOST, "a long DID took {} MiB", peak >> 20);
    // Millions of small values, flat and nested.
    let mut flat = vec![0x9a, 0, 0x40, 0, 0];
    flat.extend(vec![0x80; 0x40_0000]);
    let nested = vec![0x81; 4_000_000];
    for values in [flat, nested] {
        let mut bytes = frame("#commit", vec![]);
        bytes.pop();
        bytes.extend([0xa1, 0x61, b'x']);
        bytes.extend(values);
        let peak = memory_for(vec![(1, bytes)]).await;
        assert!(peak < MOST, "many values took {} MiB", peak >> 20);
    }
}

/// A large commit is appended in several scripts, so that none blocks Redis for long. If a reader dies
/// between two of them, the whole commit is sent again.
#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn a_large_commit_appended_in_pieces_is_complete_after_a_crash_between_them() {
    let text = "x".repeat(70_000);
    let count = 180;
    let mut ops: Vec<scripted::Op> =
        (0..count).map(|n| create(&format!("app.bsky.feed.post/{n}"), &post(&text))).collect();
    for op in &mut ops[1..] {
        op.in_archive = false;
    }
    let relay = sending(vec![(7, account(7, DID, None)), (8, commit(8, DID, &rev(1), &ops))]).await;
    let (chain, variables) = chain_of(&relay).await;
    // The first append is that of the event before it.
    let mut program =
        Program::start("reader", &variables.clone().with("STANDPIPE_CRASH_AT", "after-append:4")).await;
    assert_ne!(program.wait_exit(SOON).await, 0, "it did not die: {}", program.output());
    let cursor: Option<String> = redis_command(&chain.redis, &["GET", CURSOR]).await;
    assert_ne!(cursor.as_deref(), Some("8"), "the cursor is behind what was not appended");
    let paths = async || -> Vec<String> {
        let entries: Vec<(String, Vec<(String, String)>)> =
            redis_command(&chain.redis, &["XRANGE", STREAM, "-", "+"]).await;
        let data = entries.into_iter().map(|(_, fields)| fields[1].1.clone());
        let data = data.map(|data| serde_json::from_str::<Json>(&data).unwrap());
        let ops = data.flat_map(|data| data["ops"].as_array().cloned().unwrap_or_default());
        ops.map(|op| op["path"].as_str().unwrap().to_owned()).collect()
    };
    let some = paths().await.len();
    assert!((1..count).contains(&some), "{some} of {count} operations are in the stream");

    let _program = Program::start("reader", &variables).await;
    cursor_is(&chain, 8).await;
    let paths = paths().await;
    assert_eq!(paths.len(), some + count);
    for n in 0..count {
        assert!(paths.contains(&format!("app.bsky.feed.post/{n}")), "{n} is missing");
    }
}

/// Frames that exaggerate what a frame may hold: operations, identifiers, nesting, repetition, and the bytes
/// themselves.
struct Fuzzer(fastrand::Rng);

impl Fuzzer {
    const LONGEST: usize = 5_000_000;

    fn times(&mut self) -> usize {
        // Below, at and beyond the limits; most often far beyond.
        if self.0.bool() {
            return 4_000_000;
        }
        *self.0.choice(&[0, 1, 20, 64, 65, 200, 201, 2_000, 20_001, 1_000_000]).unwrap()
    }

    fn text(&mut self, longest: usize) -> String {
        let unit = *self.0.choice(&["a", "\u{1}", "\"", "\\", "é", "😀", "\0", "\u{200b}"]).unwrap();
        unit.repeat(self.times().min(longest / unit.len()))
    }

    /// DAG-CBOR of something that grows when it is read or written out.
    fn value(&mut self, longest: usize) -> Vec<u8> {
        let count = self.times();
        let head = |major: u8, count: usize| {
            let mut bytes = vec![major << 5 | 0x1a];
            bytes.extend(u32::try_from(count).unwrap().to_be_bytes());
            bytes
        };
        let fill = |what: &[u8]| -> Vec<u8> { what.repeat(count.min(longest / what.len())) };
        let list = |what: &[u8]| [head(4, count.min(longest / what.len())), fill(what)].concat();
        match self.0.u8(..8) {
            // Nested lists, and nested maps.
            0 => [fill(&[0x81]), vec![0x80]].concat(),
            1 => [fill(&[0xa1, 0x60]), vec![0x80]].concat(),
            // A long list: of empty maps, of numbers, of links.
            2 => list(&[0xa0]),
            3 => list(&[0xfb, 0x3f, 0xb9, 0x99, 0x99, 0x99, 0x99, 0x99, 0x9a]),
            4 => list(&encode_value(&Value::Cid(scripted::cid(b"x"))).unwrap()),
            // Bytes become base64.
            5 => [head(2, count.min(longest)), fill(b"x")].concat(),
            // A length that announces more than follows.
            6 => head(self.0.u8(2..6), 0xffff_ffff),
            _ => encode_value(&Value::Text(&self.text(longest))).unwrap(),
        }
    }

    fn record(&mut self) -> Vec<u8> {
        let mut bytes = vec![0xa2, 0x61, b'a'];
        bytes.extend(self.value(1_040_000));
        bytes.extend(encode_value(&Value::Text("$type")).unwrap());
        bytes.extend(encode_value(&Value::Text("app.bsky.feed.post")).unwrap());
        bytes
    }

    fn frame(&mut self, seq: i64) -> Vec<u8> {
        let did = if self.0.bool() { DID.to_owned() } else { format!("did:plc:{}", self.text(2_000_000)) };
        let mut bytes = match self.0.u8(..8) {
            0 => account(seq, &did, self.0.bool().then_some(self.text(1_000_000)).as_deref()),
            1 => identity(seq, &did, Some(&self.text(2_000_000))),
            2 if self.0.bool() => info(&self.text(2_000_000)),
            2 => {
                // An unknown field.
                let mut bytes = frame("#commit", vec![]);
                bytes.pop();
                bytes.extend([0xa1, 0x61, b'x']);
                bytes.extend(self.value(Self::LONGEST));
                bytes
            }
            3 => frame(&format!("#{}", self.text(1_000_000)), vec![("seq", Value::Signed(seq))]),
            _ => {
                // All of them name one record, which is included once; or each has its own.
                let (record, same) = (Arc::new(self.record()), self.0.bool());
                let long_path = self.0.usize(..1_000);
                let mut ops = Vec::new();
                let mut size = 0;
                for number in 0..self.times() {
                    let mut op = create_bytes(&format!("app.bsky.feed.post/{number}"), Arc::clone(&record));
                    if number == long_path {
                        op.path.push_str(&self.text(500_000));
                    }
                    if !same {
                        op.record = Some(self.record().into());
                    }
                    op.in_archive = number == 0 || !same;
                    size += op.path.len()
                        + 80
                        + if op.in_archive { op.record.as_ref().unwrap().len() } else { 0 };
                    if size > Self::LONGEST {
                        break;
                    }
                    ops.push(op);
                }
                let rev = if self.0.u8(..4) == 0 { self.text(1_000_000) } else { rev(seq.unsigned_abs()) };
                commit(seq, &did, &rev, &ops)
            }
        };
        // Repeat a part of it, truncate it, or replace some bytes.
        match self.0.u8(..16) {
            0 if !bytes.is_empty() => {
                let part = self.0.usize(..bytes.len());
                let part = bytes[part..(part + self.0.usize(1..10_000)).min(bytes.len())].to_vec();
                let at = self.0.usize(..bytes.len());
                let part = part
                    .repeat(self.times().min((Self::LONGEST - bytes.len().min(Self::LONGEST)) / part.len()));
                bytes.splice(at..at, part);
            }
            1 => bytes.truncate(self.0.usize(..=bytes.len())),
            2 => {
                for _ in 0..self.0.usize(1..5) {
                    let at = self.0.usize(..bytes.len());
                    // Including the initial bytes of lists, maps and texts whose lengths take up to eight
                    // bytes.
                    bytes[at] =
                        *self.0.choice(&[0x5b, 0x7b, 0x9b, 0xbb, 0x9f, 0xbf, 0xff, 0x81, 0xd8]).unwrap();
                }
            }
            _ => {}
        }
        bytes.truncate(Self::LONGEST);
        bytes
    }
}

/// `STANDPIPE_SEED` selects the frames.
#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_bounded_for_fuzzed_frames() {
    const READERS: u64 = 8;
    let frames = if std::env::var("STANDPIPE_LONG").is_ok() { 100 } else { 6 };
    let seed = std::env::var("STANDPIPE_SEED")
        .map_or_else(|_| fastrand::u64(..1 << 32), |seed| seed.parse().unwrap());
    println!("STANDPIPE_SEED={seed}");
    // A reader spends most of its time waiting before it retries a frame, so several run at once.
    let readers = (0..READERS).map(|reader| survives_fuzzed_frames(seed + reader * 1_000_000, frames));
    let gaps: f64 = futures_util::future::join_all(readers).await.into_iter().sum();
    assert!(gaps > 0.0, "no frame was refused");
}

/// Has a reader read `count` fuzzed frames under a memory limit; returns how many it refused.
async fn survives_fuzzed_frames(seed: u64, count: i64) -> f64 {
    let relay = ScriptedRelay::start(move |mut connection| async move {
        // Generated on the fly, so that they need not all be kept.
        let passed = connection.cursor.unwrap_or(0);
        for number in 0..count {
            // A valid event precedes each, so that the position of a frame without a number is known.
            let seq = 2 * number + 1;
            if seq > passed && !connection.send(&account(seq, DID, None)).await {
                return;
            }
            if seq + 1 > passed {
                let made = move || Fuzzer(fastrand::Rng::with_seed(seed + seq.unsigned_abs())).frame(seq + 1);
                let made = tokio::task::spawn_blocking(made).await.unwrap();
                if !connection.send(&made).await {
                    return;
                }
            }
        }
        connection.send(&account(2 * count + 1, DID, None)).await;
        connection.stay().await;
    })
    .await;
    let (chain, variables) = chain_of(&relay).await;
    let mut program = Program::start("reader", &variables).await;
    limit_memory(program.pid(), 512 << 20);
    let mut last = (None, Instant::now());
    wait_for("all frames to be passed", Duration::from_hours(1), async || {
        assert!(program.is_running(), "seed {seed}, after {last:?}: {}", program.output());
        let cursor: Option<String> = redis_command(&chain.redis, &["GET", CURSOR]).await;
        let cursor = cursor.and_then(|cursor| cursor.parse::<i64>().ok());
        if cursor != last.0 {
            last = (cursor, Instant::now());
        }
        assert!(last.1.elapsed() < RUN, "seed {seed}: it stands after {cursor:?}:\n{}", program.output());
        let peak = peak_memory(program.pid());
        assert!(peak < 256 << 20, "seed {seed}: {} MiB after {cursor:?}", peak >> 20);
        if cursor == Some(2 * count + 1) { Ok(()) } else { Err(format!("{cursor:?}")) }
    })
    .await;
    let gaps = program.metric("standpipe_relay_gaps_total").await;
    println!(
        "{} MiB at most, {gaps} gaps, {} connections",
        peak_memory(program.pid()) >> 20,
        relay.connections()
    );
    gaps
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_cost_little_memory_and_few_log_lines() {
    let long = std::env::var("STANDPIPE_LONG").is_ok();
    for flood in ["ping", "info", "outdated"] {
        // One of them for longer than a lease lasts.
        let lasts = Duration::from_secs(match flood {
            _ if long => 60,
            "outdated" => 15,
            _ => 5,
        });
        let over = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&over);
        let relay = ScriptedRelay::start(move |mut connection| {
            let over = Arc::clone(&is_over);
            async move {
                use futures_util::SinkExt as _;
                use tokio_tungstenite::tungstenite::Message;
                let end = tokio::time::Instant::now() + lasts;
                connection.send(&account(5, DID, None)).await;
                let (info, outdated) = (info("Something"), info("OutdatedCursor"));
                while tokio::time::Instant::now() < end {
                    for _ in 0..200 {
                        // Nothing is read: pongs pile up.
                        let message = match flood {
                            "ping" => Message::Ping(vec![7; 125].into()),
                            "info" => Message::Binary(info.clone().into()),
                            _ => Message::Binary(outdated.clone().into()),
                        };
                        if connection.socket.feed(message).await.is_err() {
                            return;
                        }
                    }
                    if connection.socket.flush().await.is_err() {
                        return;
                    }
                    tokio::task::yield_now().await;
                }
                over.store(true, Ordering::SeqCst);
                connection.send(&account(6, DID, None)).await;
                connection.stay().await;
            }
        })
        .await;
        let (chain, variables) = chain_of(&relay).await;
        let program = Program::start("reader", &variables).await;
        cursor_is(&chain, 5).await;
        assert!(!over.load(Ordering::SeqCst), "{flood}: what came before the flood waited for its end");
        wait_until("the flood to begin", SOON, async || relay.connections() > 0).await;
        let began = tokio::time::Instant::now();
        let mut peak = 0;
        wait_until("the flood to be over", lasts * 4 + RUN, async || {
            peak = peak.max(program.rss_bytes());
            let cursor: Option<String> = redis_command(&chain.redis, &["GET", CURSOR]).await;
            cursor.as_deref() == Some("6") || (flood == "ping" && began.elapsed() > lasts * 2)
        })
        .await;
        assert!(peak < 128 << 20, "{flood}: {} MiB", peak >> 20);
        assert_eq!(relay.connections(), 1, "{flood}: the flood cost the connection:\n{}", program.stderr());
        // The progress line appears every ten seconds, whatever the relay sends.
        let lines = program.stderr().lines().filter(|line| !line.contains(" INFO progress ")).count();
        assert!(lines <= 20, "{flood}: {lines} lines:\n{}", program.stderr());
        // It is counted a moment after it is in Redis.
        let gaps = if flood == "outdated" { 1.0 } else { 0.0 };
        program.metric_is("standpipe_relay_gaps_total", gaps).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_closes_every_connection_immediately_leaves_the_reader_not_ready() {
    let relay = ScriptedRelay::start(|_| async {}).await;
    let (_chain, variables) = chain_of(&relay).await;
    let program = Program::start("reader", &variables).await;
    wait_for("it not to be ready", Duration::from_secs(90), async || {
        let reasons = reasons(&program).await;
        if reasons.contains("has taken nothing in for") { Ok(()) } else { Err(reasons) }
    })
    .await;
    assert!(relay.connections() > 5);
}
