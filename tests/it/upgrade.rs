//! This release after the previous one: on what that one left behind when it was killed, and side by side
//! with it.
//!
//! `STANDPIPE_PREVIOUS` is a binary of the previous release; by default it is the one that
//! `make previous-release` builds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::support::chain::{Program, RUN, SOON, STREAM, Variables, look, network, purged, redis_command};
use crate::support::{
    Postgres, Redis, Signal, Standpipe, connect, model, query_rows, query_value, traffic, wait_for,
    wait_until,
};
use redis::aio::MultiplexedConnection;
use serde_json::Value;
use standpipe::config::{self, Role};
use standpipe::origin::relay::decode::{Message, decode};
use standpipe::store::migrate;
use standpipe_lab::simulate::{Network, NetworkOptions};

// ---------------------------------------------------------------------------------------------
// What the previous release left

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/release-0.1").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A Redis and a database in that state.
async fn left_by_the_previous_release() -> (Redis, String) {
    let (redis, database) = (Redis::start().await, Postgres::shared().await.fresh_database().await);
    // The dump empties the search path of its session, so the session is not used for anything else.
    connect(&database).await.batch_execute(&fixture("database.sql")).await.unwrap();
    let mut connection = redis.connection().await;
    for line in fixture("redis.jsonl").lines() {
        let words: Vec<String> = serde_json::from_str(line).unwrap();
        if let Err(error) = send(&mut connection, &words).await {
            // Redis before 7 does not count the entries of a stream, and cannot be told how many there were.
            let counts = words.iter().position(|word| word == "ENTRIESADDED" || word == "ENTRIESREAD");
            let counts = counts.unwrap_or_else(|| panic!("{words:?}: {error}"));
            send(&mut connection, &words[..counts]).await.unwrap();
        }
    }
    (redis, database)
}

async fn send(connection: &mut MultiplexedConnection, words: &[String]) -> redis::RedisResult<()> {
    let mut command = redis::cmd(&words[0]);
    for word in &words[1..] {
        command.arg(word);
    }
    command.query_async::<redis::Value>(connection).await.map(|_| ())
}

/// The rows that a statement returns, each as its values separated by spaces.
async fn lines(database: &str, sql: &str) -> Vec<String> {
    let text = |row: &Vec<Option<String>>| {
        row.iter().map(|value| value.as_deref().unwrap_or("NULL")).collect::<Vec<_>>().join(" ")
    };
    query_rows(database, sql).await.iter().map(text).collect()
}

/// What a statement returns: on what the previous release left, and after this one has applied the remaining
/// entries.
struct Fact {
    sql: &'static str,
    before: &'static [&'static str],
    after: &'static [&'static str],
}

