//! A database that the workers before standpipe created and filled: it is taken over while others use it,
//! interrupted anywhere, audited, repaired, and given back.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::chain::{Program, RUN, SOON, Variables, look, redis_command};
use crate::support::{
    Finished, Postgres, Redis, Signal, Standpipe, connect, execute, old_database, query_rows, query_value,
    wait_for, wait_until,
};
use fastrand::Rng;
use serde_json::{Value, json};
use standpipe::apply::{Context, interpret};
use standpipe::config::{Role, TransactionMode, from_env};
use standpipe::crash::Point;
use standpipe::event::Entry;
use standpipe::event::{EntryId, Epochs, Event};
use standpipe::store::{Fate, Store};
use tokio::sync::OnceCell;
use tokio_postgres::Client;

/// The exit code that a shell reports for a process ended by SIGABRT.
const ABORTED: i32 = 128 + 6;

/// A full database of the old workers.
async fn old_database() -> String {
    static TEMPLATE: OnceCell<String> = OnceCell::const_new();
    // One copy at a time.
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let server = Postgres::shared().await;
    let template = TEMPLATE
        .get_or_init(async || {
            let url = server.fresh_database().await;
            old_database::create_full(&url).await;
            let name = url.rsplit('/').next().unwrap().to_owned();
            // Nobody may be connected to the database that is copied.
            let sessions = format!("SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'");
            wait_until("everybody to have left the template", SOON, async || {
                query_value(&server.url("postgres"), &sessions).await == "0"
            })
            .await;
            name
        })
        .await;
    let _turn = TURN.lock().await;
    server.fresh_database_from(template).await
}

fn variables(database: &str) -> Variables {
    Variables::new().with("DATABASE_URL", database)
}

async fn run(arguments: &[&str], database: &str) -> Finished {
    Standpipe::run(arguments, &variables(database), RUN).await
}

async fn runs(arguments: &[&str], database: &str) -> String {
    let finished = run(arguments, database).await;
    let output = finished.stdout + &finished.stderr;
    assert_eq!(finished.code, 0, "{arguments:?}: {output}");
    output
}

// ---------------------------------------------------------------------------------------------
// The others

/// Workers like those before standpipe, each with a connection of its own, doing what they always did. No statement
/// of theirs may wait for a lock for a second.
struct Others {
    stop: Arc<AtomicBool>,
    statements: Arc<AtomicU64>,
    longest: Arc<Mutex<(Duration, String)>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Others {
    async fn start(database: &str, count: u64) -> Self {
        let others = Self {
            stop: Arc::default(),
            statements: Arc::default(),
            longest: Arc::default(),
            tasks: Vec::new(),
        };
        let mut tasks = Vec::new();
        for number in 0..count {
            let client = connect(database).await;
            client.batch_execute("SET lock_timeout = '1s'").await.unwrap();
            let (stop, statements) = (Arc::clone(&others.stop), Arc::clone(&others.statements));
            let longest = Arc::clone(&others.longest);
            tasks.push(tokio::spawn(async move {
                let mut rng = Rng::with_seed(number);
                let mut turn = 0;
                while !stop.load(Ordering::Relaxed) {
                    for sql in transaction(&mut rng, number, turn) {
                        let began = Instant::now();
                        client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
                        let took = began.elapsed();
                        statements.fetch_add(1, Ordering::Relaxed);
                        let mut longest = longest.lock().unwrap();
                        if took > longest.0 {
                            *longest = (took, sql);
                        }
                    }
                    turn += 1;
                }
            }));
        }
        Self { tasks, ..others }
    }

    /// Waits until they have made progress.
    async fn get_on(&self, statements: u64) {
        let goal = self.statements.load(Ordering::Relaxed) + statements;
        wait_until("the others to get on", SOON, async || self.statements.load(Ordering::Relaxed) >= goal)
            .await;
    }

    /// Stops them. All their statements went through.
    async fn end(self, during: &str) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        let (longest, sql) = self.longest.lock().unwrap().clone();
        let statements = self.statements.load(Ordering::Relaxed);
        println!("{during}: {statements} statements of others, the longest took {longest:.0?}: {sql}");
        assert!(statements > 20, "{during}: the others did not work");
    }
}

