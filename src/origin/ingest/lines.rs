//! The lines of a request: one event each, as a stream entry (`type` and `data`) or as a message of a Jetstream (`did`, `kind`);
//! or a task for one of the operator's functions (`type`, `data`, and its `id`).

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::cid::cid_of;
use crate::apply::{Context, interpret};
use crate::event::{Entry, EntryId, Epochs, MAX_ID, Task, is_did, is_function, tid_text};
use crate::time::now_ms;

/// The most events in a request.
pub const MAX_LINES: usize = 10_000;
/// The most operations in a commit, as in the protocol.
const MAX_OPS: usize = 200;
/// The most bytes in a line: a record of the protocol's greatest size fits.
const MAX_LINE: usize = 1 << 20;
/// How far ahead of the clock a time may be.
const MAX_AHEAD: Duration = Duration::from_mins(5);

/// An event or a task, ready to be appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// commit, identity or account; or [`crate::event::UNUSABLE`]; of a task, the name of its function.
    pub event_type: Cow<'static, str>,
    /// Whether it is a task.
    pub is_task: bool,
    /// The account; empty for none.
    pub did: String,
    /// JSON.
    pub data: String,
}

/// A line that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct WrongLine {
    /// Its number; the first is 1.
    pub line: usize,
    /// The problem, for a person.
    pub message: String,
}

#[derive(Deserialize)]
struct CommitData {
    repo: String,
    ops: Vec<Op>,
    #[serde(default)]
    rev: Option<String>,
    #[serde(default)]
    time: Option<String>,
}

#[derive(Deserialize)]
struct Op {
    action: String,
    path: String,
    #[serde(default)]
    cid: Option<String>,
    #[serde(default)]
    record: Option<Value>,
}

#[derive(Deserialize)]
struct JetstreamCommit {
    operation: String,
    collection: String,
    rkey: String,
    #[serde(default)]
    rev: Option<String>,
    #[serde(default)]
    record: Option<Value>,
    #[serde(default)]
    cid: Option<String>,
}

#[derive(Deserialize)]
struct IdentityData {
    did: String,
    #[serde(default)]
    handle: Option<String>,
    #[serde(default)]
    time: Option<String>,
}

#[derive(Deserialize)]
struct AccountData {
    did: String,
    active: bool,
    #[serde(default)]
    status: Option<String>,
    #[serde(default)]
    time: Option<String>,
}

/// Whether lines may be tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tasks<'a> {
    /// There are no functions for them.
    Refused,
    /// They may.
    Taken,
    /// They may. One without an id has this one; after the first line, with the number of the line.
    Named(&'a str),
}

impl Tasks<'_> {
    /// The id of a task that has none, on a line with this index.
    fn id(self, index: usize) -> Option<String> {
        match self {
            Self::Named(name) if !is_id(name) => None,
            Self::Named(name) if index == 0 => Some(name.to_owned()),
            Self::Named(name) => Some(format!("{name}/{index}")),
            Self::Refused | Self::Taken => None,
        }
    }
}

/// Reads all lines; empty ones are left out.
///
/// # Errors
///
/// The first one that cannot be used: nothing is to be appended then.
pub fn read(body: &[u8], tasks: Tasks<'_>) -> Result<Vec<Line>, WrongLine> {
    let mut lines = Vec::new();
    for (index, text) in body.split(|byte| *byte == b'\n').enumerate() {
        let wrong = |message: String| WrongLine { line: index + 1, message };
        if text.trim_ascii().is_empty() {
            continue;
        }
        if lines.len() == MAX_LINES {
            return Err(wrong(format!("a request has at most {MAX_LINES} events")));
        }
        lines.push(read_line(text, tasks, index).map_err(wrong)?);
    }
    if lines.is_empty() {
        return Err(WrongLine { line: 1, message: "the request contains no event".to_owned() });
    }
    Ok(lines)
}

fn read_line(text: &[u8], tasks: Tasks<'_>, index: usize) -> Result<Line, String> {
    if text.len() > MAX_LINE {
        return Err(format!("an event has at most {} MiB", MAX_LINE >> 20));
    }
    let value: Value = serde_json::from_slice(text).map_err(|error| format!("this is not JSON: {error}"))?;
    let Value::Object(mut fields) = value else { return Err("this is not a JSON object".to_owned()) };
    let line = match (fields.remove("type"), fields.remove("data"), fields.remove("kind")) {
        (Some(Value::String(name)), Some(data), _) if tasks != Tasks::Refused && is_function(&name) => {
            let id = task_id(fields.remove("id"))?.or_else(|| tasks.id(index));
            return task(name, id.as_deref(), &data, text);
        }
        (Some(Value::String(event_type)), Some(data), _) => entry(&event_type, data, tasks)?,
        (None, None, Some(Value::String(kind))) => jetstream(&kind, fields)?,
        _ => {
            return Err("an event has `type` and `data`, or `did`, `kind` and the object that `kind` names"
                .to_owned());
        }
    };
    check(&line)?;
    Ok(line)
}

