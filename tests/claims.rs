//! What a consumer of another program leaves when it dies.

mod support;

use serde_json::json;
use support::chain::{GROUP, Program, RUN, STREAM, Variables, look, redis_command};
use support::{Postgres, Redis, Standpipe, query_value, wait_until};

const ENTRIES: usize = 24_000;

/// A Redis whose stream holds so many entries, and a migrated database.
async fn stream_of_likes() -> (Redis, String, Variables) {
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
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
            let data = json!({"repo": format!("did:plc:{}", n % 500), "ops": [{
                "action": "create", "path": format!("app.bsky.feed.like/{n}"), "cid": "bafy",
                "record": {"subject": {"uri": format!("at://did:plc:b/app.bsky.feed.post/{}", n % 700), "cid": "bafy"},
                           "createdAt": "2026-01-01T00:00:00Z"}}]});
            pipe.cmd("XADD").arg(STREAM).arg("*").arg("type").arg("commit");
            pipe.arg("data").arg(data.to_string()).arg("seq").arg(n + 1).ignore();
        }
        pipe.query_async::<()>(&mut connection).await.unwrap();
    }
    (redis, database, variables)
}

/// Processor seconds that a worker takes until everything is acknowledged.
async fn drains(redis: &Redis, database: &str, variables: &Variables) -> f64 {
    let program = Program::start("worker", variables).await;
    wait_until("everything to be acknowledged", RUN, async || look(redis).await.unwrap().is_drained()).await;
    let likes = query_value(database, "SELECT count(*) FROM likes").await;
    assert_eq!(likes, ENTRIES.to_string());
    program.cpu_seconds()
}

#[tokio::test(flavor = "multi_thread")]
async fn to_claim_what_a_dead_program_left_costs_little_more_than_what_is_new() {
    let (redis, database, variables) = stream_of_likes().await;
    let new = drains(&redis, &database, &variables).await;

    let (redis, database, variables) = stream_of_likes().await;
    for _ in 0..ENTRIES / 500 {
        let read = ["XREADGROUP", "GROUP", GROUP, "dead", "COUNT", "500", "STREAMS", STREAM, ">"];
        let _: redis::Value = redis_command(&redis, &read).await;
    }
    assert_eq!(look(&redis).await.unwrap().pending, ENTRIES as u64);
    let claimed = drains(&redis, &database, &variables).await;
    println!("processor seconds: {new:.2} for new entries, {claimed:.2} for those that a dead program held");
    // At the start all of them are applied once before the first entry, and again when they are claimed. Before they were
    // looked at once for all, it was twenty-seven times as much.
    assert!(claimed < 6.0 * new + 2.0, "{claimed:.2} s against {new:.2} s");
}
