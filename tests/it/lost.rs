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
    Postgres, Redis, Signal, Standpipe, TcpProxy, connect, execute, free_port, model, query_rows,
    query_value, traffic, wait_for, wait_until,
};

/// A relay at a port of its own, so that another one can take its place.
struct Relay {
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Relay {
    async fn start(port: u16, network: &NetworkOptions, rate: Option<u32>) -> Self {
        Self::with_window(port, network, rate, 0).await
    }

    /// One that has nothing before `oldest` any more.
    async fn with_window(port: u16, network: &NetworkOptions, rate: Option<u32>, oldest: u64) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let stop = CancellationToken::new();
        let options = RelayOptions { source: Source::Network(network.clone()), rate, oldest };
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
        let long = std::env::var_os("STANDPIPE_LONG").is_some();
        wait_for("every repository to be repaired", RUN * 5, async || {
            if !long {
                // The pause between two repairs of an account is not what a short run is about.
                let sooner =
                    "UPDATE standpipe.repos SET retry_at = least(retry_at, now() + interval '1 second')
                              WHERE state = 'queued'";
                execute(&self.database, sooner).await;
            }
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
        wait_for("the account to be repaired", RUN, async || {
            let sql = "SELECT state, reason, message, attempts, retry_at - now() FROM standpipe.repos";
            let found = query_rows(&stage.chain.database, sql).await;
            let is_synced = found.first().is_some_and(|row| row[0].as_deref() == Some("synced"));
            if is_synced { Ok(()) } else { Err(format!("{found:?} {:?}", stage.chain.look().await)) }
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

/// The environment of a test's gap, and the relay's port.
async fn gap_house() -> (House, u16) {
    let (redis, postgres) = (Redis::start().await, Postgres::start().await);
    let database = postgres.fresh_database().await;
    let port = free_port().unwrap();
    let variables = Variables::new()
        .with("RELAY_URL", format!("ws://127.0.0.1:{port}"))
        .with("PLC_URL", format!("http://127.0.0.1:{port}"))
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("VERIFY", "on")
        .with("ALLOW_PRIVATE_ADDRESSES", "true");
    (House { redis, postgres, database, variables, daemons: [None, None] }, port)
}

/// A network, and the numbers of its events.
fn gap_network(events: u64, departures: bool) -> (NetworkOptions, Vec<u64>) {
    let network = NetworkOptions {
        seed: 31,
        accounts: 60,
        events,
        signed: true,
        departures,
        new_keys: false,
        ..NetworkOptions::default()
    };
    let numbers = simulate::sequence_numbers(&network).collect();
    (network, numbers)
}

impl House {
    /// Reads and applies the first events, from a relay that then ends.
    async fn reads(&self, port: u16, network: &NetworkOptions, events: u64) {
        let network = NetworkOptions { events, ..network.clone() };
        let relay = Relay::start(port, &network, None).await;
        let mut program = chain::Program::start("run", &self.variables).await;
        self.cursor_is(simulate::sequence_numbers(&network).last().unwrap()).await;
        wait_until("everything to be checked", RUN, async || {
            let left: u64 = chain::redis_command(&self.redis, &["HLEN", "firehose:events:unchecked"]).await;
            left == 0
        })
        .await;
        program.signal(Signal::Term);
        assert_eq!(program.wait_exit(RUN).await, 0);
        relay.stop().await;
    }

    /// Waits until the relay's list has been compared since the last gap.
    async fn compared(&self) {
        wait_until("the list to be compared", RUN, async || {
            let generation: Option<String> =
                chain::redis_command(&self.redis, &["HGET", "firehose:cursor:epoch", "generation"]).await;
            let Some(generation) = generation else { return false };
            let sql =
                format!("SELECT count(done_at) FROM standpipe.backfills WHERE what = 'gap {generation}'");
            query_value(&self.database, &sql).await == "1"
        })
        .await;
    }
}

/// The relay no longer has a range of events. Accounts that lack something are repaired, whether they go on writing or not;
/// those that the gap spared are left alone. If others had removed events that were read and never applied, heads are ahead of
/// the tables, and every account is compared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_since_a_gap_is_repaired_even_of_accounts_that_say_no_more() {
    let (network, numbers) = gap_network(2250, false);
    let expected = {
        let network = network.clone();
        tokio::task::spawn_blocking(move || model::expected(&traffic::events(&network)).without_versions())
    };
    let expected = expected.await.unwrap();
    for trimmed in [false, true] {
        let (house, port) = gap_house().await;
        house.reads(port, &network, 2000).await;
        if trimmed {
            // Read, and never applied.
            let relay = Relay::start(port, &NetworkOptions { events: 2100, ..network.clone() }, None).await;
            let mut reader = chain::Program::start("reader", &house.variables).await;
            wait_until("everything to be read", RUN, async || {
                let cursor: Option<u64> = chain::redis_command(&house.redis, &["GET", chain::CURSOR]).await;
                cursor == Some(numbers[2099])
            })
            .await;
            reader.signal(Signal::Kill);
            reader.wait_exit(SOON).await;
            let gone: u64 =
                chain::redis_command(&house.redis, &["XTRIM", chain::STREAM, "MAXLEN", "0"]).await;
            assert!(gone > 90, "{gone}");
            relay.stop().await;
        }
        let relay = Relay::with_window(port, &network, None, numbers[2220]).await;
        let mut program = chain::Program::start("run", &house.variables).await;
        house.cursor_is(numbers[2249]).await;
        house.compared().await;
        house.repaired().await;
        house.is(&expected, &format!("trimmed: {trimmed}")).await;
        let queued = "SELECT count(*) || ' ' || count(*) FILTER (WHERE reason <> 'gap' OR class <> 1)
                      FROM standpipe.repos";
        let queued = query_value(&house.database, queued).await;
        println!("{} accounts, trimmed: {trimmed}, queued and otherwise: {queued}", network.accounts);
        let list = Standpipe::run(&["repos", "list"], &house.variables, RUN).await;
        assert!(list.stdout.contains("after gap 1: "), "{}", list.stdout);
        let (count, others) = queued.split_once(' ').unwrap();
        assert_eq!(others, "0");
        let count: u32 = count.parse().unwrap();
        assert!(
            if trimmed { count == network.accounts } else { (10..network.accounts).contains(&count) },
            "{count}"
        );
        program.signal(Signal::Term);
        assert_eq!(program.wait_exit(RUN).await, 0, "{}", program.output());
        relay.stop().await;
    }
}

/// Accounts that went away or came back during a gap are shown or hidden as the relay says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_of_accounts_that_changed_during_a_gap_is_learned() {
    let (network, numbers) = gap_network(4000, true);
    let statuses = |tables: &model::Tables| {
        let active = tables.values("users", "account_active");
        active.into_iter().filter(|(_, active)| *active == serde_json::json!(false)).collect::<Vec<_>>()
    };
    let model_of = |events: u64| {
        let network = NetworkOptions { events, ..network.clone() };
        tokio::task::spawn_blocking(move || model::expected(&traffic::events(&network)))
    };
    let (before, after) = (model_of(2000).await.unwrap(), model_of(4000).await.unwrap());
    assert_ne!(statuses(&before), statuses(&after), "no account's status changes in the gap");
    let (house, port) = gap_house().await;
    house.reads(port, &network, 2000).await;
    let relay = Relay::with_window(port, &network, None, numbers[3999]).await;
    let mut program = chain::Program::start("run", &house.variables).await;
    house.cursor_is(numbers[3999]).await;
    house.compared().await;
    house.cursor_is(numbers[3999]).await;
    let found = model::read(&connect(&house.database).await).await;
    assert_eq!(statuses(&found), statuses(&after));
    program.signal(Signal::Term);
    assert_eq!(program.wait_exit(RUN).await, 0, "{}", program.output());
    relay.stop().await;
}
