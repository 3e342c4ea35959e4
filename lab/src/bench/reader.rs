//! `standpipe reader`: frames of real size from a local websocket into Redis.
//!
//! The frames are encoded beforehand, so that the relay, which is this process, has nothing left but to write them to the
//! socket; its cost is reported next to the figures. Each round reads them twice, with `VERIFY=off` and with `VERIFY=on`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::lab::Lab;
use super::program::Program;
use super::report::Stat;
use super::{BenchOptions, machine, stream};
use crate::simulate::{self, Counters, Frame, Network, NetworkOptions, RelayOptions, Source};
use standpipe::out;
use standpipe::stream::Stream;

/// Bytes of a real relay's frame, on average.
const REAL_FRAME: f64 = 5500.0;
/// Maximum frames held in memory: a third of a gigabyte.
const MOST_FRAMES: u64 = 60_000;
/// Frames from which the filling is reckoned.
const SAMPLE: usize = 2000;
/// How often the cursor is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Nothing has arrived for this long: it never will.
const STUCK: Duration = Duration::from_mins(1);

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct ReaderFigures {
    /// Frames of one round.
    pub frames: u64,
    /// Their bytes on average.
    pub frame_bytes: f64,
    /// With everything on this machine: the relay, the reader, Redis.
    pub frames_per_second: Stat,
    /// Per processor second of the reader, which is to say per core.
    pub frames_per_cpu_second: Stat,
    /// Of the reader.
    pub cpu_us_per_frame: Stat,
    /// Of the simulated relay.
    pub relay_cpu_us_per_frame: Stat,
    /// Of Redis.
    pub redis_cpu_us_per_frame: Stat,
    /// The most memory that the reader had resident, in bytes.
    pub peak_memory_bytes: Stat,
    /// The same with `VERIFY=on`, the lookup of each account's key included.
    pub verified: VerifiedFigures,
}

/// What verification costs.
#[derive(Clone, Debug, Serialize)]
pub struct VerifiedFigures {
    /// With everything on this machine: the relay, the reader, Redis.
    pub frames_per_second: Stat,
    /// Of the reader.
    pub cpu_us_per_frame: Stat,
    /// Of the reader, more than without.
    pub more_cpu_us_per_frame: Stat,
    /// Of Redis, more than without.
    pub more_redis_cpu_us_per_frame: Stat,
    /// The most memory that the reader had resident, in bytes.
    pub peak_memory_bytes: Stat,
}

/// One round.
struct Round {
    seconds: f64,
    cpu: f64,
    relay_cpu: f64,
    redis_cpu: f64,
    peak_memory: f64,
}

/// Measures.
///
/// # Errors
///
/// The process or Redis fails.
pub async fn measure(lab: &mut Lab, options: &BenchOptions) -> Result<ReaderFigures> {
    let frames = tokio::task::block_in_place(|| frames(options));
    let bytes: usize = frames.iter().map(|frame| frame.bytes.len()).sum();
    let count = frames.len() as f64;
    let last = frames.iter().filter_map(|frame| frame.seq).max().context("there are no frames")?;
    let frames: Arc<[Frame]> = Arc::from(frames);
    let network = network(options);
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let (off, on) =
            (round(lab, &frames, last, None).await?, round(lab, &frames, last, Some(&network)).await?);
        out::note(format_args!(
            "  reader, round {number}: {:.0} frames/s, verified {:.0}",
            count / off.seconds,
            count / on.seconds
        ));
        rounds.push((off, on));
    }
    let each = |of: &dyn Fn(&Round) -> f64| rounds.iter().map(|(off, _)| of(off)).collect::<Stat>();
    let verified = |of: &dyn Fn(&Round, &Round) -> f64| rounds.iter().map(|(off, on)| of(off, on)).collect();
    Ok(ReaderFigures {
        frames: frames.len() as u64,
        frame_bytes: bytes as f64 / count,
        frames_per_second: each(&|round| count / round.seconds),
        frames_per_cpu_second: each(&|round| count / round.cpu),
        cpu_us_per_frame: each(&|round| round.cpu / count * 1e6),
        relay_cpu_us_per_frame: each(&|round| round.relay_cpu / count * 1e6),
        redis_cpu_us_per_frame: each(&|round| round.redis_cpu / count * 1e6),
        peak_memory_bytes: each(&|round| round.peak_memory),
        verified: VerifiedFigures {
            frames_per_second: verified(&|_, on| count / on.seconds),
            cpu_us_per_frame: verified(&|_, on| on.cpu / count * 1e6),
            more_cpu_us_per_frame: verified(&|off, on| (on.cpu - off.cpu) / count * 1e6),
            more_redis_cpu_us_per_frame: verified(&|off, on| (on.redis_cpu - off.redis_cpu) / count * 1e6),
            peak_memory_bytes: verified(&|_, on| on.peak_memory),
        },
    })
}

