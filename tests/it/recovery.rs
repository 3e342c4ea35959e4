//! Everything that can be down, destroyed or bad, and how work resumes by itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::chain::{
    CURSOR, CURSOR_RELAY, Chain, DEAD, GROUP, Look, Program, RUN, Relay, SOON, STREAM, Variables, look,
    network, redis_command,
};
use crate::support::gate::Gate;
use crate::support::{Postgres, Redis, Signal, execute, free_port, query_rows, wait_for, wait_until};
use serde_json::{Value, json};
use standpipe::config::{self, Role};
use standpipe::store::Store;
use standpipe_lab::servers::RedisOptions;

const EVENTS: u64 = 5_000;
const RATE: u32 = 2_500;
const RECREATIONS: &str = "standpipe_group_recreations_total";
const REMOVED: &str = "standpipe_entries_lost_total";
const SET_BACK: &str = "standpipe_reader_set_back_total";
const LOSSES: &str = "standpipe_stream_losses_total";

/// CPU seconds that an idle process may use in [`IDLE`]. A loop without a pause would use all of it.
const IDLE_CPU: f64 = 0.4;
const IDLE: Duration = Duration::from_secs(3);

/// The CPU time that a process uses in [`IDLE`].
async fn cpu_of_idling(program: &Program) -> f64 {
    let (began, before) = (Instant::now(), program.cpu_seconds());
    // CPU time is measured against elapsed time, so there is nothing else to wait for.
    tokio::time::sleep_until((began + IDLE).into()).await;
    program.cpu_seconds() - before
}

// ---------------------------------------------------------------------------------------------
// The stream and its group

#[tokio::test(flavor = "multi_thread")]
async fn a_destroyed_group_is_recreated_and_counted_and_nothing_is_lost() {
    let chain = Chain::start(&network(EVENTS), Some(RATE)).await;
    let mut program = Program::start("run", &chain.variables()).await;
    for _ in 0..3 {
        program.finishes_more(400.0).await;
        let before = program.metric(RECREATIONS).await;
        assert!(!chain.look().await.is_finished(chain.relay.last_seq), "the run was over");
        let destroyed: u64 = redis_command(&chain.redis, &["XGROUP", "DESTROY", STREAM, GROUP]).await;
        assert_eq!(destroyed, 1);
        program.metric_rises(RECREATIONS, before).await;
    }
    chain.ends_like_an_undisturbed_run().await;
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn destroying_the_group_repeatedly_costs_little_cpu_and_few_log_lines() {
    let chain = Chain::start(&network(500), None).await;
    let mut program = Program::start("run", &chain.variables()).await;
    chain.finished().await;

    let (began, cpu, lines) = (Instant::now(), program.cpu_seconds(), program.lines().len());
    let mut connection = chain.redis.connection().await;
    let mut destroyed = 0;
    while began.elapsed() < Duration::from_secs(2) {
        let gone: redis::RedisResult<u64> =
            redis::cmd("XGROUP").arg("DESTROY").arg(STREAM).arg(GROUP).query_async(&mut connection).await;
        destroyed += gone.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (cpu, lines) = (program.cpu_seconds() - cpu, program.lines().len() - lines);
    assert!(destroyed >= 3, "it was there to be destroyed only {destroyed} times");
    assert!(cpu < 1.0, "{cpu} s of processor time in 2 s, {destroyed} groups destroyed");
    assert!(lines < 200, "{lines} lines in 2 s, {destroyed} groups destroyed:\n{}", program.output());

    chain.ends_like_an_undisturbed_run().await;
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_stream_is_detected_and_the_reader_goes_back() {
    let chain = Chain::start(&network(EVENTS), Some(RATE)).await;
    let mut program = Program::start("run", &chain.variables()).await;
    for _ in 0..3 {
        program.finishes_more(400.0).await;
        let before = program.metric(LOSSES).await;
        assert!(!chain.look().await.is_finished(chain.relay.last_seq), "the run was over");
        let deleted: u64 = redis_command(&chain.redis, &["DEL", STREAM]).await;
        assert_eq!(deleted, 1);
        program.metric_rises(LOSSES, before).await;
    }
    chain.ends_like_an_undisturbed_run().await;
    // At least once: right after the janitor's sweep there may be nothing to go back for.
    assert!(chain.relay.counters.connections_total.load(Ordering::SeqCst) >= 2, "the reader never went back");
    assert!(program.is_running());
}

/// Waits until every frame is in the stream, most of them not yet read, and the janitor has seen that.
async fn backlog(chain: &Chain, program: &Program) -> Look {
    wait_for("a backlog", RUN, async || {
        let look = chain.look().await;
        let seen = program.metric("standpipe_stream_entries").await;
        if look.cursor == Some(chain.relay.last_seq)
            && look.pending > 0
            && look.waiting
            && look.length > EVENTS / 2
            && seen == look.length as f64
        {
            Ok(look)
        } else {
            Err(format!("{look:?}, the janitor saw {seen} entries"))
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_deleted_with_a_backlog_is_read_again_from_the_relay() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), Some(RATE), database).await;
    let mut program = Program::start("run", &chain.variables()).await;
    program.finishes_more(300.0).await;
    postgres.pause().await.unwrap();
    let before = backlog(&chain, &program).await;
    let deleted: u64 = redis_command(&chain.redis, &["DEL", STREAM]).await;
    assert_eq!(deleted, 1);
    program.metric_rises(LOSSES, 0.0).await;
    wait_until("the backlog to be there again", RUN, async || {
        let look = chain.look().await;
        look.exists
            && look.group
            && look.cursor == before.cursor
            && chain.relay.frames_sent() > EVENTS + 1_000
    })
    .await;
    postgres.resume().unwrap();

    chain.ends_like_an_undisturbed_run().await;
    assert!(chain.relay.frames_sent() > EVENTS, "the relay sent nothing twice");
    assert!(program.is_running());
}

/// Trims almost everything, pending and waiting entries alike, as the `MAXLEN` of another program's XADD
/// would.
#[tokio::test(flavor = "multi_thread")]
async fn unapplied_entries_trimmed_by_others_are_read_again_from_the_relay() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), Some(RATE), database).await;
    let mut program = Program::start("run", &chain.variables()).await;
    program.finishes_more(300.0).await;
    postgres.pause().await.unwrap();
    let before = backlog(&chain, &program).await;
    let trimmed: u64 = redis_command(&chain.redis, &["XTRIM", STREAM, "MAXLEN", "100"]).await;
    assert!(trimmed > before.pending, "{trimmed} of {before:?}");
    program.metric_rises(SET_BACK, 0.0).await;
    let removed = program.metric(REMOVED).await;
    // Nothing that was trimmed had been acknowledged, except for the little that the janitor had not got
    // round to.
    assert!(removed > 0.9 * trimmed as f64 && removed <= trimmed as f64, "{removed} of {trimmed}");
    postgres.resume().unwrap();

    chain.ends_like_an_undisturbed_run().await;
    assert!(chain.relay.frames_sent() > EVENTS + before.length / 2, "the relay sent too little twice");
    assert_eq!(program.metric(REMOVED).await, removed, "something was found removed twice");
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_trimming_under_load_loses_nothing() {
    let chain = Chain::start(&network(EVENTS), Some(RATE)).await;
    let mut program = Program::start("run", &chain.variables()).await;
    let mut trimmed = 0;
    let began = Instant::now();
    while program.metric(SET_BACK).await < 2.0 {
        assert!(began.elapsed() < RUN, "the reader was not set back twice; {trimmed} trimmed");
        trimmed += redis_command::<u64>(&chain.redis, &["XTRIM", STREAM, "MAXLEN", "0"]).await;
        // Entries that arrive in the meantime are trimmed in the next round.
        program.finishes_more(20.0).await;
    }
    assert!(trimmed > 0);
    chain.ends_like_an_undisturbed_run().await;
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_pending_entries_are_read_again_from_the_relay() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), Some(RATE), database).await;
    let program = Program::start("run", &chain.variables()).await;
    program.finishes_more(300.0).await;
    postgres.pause().await.unwrap();
    backlog(&chain, &program).await;
    let (_, first, last, _): (u64, String, String, Vec<(String, String)>) =
        redis_command(&chain.redis, &["XPENDING", STREAM, GROUP]).await;
    for id in [first, last] {
        assert_eq!(redis_command::<u64>(&chain.redis, &["XDEL", STREAM, &id]).await, 1);
    }
    program.metric_rises(SET_BACK, 0.0).await;
    // It dies with the deleted entries in hand, so that they were never applied.
    program.signal(Signal::Kill);
    drop(program);
    postgres.resume().unwrap();
    let mut program = Program::start("run", &chain.variables()).await;
    chain.ends_like_an_undisturbed_run().await;
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_an_idle_stream_or_group_costs_no_cpu() {
    let chain = Chain::start(&network(500), None).await;
    let mut program = Program::start("run", &chain.variables()).await;
    chain.finished().await;
    for command in [["DEL", STREAM].as_slice(), &["XGROUP", "DESTROY", STREAM, GROUP]] {
        let gone: u64 = redis_command(&chain.redis, command).await;
        assert_eq!(gone, 1);
        let cpu = cpu_of_idling(&program).await;
        assert!(cpu < IDLE_CPU, "{cpu} s of processor time in {IDLE:?} after {command:?}");
        chain.ends_like_an_undisturbed_run().await;
    }
    program.metric_is(LOSSES, 1.0).await;
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_redis_is_refilled_from_the_relay() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), Some(RATE), database).await;
    let mut program = Program::start("run", &chain.variables()).await;
    program.finishes_more(300.0).await;
    postgres.pause().await.unwrap();
    backlog(&chain, &program).await;
    let _: () = redis_command(&chain.redis, &["FLUSHALL"]).await;
    program.wait_for_line("Redis lost the cursor", SOON).await;
    postgres.resume().unwrap();

    chain.ends_like_an_undisturbed_run().await;
    assert!(chain.relay.frames_sent() > EVENTS, "the relay sent nothing twice");
    assert!(program.is_running());
}