/// `text` is the whole line: what JSON can say in several ways, such as a long number, reaches the function as it was sent.
fn task(name: String, id: Option<&str>, data: &Value, text: &[u8]) -> Result<Line, String> {
    #[derive(Deserialize)]
    struct Sent<'a> {
        #[serde(borrow)]
        data: &'a RawValue,
    }
    if has_nul(data) {
        return Err("`data` contains U+0000, which PostgreSQL's jsonb cannot hold".to_owned());
    }
    let sent: Sent<'_> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let data = Task::message(id, sent.data.get());
    Ok(Line { event_type: name.into(), is_task: true, did: String::new(), data })
}

fn task_id(id: Option<Value>) -> Result<Option<String>, String> {
    match id {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) if !number.is_f64() => Ok(Some(number.to_string())),
        Some(Value::String(id)) if is_id(&id) => Ok(Some(id)),
        Some(_) => Err(format!("`id` is neither a whole number nor a text of 1 to {MAX_ID} bytes")),
    }
}

fn is_id(id: &str) -> bool {
    (1..=MAX_ID).contains(&id.len()) && !id.contains(|c: char| c.is_control())
}

fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(has_nul),
        Value::Object(fields) => fields.iter().any(|(name, value)| name.contains('\0') || has_nul(value)),
        _ => false,
    }
}

fn fields<T: for<'de> Deserialize<'de>>(name: &str, value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|error| format!("`{name}`: {error}"))
}

fn entry(event_type: &str, data: Value, tasks: Tasks<'_>) -> Result<Line, String> {
    match event_type {
        "commit" => commit(fields("data", data)?),
        "identity" => identity(fields("data", data)?),
        "account" => account(fields("data", data)?),
        other if tasks != Tasks::Refused => Err(format!(
            "the type {other:.50} is not commit, identity, account, or the name of a function for tasks"
        )),
        other => {
            Err(format!("the type {other:.50} is not commit, identity or account (for tasks, set HANDLERS)"))
        }
    }
}

fn jetstream(kind: &str, mut rest: Map<String, Value>) -> Result<Line, String> {
    let did = rest.remove("did").unwrap_or_default();
    let inner = rest.remove(kind).ok_or_else(|| format!("there is no `{kind:.50}`"))?;
    match kind {
        "commit" => {
            let commit_of: JetstreamCommit = fields(kind, inner)?;
            let JetstreamCommit { operation, collection, rkey, rev, record, cid } = commit_of;
            let op = Op { action: operation, path: format!("{collection}/{rkey}"), cid, record };
            let repo = did.as_str().unwrap_or_default().to_owned();
            commit(CommitData { repo, ops: vec![op], rev, time: None })
        }
        "identity" | "account" => {
            let Value::Object(mut inner) = inner else { return Err(format!("`{kind}` is not an object")) };
            inner.insert("did".to_owned(), did);
            entry(kind, Value::Object(inner), Tasks::Refused)
        }
        other => Err(format!("the kind {other:.50} is not commit, identity or account")),
    }
}

fn commit(commit: CommitData) -> Result<Line, String> {
    let CommitData { repo, ops, rev, time } = commit;
    if ops.is_empty() || ops.len() > MAX_OPS {
        return Err(format!("a commit has at least one operation in `ops`, and at most {MAX_OPS}"));
    }
    let mut written = Vec::with_capacity(ops.len());
    for Op { action, path, cid, record } in ops {
        let cid = match (cid, &record) {
            (Some(cid), _) => Some(cid),
            (None, Some(record)) => Some(cid_of(record).map_err(|error| format!("{path}: {error}"))?),
            (None, None) => None,
        };
        let mut op = json!({ "action": action, "path": path, "cid": cid });
        if let Some(record) = record {
            op["record"] = record;
        }
        written.push(op);
    }
    let rev = rev.filter(|rev| !rev.is_empty()).unwrap_or_else(new_rev);
    let time = time_of(time)?;
    let data = json!({ "repo": repo, "ops": written, "rev": rev, "time": time }).to_string();
    Ok(Line { event_type: "commit".into(), is_task: false, did: repo, data })
}

