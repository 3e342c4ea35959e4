//! The whole chain: simulated relay, Redis, the real binary, PostgreSQL; and the result of an undisturbed
//! run.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use serde_json::Value;
use standpipe::store::purge;
use standpipe_lab::simulate::{self, Counters, Network, NetworkOptions, RelayOptions, Source};
use tokio::net::TcpListener;
use tokio::sync::OnceCell;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Finished, Postgres, Redis, Standpipe, http_get, query_rows, wait_for};

pub const STREAM: &str = "firehose:events";
pub const GROUP: &str = "firehose-processors";
pub const CURSOR: &str = "firehose:cursor";
pub const CURSOR_RELAY: &str = "firehose:cursor:relay";
pub const DEAD: &str = "firehose:events:dead";

/// Deadline for something that takes a moment, on a machine that other tests keep busy.
pub const SOON: Duration = Duration::from_mins(1);
/// Deadline for a run of the chain: far longer than it takes, because other tests run at the same time.
pub const RUN: Duration = Duration::from_mins(2);

/// The traffic of most tests: every kind of event, few accounts, so that many events touch the same rows.
pub fn network(events: u64) -> NetworkOptions {
    NetworkOptions { seed: 11, accounts: 200, events, deletions: true, ..NetworkOptions::default() }
}

// ---------------------------------------------------------------------------------------------
// The relay

/// A simulated relay in the test's own process; it stops on drop.
pub struct Relay {
    address: SocketAddr,
    pub counters: Arc<Counters>,
    pub network: NetworkOptions,
    /// The number of the last frame.
    pub last_seq: i64,
    _stop: DropGuard,
}

impl Relay {
    /// Serves `network` at `rate` frames per second and connection.
    pub async fn start(network: &NetworkOptions, rate: Option<u32>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let counters = Arc::new(Counters::default());
        let stop = CancellationToken::new();
        let options = RelayOptions { source: Source::Network(network.clone()), rate, oldest: 0 };
        tokio::spawn(simulate::serve(listener, options, Arc::clone(&counters), stop.clone()));
        let frames = network.clone();
        let last_seq =
            tokio::task::spawn_blocking(move || Network::new(&frames).filter_map(|frame| frame.seq).last());
        let last_seq = i64::try_from(last_seq.await.unwrap().unwrap()).unwrap();
        Self { address, counters, network: network.clone(), last_seq, _stop: stop.drop_guard() }
    }

    pub fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    /// Its name in `firehose:cursor:relay`.
    pub fn name(&self) -> String {
        self.address.to_string()
    }

    pub fn frames_sent(&self) -> u64 {
        self.counters.frames_sent.load(Ordering::SeqCst)
    }
}

/// Serves this source as a relay until the guard is dropped; returns the relay's URL too.
pub async fn serve(source: Source, rate: Option<u32>) -> (String, DropGuard) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    let options = RelayOptions { source, rate, oldest: 0 };
    tokio::spawn(simulate::serve(listener, options, Arc::new(Counters::default()), stop.clone()));
    (url, stop.drop_guard())
}

// ---------------------------------------------------------------------------------------------
// The stream

/// The state of the stream, the group and the cursor at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    pub exists: bool,
    pub group: bool,
    pub length: u64,
    /// Delivered and not acknowledged.
    pub pending: u64,
    /// There are entries that have not been delivered.
    pub waiting: bool,
    pub cursor: Option<i64>,
    pub dead_letters: u64,
}

impl Look {
    /// The last frame is in the stream and everything in the stream is acknowledged.
    pub fn is_finished(&self, last_seq: i64) -> bool {
        self.is_drained() && self.cursor == Some(last_seq)
    }

    pub fn is_drained(&self) -> bool {
        self.exists && self.group && self.pending == 0 && !self.waiting
    }
}

const LOOK: &str = "
    local cursor, dead = redis.call('GET', KEYS[2]) or '', redis.call('XLEN', KEYS[3])
    local exists, length = redis.call('EXISTS', KEYS[1]), redis.call('XLEN', KEYS[1])
    local own, pending, waiting = 0, 0, 0
    if exists == 1 then
        for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
            local info = {}
            for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
            if info['name'] == ARGV[1] then
                own, pending = 1, info['pending']
                waiting = #redis.call('XRANGE', KEYS[1], '(' .. info['last-delivered-id'], '+', 'COUNT', 1)
            end
        end
    end
    return {exists, own, length, pending, waiting, cursor, dead}";

