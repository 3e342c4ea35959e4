//! Messages for the operator's functions: each is handled once, whatever is killed; what fails is tried again and then a dead
//! letter; and no event waits for them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use standpipe::crash::Point;
use tokio::time::Instant;

use crate::support::chain::{Program, RUN, STREAM, Variables, redis_command};
use crate::support::house::{House, at_once, is_ready};
use crate::support::{Signal, Standpipe, connect, execute, query_rows, query_value, wait_for, wait_until};

const FUNCTIONS: &str = "
    CREATE SCHEMA handlers;
    CREATE TABLE noted (id bigint, at timestamptz NOT NULL DEFAULT clock_timestamp());
    CREATE TABLE broken (broken boolean);
    CREATE FUNCTION handlers.note(data jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO noted (id) VALUES ((data->>'number')::bigint);
        RETURN jsonb_build_object('twice', 2 * (data->>'number')::bigint);
    END $$;
    CREATE FUNCTION handlers.wait(data jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_sleep((data->>'seconds')::float8);
        INSERT INTO noted (id) VALUES ((data->>'number')::bigint);
        RETURN data;
    END $$;
    CREATE FUNCTION handlers.hold(data jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock_shared(4711);
        INSERT INTO noted (id) VALUES ((data->>'number')::bigint);
        RETURN data;
    END $$;
    CREATE FUNCTION handlers.pick(data jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO noted (id) VALUES ((data->>'number')::bigint);
        IF (data->>'number')::bigint % 10 = 3 AND EXISTS (SELECT FROM broken) THEN
            RAISE EXCEPTION 'three is refused';
        END IF;
        RETURN NULL;
    END $$;";

fn is_long() -> bool {
    std::env::var_os("STANDPIPE_LONG").is_some()
}

fn task(function: &str, id: Option<&str>, data: &Value) -> String {
    let mut line = json!({"type": function, "data": data});
    if let Some(id) = id {
        line["id"] = id.into();
    }
    line.to_string()
}

/// A house with functions, and what its processes are told.
async fn house() -> (House, Variables) {
    let house = House::start(at_once()).await;
    execute(&house.database, FUNCTIONS).await;
    let variables = house.variables().with("HANDLERS", "handlers");
    (house, variables)
}

/// Holds up the tasks `hold`, for as long as the connection lives.
async fn barrier(house: &House) -> tokio_postgres::Client {
    let client = connect(&house.database).await;
    client.batch_execute("SELECT pg_advisory_lock(4711)").await.unwrap();
    client
}

async fn kill(program: &mut Program) {
    program.signal(Signal::Kill);
    assert_eq!(program.wait_exit(RUN).await, 128 + 9);
}

async fn start(variables: &Variables) -> Program {
    let program = Program::start("worker", variables).await;
    is_ready(&program).await;
    program
}

/// Sends lines until they are accepted.
async fn send(house: &House, lines: &[String]) -> Value {
    let body = lines.join("\n");
    let (code, answer) = house.post("/events", None, &body).await.unwrap();
    assert_eq!(code, 202, "{answer}");
    answer
}

async fn count(house: &House, sql: &str) -> u64 {
    query_value(&house.database, sql).await.parse().unwrap()
}

/// Waits until no task is left in the stream.
async fn all_ended(house: &House) {
    wait_for("the tasks to end", RUN, async || {
        let left: u64 = redis_command(&house.redis, &["XLEN", &format!("{STREAM}:tasks")]).await;
        if left == 0 { Ok(()) } else { Err(format!("{left} left")) }
    })
    .await;
}

/// Each task is delivered twice, and the process is killed again and again.
#[tokio::test(flavor = "multi_thread")]
async fn each_task_takes_effect_once_however_often_the_process_dies() {
    let (tasks, kills) = if is_long() { (1_000, 20) } else { (300, 6) };
    let (house, variables) = house().await;
    let variables = variables.with("HANDLER_PIPELINES", "3").with("CLAIM_IDLE", "10s");
    let mut program = start(&variables).await;
    let lines: Vec<String> = (0..tasks)
        .flat_map(|number| {
            let line =
                task("wait", Some(&format!("task-{number}")), &json!({"number": number, "seconds": 0.01}));
            [line.clone(), line]
        })
        .collect();
    let done = "SELECT count(*) FROM standpipe.results WHERE state = 'done'";
    let mut sent = lines.chunks(50);
    for number in 0..kills {
        if let Some(chunk) = sent.next() {
            send(&house, chunk).await;
        }
        let goal = count(&house, done).await + 3;
        wait_until("tasks to be done", RUN, async || count(&house, done).await >= goal).await;
        println!("kill {number}: {goal} done");
        kill(&mut program).await;
        program = start(&variables).await;
    }
    for chunk in sent {
        send(&house, chunk).await;
    }
    all_ended(&house).await;
    assert_eq!(count(&house, done).await, tasks);
    assert_eq!(count(&house, "SELECT count(*) FROM standpipe.results").await, tasks);
    assert_eq!(count(&house, "SELECT count(*) FROM noted").await, tasks);
    assert_eq!(count(&house, "SELECT count(DISTINCT id) FROM noted").await, tasks);
    let letters: u64 = redis_command(&house.redis, &["XLEN", &format!("{STREAM}:dead")]).await;
    assert_eq!(letters, 0);
}

/// The process dies between the commit and the removal from the stream.
#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(debug_assertions), ignore = "a release build has no crash points")]
async fn a_task_that_was_done_and_not_removed_is_not_done_again() {
    let (house, variables) = house().await;
    let dying = variables.clone().with("STANDPIPE_CRASH_AT", format!("{}:1", Point::AfterTask.name()));
    let mut program = start(&dying).await;
    let answer = send(&house, &[task("note", None, &json!({"number": 7}))]).await;
    assert_ne!(program.wait_exit(RUN).await, 0);
    assert!(program.stderr().contains("crash point after-task reached"), "{}", program.output());
    assert_eq!(count(&house, "SELECT count(*) FROM noted").await, 1);
    let program = start(&variables).await;
    all_ended(&house).await;
    program.metric_with_is("standpipe_tasks_total", "\"repeated\"", 1.0).await;
    assert_eq!(count(&house, "SELECT count(*) FROM noted").await, 1);
    let rows =
        query_rows(&house.database, "SELECT id, result->>'twice', attempts FROM standpipe.results").await;
    // Without an id of its own, it has its entry's.
    assert_eq!(rows[0][0].as_deref(), answer["ids"][0].as_str());
    assert_eq!((rows[0][1].as_deref(), rows[0][2].as_deref()), (Some("14"), Some("1")));
}

/// How long each of so many likes took from the request to the tables, sorted. `from`: the number of the first.
async fn likes(house: &House, count: u64, from: u64) -> Vec<Duration> {
    let mut waits = Vec::new();
    for number in from..from + count {
        let like = json!({"$type": "app.bsky.feed.like", "createdAt": "2026-11-21T04:17:51.287Z",
            "subject": {"uri": format!("at://did:plc:a/app.bsky.feed.post/{number}"), "cid": "bafyreidfayvfuwqa7qlnopdjiqrxzs6blmoeu4rujcjtnci5beludirz2a"}});
        let line = json!({"type": "commit", "data": {"repo": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "ops": [
            {"action": "create", "path": format!("app.bsky.feed.like/{number}"), "record": like}]}});
        let asked = Instant::now();
        let (code, answer) = house.post("/events?wait=applied", None, &line.to_string()).await.unwrap();
        assert_eq!((code, &answer["applied"]), (202, &Value::Bool(true)));
        waits.push(asked.elapsed());
    }
    waits.sort();
    waits
}

/// Costs of 1 to 5 over three pipelines; and a long task delays no event.
#[tokio::test(flavor = "multi_thread")]
async fn no_pipeline_is_idle_while_there_is_work_and_no_event_waits_for_a_task() {
    let (house, variables) = house().await;
    let program = start(&variables.with("HANDLER_PIPELINES", "3")).await;
    // 0.1 to 0.5 s, and 18 s in all.
    let unit = 0.1;
    let lines: Vec<String> = (0..60)
        .map(|number| {
            task("wait", None, &json!({"number": number, "seconds": unit * f64::from(1 + number % 5)}))
        })
        .collect();
    let busy = async || {
        let status = program.status().await;
        let handlers = status["process"]["handlers"].as_array().unwrap().clone();
        handlers.iter().filter(|handler| handler["task"].is_object()).count()
    };
    send(&house, &lines).await;
    wait_until("all to be busy", RUN, async || busy().await == 3).await;
    let began = Instant::now();
    all_ended(&house).await;
    let sql = "WITH spans AS (SELECT started_at AS b, finished_at AS e FROM standpipe.results)
        SELECT (sum(extract(epoch FROM e - b)) / (3 * extract(epoch FROM max(e) - min(b))))::text FROM spans";
    let share: f64 = query_value(&house.database, sql).await.parse().unwrap();
    println!(
        "60 tasks in {:.1?}; the pipelines were busy for {:.1} % of the time",
        began.elapsed(),
        share * 100.0
    );
    // Elsewhere, other tests take their share.
    assert!(!is_long() || share > 0.85, "{share}");

    // Likes alone; the first requests of a process wait for its connections to be opened. Then long tasks in every pipeline, and
    // the same.
    let samples = if is_long() { 200 } else { 40 };
    let alone = likes(&house, samples, 0).await;
    let barrier = barrier(&house).await;
    let (function, seconds) = if is_long() { ("wait", 30.0) } else { ("hold", 0.0) };
    let long: Vec<String> = (0..3)
        .map(|number| task(function, None, &json!({"number": 100 + number, "seconds": seconds})))
        .collect();
    send(&house, &long).await;
    wait_until("all to be busy", RUN, async || busy().await == 3).await;
    let beside = likes(&house, samples, samples).await;
    assert_eq!(busy().await, 3, "the tasks had ended before the events");
    let p99 = |sorted: &[Duration]| sorted[sorted.len() * 99 / 100 - 1];
    println!("likes: p99 {:.1?} alone, {:.1?} beside tasks", p99(&alone), p99(&beside));
    assert_eq!(count(&house, "SELECT count(*) FROM likes").await, 2 * samples);
    assert!(!is_long() || p99(&beside) < Duration::from_millis(50), "{:?}", p99(&beside));
    drop(barrier);
    all_ended(&house).await;
}

/// Of the tasks that fail, each is tried as often as it is said, and becomes one dead letter; with the fault removed, they are done.
#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_failing_becomes_a_dead_letter_and_can_be_tried_again() {
    let (house, variables) = house().await;
    execute(&house.database, "INSERT INTO broken VALUES (true)").await;
    let variables = variables.with("HANDLER_ATTEMPTS", "2");
    let program = start(&variables).await;
    let lines: Vec<String> = (0..100)
        .map(|number| task("pick", Some(&number.to_string()), &json!({"number": number})))
        .chain([task("nowhere", Some("x"), &json!({"number": 1000}))])
        .collect();
    send(&house, &lines).await;
    all_ended(&house).await;
    // What a failed attempt did is not there.
    assert_eq!(count(&house, "SELECT count(*) FROM noted").await, 90);
    let failed = "SELECT id FROM standpipe.results WHERE state = 'failed' AND attempts = 2
                  AND error LIKE '%three is refused%' ORDER BY id::int";
    let failed: Vec<String> =
        query_rows(&house.database, failed).await.into_iter().map(|mut row| row.remove(0).unwrap()).collect();
    assert_eq!(failed, ["3", "13", "23", "33", "43", "53", "63", "73", "83", "93"]);
    let listed = Standpipe::run(&["dead-letters", "list", "--json"], &variables, RUN).await;
    let mut reasons: BTreeMap<String, u32> = BTreeMap::new();
    for line in listed.stdout.lines() {
        let letter: Value = serde_json::from_str(line).unwrap();
        *reasons.entry(letter["reason"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    assert_eq!(reasons, BTreeMap::from([("handler".to_owned(), 10), ("unknown_type".to_owned(), 1)]));
    let tasks =
        Standpipe::run(&["tasks", "list", "--state", "failed", "--type", "pick"], &variables, RUN).await;
    assert!(tasks.stdout.contains("three is refused"), "{}", tasks.stdout);
    let (code, shown) = program.get("/tasks?state=failed&limit=3").await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((code, shown["tasks"].as_array().unwrap().len()), (200, 3));
    program.metric_with_is("standpipe_dead_letters_total", "\"handler\"", 10.0).await;

    let again = Standpipe::run(&["dead-letters", "retry", "--all"], &variables, RUN).await;
    assert!(again.stdout.contains("0 applied, 11 kept"), "{}", again.stdout);
    execute(
        &house.database,
        "DELETE FROM broken; CREATE FUNCTION handlers.nowhere(jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT $1'",
    )
    .await;
    let again = Standpipe::run(&["dead-letters", "retry", "--all"], &variables, RUN).await;
    assert!(again.stdout.contains("11 applied, 0 kept"), "{}", again.stdout);
    assert_eq!(count(&house, "SELECT count(*) FROM noted").await, 100);
    assert_eq!(count(&house, "SELECT count(*) FROM standpipe.results WHERE state = 'done'").await, 101);
    let letters: u64 = redis_command(&house.redis, &["XLEN", &format!("{STREAM}:dead")]).await;
    assert_eq!(letters, 0);
}

/// Whatever code a function raises, it is a failure of the task, and nobody waits for a server.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_function_raises_is_no_outage_and_its_commits_are_on_the_disk() {
    let (house, variables) = house().await;
    let functions = "
        ALTER DATABASE CURRENT SET synchronous_commit = off;
        CREATE SEQUENCE calls;
        CREATE FUNCTION handlers.raise(data jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM nextval('calls');
            RAISE EXCEPTION 'as told' USING ERRCODE = data->>'code';
        END $$;
        CREATE FUNCTION handlers.writes(data jsonb) RETURNS jsonb STABLE LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO noted (id) VALUES (1);
            RETURN data;
        END $$;
        CREATE FUNCTION handlers.setting(data jsonb) RETURNS jsonb LANGUAGE sql AS
            $$ SELECT to_jsonb(current_setting('synchronous_commit')) $$";
    let functions = functions
        .replace("DATABASE CURRENT", &format!("DATABASE {}", house.database.rsplit('/').next().unwrap()));
    execute(&house.database, &functions).await;
    let variables = variables.with("HANDLER_ATTEMPTS", "2");
    let program = start(&variables).await;
    let codes = ["08000", "0A000", "25006", "40001", "53100", "57P01", "58030", "P0001"];
    let lines: Vec<String> = codes
        .iter()
        .map(|code| task("raise", Some(code), &json!({"code": code})))
        .chain([task("writes", Some("w"), &json!(1)), task("setting", Some("s"), &json!(1))])
        .collect();
    send(&house, &lines).await;
    all_ended(&house).await;
    assert_eq!(
        count(&house, "SELECT count(*) FROM standpipe.results WHERE state = 'failed' AND attempts = 2").await,
        9
    );
    assert_eq!(count(&house, "SELECT last_value FROM calls").await, 2 * codes.len() as u64);
    let setting = "SELECT result FROM standpipe.results WHERE type = 'setting'";
    assert_eq!(query_value(&house.database, setting).await, "\"on\"");
    assert_eq!(program.readiness().await.0, 200);

    // Tasks hold up no other dead letter, and are called once for each retry.
    let without = variables.clone().with("HANDLERS", "");
    let again = Standpipe::run(&["dead-letters", "retry", "--all"], &without, RUN).await;
    assert!(again.stdout.contains("0 applied, 9 kept"), "{}", again.stdout);
    let again = Standpipe::run(&["dead-letters", "retry", "--all"], &variables, RUN).await;
    assert!(again.stdout.contains("0 applied, 9 kept"), "{}", again.stdout);
    assert_eq!(count(&house, "SELECT last_value FROM calls").await, 3 * codes.len() as u64);
    assert_eq!(count(&house, "SELECT count(*) FROM standpipe.results WHERE state = 'failed'").await, 9);
}

/// A task that failed is not tried again because there is no room for its dead letter.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_task_waits_for_room_without_being_called() {
    let (house, variables) = house().await;
    let function = "
        CREATE SEQUENCE calls;
        CREATE FUNCTION handlers.fails(data jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM nextval('calls');
            RAISE EXCEPTION 'no';
        END $$";
    execute(&house.database, function).await;
    let variables = variables.with("HANDLER_ATTEMPTS", "2");
    let mut program = start(&variables.clone().with("DEAD_LETTER_MAX_BYTES", "1B")).await;
    send(&house, &[task("fails", Some("a"), &json!(1))]).await;
    // The pause in between is ten seconds.
    wait_until("two attempts at a dead letter", RUN, async || {
        program.metric("standpipe_dead_letters_overflow_total").await >= 2.0
    })
    .await;
    assert_eq!(count(&house, "SELECT last_value FROM calls").await, 2);
    kill(&mut program).await;
    let program = start(&variables).await;
    all_ended(&house).await;
    program.metric_with_is("standpipe_dead_letters_total", "\"handler\"", 1.0).await;
    assert_eq!(count(&house, "SELECT last_value FROM calls").await, 2);
}

/// A task that takes too long has failed; and one that waits for the database has not.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_has_a_time_limit_of_its_own() {
    let (house, variables) = house().await;
    let variables = variables
        .with("HANDLER_TIMEOUT", "500ms")
        .with("HANDLER_ATTEMPTS", "1")
        .with("DB_STATEMENT_TIMEOUT", "100ms");
    let _program = start(&variables).await;
    let lines = [
        task("wait", Some("short"), &json!({"number": 1, "seconds": 0.2})),
        task("wait", Some("long"), &json!({"number": 2, "seconds": 60})),
    ];
    send(&house, &lines).await;
    all_ended(&house).await;
    let rows =
        query_rows(&house.database, "SELECT id, state, error FROM standpipe.results ORDER BY id").await;
    assert_eq!(rows[1][1].as_deref(), Some("done"), "{rows:?}");
    assert_eq!(rows[0][1].as_deref(), Some("failed"), "{rows:?}");
    assert!(rows[0][2].as_ref().unwrap().contains("HANDLER_TIMEOUT"), "{rows:?}");
}

/// Tasks of a process that does not come back are taken over by another: what PostgreSQL finished on its own counts as done, what
/// it did not is begun again.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_a_process_that_is_gone_are_taken_over() {
    let (house, variables) = house().await;
    let variables = variables.with("CLAIM_IDLE", "10s");
    let mut program = start(&variables.clone().with("CONSUMER_ID", "one")).await;
    let barrier = barrier(&house).await;
    let lines = [
        task("hold", Some("finished"), &json!({"number": 1})),
        task("hold", Some("ended"), &json!({"number": 2})),
    ];
    send(&house, &lines).await;
    let running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'WITH mine %' AND state = 'active'";
    wait_until("both to be begun", RUN, async || count(&house, running).await == 2).await;
    kill(&mut program).await;
    let end = "SELECT count(pg_terminate_backend(l.pid)) FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 29298
               AND l.objid = (SELECT hashtext('hold ended')::bigint & 4294967295)::oid";
    assert_eq!(count(&house, end).await, 1);
    drop(barrier);
    let other = start(&variables.with("CONSUMER_ID", "other")).await;
    all_ended(&house).await;
    other.metric_rises("standpipe_claimed_entries_total", 1.0).await;
    let rows =
        query_rows(&house.database, "SELECT id, state, by, attempts FROM standpipe.results ORDER BY id")
            .await;
    let shown: Vec<Vec<&str>> =
        rows.iter().map(|row| row.iter().map(|cell| cell.as_deref().unwrap()).collect()).collect();
    assert_eq!(shown, [["ended", "done", "other", "2"], ["finished", "done", "one", "1"]]);
    assert_eq!(count(&house, "SELECT count(*) FROM noted").await, 2);
}

/// What cannot be a task is refused, and without HANDLERS nothing is one.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_need_handlers_and_are_refused_in_words() {
    let (house, variables) = house().await;
    let program = Program::start("worker", &house.variables()).await;
    is_ready(&program).await;
    let line = task("note", None, &json!({"number": 1}));
    let (code, answer) = house.post("/events", None, &line).await.unwrap();
    assert_eq!(code, 400);
    assert!(answer["error"].as_str().unwrap().contains("set HANDLERS"), "{answer}");
    drop(program);
    // What is left over is reported.
    let _: String = redis_command(
        &house.redis,
        &[
            "XADD",
            &format!("{STREAM}:tasks"),
            "*",
            "type",
            "note",
            "data",
            r#"{"data":{"number":1}}"#,
            "seq",
            "",
        ],
    )
    .await;
    let check = Standpipe::run(&["check"], &house.variables(), RUN).await;
    assert!(check.stdout.contains("HANDLERS is not set: nobody works on them"), "{}", check.stdout);
    let check = Standpipe::run(&["check"], &variables, RUN).await;
    assert!(check.stdout.contains("functions in handlers: hold, note, pick, wait"), "{}", check.stdout);
    let check = Standpipe::run(&["check"], &variables.clone().with("HANDLERS", "elsewhere"), RUN).await;
    assert!(check.stdout.contains("there is no schema elsewhere"), "{}", check.stdout);
    let program = start(&variables).await;
    all_ended(&house).await;
    program.metric_with_is("standpipe_tasks_total", "\"done\"", 1.0).await;
    let status = Standpipe::run(&["status"], &variables, RUN).await;
    assert!(
        status.stdout.contains("0 waiting, 0 begun; 0 of 2 pipelines busy, 1 done, 0 failed"),
        "{}",
        status.stdout
    );
}
