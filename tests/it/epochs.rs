//! Which of two versions is newer if their numbers come from different sequences, or if they have none.

use crate::support::chain::{CURSOR, Chain, Program, SOON, STREAM, Variables, network, redis_command};
use crate::support::scripted::{self, ScriptedRelay, account, commit, create, delete, identity, post, rev};
use crate::support::{Postgres, Redis, Signal, Standpipe, connect, query_value, wait_until};
use serde_json::{Value as Json, json};
use standpipe::stream::Stream;
use standpipe::stream::append::{self, Appendix, Budget, Move, NewEntry};

const DID: &str = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";
const POST: &str = "app.bsky.feed.post/1";

/// A database with the tables and functions.
async fn migrated() -> String {
    let database = Postgres::shared().await.fresh_database().await;
    let ended = Standpipe::run(&["migrate"], &[("DATABASE_URL", &database)], SOON).await;
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    database
}

// ---------------------------------------------------------------------------------------------
// The order

/// Versions from every mix of origins: from our reader with revision and epoch, from the Python reader
/// without, from version 0.1, from an origin without numbers, and from none at all.
#[tokio::test]
async fn newer_is_a_strict_total_order_over_versions_of_every_origin() {
    let client = connect(&migrated().await).await;
    let seed =
        std::env::var("STANDPIPE_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    println!("STANDPIPE_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for round in 0..20 {
        let mut rows = Vec::new();
        for _ in 0..120 {
            let rev = match rng.u32(..4) {
                0 => None,
                1 => Some(format!("{}.", if rng.bool() { rev(rng.u64(..6)) } else { String::new() })),
                _ => Some(rev(rng.u64(..6))),
            };
            let number = rng.u64(1..9);
            let seq = match rng.u32(..4) {
                0 => None,
                1 => Some(number.to_string()),
                _ => Some(format!("{number}@{}", 1_795_234_668_000_u64 + rng.u64(..3))),
            };
            rows.push(format!(
                "({}, {}, {}, {})",
                rev.map_or("NULL".to_owned(), |rev| format!("'{rev}'")),
                seq.map_or("NULL".to_owned(), |seq| format!("'{seq}'")),
                rng.u64(1..6),
                rng.u64(..4)
            ));
        }
        rows.sort();
        rows.dedup();
        // In a strict total order exactly one of two is newer; and a tournament is transitive if and only if
        // no two beat the same number of others.
        let sql = format!(
            "WITH v AS (SELECT row_number() OVER () AS n, * FROM (VALUES {}) AS v (rev, seq, ms, sq)),
                  c AS (SELECT a.n AS a, b.n AS b,
                               standpipe.newer(a.rev, a.seq, a.ms, a.sq, b.rev, b.seq, b.ms, b.sq) AS newer,
                               standpipe.newer(b.rev, b.seq, b.ms, b.sq, a.rev, a.seq, a.ms, a.sq) AS older
                        FROM v a, v b)
             SELECT (SELECT count(*) FROM c WHERE a = b AND newer)::text || ' '
                 || (SELECT count(*) FROM c WHERE a <> b AND newer = older)::text || ' '
                 || (SELECT count(*) - count(DISTINCT wins)
                     FROM (SELECT a, count(*) FILTER (WHERE newer) AS wins FROM c GROUP BY a) w)::text",
            rows.join(", ")
        );
        let found: String = client.query_one(&sql, &[]).await.unwrap().get(0);
        assert_eq!(
            found, "0 0 0",
            "newer than itself, both or neither, not transitive; round {round}: {rows:?}"
        );
    }
}

/// A row that another program wrote has no stream id.
#[tokio::test]
async fn a_row_written_by_another_program_loses_to_any_version() {
    let client = connect(&migrated().await).await;
    for theirs in ["NULL, NULL", "NULL, '9'", "'3zzzzzzzzzzzz', '9'"] {
        let sql = format!(
            "SELECT standpipe.newer(NULL, NULL, 1, 0, {theirs}, NULL, NULL), standpipe.newer({theirs}, NULL, NULL, NULL, '1', 1, 0)"
        );
        let row = client.query_one(&sql, &[]).await.unwrap();
        assert_eq!((row.get::<_, bool>(0), row.get::<_, bool>(1)), (true, false), "{theirs}");
    }
}

/// Version 0.1 knows no epochs, and may be running alongside us.
#[tokio::test]
async fn a_number_without_an_epoch_gets_the_one_in_force_at_its_entry() {
    let client = connect(&migrated().await).await;
    client.batch_execute("INSERT INTO standpipe.epochs VALUES (1000), (2000)").await.unwrap();
    let follow = |key: u32, ms: u32| {
        format!(
            "ROW('did:plc:a', 'at://did:plc:a/app.bsky.graph.follow/{key}', NULL, NULL, '5', {ms}, 0, 'did:plc:b',
                 NULL, now()::timestamp, now()::timestamp, NULL)::standpipe.op"
        )
    };
    let apply = format!(
        "SELECT standpipe.apply(ARRAY['did:plc:a'], ARRAY['did:plc:a'], NULL, ARRAY['did:plc:a'], NULL,
                                ARRAY[{}, {}], ARRAY['follow', 'follow'])",
        follow(1, 999),
        follow(2, 1500),
    );
    client.batch_execute(&apply).await.unwrap();
    let each = format!(
        "CALL standpipe.apply_each(ARRAY[ROW('follow', {}, NULL, NULL, NULL, NULL, NULL, NULL, NULL)::standpipe.call], '{{}}')",
        follow(3, 2000),
    );
    client.batch_execute(&each).await.unwrap();
    let rows = client.query("SELECT commit_seq::text FROM follows ORDER BY uri", &[]).await.unwrap();
    let numbers: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(numbers, ["5", "5@1000", "5@2000"]);
}

