//! Pending entries: those that a dead consumer of another program leaves behind, and those that we have in hand.

use crate::support::chain::{GROUP, Program, RUN, STREAM, Variables, look, redis_command};
use crate::support::{Postgres, Redis, Standpipe, connect, query_rows, query_value, wait_until};
use serde_json::json;
use standpipe_lab::bench::machine;

const ENTRIES: usize = 24_000;

fn like(n: usize) -> String {
    json!({"repo": format!("did:plc:{}", n % 500), "ops": [{
        "action": "create", "path": format!("app.bsky.feed.like/{n}"), "cid": "bafy",
        "record": {"subject": {"uri": format!("at://did:plc:b/app.bsky.feed.post/{}", n % 700), "cid": "bafy"},
                   "createdAt": "2026-01-01T00:00:00Z"}}]})
    .to_string()
}

/// A Redis whose stream holds [`ENTRIES`] likes, and a migrated database.
async fn stream_of_likes() -> (Redis, Postgres, String, Variables) {
    let redis = Redis::start().await;
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("CLAIM_IDLE", "10s");
    let migrated = Standpipe::run(&["migrate"], &variables, RUN).await;
    assert_eq!(migrated.code, 0, "{}", migrated.stderr);
    let _: String = redis_command(&redis, &["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    let mut connection = redis.connection().await;
    for chunk in (0..ENTRIES).collect::<Vec<_>>().chunks(1_000) {
        let mut pipe = redis::pipe();
        for n in chunk {
            pipe.cmd("XADD").arg(STREAM).arg("*").arg("type").arg("commit");
            pipe.arg("data").arg(like(*n)).arg("seq").arg(n + 1).ignore();
        }
        pipe.query_async::<()>(&mut connection).await.unwrap();
    }
    (redis, postgres, database, variables)
}

/// CPU seconds used by a worker, PostgreSQL and Redis until everything is acknowledged.
async fn drains(redis: &Redis, postgres: &Postgres, database: &str, variables: &Variables) -> [f64; 3] {
    let cpu = |pid: Option<u32>| pid.and_then(machine::cpu).unwrap_or_default();
    let servers = || {
        let running: f64 = postgres.all_pids().into_iter().map(|pid| cpu(Some(pid)).own).sum();
        (running + cpu(postgres.pid()).ended_children, cpu(redis.pid()).own)
    };
    let before = servers();
    let program = Program::start("worker", variables).await;
    wait_until("everything to be acknowledged", RUN, async || look(redis).await.unwrap().is_drained()).await;
    let after = servers();
    let ours = program.cpu_seconds();
    let likes = query_value(database, "SELECT count(*) FROM likes").await;
    assert_eq!(likes, ENTRIES.to_string());
    [ours, after.0 - before.0, after.1 - before.1]
}

#[tokio::test(flavor = "multi_thread")]
async fn claiming_a_dead_programs_entries_costs_little_more_than_new_ones() {
    let (redis, postgres, database, variables) = stream_of_likes().await;
    let new = drains(&redis, &postgres, &database, &variables).await;

    let (redis, postgres, database, variables) = stream_of_likes().await;
    for _ in 0..ENTRIES / 500 {
        let read = ["XREADGROUP", "GROUP", GROUP, "dead", "COUNT", "500", "STREAMS", STREAM, ">"];
        let _: redis::Value = redis_command(&redis, &read).await;
    }
    assert_eq!(look(&redis).await.unwrap().pending, ENTRIES as u64);
    let claimed = drains(&redis, &postgres, &database, &variables).await;
    println!(
        "processor seconds of worker, PostgreSQL and Redis: {new:.2?} for new entries, {claimed:.2?} for those that a dead program held"
    );
    // Later entries are scanned once for all claimed ones. Scanning them for each page cost twenty-seven times as much; now it
    // is about the same, and can be twice as much on a busy machine.
    let sum = |of: [f64; 3]| of.iter().sum::<f64>();
    assert!(sum(claimed) < 4.0 * sum(new), "{claimed:.2?} s against {new:.2?} s");
    assert!(claimed[0] < 4.0 * new[0], "{claimed:.2?} s against {new:.2?} s");
}

/// A migrated database, and a stream with its group.
async fn migrated(redis: &Redis) -> (String, Variables) {
    let database = Postgres::shared().await.fresh_database().await;
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", &database);
    assert_eq!(Standpipe::run(&["migrate"], &variables, RUN).await.code, 0);
    let _: String = redis_command(redis, &["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    (database, variables)
}

/// The other program has created a like and deleted it, and acknowledged only the creation: we must not bring
/// the like back.
#[tokio::test(flavor = "multi_thread")]
async fn a_like_deleted_by_an_unacknowledged_entry_is_not_brought_back() {
    let redis = Redis::start().await;
    let (database, variables) = migrated(&redis).await;
    let delete = json!({"repo": "did:plc:2", "ops": [{"action": "delete", "path": "app.bsky.feed.like/2"}]});
    let mut ids = Vec::new();
    for (data, seq) in [(like(1), "1"), (like(2), "2"), (delete.to_string(), "3")] {
        let add = ["XADD", STREAM, "*", "type", "commit", "data", &data, "seq", seq];
        ids.push(redis_command::<String>(&redis, &add).await);
    }
    let read = ["XREADGROUP", "GROUP", GROUP, "other", "STREAMS", STREAM, ">"];
    let _: redis::Value = redis_command(&redis, &read).await;
    assert_eq!(redis_command::<u64>(&redis, &["XACK", STREAM, GROUP, &ids[1]]).await, 1);

    let mut program = Program::start("worker", &variables).await;
    program.wait_for_line("replayed entries that another program left pending", RUN).await;
    // The replay is over. Now the other program acknowledges the deletion, and dies.
    assert_eq!(redis_command::<u64>(&redis, &["XACK", STREAM, GROUP, &ids[2]]).await, 1);
    let applied = "SELECT uri FROM standpipe.tombstones";
    assert_eq!(query_rows(&database, applied).await.len(), 1, "the deletion was not applied with the like");
    assert_eq!(query_value(&database, "SELECT count(*) FROM likes").await, "0");
}

/// A worker whose only entry, a like, waits for a lock that the returned connection holds.
async fn one_entry_in_hand(redis: &Redis, claim_idle: &str) -> (String, tokio_postgres::Client, Program) {
    let (database, variables) = migrated(redis).await;
    let variables = variables.with("PARALLEL_CONSUMERS", "2").with("CLAIM_IDLE", claim_idle);
    let barrier = connect(&database).await;
    barrier.batch_execute("BEGIN; LOCK TABLE likes IN EXCLUSIVE MODE").await.unwrap();
    let program = Program::start("worker", &variables).await;
    let _: String =
        redis_command(redis, &["XADD", STREAM, "*", "type", "commit", "data", &like(1), "seq", "1"]).await;
    wait_until("the entry to be in hand", RUN, async || !pending(redis).await.is_empty()).await;
    (database, barrier, program)
}

/// The pending entries: id, consumer, milliseconds since the last delivery, number of deliveries.
async fn pending(redis: &Redis) -> Vec<(String, String, u64, u64)> {
    redis_command(redis, &["XPENDING", STREAM, GROUP, "-", "+", "10"]).await
}

/// Programs that do not know our lease claim what has been idle for ten seconds.
#[tokio::test(flavor = "multi_thread")]
async fn entries_in_hand_never_look_idle_while_the_database_is_slow() {
    let redis = Redis::start().await;
    let (database, barrier, program) = one_entry_in_hand(&redis, "1h").await;
    let mut most = 0;
    wait_until("the entry to be kept fresh", RUN, async || {
        let (_, _, idle, deliveries) = pending(&redis).await.remove(0);
        assert_eq!(deliveries, 1, "keeping it fresh counts as a delivery");
        let was_kept_fresh = idle + 1_000 < most;
        most = most.max(idle);
        assert!(most < 9_000, "it has looked idle for {most} ms");
        was_kept_fresh
    })
    .await;
    barrier.batch_execute("ROLLBACK").await.unwrap();
    wait_until("the like to be applied", RUN, async || look(&redis).await.unwrap().is_drained()).await;
    assert_eq!(query_value(&database, "SELECT count(*) FROM likes").await, "1");
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_does_not_work_on_what_another_pipeline_of_its_process_has_in_hand() {
    let redis = Redis::start().await;
    let (database, barrier, program) = one_entry_in_hand(&redis, "10s").await;
    let (id, owner, ..) = pending(&redis).await.remove(0);
    // As if the process had been unable to keep it fresh.
    wait_until("the other pipeline to claim it", RUN, async || {
        if pending(&redis).await.remove(0).1 != owner {
            return true;
        }
        let idle = ["XCLAIM", STREAM, GROUP, &owner, "0", &id, "IDLE", "20000", "JUSTID"];
        let _: redis::Value = redis_command(&redis, &idle).await;
        false
    })
    .await;
    barrier.batch_execute("ROLLBACK").await.unwrap();
    wait_until("the like to be applied", RUN, async || look(&redis).await.unwrap().is_drained()).await;
    assert_eq!(query_value(&database, "SELECT count(*) FROM likes").await, "1");
    assert_eq!(program.metric("standpipe_claimed_entries_total").await, 0.0, "{}", program.output());
}

/// While we replay what the other program acknowledged, it goes on, and may undo what we have just applied.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_program_does_during_a_replay_is_replayed_too() {
    let redis = Redis::start().await;
    let (database, variables) = migrated(&redis).await;
    let add = async |data: &str, seq: &str| -> String {
        redis_command(&redis, &["XADD", STREAM, "*", "type", "commit", "data", data, "seq", seq]).await
    };
    let take = async || {
        let read = ["XREADGROUP", "GROUP", GROUP, "other", "STREAMS", STREAM, ">"];
        let _: redis::Value = redis_command(&redis, &read).await;
    };
    let acknowledge = async |id: &str| {
        assert_eq!(redis_command::<u64>(&redis, &["XACK", STREAM, GROUP, id]).await, 1);
    };
    add(&like(1), "1").await;
    let second = add(&like(2), "2").await;
    take().await;
    acknowledge(&second).await;

    let barrier = connect(&database).await;
    barrier.batch_execute("BEGIN; LOCK TABLE likes IN EXCLUSIVE MODE").await.unwrap();
    let mut program = Program::start("worker", &variables).await;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%standpipe.apply%'
                   AND wait_event_type = 'Lock' AND datname = current_database()";
    wait_until("the replay to wait", RUN, async || query_value(&database, waiting).await != "0").await;
    let delete = json!({"repo": "did:plc:2", "ops": [{"action": "delete", "path": "app.bsky.feed.like/2"}]});
    let third = add(&delete.to_string(), "3").await;
    take().await;
    acknowledge(&third).await;
    barrier.batch_execute("ROLLBACK").await.unwrap();
    program.wait_for_line("replayed entries that another program left pending", RUN).await;
    assert_eq!(query_rows(&database, "SELECT uri FROM standpipe.tombstones").await.len(), 1);
    assert_eq!(query_value(&database, "SELECT count(*) FROM likes WHERE uri LIKE '%/2'").await, "0");
}
