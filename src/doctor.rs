//! `standpipe check`: configuration, then Redis, PostgreSQL, RabbitMQ and Kafka; problems and remedies. Changes nothing.

#[cfg(feature = "amqp")]
mod amqp;
#[cfg(feature = "kafka")]
mod kafka;
mod postgres;
mod redis;

use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::config::Config;
use crate::out;

/// Clocks that differ by more than this make ages and times misleading.
const SKEW: f64 = 2.0;

/// How much one finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// It works, but needs attention.
    Warning,
    /// It does not work, or not safely.
    Error,
}

impl Level {
    /// The word that is printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }

    /// Its terminal colour: green, blue, yellow, red and bold.
    fn colour(self) -> &'static str {
        match self {
            Self::Ok => "\x1b[32m",
            Self::Note => "\x1b[34m",
            Self::Warning => "\x1b[33m",
            Self::Error => "\x1b[1;31m",
        }
    }
}

/// What was examined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Section {
    /// The environment.
    #[serde(rename = "configuration")]
    Configuration,
    /// Redis.
    Redis,
    /// PostgreSQL.
    #[serde(rename = "PostgreSQL")]
    Postgres,
    /// RabbitMQ.
    #[serde(rename = "RabbitMQ")]
    RabbitMq,
    /// Kafka.
    #[serde(rename = "Kafka")]
    Kafka,
}

impl Section {
    fn name(self) -> &'static str {
        match self {
            Self::Configuration => "configuration",
            Self::Redis => "Redis",
            Self::Postgres => "PostgreSQL",
            Self::RabbitMq => "RabbitMQ",
            Self::Kafka => "Kafka",
        }
    }
}

/// The result of one check.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// Where.
    pub section: Section,
    /// The check.
    pub what: &'static str,
    /// The result.
    pub found: String,
    /// The remedy; empty where none is needed.
    pub remedy: String,
}

/// The overall result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// No errors.
    Healthy,
    /// There are errors to fix.
    Unhealthy,
    /// A service cannot be reached, or rejects our login.
    Unreachable,
}

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Examination {
    /// The program's version.
    pub version: &'static str,
    /// The overall result.
    pub verdict: Verdict,
    /// In the order of the checks.
    pub findings: Vec<Finding>,
}

impl Examination {
    /// For people: aligned, each finding with its remedy below it. Lines wrap at `columns`, if given.
    #[must_use]
    pub fn page(&self, colour: bool, columns: Option<usize>) -> String {
        let paint = |code: &str, text: &str| {
            if colour { format!("{code}{text}\x1b[0m") } else { text.to_owned() }
        };
        let width = self.findings.iter().map(|finding| finding.what.len()).max().unwrap_or(0);
        let mut page = String::new();
        let mut section = None;
        for finding in &self.findings {
            if section != Some(finding.section) {
                section = Some(finding.section);
                let _ = writeln!(page, "{}", paint("\x1b[1m", finding.section.name()));
            }
            let level = paint(finding.level.colour(), &format!("{:<7}", finding.level.name()));
            let start = format!("  {level}  {:<width$}  ", finding.what);
            // Where the text begins, not counting colour codes.
            let indent = 2 + 7 + 2 + width + 2;
            let _ = writeln!(page, "{start}{}", broken(&finding.found, indent, columns));
            if !finding.remedy.is_empty() {
                let remedy = broken(&finding.remedy, indent + 3, columns);
                let _ = writeln!(page, "{:indent$}-> {remedy}", "");
            }
        }
        let _ = write!(page, "{self}");
        page
    }
}

impl fmt::Display for Examination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |level| self.findings.iter().filter(|finding| finding.level == level).count();
        let plural = |count: usize, word: &str| match count {
            0 => format!("no {word}s"),
            1 => format!("1 {word}"),
            count => format!("{count} {word}s"),
        };
        write!(f, "{}, {}", plural(count(Level::Error), "error"), plural(count(Level::Warning), "warning"))
    }
}

/// The findings so far.
struct Findings {
    section: Section,
    list: Vec<Finding>,
    unreachable: bool,
}

impl Findings {
    fn add(&mut self, level: Level, what: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        let (found, remedy) = (one_line(&found.into()), one_line(&remedy.into()));
        self.list.push(Finding { level, section: self.section, what, found, remedy });
    }

    fn ok(&mut self, what: &'static str, found: impl Into<String>) {
        self.add(Level::Ok, what, found, "");
    }

    fn note(&mut self, what: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.add(Level::Note, what, found, remedy);
    }

    fn warning(&mut self, what: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.add(Level::Warning, what, found, remedy);
    }

    fn error(&mut self, what: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.add(Level::Error, what, found, remedy);
    }

    /// A server that cannot be queried.
    fn unreachable(&mut self, found: impl Into<String>, remedy: impl Into<String>) {
        self.unreachable = true;
        self.error("connection", found, remedy);
    }

