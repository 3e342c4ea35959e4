//! `standpipe dead-letters`: inspecting, retrying and purging events that could not be applied.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::apply::{Context, interpret};
use crate::config::TransactionMode;
use crate::event::{Entry, EntryId, Reason, Reject, Task};
use crate::out;
use crate::store::handlers::{Handled, Handlers};
use crate::store::{Fate, Store};
use crate::stream::Stream;
use crate::stream::dead_letters::Letter;

/// Letters read at a time.
const PAGE: usize = 200;
/// Maximum lines of an operation shown to a person.
const LINES: usize = 500;

/// A filter of dead letters; a letter must match every condition that is given.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// These ids; empty for any.
    pub ids: Vec<String>,
    /// This class.
    pub reason: Option<String>,
    /// This type (commit, identity, account) or this collection.
    pub kind: Option<String>,
    /// This text, anywhere in the letter; case does not matter.
    pub text: Option<String>,
    /// Not tried before this long ago.
    pub since: Option<Duration>,
}

impl Filter {
    /// Whether the letter matches.
    #[must_use]
    pub fn fits(&self, letter: &Letter) -> bool {
        let young = |since: Duration| {
            let then =
                jiff::Timestamp::now().checked_sub(jiff::SignedDuration::try_from(since).unwrap_or_default());
            match (letter.last_time.parse::<jiff::Timestamp>(), then) {
                (Ok(last), Ok(then)) => last >= then,
                _ => true,
            }
        };
        (self.ids.is_empty() || self.ids.contains(&letter.id))
            && self.reason.as_ref().is_none_or(|reason| *reason == letter.reason)
            && self
                .kind
                .as_ref()
                .is_none_or(|kind| *kind == letter.event_type || *kind == letter.collection())
            && self.text.as_ref().is_none_or(|text| contains(letter, text))
            && self.since.is_none_or(young)
    }
}

/// Whether a text occurs anywhere in a letter as stored: operations are JSON.
fn contains(letter: &Letter, text: &str) -> bool {
    let text = text.to_lowercase();
    [
        &letter.id,
        &letter.source_id,
        &letter.seq,
        &letter.event_type,
        &letter.reason,
        &letter.sqlstate,
        &letter.message,
        &letter.op,
        &letter.data,
    ]
    .into_iter()
    .any(|field| field.to_lowercase().contains(&text))
}

/// The letter on one line, bounded, and safe to print on a terminal.
#[must_use]
pub fn line(letter: &Letter) -> String {
    let cell = |text: &str| out::safe(text, out::CELL);
    let tries = if letter.attempts == 1 { "attempt" } else { "attempts" };
    format!(
        "{}  {}  {} {}  {} ({} {tries})",
        cell(&letter.id),
        cell(&letter.reason),
        cell(&letter.event_type),
        cell(&letter.collection()),
        cell(&letter.message),
        letter.attempts,
    )
}

/// The letter for a person, bounded likewise; `dead-letters show --json` has all of it.
#[must_use]
pub fn page(letter: &Letter) -> String {
    let (op, data) = (parsed(&letter.op), parsed(&letter.data));
    let mut page = String::new();
    let seq = if letter.seq.is_empty() { String::new() } else { format!(", sequence number {}", letter.seq) };
    let database = if letter.sqlstate.is_empty() { "" } else { ", SQLSTATE " };
    for (name, value) in [
        ("id", letter.id.clone()),
        ("reason", format!("{}{database}{}", letter.reason, letter.sqlstate)),
        ("message", letter.message.clone()),
        ("type", letter.event_type.clone()),
        ("record", record(&op, &data).unwrap_or_default()),
        ("entry", format!("{}{seq}", letter.source_id)),
        ("first tried", letter.first_time.clone()),
        ("last tried", format!("{}, by version {}", letter.last_time, letter.version)),
        ("attempts", letter.attempts.to_string()),
    ] {
        if !value.is_empty() {
            let _ = writeln!(page, "{name:<11} {}", out::safe(&value, 10 * out::LINE));
        }
    }
    for (title, text, json) in [("operation", &letter.op, &op), ("rest of the commit", &letter.data, &data)] {
        if text.is_empty() {
            continue;
        }
        let pretty = serde_json::to_string_pretty(json).unwrap_or_default();
        let text = if json.is_null() { text } else { &pretty };
        let _ = writeln!(page, "\n{title}:");
        for line in text.lines().take(LINES) {
            let _ = writeln!(page, "{}", out::safe(line, out::LINE));
        }
        match text.lines().count().saturating_sub(LINES) {
            0 => {}
            more => {
                let _ = writeln!(page, "({more} more lines: use --json to see them)");
            }
        }
    }
    page.trim_end().to_owned()
}

