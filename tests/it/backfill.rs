//! Backfills: an empty database gets what the network has, while events go on, however often everything is interrupted.

use std::time::Duration;

use standpipe_lab::simulate::{self, NetworkOptions};

use crate::support::chain::{self, Chain, Program, RUN, Variables, purged};
use crate::support::{Signal, Standpipe, connect, model, query_value, traffic, wait_for};

/// Accounts sign; none goes away, whose records nobody could fetch any more.
fn network(accounts: u32, events: u64) -> NetworkOptions {
    NetworkOptions {
        seed: 21,
        accounts,
        events,
        signed: true,
        new_keys: false,
        departures: false,
        ..NetworkOptions::default()
    }
}

fn verified(chain: &Chain) -> Variables {
    chain
        .variables()
        .with("VERIFY", "on")
        .with("PLC_URL", chain.relay.url().replace("ws://", "http://"))
        .with("ALLOW_PRIVATE_ADDRESSES", "true")
}

/// How many accounts were queued by a backfill and are in this state.
async fn backfilled(chain: &Chain, state: &str) -> u64 {
    let sql = format!("SELECT count(*) FROM standpipe.repos WHERE state = '{state}' AND reason = 'backfill'");
    query_value(&chain.database, &sql).await.parse().unwrap()
}

/// The reader begins at the end of what has happened: everything before comes from the accounts' servers. Meanwhile the
/// process is killed again and again, and nearly nothing is fetched twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_database_gets_what_the_network_has_while_events_go_on() {
    let long = std::env::var_os("STANDPIPE_LONG").is_some();
    let (accounts, events, kills) = if long { (20_000, 700_000, 10) } else { (300, 12_000, 3) };
    let network = network(accounts, events);
    let chain = Chain::start(&network, Some(if long { 4000 } else { 400 })).await;
    let variables = verified(&chain).with("BACKFILL", "all").with("REPAIR_CONCURRENCY", "8");
    // So that the servers show nearly all of it from the start, and the last tenth is live.
    let numbers: Vec<u64> = simulate::sequence_numbers(&network).collect();
    let live = numbers[numbers.len() * 9 / 10];
    chain.relay.counters.last_seq_sent.store(live - 1, std::sync::atomic::Ordering::SeqCst);
    let mut redis = chain.redis.connection().await;
    let _: () = redis::pipe()
        .set(chain::CURSOR, live - 1)
        .set(chain::CURSOR_RELAY, chain.relay.name())
        .query_async(&mut redis)
        .await
        .unwrap();
    assert_eq!(Standpipe::run(&["migrate"], &variables, RUN).await.code, 0);
    let mut program = Program::start("run", &variables).await;
    for kill in 1..=kills {
        wait_for("some accounts to be compared", RUN, async || {
            let done = backfilled(&chain, "synced").await;
            if done >= u64::from(accounts) / 20 * kill { Ok(()) } else { Err(format!("{done}")) }
        })
        .await;
        program.signal(Signal::Kill);
        assert_eq!(program.wait_exit(Duration::from_secs(10)).await, 128 + 9);
        assert!(backfilled(&chain, "queued").await > 0, "there is nothing left to interrupt");
        program = Program::start("run", &variables).await;
    }
    let limit = RUN * if long { 10 } else { 1 };
    wait_for("everything to be compared", limit, async || {
        let sql = "SELECT count(*) FROM standpipe.repos WHERE state = 'queued'";
        let left = query_value(&chain.database, sql).await;
        let complete = query_value(&chain.database, "SELECT count(done_at) FROM standpipe.backfills").await;
        if left == "0" && complete == "1" { Ok(()) } else { Err(format!("{left} left, {complete} complete")) }
    })
    .await;
    chain.finished().await;
    let fetched = chain.relay.counters.repositories_sent.load(std::sync::atomic::Ordering::SeqCst);
    let listed: u64 =
        query_value(&chain.database, "SELECT listed::text FROM standpipe.backfills").await.parse().unwrap();
    let repaired: u64 = query_value(&chain.database, "SELECT sum(requests - 1)::text FROM standpipe.repos")
        .await
        .parse()
        .unwrap();
    println!("{listed} listed, {fetched} fetched, {repaired} asked for again");
    assert!(fetched <= listed + repaired + 8 * kills, "{fetched} fetched of {listed}");

    let list = Standpipe::run(&["repos", "list"], &variables, RUN).await;
    assert!(
        list.stdout.contains("backfill all: ") && list.stdout.contains("; complete\n"),
        "{}",
        list.stdout
    );
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(Duration::from_mins(1)).await, 0, "{}", program.output());
    purged(&chain.database).await;
    let audit = Standpipe::run(&["audit"], &variables, RUN).await;
    assert_eq!(audit.code, 0, "{}{}", audit.stdout, audit.stderr);
    let expected =
        tokio::task::spawn_blocking(move || model::expected(&traffic::events(&network))).await.unwrap();
    let found = model::read(&connect(&chain.database).await).await;
    let repositories = |tables: model::Tables| tables.without_versions().of_repositories();
    model::assert_same("after the backfill", &repositories(expected), &repositories(found));
}
