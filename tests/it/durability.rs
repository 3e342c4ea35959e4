//! Acknowledged events are on disk, whatever crashes: invariants 1, 2 and 4 under server crashes.
//!
//! The PostgreSQL servers here are the tests' own, with `fsync` and `synchronous_commit` on.

use std::fs;
use std::time::Duration;

use crate::support::chain::{CURSOR, Chain, Program, RUN, SOON, look, network, redis_command};
use crate::support::gate::{Gate, Hold};
use crate::support::{
    Postgres, Signal, TcpProxy, connect, execute, query_rows, query_value, wait_for, wait_until,
};
use serde_json::json;
use standpipe::apply::{Context, interpret};
use standpipe::config::{Role, TransactionMode, from_env};
use standpipe::event::Entry;
use standpipe::event::{EntryId, Epochs, Event};
use standpipe::store::{Fate, Session, Store, migrate};
use standpipe_lab::servers::{PostgresOptions, send_signal};

const EVENTS: u64 = 6_000;
const RATE: u32 = 3_000;

/// A server whose background processes write no WAL to disk for many seconds: anything on disk got there by a
/// flush.
async fn lazy_postgres() -> Postgres {
    let settings = [
        ("wal_writer_delay", "10s"),
        ("wal_writer_flush_after", "1GB"),
        ("bgwriter_lru_maxpages", "0"),
        ("autovacuum", "off"),
        ("checkpoint_timeout", "1h"),
        ("max_wal_size", "4GB"),
        ("wal_buffers", "64MB"),
    ];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let postgres = Postgres::start_with(PostgresOptions { settings, ..Postgres::options() }).await;
    let url = postgres.url("postgres");
    assert_eq!(query_value(&url, "SHOW fsync").await, "on");
    assert_eq!(query_value(&url, "SHOW synchronous_commit").await, "on");
    postgres
}

/// Bytes of WAL that are not on disk yet.
async fn unflushed(database: &str) -> i64 {
    let sql = "SELECT (pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn())::bigint";
    query_value(database, sql).await.parse().unwrap()
}

/// Entries with one like each.
fn likes(from: u64, count: u64) -> Vec<Entry> {
    let like = |number: u64| {
        let data = json!({
            "repo": format!("did:plc:{number:024}"),
            "rev": "3n2samfdihk2n",
            "ops": [{
                "action": "create", "path": format!("app.bsky.feed.like/{number}"), "cid": "bafyreilike",
                "record": {
                    "$type": "app.bsky.feed.like", "createdAt": "2026-11-21T04:17:51.287Z",
                    "subject": {"cid": "bafyreipost", "uri": "at://did:plc:post/app.bsky.feed.post/1"},
                },
            }],
        });
        Entry {
            id: EntryId { ms: 1_763_700_000_000 + number, seq: 0 },
            event_type: "commit".to_owned(),
            data: data.to_string(),
            seq: number.to_string(),
        }
    };
    (from..from + count).map(like).collect()
}

