//! `standpipe status` in human-readable form: with a process, with the servers alone, and repeatedly.

use std::time::Duration;

use crate::support::chain::{Chain, Program, RUN, SOON, Variables, network, redis_command};
use crate::support::{Finished, Postgres, Redis, Signal, Standpipe, free_port, wait_for, wait_until};
use serde_json::Value;

async fn status(variables: &Variables, arguments: &[&str]) -> Finished {
    let arguments: Vec<&str> = ["status"].iter().chain(arguments).copied().collect();
    Standpipe::run(&arguments, variables, RUN).await
}

fn nobody_at_http(variables: &Variables) -> Variables {
    variables.clone().with("HTTP_ADDR", format!("127.0.0.1:{}", free_port().unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_what_the_process_and_the_servers_report() {
    let mut chain = Chain::start(&network(300), None).await;
    let bad = ["XADD", "firehose:events", "*", "type", "commit", "data", "{", "seq", "0"];
    let _: String = redis_command(&chain.redis, &bad).await;
    let program = Program::start("run", &chain.variables()).await;
    chain.finished().await;
    let with_process = chain.variables().with("HTTP_ADDR", program.http.to_string());

    let page = status(&with_process, &[]).await;
    assert_eq!(page.code, 0, "{page:?}");
    let cursor = chain.relay.last_seq.to_string();
    for words in [
        // How many of them the janitor has trimmed by now does not matter.
        "stream        firehose:events: ",
        "group         firehose-processors",
        "waiting       0",
        &cursor,
        "dead letters  1: 1 undecodable",
        "reader        running, connected to 127.0.0.1",
        "connections in use, at most 20",
        "process       up for",
        "PIPELINE",
        "test-4",
    ] {
        assert!(page.stdout.contains(words), "{words:?} is not in\n{}", page.stdout);
    }
    assert!(!page.stdout.contains('\x1b') && !page.stdout.contains("CONSUMER"), "{}", page.stdout);

    // With the servers alone.
    let without = nobody_at_http(&chain.variables());
    let page = status(&without, &[]).await;
    assert_eq!(page.code, 0, "{page:?}");
    for words in
        ["firehose:events: ", "1: 1 undecodable", "no process answers at HTTP_ADDR", "CONSUMER", "test-4"]
    {
        assert!(page.stdout.contains(words), "{words:?} is not in\n{}", page.stdout);
    }
    assert!(page.stdout.contains("PostgreSQL    answers, tables at version"), "{}", page.stdout);

    // The current rate, not the average since the start.
    wait_for("nothing to be done any more", SOON, async || {
        let process = &program.status().await["process"];
        let now = process["entries_per_second"] == 0.0 && process["entries"] == 301;
        if now { Ok(()) } else { Err(process.to_string()) }
    })
    .await;

    // Without Redis the process still reports its state.
    chain.redis.stop().await.unwrap();
    let page = wait_for("the process to see it", SOON, async || {
        let page = status(&with_process, &[]).await;
        if page.stdout.contains("waiting for Redis") { Ok(page) } else { Err(format!("{page:?}")) }
    })
    .await;
    assert_eq!(page.code, 69, "{page:?}");
    assert!(page.stdout.contains("trouble       Redis:") && page.stdout.contains("PIPELINE"), "{page:?}");
    let page = status(&without, &[]).await;
    assert!(page.code == 69 && page.stdout.contains("Redis at redis://127.0.0.1:"), "{page:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_database_is_reported_and_redis_is_still_shown() {
    let redis = Redis::start().await;
    let mut postgres = Postgres::start().await;
    let variables = nobody_at_http(&Variables::new())
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", postgres.fresh_database().await);
    let page = status(&variables, &[]).await;
    assert!(page.code == 0 && page.stdout.contains("firehose:events does not exist yet"), "{page:?}");
    assert!(page.stdout.contains("version 0 of") && page.stdout.contains("standpipe migrate"), "{page:?}");
    postgres.stop_fast().await.unwrap();
    let page = status(&variables, &[]).await;
    assert!(page.code == 0 && page.stdout.contains("PostgreSQL    cannot be used"), "{page:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_prints_repeated_blocks_and_exits_cleanly() {
    let mut redis = Redis::start().await;
    let variables = nobody_at_http(&Variables::new()).with("REDIS_URL", redis.url());
    let mut watching = Standpipe::start(&["status", "--watch", "1"], &variables);
    let blocks = |text: &str, word: &str| text.matches(word).count();
    wait_until("two blocks", SOON, async || {
        blocks(&watching.stdout(), "firehose:events does not exist") >= 2
    })
    .await;
    // A server that goes down is not a reason to exit.
    redis.stop().await.unwrap();
    wait_until("the outage", SOON, async || blocks(&watching.stdout(), "cannot be reached") >= 2).await;
    redis.start_again().await.unwrap();
    let before = blocks(&watching.stdout(), "firehose:events does not exist");
    wait_until("it to be back", SOON, async || {
        blocks(&watching.stdout(), "firehose:events does not exist") > before
    })
    .await;
    watching.signal(Signal::Int);
    assert_eq!(watching.wait_exit(SOON).await, 0);
    assert!(!watching.stdout().contains('\x1b'), "{}", watching.stdout());

    let mut json = Standpipe::start(&["status", "--watch", "1", "--json"], &variables);
    wait_until("two lines", SOON, async || json.stdout().lines().count() >= 2).await;
    json.signal(Signal::Term);
    assert_eq!(json.wait_exit(SOON).await, 0);
    for line in json.stdout().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["stream"]["key"], "firehose:events");
    }
    for arguments in [["--watch", "0"], ["--watch", "soon"]] {
        assert_eq!(status(&variables, &arguments).await.code, 64, "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_redraws_in_place_on_a_terminal() {
    let redis = Redis::start().await;
    let program = env!("CARGO_BIN_EXE_standpipe");
    let command = format!("timeout --signal=INT --preserve-status 4 {program} status --watch 1");
    let output = tokio::time::timeout(
        Duration::from_secs(30),
        tokio::process::Command::new("script")
            .args(["-qec", &command, "/dev/null"])
            .env("REDIS_URL", redis.url())
            .env("HTTP_ADDR", "off")
            .env_remove("DATABASE_URL")
            .stdin(std::process::Stdio::null())
            .output(),
    )
    .await
    .unwrap()
    .expect("script(1), of bsdutils");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert_eq!(text.matches("\x1b[2J").count(), 1, "cleared once: {text:?}");
    assert!(text.matches("\x1b[H").count() >= 3 && text.contains("Ctrl-C to stop"), "{text:?}");
}