// ---------------------------------------------------------------------------------------------
// The scenarios

/// A stream that both readers append to, each in its own way, and a worker.
struct Turns {
    redis: Redis,
    database: String,
    keys: standpipe::stream::Keys,
    cursor: append::Cursor,
    variables: Variables,
    program: Program,
}

const LEASE: &str = "ours";

impl Turns {
    async fn start() -> Self {
        let redis = Redis::start().await;
        let database = Postgres::shared().await.fresh_database().await;
        let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", &database);
        let program = Program::start("worker", &variables).await;
        let (config, _) =
            standpipe::config::from_env(variables.iter().cloned(), standpipe::config::Role::Worker).unwrap();
        let keys = standpipe::stream::Keys::new(&config);
        wait_until("the group", SOON, async || redis_command::<i64>(&redis, &["EXISTS", STREAM]).await == 1)
            .await;
        let _: String = redis_command(&redis, &["SET", &keys.lease, LEASE]).await;
        Self { redis, database, keys, cursor: append::Cursor::default(), variables, program }
    }

    async fn stream(&self) -> Stream {
        Stream::over(self.redis.connection().await, self.keys.clone())
    }

    /// Our reader starts a session, in a new epoch or in its previous one.
    async fn we_read(&mut self, anew: bool) {
        self.cursor = self.stream().await.cursor().await.unwrap();
        if anew || self.cursor.epoch.is_none() {
            self.cursor.epoch = Some(self.cursor.next_epoch);
        }
    }

    /// Our reader appends a commit.
    async fn ours(&mut self, seq: i64, micros: u64, op: Json) {
        let rev = rev(micros);
        let epoch = self.cursor.epoch.unwrap();
        let data = json!({"repo": DID, "ops": [op], "rev": rev, "epoch": epoch}).to_string();
        // The epoch comes last, as our reader writes it.
        assert!(data.contains("\"epoch\""));
        let to = Move { token: LEASE, relay: "relay", epoch, believed: self.cursor.position, position: seq };
        let what = Appendix {
            entries: vec![NewEntry { event_type: "commit", data, seq }],
            rev,
            ..Appendix::default()
        };
        let budget = Budget { bytes: 1 << 20, per_account: 10 };
        self.stream().await.append(to, budget, &what).await.unwrap();
        self.cursor.position = Some(seq);
    }

