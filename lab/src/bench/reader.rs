//! `standpipe reader`: frames of real size from a local websocket into Redis.
//!
//! The frames are encoded beforehand, so that the relay, which is this process, has nothing left but to write them to the
//! socket; its cost is reported next to the figures.

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
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let round = round(lab, &frames, last).await?;
        out::note(format_args!("  reader, round {number}: {:.0} frames/s", count / round.seconds));
        rounds.push(round);
    }
    let each = |of: &dyn Fn(&Round) -> f64| rounds.iter().map(of).collect::<Stat>();
    Ok(ReaderFigures {
        frames: frames.len() as u64,
        frame_bytes: bytes as f64 / count,
        frames_per_second: each(&|round| count / round.seconds),
        frames_per_cpu_second: each(&|round| count / round.cpu),
        cpu_us_per_frame: each(&|round| round.cpu / count * 1e6),
        relay_cpu_us_per_frame: each(&|round| round.relay_cpu / count * 1e6),
        redis_cpu_us_per_frame: each(&|round| round.redis_cpu / count * 1e6),
        peak_memory_bytes: each(&|round| round.peak_memory),
    })
}

/// Frames that are as large as real ones on average.
fn frames(options: &BenchOptions) -> Vec<Frame> {
    let network = NetworkOptions {
        events: options.events.min(MOST_FRAMES),
        ..stream::network(options.seed, options.accounts)
    };
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

async fn round(lab: &mut Lab, frames: &Arc<[Frame]>, last: u64) -> Result<Round> {
    lab.streams.clear().await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let counters = Arc::new(Counters::default());
    let stop = CancellationToken::new();
    let relay = RelayOptions { source: Source::Recording(Arc::clone(frames)), rate: None };
    let serving = AbortOnDropHandle::new(tokio::spawn(simulate::serve(
        listener,
        relay,
        Arc::clone(&counters),
        stop.clone(),
    )));
    let variables = lab.variables(&[
        ("RELAY_URL", &format!("ws://{address}")),
        // Beyond any mark: it is the reader that is measured, not how it waits.
        ("REDIS_MAX_STREAM_LEN", "100000000"),
    ])?;
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
    loop {
        let cursor = Stream::over(connection.clone(), lab.keys.clone()).cursor().await?.position;
        if cursor.is_some_and(|cursor| cursor.unsigned_abs() >= last) {
            break;
        }
        program.ensure_running()?;
        ensure!(began.elapsed() < STUCK * 10, "the reader stands still:\n{}", program.said());
        tokio::time::sleep(LOOK).await;
    }
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
    program.stop().await?;
    stop.cancel();
    serving.await.context("the simulated relay")??;
    Ok(round)
}
