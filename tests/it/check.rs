//! `standpipe check` against real servers: each problem is found, reported with its remedy, and gives the
//! right exit code.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use crate::support::chain::{Program, RUN, Relay, SOON, Variables, look, network, redis_command};
use crate::support::{
    Finished, Postgres, Redis, Signal, Standpipe, connect_to_redis, execute, free_port, query_value,
    wait_until,
};
use serde_json::Value;
use standpipe::stream::rights;
use standpipe_lab::servers::{PostgresOptions, RedisOptions};

const SECRET: &str = "correct-horse-battery";

/// The settings that production should have.
fn good_redis() -> RedisOptions {
    RedisOptions { max_memory: Some(512 << 20), ..RedisOptions::default() }
}

fn variables(redis: &str, database: &str) -> Variables {
    Variables::new()
        .with("REDIS_URL", redis)
        .with("DATABASE_URL", database)
        .with("HTTP_ADDR", format!("127.0.0.1:{}", free_port().unwrap()))
}

async fn check(variables: &Variables) -> Finished {
    Standpipe::run(&["check"], variables, RUN).await
}

/// The findings of these levels, from `--json`, which must exit with the same code as the page.
async fn findings(variables: &Variables, levels: &[&str], code: i32) -> Vec<Value> {
    let finished = Standpipe::run(&["check", "--json"], variables, RUN).await;
    assert_eq!(finished.code, code, "{}{}", finished.stdout, finished.stderr);
    assert_eq!(finished.stdout.lines().count(), 1, "{}", finished.stdout);
    let examination: Value = serde_json::from_str(&finished.stdout).unwrap();
    let page = check(variables).await;
    assert_eq!(page.code, code, "{}", page.stdout);
    let findings = examination["findings"].as_array().unwrap();
    for finding in findings {
        assert!(finding["level"] != "error" || finding["remedy"] != "", "no remedy: {finding}");
    }
    findings.iter().filter(|finding| levels.contains(&finding["level"].as_str().unwrap())).cloned().collect()
}