    /// The Python reader appends a commit, and moves the cursor.
    async fn theirs(&self, seq: i64, op: Json) {
        let data = json!({"repo": DID, "ops": [op]}).to_string();
        let seq = seq.to_string();
        let _: String =
            redis_command(&self.redis, &["XADD", STREAM, "*", "type", "commit", "data", &data, "seq", &seq])
                .await;
        let _: String = redis_command(&self.redis, &["SET", CURSOR, &seq]).await;
    }

    /// The post's text once everything is applied; `-` if there is no post.
    async fn text(&self) -> String {
        wait_until("everything to be acknowledged", SOON, async || {
            crate::support::chain::look(&self.redis).await.unwrap().is_drained()
        })
        .await;
        query_value(&self.database, "SELECT coalesce((SELECT text FROM posts), '-')").await
    }
}

fn write(text: &str) -> Json {
    json!({"action": "update", "path": POST, "cid": "bafy",
           "record": {"$type": "app.bsky.feed.post", "text": text, "createdAt": "2026-01-01T00:00:00Z"}})
}

fn remove() -> Json {
    json!({"action": "delete", "path": POST})
}

/// (a) Revisions are an hour older than the entries that carry them, and half of the entries have none.
#[tokio::test(flavor = "multi_thread")]
async fn alternating_our_reader_with_the_python_reader_preserves_the_order() {
    let mut turns = Turns::start().await;
    turns.theirs(10, write("one")).await;
    assert_eq!(turns.text().await, "one");
    turns.we_read(false).await;
    turns.ours(20, 20, write("two")).await;
    assert_eq!(turns.text().await, "two");
    // The Python reader takes over again.
    turns.theirs(30, write("three")).await;
    assert_eq!(turns.text().await, "three");
    turns.theirs(40, remove()).await;
    assert_eq!(turns.text().await, "-");
    turns.we_read(false).await;
    turns.ours(50, 50, write("five")).await;
    assert_eq!(turns.text().await, "five");
    turns.theirs(60, write("six")).await;
    turns.we_read(false).await;
    assert_eq!(turns.text().await, "six");
    turns.ours(70, 70, remove()).await;
    assert_eq!(turns.text().await, "-");
    // A resent commit changes nothing.
    turns.ours(50, 50, write("five")).await;
    assert_eq!(turns.text().await, "-");
}

/// Where an entry of the Python reader stands among ours is decided when it is applied, which may be long after our
/// reader has gone on.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_of_the_python_reader_keeps_its_place_when_it_is_applied_late() {
    let mut turns = Turns::start().await;
    turns.we_read(false).await;
    turns.ours(10, 10, write("one")).await;
    assert_eq!(turns.text().await, "one");
    turns.program.signal(Signal::Term);
    assert_eq!(turns.program.wait_exit(SOON).await, 0);
    turns.theirs(20, write("two")).await;
    turns.we_read(false).await;
    turns.ours(30, 30, json!({"action": "delete", "path": "app.bsky.feed.post/another"})).await;
    turns.program = Program::start("worker", &turns.variables).await;
    assert_eq!(turns.text().await, "two");
}

/// (b) A relay whose backlog repeats older events under higher numbers.
#[tokio::test(flavor = "multi_thread")]
async fn another_relays_backlog_does_not_bring_back_older_versions() {
    let mut turns = Turns::start().await;
    turns.we_read(true).await;
    turns.ours(900, 10, write("old")).await;
    turns.ours(901, 20, write("new")).await;
    turns.we_read(true).await;
    turns.ours(5_000, 10, write("old")).await;
    assert_eq!(turns.text().await, "new");
    turns.ours(5_001, 30, remove()).await;
    turns.we_read(true).await;
    turns.ours(1, 20, write("new")).await;
    assert_eq!(turns.text().await, "-");
}

