//! Everything is broken at random, again and again, and in the end the tables are as if nothing had happened.
//!
//! Three daemons share one group; one of them also reads the relay, which sends some commits wrong and others not at all.
//! The faults follow from the seed, which is printed. A short version runs with the other tests; `make chaos` runs the long one and prints a table.
//! Variables: `STANDPIPE_SEED`, `CHAOS_EVENTS`, `CHAOS_SECONDS`, `CHAOS_DAEMON_KILLS`, `CHAOS_REDIS_KILLS`,
//! `CHAOS_POSTGRES_KILLS`, `CHAOS_CUTS`, `CHAOS_OTHERS`, `CHAOS_LIES` (one commit in so many; 0 for none).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::chain::{self, purged};
use crate::support::{
    Postgres, Redis, Signal, Standpipe, TcpProxy, connect, model, query_rows, traffic, wait_for, wait_until,
};
use standpipe_lab::servers::{PostgresOptions, send_signal};
use standpipe_lab::simulate::{self, Network, NetworkOptions, RelayOptions, Source};
use tokio_util::sync::CancellationToken;

const STREAM: &str = "firehose:events";
const GROUP: &str = "firehose-processors";

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    DaemonKilled,
    RedisKilled,
    RedisKilledAndItsTailCut,
    PostgresKilled,
    PostgresProcessKilled,
    ConnectionsCut,
    BlackHole,
    PostgresFrozen,
    PostgresSlow,
    TrimmedByOthers,
    GroupDestroyed,
    StreamDeleted,
}

/// Everything that can be broken, and how to break it.
struct House {
    redis: Redis,
    postgres: Postgres,
    database: String,
    /// In front of Redis, PostgreSQL and the relay.
    proxies: [TcpProxy; 3],
    daemons: Vec<Option<Standpipe>>,
    variables: Vec<(String, String)>,
    /// Entries that others removed from the stream.
    trimmed: u64,
}

impl House {
    fn start(&mut self, index: usize) {
        let mut variables = self.variables.clone();
        variables.push(("CONSUMER_ID".into(), format!("daemon-{index}")));
        // Both transaction modes side by side.
        let transaction = if index == 1 { "batch" } else { "event" };
        variables.push(("TRANSACTION".into(), transaction.into()));
        let command = if index == 0 { "run" } else { "worker" };
        self.daemons[index] = Some(Standpipe::start(&[command], &variables));
    }