/// `scripts/release_fixture.py` defines the entries.
const FACTS: &[Fact] = &[
    // Newer versions win, and an older version that is replayed over a newer one loses.
    Fact {
        sql: "SELECT split_part(uri, '/', 5), text FROM posts WHERE author_did = 'did:plc:alice' ORDER BY uri",
        before: &["edited after the edit", "first bob: the first", "gated bob: for some"],
        after: &["edited after the edit", "first bob: the first, edited", "gated bob: for some"],
    },
    // A newer gate allows a reply that the older one forbade.
    Fact {
        sql: "SELECT split_part(uri, '/', 5), text, violates_thread_gate FROM posts
              WHERE author_did = 'did:plc:bob' ORDER BY uri",
        before: &["gatecrash let me in t", "mine mine f", "quote a quote f", "reply a reply f"],
        after: &["gatecrash let me in f", "mine mine f", "quote a quote f", "reply a reply, edited f"],
    },
    // One of them had no revision.
    Fact {
        sql: "SELECT split_part(uri, '/', 5), text, violates_embedding_rules FROM posts
              WHERE author_did = 'did:plc:carol' ORDER BY uri",
        before: &["gatequote look what it says t", "plain without a revision f", "refused corrected f"],
        after: &["gatequote look what it says t", "plain with a revision f", "refused corrected f"],
    },
    // One of them has been deleted again.
    Fact {
        sql: "SELECT split_part(uri, '/', 5), text FROM posts WHERE author_did = 'did:plc:busy' ORDER BY uri",
        before: &[],
        after: &["three three", "two two"],
    },
    // The account opted out.
    Fact { sql: "SELECT uri FROM posts WHERE author_did = 'did:plc:private'", before: &[], after: &[] },
    // Deleted accounts: purged before, half purged, and deleted by an entry that was waiting. Newer records
    // live.
    Fact {
        sql: "SELECT author_did, split_part(uri, '/', 5) FROM posts
              WHERE author_did IN ('did:plc:erin', 'did:plc:frank', 'did:plc:heidi') ORDER BY uri",
        before: &[
            "did:plc:frank back",
            "did:plc:frank mine",
            "did:plc:heidi p0",
            "did:plc:heidi p1",
            "did:plc:heidi p2",
        ],
        after: &["did:plc:frank back"],
    },
    Fact {
        sql: "SELECT uri FROM (
                  SELECT uri, user_did AS did FROM likes UNION ALL SELECT uri, user_did FROM reposts
                  UNION ALL SELECT uri, follower_did FROM follows) r
              WHERE did IN ('did:plc:erin', 'did:plc:frank', 'did:plc:heidi') ORDER BY uri",
        before: &[
            "at://did:plc:frank/app.bsky.graph.follow/alice",
            "at://did:plc:heidi/app.bsky.feed.like/first",
            "at://did:plc:heidi/app.bsky.feed.repost/first",
            "at://did:plc:heidi/app.bsky.graph.follow/alice",
        ],
        after: &[],
    },
    // A delete, and the replayed create of a deleted record.
    Fact {
        sql: "SELECT uri FROM likes WHERE user_did IN ('did:plc:dave', 'did:plc:grace')",
        before: &["at://did:plc:dave/app.bsky.feed.like/first"],
        after: &[],
    },
    // Profiles, one of them replayed, handles and states.
    Fact {
        sql: "SELECT did, handle, display_name, account_active FROM users
              WHERE did ~ '^did:plc:(alice|carol|dave|erin|frank|grace|heidi|ivan)$' ORDER BY did",
        before: &[
            "did:plc:alice alice.test alice t",
            "did:plc:carol carol.test carol t",
            "did:plc:dave wanted.test NULL t",
            "did:plc:erin erin.test NULL f",
            "did:plc:frank frank.test frank f",
            "did:plc:grace handle.invalid NULL t",
            "did:plc:heidi heidi.test NULL t",
        ],
        after: &[
            "did:plc:alice alice.test alice t",
            "did:plc:carol carol.test carol, renamed t",
            "did:plc:dave wanted.test NULL t",
            "did:plc:erin erin.test NULL f",
            "did:plc:frank frank.test NULL f",
            "did:plc:grace grace.example.test NULL t",
            "did:plc:heidi heidi.test NULL f",
            "did:plc:ivan ivan.test ivan t",
        ],
    },
    Fact {
        sql: COUNTERS,
        before: &["first 4 2 2 1 1", "gated 0 0 1 0 1"],
        after: &["first 3 2 2 2 2", "gated 1 0 1 0 1"],
    },
    // The reply was edited: its notification stays read.
    Fact {
        sql: "SELECT recipient_did, reason, is_read FROM notifications
              WHERE uri = 'at://did:plc:bob/app.bsky.feed.post/reply#notification/reply'",
        before: &["did:plc:alice reply t"],
        after: &["did:plc:alice reply t"],
    },
];

const COUNTERS: &str = "
    SELECT split_part(post_uri, '/', 5), like_count, repost_count, reply_count, bookmark_count, quote_count
    FROM post_aggregations
    WHERE post_uri IN ('at://did:plc:alice/app.bsky.feed.post/first', 'at://did:plc:alice/app.bsky.feed.post/gated')
    ORDER BY post_uri";

/// How many rows of each table belong to this account's records.
async fn records_of(database: &str, did: &str) -> BTreeMap<&'static str, u64> {
    let mut counts = BTreeMap::new();
    for table in model::table_names().filter(|table| *table != "users") {
        let key = match table {
            "post_gates" | "thread_gates" | "post_aggregations" => "post_uri",
            _ => "uri",
        };
        let sql = format!("SELECT count(*) FROM {table} WHERE {key} LIKE 'at://{did}/%'");
        counts.insert(table, query_value(database, &sql).await.parse().unwrap());
    }
    counts
}

