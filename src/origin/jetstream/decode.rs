//! From a Jetstream's message to a stream entry. Its records are in the protocol's JSON form already, and pass as they are.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::config::Collections;
use crate::event::{is_did, tid_time};
use crate::stream::append::NewEntry;

/// A message, read.
#[derive(Debug, PartialEq, Eq)]
pub struct Message {
    /// commit, identity, account, or `other` for types of a newer version.
    pub kind: &'static str,
    /// Its time, in microseconds since 1970.
    pub position: i64,
    /// The account.
    pub did: String,
    /// The entry; none if it is not kept.
    pub entries: Vec<NewEntry>,
    /// Whether it is an identity event that does not say the handle.
    pub no_handle: bool,
    /// The revision, if it is a commit.
    pub rev: String,
}

#[derive(Deserialize)]
struct Event<'a> {
    did: String,
    time_us: i64,
    #[serde(default)]
    kind: String,
    #[serde(borrow)]
    commit: Option<Commit<'a>>,
    #[serde(borrow)]
    identity: Option<&'a RawValue>,
    #[serde(borrow)]
    account: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Commit<'a> {
    rev: String,
    operation: String,
    collection: String,
    rkey: String,
    #[serde(borrow)]
    record: Option<&'a RawValue>,
    cid: Option<String>,
}

#[derive(Deserialize)]
struct Identity {
    handle: Option<String>,
    time: Option<String>,
}

#[derive(Deserialize)]
struct Account {
    active: bool,
    status: Option<String>,
    time: Option<String>,
}

/// Reads a message, and keeps it if its collection is wanted.
///
/// # Errors
///
/// What is wrong with it, in words.
pub fn decode(text: &str, wanted: &Collections) -> Result<Message, String> {
    let event: Event<'_> =
        serde_json::from_str(text).map_err(|error| format!("{:.200}", error.to_string()))?;
    if !is_did(&event.did) {
        return Err("its `did` is not a DID".to_owned());
    }
    if event.time_us <= 0 {
        return Err(format!("its `time_us` is {}", event.time_us));
    }
    let mut no_handle = false;
    let (kind, data, rev) = match event.kind.as_str() {
        "commit" => {
            let commit = event.commit.ok_or("it has no `commit`")?;
            let rev = commit.rev.clone();
            let data =
                wanted.keeps(&commit.collection).then(|| commit_data(&event.did, event.time_us, &commit));
            ("commit", data.transpose()?, rev)
        }
        "identity" => {
            let (data, has_handle) = identity_data(&event.did, event.identity)?;
            no_handle = !has_handle;
            ("identity", Some(data), String::new())
        }
        "account" => ("account", Some(account_data(&event.did, event.account)?), String::new()),
        _ => ("other", None, String::new()),
    };
    let seq = event.time_us;
    let entries = data.map(|data| NewEntry { event_type: kind, data, seq }).into_iter().collect();
    let rev = if tid_time(&rev).is_some() { rev } else { String::new() };
    Ok(Message { kind, position: seq, did: event.did, entries, no_handle, rev })
}

fn commit_data(did: &str, time_us: i64, commit: &Commit<'_>) -> Result<String, String> {
    if !matches!(commit.operation.as_str(), "create" | "update" | "delete") {
        return Err(format!("its operation is {:.20}", commit.operation));
    }
    let time = jiff::Timestamp::from_microsecond(time_us).map_err(|error| error.to_string())?;
    let path = format!("{}/{}", commit.collection, commit.rkey);
    let quoted = |text: &str| serde_json::to_string(text).map_err(|error| error.to_string());
    let record = match commit.record {
        Some(record) => format!(",\"record\":{record}"),
        None => String::new(),
    };
    let cid = match &commit.cid {
        Some(cid) => quoted(cid)?,
        None => "null".to_owned(),
    };
    Ok(format!(
        "{{\"repo\":{},\"ops\":[{{\"action\":{},\"path\":{},\"cid\":{cid}{record}}}],\"rev\":{},\"time\":{}}}",
        quoted(did)?,
        quoted(&commit.operation)?,
        quoted(&path)?,
        quoted(&commit.rev)?,
        quoted(&time.to_string())?,
    ))
}

/// Also returns whether it says the handle.
fn identity_data(did: &str, identity: Option<&RawValue>) -> Result<(String, bool), String> {
    let Identity { handle, time } = inner(identity, "identity")?;
    let data = serde_json::json!({ "did": did, "handle": handle, "time": time }).to_string();
    Ok((data, handle.is_some()))
}

fn account_data(did: &str, account: Option<&RawValue>) -> Result<String, String> {
    let Account { active, status, time } = inner(account, "account")?;
    let mut data = serde_json::json!({ "did": did, "active": active });
    for (name, value) in [("status", status), ("time", time)] {
        if let Some(value) = value {
            data[name] = value.into();
        }
    }
    Ok(data.to_string())
}

fn inner<'a, T: Deserialize<'a>>(value: Option<&'a RawValue>, name: &str) -> Result<T, String> {
    let value = value.ok_or_else(|| format!("it has no `{name}`"))?;
    serde_json::from_str(value.get()).map_err(|error| format!("`{name}`: {error}"))
}