/// (d) Redis, and with it the cursor and its epoch, is lost: everything is read again in a later epoch.
#[tokio::test(flavor = "multi_thread")]
async fn events_replayed_after_redis_was_lost_change_nothing() {
    let mut turns = Turns::start().await;
    turns.we_read(true).await;
    turns.ours(900, 10, write("old")).await;
    turns.ours(901, 20, write("new")).await;
    assert_eq!(turns.text().await, "new");
    let _: i64 = redis_command(&turns.redis, &["DEL", CURSOR, &turns.keys.epoch, &turns.keys.epochs]).await;
    turns.we_read(false).await;
    turns.ours(900, 10, write("old")).await;
    assert_eq!(turns.text().await, "new");
    turns.ours(902, 30, write("newest")).await;
    assert_eq!(turns.text().await, "newest");
}

/// (e) An origin without numbers provides a revision; (f) a repair has that of the repository's head, and no
/// number either.
#[tokio::test(flavor = "multi_thread")]
async fn revisions_without_sequence_numbers_are_ordered_among_the_relays() {
    let mut turns = Turns::start().await;
    turns.we_read(true).await;
    turns.ours(900, 10, write("relay")).await;
    let without_number = async |turns: &Turns, micros: u64, op: Json| {
        let data = json!({"repo": DID, "ops": [op], "rev": rev(micros)}).to_string();
        let words = ["XADD", STREAM, "*", "type", "commit", "data", &data, "seq", ""];
        let _: String = redis_command(&turns.redis, &words).await;
    };
    without_number(&turns, 30, write("repair")).await;
    assert_eq!(turns.text().await, "repair");
    // Older and newer commits that arrive late.
    turns.ours(901, 20, remove()).await;
    assert_eq!(turns.text().await, "repair");
    turns.ours(903, 40, write("newer")).await;
    assert_eq!(turns.text().await, "newer");
    without_number(&turns, 35, remove()).await;
    assert_eq!(turns.text().await, "newer");
    // The commit that the repair saw: the same state.
    without_number(&turns, 40, write("newer")).await;
    assert_eq!(turns.text().await, "newer");
}

/// (c) A relay that restarts its numbering under the same name and sends only live events: later handles,
/// statuses, takedowns and deletions win, nothing that it still has is lost, and the gap is counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_restarts_its_numbering_is_followed_and_the_gap_is_counted() {
    const OTHER: &str = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb";
    const GONE: &str = "did:plc:cccccccccccccccccccccccc";
    let start = 9_000_000_001;
    let mut before: Vec<(i64, Vec<u8>)> = (0..16)
        .map(|n| {
            let path = format!("app.bsky.feed.post/before{n}");
            let micros = u64::try_from(n).unwrap();
            (start + n, commit(start + n, DID, &rev(micros), &[create(&path, &post("before"))]))
        })
        .collect();
    before.push((start + 16, identity(start + 16, DID, Some("old.test"))));
    before.push((start + 17, account(start + 17, OTHER, Some("takendown"))));
    before.push((
        start + 18,
        commit(start + 18, GONE, &rev(18), &[create("app.bsky.feed.post/gone", &post("gone"))]),
    ));
    before.push((start + 19, commit(start + 19, DID, &rev(19), &[delete("app.bsky.feed.post/before0")])));
    let mut after: Vec<(i64, Vec<u8>)> = vec![
        (1, account(1, GONE, Some("deleted"))),
        (2, identity(2, DID, Some("new.test"))),
        (3, account(3, OTHER, None)),
        // Its backlog repeats an event that is older than what is known.
        (4, commit(4, DID, &rev(0), &[create("app.bsky.feed.post/before0", &post("before"))])),
    ];
    after.extend((5..=15).map(|seq| {
        let path = format!("app.bsky.feed.post/after{seq}");
        (seq, commit(seq, DID, &rev(100 + u64::try_from(seq).unwrap()), &[create(&path, &post("after"))]))
    }));
    let switched = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let over = std::sync::Arc::clone(&switched);
    let relay = ScriptedRelay::start(move |mut connection| {
        let (before, after, over) = (before.clone(), after.clone(), std::sync::Arc::clone(&over));
        async move {
            if !over.load(std::sync::atomic::Ordering::SeqCst) {
                connection.send_after_cursor(&before).await;
                while !over.load(std::sync::atomic::Ordering::SeqCst) {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
                return;
            }
            // A cursor beyond its head is ignored, and only live events are sent.
            if connection.cursor.is_some_and(|cursor| cursor > 15) {
                for (_, frame) in &after[9..] {
                    connection.send(frame).await;
                }
            } else {
                connection.send_after_cursor(&after).await;
            }
            connection.stay().await;
        }
    })
    .await;
    let chain = Chain::with_database(&network(1), None, migrated().await).await;
    let variables = chain.variables().with("RELAY_URL", relay.url());
    let program = Program::start("run", &variables).await;
    let is = async |sql: &str, wanted: &str| {
        wait_until(&format!("{sql} to be {wanted}"), SOON, async || {
            query_value(&chain.database, sql).await == wanted
        })
        .await;
    };
    is("SELECT count(*) FROM posts", "16").await;
    is(&format!("SELECT handle FROM users WHERE did = '{DID}'"), "old.test").await;
    switched.store(true, std::sync::atomic::Ordering::SeqCst);

    is("SELECT count(*) FROM posts WHERE text = 'after'", "11").await;
    is("SELECT count(*) FROM posts WHERE text = 'before'", "15").await;
    is("SELECT count(*) FROM posts WHERE text = 'gone'", "0").await;
    is(&format!("SELECT handle FROM users WHERE did = '{DID}'"), "new.test").await;
    is(&format!("SELECT account_active FROM users WHERE did = '{OTHER}'"), "t").await;
    is(&format!("SELECT account_status FROM users WHERE did = '{GONE}'"), "deleted").await;
    let cursor: String = redis_command(&chain.redis, &["GET", CURSOR]).await;
    assert_eq!(cursor, "15");
    program.metric_is("standpipe_relay_gaps_total", 1.0).await;
    let status = program.status().await;
    assert_eq!(status["missing"]["gaps"], 1, "{status}");
    assert!(
        status["missing"]["last_gap"]["reason"].as_str().unwrap().contains("restarted its numbering"),
        "{}",
        status["missing"]
    );
}

