//! `standpipe emit`: sends events from a file or from standard input to a running process.

use std::io::{BufRead, BufReader, Cursor, IsTerminal as _, Read as _, Write as _};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::Value;
use standpipe::config::{AccessToken, Config};
use standpipe::origin::ingest::car;
use standpipe::report::table::grouped;
use standpipe::time::Backoff;
use standpipe::{http, out};

use super::{EX_UNAVAILABLE, EX_USAGE};

/// Events and bytes in one request. A request ends with the line that exceeds them.
const EVENTS: usize = 1_000;
const BYTES: usize = 1 << 20;
/// How long to wait for an answer.
const ANSWER: Duration = Duration::from_secs(40);
/// How often to print the progress to a terminal.
const PROGRESS: Duration = Duration::from_millis(200);

/// What to send, and to whom.
#[derive(Debug, Args)]
pub struct Options {
    /// File with one JSON event per line; - for standard input
    file: PathBuf,
    /// The file is a repository archive (CAR), as returned by getRepo: send its records
    #[arg(long)]
    car: bool,
    /// After each request, wait up to 25 seconds until its events are in the tables; exit 1 if some are not in time or become dead letters
    #[arg(long)]
    wait: bool,
    /// Address of the process, host:port; default: `HTTP_ADDR`
    #[arg(long, value_name = "HOST:PORT")]
    to: Option<String>,
    /// How long to repeat a request that is not accepted
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    patience: Duration,
}

/// Where and how requests are sent.
struct Target {
    address: SocketAddr,
    token: AccessToken,
    path: &'static str,
    patience: Duration,
    /// Begins the name of each request, so that sending one again appends nothing twice.
    name: String,
}

/// What was sent so far.
#[derive(Default)]
struct Sent {
    events: u64,
    requests: u64,
    bytes: u64,
    dead_letters: u64,
    not_applied: u64,
}

/// Why it ends early, with the exit code.
struct Failure(ExitCode, String);

