//! From a websocket message of `com.atproto.sync.subscribeRepos` to stream entries.
//!
//! A message is two CBOR values, a header and a body (<https://atproto.com/specs/event-stream>). A commit's records
//! stand in a CAR archive inside its body; they become the protocol's JSON (<https://atproto.com/specs/data-model>).

use std::collections::{HashMap, HashSet};

use shrike::car::SliceReader;
use shrike::cbor::json::drisl_to_json_into;
use shrike::cbor::{Cid, Decoder, Value};

use crate::config::Collections;
use crate::stream::append::NewEntry;

/// A commit's data beyond this is split over several entries, so that entries read together fit into memory.
const SPLIT: usize = 128 * 1024;

/// What a message says.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// Something that has a place in the sequence; `entries` is empty where nothing of it is kept.
    Event {
        /// commit, identity, account, sync or `other` for what a newer protocol may bring.
        event_type: &'static str,
        /// Its place.
        seq: i64,
        /// What goes into the stream.
        entries: Vec<NewEntry>,
        /// Records that could not be decoded, were missing, or were not what their CID says.
        bad_records: u32,
    },
    /// The relay says something about the connection.
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
    /// A type without a place in the sequence that nobody here knows.
    Unknown,
}

/// The message is not what the protocol says; the connection is to be dropped.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// No CBOR.
    #[error("the frame is no DAG-CBOR: {0}")]
    Cbor(#[from] shrike::cbor::CborError),
    /// A field is missing or has another type.
    #[error("the frame has no usable `{0}`")]
    Field(&'static str),
}

type Map<'a> = Vec<(&'a str, Value<'a>)>;

/// Decodes one message, keeping the records of the collections that are wanted.
///
/// # Errors
///
/// The message breaks the framing. A bad record is no error: it loses only itself and is counted.
pub fn decode(frame: &[u8], wanted: &Collections) -> Result<Message, FrameError> {
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
    let event_type = match text(&header, "t") {
        Some("#commit") => "commit",
        Some("#identity") => "identity",
        Some("#account") => "account",
        Some("#sync") => "sync",
        Some("#info") => {
            return Ok(Message::Info {
                name: text(&body, "name").unwrap_or_default().to_owned(),
                message: text(&body, "message").unwrap_or_default().to_owned(),
            });
        }
        // Unknown types and operations are to be ignored; a place in the sequence they may have.
        _ => {
            return Ok(match integer(&body, "seq") {
                Some(seq) => Message::Event { event_type: "other", seq, entries: Vec::new(), bad_records: 0 },
                None => Message::Unknown,
            });
        }
    };
    let seq = integer(&body, "seq").ok_or(FrameError::Field("seq"))?;
    let mut bad_records = 0;
    let entries = match event_type {
        "commit" => commit(&body, seq, wanted, &mut bad_records)?,
        "identity" => vec![NewEntry { event_type, data: identity(&body)?, seq }],
        "account" => vec![NewEntry { event_type, data: account(&body)?, seq }],
        _ => vec![NewEntry { event_type, data: sync(&body)?, seq }],
    };
    Ok(Message::Event { event_type, seq, entries, bad_records })
}

fn identity(body: &Map<'_>) -> Result<String, FrameError> {
    let mut out = Object::new();
    out.text("did", text(body, "did").ok_or(FrameError::Field("did"))?);
    // The Python reader writes null where there is none.
    out.optional("handle", text(body, "handle"));
    if let Some(time) = text(body, "time") {
        out.text("time", time);
    }
    Ok(out.close())
}

fn account(body: &Map<'_>) -> Result<String, FrameError> {
    let mut out = Object::new();
    out.text("did", text(body, "did").ok_or(FrameError::Field("did"))?);
    let Some(Value::Bool(active)) = get(body, "active") else {
        return Err(FrameError::Field("active"));
    };
    out.raw("active", if *active { "true" } else { "false" });
    for name in ["status", "time"] {
        if let Some(value) = text(body, name) {
            out.text(name, value);
        }
    }
    Ok(out.close())
}

fn sync(body: &Map<'_>) -> Result<String, FrameError> {
    let mut out = Object::new();
    out.text("did", text(body, "did").ok_or(FrameError::Field("did"))?);
    for name in ["rev", "time"] {
        if let Some(value) = text(body, name) {
            out.text(name, value);
        }
    }
    Ok(out.close())
}

struct RepoOp<'a> {
    action: &'a str,
    path: &'a str,
    cid: Option<Cid>,
}