    async fn cause(&mut self, fault: Fault, rng: &mut fastrand::Rng) -> u64 {
        match fault {
            Fault::DaemonKilled => {
                let index = rng.usize(0..self.daemons.len());
                let mut daemon = self.daemons[index].take().unwrap();
                assert!(daemon.is_running(), "daemon {index} had died by itself:\n{}", daemon.output());
                daemon.signal(Signal::Kill);
                assert_eq!(daemon.wait_exit(Duration::from_secs(10)).await, 128 + 9);
                self.start(index);
            }
            Fault::RedisKilled | Fault::RedisKilledAndItsTailCut => {
                self.redis.sigkill().await.unwrap();
                if fault == Fault::RedisKilledAndItsTailCut {
                    let cut = self.redis.truncate_aof_tail(rng.u64(1..200_000)).unwrap();
                    assert!(cut > 0, "nothing was cut");
                }
                self.redis.start_again().await.unwrap();
            }
            Fault::PostgresKilled => {
                self.postgres.sigkill().await.unwrap();
                self.postgres.start_again().await.unwrap();
            }
            Fault::PostgresProcessKilled => {
                // PostgreSQL may still be recovering from the previous fault.
                let database = self.database.clone();
                wait_until("PostgreSQL accepts connections", Duration::from_mins(1), async || {
                    tokio_postgres::connect(&database, tokio_postgres::NoTls).await.is_ok()
                })
                .await;
                let pids = query_rows(
                    &self.database,
                    "SELECT pid FROM pg_stat_activity WHERE application_name = 'standpipe'",
                )
                .await;
                let pids = pids.iter().map(|row| row[0].as_ref().unwrap().parse::<u32>().unwrap());
                let Some(pid) = rng.choice(pids.collect::<Vec<_>>()) else { return 0 };
                send_signal(Signal::Kill, &[pid]).unwrap();
                let gone = format!("/proc/{pid}");
                wait_until("the server process is gone", Duration::from_secs(10), async || {
                    !std::path::Path::new(&gone).exists()
                })
                .await;
            }
            Fault::ConnectionsCut => {
                let proxy = &self.proxies[rng.usize(0..3)];
                let before = proxy.cuts();
                proxy.cut_all().await;
                return proxy.cuts() - before;
            }
            Fault::BlackHole => {
                let proxy = &self.proxies[rng.usize(0..3)];
                proxy.black_hole(true).await;
                tokio::time::sleep(Duration::from_millis(rng.u64(500..6000))).await;
                proxy.black_hole(false).await;
            }
            Fault::PostgresFrozen => {
                self.postgres.pause().await.unwrap();
                tokio::time::sleep(Duration::from_millis(rng.u64(500..6000))).await;
                self.postgres.resume().unwrap();
            }
            Fault::PostgresSlow => {
                let before = self.proxies[1].forwarded_bytes();
                self.proxies[1].delay(Duration::from_millis(rng.u64(5..100)));
                tokio::time::sleep(Duration::from_millis(rng.u64(500..6000))).await;
                self.proxies[1].delay(Duration::ZERO);
                return u64::from(self.proxies[1].forwarded_bytes() > before);
            }
            Fault::TrimmedByOthers => {
                let mut redis = self.redis.connection().await;
                let keep = rng.u64(0..50).to_string();
                let trimmed: u64 = redis::cmd("XTRIM")
                    .arg(&[STREAM, "MAXLEN", &keep])
                    .query_async(&mut redis)
                    .await
                    .unwrap_or(0);
                self.trimmed += trimmed;
                return u64::from(trimmed > 0);
            }
            Fault::GroupDestroyed => {
                let mut redis = self.redis.connection().await;
                let gone: i64 = redis::cmd("XGROUP")
                    .arg(&["DESTROY", STREAM, GROUP])
                    .query_async(&mut redis)
                    .await
                    .unwrap_or(0);
                return gone.unsigned_abs();
            }
            Fault::StreamDeleted => {
                let mut redis = self.redis.connection().await;
                return redis::cmd("DEL").arg(STREAM).query_async(&mut redis).await.unwrap();
            }
        }
        1
    }
}

/// Where the reader and the group stand, to help diagnose a failure.
async fn positions(url: &str) -> String {
    let look = async {
        let mut redis = redis::Client::open(url).ok()?.get_multiplexed_async_connection().await.ok()?;
        let answers: (Option<String>, Option<String>, u64, BTreeMap<String, String>) = redis::pipe()
            .get("firehose:cursor")
            .get("firehose:cursor:acked")
            .xlen(STREAM)
            .hgetall("firehose:cursor:watch")
            .query_async(&mut redis)
            .await
            .ok()?;
        Some(format!("{answers:?}"))
    };
    look.await.unwrap_or_default()
}

/// Redis ids compare by both parts.
fn id(text: &str) -> (u64, u64) {
    let (ms, seq) = text.split_once('-').unwrap();
    (ms.parse().unwrap(), seq.parse().unwrap())
}

/// The newest entry that was delivered, if the group exists.
async fn delivered(url: &str) -> Option<(u64, u64)> {
    let mut redis = redis::Client::open(url).ok()?.get_multiplexed_async_connection().await.ok()?;
    let groups: redis::streams::StreamInfoGroupsReply =
        redis::cmd("XINFO").arg(&["GROUPS", STREAM]).query_async(&mut redis).await.ok()?;
    groups.groups.iter().find(|group| group.name == GROUP).map(|group| id(&group.last_delivered_id))
}

