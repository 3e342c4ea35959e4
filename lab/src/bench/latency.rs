//! From XADD to commit at a given rate, event by event.
//!
//! Entries are appended one at a time at even distances, and the moment before each XADD is noted. PostgreSQL keeps the
//! time of every commit (`track_commit_timestamp`, on a server of its own, because it costs a little) and the rows keep
//! the entry's id; for the acknowledgement, which comes after the flush, Redis is listened to with MONITOR. All clocks are
//! the machine's.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use serde::Serialize;
use tokio_util::task::AbortOnDropHandle;

use super::lab::Lab;
use super::postgres::{Connection, Postgres};
use super::program::Program;
use super::report::Stat;
use super::stream::{add, entries_of};
use super::{BenchOptions, stream, worker};
use standpipe::event::EntryId;
use standpipe::stream::Stream;
use standpipe::stream::append::NewEntry;

/// How long entries are appended and not counted: connections are opened and plans made.
const WARM_UP: Duration = Duration::from_secs(1);
/// Maximum time of a measurement.
const MEASURED: Duration = Duration::from_secs(10);
/// Rows that keep the id of their entry. Posts with a flag may have been written again for the sake of a gate.
const COMMITS: &str = "
    SELECT stream_ms, stream_seq, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint FROM likes
    UNION ALL
    SELECT stream_ms, stream_seq, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint FROM reposts
    UNION ALL
    SELECT stream_ms, stream_seq, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint FROM follows
    UNION ALL
    SELECT stream_ms, stream_seq, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint FROM posts
    WHERE NOT (has_thread_gate OR has_post_gate OR violates_thread_gate OR violates_embedding_rules)";

/// Percentiles in milliseconds, each the median of the rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Percentiles {
    /// Half are faster.
    pub p50: Stat,
    /// 99% are faster.
    pub p99: Stat,
    /// 99.9% are faster.
    pub p99_9: Stat,
}

/// The measurements in one mode.
#[derive(Clone, Debug, Serialize)]
pub struct Latency {
    /// `TRANSACTION`.
    pub mode: &'static str,
    /// Entries per second that were really appended.
    pub rate: Stat,
    /// Events whose latency was taken, over all rounds.
    pub samples: u64,
    /// From XADD to commit: everybody sees it.
    pub commit_ms: Percentiles,
    /// From XADD to the acknowledgement: it is on disk.
    pub durable_ms: Percentiles,
}

/// One round.
pub struct Round {
    rate: f64,
    commit: Vec<f64>,
    durable: Vec<f64>,
}

/// The server that notes when everything is committed.
///
/// # Errors
///
/// It cannot be started.
pub async fn server(folder: &Path, options: &BenchOptions) -> Result<Postgres> {
    let mut settings = options.postgres_settings.clone();
    settings.push(("track_commit_timestamp".to_owned(), "on".to_owned()));
    let postgres = Postgres::start(&folder.join("postgres-latency"), &settings).await?;
    postgres.make_template("own", "").await?;
    Ok(postgres)
}

/// Sends the entries at their pace; returns when each of those behind the warm-up was sent, and when the first of them was.
async fn send(
    connection: &mut redis::aio::MultiplexedConnection,
    stream: &str,
    entries: &[NewEntry],
    rate: f64,
    warm_up: usize,
) -> Result<(HashMap<EntryId, i64>, i64)> {
    let began = Instant::now();
    let mut sent: HashMap<EntryId, i64> = HashMap::with_capacity(entries.len());
    let mut next = 0;
    let mut first = None;
    while next < entries.len() {
        let due = ((began.elapsed().as_secs_f64() * rate) as usize + 1).min(entries.len());
        for entry in &entries[next..due] {
            let mut pipe = redis::pipe();
            add(&mut pipe, stream, entry);
            let at = now_micros();
            let (id,): (String,) = pipe.query_async(connection).await?;
            if next >= warm_up {
                first.get_or_insert(at);
                sent.insert(id.parse()?, at);
            }
            next += 1;
        }
        let next_due = Duration::from_secs_f64(next as f64 / rate);
        tokio::time::sleep_until((began + next_due).into()).await;
    }
    Ok((sent, first.unwrap_or_default()))
}

