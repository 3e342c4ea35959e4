//! One entry in a hundred can never be applied, for every possible reason; all others are, and after a
//! correction so are those that it fixes.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::chain::{EndState, RUN, SOON, STREAM, Variables, look, network, purged};
use crate::support::{Postgres, Redis, Standpipe, execute, query_value, wait_until};
use serde_json::{Value, json};
use standpipe::config::{self, Role};
use standpipe::origin::relay::decode::{Message, decode};
use standpipe_lab::simulate::Network;

const EVENTS: u64 = 10_000;
const REPO: &str = "did:plc:poison";

fn commit(number: usize, ops: &[Value]) -> String {
    json!({"repo": format!("{REPO}{number}"), "rev": "3n2samfdihk2n", "ops": ops}).to_string()
}

fn op(collection: &str, rkey: usize, record: &Value) -> Value {
    json!({"action": "create", "path": format!("{collection}/{rkey}"), "cid": "bafy", "record": record})
}

/// The n-th poison entry: its reason, its type, its data, and how many of its operations are good.
fn poison(number: usize) -> (&'static str, &'static str, String, u64) {
    let like = json!({"subject": {"uri": "at://did:plc:x/app.bsky.feed.post/1", "cid": "bafy"}});
    match number % 6 {
        0 => ("undecodable", "commit", "{\"repo\": \"did:plc".to_owned(), 0),
        1 => ("missing_field", "commit", commit(number, &[op("app.bsky.feed.like", 1, &json!({}))]), 0),
        2 => (
            "invalid_field",
            "commit",
            commit(number, &[op("app.bsky.graph.follow", 1, &json!({"subject": 7}))]),
            0,
        ),
        3 => {
            let mut ops: Vec<Value> = (0..199).map(|rkey| op("app.bsky.feed.like", rkey, &like)).collect();
            ops.insert(100, op("app.bsky.feed.repost", 1, &json!({"subject": "no reference"})));
            ("invalid_field", "commit", commit(number, &ops), 199)
        }
        4 => {
            let name = json!({"displayName": "x".repeat(300)});
            let profile = json!({"action": "update", "path": "app.bsky.actor.profile/self", "cid": "b", "record": name});
            ("database", "commit", commit(number, &[profile]), 0)
        }
        _ => ("missing_field", "account", json!({"did": format!("{REPO}{number}")}).to_string(), 0),
    }
}

/// Appends the entries of the simulated network and, if `poisoned`, a poison entry after every hundredth.
async fn push(redis: &Redis, poisoned: bool) -> BTreeMap<&'static str, u64> {
    let (config, _) = config::from_env([("COLLECTIONS", "*")], Role::Tool).unwrap();
    let mut counts = BTreeMap::new();
    let mut connection = redis.connection().await;
    let mut pipe = redis::pipe();
    let mut total = 0;
    for frame in Network::new(&network(EVENTS)) {
        let Message::Event { entries, .. } = decode(&frame.bytes, &config.collections).unwrap() else {
            continue;
        };
        for entry in entries {
            let seq = entry.seq.to_string();
            pipe.xadd(STREAM, "*", &[("type", entry.event_type), ("data", &entry.data), ("seq", &seq)])
                .ignore();
            total += 1;
            if poisoned && total % 100 == 0 {
                let (reason, event_type, data, _) = poison(total / 100);
                pipe.xadd(STREAM, "*", &[("type", event_type), ("data", &data), ("seq", "")]).ignore();
                *counts.entry(reason).or_default() += 1;
            }
        }
    }
    let _: () = pipe.query_async(&mut connection).await.unwrap();
    counts
}

async fn apply(redis: &Redis, database: &str) -> Variables {
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", database);
    let worker = Standpipe::start(&["worker"], &variables);
    wait_until("everything to be acknowledged", RUN, async || {
        look(redis).await.is_ok_and(|look| look.is_drained())
    })
    .await;
    drop(worker);
    variables
}

#[tokio::test(flavor = "multi_thread")]
async fn with_one_poison_entry_in_a_hundred_everything_else_is_applied() {
    let (clean, poisoned) = (Redis::start().await, Redis::start().await);
    let postgres = Postgres::shared().await;
    let (expected, database) = (postgres.fresh_database().await, postgres.fresh_database().await);
    push(&clean, false).await;
    let counts = push(&poisoned, true).await;
    assert_eq!(counts.len(), 4, "{counts:?}");
    apply(&clean, &expected).await;
    let variables = apply(&poisoned, &database).await;

    // Each poison entry is listed once, with a reason.
    let listed =
        Standpipe::run(&["dead-letters", "list", "--json", "--limit", "100000"], &variables, SOON).await;
    let letters: Vec<Value> = listed.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut found: BTreeMap<&str, u64> = BTreeMap::new();
    for letter in &letters {
        *found.entry(letter["reason"].as_str().unwrap()).or_default() += 1;
        assert!(!letter["message"].as_str().unwrap().is_empty(), "{letter}");
    }
    let counts: BTreeMap<&str, u64> = counts.into_iter().collect();
    assert_eq!(found, counts);

    // The good operations beside a bad one are applied ...
    let likes =
        query_value(&database, &format!("SELECT count(*) FROM likes WHERE user_did LIKE '{REPO}%'")).await;
    let good: u64 = (1..=letters.len()).map(|number| poison(number).3).sum();
    assert_eq!(likes, good.to_string());
    // ... a correction makes the letters it fixes applicable ...
    execute(&database, "ALTER TABLE users ALTER display_name TYPE text").await;
    let retry = ["dead-letters", "retry", "--all", "--reason", "database"];
    let retried = Standpipe::run(&retry, &variables, Duration::from_mins(1)).await;
    assert_eq!(retried.code, 0, "{}", retried.stdout);
    let names = format!("SELECT count(*) FROM users WHERE did LIKE '{REPO}%' AND length(display_name) = 300");
    assert_eq!(query_value(&database, &names).await, counts["database"].to_string());
    let left = look(&poisoned).await.unwrap().dead_letters;
    assert_eq!(left, letters.len() as u64 - counts["database"]);
    // ... and everything else is as if there had been no poison.
    for (table, column) in [("likes", "user_did"), ("notifications", "author_did"), ("users", "did")] {
        execute(&database, &format!("DELETE FROM {table} WHERE {column} LIKE '{REPO}%'")).await;
    }
    for sql in [
        "DELETE FROM post_aggregations WHERE post_uri = 'at://did:plc:x/app.bsky.feed.post/1'".to_owned(),
        format!("DELETE FROM standpipe.accounts WHERE did LIKE '{REPO}%'"),
    ] {
        execute(&database, &sql).await;
    }
    purged(&database).await;
    purged(&expected).await;
    EndState::of(&database).await.assert_is(&EndState::of(&expected).await);
}
