//! What deleting an account removes, and what it leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::chain::{Chain, Program, RUN, SOON, STREAM, network, purged, redis_command};
use crate::support::{Postgres, connect, execute, query_rows, query_value, wait_until};
use serde_json::{Value, json};
use standpipe::config::{Role, from_env};
use standpipe::store::{Store, migrate};
use standpipe_lab::simulate::NetworkOptions;

const DID: &str = "did:plc:big";

async fn add(chain: &Chain, kind: &str, data: &Value, seq: u64) {
    let data = data.to_string();
    let words = ["XADD", STREAM, "*", "type", kind, "data", &data, "seq", &seq.to_string()];
    let _: String = redis_command(&chain.redis, &words).await;
}

fn commit(seq: u64, ops: &[Value]) -> Value {
    // Revisions in the order of the numbers: each digit becomes a letter.
    let digits = format!("{seq:011}");
    let letters: String = digits.bytes().map(|digit| char::from(digit - b'0' + b'a')).collect();
    json!({"repo": DID, "rev": format!("3l{letters}"), "ops": ops})
}

fn create(collection: &str, rkey: &str, record: &Value) -> Value {
    json!({"action": "create", "path": format!("{collection}/{rkey}"), "cid": "bafy", "record": record})
}

fn post(text: &str) -> Value {
    json!({"$type": "app.bsky.feed.post", "text": text, "createdAt": "2026-11-21T04:17:51.287Z"})
}

fn deleted(time: &str) -> Value {
    json!({"did": DID, "active": false, "status": "deleted", "time": time})
}