async fn dead_letters(variables: &Variables) -> Vec<Value> {
    let arguments = ["dead-letters", "list", "--json", "--limit", "1000"];
    let listed = Standpipe::run(&arguments, variables, SOON).await;
    assert_eq!(listed.code, 0, "{}{}", listed.stdout, listed.stderr);
    listed.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// How many letters there are of each reason.
fn reasons(letters: &[Value]) -> Vec<(&str, usize)> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for letter in letters {
        *counts.entry(letter["reason"].as_str().unwrap()).or_default() += 1;
    }
    counts.into_iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_the_previous_release_is_upgraded_with_its_pending_entries_and_dead_letters() {
    let (redis, database) = left_by_the_previous_release().await;
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("CONSUMER_ID", "release")
        .with("PARALLEL_CONSUMERS", "2")
        .with("CLAIM_IDLE", "10s")
        // However old the fixture is when this runs.
        .with("TOMBSTONE_RETENTION", "3650d");

    // This is what the previous release left, and nothing is missing.
    let migrations =
        lines(&database, "SELECT version, name FROM standpipe.migrations WHERE version > 0 ORDER BY 1").await;
    assert_eq!(migrations, ["1 tables", "2 every_kind"]);
    let own = ["user_settings", "standpipe.tombstones", "standpipe.accounts", "standpipe.handles"];
    for table in model::table_names().chain(own) {
        assert_ne!(query_value(&database, &format!("SELECT count(*) FROM {table}")).await, "0", "{table}");
    }
    for fact in FACTS {
        assert_eq!(lines(&database, fact.sql).await, fact.before, "before: {}", fact.sql);
    }
    let purges = "SELECT did FROM standpipe.accounts WHERE purge_pending";
    assert_eq!(lines(&database, purges).await, ["did:plc:frank"]);
    let before = look(&redis).await.unwrap();
    assert_eq!((before.pending, before.waiting, before.dead_letters), (15, true, 10), "{before:?}");
    assert!(before.cursor.is_some(), "{before:?}");
    assert_eq!(
        reasons(&dead_letters(&variables).await),
        [("database", 5), ("invalid_field", 2), ("missing_field", 2), ("undecodable", 1)]
    );

    // This release continues from there.
    let mut worker = Program::start("worker", &variables).await;
    wait_for("everything to be acknowledged", RUN, async || match look(&redis).await {
        Ok(look) if look.is_drained() => Ok(()),
        Ok(look) => Err(format!("{look:?}")),
        Err(error) => Err(error.to_string()),
    })
    .await;
    wait_until("the deleted accounts to be purged", RUN, async || lines(&database, purges).await.is_empty())
        .await;
    let newest = query_value(&database, "SELECT max(version) FROM standpipe.migrations").await;
    assert_eq!(newest, migrate::wanted().to_string());
    for fact in FACTS {
        assert_eq!(lines(&database, fact.sql).await, fact.after, "after: {}", fact.sql);
    }
    // One record of every kind.
    let records = records_of(&database, "did:plc:ivan").await;
    assert!(records.values().all(|count| *count > 0), "{records:?}");
    // The bad one of two waiting operations became a dead letter.
    let letters = dead_letters(&variables).await;
    assert_eq!(
        reasons(&letters),
        [("database", 5), ("invalid_field", 3), ("missing_field", 2), ("undecodable", 1)]
    );
    let after = look(&redis).await.unwrap();
    assert_eq!(after.cursor, before.cursor);
    let lost: u64 = redis_command(&redis, &["EXISTS", "firehose:events:lost"]).await;
    assert_eq!(lost, 0);

    // The constraint that refused four of them is gone; one is still refused by another constraint.
    let retried = Standpipe::run(&["dead-letters", "retry", "--all"], &variables, RUN).await;
    assert_eq!(retried.code, 1, "{}{}", retried.stdout, retried.stderr);
    assert!(retried.stdout.contains("4 applied, 7 kept"), "{}", retried.stdout);
    let letters = dead_letters(&variables).await;
    assert_eq!(
        reasons(&letters),
        [("database", 1), ("invalid_field", 3), ("missing_field", 2), ("undecodable", 1)]
    );
    assert!(letters.iter().all(|letter| letter["attempts"] == 2), "{letters:?}");
    let refused = letters.iter().find(|letter| letter["reason"] == "database").unwrap();
    assert!(refused["op"].as_str().unwrap().contains("app.bsky.graph.list/forbidden"), "{refused}");
    // One of the four is stored now. The others are not: one has been corrected since, one deleted, one
    // deleted with its account.
    let refused = "SELECT author_did, text FROM posts WHERE uri LIKE '%/refused' ORDER BY uri";
    assert_eq!(lines(&database, refused).await, ["did:plc:bob REFUSED at first", "did:plc:carol corrected"]);
    assert_eq!(lines(&database, COUNTERS).await, ["first 3 2 3 2 2", "gated 1 0 1 0 1"]);

    worker.signal(Signal::Term);
    assert_eq!(worker.wait_exit(SOON).await, 0);
    let audit = Standpipe::run(&["audit"], &variables, RUN).await;
    assert_eq!(audit.code, 0, "{}{}", audit.stdout, audit.stderr);
}

// ---------------------------------------------------------------------------------------------
// Side by side

/// The binary of the previous release.
fn previous() -> PathBuf {
    let path = std::env::var_os("STANDPIPE_PREVIOUS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/previous-release/standpipe"),
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "there is no {}: run `make previous-release`, or set STANDPIPE_PREVIOUS to a binary of the previous release",
        path.display()
    );
    path
}