/// Looks at the stream; an error while Redis is down.
pub async fn look(redis: &Redis) -> redis::RedisResult<Look> {
    type Answer = (u64, u64, u64, u64, u64, String, u64);
    let mut connection = super::connect_to_redis(redis.url()).await?;
    let (exists, group, length, pending, waiting, cursor, dead_letters): Answer = redis::Script::new(LOOK)
        .key(STREAM)
        .key(CURSOR)
        .key(DEAD)
        .arg(GROUP)
        .invoke_async(&mut connection)
        .await?;
    Ok(Look {
        exists: exists == 1,
        group: group == 1,
        length,
        pending,
        waiting: waiting > 0,
        cursor: cursor.parse().ok(),
        dead_letters,
    })
}

/// Runs one Redis command, given by its words.
pub async fn redis_command<T: redis::FromRedisValue>(redis: &Redis, words: &[&str]) -> T {
    let mut command = redis::cmd(words[0]);
    for word in &words[1..] {
        command.arg(*word);
    }
    command.query_async(&mut redis.connection().await).await.unwrap()
}

// ---------------------------------------------------------------------------------------------
// The program

/// The environment of a `standpipe`.
#[derive(Clone, Debug)]
pub struct Variables(Vec<(String, String)>);

impl Variables {
    /// What every test needs: an HTTP port of its own, every collection, a stable name. Most networks of tests do not sign.
    pub fn new() -> Self {
        Self(Vec::new())
            .with("HTTP_ADDR", "127.0.0.1:0")
            .with("COLLECTIONS", "*")
            .with("CONSUMER_ID", "test")
            .with("VERIFY", "off")
            // What is made up happened long ago.
            .with("NOTIFY_WITHIN", "off")
    }

    /// Sets a variable, replacing its previous value.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.0.retain(|(other, _)| other != name);
        self.0.push((name.to_owned(), value.into()));
        self
    }
}

impl Deref for Variables {
    type Target = [(String, String)];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// A `standpipe` with its HTTP server.
pub struct Program {
    standpipe: Standpipe,
    pub http: SocketAddr,
}

impl Program {
    /// Starts `standpipe <command>`; returns once it has logged the address of its HTTP server.
    pub async fn start(command: &str, variables: &Variables) -> Self {
        Self::started(Standpipe::start(&[command], variables)).await
    }

    /// The same with the binary of another release.
    pub async fn start_binary(binary: &Path, command: &str, variables: &Variables) -> Self {
        Self::started(Standpipe::start_binary(binary, &[command], variables)).await
    }

    async fn started(mut standpipe: Standpipe) -> Self {
        let line = standpipe.wait_for_line("HTTP address=", SOON).await;
        let http = line.rsplit_once("address=").unwrap().1.trim().parse().unwrap();
        Self { standpipe, http }
    }

    pub async fn get(&self, path: &str) -> (u16, String) {
        http_get(self.http, path).await.unwrap_or_else(|error| panic!("{path}: {error:#}"))
    }

    /// Status code and reasons of `/readyz`.
    pub async fn readiness(&self) -> (u16, String) {
        self.get("/readyz").await
    }

    /// `/status`.
    pub async fn status(&self) -> Value {
        serde_json::from_str(&self.get("/status").await.1).unwrap()
    }

    /// The sum of a metric's samples, whatever their labels.
    pub async fn metric(&self, name: &str) -> f64 {
        self.metric_with(name, "").await
    }

