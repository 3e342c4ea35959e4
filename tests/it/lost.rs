//! A fifth of all commits never arrives, while accounts change their keys and servers and everything is killed during the
//! repairs: in the end the tables are what the network says. What arrives late changes nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use standpipe_lab::servers::PostgresOptions;
use standpipe_lab::simulate::{self, Counters, Late, Network, NetworkOptions, RelayOptions, Source};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::support::chain::{self, RUN, SOON, Variables, purged};
use crate::support::scripted::{Op, create, delete, post, rev};
use crate::support::signed::{Plc, Signed};
use crate::support::stage::{Frames, Stage, path, write};
use crate::support::{
    Postgres, Redis, Signal, Standpipe, TcpProxy, connect, free_port, model, query_rows, query_value,
    traffic, wait_for, wait_until,
};

/// A relay at a port of its own, so that another one can take its place.
struct Relay {
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Relay {
    async fn start(port: u16, network: &NetworkOptions, rate: Option<u32>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let stop = CancellationToken::new();
        let options = RelayOptions { source: Source::Network(network.clone()), rate };
        let serving =
            tokio::spawn(simulate::serve(listener, options, Arc::<Counters>::default(), stop.clone()));
        Self { stop, serving }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.serving.await.unwrap().unwrap();
    }
}

/// Everything that is killed.
struct House {
    redis: Redis,
    postgres: Postgres,
    database: String,
    variables: Variables,
    /// One that reads and works, and one that works.
    daemons: [Option<Standpipe>; 2],
}

impl House {
    fn start(&mut self, index: usize) {
        let command = ["run", "worker"][index];
        let variables = self.variables.clone().with("CONSUMER_ID", format!("daemon-{index}"));
        self.daemons[index] = Some(Standpipe::start(&[command], &variables));
    }

    async fn cursor_is(&self, last: u64) {
        wait_for(&format!("the cursor to be {last}"), RUN * 5, async || {
            let look = chain::look(&self.redis).await.map_err(|error| error.to_string())?;
            let is_there = look.is_finished(i64::try_from(last).unwrap());
            if is_there { Ok(()) } else { Err(format!("{look:?}")) }
        })
        .await;
    }

    /// Waits until nothing is left to repair or to check.
    async fn repaired(&self) {
        wait_for("every repository to be repaired", RUN * 5, async || {
            let queued = query_rows(
                &self.database,
                "SELECT did, reason, message, attempts FROM standpipe.repos WHERE state <> 'synced'",
            )
            .await;
            let mut redis = self.redis.connection().await;
            let waiting: (u64, u64) = redis::pipe()
                .hlen("firehose:events:repairs")
                .hlen("firehose:events:unchecked")
                .query_async(&mut redis)
                .await
                .unwrap();
            let look = chain::look(&self.redis).await.unwrap();
            if queued.is_empty() && waiting == (0, 0) && look.is_drained() {
                Ok(())
            } else {
                Err(format!("{waiting:?} {look:?} {} not synced: {:?}", queued.len(), queued.first()))
            }
        })
        .await;
    }

    /// The tables are the network's, and the audit finds nothing.
    async fn is(&self, expected: &model::Tables, when: &str) {
        let audit = Standpipe::run(&["audit"], &[("DATABASE_URL", &self.database)], RUN).await;
        assert_eq!(audit.code, 0, "{when}: {}{}", audit.stdout, audit.stderr);
        let found = model::read(&connect(&self.database).await).await;
        model::assert_same(when, expected, &found.without_versions());
    }

    /// Waits until a repository is being repaired at this moment.
    async fn repairs(&self) {
        let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 29297";
        wait_until("a repository to be repaired", RUN, async || {
            query_value(&self.database, sql).await != "0"
        })
        .await;
    }

