//! `standpipe status`: once, or repeatedly.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use standpipe::config::Config;
use standpipe::report::table::{Beside, table};
use standpipe::store::{Store, migrate};
use standpipe::stream::{Redis, Stream, StreamResult};
use standpipe::time::now_ms;
use standpipe::{http, out, report};

use super::EX_UNAVAILABLE;

/// Time limit for answers from the process and PostgreSQL.
const ANSWER: Duration = Duration::from_secs(3);
/// Maximum dead letters read to count their reasons: each is read in full.
const REASONS: usize = 1000;

/// What to print.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Print JSON, on one line
    #[arg(long)]
    json: bool,
    /// Refresh every SECONDS, 2 by default, until Ctrl-C
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
}

/// Prints the status.
///
/// # Errors
///
/// The output cannot be written.
pub async fn status(config: Config, options: Options) -> Result<ExitCode> {
    let mut asker = Asker { redis: Redis::open(&config)?, stream: None, config };
    let Some(seconds) = options.watch else {
        let answer = asker.ask(options.json).await;
        out::unless_closed(print(&answer, options.json))?;
        return Ok(answer.code());
    };
    let in_place = std::io::stdout().is_terminal() && !options.json;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut tick = tokio::time::interval(Duration::from_secs(seconds));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut first = true;
    loop {
        let round = async {
            tick.tick().await;
            asker.ask(options.json).await
        };
        let answer = tokio::select! {
            answer = round => answer,
            _ = tokio::signal::ctrl_c() => break,
            _ = terminate.recv() => break,
        };
        if in_place {
            redraw(&answer.page(), first)?;
        } else {
            if !first && !options.json {
                out::line("")?;
            }
            print(&answer, options.json)?;
        }
        first = false;
    }
    Ok(ExitCode::SUCCESS)
}

fn print(answer: &Answer, json: bool) -> Result<()> {
    match (&answer.trouble, json) {
        (Some(trouble), true) => out::note(format_args!("standpipe: {trouble}")),
        (None, true) => out::line(out::safe_json(&answer.status.to_string()))?,
        (_, false) => out::raw(&answer.page())?,
    }
    Ok(())
}

/// Overwrites the previous output line by line, to avoid flicker.
fn redraw(page: &str, first: bool) -> Result<()> {
    let mut text = if first { "\x1b[2J\x1b[H".to_owned() } else { "\x1b[H".to_owned() };
    for line in page.lines().chain(["", "Ctrl-C to stop"]) {
        text.push_str(line);
        text.push_str("\x1b[K\n");
    }
    text.push_str("\x1b[J");
    out::raw(&text)
}

/// The answer.
struct Answer {
    /// The JSON of `/status`; null if nothing answered.
    status: Value,
    beside: Beside,
    /// Why Redis could not be queried.
    trouble: Option<String>,
}

impl Answer {
    fn page(&self) -> String {
        let page = table(&self.status, &self.beside, now_ms());
        match &self.trouble {
            Some(trouble) if self.status.is_null() => {
                format!("standpipe: {}\n", out::safe(trouble, 10 * out::LINE))
            }
            _ => page,
        }
    }

    fn code(&self) -> ExitCode {
        if self.trouble.is_some() { ExitCode::from(EX_UNAVAILABLE) } else { ExitCode::SUCCESS }
    }
}

struct Asker {
    config: Config,
    redis: Redis,
    /// Reused as long as it works.
    stream: Option<Stream>,
}

impl Asker {
    /// Prefers the process, which knows more than the servers; without one, queries them.
    async fn ask(&mut self, json: bool) -> Answer {
        let mut beside = Beside::default();
        let process = self.ask_process().await;
        let (status, trouble) = match process {
            Some(status) if status["stream"].is_object() => (status, None),
            process => match self.ask_redis().await {
                Ok(mut report) => {
                    if let Some(process) = process {
                        report["process"] = process["process"].clone();
                    }
                    (report, None)
                }
                Err(error) => {
                    let trouble = format!("Redis at {} cannot be reached: {error}", self.config.redis_url);
                    (process.unwrap_or_default(), Some(trouble))
                }
            },
        };
        if json {
            return Answer { status, beside, trouble };
        }
        if status["dead_letters"].as_u64().is_some_and(|count| count > 0) {
            // A detail: without the reasons, the total is still shown.
            let _ = self.add_reasons(&status, &mut beside).await;
        }
        if !status["process"].is_object() && self.config.database_url.is_some() {
            beside.database = Some(self.ask_postgres().await);
        }
        Answer { status, beside, trouble }
    }

    /// The answer of the process at `HTTP_ADDR`, also when it reports that Redis is down.
    async fn ask_process(&self) -> Option<Value> {
        let address = self.config.http_addr?;
        let (_, body) = http::client::get(address, "/status", ANSWER).await.ok()?;
        let status: Value = serde_json::from_str(&body).ok()?;
        status["process"].is_object().then_some(status)
    }

    async fn ask_redis(&mut self) -> Result<Value> {
        let mut stream = self.redis.reuse(&mut self.stream).await?;
        let report = report::report(&mut stream).await?;
        self.stream = Some(stream);
        Ok(serde_json::to_value(report)?)
    }

    async fn add_reasons(&mut self, status: &Value, beside: &mut Beside) -> StreamResult<()> {
        let mut stream = self.redis.reuse(&mut self.stream).await?;
        let reasons = stream.dead_letter_reasons(REASONS).await?;
        self.stream = Some(stream);
        let seen: u64 = reasons.iter().map(|(_, count)| count).sum();
        let all = status["dead_letters"].as_u64().is_some_and(|total| total <= REASONS as u64);
        beside.newest = (!all).then_some(seen);
        beside.reasons = reasons;
        Ok(())
    }

    async fn ask_postgres(&self) -> String {
        let asked = async {
            let store = Store::new(&self.config).map_err(|error| format!("{error:#}"))?;
            let session = store.session().await.map_err(|error| error.to_string())?;
            migrate::look(session.client()).await.map_err(|error| error.to_string())
        };
        match tokio::time::timeout(ANSWER, asked).await {
            Ok(Ok(found)) if found.is_current() => format!("answers, tables at version {}", found.version),
            Ok(Ok(found)) => {
                format!(
                    "answers, tables at version {} of {}, or functions of another program: standpipe migrate",
                    found.version,
                    migrate::wanted()
                )
            }
            Ok(Err(error)) => format!("cannot be used: {error}"),
            Err(_) => format!("no answer within {ANSWER:?}"),
        }
    }
}