    /// The sum of a metric's samples whose labels contain this text.
    pub async fn metric_with(&self, name: &str, labels: &str) -> f64 {
        let (_, text) = self.get("/metrics").await;
        text.lines()
            .filter_map(|line| line.strip_prefix(name))
            .filter(|rest| rest.starts_with([' ', '{']) && rest.contains(labels))
            .map(|rest| rest.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
            .sum()
    }

    /// Waits until a metric has this value: an effect may be visible in the servers before it is counted.
    pub async fn metric_is(&self, name: &str, value: f64) {
        self.metric_with_is(name, "", value).await;
    }

    /// The same for the samples whose labels contain this text.
    pub async fn metric_with_is(&self, name: &str, labels: &str, value: f64) {
        wait_for(&format!("{name} {labels} to be {value}"), SOON, async || {
            let now = self.metric_with(name, labels).await;
            if (now - value).abs() < f64::EPSILON { Ok(()) } else { Err(format!("it is {now}")) }
        })
        .await;
    }

    /// Entries finished since its start.
    pub async fn entries(&self) -> f64 {
        self.metric("standpipe_entries_total").await
    }

    /// Waits until it has finished this many more entries.
    pub async fn finishes_more(&self, entries: f64) {
        let goal = self.entries().await + entries;
        wait_for("entries to be finished", RUN, async || {
            let now = self.entries().await;
            if now >= goal { Ok(()) } else { Err(format!("{now} of {goal}")) }
        })
        .await;
    }

    /// Waits until a metric is above this value.
    pub async fn metric_rises(&self, name: &str, above: f64) {
        self.metric_with_rises(name, "", above).await;
    }

    /// The same for the samples whose labels contain this text.
    pub async fn metric_with_rises(&self, name: &str, labels: &str, above: f64) {
        wait_for(&format!("{name} {labels} above {above}"), SOON, async || {
            let now = self.metric_with(name, labels).await;
            if now > above { Ok(()) } else { Err(format!("it is {now}")) }
        })
        .await;
    }
}

impl Deref for Program {
    type Target = Standpipe;

    fn deref(&self) -> &Standpipe {
        &self.standpipe
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Standpipe {
        &mut self.standpipe
    }
}

// ---------------------------------------------------------------------------------------------
// The whole chain

/// A relay, a Redis and a database; the program is started by the test.
pub struct Chain {
    pub relay: Relay,
    pub redis: Redis,
    /// The URL of the database.
    pub database: String,
}

impl Chain {
    /// With a database on the server that all tests of this binary share.
    pub async fn start(network: &NetworkOptions, rate: Option<u32>) -> Self {
        let database = Postgres::shared().await.fresh_database().await;
        Self::with_database(network, rate, database).await
    }

    pub async fn with_database(network: &NetworkOptions, rate: Option<u32>, database: String) -> Self {
        Self { relay: Relay::start(network, rate).await, redis: Redis::start().await, database }
    }

    pub fn variables(&self) -> Variables {
        Variables::new()
            .with("RELAY_URL", self.relay.url())
            .with("REDIS_URL", self.redis.url())
            .with("DATABASE_URL", &self.database)
    }

    pub async fn look(&self) -> Look {
        look(&self.redis).await.unwrap()
    }

    /// Waits until the last frame is in the stream and everything is acknowledged.
    pub async fn finished(&self) {
        wait_for("the last event to be acknowledged", RUN, async || match look(&self.redis).await {
            Ok(look) if look.is_finished(self.relay.last_seq) => Ok(()),
            Ok(look) => Err(format!("{look:?}, and the last frame is {}", self.relay.last_seq)),
            Err(error) => Err(error.to_string()),
        })
        .await;
    }

    /// Waits for the end, whose result must be that of an undisturbed run: the same rows, counters that agree
    /// with them, no dead letters.
    pub async fn ends_like_an_undisturbed_run(&self) {
        self.finished().await;
        purged(&self.database).await;
        let end = EndState::of(&self.database).await;
        end.assert_is(&*undisturbed(&self.relay.network).await);
        let audit = self.audit(&[]).await;
        assert_eq!(audit.code, 0, "audit:\n{}{}", audit.stdout, audit.stderr);
        assert_eq!(self.look().await.dead_letters, 0);
    }

