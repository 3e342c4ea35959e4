//! Alongside the workers that preceded standpipe, in their group and on their database, and after them.
//!
//! `SIDE_BY_SIDE_EVENTS` sets how many events the two share.

use std::collections::BTreeMap;

use crate::support::chain::{CURSOR, Chain, GROUP, Program, RUN, SOON, STREAM, look, redis_command};
use crate::support::old_worker::OldWorker;
use crate::support::{
    Postgres, Redis, Signal, connect, execute, model, old_database, query_rows, traffic, wait_for, wait_until,
};
use serde_json::{Value, json};
use standpipe_lab::simulate::NetworkOptions;

/// A database as the old workers left it; its tables are where the old application puts them, whatever the
/// name of the role.
async fn old() -> String {
    let url = Postgres::shared().await.fresh_database().await + "?options=-csearch_path%3Dpublic";
    old_database::create(&url).await;
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn our_rows_stay_correct_while_another_worker_shares_the_group() {
    let events = std::env::var("SIDE_BY_SIDE_EVENTS").map_or(20_000, |text| text.parse().unwrap());
    let network = NetworkOptions { seed: 4, accounts: 1_000, events, ..NetworkOptions::default() };
    let chain = Chain::with_database(&network, None, old().await).await;
    let mut ours = Program::start("run", &chain.variables()).await;
    wait_until("the group", SOON, async || chain.look().await.group).await;
    let theirs = OldWorker::start(&chain.redis, STREAM, GROUP, &chain.database).await;
    let line = ours.wait_for_line("another program works in the consumer group", SOON).await;
    assert!(line.contains("others=true"), "{line}");
    chain.finished().await;
    let theirs = theirs.stop().await;

    // Every entry went to exactly one of them.
    let groups: Vec<BTreeMap<String, redis::Value>> =
        redis_command(&chain.redis, &["XINFO", "GROUPS", STREAM]).await;
    let redis::Value::Int(delivered) = groups[0]["entries-read"] else { panic!("{groups:?}") };
    let their_entries = i64::try_from(theirs.entries.len()).unwrap();
    wait_for("every entry to be counted", SOON, async || {
        let our_entries = ours.entries().await as i64;
        if our_entries + their_entries == delivered {
            Ok(())
        } else {
            Err(format!("{our_entries} by us and {their_entries} by the other one are not {delivered}"))
        }
    })
    .await;
    let our_entries = ours.entries().await as u64;
    println!("{our_entries} entries by us, {their_entries} by the other one");
    assert!(theirs.entries.len() as u64 > events / 50 && our_entries > events / 50, "one had it all");
    ours.signal(Signal::Term);
    assert_eq!(ours.wait_exit(SOON).await, 0);

    // Rows that only we touched are right immediately.
    let expected =
        tokio::task::spawn_blocking(move || model::expected(&traffic::events(&network))).await.unwrap();
    let found = model::read(&connect(&chain.database).await).await;
    let mut compared = 0;
    for table in
        ["posts", "likes", "reposts", "follows", "blocks", "bookmarks", "feed_items", "generic_records"]
    {
        // A post's flags depend on others' gates.
        let ours_alone = |rows: &model::Rows| -> model::Rows {
            let rows = rows.iter().filter(|(uri, _)| !theirs.touched.contains(*uri));
            let without_flags = |row: &model::Row| {
                row.iter()
                    .filter(|(name, _)| !name.contains("_gate") && !name.starts_with("violates_"))
                    .map(|(k, v)| (*k, v.clone()))
                    .collect()
            };
            rows.map(|(uri, row)| (uri.clone(), without_flags(row))).collect()
        };
        let (expected, found) = (ours_alone(expected.rows(table)), ours_alone(found.rows(table)));
        compared += expected.len();
        for uri in expected.keys().chain(found.keys()) {
            assert_eq!(expected.get(uri), found.get(uri), "{table}: {uri}");
        }
    }
    assert!(compared as u64 > events / 50, "only {compared} rows are ours alone");

    // Their counters are wrong and get repaired; so do the records they brought back to life.
    let before = chain.audit(&[]).await;
    assert_eq!(before.code, 1, "the other one made no mistake:\n{}", before.stdout);
    let repair = chain.audit(&["--repair"]).await;
    assert_eq!(repair.code, 0, "{}{}", repair.stdout, repair.stderr);
    let found = model::read(&connect(&chain.database).await).await;
    for table in ["posts", "likes", "reposts", "follows", "blocks", "feed_items"] {
        let (expected, found) = (expected.rows(table), found.rows(table));
        let missing: Vec<_> = expected.keys().filter(|uri| !found.contains_key(*uri)).collect();
        let surplus: Vec<_> = found.keys().filter(|uri| !expected.contains_key(*uri)).collect();
        assert!(
            missing.is_empty() && surplus.is_empty(),
            "{table}: missing {missing:?}, surplus {surplus:?}"
        );
    }
    // The other worker keeps no quotes, and no counters of posts it has not seen; the remaining counters
    // match the rows.
    for (post, row) in expected.rows("post_aggregations") {
        let Some(found) = found.rows("post_aggregations").get(post) else { continue };
        for column in ["like_count", "repost_count", "reply_count"] {
            assert_eq!(found[column], row[column], "{column} of {post}");
        }
    }
    println!(
        "{compared} rows were ours alone; after the repair all records and counters are as they have to be"
    );
}

fn commit(rev: u32, op: &Value) -> String {
    // Each digit becomes a letter: not all digits are allowed in a TID.
    let rev: String = format!("{rev:02}").bytes().map(|digit| char::from(digit - b'0' + b'a')).collect();
    json!({"repo": "did:plc:a", "rev": format!("3n2samfdihk{rev}"), "ops": [op]}).to_string()
}

fn put(action: &str, rkey: &str, text: &str) -> Value {
    json!({"action": action, "path": format!("app.bsky.feed.post/{rkey}"), "cid": "bafy",
           "record": {"$type": "app.bsky.feed.post", "text": text, "createdAt": "2026-11-21T04:17:51.287Z"}})
}

fn delete(rkey: &str) -> Value {
    json!({"action": "delete", "path": format!("app.bsky.feed.post/{rkey}")})
}

/// The other program died with entries in hand, after it had handled later ones about the same records.
#[tokio::test(flavor = "multi_thread")]
async fn entries_left_pending_by_an_old_worker_do_not_overwrite_newer_ones() {
    let (redis, database) = (Redis::start().await, old().await);
    let add = async |data: &str, seq: u32| -> String {
        redis_command(&redis, &["XADD", STREAM, "*", "type", "commit", "data", data, "seq", &seq.to_string()])
            .await
    };
    let mut ids = Vec::new();
    for (seq, op) in [
        put("create", "deleted", "it was deleted later"),
        put("create", "changed", "before"),
        put("create", "again", "the first"),
        delete("deleted"),
        put("update", "changed", "after"),
        delete("again"),
        put("create", "again", "the second"),
    ]
    .iter()
    .enumerate()
    {
        let seq = u32::try_from(seq).unwrap() + 10;
        ids.push(add(&commit(seq, op), seq).await);
    }
    let _: String = redis_command(&redis, &["XGROUP", "CREATE", STREAM, GROUP, "0"]).await;
    let _: redis::Value = redis_command(
        &redis,
        &["XREADGROUP", "GROUP", GROUP, "worker-0", "COUNT", "100", "STREAMS", STREAM, ">"],
    )
    .await;
    for id in &ids[3..] {
        assert_eq!(redis_command::<u64>(&redis, &["XACK", STREAM, GROUP, id]).await, 1);
    }
    // What it wrote: the update and the second create.
    execute(
        &database,
        "INSERT INTO posts (uri, cid, author_did, text, created_at) VALUES
             ('at://did:plc:a/app.bsky.feed.post/changed', 'bafy', 'did:plc:a', 'after', now()),
             ('at://did:plc:a/app.bsky.feed.post/again', 'bafy', 'did:plc:a', 'the second', now())",
    )
    .await;

    let variables = crate::support::chain::Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("CLAIM_IDLE", "10s");
    let mut worker = Program::start("worker", &variables).await;
    worker.wait_for_line("replayed entries that another program left pending", SOON).await;
    wait_until("it to be claimed and acknowledged", SOON, async || look(&redis).await.unwrap().is_drained())
        .await;
    let texts = query_rows(&database, "SELECT uri, text FROM posts ORDER BY uri").await;
    let texts: Vec<_> = texts.iter().flatten().map(|text| text.as_deref().unwrap()).collect();
    assert_eq!(
        texts,
        [
            "at://did:plc:a/app.bsky.feed.post/again",
            "the second",
            "at://did:plc:a/app.bsky.feed.post/changed",
            "after"
        ]
    );
    let dead = query_rows(&database, "SELECT uri FROM standpipe.tombstones ORDER BY uri").await;
    assert_eq!(dead.len(), 2, "{dead:?}");
    assert!(worker.is_running());
}

/// `cluster:metrics` and `firehose:status`, as the old application's pages read them.
#[tokio::test(flavor = "multi_thread")]
async fn the_old_applications_pages_find_the_keys_they_read() {
    let network = NetworkOptions { seed: 4, accounts: 100, events: 1_000, ..NetworkOptions::default() };
    let chain = Chain::with_database(&network, None, old().await).await;
    let _: u64 = redis_command(
        &chain.redis,
        &["HSET", "cluster:metrics", "#commit", "1000000", "totalEvents", "1000000"],
    )
    .await;
    let mut program = Program::start("run", &chain.variables()).await;
    chain.finished().await;
    wait_for("firehose:status", SOON, async || {
        let status: Option<String> = redis_command(&chain.redis, &["GET", "firehose:status"]).await;
        let status: Value = serde_json::from_str(&status.unwrap_or_default()).unwrap_or_default();
        let cursor: String = redis_command(&chain.redis, &["GET", CURSOR]).await;
        if status["connected"] == true
            && status["currentCursor"] == cursor.as_str()
            && status["url"].as_str().is_some_and(|url| url.starts_with(&chain.relay.url()))
        {
            Ok(())
        } else {
            Err(format!("{status}, the cursor is {cursor}, the relay {}", chain.relay.url()))
        }
    })
    .await;
    let life: i64 = redis_command(&chain.redis, &["TTL", "firehose:status"]).await;
    assert!((1..=10).contains(&life), "{life} s");
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);
    let counts: BTreeMap<String, i64> = redis_command(&chain.redis, &["HGETALL", "cluster:metrics"]).await;
    let delivered: Vec<BTreeMap<String, redis::Value>> =
        redis_command(&chain.redis, &["XINFO", "GROUPS", STREAM]).await;
    let redis::Value::Int(delivered) = delivered[0]["entries-read"] else { panic!("{delivered:?}") };
    assert_eq!(counts["totalEvents"] - 1_000_000, delivered, "{counts:?}");
    assert!(counts["#commit"] > 1_000_000 && counts["#identity"] > 0 && counts["#account"] > 0, "{counts:?}");
    assert!(
        counts["#commit"] - 1_000_000 + counts["#identity"] + counts["#account"] <= delivered,
        "{counts:?}"
    );
}

/// A database of our own, where nobody reads those keys.
#[tokio::test(flavor = "multi_thread")]
async fn legacy_status_keys_are_written_only_where_wanted() {
    let network = NetworkOptions { seed: 4, accounts: 100, events: 200, ..NetworkOptions::default() };
    let chain = Chain::start(&network, None).await;
    for (wanted, there) in [("auto", 0_u64), ("true", 2)] {
        let mut program = Program::start("run", &chain.variables().with("LEGACY_STATUS", wanted)).await;
        chain.finished().await;
        redis_command::<redis::Value>(
            &chain.redis,
            &["XADD", STREAM, "*", "type", "sync", "data", "{}", "seq", ""],
        )
        .await;
        program.finishes_more(0.0).await;
        wait_until("it to be acknowledged", RUN, async || chain.look().await.is_drained()).await;
        program.signal(Signal::Term);
        assert_eq!(program.wait_exit(SOON).await, 0);
        let found: u64 = redis_command(&chain.redis, &["EXISTS", "cluster:metrics", "firehose:status"]).await;
        assert_eq!(found, there, "LEGACY_STATUS={wanted}");
    }
}