// ---------------------------------------------------------------------------------------------
// Signals

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_exits_0_in_time_and_a_restart_finishes_the_work() {
    let chain = Chain::start(&network(EVENTS), None).await;
    // More than can be done in a moment, half of it already in the stream.
    let mut reader = Program::start("reader", &chain.variables()).await;
    let middle = chain.relay.last_seq / 2;
    wait_until("half of the events", RUN, async || chain.look().await.cursor >= Some(middle)).await;
    reader.signal(Signal::Term);
    assert_eq!(reader.wait_exit(SOON).await, 0);
    let mut program = Program::start("run", &chain.variables()).await;
    wait_until("load", SOON, async || chain.look().await.pending > 0 && program.entries().await > 0.0).await;
    program.signal(Signal::Term);
    let began = Instant::now();
    let code = program.wait_exit(SOON).await;
    assert_eq!(code, 0, "{}", program.output());
    // DRAIN_TIMEOUT is 25 s; finishing what five pipelines hold takes a moment.
    assert!(began.elapsed() < Duration::from_secs(15), "it took {:?}", began.elapsed());
    let look = chain.look().await;
    assert_eq!(look.pending, 0, "what was taken was not finished: {look:?}");
    assert!(look.waiting, "there was no load: {look:?}");
    drop(program);

    let mut again = Program::start("run", &chain.variables()).await;
    chain.ends_like_an_undisturbed_run().await;
    again.signal(Signal::Int);
    assert_eq!(again.wait_exit(SOON).await, 0, "{}", again.output());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_exits_immediately() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), None, database).await;
    let mut program = Program::start("run", &chain.variables()).await;
    program.finishes_more(200.0).await;
    postgres.pause().await.unwrap();
    wait_until("load", SOON, async || chain.look().await.pending > 0).await;

    program.signal(Signal::Term);
    program.wait_for_line("draining", SOON).await;
    // The drain takes longer than this: PostgreSQL does not answer.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(program.is_running(), "it ended at the first signal: {}", program.output());
    program.signal(Signal::Term);
    let began = Instant::now();
    let code = program.wait_exit(SOON).await;
    // The drain would go on for 25 seconds.
    assert!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
    assert!(code != 0 && code < 128 + 15 || code == 130, "exit code {code}: {}", program.output());
    assert!(chain.look().await.pending > 0, "what was in hand does not stay pending");

    // And none of it is lost.
    postgres.resume().unwrap();
    let program = Program::start("run", &chain.variables()).await;
    chain.ends_like_an_undisturbed_run().await;
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_cannot_finish_fails_at_its_timeout() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), None, database).await;
    let mut program = Program::start("run", &chain.variables().with("DRAIN_TIMEOUT", "2s")).await;
    program.finishes_more(200.0).await;
    postgres.pause().await.unwrap();
    wait_until("load", SOON, async || chain.look().await.pending > 0).await;
    program.signal(Signal::Term);
    let began = Instant::now();
    assert_eq!(program.wait_exit(SOON).await, 1, "{}", program.output());
    // Not after 25 seconds, which is the default.
    assert!(began.elapsed() < Duration::from_secs(15), "it took {:?}", began.elapsed());
    assert!(chain.look().await.pending > 0);
    postgres.resume().unwrap();
}

