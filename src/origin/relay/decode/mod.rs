//! From a websocket message of `com.atproto.sync.subscribeRepos` to stream entries.
//!
//! A message is two CBOR values, a header and a body (<https://atproto.com/specs/event-stream>). A commit's records
//! are in a CAR archive inside its body; they become the protocol's JSON (<https://atproto.com/specs/data-model>).

mod claim;
mod commit;
mod field;
mod json;

use std::collections::BTreeMap;

use shrike::cbor::{Decoder, Value};

pub use self::claim::{Claimed, claim};
use self::commit::commit;
pub use self::commit::{RepoOp, entries_of};
use self::field::{MAX_ITEMS, Map, did, get, has_few_items, integer, short, text};
use self::json::Object;
use crate::config::Collections;
use crate::event::tid_time;
use crate::stream::append::{NewEntry, NewLetter};

/// A decoded message.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// An event with a place in the sequence; `entries` is empty if none of it is kept.
    Event {
        /// commit, identity, account, sync, or `other` for types of a newer protocol.
        event_type: &'static str,
        /// Its sequence number.
        seq: i64,
        /// The account; empty for types of a newer protocol.
        did: String,
        /// Entries for the stream.
        entries: Vec<NewEntry>,
        /// What of it can never be applied: records that cannot be decoded, are missing, or are not what their CID says.
        letters: Vec<NewLetter>,
        /// What is missing in the database because of that and otherwise, by class.
        missed: BTreeMap<&'static str, u64>,
        /// The revision, if it is a commit.
        rev: String,
    },
    /// The relay reports something about the connection.
    Info {
        /// For example `OutdatedCursor`.
        name: String,
        /// For people.
        message: String,
    },
    /// The relay ends the connection.
    Error {
        /// For example `FutureCursor` or `ConsumerTooSlow`.
        error: String,
        /// For people.
        message: String,
    },
    /// An unknown type without a sequence number.
    Unknown,
}

/// The message violates the protocol; the connection must be dropped.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// It is not CBOR.
    #[error("the frame is not DAG-CBOR: {0}")]
    Cbor(#[from] shrike::cbor::CborError),
    /// A field is missing or has another type.
    #[error("the frame has no usable `{0}`")]
    Field(&'static str),
    /// Decoded, it would take far more memory than its bytes.
    #[error("the frame has more than {MAX_ITEMS} CBOR items")]
    Items,
    /// An identifier longer than the protocol allows.
    #[error("the frame's `{0}` is longer than the protocol allows")]
    Long(&'static str),
}

/// Decodes one message, keeping the records of wanted collections.
///
/// # Errors
///
/// The message breaks the framing. A bad record is not an error: only that record is lost, and it is counted.
pub fn decode(frame: &[u8], wanted: &Collections) -> Result<Message, FrameError> {
    // Checked before decoding: a byte of CBOR can become a value of fifty bytes.
    if !has_few_items(frame) {
        return Err(FrameError::Items);
    }
    let mut decoder = Decoder::new(frame);
    let Value::Map(header) = decoder.decode()? else {
        return Err(FrameError::Field("header"));
    };
    let Value::Map(body) = decoder.decode()? else {
        return Err(FrameError::Field("body"));
    };
    if integer(&header, "op") == Some(-1) {
        return Ok(Message::Error {
            error: text(&body, "error").unwrap_or("unknown").to_owned(),
            message: text(&body, "message").unwrap_or_default().to_owned(),
        });
    }
    match text(&header, "t") {
        Some("#commit") => event("commit", &body, wanted),
        Some("#identity") => event("identity", &body, wanted),
        Some("#account") => event("account", &body, wanted),
        Some("#sync") => event("sync", &body, wanted),
        Some("#info") => Ok(Message::Info {
            name: text(&body, "name").unwrap_or_default().to_owned(),
            message: text(&body, "message").unwrap_or_default().to_owned(),
        }),
        // Unknown types and operations must be ignored, but may have a sequence number.
        _ => Ok(integer(&body, "seq").map_or(Message::Unknown, |seq| Message::Event {
            event_type: "other",
            seq,
            did: String::new(),
            entries: Vec::new(),
            letters: Vec::new(),
            missed: BTreeMap::new(),
            rev: String::new(),
        })),
    }
}

fn event(event_type: &'static str, body: &Map<'_>, wanted: &Collections) -> Result<Message, FrameError> {
    let seq = integer(body, "seq").ok_or(FrameError::Field("seq"))?;
    let mut missed = BTreeMap::new();
    let mut letters = Vec::new();
    let mut rev = String::new();
    let did = did(body, if event_type == "commit" { "repo" } else { "did" })?.to_owned();
    let one = |data| vec![NewEntry { event_type, data, seq }];
    let entries = match event_type {
        "commit" => {
            text(body, "rev").filter(|rev| tid_time(rev).is_some()).unwrap_or_default().clone_into(&mut rev);
            if matches!(get(body, "tooBig"), Some(Value::Bool(true))) {
                missed.insert("too_large", 1);
            }
            commit(body, seq, wanted, &mut letters)?
        }
        "identity" => {
            if text(body, "handle").is_none() {
                missed.insert("no_handle", 1);
            }
            one(identity(body)?)
        }
        "account" => one(account(body)?),
        _ => {
            missed.insert("sync", 1);
            one(sync(body)?)
        }
    };
    for letter in &letters {
        *missed.entry(letter.reject.reason.name()).or_default() += 1;
    }
    Ok(Message::Event { event_type, seq, did, entries, letters, missed, rev })
}

fn identity(body: &Map<'_>) -> Result<String, FrameError> {
    let mut out = Object::new();
    out.text("did", did(body, "did")?);
    // The Python reader writes null for an absent one.
    out.optional("handle", short(body, "handle"));
    if let Some(time) = short(body, "time") {
        out.text("time", time);
    }
    Ok(out.close())
}

fn account(body: &Map<'_>) -> Result<String, FrameError> {
    let mut out = Object::new();
    out.text("did", did(body, "did")?);
    let Some(Value::Bool(active)) = get(body, "active") else {
        return Err(FrameError::Field("active"));
    };
    out.raw("active", if *active { "true" } else { "false" });
    for name in ["status", "time"] {
        if let Some(value) = short(body, name) {
            out.text(name, value);
        }
    }
    Ok(out.close())
}

fn sync(body: &Map<'_>) -> Result<String, FrameError> {
    let mut out = Object::new();
    out.text("did", did(body, "did")?);
    for name in ["rev", "time"] {
        if let Some(value) = short(body, name) {
            out.text(name, value);
        }
    }
    Ok(out.close())
}
