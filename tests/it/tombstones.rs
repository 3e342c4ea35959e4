//! What is older than the tombstones that are kept: a long backlog brings nothing deleted back.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use standpipe::event::tid_text;

use crate::support::chain::{Program, RUN, SOON, STREAM, Variables, look, redis_command};
use crate::support::{
    Finished, Postgres, Redis, Signal, Standpipe, query_rows, query_value, wait_for, wait_until,
};

const DID: &str = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
const OTHER: &str = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb";
const SUBJECT: &str = "at://did:plc:cccccccccccccccccccccccc/app.bsky.feed.post/3l3qo2vuowo2b";

/// The revision of a commit of two years ago; larger numbers are later.
fn rev(number: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64;
    let ago = Duration::from_hours(2 * 365 * 24).as_micros() as u64;
    // The same for the whole run.
    let began = (now - ago) / 86_400_000_000 * 86_400_000_000;
    tid_text((began + number) << 10)
}

fn record(did: &str, path: &str, text: &str) -> Value {
    let (collection, rkey) = path.split_once('/').unwrap();
    let at = "2024-09-05T06:11:04.870Z";
    let subject =
        json!({"uri": SUBJECT, "cid": "bafyreidfayvfuwqa7qlnopdjiqrxzs6blmoeu4rujcjtnci5beludirz2a"});
    match collection {
        "app.bsky.feed.post" => json!({"text": text, "createdAt": at}),
        "app.bsky.feed.like" | "app.bsky.feed.repost" => json!({"subject": subject, "createdAt": at}),
        "app.bsky.graph.list" => {
            json!({"name": text, "purpose": "app.bsky.graph.defs#modlist", "createdAt": at})
        }
        "app.bsky.feed.threadgate" => {
            json!({"post": format!("at://{did}/app.bsky.feed.post/{rkey}"), "createdAt": at})
        }
        _ => json!({"subject": OTHER, "createdAt": at}),
    }
}

struct House {
    redis: Redis,
    database: String,
    variables: Variables,
}

impl House {
    async fn start(mode: &str) -> Self {
        let redis = Redis::start().await;
        let database = Postgres::shared().await.fresh_database().await;
        let variables = Variables::new()
            .with("REDIS_URL", redis.url())
            .with("DATABASE_URL", &database)
            .with("TRANSACTION", mode)
            .with("TOMBSTONE_RETENTION", "1s");
        Self { redis, database, variables }
    }

    /// One operation on one record.
    async fn send(&self, did: &str, number: u64, action: &str, path: &str, text: &str) {
        let mut op = json!({"action": action, "path": path});
        if action != "delete" {
            op["cid"] = json!("bafyreidfayvfuwqa7qlnopdjiqrxzs6blmoeu4rujcjtnci5beludirz2a");
            op["record"] = record(did, path, text);
        }
        let data = json!({"repo": did, "rev": rev(number), "ops": [op]}).to_string();
        let words = ["XADD", STREAM, "*", "type", "commit", "data", &data, "seq", ""];
        let _: String = redis_command(&self.redis, &words).await;
    }

    async fn settled(&self) {
        wait_for("everything to be applied", RUN, async || {
            let look = look(&self.redis).await.unwrap();
            if look.is_drained() { Ok(()) } else { Err(format!("{look:?}")) }
        })
        .await;
    }

    async fn count(&self, sql: &str) -> String {
        query_value(&self.database, sql).await
    }

    async fn run(&self, arguments: &[&str]) -> Finished {
        Standpipe::run(arguments, &self.variables, SOON).await
    }
}

const COLLECTIONS: [&str; 7] = [
    "app.bsky.feed.post",
    "app.bsky.feed.like",
    "app.bsky.feed.repost",
    "app.bsky.graph.follow",
    "app.bsky.graph.block",
    "app.bsky.graph.list",
    "app.bsky.feed.threadgate",
];

