//! `POST /events` and `standpipe emit`: what is accepted is in the tables, once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use standpipe::crash::Point;
use standpipe_lab::servers::{RedisOptions, send_signal};

use crate::support::chain::{Chain, Program, RUN, SOON, STREAM, network, redis_command};
use crate::support::house::{House, TOKEN, at_once, is_ready};
use crate::support::scripted::{self, Op};
use crate::support::signed::Signed;
use crate::support::{
    Redis, Signal, Standpipe, connect, execute, http_post, query_rows, query_value, wait_for, wait_until,
};

/// The long version of a test takes minutes; it runs with `make long`.
fn is_long() -> bool {
    std::env::var_os("STANDPIPE_LONG").is_some()
}

fn did(number: u64) -> String {
    let letters = |number: u64| char::from(b'a' + u8::try_from(number % 26).unwrap());
    format!("did:plc:{}{}{}", "a".repeat(22), letters(number / 26), letters(number))
}

fn op(did: &str, action: &str, path: &str, record: &Value) -> String {
    let op = if record.is_null() {
        json!({"action": action, "path": path})
    } else {
        json!({"action": action, "path": path, "record": record})
    };
    json!({"type": "commit", "data": {"repo": did, "ops": [op]}}).to_string()
}

fn post(number: u64, rkey: &str, text: &str) -> String {
    let record =
        json!({"$type": "app.bsky.feed.post", "text": text, "createdAt": "2026-11-21T04:17:51.287Z"});
    op(&did(number), "create", &format!("app.bsky.feed.post/{rkey}"), &record)
}

fn follow(number: u64, rkey: &str) -> String {
    let subject = did(number + 1);
    let record = json!({"$type": "app.bsky.graph.follow", "subject": subject, "createdAt": "2026-11-21T04:17:51.287Z"});
    op(&did(number), "create", &format!("app.bsky.graph.follow/{rkey}"), &record)
}