/// Resolves when everything up to `mark` is acknowledged. Ids that Redis lost never come back; they count as
/// acknowledged once the group has moved past them.
async fn recovered(url: String, mark: (u64, u64), began: Instant) -> Duration {
    loop {
        let look = async {
            let mut redis =
                redis::Client::open(url.as_str()).ok()?.get_multiplexed_async_connection().await.ok()?;
            let pending: redis::Value =
                redis::cmd("XPENDING").arg(&[STREAM, GROUP]).query_async(&mut redis).await.ok()?;
            let redis::Value::Array(pending) = pending else { return None };
            match pending.get(1) {
                Some(redis::Value::BulkString(first)) => Some(Some(id(std::str::from_utf8(first).ok()?))),
                _ => Some(None),
            }
        };
        let first = look.await;
        let done = match first {
            Some(Some(first)) => first > mark,
            Some(None) => delivered(&url).await.is_some_and(|delivered| delivered >= mark),
            None => false,
        };
        if done {
            return began.elapsed();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until every repository that had something wrong is repaired, and every signature is checked.
async fn repaired(house: &Redis, database: &str) {
    wait_for("everything to be repaired and checked", Duration::from_mins(10), async || {
        // What is to wait for a minute or an hour does not in this test.
        let sooner = "UPDATE standpipe.repos SET retry_at = least(retry_at, now() + interval '1 second')
                      WHERE state = 'queued' RETURNING did, reason, message";
        let queued = query_rows(database, sooner).await;
        let mut redis = house.connection().await;
        let lengths: (u64, u64) = redis::pipe()
            .hlen("firehose:events:repairs")
            .hlen("firehose:events:unchecked")
            .query_async(&mut redis)
            .await
            .unwrap();
        let look = chain::look(house).await.unwrap();
        if queued.is_empty() && lengths == (0, 0) && look.is_drained() {
            Ok(())
        } else {
            Err(format!("{lengths:?} {look:?} {} queued: {:?}", queued.len(), queued.first()))
        }
    })
    .await;
    let ended = query_rows(
        database,
        "SELECT state, count(*), sum(healed), sum(deleted) FROM standpipe.repos GROUP BY 1",
    )
    .await;
    println!("repairs: {ended:?}");
    assert!(ended.iter().all(|row| row[0].as_deref() != Some("error")), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_faults_lose_nothing_and_count_nothing_twice() {
    let seed = number("STANDPIPE_SEED", fastrand::u64(..));
    let total = number("CHAOS_EVENTS", 30_000);
    let seconds = number("CHAOS_SECONDS", 30);
    println!("STANDPIPE_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut faults = Vec::new();
    let mut plan = |fault, count| faults.extend(std::iter::repeat_n(fault, usize::try_from(count).unwrap()));
    let redis_kills = number("CHAOS_REDIS_KILLS", 2);
    let postgres_kills = number("CHAOS_POSTGRES_KILLS", 2);
    let others = number("CHAOS_OTHERS", 1);
    plan(Fault::DaemonKilled, number("CHAOS_DAEMON_KILLS", 6));
    plan(Fault::RedisKilled, redis_kills / 2);
    plan(Fault::RedisKilledAndItsTailCut, redis_kills - redis_kills / 2);
    plan(Fault::PostgresKilled, postgres_kills / 2);
    plan(Fault::PostgresProcessKilled, postgres_kills - postgres_kills / 2);
    plan(Fault::ConnectionsCut, number("CHAOS_CUTS", 4));
    for fault in [
        Fault::BlackHole,
        Fault::PostgresFrozen,
        Fault::PostgresSlow,
        Fault::TrimmedByOthers,
        Fault::GroupDestroyed,
        Fault::StreamDeleted,
    ] {
        plan(fault, others);
    }
    rng.shuffle(&mut faults);

    let network = NetworkOptions {
        seed,
        accounts: 2_000,
        events: total,
        deletions: true,
        clock_jumps: true,
        signed: true,
        // What is read again after its account has changed its key is proven no more, and the server of an account that is
        // gone by then shows nothing: `healing` is about that.
        new_keys: false,
        ..NetworkOptions::default()
    };
    let lying = NetworkOptions { lies: u32::try_from(number("CHAOS_LIES", 25)).unwrap(), ..network.clone() };
    let redis = Redis::start().await;
    let postgres = Postgres::start_with(PostgresOptions { fsync: true, ..Postgres::options() }).await;
    let database = postgres.fresh_database().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = listener.local_addr().unwrap().to_string();
    let stop = CancellationToken::new();
    // The events last until the final fault; those that could not be read by then follow it.
    let rate = u32::try_from((5 * total).div_ceil(4 * seconds)).unwrap();
    let serving = tokio::spawn(simulate::serve(
        listener,
        RelayOptions { source: Source::Network(lying.clone()), rate: Some(rate), oldest: 0 },
        Arc::default(),
        stop.clone(),
    ));
    let proxies = [
        TcpProxy::for_url(&redis.url()).await,
        TcpProxy::for_url(&database).await,
        TcpProxy::start(relay).await,
    ];
    let variables = [
        ("RELAY_URL", format!("ws://{}", proxies[2].address())),
        ("PLC_URL", format!("http://{}", proxies[2].address())),
        ("ALLOW_PRIVATE_ADDRESSES", "true".to_owned()),
        ("REDIS_URL", proxies[0].url_through(&redis.url())),
        ("DATABASE_URL", proxies[1].url_through(&database)),
        ("HTTP_ADDR", "off".to_owned()),
        ("COLLECTIONS", "*".to_owned()),
        ("NOTIFY_WITHIN", "off".to_owned()),
        ("CLAIM_IDLE", "10s".to_owned()),
        ("PARALLEL_CONSUMERS", "3".to_owned()),
        ("BATCH_SIZE", "100".to_owned()),
        ("RELAY_IDLE_TIMEOUT", "5s".to_owned()),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value)).to_vec();
    let daemons = vec![None, None, None];
    let mut house = House { redis, postgres, database, proxies, daemons, variables, trimmed: 0 };
    for index in 0..3 {
        house.start(index);
    }
    let url = house.redis.url();
    wait_until("events flow", Duration::from_mins(1), async || {
        delivered(&url).await.is_some_and(|id| id.0 > 0)
    })
    .await;

    let began = Instant::now();
    let pause = Duration::from_secs(seconds) / u32::try_from(faults.len() + 1).unwrap();
    let mut recoveries = tokio::task::JoinSet::new();
    let mut caused: BTreeMap<Fault, u64> = BTreeMap::new();
    for (index, fault) in faults.iter().enumerate() {
        // Spread over the run, more or less evenly; a fault that takes longer delays those after it.
        let due = began + pause.mul_f64(index as f64 + 0.5 + rng.f64());
        tokio::time::sleep_until(due.into()).await;
        let mark = delivered(&url).await;
        let at = Instant::now();
        // Nothing may be connected just now, for as long as the lease of a killed reader lasts.
        let mut count = house.cause(*fault, &mut rng).await;
        while count == 0 && at.elapsed() < Duration::from_mins(1) {
            tokio::time::sleep(Duration::from_millis(10)).await;
            count = house.cause(*fault, &mut rng).await;
        }
        *caused.entry(*fault).or_default() += count;
        println!("{:7.1} s  {fault:?} ({count})  {}", began.elapsed().as_secs_f64(), positions(&url).await);
        // After these faults the marked entries may never reappear under the same ids.
        let comparable = !matches!(
            fault,
            Fault::RedisKilledAndItsTailCut
                | Fault::StreamDeleted
                | Fault::GroupDestroyed
                | Fault::TrimmedByOthers
        );
        if let (Some(mark), true) = (mark, comparable) {
            let (fault, url) = (*fault, url.clone());
            recoveries.spawn(async move {
                let waited = tokio::time::timeout(Duration::from_mins(2), recovered(url, mark, at)).await;
                (fault, waited.ok())
            });
        }
    }

    // The cursor has reached the last frame, and everything is acknowledged.
    let last = simulate::sequence_numbers(&network).last().unwrap();
    wait_until("everything has arrived", Duration::from_mins(20), async || {
        let Ok(mut redis) =
            redis::Client::open(url.as_str()).unwrap().get_multiplexed_async_connection().await
        else {
            return false;
        };
        let cursor: Option<u64> =
            redis::cmd("GET").arg("firehose:cursor").query_async(&mut redis).await.unwrap_or(None);
        let groups: Result<redis::streams::StreamInfoGroupsReply, _> =
            redis::cmd("XINFO").arg(&["GROUPS", STREAM]).query_async(&mut redis).await;
        let info: Result<redis::streams::StreamInfoStreamReply, _> =
            redis::cmd("XINFO").arg(&["STREAM", STREAM]).query_async(&mut redis).await;
        let (Ok(groups), Ok(info)) = (groups, info) else { return false };
        cursor == Some(last)
            && groups
                .groups
                .first()
                .is_some_and(|g| g.pending == 0 && g.last_delivered_id == info.last_generated_id)
    })
    .await;
    repaired(&house.redis, &house.database).await;
    purged(&house.database).await;
    let ran = began.elapsed();
    let mut letters = house.redis.connection().await;
    let letters: Vec<(String, BTreeMap<String, String>)> = redis::cmd("XRANGE")
        .arg(&["firehose:events:dead", "-", "+"])
        .query_async(&mut letters)
        .await
        .unwrap();
    let (withheld, dead): (Vec<_>, Vec<_>) =
        letters.into_iter().partition(|(_, letter)| letter["reason"] == "unproven");
    for daemon in &mut house.daemons {
        let daemon = daemon.as_mut().unwrap();
        daemon.signal(Signal::Term);
        assert_eq!(daemon.wait_exit(Duration::from_secs(40)).await, 0, "{}", daemon.output());
    }
    stop.cancel();
    serving.await.unwrap().unwrap();

    let mut times: BTreeMap<Fault, Vec<f64>> = BTreeMap::new();
    let mut unmeasured = 0;
    while let Some(done) = recoveries.join_next().await {
        match done.unwrap() {
            (fault, Some(time)) => times.entry(fault).or_default().push(time.as_secs_f64()),
            // A later fault made Redis lose the marked entries.
            (_, None) => unmeasured += 1,
        }
    }
    println!("| fault | times | recovery p50 | p99 |\n|---|---|---|---|");
    for (fault, count) in &caused {
        let mut times = times.remove(fault).unwrap_or_default();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| {
            times
                .get(((times.len() as f64 - 1.0) * share).round() as usize)
                .map_or("-".to_owned(), |t| format!("{t:.1} s"))
        };
        println!("| {fault:?} | {count} | {} | {} |", at(0.5), at(0.99));
    }
    println!("{} entries were trimmed by others", house.trimmed);
    println!(
        "{total} events in {:.0} s; {unmeasured} recoveries could not be measured; dead letters {}",
        ran.as_secs_f64(),
        dead.len()
    );
    let told = Network::new(&lying).count();
    println!("the relay dropped {} commits; {} others were withheld", total - told as u64, withheld.len());
    assert!(lying.lies == 0 || (total > told as u64 && !withheld.is_empty()), "the relay told the truth");
    for (fault, count) in &caused {
        assert!(*count > 0, "{fault:?} never happened");
    }
    assert!(dead.is_empty(), "an outage made dead letters: {dead:?}");

    let audit =
        Standpipe::run(&["audit"], &[("DATABASE_URL", &house.database)], Duration::from_mins(5)).await;
    assert_eq!(audit.code, 0, "{}", audit.stdout);
    let expected =
        tokio::task::spawn_blocking(move || model::expected(&traffic::events(&network))).await.unwrap();
    let found = model::read(&connect(&house.database).await).await;
    let (expected, found) = match lying.lies {
        0 => (expected, found),
        _ => (expected.without_versions(), found.without_versions()),
    };
    model::assert_same("after everything that failed", &expected, &found);
    println!("lost 0, counted twice 0");
}
