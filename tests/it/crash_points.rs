//! The process dies at every durable boundary and is restarted, and the tables are as after an undisturbed
//! run. `src/crash.rs` states what recovery has to do at each point.

use crate::support::chain::{Chain, Program, RUN, SOON, STREAM, network};
use crate::support::{Signal, Standpipe, connect, query_value, wait_until};
use standpipe::crash::{ALL, Point};

/// The exit code that a shell reports for a process ended by SIGABRT.
const ABORTED: i32 = 128 + 6;

/// Starts `command` so that it dies at this point, and checks that it did.
async fn dies(chain: &Chain, command: &str, point: Point, times: u32) {
    let variables = chain
        .variables()
        .with("BATCH_SIZE", "50")
        .with("CLAIM_IDLE", "10s")
        .with("STANDPIPE_CRASH_AT", format!("{}:{times}", point.name()));
    let mut program = Program::start(command, &variables).await;
    assert_eq!(program.wait_exit(RUN).await, ABORTED, "{}", program.output());
    let said = format!("crash point {} reached", point.name());
    assert!(program.stderr().contains(&said), "{}", program.output());
}

/// Adds entries that can never be applied.
async fn poison(chain: &Chain) {
    let mut redis = chain.redis.connection().await;
    for seq in 0..3 {
        let _: String = redis::cmd("XADD")
            .arg(&[STREAM, "*", "type", "commit", "data", "{", "seq", &seq.to_string()])
            .query_async(&mut redis)
            .await
            .unwrap();
    }
}

async fn recovers_from(point: Point, times: u32) {
    let chain = Chain::start(&network(2_000), None).await;
    dies(&chain, "run", point, times).await;
    let program = Program::start("run", &chain.variables()).await;
    chain.ends_like_an_undisturbed_run().await;
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn recovers_from_a_crash_after_an_append() {
    recovers_from(Point::AfterAppend, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn recovers_from_a_crash_after_a_read() {
    recovers_from(Point::AfterRead, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recovers_from_a_crash_in_a_transaction() {
    const CALLS: &str = "FROM pg_stat_activity WHERE query LIKE '%CALL standpipe.apply_each%'
                         AND wait_event_type = 'Lock' AND datname = current_database()";
    // The server rolls the open transaction back, or does not notice that nobody listens: then it finishes the
    // call, beside the process that was started meanwhile.
    for rolled_back in [true, false] {
        let chain = Chain::start(&network(2_000), None).await;
        let variables = chain.variables();
        assert_eq!(Standpipe::run(&["migrate"], &variables, SOON).await.code, 0);
        // The pipelines wait in the middle of a transaction: their locks are taken, and rows may be written.
        let barrier = connect(&chain.database).await;
        barrier.batch_execute("BEGIN; LOCK TABLE likes IN EXCLUSIVE MODE").await.unwrap();
        let mut program = Program::start("run", &variables).await;
        let open = async || query_value(&chain.database, &format!("SELECT count(*) {CALLS}")).await;
        wait_until("a transaction to be open", RUN, async || open().await != "0").await;
        program.signal(Signal::Kill);
        assert_eq!(program.wait_exit(SOON).await, 128 + 9, "{}", program.output());
        assert_ne!(open().await, "0", "the server noticed");
        if rolled_back {
            query_value(&chain.database, &format!("SELECT count(pg_terminate_backend(pid)) {CALLS}")).await;
            wait_until("the server to roll back", SOON, async || open().await == "0").await;
        }
        barrier.batch_execute("ROLLBACK").await.unwrap();
        assert!(chain.look().await.pending > 0, "nothing was in hand");
        let program = Program::start("run", &variables).await;
        chain.ends_like_an_undisturbed_run().await;
        drop(program);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn recovers_from_a_crash_between_commit_and_flush() {
    recovers_from(Point::AfterCommit, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn recovers_from_a_crash_between_flush_and_acknowledgement() {
    recovers_from(Point::AfterFlush, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn recovers_from_a_crash_before_or_after_a_dead_letter() {
    for point in [Point::BeforeDeadLetter, Point::AfterDeadLetter] {
        let chain = Chain::start(&network(500), None).await;
        poison(&chain).await;
        dies(&chain, "run", point, 2).await;
        let program = Program::start("run", &chain.variables()).await;
        wait_until("everything to be acknowledged", RUN, async || {
            chain.look().await.is_finished(chain.relay.last_seq)
        })
        .await;
        assert_eq!(chain.look().await.dead_letters, 3, "after {}: each once", point.name());
        let audit = chain.audit(&[]).await;
        assert_eq!(audit.code, 0, "{}", audit.stdout);
        drop(program);
    }
}

/// One process dies with entries in hand, the one that claims them dies too, and a third one finishes them.
#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn recovers_from_a_crash_while_claiming() {
    let chain = Chain::start(&network(2_000), None).await;
    dies(&chain, "run", Point::AfterRead, 4).await;
    assert!(chain.look().await.pending > 0, "nothing was left in hand");
    let second = chain
        .variables()
        .with("CONSUMER_ID", "second")
        .with("CLAIM_IDLE", "10s")
        .with("STANDPIPE_CRASH_AT", Point::WhileClaiming.name());
    let mut second = Program::start("run", &second).await;
    assert_eq!(second.wait_exit(RUN).await, ABORTED, "{}", second.output());
    let third = chain.variables().with("CONSUMER_ID", "third").with("CLAIM_IDLE", "10s");
    let third = Program::start("run", &third).await;
    chain.ends_like_an_undisturbed_run().await;
    drop(third);
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn recovers_from_a_crash_during_a_migration() {
    let chain = Chain::start(&network(500), None).await;
    let variables = chain.variables().with("STANDPIPE_CRASH_AT", Point::InMigration.name());
    let died = Standpipe::run(&["migrate"], &variables, SOON).await;
    assert_eq!(died.code, ABORTED, "{}", died.stderr);
    assert!(died.stderr.contains("crash point in-migration reached"), "{}", died.stderr);
    let program = Program::start("run", &chain.variables()).await;
    chain.ends_like_an_undisturbed_run().await;
    drop(program);
}

/// A crash point that no test exercises would be worthless.
#[test]
fn every_crash_point_has_a_test() {
    let tests = concat!(
        include_str!("crash_points.rs"),
        include_str!("bulk.rs"),
        include_str!("repairs.rs"),
        include_str!("ingest.rs"),
        include_str!("handlers.rs")
    );
    for point in ALL {
        assert!(tests.contains(&format!("Point::{point:?}")), "{point:?} has no test");
    }
}