/// Eight clients send requests until each is accepted, while the process is killed again and again.
#[tokio::test(flavor = "multi_thread")]
async fn every_accepted_request_is_in_the_tables_once() {
    let (requests, kills) = if is_long() { (1_000, 20) } else { (240, 6) };
    let house = Arc::new(House::start(at_once()).await);
    let mut program = house.worker().await;
    let accepted = Arc::new(AtomicU64::new(0));
    let next = Arc::new(AtomicU64::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (house, accepted, next) = (Arc::clone(&house), Arc::clone(&accepted), Arc::clone(&next));
        clients.spawn(async move {
            let mut sent_again = 0;
            loop {
                let number = next.fetch_add(1, Ordering::SeqCst);
                if number >= requests {
                    return sent_again;
                }
                let body = format!(
                    "{}\n{}\n",
                    post(number, &format!("p{number}"), "hello"),
                    follow(number, &format!("f{number}"))
                );
                let key = format!("request-{number}");
                let ids = loop {
                    match house.post("/events", Some(&key), &body).await {
                        Ok((202, answer)) => break answer["ids"].clone(),
                        Ok((503, _)) | Err(_) => sent_again += 1,
                        Ok(other) => panic!("{other:?}"),
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                };
                accepted.fetch_add(1, Ordering::SeqCst);
                if number % 2 == 0 {
                    // It does no harm to ask again.
                    if let Ok((202, answer)) = house.post("/events", Some(&key), &body).await {
                        assert_eq!((&answer["ids"], &answer["repeated"]), (&ids, &json!(true)));
                    }
                }
            }
        });
    }
    for kill in 1..=kills {
        let goal = requests * kill / (kills + 1);
        wait_until("some requests to be accepted", RUN, async || accepted.load(Ordering::SeqCst) >= goal)
            .await;
        program.signal(Signal::Kill);
        assert_eq!(program.wait_exit(SOON).await, 128 + 9);
        program = Program::start("worker", &house.variables()).await;
    }
    let mut sent_again = 0;
    while let Some(ended) = clients.join_next().await {
        sent_again += ended.unwrap();
    }
    assert!(sent_again >= kills, "only {sent_again} requests failed");
    println!("{requests} requests accepted; {sent_again} times one was sent again");
    assert_eq!(house.length().await, 2 * requests, "entries in the stream");
    wait_for("everything to be applied", RUN, async || {
        let count = query_value(
            &house.database,
            "SELECT (SELECT count(*) FROM posts) + (SELECT count(*) FROM follows)",
        )
        .await;
        if count == (2 * requests).to_string() { Ok(()) } else { Err(count) }
    })
    .await;
    let audit = Standpipe::run(&["audit"], &house.variables(), RUN).await;
    assert_eq!(audit.code, 0, "{}", audit.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_refused_appends_nothing() {
    let house = House::start(at_once()).await;
    let mut program = house.worker().await;
    let good = post(1, "a", "hello");
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    let six = format!("{good}\n").repeat(6);
    let huge = vec![b'x'; 9 << 20];
    let broken = format!("{six}{{broken\n{good}\n");
    let doubtful = format!("{good}\n{}", op(&did(1), "create", "app.bsky.feed.like/a", &json!({})));
    for (headers, path, body, code, says) in [
        (String::new(), "/events", good.as_bytes(), 401, "a token is required"),
        (
            bearer("another-token-of-some-length"),
            "/events",
            good.as_bytes(),
            401,
            "does not match INGEST_TOKEN",
        ),
        (bearer(TOKEN), "/events", &huge[..], 413, "8 MiB"),
        (bearer(TOKEN), "/events", broken.as_bytes(), 400, "line 7: this is not JSON"),
        (bearer(TOKEN), "/events", doubtful.as_bytes(), 400, "line 2: "),
        (bearer(TOKEN), "/events", b"", 400, "contains no event"),
        (bearer(TOKEN), "/events?wait=forever", good.as_bytes(), 400, "wait=applied"),
        (
            format!("{}Idempotency-Key: {}\r\n", bearer(TOKEN), "k".repeat(256)),
            "/events",
            good.as_bytes(),
            400,
            "255",
        ),
    ] {
        let (status, text) = http_post(house.http, path, &headers, body).await.unwrap();
        assert_eq!(status, code, "{text}");
        assert!(text.contains(says), "{says}: {text}");
    }
    let answer: Value = serde_json::from_str(
        &http_post(house.http, "/events", &bearer(TOKEN), broken.as_bytes()).await.unwrap().1,
    )
    .unwrap();
    assert_eq!(answer["line"], 7);
    assert_eq!(house.length().await, 0);

    // The same name for something else.
    assert_eq!(house.post("/events", Some("one"), &good).await.unwrap().0, 202);
    let (code, answer) = house.post("/events", Some("one"), &post(1, "b", "other")).await.unwrap();
    assert_eq!(code, 422, "{answer}");
    assert_eq!(house.length().await, 1);
    program.metric_with_is("standpipe_ingest_requests_total", "\"unauthorized\"", 2.0).await;

    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);
    let _program = Program::start("worker", &house.variables().with("INGEST_TOKEN", "")).await;
    let (code, answer) = house.post("/events", None, &good).await.unwrap();
    assert_eq!(code, 403, "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("INGEST_TOKEN"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_can_wait_until_its_events_are_applied() {
    let house = House::start(at_once()).await;
    let _program = house.worker().await;
    for number in 0..20 {
        let rkey = format!("p{number}");
        let (code, answer) =
            house.post("/events?wait=applied", None, &post(number, &rkey, "hello")).await.unwrap();
        assert_eq!(
            (code, &answer["applied"], &answer["durable"]),
            (202, &json!(true), &json!(true)),
            "{answer}"
        );
        let uri = format!("at://{}/app.bsky.feed.post/{rkey}", did(number));
        let found = query_rows(&house.database, &format!("SELECT cid FROM posts WHERE uri = '{uri}'")).await;
        assert!(found[0][0].as_ref().unwrap().starts_with("bafyrei"), "{found:?}");
    }
    // A later revision is minted for each request, so that the last one wins.
    let path = "app.bsky.feed.post/p0";
    let gone = op(&did(0), "delete", path, &Value::Null);
    assert_eq!(house.post("/events?wait=applied", None, &gone).await.unwrap().0, 202);
    let count = format!("SELECT count(*) FROM posts WHERE uri = 'at://{}/{path}'", did(0));
    assert_eq!(query_value(&house.database, &count).await, "0");

    // What the database refuses is told.
    execute(
        &house.database,
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '22000'; END $$;
         CREATE TRIGGER no BEFORE INSERT ON posts FOR EACH ROW WHEN (NEW.text = 'bad') EXECUTE FUNCTION no()",
    )
    .await;
    let both = format!("{}\n{}", post(1, "good", "good"), post(1, "bad", "bad"));
    let (code, answer) = house.post("/events?wait=applied", None, &both).await.unwrap();
    assert_eq!((code, &answer["applied"]), (202, &json!(true)), "{answer}");
    let letters = json!([{"id": answer["ids"][1], "paths": ["app.bsky.feed.post/bad"]}]);
    assert_eq!(answer["dead_letters"], letters);
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn a_process_that_dies_before_it_answers_has_appended_once() {
    let house = House::start(at_once()).await;
    house.worker().await.signal(Signal::Kill);
    let variables = house.variables().with("STANDPIPE_CRASH_AT", Point::AfterIngest.name());
    let mut program = Program::start("worker", &variables).await;
    let body = post(1, "a", "hello");
    assert!(house.post("/events", Some("one"), &body).await.is_err());
    assert_ne!(program.wait_exit(SOON).await, 0);
    assert!(program.output().contains("crash point after-ingest reached"));
    let _program = Program::start("worker", &house.variables()).await;
    let (code, answer) = house.post("/events", Some("one"), &body).await.unwrap();
    assert_eq!((code, &answer["repeated"]), (202, &json!(true)), "{answer}");
    assert_eq!(house.length().await, 1);
}

/// Redis dies between the append and its flush, and loses the entry.
#[tokio::test(flavor = "multi_thread")]
async fn what_redis_loses_was_not_accepted() {
    let mut house = House::start(RedisOptions::default()).await;
    // A newer Redis says what is on its disk, unless nobody may ask. An older one does not know the command.
    let user = redis::cmd("ACL").arg(&["SETUSER", "default", "-waitaof"]).to_owned();
    let _ = user.query_async::<()>(&mut house.redis.connection().await).await;
    let _program = house.worker().await;
    let body = post(1, "a", "hello");
    let (http, sent) = (house.http, body.clone());
    let request = tokio::spawn(async move {
        let headers = format!("Authorization: Bearer {TOKEN}\r\nIdempotency-Key: one\r\n");
        http_post(http, "/events", &headers, sent.as_bytes()).await.unwrap()
    });
    wait_until("the entry to be in the stream", SOON, async || house.length().await == 1).await;
    let before: Vec<std::path::PathBuf> = house.redis.aof_paths().unwrap();
    assert!(!before.is_empty());
    house.redis.sigkill().await.unwrap();
    assert!(house.redis.truncate_aof_tail(400).unwrap() > 0);
    house.redis.start_again().await.unwrap();
    let (code, text) = request.await.unwrap();
    assert_eq!(code, 503, "{text}");
    assert!(text.contains("Idempotency-Key"), "{text}");
    let accepted =
        wait_for("it to be accepted", SOON, async || match house.post("/events", Some("one"), &body).await {
            Ok((202, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        });
    accepted.await;
    wait_until("the post to be there", RUN, async || {
        query_value(&house.database, "SELECT count(*) FROM posts").await == "1"
    })
    .await;
}

/// A replica that does not answer holds the answer back, and one that does not exist holds back nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_has_what_was_accepted() {
    let house = House::start(at_once()).await;
    let replica = Redis::start_with(RedisOptions {
        extra: vec![format!("replicaof 127.0.0.1 {}", house.redis.port())],
        ..RedisOptions::default()
    })
    .await;
    let _program = house.worker().await;
    wait_until("the replica to be connected", RUN, async || {
        redis_command::<String>(&house.redis, &["INFO", "replication"]).await.contains("state=online")
    })
    .await;
    let (code, answer) = house.post("/events", None, &post(1, "a", "hello")).await.unwrap();
    assert_eq!(code, 202, "{answer}");
    let copied: u64 = redis_command(&replica, &["XLEN", STREAM]).await;
    assert_eq!(copied, 1);

    send_signal(Signal::Stop, &[replica.pid().unwrap()]).unwrap();
    let (code, answer) = house.post("/events", Some("one"), &post(1, "b", "hello")).await.unwrap();
    assert_eq!(code, 503, "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("a replica"), "{answer}");
    send_signal(Signal::Continue, &[replica.pid().unwrap()]).unwrap();
    let (code, answer) = house.post("/events", Some("one"), &post(1, "b", "hello")).await.unwrap();
    assert_eq!((code, &answer["repeated"]), (202, &json!(true)), "{answer}");
}

/// Their records are not in their repositories, if they have any.
#[tokio::test(flavor = "multi_thread")]
async fn accounts_that_others_feed_are_not_repaired() {
    let house = House::start(at_once()).await;
    let _program = house.worker().await;
    assert_eq!(house.post("/events?wait=applied", None, &post(1, "a", "hello")).await.unwrap().0, 202);
    let added = Standpipe::run(&["repos", "add", &did(1)], &house.variables(), SOON).await;
    assert_eq!(added.code, 0, "{}", added.stderr);
    wait_for("the repair to end", RUN, async || {
        let rows = query_rows(&house.database, "SELECT state, message FROM standpipe.repos").await;
        let text = format!("{rows:?}");
        if text.contains("gone") && text.contains("POST /events") { Ok(()) } else { Err(text) }
    })
    .await;
    assert_eq!(query_value(&house.database, "SELECT count(*) FROM posts").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn a_file_is_emitted_although_the_process_dies() {
    let house = House::start(at_once()).await;
    house.worker().await.signal(Signal::Kill);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events.jsonl");
    let lines: Vec<String> = (0..2_500).map(|n| post(n % 600, &format!("p{n}"), "hello")).collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    let name = file.to_str().unwrap();
    // The process dies after the first request is appended, and is not there for the second.
    let variables = house.variables().with("STANDPIPE_CRASH_AT", Point::AfterIngest.name());
    let mut dying = Program::start("worker", &variables).await;
    let emit = Standpipe::start(&["emit", "--wait", name], &house.variables());
    assert_ne!(dying.wait_exit(SOON).await, 0);
    let _program = Program::start("worker", &house.variables()).await;
    let mut emit = emit;
    assert_eq!(emit.wait_exit(RUN).await, 0, "{}", emit.output());
    assert!(emit.stdout().contains("2,500 events applied, in 3 requests"), "{}", emit.output());
    assert_eq!(query_value(&house.database, "SELECT count(*) FROM posts").await, "2500");
    assert_eq!(house.length().await, 2_500);

    let mut wrong = lines.clone();
    wrong[1_502] = "{}".to_owned();
    std::fs::write(&file, wrong.join("\n")).unwrap();
    let emit = Standpipe::run(&["emit", name], &house.variables(), SOON).await;
    assert_eq!(emit.code, 1);
    assert!(emit.stderr.contains("line 1503: an event has"), "{}", emit.stderr);
    assert!(emit.stderr.contains("1,000 events were accepted"), "{}", emit.stderr);
    let emit = Standpipe::run(&["emit", name], &house.variables().with("INGEST_TOKEN", ""), SOON).await;
    assert_eq!(emit.code, 64, "{}", emit.stderr);
    let other = house.variables().with("INGEST_TOKEN", "another-token-of-some-length");
    let emit = Standpipe::run(&["emit", name], &other, SOON).await;
    assert_eq!(emit.code, 64, "{}", emit.stderr);
}

/// The texts of docs/tutorial.md that begin after a line with `start` and end before EOF.
fn heredocs(start: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = include_str!("../../docs/tutorial.md").lines().map(str::trim);
    while let Some(line) = lines.next() {
        if line.starts_with(start) && line.contains("<<") {
            found.push(lines.by_ref().take_while(|line| *line != "EOF").collect::<Vec<_>>().join("\n"));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tutorial_does_what_it_says() {
    let house = House::start(at_once()).await;
    let _program = house.worker().await;
    let requests = heredocs("send");
    assert_eq!(requests.len(), 4);
    let timeline = &heredocs("psql")[0];
    let likes = async || {
        let rows = query_rows(&house.database, timeline).await;
        rows.into_iter()
            .map(|row| row.into_iter().map(Option::unwrap).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    for (number, request) in requests.iter().enumerate() {
        let mut body = request.replace("\\$type", "$type");
        if body.contains("$CID") {
            let of = "SELECT cid FROM posts WHERE uri = 'at://did:web:alice.example/app.bsky.feed.post/1'";
            body = body.replace("$CID", &query_value(&house.database, of).await);
        }
        let (code, answer) = house.post("/events?wait=applied", None, &body).await.unwrap();
        assert_eq!((code, &answer["applied"]), (202, &json!(true)), "{answer}");
        assert_eq!(answer["dead_letters"], Value::Null, "{answer}");
        match number {
            2 => assert_eq!(likes().await, [["alice.example", "Hello!", "1"]]),
            3 => assert_eq!(likes().await, [["alice.example", "Hello!", "0"]]),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_records_of_an_archive_are_emitted() {
    let house = House::start(at_once()).await;
    let _program = house.worker().await;
    let mut account = Signed::new(1);
    let ops: Vec<Op> = (0..450)
        .map(|n| scripted::create(&format!("app.bsky.feed.post/p{n}"), &scripted::post("hello")))
        .collect();
    for (number, ops) in ops.chunks(150).enumerate() {
        account.commit(1, &scripted::rev(number as u64 + 1), ops);
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("repo.car");
    let archive = account.repository();
    std::fs::write(&file, &archive).unwrap();
    let name = file.to_str().unwrap();
    let emit = Standpipe::run(&["emit", "--car", "--wait", name], &house.variables(), RUN).await;
    assert_eq!(emit.code, 0, "{}", emit.stderr);
    assert!(emit.stderr.contains(&format!("{}: 450 records", account.did)), "{}", emit.stderr);
    assert!(emit.stdout.contains("3 events applied"), "{}", emit.stdout);
    assert_eq!(query_value(&house.database, "SELECT count(*) FROM posts").await, "450");

    std::fs::write(&file, &archive[..archive.len() / 2]).unwrap();
    let emit = Standpipe::run(&["emit", "--car", name], &house.variables(), RUN).await;
    assert_eq!(emit.code, 1, "{}", emit.stdout);
    assert!(emit.stderr.contains("repo.car: the archive is unreadable"), "{}", emit.stderr);
}

/// The relay goes on beside it: the reader's position is the relay's alone.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_does_not_move_the_relays_position() {
    let chain = Chain::start(&network(2_000), None).await;
    let variables = chain.variables().with("INGEST_TOKEN", TOKEN);
    let mut program = Program::start("run", &variables).await;
    is_ready(&program).await;
    let headers = format!("Authorization: Bearer {TOKEN}\r\n");
    for number in 0..6 {
        let body = post(number, &format!("p{number}"), "hello");
        let sent = http_post(program.http, "/events", &headers, body.as_bytes()).await.unwrap();
        assert_eq!(sent.0, 202, "{}", sent.1);
        if number == 3 {
            program.signal(Signal::Kill);
            assert_eq!(program.wait_exit(SOON).await, 128 + 9);
            program = Program::start("run", &variables).await;
            is_ready(&program).await;
        }
    }
    chain.finished().await;
    let ours = format!("SELECT count(*) FROM posts WHERE author_did LIKE 'did:plc:{}%'", "a".repeat(22));
    assert_eq!(query_value(&chain.database, &ours).await, "6");
    // The janitor keeps the position of the first entry that is not applied; this one has none.
    let lock = connect(&chain.database).await;
    lock.batch_execute("BEGIN; LOCK TABLE posts IN EXCLUSIVE MODE").await.unwrap();
    let sent =
        http_post(program.http, "/events", &headers, post(7, "late", "hello").as_bytes()).await.unwrap();
    let id = serde_json::from_str::<Value>(&sent.1).unwrap()["ids"][0].as_str().unwrap().to_owned();
    wait_for("the janitor to see it", SOON, async || {
        let first: Option<String> =
            redis_command(&chain.redis, &["HGET", "firehose:cursor:watch", "unacked"]).await;
        if first.as_ref() == Some(&id) { Ok(()) } else { Err(format!("{first:?}, not {id}")) }
    })
    .await;
    let acked: Option<i64> = redis_command(&chain.redis, &["GET", "firehose:cursor:acked"]).await;
    assert!(acked.is_some_and(|acked| acked <= chain.relay.last_seq), "{acked:?}");
    lock.batch_execute("ROLLBACK").await.unwrap();
    chain.finished().await;
    let audit = chain.audit(&[]).await;
    assert_eq!(audit.code, 0, "{}", audit.stdout);
}