// ---------------------------------------------------------------------------------------------
// Unreachable servers

/// Polls `/livez` for as long as it lives, and remembers whether it ever was anything but 200.
struct Liveness {
    was_bad: std::sync::Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Liveness {
    fn watch(program: &Program) -> Self {
        let was_bad = std::sync::Arc::new(AtomicBool::new(false));
        let (http, bad) = (program.http, was_bad.clone());
        let task = tokio::spawn(async move {
            loop {
                if crate::support::http_get(http, "/livez").await.map_or(0, |(code, _)| code) != 200 {
                    bad.store(true, Ordering::SeqCst);
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Self { was_bad, task }
    }

    fn assert_was_good(self) {
        self.task.abort();
        assert!(!self.was_bad.load(Ordering::SeqCst), "/livez was not 200 throughout");
    }
}

async fn becomes_ready(program: &Program) {
    wait_for("readiness", SOON, async || match program.readiness().await {
        (200, _) => Ok(()),
        (code, reasons) => Err(format!("{code}: {reasons}")),
    })
    .await;
}

/// The reasons that `/readyz` gives; there must be some.
async fn reasons(program: &Program) -> String {
    let (code, body) = program.readiness().await;
    assert_eq!(code, 503, "{body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["ready"], false);
    let reasons = body["reasons"].as_array().unwrap();
    assert!(!reasons.is_empty());
    reasons.iter().map(|reason| reason.as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn startup_waits_for_unreachable_servers() {
    let network = network(500);
    let relay = Relay::start(&network, None).await;
    let (redis_port, postgres_port) = (free_port().unwrap(), free_port().unwrap());
    let database = format!("postgresql://standpipe@127.0.0.1:{postgres_port}/postgres");
    let variables = Variables::new()
        .with("RELAY_URL", relay.url())
        .with("REDIS_URL", format!("redis://127.0.0.1:{redis_port}"))
        .with("DATABASE_URL", &database);
    let mut program = Program::start("run", &variables).await;
    let live = Liveness::watch(&program);
    program.wait_for_line("waiting for PostgreSQL", SOON).await;
    let said = reasons(&program).await;
    assert!(said.contains("Redis") && said.contains("PostgreSQL"), "{said}");

    let options =
        standpipe_lab::servers::PostgresOptions { port: Some(postgres_port), ..Postgres::options() };
    let postgres = Postgres::start_with(options).await;
    assert_eq!(postgres.url("postgres"), database);
    program.wait_for_line("Redis: Connection refused", SOON).await;
    let said = reasons(&program).await;
    assert!(said.contains("Redis") && !said.contains("PostgreSQL"), "{said}");

    let redis = Redis::start_with(RedisOptions { port: Some(redis_port), ..RedisOptions::default() }).await;
    let chain = Chain { relay, redis, database };
    becomes_ready(&program).await;
    chain.ends_like_an_undisturbed_run().await;
    live.assert_was_good();
    assert!(program.is_running());
}

/// A process without a reader reports it too, and blames nothing else for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_reports_that_it_is_waiting_for_redis() {
    let port = free_port().unwrap();
    let database = Postgres::shared().await.fresh_database().await;
    let variables = Variables::new()
        .with("REDIS_URL", format!("redis://127.0.0.1:{port}"))
        .with("DATABASE_URL", &database);
    let mut worker = Program::start("worker", &variables).await;
    worker.wait_for_line("waiting for Redis", SOON).await;
    for pipeline in worker.status().await["process"]["pipelines"].as_array().unwrap() {
        assert_eq!(pipeline["state"], "waiting_for_redis", "{pipeline}");
    }
    assert!(reasons(&worker).await.contains("Redis"));

    let redis = Redis::start_with(RedisOptions { port: Some(port), ..RedisOptions::default() }).await;
    becomes_ready(&worker).await;
    drop(redis);
}

/// The reader never blocks on PostgreSQL: a relay keeps only a few days.
#[tokio::test(flavor = "multi_thread")]
async fn the_relay_is_read_while_postgresql_is_down_at_startup() {
    let network = network(500);
    let port = free_port().unwrap();
    let database = format!("postgresql://standpipe@127.0.0.1:{port}/postgres");
    let chain = Chain::with_database(&network, None, database).await;
    let program = Program::start("run", &chain.variables()).await;
    wait_until("every event in the stream", SOON, async || {
        chain.look().await.cursor == Some(chain.relay.last_seq)
    })
    .await;
    let options = standpipe_lab::servers::PostgresOptions { port: Some(port), ..Postgres::options() };
    let _postgres = Postgres::start_with(options).await;
    chain.ends_like_an_undisturbed_run().await;
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_outage_uses_up_no_retries() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), Some(RATE), database).await;
    let mut program = Program::start("run", &chain.variables()).await;
    let live = Liveness::watch(&program);
    for round in 1..=2 {
        program.finishes_more(300.0).await;
        postgres.sigkill().await.unwrap();
        wait_until("every pipeline to wait", SOON, async || {
            let status = program.status().await;
            let pipelines = status["process"]["pipelines"].as_array().unwrap();
            pipelines.iter().all(|pipeline| pipeline["state"] == "waiting_for_postgres")
        })
        .await;
        assert!(reasons(&program).await.contains("PostgreSQL"));
        // They keep what they hold and retry in vain, and none of it counts as an attempt.
        let tries = program.metric("standpipe_retries_total").await;
        let held = chain.look().await;
        assert!(held.pending > 0 && !held.is_finished(chain.relay.last_seq), "{held:?}");
        program.metric_rises("standpipe_retries_total", tries + 10.0).await;
        let pending: Vec<(String, String, u64, u64)> =
            redis_command(&chain.redis, &["XPENDING", STREAM, GROUP, "-", "+", "10000"]).await;
        assert_eq!(pending.len() as u64, held.pending);
        assert!(pending.iter().all(|(.., deliveries)| *deliveries == 1), "{:?}", pending[0]);
        // An outage logs one line per part, not one per attempt.
        let lines = program.lines().len();
        assert!(lines < 100 * round, "{lines} lines:\n{}", program.output());
        postgres.start_again().await.unwrap();
    }
    chain.ends_like_an_undisturbed_run().await;
    becomes_ready(&program).await;
    live.assert_was_good();
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn work_resumes_after_a_redis_outage_and_nothing_is_lost() {
    let mut chain = Chain::start(&network(EVENTS), Some(RATE)).await;
    let mut program = Program::start("run", &chain.variables()).await;
    let live = Liveness::watch(&program);
    for _ in 0..2 {
        program.finishes_more(300.0).await;
        assert!(!chain.look().await.is_finished(chain.relay.last_seq), "the run was over");
        chain.redis.sigkill().await.unwrap();
        wait_until("everybody to wait", SOON, async || {
            let status = program.status().await;
            let process = &status["process"];
            let mut parts = process["pipelines"].as_array().unwrap().iter().chain([&process["reader"]]);
            parts.all(|part| part["state"] == "waiting_for_redis")
        })
        .await;
        assert!(reasons(&program).await.contains("Redis"));
        chain.redis.start_again().await.unwrap();
    }
    chain.ends_like_an_undisturbed_run().await;
    program.metric_rises("standpipe_redis_reconnects_total", 9.0).await;
    becomes_ready(&program).await;
    live.assert_was_good();
    assert!(program.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_stream_holds_the_reader_back_and_loses_nothing() {
    const MARK: u64 = 1_000;
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    // So slow that most of the events are still to come when PostgreSQL is killed.
    let chain = Chain::with_database(&network(EVENTS), Some(500), database).await;
    let variables = chain.variables().with("REDIS_MAX_STREAM_LEN", MARK.to_string());
    let mut program = Program::start("run", &variables).await;
    program.finishes_more(200.0).await;
    postgres.sigkill().await.unwrap();
    wait_until("the reader to wait for room", SOON, async || {
        program.status().await["process"]["reader"]["state"] == "waiting_for_room"
    })
    .await;
    // The janitor may still make room by trimming acknowledged entries; after that nothing moves.
    let waited = async || {
        let before = program.metric("standpipe_backpressure_seconds_total").await;
        program.metric_rises("standpipe_backpressure_seconds_total", before + 2.0).await;
    };
    let mut before = chain.look().await;
    let after = wait_for("the reader to stay where it is", SOON, async || {
        waited().await;
        let after = chain.look().await;
        let stays = (before.length, before.cursor) == (after.length, after.cursor);
        before = after.clone();
        if stays { Ok(after) } else { Err(format!("{after:?}")) }
    })
    .await;
    // Once it waits, it resumes only when there is some room to spare.
    assert!((MARK - MARK / 20..MARK + 1_000).contains(&after.length), "{after:?}");
    assert!(after.cursor < Some(chain.relay.last_seq), "everything fitted in");

    postgres.start_again().await.unwrap();
    let mut longest = 0;
    wait_until("the last event", RUN, async || {
        let look = chain.look().await;
        longest = longest.max(look.length);
        look.is_finished(chain.relay.last_seq)
    })
    .await;
    assert!(longest < MARK + 1_000, "the stream grew to {longest}");
    chain.ends_like_an_undisturbed_run().await;
    assert!(program.is_running());
}

/// Redis refuses commands that would need memory, and the reader waits; commands that free memory still work.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_out_of_memory_is_filled_no_further_and_still_drains() {
    let chain = Chain::start(&network(EVENTS), None).await;
    // A mark that is never reached, as when someone else uses up the memory within a second.
    let variables = chain.variables().with("REDIS_MEMORY_MARK", "100GiB");
    let used = async || -> u64 {
        let info: String = redis_command(&chain.redis, &["INFO", "memory"]).await;
        info.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap().trim().parse().unwrap()
    };
    let limit = used().await + (3 << 20);
    let _: () = redis_command(&chain.redis, &["CONFIG", "SET", "maxmemory", &limit.to_string()]).await;
    let reader = Program::start("reader", &variables).await;
    wait_until("the reader to wait for room, or to have gone on regardless", SOON, async || {
        reader.status().await["process"]["reader"]["state"] == "waiting_for_room"
            || chain.look().await.cursor == Some(chain.relay.last_seq)
    })
    .await;
    let used = used().await;
    assert!(used < limit + (2 << 20), "Redis may use {limit} bytes and uses {used}");
    assert!(chain.look().await.cursor < Some(chain.relay.last_seq), "everything fitted in");

    let worker = Program::start("worker", &variables).await;
    chain.ends_like_an_undisturbed_run().await;
    drop((reader, worker));
}

/// Connections that hang forever, as behind a load balancer whose server is gone.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_never_answer_are_abandoned() {
    let database = Postgres::shared().await.fresh_database().await;
    let chain = Chain::with_database(&network(EVENTS), None, database.clone()).await;
    let gate = Gate::for_url(&database).await;
    let variables = chain
        .variables()
        .with("DATABASE_URL", gate.url_through(&database))
        .with("DB_STATEMENT_TIMEOUT", "2s");
    let mut program = Program::start("run", &variables).await;
    program.finishes_more(200.0).await;
    gate.silence_all();
    wait_until("answers that nobody gets", SOON, async || gate.answer_bytes_held() > 0).await;
    let before = program.entries().await;
    wait_for("work to go on, on new connections", Duration::from_secs(30), async || {
        let entries = program.entries().await;
        if entries > before + 1_000.0 { Ok(()) } else { Err(format!("{before} entries then, {entries} now")) }
    })
    .await;
    chain.ends_like_an_undisturbed_run().await;
    assert!(program.is_running());
}

/// Also one that falls silent between two uses, when the pool has something to say to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_falls_silent_in_the_pool_is_abandoned() {
    let database = Postgres::shared().await.fresh_database().await;
    let gate = Gate::for_url(&database).await;
    let url = gate.url_through(&database);
    let variables = [("DATABASE_URL", url.as_str()), ("DB_STATEMENT_TIMEOUT", "1s"), ("DB_POOL_SIZE", "1")];
    let (config, _) = config::from_env(variables, Role::Worker).unwrap();
    let store = Store::new(&config).unwrap();
    // The next use is one at which the server is told to forget its plans.
    for _ in 0..8 {
        drop(store.session().await.unwrap());
    }
    gate.silence_all();
    let ended =
        tokio::time::timeout(Duration::from_secs(40), store.session()).await.expect("it waits for ever");
    assert!(ended.is_err(), "it answered");
    let session = store.session().await.unwrap();
    session.client().simple_query("SELECT 1").await.unwrap();
}

/// A refusal that is our fault rather than the event's is not a reason to discard events.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_table_halts_the_pipelines_without_dead_letters() {
    let chain = Chain::start(&network(EVENTS), None).await;
    let program = Program::start("run", &chain.variables()).await;
    program.finishes_more(200.0).await;
    execute(&chain.database, "ALTER TABLE likes RENAME TO likes_elsewhere").await;
    wait_until("every pipeline to stop", SOON, async || {
        let status = program.status().await;
        let pipelines = status["process"]["pipelines"].as_array().unwrap();
        pipelines.iter().all(|pipeline| pipeline["state"] == "halted")
    })
    .await;
    let said = reasons(&program).await;
    assert!(said.contains("42P01") && said.contains("likes"), "{said}");
    let halted = chain.look().await;
    assert!(halted.pending > 0 && halted.dead_letters == 0 && halted.waiting, "{halted:?}");
    program.metric_with_rises("standpipe_retries_total", "halt", 4.0).await;

    execute(&chain.database, "ALTER TABLE likes_elsewhere RENAME TO likes").await;
    chain.ends_like_an_undisturbed_run().await;
    becomes_ready(&program).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_waiting_for_its_servers_exits_on_sigterm() {
    let away = free_port().unwrap();
    let database = Postgres::shared().await.fresh_database().await;
    let redis = Redis::start().await;
    let everything = Variables::new()
        .with("RELAY_URL", format!("ws://127.0.0.1:{away}"))
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database);
    for (variable, url, line) in [
        (
            "DATABASE_URL",
            format!("postgresql://standpipe@127.0.0.1:{away}/postgres"),
            "waiting for PostgreSQL",
        ),
        ("REDIS_URL", format!("redis://127.0.0.1:{away}"), "Redis: Connection refused"),
        ("RELAY_URL", format!("ws://127.0.0.1:{away}"), "relay:"),
    ] {
        let mut program = Program::start("run", &everything.clone().with(variable, url)).await;
        program.wait_for_line(line, SOON).await;
        program.signal(Signal::Term);
        let began = Instant::now();
        assert_eq!(program.wait_exit(SOON).await, 0, "{line}: {}", program.output());
        assert!(began.elapsed() < Duration::from_secs(15), "{line}: it took {:?}", began.elapsed());
    }
}

// ---------------------------------------------------------------------------------------------
// Bad events

const REPO: &str = "did:plc:poison";

fn commit(number: u64, ops: &[Value]) -> String {
    // Each digit becomes a letter: not all digits are allowed in a TID.
    let rev: String = format!("{number:02}").bytes().map(|digit| char::from(digit - b'0' + b'a')).collect();
    json!({"repo": REPO, "rev": format!("3n2samfdihk{rev}"), "ops": ops}).to_string()
}

fn post(rkey: &str, text: &str) -> Value {
    json!({
        "action": "create", "path": format!("app.bsky.feed.post/{rkey}"), "cid": "bafyreipost",
        "record": {"$type": "app.bsky.feed.post", "text": text, "createdAt": "2026-11-21T04:17:51.287Z"},
    })
}

#[expect(clippy::needless_pass_by_value, reason = "callers build it in place")]
fn like(rkey: &str, record: Value) -> Value {
    json!({"action": "create", "path": format!("app.bsky.feed.like/{rkey}"), "cid": "bafyreilike", "record": record})
}

fn profile(name: &str) -> Value {
    json!({
        "action": "update", "path": "app.bsky.actor.profile/self", "cid": "bafyreiprofile",
        "record": {"$type": "app.bsky.actor.profile", "displayName": name},
    })
}

/// The dead letters, each as a map of its fields.
fn letters(entries: Vec<(String, Vec<(String, String)>)>) -> Vec<std::collections::BTreeMap<String, String>> {
    entries.into_iter().map(|(_, fields)| fields.into_iter().collect()).collect()
}

/// The fields of an entry; and the reason and a part of the message of each of its dead letters.
type Fields = Vec<(&'static str, String)>;
type Reasons = Vec<(&'static str, &'static str)>;

#[tokio::test(flavor = "multi_thread")]
async fn poison_entries_become_dead_letters_with_a_reason_and_harm_nothing_else() {
    let long = "x".repeat(300);
    let subject = json!({"cid": "bafyreipost", "uri": format!("at://{REPO}/app.bsky.feed.post/good0")});
    let time = "2026-11-21T04:17:51.287Z";
    let good_like = like("good", json!({"subject": subject, "createdAt": time}));
    // The entry's fields, and the reason and a part of the message of each dead letter that it causes.
    let entries: Vec<(Fields, Reasons)> = vec![
        (
            vec![
                ("type", "commit".into()),
                ("data", commit(20, &[post("good0", "first")])),
                ("seq", "1".into()),
            ],
            vec![],
        ),
        (
            vec![("type", "commit".into()), ("data", "{\"repo\":".into()), ("seq", "2".into())],
            vec![("undecodable", "EOF")],
        ),
        (
            vec![("type", "commit".into()), ("data", String::new()), ("seq", "3".into())],
            vec![("undecodable", "")],
        ),
        (vec![("type", "commit".into())], vec![("undecodable", "")]),
        (
            vec![("type", "commit".into()), ("data", json!({"ops": []}).to_string()), ("seq", "5".into())],
            vec![("undecodable", "repo")],
        ),
        (
            vec![("type", "commit".into()), ("data", commit(21, &[])), ("seq", "six".into())],
            vec![("undecodable", "seq")],
        ),
        (
            vec![
                ("type", "commit".into()),
                (
                    "data",
                    commit(
                        22,
                        &[
                            post("good1", "before"),
                            like("bad", json!({"createdAt": time})),
                            good_like,
                            json!({"action": "create", "path": "nonsense", "cid": "bafy", "record": {}}),
                            post("good2", "nul: \u{0}."),
                        ],
                    ),
                ),
                ("seq", "7".into()),
            ],
            vec![("missing_field", "subject"), ("invalid_field", "nonsense")],
        ),
        (
            vec![("type", "commit".into()), ("data", commit(23, &[profile(&long)])), ("seq", "8".into())],
            vec![("database", "255")],
        ),
        (
            vec![
                ("type", "commit".into()),
                ("data", commit(24, &[post("good3", "beside a profile"), profile(&long)])),
                ("seq", "9".into()),
            ],
            vec![("database", "255")],
        ),
        (
            vec![
                ("type", "identity".into()),
                ("data", json!({"handle": "a.example"}).to_string()),
                ("seq", "10".into()),
            ],
            vec![("missing_field", "did")],
        ),
        (
            vec![
                ("type", "account".into()),
                ("data", json!({"did": REPO}).to_string()),
                ("seq", "11".into()),
            ],
            vec![("missing_field", "active")],
        ),
        // An entry of unknown type may hold anything; an event without operations is not an error.
        (
            vec![("type", "label".into()), ("data", "?".into()), ("seq", "12".into())],
            vec![("unknown_type", "label")],
        ),
        (vec![("type", "sync".into()), ("data", "{}".into()), ("seq", "13".into())], vec![]),
        (
            vec![
                ("type", "commit".into()),
                ("data", commit(25, &[post("good4", "last")])),
                ("seq", "14".into()),
            ],
            vec![],
        ),
    ];

    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    let mut expected = Vec::new();
    for (fields, bad) in &entries {
        let words = fields.iter().flat_map(|(name, value)| [*name, value.as_str()]);
        let words: Vec<&str> = ["XADD", STREAM, "*"].into_iter().chain(words).collect();
        let id: String = redis_command(&redis, &words).await;
        expected.extend(bad.iter().map(|(reason, part)| (id.clone(), *reason, *part)));
    }
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", &database);
    let mut worker = Program::start("worker", &variables).await;
    wait_until("everything to be acknowledged", SOON, async || {
        let look = look(&redis).await.unwrap();
        look.is_drained()
    })
    .await;

    let letters = letters(redis_command(&redis, &["XRANGE", DEAD, "-", "+"]).await);
    let mut found: Vec<_> = letters.iter().map(|letter| (&letter["source_id"], &letter["reason"])).collect();
    let mut wanted: Vec<_> = expected.iter().map(|(id, reason, _)| (id, reason.to_string())).collect();
    found.sort();
    wanted.sort();
    assert!(
        found.iter().zip(&wanted).all(|(f, w)| f.0 == w.0 && *f.1 == w.1) && found.len() == wanted.len(),
        "found {found:?}, expected {wanted:?}"
    );
    for (id, reason, part) in &expected {
        let letter =
            letters.iter().find(|letter| letter["source_id"] == *id && letter["reason"] == *reason).unwrap();
        assert!(!letter["message"].is_empty() && letter["message"].contains(part), "{letter:?}");
        assert_eq!(letter["sqlstate"], if *reason == "database" { "22001" } else { "" }, "{letter:?}");
        assert_eq!(
            (letter["version"].as_str(), letter["attempts"].as_str()),
            (env!("CARGO_PKG_VERSION"), "1")
        );
        assert!(
            !letter["first_time"].is_empty() && letter["first_time"] == letter["last_time"],
            "{letter:?}"
        );
        assert!(!letter["op"].is_empty() || reason == &"undecodable", "{letter:?}");
        let (fields, _) = entries
            .iter()
            .find(|(fields, bad)| {
                bad.iter().any(|(r, p)| r == reason && p == part) && letter["seq"] == field(fields, "seq")
            })
            .unwrap();
        assert_eq!(letter["type"], field(fields, "type"));
    }
    for reason in ["undecodable", "missing_field", "invalid_field", "database"] {
        let count = expected.iter().filter(|(_, other, _)| *other == reason).count();
        let label = format!("\"{reason}\"");
        worker.metric_with_is("standpipe_dead_letters_total", &label, count as f64).await;
    }

    // The good operations are applied, including those beside bad ones, and none of the bad ones.
    let rows = async |sql: &str| -> Vec<String> {
        query_rows(&database, sql)
            .await
            .into_iter()
            .map(|mut row| row.remove(0).unwrap_or_default())
            .collect()
    };
    assert_eq!(
        rows("SELECT right(uri, 5) || ' ' || text FROM posts ORDER BY uri").await,
        ["good0 first", "good1 before", "good2 nul: .", "good3 beside a profile", "good4 last"]
    );
    assert_eq!(rows("SELECT uri FROM likes").await, [format!("at://{REPO}/app.bsky.feed.like/good")]);
    assert_eq!(rows("SELECT like_count::text FROM post_aggregations WHERE like_count > 0").await, ["1"]);
    assert_eq!(rows("SELECT display_name FROM users WHERE did = 'did:plc:poison'").await, [""]);
    let lines = worker.lines().len();
    assert!(lines < 20, "upstream drives the log: {lines} lines\n{}", worker.output());
    becomes_ready(&worker).await;
    assert!(worker.is_running());
}

fn field(fields: &[(&str, String)], name: &str) -> String {
    fields.iter().find(|(other, _)| *other == name).map(|(_, value)| value.clone()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_without_a_type_becomes_a_dead_letter() {
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    let data = commit(22, &[post("1", "a post")]);
    let _: String = redis_command(&redis, &["XADD", STREAM, "*", "data", &data, "seq", "1"]).await;
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", &database);
    let _worker = Program::start("worker", &variables).await;
    wait_until("it to be acknowledged", SOON, async || look(&redis).await.unwrap().is_drained()).await;
    assert_eq!(look(&redis).await.unwrap().dead_letters, 1, "it was acknowledged and is nowhere");
}

/// Invariant 8: a million bad events are not a million log lines.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_bad_events_do_not_flood_the_log() {
    const BAD: u64 = 3_000;
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    let mut pipe = redis::pipe();
    for number in 0..BAD {
        let data = match number % 3 {
            0 => "{".to_owned(),
            1 => commit(22, &[like(&number.to_string(), json!({}))]),
            _ => commit(22, &[profile(&"x".repeat(300))]),
        };
        let fields = [("type", "commit"), ("data", data.as_str()), ("seq", &number.to_string())];
        pipe.xadd(STREAM, "*", &fields).ignore();
    }
    let _: () = pipe.query_async(&mut redis.connection().await).await.unwrap();
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("LOG_LEVEL", "DEBUG");
    let worker = Program::start("worker", &variables).await;
    wait_until("everything to be acknowledged", RUN, async || look(&redis).await.unwrap().is_drained()).await;
    assert_eq!(look(&redis).await.unwrap().dead_letters, BAD);
    let lines = worker.lines().len();
    assert!(lines < 100, "{lines} lines, the last of them: {:?}", worker.lines().last());
}

/// The dead letters have a budget: beyond it bad entries stay pending, good ones are still applied, and
/// nothing is discarded.
#[tokio::test(flavor = "multi_thread")]
async fn entries_beyond_the_dead_letter_budget_stay_pending_until_there_is_room() {
    const BAD: u64 = 50;
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    for number in 0..BAD {
        let good = commit(22, &[post(&format!("good{number}"), "good")]);
        for data in ["{", good.as_str()] {
            let _: String =
                redis_command(&redis, &["XADD", STREAM, "*", "type", "commit", "data", data, "seq", "1"])
                    .await;
        }
    }
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", &database);
    let mut worker = Program::start("worker", &variables.clone().with("DEAD_LETTER_MAX_BYTES", "2KiB")).await;
    // The good ones of a batch are acknowledged before its bad ones are dead letters.
    wait_until(
        "every good entry to be acknowledged, and some bad ones to be dead letters",
        SOON,
        async || {
            let look = look(&redis).await.unwrap();
            look.pending + look.dead_letters == BAD && !look.waiting && look.dead_letters > 0
        },
    )
    .await;
    let full = look(&redis).await.unwrap();
    assert!(full.pending > 0 && full.dead_letters > 0, "{full:?}");
    wait_until("every one that stays pending to be counted", SOON, async || {
        let pending = look(&redis).await.unwrap().pending;
        worker.metric("standpipe_dead_letters_overflow_total").await == pending as f64
    })
    .await;
    assert_eq!(query_rows(&database, "SELECT uri FROM posts").await.len() as u64, BAD);
    worker.signal(Signal::Term);
    assert_eq!(worker.wait_exit(SOON).await, 0);

    let worker = Program::start("worker", &variables).await;
    wait_until("the rest to be dead letters", SOON, async || {
        let look = look(&redis).await.unwrap();
        look.pending == 0 && look.dead_letters == BAD
    })
    .await;
    drop(worker);
}

// ---------------------------------------------------------------------------------------------
// Cursors that lie

#[tokio::test(flavor = "multi_thread")]
async fn another_relays_cursor_is_reported_as_a_gap() {
    let chain = Chain::start(&network(500), None).await;
    let _: () = redis_command(&chain.redis, &["SET", CURSOR, "400"]).await;
    let _: () = redis_command(&chain.redis, &["SET", CURSOR_RELAY, "another.example"]).await;
    let mut reader = Program::start("reader", &chain.variables()).await;
    let line = reader.wait_for_line("gap", SOON).await;
    assert!(line.contains("another.example") && line.contains(&chain.relay.name()), "{line}");
    wait_until("the last frame", SOON, async || chain.look().await.cursor == Some(chain.relay.last_seq))
        .await;
    reader.metric_is("standpipe_relay_gaps_total", 1.0).await;
    assert_eq!(reader.status().await["process"]["reader"]["gaps"], 1);
    let relay: String = redis_command(&chain.redis, &["GET", CURSOR_RELAY]).await;
    assert_eq!(relay, chain.relay.name());
    // The foreign number is not used as a cursor: reading starts now, which is at this relay's first frame.
    assert_eq!(chain.look().await.length, 500);

    // Reported once: from here on the cursor is this relay's.
    reader.signal(Signal::Term);
    assert_eq!(reader.wait_exit(SOON).await, 0);
    let reader = Program::start("reader", &chain.variables()).await;
    wait_until("a connection", Duration::from_secs(30), async || {
        reader.metric("standpipe_relay_connects_total").await == 1.0
    })
    .await;
    assert_eq!(reader.metric("standpipe_relay_gaps_total").await, 0.0);
}

/// Entries that are not acknowledged may still be another relay's, whose numbers mean nothing to this one.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_lost_after_a_relay_change_never_rewinds_to_the_old_relays_numbers() {
    let chain = Chain::start(&network(EVENTS), None).await;
    let foreign = chain.relay.last_seq - 1_000;
    let seq = foreign.to_string();
    let _: String =
        redis_command(&chain.redis, &["XADD", STREAM, "*", "type", "sync", "data", "{}", "seq", &seq]).await;
    let _: () = redis_command(&chain.redis, &["SET", CURSOR, &seq]).await;
    let _: () = redis_command(&chain.redis, &["SET", CURSOR_RELAY, "another.example"]).await;
    let mut reader = Program::start("reader", &chain.variables()).await;
    reader.wait_for_line("gap", SOON).await;
    // Everything from the new relay is behind the entry of the old one, and the janitor has seen that.
    wait_for("every event in the stream", RUN, async || {
        let look = chain.look().await;
        let seen = reader.metric("standpipe_stream_entries").await;
        if look.cursor == Some(chain.relay.last_seq) && look.waiting && seen == look.length as f64 {
            Ok(())
        } else {
            Err(format!("{look:?}, the janitor saw {seen} entries"))
        }
    })
    .await;
    let deleted: u64 = redis_command(&chain.redis, &["DEL", STREAM]).await;
    assert_eq!(deleted, 1);
    reader.metric_rises(LOSSES, 0.0).await;
    let worker = Program::start("worker", &chain.variables()).await;
    chain.ends_like_an_undisturbed_run().await;
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_future_cursor_stops_the_reader_unless_configured_otherwise() {
    let chain = Chain::start(&network(500), None).await;
    let _: () = redis_command(&chain.redis, &["SET", CURSOR, "1000000"]).await;
    let _: () = redis_command(&chain.redis, &["SET", CURSOR_RELAY, &chain.relay.name()]).await;
    let mut program = Program::start("run", &chain.variables()).await;
    program.wait_for_line("the reader has stopped", SOON).await;
    let said = reasons(&program).await;
    for part in ["1000000", "future", "ON_FUTURE_CURSOR", CURSOR, &chain.relay.name()] {
        assert!(said.contains(part), "{part} is not in {said:?}");
    }
    assert_eq!(program.get("/livez").await.0, 200);
    let cpu = cpu_of_idling(&program).await;
    assert!(cpu < IDLE_CPU, "{cpu} s of processor time in {IDLE:?}");
    assert_eq!(program.metric("standpipe_relay_connects_total").await, 1.0, "it asks again and again");
    assert_eq!(chain.look().await.cursor, Some(1_000_000), "it has set the cursor");
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);

    let program = Program::start("run", &chain.variables().with("ON_FUTURE_CURSOR", "oldest")).await;
    chain.ends_like_an_undisturbed_run().await;
    program.metric_is("standpipe_relay_gaps_total", 1.0).await;
    becomes_ready(&program).await;
}

// ---------------------------------------------------------------------------------------------
// Other processes

#[tokio::test(flavor = "multi_thread")]
async fn a_second_reader_waits_for_the_lease_and_takes_over() {
    let chain = Chain::start(&network(EVENTS), Some(RATE)).await;
    let mut first = Program::start("reader", &chain.variables()).await;
    first.metric_rises("standpipe_cursor", 0.0).await;
    let mut second = Program::start("reader", &chain.variables().with("CONSUMER_ID", "second")).await;
    second.wait_for_line("the reader waits", SOON).await;
    assert_eq!(second.status().await["process"]["reader"]["state"], "waiting_for_lease");
    assert_eq!(chain.relay.counters.connections_total.load(Ordering::SeqCst), 1);

    first.signal(Signal::Term);
    assert_eq!(first.wait_exit(SOON).await, 0);
    // The lease was released; letting it expire would take ten seconds.
    let began = Instant::now();
    second.metric_rises("standpipe_relay_connects_total", 0.0).await;
    assert!(began.elapsed() < Duration::from_secs(8), "it took {:?}", began.elapsed());
    wait_until("the last frame", RUN, async || chain.look().await.cursor == Some(chain.relay.last_seq)).await;
    // Only the frame at the cursor is sent twice.
    let length = chain.look().await.length;
    assert!((EVENTS..=EVENTS + 1).contains(&length), "{length} entries of {EVENTS} frames");
    assert!(second.metric("standpipe_relay_frames_total").await > 1.0, "the first one has read everything");
    let worker = Program::start("worker", &chain.variables()).await;
    chain.ends_like_an_undisturbed_run().await;
    assert!(second.is_running());
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_with_the_same_name_waits_until_the_first_is_gone() {
    let chain = Chain::start(&network(EVENTS), Some(RATE)).await;
    let mut first = Program::start("run", &chain.variables()).await;
    first.finishes_more(200.0).await;
    let mut second = Program::start("worker", &chain.variables()).await;
    second.wait_for_line("CONSUMER_ID", SOON).await;
    wait_until("every pipeline to wait", SOON, async || {
        let status = second.status().await;
        let pipelines = status["process"]["pipelines"].as_array().unwrap();
        pipelines.iter().all(|pipeline| pipeline["state"] == "waiting_for_lease")
    })
    .await;
    first.finishes_more(200.0).await;
    assert_eq!(second.entries().await, 0.0);
    first.signal(Signal::Term);
    assert_eq!(first.wait_exit(SOON).await, 0);
    assert!(!chain.look().await.is_finished(chain.relay.last_seq), "the first one has done everything");
    drop(first);
    becomes_ready(&second).await;

    // A third process under another name reads the relay; the second one's pipelines take part.
    let third = Program::start("run", &chain.variables().with("CONSUMER_ID", "third")).await;
    chain.ends_like_an_undisturbed_run().await;
    assert!(second.entries().await > 0.0);
    assert!(second.is_running());
    drop(third);
}

/// The older workers have no leases: whether a name is in use is seen from the group.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_waits_while_a_foreign_consumer_uses_its_name() {
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    let _: String = redis_command(&redis, &["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
    let mut connection = redis.connection().await;
    let foreign = tokio::spawn(async move {
        loop {
            // Redis before 7.2 registers a consumer only once it receives something.
            let pipe = redis::pipe()
                .xadd(STREAM, "*", &[("type", "sync"), ("data", "{}"), ("seq", "1")])
                .ignore()
                .cmd("XREADGROUP")
                .arg(&["GROUP", GROUP, "test-1", "COUNT", "10", "NOACK", "STREAMS", STREAM, ">"])
                .ignore()
                .query_async::<()>(&mut connection)
                .await;
            pipe.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    wait_until("the foreign consumer", SOON, async || {
        let consumers: Vec<redis::Value> =
            redis_command(&redis, &["XINFO", "CONSUMERS", STREAM, GROUP]).await;
        !consumers.is_empty()
    })
    .await;
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", &database);
    let mut worker = Program::start("worker", &variables).await;
    let line = worker.wait_for_line("CONSUMER_ID", SOON).await;
    assert!(line.contains("test-1"), "it does not say which: {line}");
    foreign.abort();
    let data = commit(22, &[post("1", "a post")]);
    let _: String =
        redis_command(&redis, &["XADD", STREAM, "*", "type", "commit", "data", &data, "seq", "1"]).await;
    wait_until("it to be acknowledged", SOON, async || look(&redis).await.unwrap().is_drained()).await;
    assert_eq!(query_rows(&database, "SELECT uri FROM posts").await.len(), 1);
    assert!(worker.is_running());
}

/// A crashed process leaves entries pending under its own names; it applies them when it restarts, or another
/// process does.
#[tokio::test(flavor = "multi_thread")]
async fn entries_of_a_killed_process_are_applied_when_it_restarts() {
    let chain = Chain::start(&network(EVENTS), None).await;
    // Nobody claims them: the process itself has to remember.
    let variables = chain.variables().with("CLAIM_IDLE", "1h");
    let program = Program::start("run", &variables).await;
    program.finishes_more(200.0).await;
    kill_with_entries_in_hand(&chain, program, "").await;
    let program = Program::start("run", &variables).await;
    chain.ends_like_an_undisturbed_run().await;
    drop(program);
}

/// Two processes share the work; one dies under load and never comes back.
#[tokio::test(flavor = "multi_thread")]
async fn entries_of_a_process_that_never_restarts_are_claimed_by_another() {
    let chain = Chain::start(&network(60_000), Some(4_000)).await;
    let variables = chain.variables().with("CLAIM_IDLE", "10s");
    let mut stays = Program::start("run", &variables.clone().with("CONSUMER_ID", "stays")).await;
    let goes = Program::start("worker", &variables.with("CONSUMER_ID", "goes")).await;
    stays.finishes_more(500.0).await;
    goes.finishes_more(500.0).await;
    kill_with_entries_in_hand(&chain, goes, "goes-").await;
    let killed = Instant::now();
    let left = pending_with(&chain, "goes-").await;
    let before = stays.entries().await;
    wait_until("its entries to be finished", RUN, async || {
        pending_with(&chain, "goes-").await == 0
            && stays.metric("standpipe_claimed_entries_total").await >= left as f64
    })
    .await;
    println!("{left} entries of the dead process were taken over {:?} after its end", killed.elapsed());
    assert!(stays.entries().await > before, "there was no load");
    chain.ends_like_an_undisturbed_run().await;
    assert!(stays.is_running());
}

/// XPENDING's reply: the count, the first, the last, and the count of each consumer.
type Summary = (u64, Option<String>, Option<String>, Option<Vec<(String, u64)>>);

/// Kills a process while it holds entries of the stream: it is stopped first, so that they stay the same.
async fn kill_with_entries_in_hand(chain: &Chain, program: Program, prefix: &str) {
    wait_until("it to be stopped with entries in hand", SOON, async || {
        program.signal(Signal::Stop);
        // Twice: any commands it had sent when it stopped have been executed by the second look.
        let stopped = pending_with(chain, prefix).await > 0 && pending_with(chain, prefix).await > 0;
        if !stopped {
            program.signal(Signal::Continue);
        }
        stopped
    })
    .await;
    program.signal(Signal::Kill);
    drop(program);
    assert!(pending_with(chain, prefix).await > 0, "nothing is pending with what was killed");
}

/// Entries pending with the consumers whose names begin with this.
async fn pending_with(chain: &Chain, prefix: &str) -> u64 {
    let (.., consumers): Summary = redis_command(&chain.redis, &["XPENDING", STREAM, GROUP]).await;
    consumers.into_iter().flatten().filter(|(name, _)| name.starts_with(prefix)).map(|(_, count)| count).sum()
}