async fn a_backlog_brings_nothing_back(mode: &str) {
    let house = House::start(mode).await;
    let mut program = Program::start("worker", &house.variables).await;
    let path = |collection: &str, rkey: &str| format!("{collection}/{rkey}");
    for collection in COLLECTIONS {
        house.send(DID, 10, "create", &path(collection, "gone"), "gone").await;
    }
    house.send(DID, 10, "create", &path("app.bsky.feed.post", "kept"), "kept").await;
    // One was there twice.
    let twice = path("app.bsky.feed.post", "twice");
    house.send(DID, 10, "create", &twice, "first").await;
    house.settled().await;
    house.send(DID, 50, "delete", &twice, "").await;
    house.settled().await;
    house.send(DID, 60, "create", &twice, "second").await;
    house.settled().await;
    house.send(DID, 100, "delete", &twice, "").await;
    for collection in COLLECTIONS {
        house.send(DID, 100, "delete", &path(collection, "gone"), "").await;
    }
    house.settled().await;
    let tombstones = "SELECT count(*) FROM standpipe.tombstones";
    assert_eq!(house.count(tombstones).await, (COLLECTIONS.len() + 1).to_string());
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);

    // Two years later, as it were: tombstones are kept for as long as their entries are in the stream.
    let _: u64 = redis_command(&house.redis, &["XTRIM", STREAM, "MAXLEN", "0"]).await;
    let young = "SELECT count(*) FROM standpipe.tombstones
                 WHERE stream_ms > extract(epoch FROM clock_timestamp()) * 1000 - 1500";
    wait_until("the tombstones to be old", SOON, async || house.count(young).await == "0").await;
    let mut program = Program::start("worker", &house.variables).await;
    wait_until("the tombstones to be deleted", SOON, async || house.count(tombstones).await == "0").await;
    assert_eq!(
        query_rows(&house.database, "SELECT did, rev FROM standpipe.swept").await,
        [[Some(DID.to_owned()), Some(rev(100))]]
    );
    // A backlog of all that, at once.
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);
    for collection in COLLECTIONS {
        house.send(DID, 10, "create", &path(collection, "gone"), "back").await;
        house.send(DID, 20, "create", &path(collection, "unseen"), "unseen").await;
        house.send(OTHER, 10, "create", &path(collection, "first"), "first").await;
        // What is newer than every tombstone can have no delete.
        house.send(DID, 200, "create", &path(collection, "later"), "later").await;
    }
    // A part of its story: the tombstone is not the newest that there was.
    house.send(DID, 50, "delete", &twice, "").await;
    house.send(DID, 60, "create", &twice, "back").await;
    house.send(DID, 10, "create", &path("app.bsky.feed.post", "kept"), "kept").await;
    house.send(DID, 30, "update", &path("app.bsky.feed.post", "kept"), "changed").await;
    for number in 0..20 {
        house
            .send(OTHER, 40 + number, "create", &path("app.bsky.feed.post", &number.to_string()), "beside")
            .await;
    }
    let _program = Program::start("worker", &house.variables).await;
    house.settled().await;

    let refused = 2 * COLLECTIONS.len() + 1;
    let listed = house.run(&["dead-letters", "list", "--json", "--limit", "1000"]).await;
    let letters: Vec<Value> = listed.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(letters.len(), refused, "{}", listed.stdout);
    for letter in &letters {
        assert_eq!(letter["reason"], "too_old", "{letter}");
        assert!(letter["message"].as_str().unwrap().contains("TOMBSTONE_RETENTION"), "{letter}");
    }
    let texts = "SELECT text, count(*) FROM posts GROUP BY 1 ORDER BY 1";
    let found: Vec<String> = query_rows(&house.database, texts)
        .await
        .into_iter()
        .map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(found, ["beside 20", "changed 1", "first 1", "later 1"]);
    for table in ["likes", "reposts", "follows", "blocks", "lists", "thread_gates"] {
        let key = if table == "thread_gates" { "post_uri" } else { "uri" };
        let uris = query_rows(&house.database, &format!("SELECT {key} FROM {table} ORDER BY 1")).await;
        let rkeys: Vec<&str> =
            uris.iter().map(|row| row[0].as_deref().unwrap().rsplit('/').next().unwrap()).collect();
        assert_eq!(rkeys, ["later", "first"], "{table}");
    }
    // Trying again changes nothing.
    let retried = house.run(&["dead-letters", "retry", "--all"]).await;
    assert!(retried.stdout.contains("too_old") || retried.code != 0, "{}{}", retried.stdout, retried.stderr);
    assert_eq!(look(&house.redis).await.unwrap().dead_letters, refused as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_backlog_brings_nothing_deleted_back_event_by_event() {
    a_backlog_brings_nothing_back("event").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_backlog_brings_nothing_deleted_back_in_batches() {
    a_backlog_brings_nothing_back("batch").await;
}