/// Entries that are appended at a time, so that one of the workers cannot take everything at once.
const PORTION: usize = 200;

/// Appends the entries of the simulated network, waits until they are acknowledged, and returns how many there are.
async fn push(redis: &Redis, network: &NetworkOptions) -> u64 {
    let (config, _) = config::from_env([("COLLECTIONS", "*")], Role::Tool).unwrap();
    let mut pipe = redis::pipe();
    let mut count = 0;
    for frame in Network::new(network) {
        let Message::Event { entries, .. } = decode(&frame.bytes, &config.collections).unwrap() else {
            continue;
        };
        for entry in entries {
            let seq = entry.seq.to_string();
            pipe.xadd(STREAM, "*", &[("type", entry.event_type), ("data", &entry.data), ("seq", &seq)])
                .ignore();
            count += 1;
        }
        if pipe.len() >= PORTION {
            let _: () = pipe.query_async(&mut redis.connection().await).await.unwrap();
            pipe.clear();
            drained(redis).await;
        }
    }
    if !pipe.is_empty() {
        let _: () = pipe.query_async(&mut redis.connection().await).await.unwrap();
        drained(redis).await;
    }
    count
}

async fn drained(redis: &Redis) {
    wait_for("everything to be acknowledged", RUN, async || match look(redis).await {
        Ok(look) if look.is_drained() => Ok(()),
        Ok(look) => Err(format!("{look:?}")),
        Err(error) => Err(error.to_string()),
    })
    .await;
}

async fn becomes_ready(worker: &Program) {
    wait_for("readiness", SOON, async || match worker.readiness().await {
        (200, _) => Ok(()),
        (code, reasons) => Err(format!("{code}: {reasons}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_previous_release_and_this_one_share_a_group() {
    let network = network(4_000);
    let (expected, by_their_rule) = tokio::task::spawn_blocking({
        let network = network.clone();
        move || {
            let events = traffic::events(&network);
            (model::expected(&events), model::expected_with(&events, model::Dates::Commit))
        }
    })
    .await
    .unwrap();
    for transaction in ["event", "batch"] {
        let (redis, database) = (Redis::start().await, Postgres::shared().await.fresh_database().await);
        let variables = Variables::new()
            .with("REDIS_URL", redis.url())
            .with("DATABASE_URL", &database)
            .with("PARALLEL_CONSUMERS", "2")
            // So that neither of the two does everything.
            .with("BATCH_SIZE", "20");
        let theirs = variables.clone().with("CONSUMER_ID", "previous");
        let mut theirs = Program::start_binary(&previous(), "worker", &theirs).await;
        // It has to migrate before this one, or it would replace our functions with its own.
        theirs.wait_for_line("the database has been migrated", SOON).await;
        becomes_ready(&theirs).await;
        // This one upgrades the database while the other is working on it.
        let ours = variables.clone().with("CONSUMER_ID", "this").with("TRANSACTION", transaction);
        let mut ours = Program::start("worker", &ours).await;
        becomes_ready(&ours).await;

        let total = push(&redis, &network).await;
        // Each entry was acknowledged by one of them, and each did its share.
        let (by_them, by_us) = wait_for("every entry to be counted", SOON, async || {
            let (by_them, by_us) = (theirs.entries().await as u64, ours.entries().await as u64);
            if by_them + by_us == total {
                Ok((by_them, by_us))
            } else {
                Err(format!("{by_them} by the previous release and {by_us} by this one are not {total}"))
            }
        })
        .await;
        println!("TRANSACTION={transaction}: {by_them} entries by the previous release, {by_us} by this one");
        assert!(by_them > total / 50 && by_us > total / 50, "one had it all: {by_them} and {by_us}");
        for worker in [&mut theirs, &mut ours] {
            worker.signal(Signal::Term);
            assert_eq!(worker.wait_exit(SOON).await, 0);
        }

        purged(&database).await;
        assert_eq!(look(&redis).await.unwrap().dead_letters, 0);
        let audit = Standpipe::run(&["audit"], &variables, RUN).await;
        assert_eq!(audit.code, 0, "{}{}", audit.stdout, audit.stderr);
        let found = model::read(&connect(&database).await).await;
        // What the previous release wrote has the dates of its rule.
        let mut expected = expected.clone();
        expected.accept_dates(&by_their_rule, &found);
        model::assert_same(&format!("with TRANSACTION={transaction}"), &expected, &found);
    }
}
