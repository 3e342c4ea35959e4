//! The bulk path: many events in one transaction.

use serde_json::{Value as Json, json};
use standpipe::apply::{Context, interpret};
use standpipe::config::{Role, TransactionMode, from_env};
use standpipe::crash::Point;
use standpipe::event::{Entry, EntryId, Epochs, Event};
use standpipe::store::{Fate, Store, migrate};

use crate::support::chain::{GROUP, Program, RUN, SOON, STREAM, Variables, look, redis_command};
use crate::support::{Postgres, Redis, connect, execute, query_value, wait_until};

async fn migrated() -> (String, Store) {
    let url = Postgres::shared().await.fresh_database().await;
    let (config, _) =
        from_env([("DATABASE_URL", url.as_str()), ("NOTIFY_WITHIN", "off")], Role::Worker).unwrap();
    let store = Store::new(&config).unwrap();
    migrate::migrate(store.session().await.unwrap().client_mut()).await.unwrap();
    (url, store)
}

fn entry(number: u64, repo: &str, ops: &[Json]) -> Entry {
    let rev = "3n2samfdihk2n";
    let data = json!({"repo": repo, "rev": rev, "ops": ops}).to_string();
    let id = EntryId { ms: 1_767_225_600_000, seq: number };
    Entry { id, event_type: "commit".to_owned(), data, seq: number.to_string() }
}

fn create(path: &str, record: Json) -> Json {
    let mut record = record;
    record["createdAt"] = "2026-01-01T00:00:00Z".into();
    json!({"action": "create", "path": path, "cid": "bafy", "record": record})
}

fn like(key: &str, post: &str) -> Json {
    create(&format!("app.bsky.feed.like/{key}"), json!({"subject": {"uri": post, "cid": "bafy"}}))
}

/// Applies entries as a pipeline does in its first round.
async fn apply(store: &Store, mode: TransactionMode, entries: &[Entry]) -> Vec<Fate> {
    let events: Vec<Event<'_>> =
        entries.iter().map(|entry| interpret(entry, Context::now(&Epochs::UNNAMED)).unwrap()).collect();
    let events: Vec<&Event<'_>> = events.iter().collect();
    let session = store.session().await.unwrap();
    let fates = session.apply(&events, mode).await.unwrap();
    session.flush(&events).await.unwrap();
    fates
}

const ROOT: &str = "at://did:plc:author/app.bsky.feed.post/root";
const COUNTED: &str = "at://did:plc:other/app.bsky.feed.post/counted";

/// A thread that nobody but its author may reply to, and a reply to it, written at the same time. Whichever is
/// committed first, the reply breaks the gate.
#[tokio::test(flavor = "multi_thread")]
async fn a_gate_and_a_reply_that_do_not_see_each_other_agree_in_the_end() {
    let gate = create("app.bsky.feed.threadgate/root", json!({"post": ROOT, "allow": []}));
    let reference = json!({"uri": ROOT, "cid": "bafy"});
    let reply = create(
        "app.bsky.feed.post/reply",
        json!({"text": "a reply", "reply": {"root": reference, "parent": reference}}),
    );
    for gate_first in [true, false] {
        let (url, store) = migrated().await;
        let root = create("app.bsky.feed.post/root", json!({"text": "a root"}));
        apply(&store, TransactionMode::Event, &[entry(1, "did:plc:author", &[root])]).await;
        apply(&store, TransactionMode::Event, &[entry(2, "did:plc:someone", &[like("1", COUNTED)])]).await;
        // Counters are written last: whoever likes this post too has written everything else, and waits.
        let barrier = connect(&url).await;
        let lock = format!("BEGIN; SELECT FROM post_aggregations WHERE post_uri = '{COUNTED}' FOR UPDATE");
        barrier.batch_execute(&lock).await.unwrap();
        let gates = vec![entry(3, "did:plc:author", &[gate.clone(), like("2", COUNTED)])];
        let posts = vec![
            entry(4, "did:plc:replier", std::slice::from_ref(&reply)),
            entry(5, "did:plc:replier", &[like("3", COUNTED)]),
        ];
        let only_posts = vec![
            entry(4, "did:plc:replier", std::slice::from_ref(&reply)),
            entry(5, "did:plc:replier", &[like("3", ROOT)]),
        ];
        let only_gate = vec![entry(3, "did:plc:author", std::slice::from_ref(&gate))];
        let (late, late_mode, early, early_mode) = if gate_first {
            (posts, TransactionMode::Batch, only_gate, TransactionMode::Event)
        } else {
            (gates, TransactionMode::Event, only_posts, TransactionMode::Batch)
        };
        let waiting = tokio::spawn({
            let store = store.clone();
            async move { apply(&store, late_mode, &late).await }
        });
        let blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'
                       AND datname = current_database()";
        wait_until("the first to wait for the counter", SOON, async || {
            query_value(&url, blocked).await != "0"
        })
        .await;
        let fates = apply(&store, early_mode, &early).await;
        assert!(fates.iter().all(|fate| matches!(fate, Fate::Applied(_))), "{fates:?}");
        barrier.batch_execute("ROLLBACK").await.unwrap();
        let fates = waiting.await.unwrap();
        assert!(fates.iter().all(|fate| matches!(fate, Fate::Applied(_))), "{fates:?}");
        assert_eq!(query_value(&url, FLAGS).await, JUDGED, "gate first: {gate_first}");
    }
}