/// Accounts sign, and keep their keys: a frame that was recorded before a change would not fit the key after it.
fn network(options: &BenchOptions) -> NetworkOptions {
    NetworkOptions {
        events: options.events.min(MOST_FRAMES),
        signed: true,
        new_keys: false,
        ..stream::network(options.seed, options.accounts)
    }
}

/// Frames that are as large as real ones on average.
fn frames(options: &BenchOptions) -> Vec<Frame> {
    let network = network(options);
    let mean = |pad: usize| {
        let frames = Network::new(&NetworkOptions { pad, ..network.clone() });
        let sizes: Vec<usize> = frames.take(SAMPLE).map(|frame| frame.bytes.len()).collect();
        sizes.iter().sum::<usize>() as f64 / sizes.len().max(1) as f64
    };
    // Only commits are filled.
    let (empty, filled) = (mean(0), mean(1000));
    let pad = ((REAL_FRAME - empty) / (filled - empty) * 1000.0).max(0.0) as usize;
    Network::new(&NetworkOptions { pad, ..network }).collect()
}

/// The directory of the network's accounts, for as long as the value lives.
async fn directory(network: &NetworkOptions) -> Result<(String, AbortOnDropHandle<Result<()>>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let relay = RelayOptions { source: Source::Network(network.clone()), rate: None, oldest: 0 };
    let serving = simulate::serve(listener, relay, Arc::default(), CancellationToken::new());
    Ok((url, AbortOnDropHandle::new(tokio::spawn(serving))))
}

/// Waits until the cursor is at the last frame.
async fn until_read(lab: &Lab, program: &mut Program, last: u64) -> Result<()> {
    let began = Instant::now();
    loop {
        let cursor = Stream::over(lab.streams.connection(), lab.keys.clone()).cursor().await?.position;
        if cursor.is_some_and(|cursor| cursor.unsigned_abs() >= last) {
            return Ok(());
        }
        program.ensure_running()?;
        ensure!(began.elapsed() < STUCK * 10, "the reader stands still:\n{}", program.said());
        tokio::time::sleep(LOOK).await;
    }
}

/// Reads all frames; verifies them if there is a network whose keys to verify them with.
async fn round(
    lab: &mut Lab,
    frames: &Arc<[Frame]>,
    last: u64,
    verified: Option<&NetworkOptions>,
) -> Result<Round> {
    lab.streams.clear().await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let counters = Arc::new(Counters::default());
    let stop = CancellationToken::new();
    let relay = RelayOptions { source: Source::Recording(Arc::clone(frames)), rate: None, oldest: 0 };
    let serving = AbortOnDropHandle::new(tokio::spawn(simulate::serve(
        listener,
        relay,
        Arc::clone(&counters),
        stop.clone(),
    )));
    let directory = match verified {
        Some(network) => Some(directory(network).await?),
        None => None,
    };
    let url = directory.as_ref().map_or("", |(url, _)| url);
    let relay_url = format!("ws://{address}");
    let mut special = vec![
        ("RELAY_URL", relay_url.as_str()),
        // Beyond any mark: it is the reader that is measured, not how it waits.
        ("REDIS_MAX_STREAM_LEN", "100000000"),
    ];
    if directory.is_some() {
        special.extend([("VERIFY", "on"), ("PLC_URL", url), ("ALLOW_PRIVATE_ADDRESSES", "true")]);
    }
    let variables = lab.variables(&special)?;
    let own_cpu = || machine::cpu(std::process::id()).map_or(0.0, |cpu| cpu.own);
    let (relay_before, redis_before) = (own_cpu(), lab.redis_cpu());
    let mut program = Program::start("reader", &variables, lab.folder().path())?;
    let mut connection = lab.streams.connection();
    let started = Instant::now();
    while counters.connections_total.load(Ordering::Relaxed) == 0 {
        program.ensure_running()?;
        ensure!(started.elapsed() < STUCK, "the reader does not connect:\n{}", program.said());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let began = Instant::now();
    until_read(lab, &mut program, last).await?;
    let round = Round {
        seconds: began.elapsed().as_secs_f64(),
        cpu: program.cpu(),
        relay_cpu: own_cpu() - relay_before,
        redis_cpu: lab.redis_cpu() - redis_before,
        peak_memory: program.peak_memory() as f64,
    };
    // All but those of collections that nobody asked for.
    let length: usize = redis::cmd("XLEN").arg(&lab.keys.stream).query_async(&mut connection).await?;
    ensure!(length * 10 >= frames.len() * 9, "{} frames became {length} entries", frames.len());
    let dead: u64 = redis::cmd("XLEN").arg(&lab.keys.dead).query_async(&mut connection).await?;
    ensure!(dead == 0, "{dead} commits did not hold");
    program.stop().await?;
    stop.cancel();
    serving.await.context("the simulated relay")??;
    Ok(round)
}