    /// Compares a server's clock with ours. `asked` is how long its answer took.
    fn clock(&mut self, theirs: f64, asked: Duration) {
        let ours = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        // It read its clock at some moment while we waited.
        let skew = theirs - (ours - asked.as_secs_f64() / 2.0);
        if skew.abs() > SKEW + asked.as_secs_f64() / 2.0 {
            let way = if skew > 0.0 { "ahead of" } else { "behind" };
            self.warning(
                "clock",
                format!(
                    "the server's is {:.1} s {way} this machine's: ages and waiting times are misleading",
                    skew.abs()
                ),
                "set both by NTP (timedatectl set-ntp true)",
            );
        } else {
            self.ok("clock", "agrees with this machine's");
        }
    }
}

/// Names and answers come from elsewhere: nothing in them may reach a terminal unescaped.
fn one_line(text: &str) -> String {
    out::safe(&text.split_whitespace().collect::<Vec<_>>().join(" "), 10 * out::LINE)
}

/// Wraps the text at `columns`, indenting every line but the first.
fn broken(text: &str, indent: usize, columns: Option<usize>) -> String {
    // On a very narrow terminal, leave wrapping to the terminal rather than print a word per line.
    let Some(room) = columns.and_then(|columns| columns.checked_sub(indent)).filter(|room| *room >= 30)
    else {
        return text.to_owned();
    };
    let mut lines = String::with_capacity(text.len());
    let mut used = 0;
    for word in text.split(' ') {
        let length = word.chars().count();
        if used > 0 && used + 1 + length > room {
            let _ = write!(lines, "\n{:indent$}", "");
            used = 0;
        } else if used > 0 {
            lines.push(' ');
            used += 1;
        }
        lines.push_str(word);
        used += length;
    }
    lines
}

/// A few names of many.
fn some_of<T: AsRef<str>>(names: &[T]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// `12 s`, `3 min`, `5 h`, `2 d`.
fn rough(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

/// `512 MiB`.
fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    for (unit, name) in [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
        if bytes >= unit as f64 {
            return format!("{:.1} {name}", bytes / unit as f64);
        }
    }
    format!("{bytes} B")
}

/// Runs every check. `warnings` are those of the configuration.
pub async fn check(config: &Config, warnings: &[String]) -> Examination {
    let mut findings = Findings { section: Section::Configuration, list: Vec::new(), unreachable: false };
    if warnings.is_empty() {
        findings.ok("variables", "all of them are valid");
    }
    for warning in warnings {
        findings.warning("variables", warning, "");
    }
    findings.section = Section::Redis;
    let processes = redis::check(config, &mut findings).await;
    findings.section = Section::Postgres;
    if config.database_url.is_some() {
        postgres::check(config, processes, &mut findings).await;
    } else {
        findings.warning(
            "connection",
            "DATABASE_URL is not set",
            "set it, unless this machine runs only the reader",
        );
    }
    #[cfg(feature = "amqp")]
    {
        findings.section = Section::RabbitMq;
        amqp::check(config, &mut findings).await;
    }
    #[cfg(feature = "kafka")]
    {
        findings.section = Section::Kafka;
        kafka::check(config, &mut findings).await;
    }
    let verdict = if findings.unreachable {
        Verdict::Unreachable
    } else if findings.list.iter().any(|finding| finding.level == Level::Error) {
        Verdict::Unhealthy
    } else {
        Verdict::Healthy
    };
    Examination { version: env!("CARGO_PKG_VERSION"), verdict, findings: findings.list }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_aligned_and_coloured_only_when_asked() {
        let mut findings = Findings { section: Section::Redis, list: Vec::new(), unreachable: false };
        findings.ok("version", "Redis 7");
        findings.error("eviction policy", "allkeys-lru", "set\n   noeviction");
        let examination = Examination { version: "1", verdict: Verdict::Unhealthy, findings: findings.list };
        assert_eq!(
            examination.page(false, None),
            "Redis\n  ok       version          Redis 7\n  error    eviction policy  allkeys-lru\n                            \
             -> set noeviction\n1 error, no warnings"
        );
        assert!(examination.page(true, None).contains("\x1b[1;31merror  \x1b[0m"));
    }

    #[test]
    fn long_lines_wrap_between_words() {
        let text = "one two three four five six seven eight nine ten";
        assert_eq!(broken(text, 4, None), text);
        assert_eq!(broken(text, 4, Some(20)), text, "too narrow");
        assert_eq!(broken(text, 4, Some(34)), "one two three four five six\n    seven eight nine ten");
    }

    #[test]
    fn a_clock_difference_is_reported() {
        let mut findings = Findings { section: Section::Redis, list: Vec::new(), unreachable: false };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        for (theirs, level) in [(now, Level::Ok), (now - 60.0, Level::Warning), (now + 60.0, Level::Warning)]
        {
            findings.clock(theirs, Duration::from_millis(10));
            assert_eq!(findings.list.pop().unwrap().level, level);
        }
    }
}