fn commit(
    body: &Map<'_>,
    seq: i64,
    wanted: &Collections,
    bad_records: &mut u32,
) -> Result<Vec<NewEntry>, FrameError> {
    let repo = text(body, "repo").ok_or(FrameError::Field("repo"))?;
    let Some(Value::Array(ops)) = get(body, "ops") else {
        return Err(FrameError::Field("ops"));
    };
    let mut kept = Vec::with_capacity(ops.len());
    for op in ops {
        let Value::Map(op) = op else {
            return Err(FrameError::Field("ops"));
        };
        let (Some(action), Some(path)) = (text(op, "action"), text(op, "path")) else {
            return Err(FrameError::Field("ops"));
        };
        if path.split_once('/').is_some_and(|(collection, _)| wanted.keeps(collection)) {
            let cid = match get(op, "cid") {
                Some(Value::Cid(cid)) => Some(*cid),
                _ => None,
            };
            kept.push(RepoOp { action, path, cid });
        }
    }
    if kept.is_empty() {
        return Ok(Vec::new());
    }
    if kept.len() > 1 {
        // The last operation on a path wins. Said here, because a split would tear the two apart.
        let mut seen = HashSet::with_capacity(kept.len());
        kept.reverse();
        kept.retain(|op| seen.insert(op.path));
        kept.reverse();
    }
    let blocks = match get(body, "blocks") {
        Some(Value::Bytes(car)) => blocks(car),
        _ => HashMap::new(),
    };

    // What every entry of this commit ends with.
    let mut tail = Object::new();
    for name in ["rev", "since", "time"] {
        tail.optional(name, text(body, name));
    }
    if let Some(Value::Cid(cid)) = get(body, "commit") {
        tail.text("commit", &cid.to_string());
    }
    let tail = tail.close();

    let mut entries = Vec::with_capacity(1);
    let head = || {
        let mut out = Object::new();
        out.text("repo", repo);
        out.key("ops");
        out.json.push(b'[');
        out
    };
    let mut out = head();
    let mut empty = true;
    let finish = |mut out: Object| {
        out.json.push(b']');
        // Everything after the first brace of the tail: the same object goes on.
        out.json.push(b',');
        out.json.extend_from_slice(&tail.as_bytes()[1..]);
        NewEntry { event_type: "commit", data: out.into_string(), seq }
    };
    for op in kept {
        let start = out.json.len();
        if !empty {
            out.json.push(b',');
        }
        if write_op(&mut out.json, &op, &blocks) {
            empty = false;
        } else {
            out.json.truncate(start);
            *bad_records += 1;
        }
        if out.json.len() > SPLIT {
            entries.push(finish(std::mem::replace(&mut out, head())));
            empty = true;
        }
    }
    if !empty {
        entries.push(finish(out));
    }
    Ok(entries)
}

/// The blocks of an archive whose bytes are what their CIDs say. Of an archive that breaks off, what came before.
fn blocks(car: &[u8]) -> HashMap<Cid, &[u8]> {
    let Ok(reader) = SliceReader::new(car) else {
        return HashMap::new();
    };
    reader
        .map_while(Result::ok)
        .filter(|block| Cid::compute(block.cid.codec(), block.data) == block.cid)
        .map(|block| (block.cid, block.data))
        .collect()
}

/// Writes an operation as the Python reader does; `false` when its record cannot be had.
fn write_op(json: &mut Vec<u8>, op: &RepoOp<'_>, blocks: &HashMap<Cid, &[u8]>) -> bool {
    let mut out = Object { json: std::mem::take(json), first: true };
    out.json.push(b'{');
    out.text("action", op.action);
    out.text("path", op.path);
    let mut good = true;
    if op.action != "delete" {
        match op.cid.and_then(|cid| Some((cid, blocks.get(&cid)?))) {
            Some((cid, block)) => {
                out.text("cid", &cid.to_string());
                out.key("record");
                good = drisl_to_json_into(block, &mut out.json).is_ok();
            }
            None => good = false,
        }
    }
    out.json.push(b'}');
    *json = out.json;
    good
}

fn get<'m, 'a>(map: &'m Map<'a>, key: &str) -> Option<&'m Value<'a>> {
    map.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
}

fn text<'a>(map: &Map<'a>, key: &str) -> Option<&'a str> {
    match get(map, key) {
        Some(Value::Text(text)) => Some(text),
        _ => None,
    }
}

fn integer(map: &Map<'_>, key: &str) -> Option<i64> {
    match get(map, key) {
        Some(Value::Unsigned(number)) => i64::try_from(*number).ok(),
        Some(Value::Signed(number)) => Some(*number),
        _ => None,
    }
}

/// A JSON object being written.
struct Object {
    json: Vec<u8>,
    first: bool,
}

impl Object {
    fn new() -> Self {
        Self { json: b"{".to_vec(), first: true }
    }

    fn key(&mut self, name: &str) {
        if !std::mem::take(&mut self.first) {
            self.json.push(b',');
        }
        write_string(&mut self.json, name);
        self.json.push(b':');
    }

    fn raw(&mut self, name: &str, json: &str) {
        self.key(name);
        self.json.extend_from_slice(json.as_bytes());
    }

    fn text(&mut self, name: &str, value: &str) {
        self.key(name);
        write_string(&mut self.json, value);
    }

    fn optional(&mut self, name: &str, value: Option<&str>) {
        match value {
            Some(value) => self.text(name, value),
            None => self.raw(name, "null"),
        }
    }

    fn close(mut self) -> String {
        self.json.push(b'}');
        self.into_string()
    }

    fn into_string(self) -> String {
        // Only whole strings and JSON were written, so that nothing is ever replaced here.
        String::from_utf8(self.json)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
    }
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut plain = 0;
    for (at, byte) in text.bytes().enumerate() {
        let escape = match byte {
            b'"' => "\\\"",
            b'\\' => "\\\\",
            0..0x20 => "",
            _ => continue,
        };
        out.extend_from_slice(&text.as_bytes()[plain..at]);
        if escape.is_empty() {
            out.extend_from_slice(format!("\\u{byte:04x}").as_bytes());
        } else {
            out.extend_from_slice(escape.as_bytes());
        }
        plain = at + 1;
    }
    out.extend_from_slice(&text.as_bytes()[plain..]);
    out.push(b'"');
}
