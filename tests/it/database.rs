//! Databases that are not what we expect: restored to an earlier state, set up for other purposes, behind a
//! pooler, or with the operator's own triggers.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::chain::{Chain, Program, RUN, SOON, STREAM, Variables, network, redis_command};
use crate::support::pooler::PgBouncer;
use crate::support::{
    Finished, HOSTILE_DEFAULTS, Postgres, Redis, Standpipe, connect, execute, query_value, wait_for,
    wait_until,
};
use serde_json::{Value, json};
use standpipe_lab::servers::PostgresOptions;

// ---------------------------------------------------------------------------------------------
// Back in time

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

/// Waits until this many entries have been acknowledged.
async fn finishes(program: &Program, entries: f64) {
    wait_for("entries to be finished", RUN, async || {
        let now = program.entries().await;
        if now >= entries { Ok(()) } else { Err(format!("{now} of {entries}")) }
    })
    .await;
}

/// Waits until a refill has begun, and then until the process is ready again.
async fn refilled(program: &Program) {
    program.metric_rises("standpipe_database_went_back_total", 0.0).await;
    wait_for("the refill to end", Duration::from_mins(1), async || {
        let (code, body) = program.readiness().await;
        let refilling = program.metric("standpipe_refilling").await;
        if code == 200 && refilling == 0.0 { Ok(()) } else { Err(format!("{body}, refilling {refilling}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_restored_from_a_backup_is_refilled_from_the_relay() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let traffic = network(4_000);
    let chain = Chain::with_database(&traffic, Some(1_000), database.clone()).await;
    let program = Program::start("run", &chain.variables()).await;
    finishes(&program, 1_500.0).await;
    // The backup holds everything up to here, including the noted position.
    wait_until("the position to be noted", SOON, async || {
        let noted = "SELECT coalesce(max(position), 0) > 500 FROM standpipe.acknowledged";
        query_value(&database, noted).await == "t"
    })
    .await;
    postgres.stop_fast().await.unwrap();
    let backup = postgres.folder().with_extension("backup");
    copy(postgres.folder(), &backup);
    postgres.start_again().await.unwrap();
    chain.finished().await;
    // The last position is noted too, so that Redis knows more than the backup.
    let last = chain.relay.last_seq;
    wait_until("the last position to be noted", SOON, async || {
        let noted = format!("SELECT position = {last} FROM standpipe.acknowledged");
        query_value(&database, &noted).await == "t"
    })
    .await;
    let posts = query_value(&database, "SELECT count(*) FROM posts").await;

    postgres.stop_fast().await.unwrap();
    std::fs::remove_dir_all(postgres.folder()).unwrap();
    copy(&backup, postgres.folder());
    std::fs::remove_dir_all(&backup).unwrap();
    postgres.start_again().await.unwrap();
    assert_ne!(
        query_value(&database, "SELECT count(*) FROM posts").await,
        posts,
        "the backup has everything"
    );
    refilled(&program).await;
    chain.ends_like_an_undisturbed_run().await;
    assert!(program.stderr().contains("PostgreSQL has gone back in time"), "{}", program.stderr());
    assert_eq!(program.metric("standpipe_relay_gaps_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreated_database_is_refilled_from_the_relay_and_reported() {
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let chain = Chain::with_database(&network(2_000), None, database.clone()).await;
    let mut program = Program::start("run", &chain.variables()).await;
    chain.finished().await;
    wait_until("the position to be noted", SOON, async || {
        let noted = format!(
            "SELECT count(*) = 1 FROM standpipe.acknowledged WHERE position = {}",
            chain.relay.last_seq
        );
        query_value(&database, &noted).await == "t"
    })
    .await;
    program.signal(crate::support::Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);
    let name = database.rsplit('/').next().unwrap();
    let maintenance = database.replace(name, "postgres");
    execute(&maintenance, &format!("DROP DATABASE {name}")).await;
    execute(&maintenance, &format!("CREATE DATABASE {name}")).await;

    let program = Program::start("run", &chain.variables()).await;
    refilled(&program).await;
    chain.ends_like_an_undisturbed_run().await;
    let check = Standpipe::run(&["check"], &chain.variables(), SOON).await;
    assert!(check.stdout.contains("1 gaps"), "{}", check.stdout);
    assert_eq!(program.status().await["missing"]["gaps"], 1);
}

// ---------------------------------------------------------------------------------------------
// Settings

/// Runs the traffic through a database and compares.
async fn passes(database: String) {
    let chain = Chain::with_database(&network(1_500), None, database).await;
    for mode in ["event", "batch"] {
        let mut program = Program::start("run", &chain.variables().with("TRANSACTION", mode)).await;
        chain.ends_like_an_undisturbed_run().await;
        program.signal(crate::support::Signal::Term);
        assert_eq!(program.wait_exit(SOON).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn database_settings_do_not_affect_our_connections() {
    let postgres = Postgres::shared().await;
    for (setting, value) in HOSTILE_DEFAULTS {
        let database = postgres.fresh_database_with(setting, value).await;
        let variables = Variables::new().with("DATABASE_URL", &database);
        let migrated = Standpipe::run(&["migrate"], &variables, SOON).await;
        assert_eq!(migrated.code, 0, "{setting}: {}", migrated.stderr);
        passes(database).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_skips_triggers_is_refused_and_the_setting_named() {
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let name = database.rsplit('/').next().unwrap();
    let sql = format!("ALTER DATABASE {name} SET session_replication_role = replica");
    execute(&database.replace(name, "postgres"), &sql).await;
    let redis = Redis::start().await;
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", &database);
    let mut program = Program::start("worker", &variables).await;
    let line = program.wait_for_line("session_replication_role is replica", SOON).await;
    assert!(line.contains("must be origin"), "{line}");
    assert_eq!(program.readiness().await.0, 503);
    let check = Standpipe::run(&["check"], &variables, SOON).await;
    assert_eq!(check.code, 1);
    assert!(check.stdout.contains("session_replication_role"), "{}", check.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_not_utf8_is_refused() {
    let postgres = Postgres::start().await;
    let maintenance = postgres.url("postgres");
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let name = format!("in_{}", encoding.to_lowercase());
        let sql = format!(
            "CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        );
        execute(&maintenance, &sql).await;
        let variables = Variables::new().with("DATABASE_URL", postgres.url(&name));
        let migrate = Standpipe::run(&["migrate"], &variables, SOON).await;
        assert_ne!(migrate.code, 0);
        assert!(migrate.stderr.contains(encoding) && migrate.stderr.contains("UTF8"), "{}", migrate.stderr);
    }
}

// ---------------------------------------------------------------------------------------------
// Columns and triggers that the operator added

async fn add_like(redis: &Redis, rkey: &str) {
    let data = json!({"repo": "did:plc:a", "rev": crate::support::scripted::rev(rkey.parse().unwrap_or(7)), "ops": [{
        "action": "create", "path": format!("app.bsky.feed.like/{rkey}"), "cid": "bafy",
        "record": {"subject": {"uri": format!("at://did:plc:b/app.bsky.feed.post/{rkey}"), "cid": "bafy"},
                   "createdAt": "2026-01-01T00:00:00Z"}}]});
    let words = ["XADD", STREAM, "*", "type", "commit", "data", &data.to_string(), "seq", "7"];
    let _: String = redis_command(redis, &words).await;
}

/// A worker on a migrated database.
async fn worker() -> (Redis, String, Variables, Program) {
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", &database);
    let migrated = Standpipe::run(&["migrate"], &variables, SOON).await;
    assert_eq!(migrated.code, 0, "{}", migrated.stderr);
    let program = Program::start("worker", &variables).await;
    (redis, database, variables, program)
}

async fn letters(variables: &Variables) -> Vec<Value> {
    let list = Standpipe::run(&["dead-letters", "list", "--json"], variables, SOON).await;
    list.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_not_null_column_added_by_an_operator_halts_without_dead_letters() {
    let (redis, database, variables, mut program) = worker().await;
    execute(&database, "ALTER TABLE likes ADD COLUMN tenant text NOT NULL").await;
    add_like(&redis, "1").await;
    let line = program.wait_for_line("tenant", SOON).await;
    assert!(line.contains("23502"), "{line}");
    assert_eq!(program.readiness().await.0, 503);
    assert_eq!(letters(&variables).await, [] as [Value; 0]);
    execute(&database, "ALTER TABLE likes ALTER COLUMN tenant SET DEFAULT 'one'").await;
    finishes(&program, 1.0).await;
    assert_eq!(query_value(&database, "SELECT count(*) FROM likes").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_refused_by_an_operators_trigger_becomes_a_dead_letter_and_affects_nothing_else() {
    let (redis, database, variables, program) = worker().await;
    for state in ["P0001", "22000", "42P01", "XX000"] {
        execute(
            &database,
            &format!(
                "CREATE OR REPLACE FUNCTION no_sevens() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                     IF NEW.uri LIKE '%7' THEN RAISE EXCEPTION 'no sevens' USING ERRCODE = '{state}'; END IF;
                     RETURN NEW;
                 END $$;
                 CREATE OR REPLACE TRIGGER no_sevens BEFORE INSERT ON likes FOR EACH ROW EXECUTE FUNCTION no_sevens();
                 TRUNCATE likes"
            ),
        )
        .await;
        let before = program.entries().await;
        for n in 1..=10 {
            add_like(&redis, &n.to_string()).await;
        }
        finishes(&program, before + 10.0).await;
        assert_eq!(query_value(&database, "SELECT count(*) FROM likes").await, "9", "{state}");
        let letters = letters(&variables).await;
        let [letter] = &letters[..] else { panic!("{state}: {letters:?}") };
        assert_eq!(letter["reason"], "trigger", "{letter}");
        assert_eq!(letter["sqlstate"], state);
        assert!(letter["message"].as_str().unwrap().contains("no_sevens"), "{letter}");
        execute(&database, "DROP TRIGGER no_sevens ON likes").await;
        let retried = Standpipe::run(&["dead-letters", "retry", "--all"], &variables, SOON).await;
        assert_eq!(retried.code, 0, "{}{}", retried.stdout, retried.stderr);
        assert_eq!(query_value(&database, "SELECT count(*) FROM likes").await, "10");
    }
}

/// The example in docs/extending.md, with a process that is killed midway.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_trigger_stays_exact_when_the_process_is_killed() {
    let page =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/extending.md")).unwrap();
    let sql: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    let sql = sql.join("\n").replace("\\mcats?\\M", "a");
    assert!(sql.contains("CREATE TRIGGER"), "{sql}");
    let database = Postgres::shared().await.fresh_database().await;
    let migrated = Standpipe::run(&["migrate"], &[("DATABASE_URL", &database)], SOON).await;
    assert_eq!(migrated.code, 0, "{}", migrated.stderr);
    execute(&database, &sql).await;
    let chain = Chain::with_database(&network(3_000), None, database.clone()).await;
    for mode in ["event", "batch"] {
        for killed in [true, true, false] {
            let mut program = Program::start("run", &chain.variables().with("TRANSACTION", mode)).await;
            if killed {
                finishes(&program, 300.0).await;
                program.signal(crate::support::Signal::Kill);
                program.wait_exit(SOON).await;
            } else {
                chain.finished().await;
                program.signal(crate::support::Signal::Term);
                assert_eq!(program.wait_exit(SOON).await, 0);
            }
        }
        let derived = "SELECT count(*) FROM public.cat_posts";
        let rows = query_value(&database, derived).await;
        assert!(rows.parse::<u64>().unwrap() > 50, "{rows}");
        let differ =
            "SELECT count(*) FROM (SELECT uri, author_did, created_at FROM posts WHERE text ~* 'a') p
                      FULL JOIN public.cat_posts c ON c.uri = p.uri AND c.sort_at = p.created_at
                      WHERE p.uri IS NULL OR c.uri IS NULL";
        assert_eq!(query_value(&database, differ).await, "0", "{mode}");
        // Everything once more, in the other mode.
        let _: String = redis_command(&chain.redis, &["SET", "firehose:cursor", "0"]).await;
    }
}

// ---------------------------------------------------------------------------------------------
// Servers that do not answer

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_standby_does_not_pile_up_server_processes() {
    const POOL: usize = 6;
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let redis = Redis::start().await;
    let variables = Variables::new()
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("DB_POOL_SIZE", POOL.to_string())
        .with("DB_STATEMENT_TIMEOUT", "1s")
        .with("DRAIN_TIMEOUT", "2s");
    let migrated = Standpipe::run(&["migrate"], &variables, SOON).await;
    assert_eq!(migrated.code, 0, "{}", migrated.stderr);
    execute(&database, "ALTER SYSTEM SET synchronous_standby_names = 'gone'").await;
    execute(&database, "SELECT pg_reload_conf()").await;
    let client = connect(&database).await;
    let backends = async || -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'standpipe'";
        client.query_one(sql, &[]).await.unwrap().get(0)
    };
    let mut program = Program::start("worker", &variables).await;
    for n in 1..=2_000 {
        add_like(&redis, &n.to_string()).await;
    }
    let long = std::env::var("STANDPIPE_LONG").is_ok();
    let end = tokio::time::Instant::now() + Duration::from_secs(if long { 60 } else { 25 });
    let mut most = 0;
    wait_until("the time to be over", RUN, async || {
        most = most.max(backends().await);
        tokio::time::Instant::now() > end
    })
    .await;
    assert!(most > 1, "nobody was connected");
    assert!(most <= i64::try_from(POOL).unwrap() + 1, "{most} server processes");
    let check = Standpipe::run(&["check"], &variables, SOON).await;
    assert!(check.stdout.contains("gone, and no standby is connected"), "{}", check.stdout);
    program.signal(crate::support::Signal::Term);
    program.wait_exit(SOON).await;
    wait_for("no server process to be left", SOON, async || {
        let sql = "SELECT string_agg(concat_ws(' ', state, wait_event, left(query, 60)), '; ') FROM pg_stat_activity
                   WHERE application_name = 'standpipe'";
        client.query_one(sql, &[]).await.unwrap().get::<_, Option<String>>(0).map_or(Ok(()), Err)
    })
    .await;
}

// ---------------------------------------------------------------------------------------------
// A panic

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_costs_only_the_entry_that_caused_it() {
    for stage in ["interpret", "apply"] {
        let redis = Redis::start().await;
        let database = Postgres::shared().await.fresh_database().await;
        let variables = Variables::new()
            .with("REDIS_URL", redis.url())
            .with("DATABASE_URL", &database)
            .with("STANDPIPE_PANIC_OVER", format!("{stage}:app.bsky.feed.like/13"));
        for n in 10..30 {
            add_like(&redis, &n.to_string()).await;
        }
        let mut program = Program::start("worker", &variables).await;
        finishes(&program, 20.0).await;
        assert!(program.is_running());
        assert_eq!(query_value(&database, "SELECT count(*) FROM likes").await, "19", "{stage}");
        let letters = letters(&variables).await;
        assert_eq!(letters.len(), 1, "{letters:?}");
        assert_eq!(letters[0]["reason"], "panic");
        assert!(letters[0]["message"].as_str().unwrap().contains("a test wants this"), "{letters:?}");
        program.metric_with_is("standpipe_dead_letters_total", "panic", 1.0).await;
    }
}

// ---------------------------------------------------------------------------------------------
// Poolers

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_behind_pgbouncer_in_session_mode_with_default_settings() {
    let postgres =
        Postgres::start_with(PostgresOptions { max_connections: 120, ..Postgres::options() }).await;
    for more in ["", "ignore_startup_parameters = options,extra_float_digits"] {
        let database = postgres.fresh_database().await;
        let pooler = PgBouncer::start(&postgres, "session", more).await;
        let chain = Chain::with_database(&network(1_500), None, database.clone()).await;
        let variables = chain
            .variables()
            .with("DATABASE_URL", pooler.url(&database))
            .with("NOTIFICATIONS", "false")
            .with("DB_STATEMENT_TIMEOUT", "7s");
        let check = Standpipe::run(&["check"], &variables, SOON).await;
        assert!(!check.stdout.contains("pool_mode"), "{}", check.stdout);
        let program = Program::start("run", &variables).await;
        chain.finished().await;
        assert_eq!(query_value(&database, "SELECT count(*) FROM notifications").await, "0");
        let audit = Standpipe::run(&["audit"], &variables, RUN).await;
        assert_eq!(audit.code, 0, "{}{}", audit.stdout, audit.stderr);
        drop(program);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_transaction_mode_is_refused_with_the_remedy() {
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let pooler = PgBouncer::start(&postgres, "transaction", "").await;
    let redis = Redis::start().await;
    let variables =
        Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", pooler.url(&database));
    let check: Finished = Standpipe::run(&["check"], &variables, RUN).await;
    assert_eq!(check.code, 1, "{}", check.stdout);
    assert!(check.stdout.contains("pool_mode = session"), "{}", check.stdout);
    let mut program = Program::start("worker", &variables).await;
    program.wait_for_line("pool_mode = session", SOON).await;
    assert_eq!(program.readiness().await.0, 503);
}