/// The exit code that a shell reports for a process ended by SIGABRT.
const ABORTED: i32 = 128 + 6;

/// What [`FLAGS`] says in the end: the root has a gate, and the reply breaks it.
const JUDGED: &str = "tf ft";
const FLAGS: &str =
    "SELECT string_agg(concat(has_thread_gate, violates_thread_gate), ' ' ORDER BY uri) FROM posts";

/// The same two, each written before the other is committed; the process that commits last dies before it looks for the
/// other, and is started again.
async fn the_later_one_dies(posts_die: bool) {
    let (url, store) = migrated().await;
    let redis = Redis::start().await;
    let gate = create("app.bsky.feed.threadgate/root", json!({"post": ROOT, "allow": []}));
    let reference = json!({"uri": ROOT, "cid": "bafy"});
    let text = json!({"text": "a reply", "reply": {"root": reference, "parent": reference}});
    let reply = create("app.bsky.feed.post/reply", text);
    let root = create("app.bsky.feed.post/root", json!({"text": "a root"}));
    apply(&store, TransactionMode::Event, &[entry(1, "did:plc:author", &[root])]).await;
    apply(&store, TransactionMode::Event, &[entry(2, "did:plc:someone", &[like("1", COUNTED)])]).await;
    let barrier = connect(&url).await;
    let lock = format!("BEGIN; SELECT FROM post_aggregations WHERE post_uri = '{COUNTED}' FOR UPDATE");
    barrier.batch_execute(&lock).await.unwrap();

    // Enough of them to share a transaction.
    let likes = (5..45).map(|n| entry(n, &format!("did:plc:{n}"), &[like("1", COUNTED)]));
    let (dying, other): (Vec<Entry>, Vec<Entry>) = if posts_die {
        let posts = [entry(4, "did:plc:replier", &[reply])].into_iter().chain(likes);
        (posts.collect(), vec![entry(3, "did:plc:author", &[gate])])
    } else {
        let gates = entry(3, "did:plc:author", &[gate, like("2", COUNTED)]);
        let posts = vec![entry(4, "did:plc:replier", &[reply]), entry(5, "did:plc:a", &[like("1", ROOT)])];
        (vec![gates], posts)
    };
    let mut pipe = redis::pipe();
    pipe.cmd("XGROUP").arg(&["CREATE", STREAM, GROUP, "0", "MKSTREAM"]).ignore();
    for entry in &dying {
        let id = entry.id.to_string();
        pipe.cmd("XADD")
            .arg(STREAM)
            .arg(&[&id, "type", "commit", "data", &entry.data, "seq", &entry.seq])
            .ignore();
    }
    pipe.query_async::<()>(&mut redis.connection().await).await.unwrap();
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &url)
        .with("TRANSACTION", "batch")
        .with("PARALLEL_CONSUMERS", "1");
    let crashing = variables.clone().with("STANDPIPE_CRASH_AT", Point::BeforeJudging.name());
    let mut program = Program::start("worker", &crashing).await;
    let blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'
                   AND datname = current_database()";
    wait_until("it to wait for the counter", SOON, async || query_value(&url, blocked).await != "0").await;
    let mode = if posts_die { TransactionMode::Event } else { TransactionMode::Batch };
    let fates = apply(&store, mode, &other).await;
    assert!(fates.iter().all(|fate| matches!(fate, Fate::Applied(_))), "{fates:?}");
    barrier.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(program.wait_exit(RUN).await, ABORTED, "{}", program.output());
    assert_eq!(query_value(&url, FLAGS).await, "tf ff", "they had seen each other");

    let program = Program::start("worker", &variables).await;
    wait_until("everything to be acknowledged", RUN, async || look(&redis).await.unwrap().is_drained()).await;
    assert_eq!(query_value(&url, FLAGS).await, JUDGED);
    assert_eq!(redis_command::<u64>(&redis, &["XLEN", &format!("{STREAM}:dead")]).await, 0);
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn posts_whose_process_dies_before_it_looks_for_gates_again_are_judged_in_the_end() {
    the_later_one_dies(true).await;
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn a_gate_whose_process_dies_before_it_looks_for_posts_again_is_applied_to_them_in_the_end() {
    the_later_one_dies(false).await;
}

/// Only PostgreSQL can see what an operator's trigger refuses.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_record_harms_nothing_else_in_its_batch() {
    let (url, store) = migrated().await;
    execute(
        &url,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN IF NEW.post_uri LIKE '%/refused' THEN RAISE check_violation; END IF; RETURN NEW; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON likes FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    .await;
    let entries: Vec<Entry> = (0..1000)
        .map(|n| {
            let post = if n == 517 { "refused".to_owned() } else { format!("{}", n % 50) };
            let post = format!("at://did:plc:author/app.bsky.feed.post/{post}");
            entry(n, &format!("did:plc:{n}"), &[like("1", &post)])
        })
        .collect();
    let fates = apply(&store, TransactionMode::Batch, &entries).await;
    for (n, fate) in fates.iter().enumerate() {
        assert_eq!(matches!(fate, Fate::Rejected(_)), n == 517, "{n}: {fate:?}");
    }
    assert_eq!(query_value(&url, "SELECT count(*) FROM likes").await, "999");
    assert_eq!(query_value(&url, "SELECT sum(like_count) FROM post_aggregations").await, "999");
}

/// One operation per commit, and many commits at once: neither way of writing notifies of what was old when it arrived. Of
/// several deliveries the first counts.
#[tokio::test(flavor = "multi_thread")]
async fn neither_mode_notifies_of_what_was_old_when_it_arrived() {
    const DAY: u64 = 24 * 3600 * 1000;
    // `rev` is of 2026, as is what these records say of themselves.
    let made = 1_767_225_600_000;
    let follow =
        |key: &str| create(&format!("app.bsky.graph.follow/{key}"), json!({"subject": "did:plc:author"}));
    let reply = |key: &str| {
        let reference = json!({"uri": ROOT, "cid": "bafy"});
        create(
            &format!("app.bsky.feed.post/{key}"),
            json!({"text": "", "reply": {"root": reference, "parent": reference}}),
        )
    };
    let late = |number: u64, days: u64, op: Json| {
        let repo = format!("did:plc:fan{number}");
        let entry = entry(number, &repo, &[op]);
        Entry { id: EntryId { ms: made + days * DAY, seq: number }, ..entry }
    };
    let again = |days: u64| Entry {
        id: EntryId { ms: made + days * DAY, seq: 0 },
        ..late(6, 0, like("twice", ROOT))
    };
    for mode in [TransactionMode::Event, TransactionMode::Batch] {
        let (url, _) = migrated().await;
        let (config, _) =
            from_env([("DATABASE_URL", url.as_str()), ("NOTIFY_WITHIN", "7d")], Role::Worker).unwrap();
        let store = Store::new(&config).unwrap();
        let entries = [
            late(1, 6, like("young", ROOT)),
            late(2, 8, like("old", ROOT)),
            late(3, 6, follow("young")),
            late(4, 8, follow("old")),
            late(5, 6, reply("young")),
            late(7, 8, reply("old")),
            again(9),
        ];
        apply(&store, mode, &entries).await;
        let told = "SELECT string_agg(split_part(split_part(uri, '/', 5), '#', 1), ' ' ORDER BY uri) FROM notifications";
        assert_eq!(query_value(&url, told).await, "young young young", "{mode:?}");
        apply(&store, mode, &[again(2)]).await;
        assert_eq!(query_value(&url, told).await, "young young young twice", "{mode:?}");
        apply(&store, mode, &[again(10)]).await;
        assert_eq!(query_value(&url, told).await, "young young young twice", "{mode:?}");
        assert_eq!(query_value(&url, "SELECT count(*) FROM likes").await, "3");
    }
}