/// The rows that belong to the account, counted by table.
async fn rows_of_the_account(chain: &Chain) -> Vec<(String, i64)> {
    let mut found = Vec::new();
    for (table, owner) in [
        ("posts", "author_did"),
        ("likes", "user_did"),
        ("reposts", "user_did"),
        ("follows", "follower_did"),
        ("blocks", "blocker_did"),
        ("bookmarks", "user_did"),
        ("lists", "creator_did"),
        ("list_items", "split_part(uri, '/', 3)"),
        ("list_blocks", "blocker_did"),
        ("feed_generators", "creator_did"),
        ("starter_packs", "creator_did"),
        ("labeler_services", "creator_did"),
        ("labels", "src"),
        ("verifications", "split_part(uri, '/', 3)"),
        ("post_gates", "split_part(post_uri, '/', 3)"),
        ("thread_gates", "owner_did"),
        ("generic_records", "author_did"),
        ("feed_items", "originator_did"),
        ("notifications", "author_did"),
        ("quotes", "split_part(uri, '/', 3)"),
    ] {
        let sql = format!("SELECT count(*) FROM {table} WHERE {owner} = '{DID}'");
        let count: i64 = query_value(&chain.database, &sql).await.parse().unwrap();
        if count > 0 {
            found.push((table.to_owned(), count));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_with_fifty_thousand_records_is_purged_while_events_flow() {
    // Half of all traffic is about a few posts, so others also like, quote and answer what this account
    // wrote.
    let traffic = NetworkOptions { seed: 9, accounts: 500, events: 40_000, ..NetworkOptions::default() };
    let chain = Chain::start(&traffic, Some(1_000)).await;
    let mut program = Program::start("run", &chain.variables()).await;
    program.finishes_more(2_000.0).await;
    let posts = query_rows(&chain.database, "SELECT uri FROM posts LIMIT 500").await;
    let posts: Vec<String> = posts.into_iter().map(|mut row| row.remove(0).unwrap()).collect();
    let others = query_rows(&chain.database, "SELECT did FROM users LIMIT 300").await;
    let others: Vec<String> = others.into_iter().map(|mut row| row.remove(0).unwrap()).collect();

    // 50,000 records in commits of 200.
    let mut seq = 10_000_000;
    let mut records = 0;
    for chunk in 0..250_usize {
        let mut ops = Vec::new();
        for n in chunk * 200..(chunk + 1) * 200 {
            let target = &posts[n * 7 % posts.len()];
            let subject = json!({"uri": target, "cid": "bafy"});
            let rkey = format!("r{n}");
            ops.push(match n % 5 {
                0 | 1 => create("app.bsky.feed.like", &rkey, &json!({"subject": subject})),
                2 => create("app.bsky.feed.repost", &rkey, &json!({"subject": subject})),
                3 if n % 2 == 0 => {
                    let mut post = post("an answer");
                    post["reply"] = json!({"root": subject, "parent": subject});
                    create("app.bsky.feed.post", &rkey, &post)
                }
                3 => {
                    let mut post = post("a quote");
                    post["embed"] = json!({"$type": "app.bsky.embed.record", "record": subject});
                    create("app.bsky.feed.post", &rkey, &post)
                }
                _ => create("app.bsky.graph.follow", &rkey, &json!({"subject": others[n % others.len()]})),
            });
        }
        records += ops.len();
        seq += 1;
        add(&chain, "commit", &commit(seq, &ops), seq).await;
    }
    wait_until("all of it to be there", RUN, async || {
        let sql = format!(
            "SELECT (SELECT count(*) FROM likes WHERE user_did = '{DID}') + (SELECT count(*) FROM reposts WHERE user_did = '{DID}')
                  + (SELECT count(*) FROM posts WHERE author_did = '{DID}') + (SELECT count(*) FROM follows WHERE follower_did = '{DID}')"
        );
        query_value(&chain.database, &sql).await == records.to_string()
    })
    .await;

    // Watch how long transactions take. A batch's CALL is left out: PostgreSQL reports the start of the call
    // as the start of each of its transactions.
    let watching = Arc::new(AtomicBool::new(true));
    let watcher = tokio::spawn({
        let (watching, url) = (Arc::clone(&watching), chain.database.clone());
        async move {
            let client = connect(&url).await;
            let mut longest = 0.0_f64;
            while watching.load(Ordering::Relaxed) {
                let sql = "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8
                           FROM pg_stat_activity WHERE application_name = 'standpipe' AND datname = current_database()
                             AND query NOT LIKE 'CALL standpipe.apply_each%'";
                longest = longest.max(client.query_one(sql, &[]).await.unwrap().get(0));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            longest
        }
    });
    let (memory, before, began) = (program.rss_bytes(), program.entries().await, Instant::now());
    seq += 1;
    add(&chain, "account", &deleted("2026-11-22T00:00:00Z"), seq).await;
    wait_until("the deletion to be noticed", SOON, async || {
        query_value(&chain.database, "SELECT count(*) FROM standpipe.accounts WHERE deleted_seq IS NOT NULL")
            .await
            == "1"
    })
    .await;
    // A late post that is older than the deletion stays deleted; a newer one lives.
    add(&chain, "commit", &commit(seq - 1, &[create("app.bsky.feed.post", "late", &post("late"))]), seq - 1)
        .await;
    add(&chain, "commit", &commit(seq + 1, &[create("app.bsky.feed.post", "new", &post("new"))]), seq + 1)
        .await;
    purged(&chain.database).await;
    let took = began.elapsed();
    let flowed = program.entries().await - before;
    watching.store(false, Ordering::Relaxed);
    let longest = watcher.await.unwrap();
    println!(
        "{records} records went in {took:?}, the longest transaction took {longest:.3} s, {flowed} events flowed meanwhile"
    );
    assert!(flowed > 100.0, "only {flowed} events flowed meanwhile");
    // A fraction of the whole rather than an absolute time: the machine may be slow.
    assert!(longest < took.as_secs_f64() / 10.0, "a transaction took {longest} s of {took:?}");
    let grown = program.rss_bytes().saturating_sub(memory);
    assert!(grown < 8 << 20, "memory grew by {grown} bytes");

    chain.finished().await;
    assert_eq!(rows_of_the_account(&chain).await, [("posts".to_owned(), 1), ("feed_items".to_owned(), 1)]);
    let user =
        query_rows(&chain.database, &format!("SELECT account_status FROM users WHERE did = '{DID}'")).await;
    assert_eq!(user, [[Some("deleted".to_owned())]]);
    let audit = chain.audit(&[]).await;
    assert_eq!(audit.code, 0, "{}", audit.stdout);
    assert!(program.is_running());
}

/// One record of every kind; the deletion arrives before it, after it, and after a newer version.
#[tokio::test(flavor = "multi_thread")]
async fn account_deletion_removes_only_older_records_in_any_order() {
    let subject = json!({"uri": "at://did:plc:other/app.bsky.feed.post/1", "cid": "bafy"});
    let mine = format!("at://{DID}/app.bsky.feed.post/post");
    let mut labelled = post("labelled");
    labelled["labels"] =
        json!({"$type": "com.atproto.label.defs#selfLabels", "values": [{"val": "spoiler"}]});
    labelled["embed"] = json!({"$type": "app.bsky.embed.record", "record": subject});
    let ops = [
        create("app.bsky.feed.post", "post", &labelled),
        create("app.bsky.feed.like", "like", &json!({"subject": subject})),
        create("app.bsky.feed.repost", "repost", &json!({"subject": subject})),
        create("app.bsky.bookmark", "bookmark", &json!({"subject": subject})),
        create("app.bsky.graph.follow", "follow", &json!({"subject": "did:plc:other"})),
        create("app.bsky.graph.block", "block", &json!({"subject": "did:plc:other"})),
        create(
            "app.bsky.graph.list",
            "list",
            &json!({"name": "l", "purpose": "app.bsky.graph.defs#curatelist"}),
        ),
        create(
            "app.bsky.graph.listitem",
            "item",
            &json!({"list": format!("at://{DID}/app.bsky.graph.list/list"), "subject": "did:plc:other"}),
        ),
        create(
            "app.bsky.graph.listblock",
            "listblock",
            &json!({"subject": "at://did:plc:other/app.bsky.graph.list/l"}),
        ),
        create(
            "app.bsky.feed.generator",
            "generator",
            &json!({"did": "did:web:feed.example", "displayName": "f"}),
        ),
        create(
            "app.bsky.graph.starterpack",
            "pack",
            &json!({"name": "p", "list": format!("at://{DID}/app.bsky.graph.list/list")}),
        ),
        create("app.bsky.labeler.service", "self", &json!({"policies": {"labelValues": ["spam"]}})),
        create(
            "com.atproto.label.label",
            "label",
            &json!({"src": DID, "uri": "did:plc:other", "val": "spam", "cts": "2026-11-21T04:17:51.287Z"}),
        ),
        create(
            "app.bsky.graph.verification",
            "verification",
            &json!({"subject": "did:plc:other", "handle": "other.test", "displayName": "o"}),
        ),
        create("app.bsky.feed.threadgate", "post", &json!({"post": mine, "allow": []})),
        create("app.bsky.feed.postgate", "post", &json!({"post": mine, "embeddingRules": []})),
        create("com.example.thing", "thing", &json!({"$type": "com.example.thing"})),
        create("app.bsky.actor.profile", "self", &json!({"displayName": "somebody"})),
    ];
    let chain = Chain::start(&network(1), None).await;
    let mut program = Program::start("worker", &chain.variables()).await;
    let drained = async || {
        wait_until("it to be acknowledged", SOON, async || chain.look().await.is_drained()).await;
        purged(&chain.database).await;
    };

    add(&chain, "commit", &commit(10, &ops), 10).await;
    drained().await;
    let before = rows_of_the_account(&chain).await;
    assert_eq!(before.len(), 20, "a kind is missing: {before:?}");
    add(&chain, "account", &deleted("2026-11-22T00:00:00Z"), 20).await;
    drained().await;
    assert_eq!(rows_of_the_account(&chain).await, []);
    let name = format!("SELECT coalesce(display_name, 'none') FROM users WHERE did = '{DID}'");
    assert_eq!(query_value(&chain.database, &name).await, "none");

    // The same commits again, late: nothing comes back.
    add(&chain, "commit", &commit(10, &ops), 10).await;
    add(&chain, "commit", &commit(15, &ops), 15).await;
    drained().await;
    assert_eq!(rows_of_the_account(&chain).await, []);
    assert_eq!(query_value(&chain.database, &name).await, "none");

    // The account is back: newer records live, whatever other status follows, until it is deleted again.
    add(&chain, "account", &json!({"did": DID, "active": true, "time": "2026-11-23T00:00:00Z"}), 30).await;
    add(&chain, "commit", &commit(40, &ops), 40).await;
    add(&chain, "account", &deleted("2026-11-22T00:00:00Z"), 20).await;
    drained().await;
    assert_eq!(rows_of_the_account(&chain).await, before);
    assert_eq!(query_value(&chain.database, &name).await, "somebody");
    for (status, seq) in
        [("takendown", 50), ("suspended", 51), ("deactivated", 52), ("a-word-of-tomorrow", 53)]
    {
        let event = json!({"did": DID, "active": false, "status": status, "time": "2026-11-24T00:00:00Z"});
        add(&chain, "account", &event, seq).await;
        drained().await;
        assert_eq!(rows_of_the_account(&chain).await, before, "{status}");
        let found =
            query_value(&chain.database, &format!("SELECT account_status FROM users WHERE did = '{DID}'"))
                .await;
        assert_eq!(found, status);
    }
    add(&chain, "account", &deleted("2026-11-25T00:00:00Z"), 60).await;
    drained().await;
    assert_eq!(rows_of_the_account(&chain).await, []);
    let audit = chain.audit(&[]).await;
    assert_eq!(audit.code, 0, "{}", audit.stdout);
    assert!(program.is_running());
}

/// The purge chooses its rows before it locks anything, and looks at them again under the lock: one that was rewritten
/// in between is newer than the deletion.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_rewritten_while_the_purge_waits_for_its_lock_is_kept() {
    let database = Postgres::shared().await.fresh_database().await;
    let (config, _) =
        from_env([("DATABASE_URL", database.as_str()), ("NOTIFY_WITHIN", "off")], Role::Worker).unwrap();
    let store = Store::new(&config).unwrap();
    migrate::migrate(store.session().await.unwrap().client_mut()).await.unwrap();
    let rows = format!(
        "INSERT INTO users (did, handle) VALUES ('{DID}', 'handle.invalid');
         INSERT INTO standpipe.accounts (did, deleted_seq, deleted_time, purge_pending)
             VALUES ('{DID}', '100', '2026-11-21', true);
         INSERT INTO blocks (uri, blocker_did, blocked_did, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
             SELECT 'at://{DID}/app.bsky.graph.block/' || n, '{DID}', 'did:plc:other', now(), '', n::text, n, 0
             FROM generate_series(1, 2) n"
    );
    execute(&database, &rows).await;
    let (writer, purger) = (connect(&database).await, connect(&database).await);
    // As a pipeline does that applies a commit of this account.
    writer
        .batch_execute(&format!("BEGIN; SELECT pg_advisory_xact_lock(hashtextextended('{DID}', 0))"))
        .await
        .unwrap();
    let purge = tokio::spawn(async move {
        let sql = format!("SELECT standpipe.purge('{DID}', 'block', 200)");
        purger.query_one(&sql, &[]).await.unwrap().get::<_, i32>(0)
    });
    wait_until("the purge to wait for the lock", SOON, async || {
        let waiting = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                       WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted";
        query_value(&database, waiting).await == "1"
    })
    .await;
    writer
        .batch_execute("UPDATE blocks SET commit_seq = '200', stream_ms = 200 WHERE uri LIKE '%/1'; COMMIT")
        .await
        .unwrap();
    assert_eq!(purge.await.unwrap(), 1);
    let left = query_rows(&database, "SELECT uri FROM blocks").await;
    assert_eq!(left, [[Some(format!("at://{DID}/app.bsky.graph.block/1"))]]);
}