/// There is exactly one finding, with this subject and these words.
#[track_caller]
fn assert_only(findings: &[Value], section: &str, what: &str, words: &[&str]) {
    assert_eq!(findings.len(), 1, "{findings:#?}");
    let finding = &findings[0];
    assert_eq!((&finding["section"], &finding["what"]), (&section.into(), &what.into()), "{finding:#}");
    let text = format!("{} -> {}", finding["found"].as_str().unwrap(), finding["remedy"].as_str().unwrap());
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

fn page(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The code blocks in this language in docs/security.md.
fn documented(language: &str) -> Vec<String> {
    let page = page("docs/security.md");
    let blocks = page.split("```").skip(1).step_by(2);
    blocks.filter_map(|block| block.strip_prefix(language)).map(|block| block.trim().to_owned()).collect()
}

/// Creates the documented user with our password and these changes to its rule.
async fn set_user(redis: &Redis, changes: &[&str]) -> String {
    let rule = documented("redis\n").remove(0).replace("PASSWORD", SECRET);
    let words: Vec<&str> = rule.split_whitespace().chain(changes.iter().copied()).collect();
    let _: () = redis_command(redis, &words).await;
    format!("redis://standpipe:{SECRET}@127.0.0.1:{}", redis.port())
}

// ---------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_system_has_no_warnings_or_errors() {
    let redis = Redis::start_with(good_redis()).await;
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let variables = variables(&redis.url(), &database);
    assert_eq!(findings(&variables, &["warning", "error"], 0).await, [] as [Value; 0]);
    assert_eq!(
        query_value(&database, "SELECT to_regclass('users') IS NULL").await,
        "t",
        "it changed the database"
    );
    assert_eq!(redis_command::<u64>(&redis, &["DBSIZE"]).await, 0, "it changed Redis");

    // After the work is done, and while the program is running.
    let network = network(300);
    let relay = Relay::start(&network, None).await;
    let variables = variables.with("RELAY_URL", relay.url());
    let program = Program::start("run", &variables.clone().with("HTTP_ADDR", "127.0.0.1:0")).await;
    wait_until("the last event", RUN, async || {
        look(&redis).await.is_ok_and(|look| look.is_finished(relay.last_seq))
    })
    .await;
    assert_eq!(findings(&variables, &["warning", "error"], 0).await, [] as [Value; 0]);
    let page = check(&variables).await.stdout;
    for words in [
        "noeviction",
        "flushed every second",
        "commands on all keys",
        "1 standpipe process is running",
        "PostgreSQL 1",
        "DB_POOL_SIZE=20 × 1 process",
        "all required indexes exist",
        "no errors, no warnings",
    ] {
        assert!(page.contains(words), "{words:?} is not in\n{page}");
    }
    assert!(!page.contains('\x1b'), "colours where there is no terminal");
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
async fn colours_are_used_on_a_terminal_unless_no_color_is_set() {
    let redis = Redis::start_with(good_redis()).await;
    let on_terminal = async |no_color: &str| {
        let command = format!("{} check", env!("CARGO_BIN_EXE_standpipe"));
        let output = tokio::process::Command::new("script")
            .args(["-qec", &command, "/dev/null"])
            .env("REDIS_URL", redis.url())
            .env_remove("DATABASE_URL")
            .env("NO_COLOR", no_color)
            .stdin(std::process::Stdio::null())
            .output()
            .await
            .expect("script(1), of bsdutils");
        String::from_utf8(output.stdout).unwrap()
    };
    let coloured = on_terminal("").await;
    assert!(coloured.contains("\x1b[32mok") && coloured.contains("\x1b[33mwarning"), "{coloured}");
    let plain = on_terminal("1").await;
    assert!(plain.contains("ok") && !plain.contains('\x1b'), "{plain}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_settings_that_lose_data_are_reported_with_a_remedy() {
    let redis = Redis::start_with(good_redis()).await;
    let variables = variables(&redis.url(), &Postgres::shared().await.fresh_database().await);
    let set = async |name: &str, value: &str| {
        let _: () = redis_command(&redis, &["CONFIG", "SET", name, value]).await;
    };
    let redis_findings = async |levels: &[&str], code: i32| -> Vec<Value> {
        let mut all = findings(&variables, levels, code).await;
        all.retain(|finding| finding["section"] == "Redis");
        all
    };

    // The shared PostgreSQL runs without fsync, which is an error of its own.
    for policy in ["allkeys-lru", "allkeys-random"] {
        set("maxmemory-policy", policy).await;
        assert_only(
            &redis_findings(&["warning", "error"], 1).await,
            "Redis",
            "eviction",
            &[policy, "CONFIG SET maxmemory-policy noeviction"],
        );
    }
    set("maxmemory-policy", "volatile-lru").await;
    assert_eq!(redis_findings(&["warning", "error"], 1).await, [] as [Value; 0]);
    set("maxmemory-policy", "noeviction").await;

    set("appendfsync", "no").await;
    let words = ["when the kernel decides", "appendfsync everysec"];
    assert_only(&redis_findings(&["warning", "error"], 1).await, "Redis", "persistence", &words);
    set("appendonly", "no").await;
    set("save", "3600 1").await;
    let words = ["snapshots only", "goes back to the last one", "CONFIG SET appendonly yes"];
    assert_only(&redis_findings(&["warning", "error"], 1).await, "Redis", "persistence", &words);
    set("save", "").await;
    let words = ["nothing is persisted", "is a gap", "CONFIG SET appendonly yes"];
    assert_only(&redis_findings(&["warning", "error"], 1).await, "Redis", "persistence", &words);
    set("appendonly", "yes").await;
    set("appendfsync", "everysec").await;

    set("maxmemory", "0").await;
    let words = ["REDIS_MEMORY_MARK=75%", "CONFIG SET maxmemory"];
    assert_only(&redis_findings(&["warning", "error"], 1).await, "Redis", "memory", &words);
    set("maxmemory", "10mb").await;
    let too_high = variables.clone().with("REDIS_MEMORY_MARK", "9MiB");
    let found = findings(&too_high, &["error"], 1).await;
    assert!(found.iter().any(|finding| finding["what"] == "memory"), "{found:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_aof_alone_is_a_warning_not_an_error() {
    let redis = Redis::start_with(RedisOptions { append_only: false, ..good_redis() }).await;
    let postgres = Postgres::start().await;
    let variables = variables(&redis.url(), &postgres.fresh_database().await);
    let found = findings(&variables, &["warning", "error"], 0).await;
    assert_only(&found, "Redis", "persistence", &["restart of Redis", "appendonly yes"]);
}

// ---------------------------------------------------------------------------------------------
// Rights

/// `xgroup|create` from `cmd("XGROUP").arg("CREATE")`, `'XGROUP', 'CREATE'` and the like.
fn commands_in_the_sources() -> BTreeSet<String> {
    fn walk(folder: &Path, into: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            // The doctor, with the help of server.rs, sends further commands; the server may refuse those.
            let skipped = ["doctor", "doctor.rs", "server.rs", "rights.rs"];
            if skipped.iter().any(|name| path.file_name().unwrap() == *name) {
                continue;
            }
            if path.is_dir() {
                walk(&path, into);
                continue;
            }
            // Jetstream's dictionary is not text.
            if path.extension().is_some_and(|extension| extension == "zdict") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let text: String = text.split_whitespace().collect();
            for start in ["cmd(\"", "call('", "write('", ".sadd(", ".publish("] {
                for (at, _) in text.match_indices(start) {
                    let rest = &text[at + start.len()..];
                    let mut words = rest.split(['"', '\'']);
                    let word = words.next().unwrap().to_lowercase();
                    if !word.bytes().all(|b| b.is_ascii_lowercase()) || word.is_empty() {
                        continue;
                    }
                    let second = words.nth(1).filter(|second| {
                        rest[word.len()..]
                            .trim_start_matches(['"', '\'', ')', ','])
                            .trim_start_matches(".arg(\"")
                            .trim_start_matches('\'')
                            .starts_with(second)
                    });
                    into.insert(match second {
                        Some(second)
                            if ["xgroup", "xinfo", "script", "acl", "config"].contains(&word.as_str()) =>
                        {
                            format!("{word}|{}", second.to_lowercase())
                        }
                        _ => word,
                    });
                }
            }
            // The client library's shorthand methods.
            for shorthand in ["get", "xlen", "set", "exists", "del", "mget"] {
                if text.contains(&format!(".{shorthand}(&keys.")) {
                    into.insert(shorthand.to_owned());
                }
            }
        }
    }
    let mut found = BTreeSet::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    // Sent by the client library for a script, and for the transaction that writes the old application's
    // keys.
    found.extend(["evalsha", "script|load", "multi", "exec"].map(str::to_owned));
    found
}

#[test]
fn the_list_of_commands_matches_the_sources_and_the_documented_rule() {
    let listed: BTreeSet<String> =
        rights::COMMANDS.iter().map(|(command, _)| (*command).to_owned()).collect();
    let mut used = commands_in_the_sources();
    for command in rights::OPTIONAL {
        assert!(used.remove(command), "{command} is not used");
    }
    // Needed to try out the others.
    used.insert("discard".to_owned());
    assert_eq!(listed, used, "src/stream/rights.rs and the commands that the program sends");

    let rule = documented("redis\n").remove(0);
    let mut documented: BTreeSet<String> =
        rule.split_whitespace().filter_map(|word| word.strip_prefix('+')).map(str::to_owned).collect();
    assert!(documented.remove("acl|whoami"), "for check alone");
    assert_eq!(documented, listed, "docs/security.md and src/stream/rights.rs");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_redis_user_has_exactly_the_rights_it_needs() {
    let redis = Redis::start_with(good_redis()).await;
    let url = set_user(&redis, &[]).await;
    let database = Postgres::shared().await.fresh_database().await;
    let network = network(300);
    let relay = Relay::start(&network, None).await;
    let variables = variables(&url, &database).with("RELAY_URL", relay.url()).with("LEGACY_STATUS", "true");
    // A bad entry that becomes a dead letter; it also creates the stream before the group exists.
    let bad = ["XADD", "firehose:events", "*", "type", "commit", "data", "{", "seq", "1"];
    let _: String = redis_command(&redis, &bad).await;
    let mut program = Program::start("run", &variables.clone().with("HTTP_ADDR", "127.0.0.1:0")).await;
    wait_until("the last event", RUN, async || {
        look(&redis).await.is_ok_and(|look| look.is_finished(relay.last_seq))
    })
    .await;
    wait_until("the keys of the pages", SOON, async || {
        redis_command::<u64>(&redis, &["EXISTS", "cluster:metrics", "firehose:status"]).await == 2
    })
    .await;
    let found = findings(&variables, &["warning", "error", "note"], 1).await;
    let of_redis: Vec<Value> = found.into_iter().filter(|finding| finding["section"] == "Redis").collect();
    let whats: Vec<&str> = of_redis.iter().map(|finding| finding["what"].as_str().unwrap()).collect();
    // It may not use CONFIG GET, there is a dead letter, and the relay sent an event without operations
    // (#sync).
    assert_eq!(whats, ["persistence", "dead letters", "missing"], "{of_redis:#?}");

    let status = Standpipe::run(&["status"], &variables, RUN).await;
    assert!(status.code == 0 && status.stdout.contains("1: 1 undecodable"), "{status:?}");
    let purged = Standpipe::run(&["dead-letters", "purge", "--all"], &variables, RUN).await;
    assert!(purged.code == 0 && purged.stdout.contains("purged 1"), "{purged:?}");
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(SOON).await, 0);
    assert!(!program.output().contains("NOPERM"), "{}", program.output());
    let log: Vec<Value> = redis_command::<redis::Value>(&redis, &["ACL", "LOG"])
        .await
        .as_sequence()
        .map_or_else(Vec::new, |entries| {
            entries.iter().map(|entry| Value::from(format!("{entry:?}"))).collect()
        });
    // The server refused only CONFIG GET and CLIENT SETINFO, which are optional.
    for entry in &log {
        let entry = entry.as_str().unwrap();
        assert!(entry.contains("config|get") || entry.contains("client"), "{entry}");
    }

    // The user really is minimal.
    let mut own = connect_to_redis(url).await.unwrap();
    for words in [
        &["FLUSHALL"][..],
        &["GET", "other"],
        &["CONFIG", "GET", "*"],
        &["XGROUP", "DESTROY", "firehose:events", "x"],
    ] {
        let answer = redis::Cmd::new().arg(words).query_async::<redis::Value>(&mut own).await;
        assert_eq!(answer.unwrap_err().code(), Some("NOPERM"), "{words:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_redis_rights_are_named() {
    let redis = Redis::start_with(good_redis()).await;
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let url = set_user(&redis, &["-xautoclaim"]).await;
    let variables = variables(&url, &database);
    let before: u64 = redis_command(&redis, &["DBSIZE"]).await;
    let words = ["user standpipe", "XAUTOCLAIM", "+xautoclaim"];
    assert_only(&findings(&variables, &["warning", "error"], 1).await, "Redis", "rights", &words);

    set_user(&redis, &["-xgroup|create", "-set", "-exec"]).await;
    let words = ["may not use SET, XGROUP CREATE, EXEC", "+set +xgroup|create +exec"];
    assert_only(&findings(&variables, &["warning", "error"], 1).await, "Redis", "rights", &words);

    set_user(&redis, &["resetkeys", "~firehose:events*", "~firehose:status", "~cluster:*"]).await;
    let words = ["may not read and write firehose:cursor,", "~firehose:cursor:relay"];
    assert_only(&findings(&variables, &["warning", "error"], 1).await, "Redis", "rights", &words);

    set_user(&redis, &["-multi"]).await;
    let words = ["MULTI and DISCARD", "docs/security.md"];
    assert_only(&findings(&variables, &["warning", "error"], 1).await, "Redis", "rights", &words);

    // Only the old application's pages need these keys.
    set_user(&redis, &["resetkeys", "~firehose:*"]).await;
    let words = ["cluster:metrics", "LEGACY_STATUS=false"];
    assert_only(&findings(&variables, &["warning", "error"], 0).await, "Redis", "rights", &words);
    assert_eq!(redis_command::<u64>(&redis, &["DBSIZE"]).await, before, "trying has written something");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_create_rights_is_told_what_to_grant() {
    let redis = Redis::start_with(good_redis()).await;
    let postgres = Postgres::start().await;
    let admin = postgres.fresh_database().await;
    let name = admin.rsplit_once('/').unwrap().1.to_owned();
    // Before PostgreSQL 15 everybody may.
    execute(&admin, "REVOKE CREATE ON SCHEMA public FROM public").await;
    execute(&admin, "CREATE ROLE modest LOGIN").await;
    let modest = format!("postgres://modest@127.0.0.1:{}/{name}", postgres.port());
    let variables = variables(&redis.url(), &modest);
    let words = [
        "may not CREATE",
        &format!("GRANT CREATE ON DATABASE {name} TO modest"),
        "GRANT CREATE ON SCHEMA public",
    ];
    let found = findings(&variables, &["warning", "error"], 1).await;
    assert_only(&found, "PostgreSQL", "rights", &words);

    // The remedy works.
    let remedy = found[0]["remedy"].as_str().unwrap();
    for grant in remedy.split("; ").filter(|part| part.starts_with("GRANT")) {
        execute(&admin, grant).await;
    }
    assert_eq!(findings(&variables, &["warning", "error"], 0).await, [] as [Value; 0]);

    // Missing rights on tables are reported by table.
    let migrated = Standpipe::run(&["migrate"], &variables, RUN).await;
    assert_eq!(migrated.code, 0, "{migrated:?}");
    execute(&admin, "CREATE ROLE guest LOGIN; GRANT USAGE ON SCHEMA standpipe TO guest").await;
    execute(&admin, "GRANT SELECT ON ALL TABLES IN SCHEMA standpipe TO guest").await;
    let guest = variables.clone().with("DATABASE_URL", modest.replace("modest@", "guest@"));
    let words = ["DELETE, INSERT, SELECT, UPDATE on table blocks", "GRANT", "TO guest", "docs/security.md"];
    assert_only(&findings(&guest, &["warning", "error"], 1).await, "PostgreSQL", "rights", &words);
    execute(&admin, "REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA standpipe FROM public").await;
    let found = findings(&guest, &["error"], 1).await;
    assert!(found[0]["found"].as_str().unwrap().contains("EXECUTE on function standpipe."), "{found:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_postgresql_roles_suffice() {
    let redis = Redis::start_with(good_redis()).await;
    let postgres = Postgres::start().await;
    let admin = postgres.url("postgres");
    let sql = documented("sql\n");
    // This server's superuser already has that name.
    for statement in sql[0].replace("standpipe", "keeper").split_inclusive(';') {
        execute(&admin, statement).await;
    }
    let owner = format!("postgres://keeper:PASSWORD@127.0.0.1:{}/keeper", postgres.port());
    let variables = variables(&redis.url(), &owner);
    assert_eq!(findings(&variables, &["warning", "error"], 0).await, [] as [Value; 0]);
    let migrated = Standpipe::run(&["migrate"], &variables, RUN).await;
    assert_eq!(migrated.code, 0, "{migrated:?}");

    execute(&admin, "ALTER ROLE keeper CREATEROLE").await;
    execute(&owner, &sql[1]).await;
    let worker = format!("postgres://standpipe_worker:PASSWORD@127.0.0.1:{}/keeper", postgres.port());
    let network = network(300);
    let relay = Relay::start(&network, None).await;
    let variables =
        variables.with("DATABASE_URL", worker).with("AUTO_MIGRATE", "false").with("RELAY_URL", relay.url());
    assert_eq!(findings(&variables, &["warning", "error"], 0).await, [] as [Value; 0]);
    let program = Program::start("run", &variables.clone().with("HTTP_ADDR", "127.0.0.1:0")).await;
    wait_until("the last event", RUN, async || {
        look(&redis).await.is_ok_and(|look| look.is_finished(relay.last_seq))
    })
    .await;
    assert_eq!(look(&redis).await.unwrap().dead_letters, 0);
    drop(program);
}

// ---------------------------------------------------------------------------------------------
// PostgreSQL

#[tokio::test(flavor = "multi_thread")]
async fn too_few_connections_are_reported_with_the_number_needed() {
    let redis = Redis::start_with(good_redis()).await;
    let postgres = Postgres::start_with(PostgresOptions { max_connections: 20, ..Postgres::options() }).await;
    let database = postgres.fresh_database().await;
    let name = database.rsplit_once('/').unwrap().1.to_owned();
    execute(&database, &format!("CREATE ROLE few LOGIN; ALTER DATABASE {name} OWNER TO few")).await;
    let few = format!("postgres://few@127.0.0.1:{}/{name}", postgres.port());
    execute(&database, "ALTER SCHEMA public OWNER TO few").await;
    let variables = variables(&redis.url(), &few);
    // Three of the twenty are reserved for superusers.
    let words = [
        "DB_POOL_SIZE=20 × 1 process = 20",
        "at most 17",
        "raise max_connections to 23",
        "lower DB_POOL_SIZE",
    ];
    assert_only(&findings(&variables, &["warning", "error"], 1).await, "PostgreSQL", "connections", &words);
    execute(&database, "ALTER ROLE few CONNECTION LIMIT 4").await;
    let words = ["at most 4", "ALTER ROLE few CONNECTION LIMIT 20"];
    assert_only(&findings(&variables, &["warning", "error"], 1).await, "PostgreSQL", "connections", &words);
    let enough = variables.clone().with("DB_POOL_SIZE", "4").with("PARALLEL_CONSUMERS", "2");
    assert_eq!(findings(&enough, &["warning", "error"], 0).await, [] as [Value; 0]);

    // Two processes need twice as many.
    let _: () = redis_command(
        &redis,
        &["XGROUP", "CREATE", "firehose:events", "firehose-processors", "0", "MKSTREAM"],
    )
    .await;
    for id in ["a", "b"] {
        let consumer = format!("{id}-0");
        let _: u64 = redis_command(
            &redis,
            &["XGROUP", "CREATECONSUMER", "firehose:events", "firehose-processors", &consumer],
        )
        .await;
        let lease = format!("firehose:events:firehose-processors:{id}:lease");
        let _: () = redis_command(&redis, &["SET", &lease, "token"]).await;
    }
    let words = ["DB_POOL_SIZE=4 × 2 processes = 8"];
    assert_only(&findings(&enough, &["warning", "error"], 1).await, "PostgreSQL", "connections", &words);

    // None left at all.
    execute(&database, "ALTER ROLE few CONNECTION LIMIT 0").await;
    let words = ["too many connections", "CONNECTION LIMIT"];
    assert_only(&findings(&variables, &["error"], 69).await, "PostgreSQL", "connection", &words);
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_tables_bad_indexes_and_unsafe_settings_are_found() {
    let redis = Redis::start_with(good_redis()).await;
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let variables = variables(&redis.url(), &database);
    let by_hand = variables.clone().with("AUTO_MIGRATE", "false");
    let words = ["no tables", "AUTO_MIGRATE is false", "standpipe migrate"];
    assert_only(&findings(&by_hand, &["warning", "error"], 1).await, "PostgreSQL", "migrations", &words);
    let migrated = Standpipe::run(&["migrate"], &variables, RUN).await;
    assert_eq!(migrated.code, 0, "{migrated:?}");
    assert_eq!(findings(&by_hand, &["warning", "error"], 0).await, [] as [Value; 0]);

    execute(&database, "DROP INDEX idx_likes_post_user").await;
    let words =
        ["likes has no index that begins with post_uri", "CREATE INDEX CONCURRENTLY", "idx_likes_post_user"];
    let found = findings(&variables, &["warning", "error"], 0).await;
    assert_only(&found, "PostgreSQL", "indexes", &words);
    execute(&database, found[0]["remedy"].as_str().unwrap()).await;
    assert_eq!(findings(&variables, &["warning", "error"], 0).await, [] as [Value; 0]);

    // This is how an interrupted CREATE INDEX CONCURRENTLY leaves it.
    execute(&database, "CREATE INDEX broken ON likes (via)").await;
    execute(&database, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'broken'::regclass").await;
    let words = ["broken is INVALID", "DROP INDEX CONCURRENTLY broken"];
    assert_only(&findings(&variables, &["warning", "error"], 0).await, "PostgreSQL", "indexes", &words);
    execute(&database, "DROP INDEX broken").await;

    execute(&database, "ALTER TABLE reposts DROP CONSTRAINT reposts_pkey").await;
    let words = ["reposts has no unique index on uri"];
    assert_only(&findings(&variables, &["warning", "error"], 1).await, "PostgreSQL", "indexes", &words);
    execute(&database, "ALTER TABLE reposts ADD PRIMARY KEY (uri)").await;

    execute(&database, "ALTER ROLE CURRENT_USER SET default_transaction_read_only = on").await;
    // Defaults of the role and the database are overridden on our connections.
    assert_eq!(findings(&variables, &["error"], 0).await, [] as [Value; 0]);
    execute(
        &format!("{database}?options=-cdefault_transaction_read_only%3Doff"),
        "ALTER ROLE CURRENT_USER RESET default_transaction_read_only",
    )
    .await;

    execute(&database, "ALTER SYSTEM SET fsync = off").await;
    execute(&database, "ALTER SYSTEM SET full_page_writes = off").await;
    execute(&database, "ALTER SYSTEM SET autovacuum = off").await;
    execute(&database, "SELECT pg_reload_conf()").await;
    wait_until("the settings", SOON, async || query_value(&database, "SHOW autovacuum").await == "off").await;
    let page = check(&variables).await;
    assert!(
        page.stdout.contains("full_page_writes is off") && page.stdout.contains("autovacuum = on"),
        "{}",
        page.stdout
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_taken_over_from_the_old_workers_has_no_errors() {
    let redis = Redis::start_with(good_redis()).await;
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    crate::support::old_database::create_full(&database).await;
    let variables = variables(&redis.url(), &database);
    let before = findings(&variables, &["error"], 0).await;
    assert_eq!(before, [] as [Value; 0]);
    let migrated = Standpipe::run(&["migrate"], &variables, RUN).await;
    assert_eq!(migrated.code, 0, "{migrated:?}");
    let mut found = findings(&variables, &["warning", "error"], 0).await;
    // The test data includes foreign keys, which cause a warning.
    found.retain(|finding| finding["what"] != "tables");
    assert_eq!(found, [] as [Value; 0]);
}

// ---------------------------------------------------------------------------------------------
// The stream

#[tokio::test(flavor = "multi_thread")]
async fn problems_with_the_stream_are_explained() {
    let redis = Redis::start_with(good_redis()).await;
    let postgres = Postgres::start().await;
    let variables = variables(&redis.url(), &postgres.fresh_database().await);
    let redis_command = async |words: &str| -> redis::Value {
        let words: Vec<&str> = words.split(' ').collect();
        redis_command(&redis, &words).await
    };
    for seq in 1..=20 {
        redis_command(&format!("XADD firehose:events {seq}-1 type commit data {{}} seq {seq}")).await;
    }
    let found = findings(&variables, &["warning", "error"], 0).await;
    assert_only(
        &found,
        "Redis",
        "stream",
        &["there is no group firehose-processors", "REDIS_CONSUMER_GROUP"],
    );

    // A consumer that died with entries in hand, another group that nobody reads, and someone who trims.
    redis_command("XGROUP CREATE firehose:events firehose-processors 0").await;
    redis_command("XGROUP CREATE firehose:events forgotten 0").await;
    redis_command("XREADGROUP GROUP firehose-processors old-0 COUNT 10 STREAMS firehose:events >").await;
    redis_command("XCLAIM firehose:events firehose-processors old-0 0 1-1 2-1 3-1 IDLE 3600000 JUSTID").await;
    redis_command("XDEL firehose:events 4-1 5-1").await;
    redis_command("SET firehose:cursor 20").await;
    redis_command("SET firehose:cursor:relay other.example").await;
    let found = findings(&variables, &["warning", "error"], 0).await;
    let one = |what: &str, words: &[&str]| {
        let of: Vec<Value> = found.iter().filter(|finding| finding["what"] == what).cloned().collect();
        assert_only(&of, "Redis", what, words);
    };
    one("consumers", &["old-0 (10 pending", "CLAIM_IDLE (1m)", "never XGROUP DELCONSUMER"]);
    one("trim", &["forgotten", "XGROUP DESTROY firehose:events forgotten"]);
    one("pending entries", &["2 of 10", "4-1, 5-1", "MAXLEN"]);
    one("cursor", &["belongs to other.example", "bsky.network", "gap"]);
    one("stream", &["the oldest unfinished entry"]);

    // A lease means that its process is alive.
    redis_command("SET firehose:events:firehose-processors:old:lease token").await;
    let found = findings(&variables, &["warning", "error"], 0).await;
    assert!(!found.iter().any(|finding| finding["what"] == "consumers"), "{found:#?}");
}

// ---------------------------------------------------------------------------------------------
// Unreachable servers, and secrets

#[tokio::test(flavor = "multi_thread")]
async fn check_exits_69_for_an_unreachable_server_and_still_checks_the_other() {
    let mut redis = Redis::start_with(good_redis()).await;
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let variables = variables(&redis.url(), &database);
    redis.stop().await.unwrap();
    let found = findings(&variables, &["warning", "error"], 69).await;
    assert_only(&found, "Redis", "connection", &["REDIS_URL", "start it"]);
    let page = check(&variables).await.stdout;
    assert!(page.contains("PostgreSQL 1") && page.contains("may create what is missing"), "{page}");

    postgres.stop_fast().await.unwrap();
    let found = findings(&variables, &["warning", "error"], 69).await;
    assert_eq!(found.len(), 2, "{found:#?}");
    redis.start_again().await.unwrap();
    let found = findings(&variables, &["warning", "error"], 69).await;
    assert_only(&found, "PostgreSQL", "connection", &["DATABASE_URL", "start it"]);
    let page = check(&variables).await.stdout;
    assert!(page.contains("noeviction"), "{page}");

    postgres.start_again().await.unwrap();
    let nowhere = variables.clone().with("DATABASE_URL", database.replace("test_0", "nowhere"));
    let found = findings(&nowhere, &["warning", "error"], 69).await;
    assert_only(&found, "PostgreSQL", "connection", &["3D000", "create the database"]);

    let bad = variables.with("CLAIM_IDLE", "1");
    let finished = check(&bad).await;
    assert!(finished.code == 64 && finished.stderr.contains("CLAIM_IDLE"), "{finished:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_passwords_are_reported_with_a_remedy_and_no_secret_is_printed() {
    let redis = Redis::start_with(good_redis()).await;
    let redis_url = set_user(&redis, &[]).await;
    let postgres = Postgres::start().await;
    let admin = postgres.url("postgres");
    execute(
        &admin,
        &format!("CREATE ROLE guarded LOGIN PASSWORD '{SECRET}'; ALTER DATABASE postgres OWNER TO guarded"),
    )
    .await;
    execute(&admin, "ALTER SCHEMA public OWNER TO guarded").await;
    let rules = postgres.folder().join("data/pg_hba.conf");
    let old = std::fs::read_to_string(&rules).unwrap();
    std::fs::write(&rules, format!("host all guarded 127.0.0.1/32 scram-sha-256\n{old}")).unwrap();
    execute(&admin, "SELECT pg_reload_conf()").await;
    let database = format!("postgres://guarded:{SECRET}@127.0.0.1:{}/postgres", postgres.port());
    wait_until("the password to be asked for", SOON, async || {
        let without = database.replace(SECRET, "no");
        tokio_postgres::connect(&without, tokio_postgres::NoTls).await.is_err()
    })
    .await;

    let right = variables(&redis_url, &database);
    assert_eq!(findings(&right, &["warning", "error"], 0).await, [] as [Value; 0]);
    // The secret in another form, which no server accepts.
    let wrong = |url: &str| url.replace(SECRET, &format!("{SECRET}%21"));
    let wrong_redis = right.clone().with("REDIS_URL", wrong(&redis_url));
    let wrong_database = right.clone().with("DATABASE_URL", wrong(&database));
    let found = findings(&wrong_redis, &["warning", "error"], 69).await;
    assert_only(&found, "Redis", "connection", &["refuses the user or password", "REDIS_URL"]);
    let found = findings(&wrong_database, &["warning", "error"], 69).await;
    assert_only(
        &found,
        "PostgreSQL",
        "connection",
        &["refuses the user or password", "28P01", "DATABASE_URL"],
    );

    for level in [("LOG_LEVEL", "DEBUG"), ("RUST_LOG", "trace")] {
        for variables in [&right, &wrong_redis, &wrong_database] {
            let variables = variables.clone().with(level.0, level.1);
            for command in
                [&["check"][..], &["check", "--json"], &["status"], &["status", "--json"], &["help-env"]]
            {
                let finished = Standpipe::run(command, &variables, RUN).await;
                let output = format!("{}{}", finished.stdout, finished.stderr);
                assert!(!output.is_empty() && !output.contains(SECRET), "{command:?}: {output}");
            }
            for command in ["run", "worker", "reader"] {
                let relay = format!("ws://user:{SECRET}@127.0.0.1:{}", free_port().unwrap());
                let mut program = Standpipe::start(
                    &[command],
                    &variables.clone().with("RELAY_URL", relay).with("HTTP_ADDR", "127.0.0.1:0"),
                );
                program.wait_for_line("started", SOON).await;
                tokio::time::sleep(Duration::from_millis(700)).await;
                program.signal(Signal::Term);
                program.wait_exit(SOON).await;
                assert!(!program.output().contains(SECRET), "{command}: {}", program.output());
            }
        }
    }
}
