//! How many entries a pipeline processes together.

use crate::support::chain::{GROUP, Program, RUN, STREAM, Variables, look, redis_command};
use crate::support::{Postgres, Redis, wait_until};
use serde_json::json;

/// A Redis with this many commits of one record each, and a worker with one pipeline to read them.
async fn stream_of_records(entries: usize, bytes: usize) -> (Redis, Variables) {
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    let _: String = redis_command(&redis, &["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    for n in 0..entries {
        let op = json!({"action": "create", "path": format!("com.example.text/{n}"), "cid": "bafy",
                        "record": {"$type": "com.example.text", "text": "x".repeat(bytes)}});
        let data = json!({"repo": "did:plc:a", "ops": [op]}).to_string();
        let seq = (n + 1).to_string();
        let words = ["XADD", STREAM, "*", "type", "commit", "data", &data, "seq", &seq];
        let _: String = redis_command(&redis, &words).await;
    }
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("CONSUMER_ID", "worker")
        .with("PARALLEL_CONSUMERS", "1")
        .with("BATCH_SIZE", "100");
    (redis, variables)
}

async fn drained(redis: &Redis) {
    wait_until("everything to be acknowledged", RUN, async || look(redis).await.unwrap().is_drained()).await;
}

/// It may be the entry that crashes the process: its neighbours must get through.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_delivered_too_often_is_processed_alone() {
    let (redis, variables) = stream_of_records(50, 10).await;
    let read = ["XREADGROUP", "GROUP", GROUP, "worker-0", "COUNT", "50", "STREAMS", STREAM, ">"];
    let _: redis::Value = redis_command(&redis, &read).await;
    let entries: Vec<(String, Vec<String>)> = redis_command(&redis, &["XRANGE", STREAM, "-", "+"]).await;
    let words = ["XCLAIM", STREAM, GROUP, "worker-0", "0", &entries[20].0, "RETRYCOUNT", "99", "JUSTID"];
    let _: redis::Value = redis_command(&redis, &words).await;
    let program = Program::start("worker", &variables.with("MAX_ATTEMPTS", "5")).await;
    drained(&redis).await;
    program.metric_is("standpipe_batch_entries_count", 2.0).await;
    program.metric_with_is("standpipe_batch_entries_bucket", "le=\"1\"", 1.0).await;
}

/// Large entries come in smaller batches, so that a batch stays below about eight megabytes.
#[tokio::test(flavor = "multi_thread")]
async fn batches_shrink_when_their_entries_are_large() {
    let (redis, variables) = stream_of_records(400, 200_000).await;
    let program = Program::start("worker", &variables).await;
    drained(&redis).await;
    // The first has 100 entries, the second 50, all others 25.
    program.metric_is("standpipe_batch_entries_count", 12.0).await;
}
