//! `standpipe worker` from its start until it has drained a prepared stream.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::lab::{Cost, Lab, Variables};
use super::program::Program;
use super::stream::Prepared;
use standpipe::http;
use standpipe::stream::Stream;
use standpipe::stream::janitor::Look;

/// How often the stream is looked at while the time is taken; a look costs Redis less than a tenth of a millisecond.
const LOOK: Duration = Duration::from_millis(10);
/// How often it is asked whether it is ready, and looked whether it has begun.
const ASK: Duration = Duration::from_millis(2);
/// Nothing has moved for this long: it never will.
const STUCK: Duration = Duration::from_mins(1);

/// How a run went.
#[derive(Clone, Copy, Debug)]
pub struct Drained {
    /// From the first delivery, when the first batch is applied, until everything was acknowledged.
    pub seconds: f64,
    /// From the start of the process until `/readyz` said 200.
    pub ready_ms: f64,
    /// Processor seconds of the process, from its start.
    pub cpu: f64,
    /// The most memory that it had resident, in bytes.
    pub peak_memory: u64,
}

/// Drains a stream into a database.
///
/// # Errors
///
/// The process ends, stands still, or makes dead letters.
pub async fn drain(
    lab: &mut Lab,
    prepared: &Prepared,
    database: &str,
    special: &[(&str, &str)],
) -> Result<(Drained, Cost)> {
    lab.streams.restore(prepared, &lab.keys).await?;
    let mut variables = lab.variables(special)?;
    variables.push(("DATABASE_URL".to_owned(), database.to_owned()));
    let work = async {
        let began = Instant::now();
        let mut program = Program::start("worker", &variables, lab.folder().path())?;
        let (ready, seconds) = tokio::try_join!(
            until_ready(&variables, began),
            until_drained(lab, prepared.entries, &mut program),
        )?;
        let drained = Drained {
            seconds,
            ready_ms: ready.as_secs_f64() * 1000.0,
            cpu: program.cpu(),
            peak_memory: program.peak_memory(),
        };
        Ok((program, drained))
    };
    let ((program, drained), cost) = lab.metered(work).await?;
    program.stop().await?;
    let dead: u64 = redis::cmd("XLEN").arg(&lab.keys.dead).query_async(&mut lab.streams.connection()).await?;
    ensure!(dead == 0, "{dead} of the prepared events became dead letters: there is nothing to measure");
    Ok((drained, cost))
}

/// Waits until `/readyz` says 200.
///
/// # Errors
///
/// It never does.
pub async fn until_ready(variables: &Variables, began: Instant) -> Result<Duration> {
    let address = variables.iter().find(|(name, _)| name == "HTTP_ADDR").context("HTTP_ADDR")?;
    let address: SocketAddr = address.1.parse()?;
    loop {
        match http::client::get(address, "/readyz", Duration::from_secs(2)).await {
            Ok((200, _)) => return Ok(began.elapsed()),
            Ok((_, body)) if began.elapsed() > STUCK => bail!("it does not get ready: {body}"),
            Err(error) if began.elapsed() > STUCK => return Err(error.context("it does not get ready")),
            _ => tokio::time::sleep(ASK).await,
        }
    }
}

async fn until_drained(lab: &Lab, entries: u64, program: &mut Program) -> Result<f64> {
    let mut stream = Stream::over(lab.streams.connection(), lab.keys.clone());
    let mut began = None;
    let mut moved = (Instant::now(), Look::default());
    loop {
        let look = stream.look().await?;
        let now = Instant::now();
        // Of a stream that nobody has read, the oldest entry that waits is the first.
        if began.is_none() && (look.pending > 0 || look.is_drained()) {
            began = Some(now);
        }
        if let Some(began) = began
            && look.is_drained()
        {
            ensure!(look.length <= entries, "somebody else appends to the stream");
            return Ok((now - began).as_secs_f64());
        }
        if moved.1 == look {
            ensure!(now - moved.0 < STUCK, "nothing moves any more:\n{}", program.said());
        } else {
            moved = (now, look);
        }
        program.ensure_running()?;
        tokio::time::sleep(if began.is_some() { LOOK } else { ASK }).await;
    }
}

/// Waits until everything in the stream is acknowledged.
///
/// # Errors
///
/// Redis cannot be reached, or the process has ended.
pub async fn until_empty(stream: &mut Stream, program: &mut Program) -> Result<()> {
    let began = Instant::now();
    while !stream.look().await?.is_drained() {
        program.ensure_running()?;
        ensure!(began.elapsed() < STUCK, "it does not get done:\n{}", program.said());
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}