fn identity(IdentityData { did, handle, time }: IdentityData) -> Result<Line, String> {
    let time = time_of(time)?;
    let data = json!({ "did": did, "handle": handle, "time": time }).to_string();
    Ok(Line { event_type: "identity".into(), is_task: false, did, data })
}

fn account(AccountData { did, active, status, time }: AccountData) -> Result<Line, String> {
    let time = time_of(time)?;
    let mut data = json!({ "did": did, "active": active, "time": time });
    if let Some(status) = status {
        data["status"] = status.into();
    }
    Ok(Line { event_type: "account".into(), is_task: false, did, data: data.to_string() })
}

/// The time that is given, or the present. One in the future would win over everything until then.
fn time_of(given: Option<String>) -> Result<String, String> {
    let now = jiff::Timestamp::now();
    let Some(text) = given else { return Ok(now.to_string()) };
    let time: jiff::Timestamp =
        text.parse().map_err(|_| format!("`time` is not a time such as 2026-01-01T12:00:00Z: {text:.50}"))?;
    if now.checked_add(MAX_AHEAD).is_ok_and(|latest| time > latest) {
        return Err(format!("`time` is more than five minutes ahead of the clock: {text:.50}"));
    }
    Ok(text)
}

/// What could never be applied is refused at once.
fn check(line: &Line) -> Result<(), String> {
    if !is_did(&line.did) {
        return Err(format!("{:.100} is not a DID", line.did));
    }
    let entry = Entry {
        id: EntryId { ms: now_ms(), seq: 0 },
        event_type: line.event_type.clone().into_owned(),
        data: line.data.clone(),
        seq: String::new(),
    };
    let event = interpret(&entry, Context::now(&Epochs::UNNAMED)).map_err(|reject| reject.message)?;
    if let Some(rejected) = event.rejected.first() {
        return Err(rejected.reject.message.clone());
    }
    if event.ops.is_empty() {
        return Err("this event changes nothing: its handle is missing or invalid".to_owned());
    }
    Ok(())
}