/// Sends everything in the file.
///
/// # Errors
///
/// The file cannot be read, or the output not be written.
pub async fn emit(config: Config, options: Options) -> Result<ExitCode> {
    let Some(token) = config.ingest_token else {
        out::note("standpipe: INGEST_TOKEN is not set: use the running process's value");
        return Ok(ExitCode::from(EX_USAGE));
    };
    let address = match &options.to {
        Some(to) => to.to_socket_addrs().ok().and_then(|mut found| found.next()),
        None => config.http_addr,
    };
    let Some(address) = address else {
        out::note("standpipe: no address to send to: use --to HOST:PORT, or set HTTP_ADDR");
        return Ok(ExitCode::from(EX_USAGE));
    };
    let path = if options.wait { "/events?wait=applied" } else { "/events" };
    let name = http::random_token()?;
    let target = Target { address, token, path, patience: options.patience, name };
    let (input, total) = match open(&options)? {
        Ok(opened) => opened,
        Err(message) => {
            out::note(format_args!("standpipe: {}: {message}", options.file.display()));
            return Ok(ExitCode::FAILURE);
        }
    };
    let mut sent = Sent::default();
    let ended = send_all(&target, input, total, &mut sent).await?;
    if let Some(Failure(code, message)) = ended {
        out::note(format_args!("standpipe: {message}"));
        out::note(format_args!("standpipe: {} events were accepted before that", grouped(sent.events)));
        return Ok(code);
    }
    let Sent { events, requests, dead_letters, not_applied, .. } = sent;
    let what = if options.wait && not_applied == 0 { "applied" } else { "accepted" };
    out::line(format_args!("{} events {what}, in {} requests", grouped(events), grouped(requests)))?;
    if not_applied > 0 {
        out::note(format_args!(
            "standpipe: {} events were not applied in time; they will be: see standpipe status",
            grouped(not_applied)
        ));
        return Ok(ExitCode::FAILURE);
    }
    if dead_letters > 0 {
        let count = grouped(dead_letters);
        out::note(format_args!(
            "standpipe: {count} of them became dead letters: see standpipe dead-letters list"
        ));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// What is to be sent, and how many bytes it has if that is known; or what is wrong with it.
type Opened = Result<(Box<dyn BufRead>, Option<u64>), String>;

fn open(options: &Options) -> Result<Opened> {
    let (mut input, total): (Box<dyn BufRead>, Option<u64>) = if options.file.as_os_str() == "-" {
        (Box::new(BufReader::new(std::io::stdin())), None)
    } else {
        let file = std::fs::File::open(&options.file)
            .with_context(|| format!("{} cannot be read", options.file.display()))?;
        let size = file.metadata()?.len();
        (Box::new(BufReader::new(file)), Some(size))
    };
    if !options.car {
        return Ok(Ok((input, total)));
    }
    let mut archive = Vec::new();
    input.read_to_end(&mut archive).context("the input cannot be read")?;
    let repo = match car::read(&archive) {
        Ok(repo) => repo,
        Err(message) => return Ok(Err(message)),
    };
    let unreadable = match repo.unreadable {
        0 => String::new(),
        count => format!(", and {} that cannot be read", grouped(count as u64)),
    };
    out::note(format_args!("standpipe: {}: {} records{unreadable}", repo.did, grouped(repo.records as u64)));
    let total = repo.lines.len() as u64;
    Ok(Ok((Box::new(Cursor::new(repo.lines)), Some(total))))
}

async fn send_all(
    target: &Target,
    mut input: Box<dyn BufRead>,
    total: Option<u64>,
    sent: &mut Sent,
) -> Result<Option<Failure>> {
    let mut progress = Progress { total, began: Instant::now(), shown: None, noted: None };
    let mut line_number = 1;
    let mut more = true;
    while more {
        let first = line_number;
        let (mut body, mut events) = (Vec::new(), 0);
        while events < EVENTS && body.len() < BYTES {
            let before = body.len();
            if input.read_until(b'\n', &mut body).context("the input cannot be read")? == 0 {
                more = false;
                break;
            }
            line_number += 1;
            events += usize::from(!body[before..].trim_ascii().is_empty());
        }
        sent.bytes += body.len() as u64;
        if events == 0 {
            continue;
        }
        let key = format!("emit-{}-{}", target.name, sent.requests);
        let answer = match send(target, &key, &body, &mut progress).await {
            Ok(answer) => answer,
            Err(Failure(code, message)) => {
                Progress::end();
                return Ok(Some(Failure(code, locate(&message, first))));
            }
        };
        sent.requests += 1;
        sent.events += events as u64;
        sent.dead_letters += answer["dead_letters"].as_array().map_or(0, Vec::len) as u64;
        if answer["applied"] == Value::Bool(false) {
            sent.not_applied += events as u64;
        }
        progress.show(sent);
    }
    Progress::end();
    Ok(None)
}

/// The number of the line in the file, and not in the request.
fn locate(message: &str, first: usize) -> String {
    let rest = message.strip_prefix("line ").and_then(|rest| rest.split_once(": "));
    match rest.and_then(|(line, rest)| Some((line.parse::<usize>().ok()?, rest))) {
        Some((line, rest)) => format!("line {}: {rest}", first + line - 1),
        None => message.to_owned(),
    }
}

/// Sends one request, again and again until there is an answer.
async fn send(target: &Target, key: &str, body: &[u8], progress: &mut Progress) -> Result<Value, Failure> {
    let mut delays = Backoff::default();
    let began = Instant::now();
    loop {
        let credentials = (&target.token, key);
        let answer = http::client::send_events(target.address, target.path, credentials, body, ANSWER).await;
        let reason = match answer {
            Ok((code, text)) => {
                let answer: Value = serde_json::from_str(&text).unwrap_or_default();
                let message = answer["error"].as_str().unwrap_or(text.trim()).to_owned();
                match code {
                    202 => return Ok(answer),
                    408 | 500.. => message,
                    401 | 403 => return Err(Failure(ExitCode::from(EX_USAGE), message)),
                    _ => return Err(Failure(ExitCode::FAILURE, message)),
                }
            }
            Err(error) => format!("{error:#}"),
        };
        if began.elapsed() > target.patience {
            let message = format!("the request was not accepted within {:?}: {reason}", target.patience);
            return Err(Failure(ExitCode::from(EX_UNAVAILABLE), message));
        }
        progress.note(&reason);
        tokio::time::sleep(delays.pause()).await;
    }
}

/// One line on a terminal.
struct Progress {
    /// Of the file, in bytes.
    total: Option<u64>,
    began: Instant,
    shown: Option<Instant>,
    /// What was said where there is no terminal.
    noted: Option<String>,
}

impl Progress {
    fn show(&mut self, sent: &Sent) {
        if !std::io::stderr().is_terminal() || self.shown.is_some_and(|shown| shown.elapsed() < PROGRESS) {
            return;
        }
        self.shown = Some(Instant::now());
        let rate = sent.events as f64 / self.began.elapsed().as_secs_f64().max(0.001);
        let part = match self.total {
            Some(total) if total > 0 => format!("{:3} %  ", sent.bytes * 100 / total),
            _ => String::new(),
        };
        let _ = write!(std::io::stderr(), "\r\x1b[K{part}{} events, {rate:.0}/s", grouped(sent.events));
    }

    /// Why it does not go on.
    fn note(&mut self, reason: &str) {
        if std::io::stderr().is_terminal() {
            let reason = out::safe(reason, out::LINE);
            let _ = write!(std::io::stderr(), "\r\x1b[Kwaiting: {reason}");
            self.shown = None;
        } else if self.noted.as_deref() != Some(reason) {
            out::note(format_args!("standpipe: waiting: {reason}"));
            self.noted = Some(reason.to_owned());
        }
    }

    fn end() {
        if std::io::stderr().is_terminal() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