    /// `standpipe audit`.
    pub async fn audit(&self, options: &[&str]) -> Finished {
        // The database itself, whatever proxy the program under test was given.
        let arguments: Vec<&str> = ["audit"].iter().chain(options).copied().collect();
        Standpipe::run(&arguments, &self.variables(), RUN).await
    }
}

/// Waits until all records of deleted accounts are purged. It helps with the purge: the program may have
/// exited.
pub async fn purged(database: &str) {
    let client = super::connect(database).await;
    wait_for("the deleted accounts to be purged", RUN, async || {
        while let Some(deletion) = purge::next(&client).await.map_err(|error| error.to_string())? {
            purge::purge(&client, &deletion).await.map_err(|error| error.to_string())?;
        }
        Ok::<(), String>(())
    })
    .await;
}

/// The contents of a database, except for what depends on the time of arrival: columns that the clock or a
/// sequence fills, the ids of stream entries, and the epochs of numbers.
#[derive(Clone, Debug, Default)]
pub struct EndState(BTreeMap<String, Vec<String>>);

impl EndState {
    pub async fn of(database: &str) -> Self {
        let tables = query_rows(
            database,
            r"SELECT c.oid::regclass, string_agg(quote_ident(a.attname), ', ' ORDER BY a.attname)
              FROM pg_class c
              JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
              LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
              WHERE c.relkind = 'r' AND c.relnamespace IN ('public'::regnamespace, 'standpipe'::regnamespace)
                AND c.relname NOT IN ('migrations', 'tables_before', 'epochs', 'acknowledged')
                AND a.attname !~ '^(stream_(ms|seq)|((handle|profile|status)_)?(ms|sq)|deleted_seq)$'
                AND coalesce(pg_get_expr(d.adbin, d.adrelid), '') !~* 'now\(\)|timestamp|nextval'
              GROUP BY c.oid",
        )
        .await;
        assert!(tables.len() > 10, "that is no database of ours: {tables:?}");
        let mut state = BTreeMap::new();
        for table in tables {
            let [Some(name), Some(columns)] = &table[..] else { panic!("{table:?}") };
            // Without the epoch of a number, which is a time.
            let sql =
                format!("SELECT regexp_replace(ROW({columns})::text, '@[0-9]{{13}}', '', 'g') FROM {name}");
            let rows = query_rows(database, &sql).await;
            let mut rows: Vec<String> = rows.into_iter().map(|mut row| row.remove(0).unwrap()).collect();
            rows.sort();
            state.insert(format!("{name} ({columns})"), rows);
        }
        Self(state)
    }

    /// The number of rows in all tables.
    pub fn rows(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// # Panics
    /// If it is not `expected`, with the first differences of every table.
    pub fn assert_is(&self, expected: &Self) {
        let mut report = String::new();
        for table in self.0.keys().chain(expected.0.keys().filter(|table| !self.0.contains_key(*table))) {
            let rows = |state: &Self| state.0.get(table).cloned().unwrap_or_default();
            let (found, wanted) = (rows(self), rows(expected));
            let missing = difference(&wanted, &found);
            let surplus = difference(&found, &wanted);
            if missing.is_empty() && surplus.is_empty() {
                continue;
            }
            writeln!(report, "{table}: {} rows, should be {}", found.len(), wanted.len()).unwrap();
            for (what, rows) in [("missing", missing), ("surplus", surplus)] {
                for row in rows.iter().take(5) {
                    writeln!(report, "  {what}: {row}").unwrap();
                }
                if rows.len() > 5 {
                    writeln!(report, "  {what}: {} in all", rows.len()).unwrap();
                }
            }
        }
        assert!(report.is_empty(), "the end state is not that of an undisturbed run:\n{report}");
    }
}

/// The items of `one` that are not in `other`, counting repetitions; both are sorted.
fn difference<'a>(one: &'a [String], other: &[String]) -> Vec<&'a String> {
    let mut count: HashMap<&String, usize> = HashMap::new();
    for row in other {
        *count.entry(row).or_default() += 1;
    }
    one.iter()
        .filter(|row| match count.get_mut(row) {
            Some(left) if *left > 0 => {
                *left -= 1;
                false
            }
            _ => true,
        })
        .collect()
}

/// What the tables hold after an undisturbed run of this traffic. It runs once per test binary.
pub async fn undisturbed(network: &NetworkOptions) -> Arc<EndState> {
    type Once = Arc<OnceCell<Arc<EndState>>>;
    static RUNS: LazyLock<Mutex<HashMap<String, Once>>> = LazyLock::new(Mutex::default);
    let run = Arc::clone(RUNS.lock().unwrap().entry(format!("{network:?}")).or_default());
    let state = run.get_or_init(async || {
        let chain = Chain::start(network, None).await;
        let mut program = Program::start("run", &chain.variables()).await;
        chain.finished().await;
        purged(&chain.database).await;
        let state = EndState::of(&chain.database).await;
        assert!(state.rows() as u64 > network.events / 2, "only {} rows", state.rows());
        program.signal(super::Signal::Term);
        assert_eq!(program.wait_exit(SOON).await, 0);
        Arc::new(state)
    });
    Arc::clone(state.await)
}