/// Measures once.
///
/// # Errors
///
/// A server or the process fails.
pub async fn round(
    lab: &mut Lab,
    postgres: &Postgres,
    options: &BenchOptions,
    mode: &'static str,
) -> Result<Round> {
    let rate = f64::from(options.rate);
    let warm_up = (rate * WARM_UP.as_secs_f64()) as usize;
    let measured = ((rate * MEASURED.as_secs_f64()) as usize).min(options.events as usize);
    let network = stream::network(options.seed, options.accounts);
    let entries: Vec<NewEntry> = tokio::task::block_in_place(|| {
        entries_of(&network, &lab.config.collections).take(warm_up + measured).collect()
    });

    lab.streams.clear().await?;
    let database = postgres.fresh("own").await?;
    let mut variables = lab.variables(&[("TRANSACTION", mode)])?;
    variables.push(("DATABASE_URL".to_owned(), database.clone()));
    let mut program = Program::start("worker", &variables, lab.folder().path())?;
    worker::until_ready(&variables, Instant::now()).await?;

    let monitor = redis::Client::open(lab.redis_url())?.get_async_monitor().await?;
    let (heard, mut acknowledged) = tokio::sync::mpsc::unbounded_channel();
    let listening = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut lines = std::pin::pin!(monitor.into_on_message::<String>());
        while let Some(line) = lines.next().await {
            for ack in acknowledgements(&line) {
                // Nobody is listening once everything has arrived.
                let _ = heard.send(ack);
            }
        }
    }));
    let mut connection = lab.streams.connection();
    let (sent, first) = send(&mut connection, &lab.keys.stream, &entries, rate, warm_up).await?;
    let seconds = (now_micros() - first) as f64 / 1e6;
    worker::until_empty(&mut Stream::over(connection, lab.keys.clone()), &mut program).await?;
    program.stop().await?;

    let mut durable = Vec::with_capacity(sent.len());
    while durable.len() < sent.len() {
        let heard = tokio::time::timeout(Duration::from_secs(5), acknowledged.recv());
        let (id, at) = heard.await.ok().flatten().context("Redis did not show every acknowledgement")?;
        durable.extend(sent.get(&id).map(|sent| milliseconds(*sent, at)));
    }
    drop(listening);
    // An event of many operations has many rows, all of one commit.
    let mut commit: HashMap<EntryId, f64> = HashMap::with_capacity(sent.len());
    for row in Connection::open(&database).await?.query(COMMITS, &[]).await? {
        let (ms, seq, at): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        let id = EntryId { ms: ms.unsigned_abs(), seq: seq.unsigned_abs() };
        if let Some(sent) = sent.get(&id) {
            commit.insert(id, milliseconds(*sent, at));
        }
    }
    ensure!(!commit.is_empty(), "nothing was committed");
    Ok(Round { rate: sent.len() as f64 / seconds, commit: commit.into_values().collect(), durable })
}

/// The result of the rounds.
#[must_use]
pub fn figures(mode: &'static str, rounds: &mut [Round]) -> Latency {
    for round in &mut *rounds {
        round.commit.sort_unstable_by(f64::total_cmp);
        round.durable.sort_unstable_by(f64::total_cmp);
    }
    let percentiles = |of: fn(&Round) -> &[f64]| Percentiles {
        p50: rounds.iter().map(|round| percentile(of(round), 0.5)).collect(),
        p99: rounds.iter().map(|round| percentile(of(round), 0.99)).collect(),
        p99_9: rounds.iter().map(|round| percentile(of(round), 0.999)).collect(),
    };
    Latency {
        mode,
        rate: rounds.iter().map(|round| round.rate).collect(),
        samples: rounds.iter().map(|round| round.commit.len() as u64).sum(),
        commit_ms: percentiles(|round| &round.commit),
        durable_ms: percentiles(|round| &round.durable),
    }
}

/// Of sorted values.
fn percentile(sorted: &[f64], part: f64) -> f64 {
    let rank = (sorted.len() as f64 * part).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

fn milliseconds(from: i64, to: i64) -> f64 {
    (to - from) as f64 / 1000.0
}

fn now_micros() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64)
}

/// The entries that a line of MONITOR shows the acknowledgement of, and when that was:
/// `1700000000.123456 [0 127.0.0.1:50000] "XACK" "stream" "group" "1700000000000-0" ...`.
fn acknowledgements(line: &str) -> Vec<(EntryId, i64)> {
    let parse = || {
        let (head, words) = line.trim_start_matches('+').split_once("] ")?;
        let mut words = words.split(' ').map(|word| word.trim_matches('"'));
        if !words.next()?.eq_ignore_ascii_case("xack") {
            return None;
        }
        let (seconds, micros) = head.split(' ').next()?.split_once('.')?;
        let at = seconds.parse::<i64>().ok()? * 1_000_000 + micros.parse::<i64>().ok()?;
        Some(words.skip(2).filter_map(|id| Some((id.parse().ok()?, at))).collect())
    };
    parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgements_are_parsed_from_monitor_output() {
        let line = r#"1700000000.000042 [0 127.0.0.1:50000] "XACK" "firehose:events" "group" "7-1" "8-0""#;
        let at = 1_700_000_000_000_042;
        assert_eq!(
            acknowledgements(line),
            [(EntryId { ms: 7, seq: 1 }, at), (EntryId { ms: 8, seq: 0 }, at)]
        );
        assert_eq!(acknowledgements(r#"1700000000.000042 [0 lua] "XADD" "xack" "*""#), []);
        assert_eq!(acknowledgements("OK"), []);
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=1000).map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), 500.0);
        assert_eq!(percentile(&values, 0.999), 999.0);
        assert_eq!(percentile(&[3.0], 0.999), 3.0);
        assert_eq!(percentile(&[], 0.5), 0.0);
    }
}