    async fn numbers(&self) -> String {
        let sql =
            "SELECT count(*) || ' repositories repaired, ' || sum(requests) || ' requests, ' || sum(healed)
                   || ' healed, ' || sum(deleted) || ' deleted at the last repair' FROM standpipe.repos";
        query_value(&self.database, sql).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fifth_of_all_commits_is_lost_and_the_tables_are_what_the_network_says() {
    let long = std::env::var_os("STANDPIPE_LONG").is_some();
    let seed =
        std::env::var("STANDPIPE_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().unwrap());
    println!("STANDPIPE_SEED={seed}");
    let (accounts, events, rate, kills) = if long { (1000, 100_000, 1000, 4) } else { (100, 6000, 400, 1) };
    let network = NetworkOptions {
        seed,
        accounts,
        events,
        signed: true,
        // The server of an account that is gone shows nothing that could be repaired.
        departures: false,
        ..NetworkOptions::default()
    };
    let drops = NetworkOptions { drops: 5, ..network.clone() };
    let told = Network::new(&drops).count() as u64;
    let dropped = events - told;
    println!("{dropped} of {events} events are dropped");
    assert!(dropped > events / 7);

    let redis = Redis::start().await;
    let postgres = Postgres::start_with(PostgresOptions { fsync: true, ..Postgres::options() }).await;
    let database = postgres.fresh_database().await;
    let port = free_port().unwrap();
    let relay = Relay::start(port, &drops, Some(rate)).await;
    let variables = Variables::new()
        .with("RELAY_URL", format!("ws://127.0.0.1:{port}"))
        .with("PLC_URL", format!("http://127.0.0.1:{port}"))
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("HTTP_ADDR", "off")
        .with("VERIFY", "on")
        .with("CLAIM_IDLE", "10s")
        .with("ALLOW_PRIVATE_ADDRESSES", "true");
    let mut house = House { redis, postgres, database, variables, daemons: [None, None] };
    house.start(0);
    house.start(1);
    wait_until("the database to be ready", SOON, async || {
        let tables = "SELECT FROM pg_tables WHERE tablename = 'backfills'";
        !query_rows(&house.database, tables).await.is_empty()
    })
    .await;
    for kill in 0..kills {
        for index in [0, 1] {
            house.repairs().await;
            let mut daemon = house.daemons[index].take().unwrap();
            daemon.signal(Signal::Kill);
            assert_eq!(daemon.wait_exit(SOON).await, 128 + 9, "{}", daemon.output());
            house.start(index);
        }
        house.repairs().await;
        house.redis.sigkill().await.unwrap();
        assert!(house.redis.truncate_aof_tail(1000 * (kill + 1)).unwrap() > 0, "nothing was cut");
        house.redis.start_again().await.unwrap();
        house.repairs().await;
        house.postgres.sigkill().await.unwrap();
        house.postgres.start_again().await.unwrap();
    }

    let expected = tokio::task::spawn_blocking(move || model::expected(&traffic::events(&network)));
    let last = simulate::sequence_numbers(&drops).last().unwrap();
    house.cursor_is(last).await;
    let arrived = Instant::now();
    house.repaired().await;
    println!(
        "repaired {:.1} s after the last event: {}",
        arrived.elapsed().as_secs_f64(),
        house.numbers().await
    );
    // On a machine as busy as one that runs all tests, a minute says little.
    assert!(!long || arrived.elapsed() < Duration::from_mins(1), "{:?}", arrived.elapsed());
    purged(&house.database).await;
    let expected = expected.await.unwrap().without_versions();
    house.is(&expected, "after the repairs").await;

    relay.stop().await;
    for (late, when) in [
        (Late::Creates, "after the creates whose deletes were lost had come late"),
        (Late::Everything, "after all that was lost had come late"),
    ] {
        let network = NetworkOptions { late, ..drops.clone() };
        let frames = network.clone();
        let frames = tokio::task::spawn_blocking(move || {
            let late: Vec<u64> = Network::new(&frames).filter_map(|frame| frame.seq).collect();
            (late.len() as u64 - told, *late.last().unwrap())
        });
        let (count, last) = frames.await.unwrap();
        println!("{late:?}: {count} commits come late");
        assert!(count > dropped / 3);
        let relay = Relay::start(port, &network, None).await;
        house.cursor_is(last).await;
        house.repaired().await;
        house.is(&expected, when).await;
        relay.stop().await;
    }
    for daemon in &mut house.daemons {
        let daemon = daemon.as_mut().unwrap();
        daemon.signal(Signal::Term);
        assert_eq!(daemon.wait_exit(RUN).await, 0, "{}", daemon.output());
    }
}

/// A worker stands still with a create in its hands, whose delete was lost. Meanwhile the account is repaired; then the worker
/// goes on, and the record does not come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stands_still_during_a_repair_does_not_bring_back_what_was_deleted() {
    for transaction in ["event", "batch"] {
        let plc = Plc::start().await;
        let mut account = Signed::new(2);
        let mut frames = Frames::default();
        frames.commit(&mut account, &[write("first"), write("changes")]);
        let old = create(&path("changes"), &post("old"));
        frames.commit(&mut account, &[write("ghost"), Op { action: "update", ..old }]);
        // Lost: what takes both back. The tables are right without it, as long as the worker stands still.
        let undone = Op { action: "update", ..write("changes") };
        account.commit(0, &rev(10), &[delete(&path("ghost")), undone]);
        frames.push(|seq, _| account.commit(seq, &rev(20), &[write("reveals")]));
        plc.publish(&account);
        plc.serve(&account);
        // Reads the relay, and does all the rest once the other worker stands still.
        let settings = [("TRANSACTION", transaction), ("PARALLEL_CONSUMERS", "1"), ("CLAIM_IDLE", "1h")];
        let mut stage = Stage::start(plc, frames.0, &settings).await;
        stage.send(1).await;
        stage.all_checked().await;
        stage.program.signal(Signal::Term);
        assert_eq!(stage.program.wait_exit(SOON).await, 0);

        let proxy = TcpProxy::for_url(&stage.chain.database).await;
        let slow = stage
            .variables
            .clone()
            .with("DATABASE_URL", proxy.url_through(&stage.chain.database))
            .with("REPAIR_CONCURRENCY", "0")
            .with("CONSUMER_ID", "slow");
        let mut slow = chain::Program::start("worker", &slow).await;
        wait_until("the worker to be ready", SOON, async || slow.readiness().await.0 == 200).await;
        proxy.black_hole(true).await;
        let reader = stage.variables.clone().with("CONSUMER_ID", "reader");
        let mut reader = chain::Program::start("reader", &reader).await;
        stage.allow(1);
        wait_until("the worker to have the create in its hands", SOON, async || {
            stage.chain.look().await.pending == 1 && proxy.swallowed_bytes() > 0
        })
        .await;
        let mut quick =
            chain::Program::start("worker", &stage.variables.clone().with("CONSUMER_ID", "quick")).await;
        stage.allow(1);
        wait_until("the account to be repaired", RUN, async || {
            !query_rows(&stage.chain.database, "SELECT FROM standpipe.repos WHERE state = 'synced'")
                .await
                .is_empty()
        })
        .await;
        assert_eq!(
            stage.chain.look().await.pending,
            1,
            "{transaction}: the worker does not hold it any more"
        );
        assert_eq!(stage.texts().await, ["changes", "first", "reveals"], "{transaction}");
        proxy.black_hole(false).await;
        stage.applied().await;
        assert_eq!(
            stage.texts().await,
            ["changes", "first", "reveals"],
            "{transaction}: after the worker went on"
        );
        for program in [&mut slow, &mut quick, &mut reader] {
            program.signal(Signal::Term);
            assert_eq!(program.wait_exit(RUN).await, 0, "{}", program.output());
        }
        let audit = Standpipe::run(&["audit"], &stage.variables, RUN).await;
        assert_eq!(audit.code, 0, "{}{}", audit.stdout, audit.stderr);
    }
}