/// The at:// URI of the record that a letter is about, if it names one.
fn record(op: &Value, data: &Value) -> Option<String> {
    let repo = [&data["repo"], &op["repo"], &op["did"]].into_iter().find_map(Value::as_str)?;
    Some(match op["path"].as_str() {
        Some(path) => format!("at://{repo}/{path}"),
        None => format!("at://{repo}"),
    })
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

/// A walk over the letters, oldest first. It ends at the letter that was newest when it began: a letter whose retry
/// failed is put back behind that one.
pub struct Walk {
    stream: Stream,
    filter: Filter,
    page: std::vec::IntoIter<Letter>,
    after: Option<String>,
    end: Option<EntryId>,
    until: Option<Instant>,
    interrupted: bool,
}

/// The outcome of a walk's retries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retries {
    /// Letters now applied, and removed.
    pub applied: u64,
    /// Letters that still cannot be applied, and are kept.
    pub kept: u64,
}

impl Walk {
    /// Starts a walk over the letters that match.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn new(mut stream: Stream, filter: Filter) -> Result<Self> {
        let end = stream.newest_dead_letter().await?;
        let page = Vec::new().into_iter();
        Ok(Self { stream, filter, page, after: None, end, until: None, interrupted: false })
    }

    /// Ends the walk after this time.
    #[must_use]
    pub fn for_at_most(mut self, time: Duration) -> Self {
        self.until = Some(Instant::now() + time);
        self
    }

    /// Whether time ran out before the last letter.
    #[must_use]
    pub fn was_interrupted(&self) -> bool {
        self.interrupted
    }

    /// The next letter that matches.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn next(&mut self) -> Result<Option<Letter>> {
        let Some(end) = self.end else { return Ok(None) };
        loop {
            if self.until.is_some_and(|until| Instant::now() > until) {
                self.interrupted = true;
                return Ok(None);
            }
            if let Some(letter) = self.page.find(|letter| self.filter.fits(letter)) {
                return Ok(Some(letter));
            }
            let after = self.after.as_deref();
            let mut page = self.stream.dead_letters(after, PAGE).await?;
            page.retain(|letter| letter.id.parse::<EntryId>().is_ok_and(|id| id <= end));
            let Some(last) = page.last() else { return Ok(None) };
            self.after = Some(last.id.clone());
            self.page = page.into_iter();
        }
    }

    /// Retries the remaining letters; `counts` is valid even if it fails midway. Calls `kept` for each that still
    /// cannot be applied.
    ///
    /// # Errors
    ///
    /// As for [`retry`], or what `kept` returns.
    pub async fn retry_all(
        &mut self,
        (store, handlers): (&Store, Option<&Handlers>),
        counts: &mut Retries,
        mut kept: impl FnMut(&str, &str) -> Result<()>,
    ) -> Result<()> {
        while let Some(letter) = self.next().await? {
            let id = letter.id.clone();
            match retry(&mut self.stream, (store, handlers), letter).await? {
                Retried::Applied => counts.applied += 1,
                Retried::StillBad(reject) => {
                    counts.kept += 1;
                    kept(&id, &reject.to_string())?;
                }
                Retried::NotNow(why) => {
                    counts.kept += 1;
                    kept(&id, &why)?;
                }
            }
        }
        Ok(())
    }

    /// Deletes the remaining letters; `removed` is valid even if it fails midway.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn purge_all(&mut self, removed: &mut u64) -> Result<()> {
        while let Some(letter) = self.next().await? {
            *removed += u64::from(self.stream.remove_dead_letter(&letter).await?);
        }
        Ok(())
    }
}

/// The outcome of a retry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retried {
    /// Its operation is in the database; the letter is removed.
    Applied,
    /// It still cannot be applied; the letter says when and why.
    StillBad(Reject),
    /// It could not be tried.
    NotNow(String),
}

/// Applies a letter's operation in place, durably, and removes the letter; or notes why that failed.
///
/// # Errors
///
/// Redis or PostgreSQL cannot be reached, or PostgreSQL refuses for a reason unrelated to the letter.
pub async fn retry(
    stream: &mut Stream,
    (store, handlers): (&Store, Option<&Handlers>),
    letter: Letter,
) -> Result<Retried> {
    let entry = letter
        .entry()
        .with_context(|| format!("dead letter {}: source_id {}", letter.id, letter.source_id))?;
    if !letter.task.is_empty() {
        return match retry_task(handlers, entry, &letter.id).await {
            Ok(bad) => settle(stream, letter, bad).await,
            Err(why) => Ok(Retried::NotNow(why)),
        };
    }
    let epochs = stream.epochs().await?;
    let bad = match interpret(&entry, Context::now(&epochs)) {
        Err(reject) => Some(reject),
        Ok(event) if !event.rejected.is_empty() => {
            event.rejected.first().map(|rejected| rejected.reject.clone())
        }
        Ok(event) => {
            let session = store.session().await?;
            let fates = session.apply(&[&event], TransactionMode::Event).await;
            match fates.map(|mut fates| fates.pop()) {
                Ok(Some(Fate::Applied(_))) => {
                    session.flush(&[&event]).await?;
                    None
                }
                Ok(Some(Fate::Rejected(bad))) => bad.into_iter().next().map(|(_, reject)| reject),
                Ok(Some(Fate::Lost(error))) | Err(error) => {
                    session.discard();
                    return Err(error.into());
                }
                Ok(None) => bail!("the database returned no result"),
            }
        }
    };
    settle(stream, letter, bad).await
}