/// The same with another address: `RELAY_URL` changes to a relay with lower numbers.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_switch_to_a_relay_with_lower_numbers_later_statuses_win_and_one_gap_is_counted() {
    let frames = |start: i64, handle: &'static str, status: Option<&'static str>| {
        move |mut connection: scripted::Connection| async move {
            connection.send(&identity(start, DID, Some(handle))).await;
            connection.send(&account(start + 1, DID, status)).await;
            connection.stay().await;
        }
    };
    let first = ScriptedRelay::start(frames(9_000_000_001, "old.test", Some("takendown"))).await;
    let second = ScriptedRelay::start(frames(5, "new.test", None)).await;
    let chain = Chain::with_database(&network(1), None, migrated().await).await;
    let shown =
        format!("SELECT handle || ' ' || coalesce(account_status, 'active') FROM users WHERE did = '{DID}'");
    let is = async |wanted: &str| {
        wait_until(wanted, SOON, async || {
            query_value(&chain.database, &format!("SELECT coalesce(({shown}), '')")).await == wanted
        })
        .await;
    };
    let mut program = Program::start("run", &chain.variables().with("RELAY_URL", first.url())).await;
    is("old.test takendown").await;
    program.signal(Signal::Term);
    program.wait_exit(SOON).await;

    // While the new relay cannot be reached, the change loses nothing and counts nothing.
    let nobody = format!("ws://127.0.0.1:{}", crate::support::free_port().unwrap());
    let mut program = Program::start("run", &chain.variables().with("RELAY_URL", nobody)).await;
    program.wait_for_line("the reader waits", SOON).await;
    assert_eq!(program.metric("standpipe_relay_gaps_total").await, 0.0);
    let cursor: String = redis_command(&chain.redis, &["GET", CURSOR]).await;
    assert_eq!(cursor, "9000000002");
    program.signal(Signal::Term);
    program.wait_exit(SOON).await;

    let program = Program::start("run", &chain.variables().with("RELAY_URL", second.url())).await;
    is("new.test active").await;
    program.metric_is("standpipe_relay_gaps_total", 1.0).await;
}