async fn apply(session: &Session, events: &[&Event<'_>]) {
    for fate in session.apply(events, TransactionMode::Event).await.unwrap() {
        assert!(matches!(fate, Fate::Applied(_)), "{fate:?}");
    }
}

#[tokio::test]
async fn the_flush_moves_the_wal_flush_position_past_the_batch() {
    let postgres = lazy_postgres().await;
    let database = postgres.fresh_database().await;
    let observer = connect(&database).await;
    let position = async |which: &str| -> i64 {
        let sql = format!("SELECT ({which}() - '0/0')::bigint");
        observer.query_one(&sql, &[]).await.unwrap().get(0)
    };
    let mut number = 0;
    for setting in ["on", "off", "local", "remote_write", "remote_apply"] {
        let url = format!("{database}?options=-c%20synchronous_commit%3D{setting}");
        let (config, _) =
            from_env([("DATABASE_URL", url.as_str()), ("NOTIFY_WITHIN", "off")], Role::Worker).unwrap();
        let store = Store::new(&config).unwrap();
        let mut session = store.session().await.unwrap();
        migrate::migrate(session.client_mut()).await.unwrap();
        let synchronous_commit = async || -> String {
            session.client().query_one("SHOW synchronous_commit", &[]).await.unwrap().get(0)
        };
        assert_eq!(synchronous_commit().await, setting);

        let mut proved = false;
        // If the server has written the WAL by itself after all, the flush has proved nothing.
        for _ in 0..5 {
            let entries = likes(number, 20);
            number += 20;
            let events: Vec<Event<'_>> = entries
                .iter()
                .map(|entry| interpret(entry, Context::now(&Epochs::UNNAMED)).unwrap())
                .collect();
            let events: Vec<&Event<'_>> = events.iter().collect();
            apply(&session, &events).await;
            let applied = position("pg_current_wal_insert_lsn").await;
            let by_itself = position("pg_current_wal_flush_lsn").await >= applied;
            assert_eq!(synchronous_commit().await, setting, "after the apply");

            session.flush(&events).await.unwrap();
            let flushed = position("pg_current_wal_flush_lsn").await;
            assert!(flushed >= applied, "{setting}: flushed to {flushed}, the batch ends at {applied}");
            assert_eq!(synchronous_commit().await, setting, "after the flush");
            if !by_itself {
                proved = true;
                break;
            }
        }
        assert!(proved, "{setting}: the server wrote its log before every flush");
    }
    assert_eq!(query_value(&database, "SELECT count(*) FROM likes").await, number.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_a_server_process_between_commit_and_flush_loses_nothing() {
    let postgres = lazy_postgres().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), None, database.clone()).await;
    let mut reader = Program::start("reader", &chain.variables()).await;
    wait_until("every event to be in the stream", RUN, async || {
        chain.look().await.cursor == Some(chain.relay.last_seq)
    })
    .await;
    reader.signal(Signal::Term);
    assert_eq!(reader.wait_exit(SOON).await, 0);

    let gate = Gate::for_url(&database).await;
    let variables =
        chain.variables().with("DATABASE_URL", gate.url_through(&database)).with("PARALLEL_CONSUMERS", "2");
    let mut worker = Program::start("worker", &variables).await;
    worker.finishes_more(1_000.0).await;

    // The WAL writer hands full pages to the kernel, where they survive a crash of the server's processes.
    let log_writer = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'";
    let log_writer = query_value(&database, log_writer).await.parse().unwrap();
    send_signal(Signal::Stop, &[log_writer]).unwrap();
    // From now on batches are applied, and their calls answered, but no flush arrives.
    gate.hold(Hold { flushes: true, newcomers: true, ..Hold::default() });
    wait_until("both pipelines to stand before their flush", SOON, async || gate.flushes_held() == 2).await;
    let visible = query_rows(&database, "SELECT uri FROM likes ORDER BY uri").await;
    let held = chain.look().await;
    assert!(held.pending > 0, "{held:?}");
    assert!(unflushed(&database).await > 0, "the server has flushed by itself");

    let started = query_value(&database, "SELECT pg_postmaster_start_time()").await;
    let victim = "SELECT pid FROM pg_stat_activity WHERE application_name = 'standpipe' AND state = 'idle'";
    let victim = query_value(&database, victim).await.parse().unwrap();
    send_signal(Signal::Kill, &[victim]).unwrap();
    let what = format!("(PID {victim}) was terminated by signal 9");
    wait_until("the crash in the server's log", SOON, async || {
        fs::read_to_string(postgres.log_file()).unwrap().contains(&what)
    })
    .await;
    // A stopped process would not react to being told to exit.
    send_signal(Signal::Kill, &[log_writer]).unwrap();
    // The server disconnects everybody and replays its WAL; there is nothing to compare before that is over.
    wait_until("the server to be back", SOON, async || {
        let log = fs::read_to_string(postgres.log_file()).unwrap();
        log[log.find(&what).unwrap()..].contains("database system is ready to accept connections")
    })
    .await;
    assert_eq!(query_value(&database, "SELECT pg_postmaster_start_time()").await, started);
    let left = query_rows(&database, "SELECT uri FROM likes ORDER BY uri").await;
    let lost = visible.iter().filter(|uri| left.binary_search(uri).is_err()).count();
    assert!(lost > 0, "all {} likes are still there: the crash has lost nothing", visible.len());
    assert_eq!(chain.look().await.pending, held.pending, "something was acknowledged without a flush");

    gate.hold(Hold::default());
    chain.ends_like_an_undisturbed_run().await;
    worker.metric_with_rises("standpipe_retries_total", "reconnect", 0.0).await;
    assert!(worker.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_is_applied_after_redis_restarts_with_a_truncated_aof() {
    const CUT: u64 = 100_000;
    // Enough that some are left by the time the program is seen to work.
    const MORE: u64 = 20_000;
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let mut chain = Chain::with_database(&network(MORE), Some(RATE), database.clone()).await;
    let gate = Gate::for_url(&database).await;
    // So that the program does not see the restarted Redis before the test does.
    let proxy = TcpProxy::for_url(&chain.redis.url()).await;
    let variables = chain
        .variables()
        .with("REDIS_URL", proxy.url_through(&chain.redis.url()))
        .with("DATABASE_URL", gate.url_through(&database));
    let mut program = Program::start("run", &variables).await;
    program.finishes_more(300.0).await;
    // The lost entries must not have been applied before, or their loss would go unnoticed.
    gate.hold(Hold { flushes: true, ..Hold::default() });
    let held = chain.look().await.length;
    wait_until("entries that nobody got", RUN, async || {
        // Five pipelines hold at most 200 each.
        gate.flushes_held() == 5 && chain.look().await.length > held + 2_000
    })
    .await;

    proxy.refuse(true);
    let before = chain.look().await.cursor;
    chain.redis.sigkill().await.unwrap();
    assert_eq!(chain.redis.truncate_aof_tail(CUT).unwrap(), CUT);
    chain.redis.start_again().await.unwrap();
    let after = chain.look().await;
    assert!(after.cursor < before, "the cursor was {before:?} before and is {:?} after", after.cursor);
    assert!(before < Some(chain.relay.last_seq), "the run was over");
    let applied = program.entries().await;
    proxy.refuse(false);
    gate.hold(Hold::default());

    chain.ends_like_an_undisturbed_run().await;
    // The relay made up for the loss: it sent the truncated events a second time.
    assert!(chain.relay.frames_sent() > MORE, "the relay sent nothing twice");
    assert!(program.entries().await > applied);
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_was_lost_is_safely_applied_again() {
    const TIMES: u64 = 4;
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), None, database.clone()).await;
    let gate = Gate::for_url(&database).await;
    // Small batches: many attempts fit into the run, and on a busy machine many of them find nothing.
    let variables =
        chain.variables().with("DATABASE_URL", gate.url_through(&database)).with("BATCH_SIZE", "20");
    let mut program = Program::start("run", &variables).await;

    let rows = async || -> u64 {
        let sql = "SELECT (SELECT count(*) FROM likes) + (SELECT count(*) FROM posts) + (SELECT count(*) FROM follows)
                        + (SELECT count(*) FROM standpipe.tombstones)";
        query_value(&database, sql).await.parse().unwrap()
    };
    let mut lost = 0;
    while lost < TIMES {
        program.finishes_more(50.0).await;
        gate.hold(Hold { answers: true, ..Hold::default() });
        // Rows that become visible from now on are committed from now on, and the answers are held.
        let before = rows().await;
        let held = gate.answer_bytes_held();
        let committed = tokio::time::timeout(Duration::from_secs(1), async {
            while rows().await == before || gate.answer_bytes_held() == held {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        // All pipelines may have been about to flush: then nothing is committed, and we try again.
        lost += u64::from(committed.await.is_ok());
        gate.cut_all();
        gate.hold(Hold::default());
        assert!(!chain.look().await.is_finished(chain.relay.last_seq), "the run was over after {lost} times");
    }
    wait_until("the cuts to have happened", SOON, async || gate.cuts() >= TIMES).await;
    program.metric_with_rises("standpipe_retries_total", "reconnect", 0.0).await;
    let stale = program.metric_with("standpipe_operations_total", "stale").await;
    chain.ends_like_an_undisturbed_run().await;
    // Events whose commit was not answered were applied again and met their own rows.
    program.metric_with_rises("standpipe_operations_total", "stale", stale).await;
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn cutting_postgresql_connections_at_any_moment_loses_nothing() {
    const TIMES: u64 = 8;
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), None, database.clone()).await;
    let proxy = TcpProxy::for_url(&database).await;
    let mut program =
        Program::start("run", &chain.variables().with("DATABASE_URL", proxy.url_through(&database))).await;
    for _ in 0..TIMES {
        program.finishes_more(200.0).await;
        wait_for("connections to cut", SOON, async || match proxy.cut_all().await {
            0 => Err("there are none"),
            _ => Ok(()),
        })
        .await;
    }
    assert!(proxy.cuts() >= TIMES);
    assert!(!chain.look().await.is_finished(chain.relay.last_seq), "the run was over before the last cut");
    chain.ends_like_an_undisturbed_run().await;
    assert!(program.is_running());
}

/// Everything at once: Redis loses the end of its AOF and PostgreSQL crashes, repeatedly, in the same run.
#[tokio::test(flavor = "multi_thread")]
async fn crashing_both_servers_repeatedly_loses_nothing() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let mut chain = Chain::with_database(&network(EVENTS), Some(RATE), database.clone()).await;
    let mut program = Program::start("run", &chain.variables()).await;
    for round in 1..=2 {
        let goal = chain.relay.last_seq * round / 4;
        wait_until("more events in the stream", RUN, async || {
            look(&chain.redis).await.is_ok_and(|look| look.cursor >= Some(goal) && look.pending > 0)
        })
        .await;
        chain.redis.sigkill().await.unwrap();
        assert!(chain.redis.truncate_aof_tail(20_000).unwrap() > 0);
        postgres.sigkill().await.unwrap();
        chain.redis.start_again().await.unwrap();
        postgres.start_again().await.unwrap();
        assert!(!chain.look().await.is_finished(chain.relay.last_seq), "the run was over");
    }
    chain.ends_like_an_undisturbed_run().await;
    assert!(program.is_running());
    execute(&database, "CHECKPOINT").await;
    let position: Option<String> = redis_command(&chain.redis, &["GET", CURSOR]).await;
    assert_eq!(position, Some(chain.relay.last_seq.to_string()));
}