/// Calls the function for a task. Returns why it still fails; or why it could not be called, which says nothing about the others.
async fn retry_task(
    handlers: Option<&Handlers>,
    entry: Entry,
    letter: &str,
) -> Result<Option<Reject>, String> {
    let Some(handlers) = handlers else { return Err("it is a task, and HANDLERS is not set".to_owned()) };
    let task = match Task::of(&entry) {
        Ok(task) => task,
        Err(message) => return Ok(Some(Reject::new(Reason::Undecodable, message))),
    };
    let (handlers, delivery) = (handlers.once(), format!("dead letter {letter}"));
    // The call goes on even if the request that asked for it is cancelled.
    let call = tokio::spawn(async move { handlers.handle(&task, "dead-letters retry", &delivery).await });
    match call.await {
        Ok(Ok(Handled::Done | Handled::Before)) => Ok(None),
        Ok(Ok(Handled::Failed(_, reject) | Handled::Refused(reject))) => Ok(Some(reject)),
        Ok(Ok(Handled::Busy)) => Err("somebody is working on it: try again later".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(panic.to_string()),
    }
}

/// Removes a letter, or notes why it is still one.
async fn settle(stream: &mut Stream, letter: Letter, bad: Option<Reject>) -> Result<Retried> {
    match bad {
        None => {
            stream.remove_dead_letter(&letter).await?;
            Ok(Retried::Applied)
        }
        Some(reject) => {
            stream.update_dead_letter(letter, &reject).await?;
            Ok(Retried::StillBad(reject))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter() -> Letter {
        let path = format!("app.bsky.feed.like\u{1b}]0;x\u{7}\0\u{202e}/{}", "k".repeat(900_000));
        Letter {
            id: "1-1".to_owned(),
            source_id: "2-2".to_owned(),
            event_type: "commit".to_owned(),
            reason: "invalid_field".to_owned(),
            message: format!("path: {path}\nof 900000"),
            op: serde_json::json!({"action": "create", "path": path, "record": {"text": "Ärger"}})
                .to_string(),
            data: serde_json::json!({"repo": "did:plc:a", "rev": "3n2"}).to_string(),
            attempts: 1,
            ..Letter::default()
        }
    }

    #[test]
    fn a_displayed_letter_is_bounded_and_escaped() {
        let line = line(&letter());
        assert!(line.starts_with("1-1  invalid_field  commit app.bsky.feed.like\\u{1b}]0;x"), "{line}");
        assert!(line.ends_with("... (1 attempt)") && line.len() < 500, "{line}");
        let page = page(&letter());
        assert!(page.contains("record      at://did:plc:a/app.bsky.feed.like\\u{1b}"), "{page}");
        assert!(page.contains("\"text\": \"Ärger\"") && page.contains("\"rev\": \"3n2\""), "{page}");
        assert!(page.lines().all(|line| line.chars().count() < 3_200), "{}", page.len());
        for text in [line, page.replace('\n', "")] {
            assert!(!text.contains(|c: char| c.is_control() || c == '\u{202e}'), "{text:?}");
        }
        let many = Letter { op: format!("[{}1]", "1,".repeat(9_000)), ..letter() };
        assert!(super::page(&many).contains("more lines: use --json to see them"));
        let unreadable = Letter { op: "{".to_owned(), data: String::new(), ..letter() };
        assert!(super::page(&unreadable).ends_with("operation:\n{"));
    }

    #[test]
    fn text_is_found_in_any_field_and_any_case() {
        let has = |text: &str| Filter { text: Some(text.to_owned()), ..Filter::default() }.fits(&letter());
        for text in ["did:plc:A", "ärger", "2-2", "OF 900000", "invalid_", ""] {
            assert!(has(text), "{text}");
        }
        assert!(!has("did:plc:b"));
        let both = Filter {
            kind: Some("app.bsky.feed.post".to_owned()),
            text: Some("did:plc:a".to_owned()),
            ..Filter::default()
        };
        assert!(!both.fits(&letter()));
    }
}