/// A revision (<https://atproto.com/specs/tid>) that is newer than all before it in this process.
fn new_rev() -> String {
    static LAST: AtomicU64 = AtomicU64::new(0);
    static CLOCK: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| fastrand::u64(..1024));
    let now = u64::try_from(jiff::Timestamp::now().as_microsecond()).unwrap_or(0);
    let next = |last: u64| now.max(last + 1);
    let last = LAST.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |last| Some(next(last)));
    tid_text(next(last.unwrap_or_default()) << 10 | *CLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DID: &str = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa";

    fn one(line: &str) -> Result<Value, String> {
        let lines = read(line.as_bytes(), Tasks::Refused).map_err(|error| error.to_string())?;
        Ok(serde_json::from_str(&lines[0].data).unwrap())
    }

    #[test]
    fn both_forms_give_the_same_entry_and_what_is_missing_is_added() {
        let record = r#"{"$type":"app.bsky.graph.follow","subject":"did:plc:b","createdAt":"2026-11-21T04:17:51.287Z"}"#;
        let entry = format!(
            r#"{{"type":"commit","data":{{"repo":"{DID}","ops":[{{"action":"create","path":"app.bsky.graph.follow/a","record":{record}}}]}}}}"#
        );
        let jetstream = format!(
            r#"{{"did":"{DID}","time_us":1,"kind":"commit","commit":{{"operation":"create","collection":"app.bsky.graph.follow","rkey":"a","record":{record}}}}}"#
        );
        let (entry, jetstream) = (one(&entry).unwrap(), one(&jetstream).unwrap());
        assert_eq!(entry["ops"], jetstream["ops"]);
        assert!(entry["ops"][0]["cid"].as_str().unwrap().starts_with("bafyrei"));
        let rev = |data: &Value| data["rev"].as_str().unwrap().to_owned();
        assert!(rev(&entry) < rev(&jetstream), "revisions grow");
        let status =
            format!(r#"{{"type":"account","data":{{"did":"{DID}","active":false,"status":"deactivated"}}}}"#);
        assert_eq!(one(&status).unwrap()["status"], "deactivated");
        let handle =
            format!(r#"{{"did":"{DID}","kind":"identity","identity":{{"handle":"a.test","seq":9}}}}"#);
        assert_eq!(one(&handle).unwrap()["handle"], "a.test");
    }

    #[test]
    fn the_first_wrong_line_is_named() {
        let good = format!(r#"{{"type":"identity","data":{{"did":"{DID}","handle":"a.test"}}}}"#);
        for (wrong, says) in [
            ("{", "not JSON"),
            ("[1]", "not a JSON object"),
            ("{}", "an event has"),
            (r#"{"type":"sync","data":{}}"#, "sync is not commit"),
            (r#"{"type":"identity","data":{"did":"alice"}}"#, "alice is not a DID"),
            (r#"{"kind":"commit","did":"did:plc:a"}"#, "there is no `commit`"),
            (
                r#"{"type":"commit","data":{"repo":"did:plc:a","ops":[{"action":"create","path":"app.bsky.feed.post/a","record":{"n":0.5}}]}}"#,
                "0.5 is not a whole number",
            ),
            (
                r#"{"type":"commit","data":{"repo":"did:plc:a","ops":[{"action":"create","path":"app.bsky.feed.like/a","record":{}}]}}"#,
                "subject",
            ),
            (r#"{"type":"commit","data":{"repo":"did:plc:a","ops":[]}}"#, "at least one operation"),
            (
                r#"{"type":"identity","data":{"did":"did:plc:a","handle":"alice"}}"#,
                "its handle is missing or invalid",
            ),
            (
                r#"{"type":"account","data":{"did":"did:plc:a","active":false,"status":"deleted","time":"9999-01-01T00:00:00Z"}}"#,
                "ahead of the clock",
            ),
            (r#"{"type":"account","data":{"did":"did:plc:a","active":false,"time":"soon"}}"#, "not a time"),
            (&format!(r#"{{"type":"commit","data":"{}"}}"#, "x".repeat(MAX_LINE)), "at most 1 MiB"),
        ] {
            let error = read(format!("{good}\n\n{wrong}\n{good}").as_bytes(), Tasks::Refused).unwrap_err();
            assert_eq!(error.line, 3, "{wrong}");
            assert!(error.message.contains(says), "{error}");
        }
        assert!(read(b"\n", Tasks::Refused).is_err());
    }

    #[test]
    fn other_types_are_tasks_where_there_are_functions_for_them() {
        let read_one = |line: &str| read(line.as_bytes(), Tasks::Taken).map(|mut lines| lines.remove(0));
        let line = read_one(r#"{"type":"resize","id":7,"data":{"width":3}}"#).unwrap();
        assert!(line.is_task);
        assert_eq!(line.data, r#"{"id":"7","data":{"width":3}}"#);
        assert_eq!(read_one(r#"{"type":"resize","data":null}"#).unwrap().data, r#"{"data":null}"#);
        for (wrong, says) in [
            (r#"{"type":"resize"}"#, "an event has"),
            (r#"{"type":"resize","id":0.5,"data":1}"#, "neither a whole number"),
            (r#"{"type":"resize","id":"","data":1}"#, "1 to 256 bytes"),
            (r#"{"type":"resize","data":["\u0000"]}"#, "U+0000"),
            (r#"{"type":"Resize","data":1}"#, "the name of a function"),
            (r#"{"type":"sync","data":1}"#, "the name of a function"),
        ] {
            let error = read_one(wrong).unwrap_err();
            assert!(error.message.contains(says), "{error}");
        }
        let error = read(br#"{"type":"resize","data":1}"#, Tasks::Refused).unwrap_err();
        assert!(error.message.contains("set HANDLERS"), "{error}");
        let two = "{\"type\":\"a\",\"data\":1}\n{\"type\":\"a\",\"data\":2}\n{\"type\":\"a\",\"id\":\"c\",\"data\":3}";
        let lines = read(two.as_bytes(), Tasks::Named("m")).unwrap();
        let data: Vec<&str> = lines.iter().map(|line| line.data.as_str()).collect();
        assert_eq!(data, [r#"{"id":"m","data":1}"#, r#"{"id":"m/1","data":2}"#, r#"{"id":"c","data":3}"#]);
    }

    #[test]
    fn lines_may_end_in_two_ways() {
        let good = format!(r#"{{"type":"identity","data":{{"did":"{DID}","handle":"a.test"}}}}"#);
        assert_eq!(read(format!("{good}\r\n{good}").as_bytes(), Tasks::Refused).unwrap().len(), 2);
    }
}