/// What an old worker does for one event.
fn transaction(rng: &mut Rng, worker: u64, turn: u64) -> Vec<String> {
    let (user, post) = (rng.u32(..10_000), rng.u32(..60_000));
    let did = format!("did:plc:u{user}");
    // No worker writes twice about the same subject: that is left to standpipe's own events.
    let new = format!("did:plc:w{worker}-{turn}");
    let post = format!("at://did:plc:u{}/app.bsky.feed.post/p{post}", post % 10_000);
    let uri = format!("at://{did}/app.bsky.feed.x/w{worker}-{turn}");
    let ensure =
        format!("INSERT INTO users (did, handle) VALUES ('{did}', '{did}') ON CONFLICT (did) DO NOTHING");
    let pointer = |table: &str| {
        format!(
            "INSERT INTO {table} (uri, user_did, post_uri, created_at) VALUES ('{uri}', '{new}', '{post}', now())
             ON CONFLICT DO NOTHING"
        )
    };
    let count = |column: &str| {
        format!(
            "INSERT INTO post_aggregations AS a (post_uri, {column}) VALUES ('{post}', 1)
             ON CONFLICT (post_uri) DO UPDATE SET {column} = a.{column} + 1"
        )
    };
    let graph = |table: &str, from: &str, to: &str| {
        format!(
            "INSERT INTO {table} (uri, {from}, {to}, created_at) VALUES ('{uri}', '{new}', 'did:plc:u7', now())
             ON CONFLICT DO NOTHING"
        )
    };
    let list = format!("at://{did}/app.bsky.graph.list/1");
    let work = match turn % 12 {
        0 => vec![pointer("likes"), count("like_count")],
        1 => vec![pointer("reposts"), count("repost_count")],
        2 => vec![pointer("bookmarks"), count("bookmark_count")],
        3 => vec![graph("follows", "follower_did", "following_did")],
        4 => vec![graph("blocks", "blocker_did", "blocked_did")],
        5 => vec![
            format!("INSERT INTO posts (uri, cid, author_did, text, created_at) VALUES ('{uri}', 'b', '{did}', 't', now())
                     ON CONFLICT DO NOTHING"),
            format!("INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
                     VALUES ('{uri}', '{uri}', '{did}', 'post', now(), 'b', now()) ON CONFLICT DO NOTHING"),
        ],
        6 => vec![
            format!("INSERT INTO list_items (uri, cid, list_uri, subject_did, created_at)
                     VALUES ('{uri}', 'b', '{list}', '{new}', now()) ON CONFLICT DO NOTHING"),
            format!("INSERT INTO verifications (uri, cid, subject_did, handle, verified_at, created_at)
                     VALUES ('{uri}', 'b', '{new}', 'h', now(), now()) ON CONFLICT DO NOTHING"),
        ],
        7 => vec![
            format!("SELECT p.text, a.like_count FROM posts p JOIN post_aggregations a ON a.post_uri = p.uri
                     WHERE p.author_did = '{did}' ORDER BY p.created_at DESC LIMIT 20"),
            format!("SELECT f.uri FROM feed_items f WHERE f.originator_did = '{did}' ORDER BY f.sort_at DESC LIMIT 20"),
        ],
        8 => vec![format!("SELECT count(*) FROM likes l JOIN follows f ON f.follower_did = l.user_did
                           WHERE l.user_did = '{did}'")],
        9 => vec![format!("DELETE FROM likes WHERE uri = 'at://{did}/app.bsky.feed.x/w{worker}-{}'", turn - turn.min(9))],
        10 => vec![format!("SELECT * FROM generic_records g WHERE author_did = '{did}'"),
                   format!("SELECT * FROM labels g WHERE subject = '{did}'"),
                   format!("SELECT * FROM lists l JOIN list_items i ON i.list_uri = l.uri WHERE l.creator_did = '{did}'"),
                   format!("SELECT * FROM starter_packs WHERE creator_did = '{did}'"),
                   format!("SELECT * FROM feed_generators WHERE creator_did = '{did}'"),
                   format!("SELECT * FROM thread_gates WHERE post_uri = '{post}'"),
                   format!("SELECT * FROM post_gates WHERE post_uri = '{post}'")],
        _ => vec![format!("UPDATE users SET description = 'd{turn}' WHERE did = '{did}'")],
    };
    [vec!["BEGIN".to_owned(), ensure], work, vec!["COMMIT".to_owned()]].concat()
}

// ---------------------------------------------------------------------------------------------
// Events

/// An entry of the stream.
fn entry(place: u64, data: &Value) -> Entry {
    Entry {
        id: EntryId { ms: 1_795_234_668_000 + place, seq: 0 },
        event_type: "commit".to_owned(),
        data: data.to_string(),
        seq: place.to_string(),
    }
}

fn like(repo: &str, rkey: &str, post: &str) -> Value {
    let record = json!({"subject": {"uri": post, "cid": "bafyp"}, "createdAt": "2026-11-21T00:00:00Z"});
    let op = json!({"action": "create", "path": format!("app.bsky.feed.like/{rkey}"), "cid": "bafyl", "record": record});
    json!({"repo": repo, "ops": [op]})
}

fn delete(repo: &str, path: &str) -> Value {
    json!({"repo": repo, "ops": [{"action": "delete", "path": path}]})
}

fn follow(repo: &str, rkey: &str, subject: &str) -> Value {
    let record = json!({"subject": subject, "createdAt": "2026-11-21T00:00:00Z"});
    let op = json!({"action": "create", "path": format!("app.bsky.graph.follow/{rkey}"), "cid": "bafyf", "record": record});
    json!({"repo": repo, "ops": [op]})
}

fn post(repo: &str, rkey: &str, parent: &str) -> Value {
    let reply = json!({"root": {"uri": parent, "cid": "b"}, "parent": {"uri": parent, "cid": "b"}});
    let record = json!({"text": "again", "createdAt": "2026-11-21T00:00:00Z", "reply": reply});
    let op = json!({"action": "create", "path": format!("app.bsky.feed.post/{rkey}"), "cid": "bafyq", "record": record});
    json!({"repo": repo, "ops": [op]})
}

fn store(database: &str) -> Store {
    let (config, _) = from_env([("DATABASE_URL", database), ("NOTIFY_WITHIN", "off")], Role::Worker).unwrap();
    Store::new(&config).unwrap()
}

/// Applies entries as a pipeline does.
async fn apply(store: &Store, entries: &[Entry]) {
    let session = store.session().await.unwrap();
    let mut open: Vec<Event<'_>> =
        entries.iter().map(|entry| interpret(entry, Context::now(&Epochs::UNNAMED)).unwrap()).collect();
    while !open.is_empty() {
        let sent: Vec<&Event<'_>> = open.iter().collect();
        let results = session.apply(&sent, TransactionMode::Event).await.unwrap();
        let pairs = open.into_iter().zip(results);
        open = pairs
            .filter_map(|(event, result)| match result {
                Fate::Applied(_) => None,
                Fate::Lost(error) if error.sqlstate.as_deref().is_some_and(|code| code.starts_with("40")) => {
                    Some(event)
                }
                other => panic!("{other:?}"),
            })
            .collect();
    }
    session.flush(&[]).await.unwrap();
}

/// Counters that do not match the rows, found in a different way than the audit finds them.
const WRONG_COUNTERS: &str = "
    WITH k AS (
        SELECT uri AS key FROM posts UNION SELECT post_uri FROM likes UNION SELECT post_uri FROM reposts
        UNION SELECT post_uri FROM bookmarks UNION SELECT quoted_uri FROM quotes UNION SELECT post_uri FROM post_aggregations
        UNION SELECT parent_uri FROM posts WHERE parent_uri IS NOT NULL
    ), e AS (
        SELECT k.key, coalesce(l.n, 0) AS likes, coalesce(r.n, 0) AS reposts, coalesce(c.n, 0) AS replies,
               coalesce(q.n, 0) AS quotes, coalesce(b.n, 0) AS bookmarks
        FROM k
        LEFT JOIN (SELECT post_uri, count(DISTINCT user_did) AS n FROM likes GROUP BY 1) l ON l.post_uri = k.key
        LEFT JOIN (SELECT post_uri, count(DISTINCT user_did) AS n FROM reposts GROUP BY 1) r ON r.post_uri = k.key
        LEFT JOIN (SELECT parent_uri, count(*) AS n FROM posts GROUP BY 1) c ON c.parent_uri = k.key
        LEFT JOIN (SELECT quoted_uri, count(DISTINCT post_uri) AS n FROM quotes GROUP BY 1) q ON q.quoted_uri = k.key
        LEFT JOIN (SELECT post_uri, count(DISTINCT user_did) AS n FROM bookmarks GROUP BY 1) b ON b.post_uri = k.key
    )
    SELECT count(*) FROM e LEFT JOIN post_aggregations a ON a.post_uri = e.key
    WHERE (a.like_count, a.repost_count, a.reply_count, a.quote_count, a.bookmark_count)
        IS DISTINCT FROM (e.likes::int, e.reposts::int, e.replies::int, e.quotes::int, e.bookmarks::int)";

// ---------------------------------------------------------------------------------------------
// The tests

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_in_use_is_taken_over_and_given_back() {
    let database = old_database().await;
    let before = old_database::catalogue(&database).await;

    let planned = runs(&["migrate", "--dry-run"], &database).await;
    assert_eq!(old_database::catalogue(&database).await, before, "a dry run changed something");
    assert!(
        planned.contains("unique_like_user_post") && planned.contains("ACCESS EXCLUSIVE on likes"),
        "{planned}"
    );

    // A long transaction reads the tables that have to be changed.
    let others = Others::start(&database, 4).await;
    others.get_on(100).await;
    let reader = connect(&database).await;
    reader.batch_execute("BEGIN; SELECT FROM likes LIMIT 1; SELECT FROM posts LIMIT 1").await.unwrap();
    let mut migrate = Standpipe::start(&["migrate"], &variables(&database));
    let line = migrate.wait_for_line("waiting for its lock", SOON).await;
    assert!(line.contains("possibly blocked by process"), "{line}");
    others.get_on(200).await;
    reader.batch_execute("COMMIT").await.unwrap();
    let began = Instant::now();
    assert_eq!(migrate.wait_exit(RUN).await, 0, "{}", migrate.output());
    println!("taken over {:.1?} after the reader had ended:\n{}", began.elapsed(), migrate.output());
    others.get_on(200).await;
    others.end("the takeover").await;
    assert_eq!(runs(&["migrate"], &database).await.lines().count(), 1, "there was something left to do");
    assert_eq!(runs(&["migrate", "--dry-run"], &database).await.trim(), "nothing to do");

    new_events_meet_old_rows(&database).await;

    // Undo it.
    let finished = run(&["migrate", "--undo"], &database).await;
    assert_eq!(finished.code, 64, "nobody was asked: {}{}", finished.stdout, finished.stderr);
    assert!(finished.stdout.contains("removes 2 rows first"), "{}", finished.stdout);
    let others = Others::start(&database, 4).await;
    let undone = runs(&["migrate", "--undo", "--yes"], &database).await;
    println!("given back:\n{undone}");
    others.get_on(200).await;
    others.end("the way back").await;
    assert!(undone.contains("unique_follow_follower_following, 2 surplus rows removed"), "{undone}");
    assert_eq!(old_database::catalogue(&database).await, before);
    // What the old workers rely on.
    execute(
        &database,
        "INSERT INTO follows (uri, follower_did, following_did, created_at)
         VALUES ('at://did:plc:u3/app.bsky.graph.follow/again', 'did:plc:u3', 'did:plc:u4000', now())
         ON CONFLICT (follower_did, following_did) DO NOTHING",
    )
    .await;
    let rows =
        "SELECT count(*) FROM follows WHERE (follower_did, following_did) = ('did:plc:u3', 'did:plc:u4000')";
    assert_eq!(query_value(&database, rows).await, "1");

    // And once more.
    runs(&["migrate"], &database).await;
    runs(&["migrate", "--undo", "--yes"], &database).await;
    assert_eq!(old_database::catalogue(&database).await, before);
}

/// Through the whole chain, with rows that the old unique indexes would have refused. Nothing is refused.
async fn new_events_meet_old_rows(database: &str) {
    let redis = Redis::start().await;
    let target = "at://did:plc:u9/app.bsky.feed.post/p20009";
    let likes = || async {
        let counters = format!("SELECT like_count FROM post_aggregations WHERE post_uri = '{target}'");
        let rows = format!("SELECT count(DISTINCT user_did) FROM likes WHERE post_uri = '{target}'");
        (query_value(database, &counters).await, query_value(database, &rows).await)
    };
    let (_, old_likes) = likes().await;
    // An old like of the post, whose counter is corrected first.
    execute(
        database,
        &format!("UPDATE post_aggregations SET like_count = {old_likes} WHERE post_uri = '{target}'"),
    )
    .await;
    let old_like =
        query_value(database, &format!("SELECT min(uri) FROM likes WHERE post_uri = '{target}'")).await;
    let (repo, path) = old_like.trim_start_matches("at://").split_once('/').unwrap();
    let variables = variables(database).with("REDIS_URL", redis.url());
    let worker = Program::start("worker", &variables).await;
    let events = [
        like("did:plc:fan", "1", target),
        delete("did:plc:fan", "app.bsky.feed.like/1"),
        like("did:plc:fan", "2", target),
        like("did:plc:fan", "3", target),
        follow("did:plc:u3", "1", "did:plc:u4000"),
        follow("did:plc:u3", "2", "did:plc:u4000"),
        follow("did:plc:u3", "3", "did:plc:u4000"),
        // An old row has no revision, and loses to anything.
        delete(repo, path),
        delete("did:plc:u8", "app.bsky.graph.follow/f8"),
        post("did:plc:u2", "p2", target),
    ];
    for (number, data) in events.iter().enumerate() {
        let words = [
            "XADD",
            "firehose:events",
            "*",
            "type",
            "commit",
            "data",
            &data.to_string(),
            "seq",
            &number.to_string(),
        ];
        let _: String = redis_command(&redis, &words).await;
    }
    wait_until("the events to be acknowledged", SOON, async || look(&redis).await.unwrap().is_drained())
        .await;
    assert_eq!(look(&redis).await.unwrap().dead_letters, 0);

    // Two likes of one account count once; the old one is gone.
    assert_eq!(likes().await, (old_likes.clone(), old_likes));
    let rows = async |sql: &str| query_value(database, sql).await;
    assert_eq!(rows("SELECT count(*) FROM likes WHERE user_did = 'did:plc:fan'").await, "2");
    assert_eq!(rows("SELECT count(*) FROM follows WHERE following_did = 'did:plc:u4000' AND follower_did = 'did:plc:u3'").await, "3");
    assert_eq!(
        rows("SELECT count(*) FROM follows WHERE uri = 'at://did:plc:u8/app.bsky.graph.follow/f8'").await,
        "0"
    );
    assert_eq!(
        rows("SELECT text FROM posts WHERE uri = 'at://did:plc:u2/app.bsky.feed.post/p2'").await,
        "again"
    );

    let refused = run(&["migrate", "--undo", "--yes"], database).await;
    assert!(refused.code == 1 && refused.stderr.contains("stop it first"), "{refused:?}");
    drop(worker);
    // The server notices a killed client a moment later.
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'standpipe' AND datname = current_database()";
    wait_until("the worker's sessions to end", SOON, async || query_value(database, sessions).await == "0")
        .await;
    // The old index allows one like per account and post, so one of the two goes here; of the three follows,
    // the undo removes two.
    execute(database, "DELETE FROM likes WHERE uri = 'at://did:plc:fan/app.bsky.feed.like/3'").await;
}

/// What a takeover leaves behind: the catalogue and our notes.
async fn taken_over(database: &str) -> Vec<Vec<Option<String>>> {
    let mut state = old_database::catalogue(database).await;
    for notes in ["replaced_indexes", "added_columns", "tables_before"] {
        state.extend(
            query_rows(database, &format!("SELECT n::text FROM standpipe.{notes} n ORDER BY 1")).await,
        );
    }
    state.extend(
        query_rows(database, "SELECT version::text, name FROM standpipe.migrations ORDER BY version").await,
    );
    state
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn a_takeover_interrupted_anywhere_ends_like_an_undisturbed_one() {
    let mut rng = Rng::new();
    let undisturbed = old_database().await;
    old_database::make_constraints(&undisturbed).await;
    let before = old_database::catalogue(&undisturbed).await;
    // Several at once take turns.
    let together: Vec<Standpipe> =
        (0..3).map(|_| Standpipe::start(&["migrate"], &variables(&undisturbed))).collect();
    for mut migrate in together {
        assert_eq!(migrate.wait_exit(RUN).await, 0, "{}", migrate.output());
    }
    let wanted = taken_over(&undisturbed).await;

    let database = old_database().await;
    old_database::make_constraints(&database).await;
    let others = Others::start(&database, 2).await;
    let mut broken_off = 0;
    loop {
        // One of the next few crash points.
        let point = format!("{}:{}", Point::InMigration.name(), rng.u32(1..12));
        let finished =
            Standpipe::run(&["migrate"], &variables(&database).with("STANDPIPE_CRASH_AT", point), RUN).await;
        if finished.code == 0 {
            break;
        }
        assert_eq!(finished.code, ABORTED, "{}{}", finished.stdout, finished.stderr);
        broken_off += 1;
    }
    others.end("a takeover broken off").await;
    assert!(broken_off > 3, "{broken_off} times");
    assert_eq!(taken_over(&database).await, wanted);
    // The undo, interrupted as well.
    let mut broken_off = 0;
    loop {
        let point = format!("{}:{}", Point::InMigration.name(), rng.u32(1..12));
        let finished = Standpipe::run(
            &["migrate", "--undo", "--yes"],
            &variables(&database).with("STANDPIPE_CRASH_AT", point),
            RUN,
        )
        .await;
        if finished.code == 0 {
            break;
        }
        // The sessions of a dead process end a moment later.
        let stopped = finished.stderr.contains("stop it first");
        assert!(finished.code == ABORTED || stopped, "{}{}", finished.stdout, finished.stderr);
        broken_off += u32::from(!stopped);
    }
    assert!(broken_off > 3, "{broken_off} times");
    assert_eq!(old_database::catalogue(&database).await, before);

    // SIGKILL, while it builds an index and anywhere else.
    let database = old_database().await;
    old_database::make_constraints(&database).await;
    for round in 0..5 {
        let mut migrate = Standpipe::start(&["migrate"], &variables(&database));
        let lines = rng.usize(1..8);
        let ended = wait_for("a few steps", RUN, async || {
            let done = migrate.stderr().lines().count() >= lines;
            if done || !migrate.is_running() { Ok(()) } else { Err("not yet") }
        });
        ended.await;
        if !migrate.is_running() {
            break;
        }
        migrate.signal(Signal::Kill);
        assert_eq!(migrate.wait_exit(SOON).await, 128 + 9, "round {round}");
    }
    runs(&["migrate"], &database).await;
    assert_eq!(taken_over(&database).await, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_finds_and_repairs_errors_while_standpipe_is_running() {
    let database = old_database().await;
    runs(&["migrate"], &database).await;
    let store = store(&database);
    // A worker without tombstones writes a record that was deleted.
    let target = "at://did:plc:u11/app.bsky.feed.post/p11";
    let events = [like("did:plc:ghost", "1", target), delete("did:plc:ghost", "app.bsky.feed.like/1")];
    let events: Vec<Entry> = events.iter().zip(1..).map(|(data, place)| entry(place, data)).collect();
    apply(&store, &events).await;
    execute(
        &database,
        &format!(
            "INSERT INTO likes (uri, user_did, post_uri, created_at)
             VALUES ('at://did:plc:ghost/app.bsky.feed.like/1', 'did:plc:ghost', '{target}', now());
             UPDATE post_aggregations SET like_count = like_count + 1 WHERE post_uri = '{target}'"
        ),
    )
    .await;

    let wrong: u64 = query_value(&database, WRONG_COUNTERS).await.parse().unwrap();
    assert!(wrong > 1000, "only {wrong} counters are wrong");
    let found = run(&["audit"], &database).await;
    assert_eq!(found.code, 1, "{}", found.stdout);
    let report = [
        "1 differ  no record is left that was deleted later".to_owned(),
        "3 differ  every quote belongs to a live post".to_owned(),
        format!("{wrong} differ  counters agree with the rows"),
        "900 differ  every live post and repost has its feed item, and nothing else does".to_owned(),
        "1 differ  no handle is shown by more than one account".to_owned(),
    ];
    for line in report {
        assert!(found.stdout.contains(&line), "{line}: {}", found.stdout);
    }
    assert_eq!(query_value(&database, WRONG_COUNTERS).await, wrong.to_string(), "an audit changed something");

    // Meanwhile standpipe applies likes, unlikes and replies to posts whose counters are wrong.
    let stop = Arc::new(AtomicBool::new(false));
    let place = Arc::new(AtomicU64::new(10));
    let tasks: Vec<_> = (0..3)
        .map(|seed| {
            let (stop, place, store) = (Arc::clone(&stop), Arc::clone(&place), store.clone());
            tokio::spawn(async move {
                let mut rng = Rng::with_seed(seed);
                while !stop.load(Ordering::Relaxed) {
                    let entries: Vec<Entry> = (0..20)
                        .map(|_| {
                            let number = rng.u32(..600) * 100 + [77, 84, 99][rng.usize(..3)];
                            let post_uri =
                                format!("at://did:plc:u{}/app.bsky.feed.post/p{number}", number % 10_000);
                            let repo = format!("did:plc:fan{}", rng.u32(..40));
                            let rkey = rng.u32(..30).to_string();
                            let data = match rng.u32(..5) {
                                0 => delete(&repo, &format!("app.bsky.feed.like/{rkey}")),
                                1 => delete(&repo, &format!("app.bsky.feed.post/{rkey}")),
                                2 => post(&repo, &rkey, &post_uri),
                                _ => like(&repo, &rkey, &post_uri),
                            };
                            entry(place.fetch_add(1, Ordering::Relaxed), &data)
                        })
                        .collect();
                    apply(&store, &entries).await;
                }
            })
        })
        .collect();
    let at_start = place.load(Ordering::Relaxed);
    let began = Instant::now();
    let repaired = run(&["audit", "--repair"], &database).await;
    println!(
        "repaired and looked again in {:.1?} while {} events were applied:\n{}",
        began.elapsed(),
        place.load(Ordering::Relaxed) - at_start,
        repaired.stdout
    );
    assert_eq!(repaired.code, 0, "{}{}", repaired.stdout, repaired.stderr);
    assert!(repaired.stdout.contains("repaired: counters agree with the rows"), "{}", repaired.stdout);
    assert!(place.load(Ordering::Relaxed) > at_start + 100, "nothing was applied meanwhile");
    // No false findings while everything is changing.
    let moving = run(&["audit"], &database).await;
    assert_eq!(moving.code, 0, "{}", moving.stdout);
    stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(query_value(&database, WRONG_COUNTERS).await, "0");
    runs(&["audit"], &database).await;
    let shown = query_rows(&database, "SELECT did FROM users WHERE handle = 'u8.test'").await;
    assert_eq!(shown.len(), 1);
}

#[tokio::test]
async fn undo_refuses_a_database_that_standpipe_created() {
    let server = Postgres::shared().await;
    let database = server.fresh_database().await;
    let refused = run(&["migrate", "--undo", "--yes"], &database).await;
    assert!(refused.code == 1 && refused.stderr.contains("never migrated"), "{refused:?}");
    runs(&["migrate"], &database).await;
    let state = old_database::catalogue(&database).await;
    let refused = run(&["migrate", "--undo", "--yes"], &database).await;
    assert!(refused.code == 1 && refused.stderr.contains("standpipe created this database"), "{refused:?}");
    assert_eq!(old_database::catalogue(&database).await, state);
    let refused = run(&["migrate", "--yes"], &database).await;
    assert_eq!(refused.code, 64, "{refused:?}");
}

#[tokio::test]
async fn a_role_that_does_not_own_the_tables_is_refused_before_anything_changes() {
    let database = Postgres::shared().await.fresh_database().await;
    old_database::create(&database).await;
    let name = database.rsplit('/').next().unwrap();
    execute(&database, &format!("CREATE ROLE guest LOGIN; GRANT CREATE ON DATABASE {name} TO guest")).await;
    let before = old_database::catalogue(&database).await;
    let (_, server) = database.split_once('@').unwrap();
    let refused = run(&["migrate"], &format!("postgres://guest@{server}")).await;
    assert!(refused.code == 1 && refused.stderr.contains("does not own"), "{refused:?}");
    assert_eq!(old_database::catalogue(&database).await, before);
}

/// Names differ from one database to another, and a table may be missing.
#[tokio::test]
async fn unique_indexes_are_found_by_their_columns() {
    let database = Postgres::shared().await.fresh_database().await;
    old_database::create(&database).await;
    let client: Client = connect(&database).await;
    client
        .batch_execute(
            "ALTER INDEX unique_like_user_post RENAME TO \"Likes\"\" once\";
             DROP TABLE bookmarks;
             CREATE UNIQUE INDEX of_one_day ON likes (user_did, (created_at::date)) WHERE post_uri <> 'x';
             CREATE UNIQUE INDEX harmless ON likes (post_uri, uri);
             CREATE UNIQUE INDEX also_harmless ON notifications (uri, recipient_did);
             ALTER TABLE blocks ADD CONSTRAINT later UNIQUE (blocked_did, blocker_did) DEFERRABLE INITIALLY DEFERRED;",
        )
        .await
        .unwrap();
    let before = old_database::catalogue(&database).await;
    // What is left of a takeover that the server interrupted: an invalid index.
    let follow =
        "INSERT INTO follows (uri, follower_did, following_did, created_at) VALUES ('u', 'a', 'b', now())";
    client.batch_execute(follow).await.unwrap();
    let broken_off =
        "CREATE INDEX CONCURRENTLY standpipe_follow_follower_following ON follows ((1 / (length(uri) - 1)))";
    client.batch_execute(broken_off).await.unwrap_err();
    runs(&["migrate"], &database).await;
    let valid =
        "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indisvalid AND indexrelid::regclass::text =
                 'standpipe_follow_follower_following'";
    assert!(query_value(&database, valid).await.ends_with("(follower_did, following_did)"));
    let unique = "SELECT indexrelid::regclass::text FROM pg_index
                  WHERE indisunique AND NOT indisprimary AND indrelid::regclass::text !~ 'standpipe|^pg_' ORDER BY 1";
    let names: BTreeSet<String> =
        query_rows(&database, unique).await.into_iter().filter_map(|mut row| row.remove(0)).collect();
    let left = ["also_harmless", "harmless", "notifications_uri_unique"].map(str::to_owned);
    assert!(names.iter().filter(|name| !name.contains("pg_toast")).eq(left.iter()), "{names:?}");
    runs(&["audit"], &database).await;
    let undone = runs(&["migrate", "--undo", "--yes"], &database).await;
    assert!(undone.contains("kept, although standpipe created them: bookmarks"), "{undone}");
    execute(&database, "DROP TABLE bookmarks").await;
    assert_eq!(old_database::catalogue(&database).await, before);
}
