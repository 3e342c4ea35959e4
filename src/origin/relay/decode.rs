//! From a websocket message of `com.atproto.sync.subscribeRepos` to stream entries.
//!
//! A message is two CBOR values, a header and a body (<https://atproto.com/specs/event-stream>). A commit's records
//! stand in a CAR archive inside its body; they become the protocol's JSON (<https://atproto.com/specs/data-model>).

use std::collections::{BTreeMap, HashMap, HashSet};

use shrike::car::SliceReader;
use shrike::cbor::json::drisl_to_json_into;
use shrike::cbor::{Cid, Decoder, Value};

use crate::config::Collections;
use crate::event::{Reason, Reject, tid_time};
use crate::stream::append::{NewEntry, NewLetter};

/// A commit's data beyond this is split over several entries, so that entries read together fit into memory.
const SPLIT: usize = 128 * 1024;

/// Maximum CBOR items in a frame outside of its blocks; a commit of 200 operations has two thousand.
const MAX_ITEMS: usize = 20_000;
/// Operations of one commit (<https://atproto.com/specs/sync>).
const MAX_OPS: usize = 200;
/// A record's block (<https://atproto.com/specs/repository>: a megabyte, and a little for those who count otherwise).
const MAX_RECORD: usize = 1024 * 1024;
/// A commit's records, written out. The protocol's two megabytes of blocks come to a few times that, unless many operations
/// name the same block.
const MAX_EXPANDED: usize = 16 * 1024 * 1024;
/// The longest DID (<https://atproto.com/specs/did>).
const MAX_DID: usize = 2048;
/// The longest path: an NSID, a slash and a record key.
const MAX_PATH: usize = 317 + 1 + 512;
/// The longest other text: revisions, times, handles, states.
const MAX_TEXT: usize = 512;

/// A decoded message.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// Something that has a place in the sequence; `entries` is empty where nothing of it is kept.
    Event {
        /// commit, identity, account, sync or `other` for what a newer protocol may bring.
        event_type: &'static str,
        /// Its place.
        seq: i64,
        /// Entries for the stream.
        entries: Vec<NewEntry>,
        /// What of it can never be applied: records that cannot be decoded, are missing, or are not what their CID says.
        letters: Vec<NewLetter>,
        /// What is missing in the database because of that and otherwise, by class.
        missed: BTreeMap<&'static str, u64>,
        /// The commit's revision, where it is one.
        rev: String,
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
    /// An unknown type without a place in the sequence.
    Unknown,
}

/// The message breaks the protocol; the connection is to be dropped.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// No CBOR.
    #[error("the frame is not DAG-CBOR: {0}")]
    Cbor(#[from] shrike::cbor::CborError),
    /// A field is missing or has another type.
    #[error("the frame has no usable `{0}`")]
    Field(&'static str),
    /// It would take far more memory than bytes.
    #[error("the frame has more than {MAX_ITEMS} CBOR items")]
    Items,
    /// An identifier beyond what the protocol allows.
    #[error("the frame's `{0}` is longer than the protocol allows")]
    Long(&'static str),
}

type Map<'a> = Vec<(&'a str, Value<'a>)>;

/// Decodes one message, keeping the records of the collections that are wanted.
///
/// # Errors
///
/// The message breaks the framing. A bad record is not an error: only that record is lost, and it is counted.
pub fn decode(frame: &[u8], wanted: &Collections) -> Result<Message, FrameError> {
    // Before anything is built: a byte of CBOR can become a value of fifty.
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
                Some(seq) => Message::Event {
                    event_type: "other",
                    seq,
                    entries: Vec::new(),
                    letters: Vec::new(),
                    missed: BTreeMap::new(),
                    rev: String::new(),
                },
                None => Message::Unknown,
            });
        }
    };
    let seq = integer(&body, "seq").ok_or(FrameError::Field("seq"))?;
    let mut missed = BTreeMap::new();
    let mut letters = Vec::new();
    let mut rev = String::new();
    let entries = match event_type {
        "commit" => {
            text(&body, "rev").filter(|rev| tid_time(rev).is_some()).unwrap_or_default().clone_into(&mut rev);
            if matches!(get(&body, "tooBig"), Some(Value::Bool(true))) {
                *missed.entry("too_large").or_default() += 1;
            }
            commit(&body, seq, wanted, &mut letters)?
        }
        "identity" => {
            if text(&body, "handle").is_none() {
                missed.insert("no_handle", 1);
            }
            vec![NewEntry { event_type, data: identity(&body)?, seq }]
        }
        "account" => vec![NewEntry { event_type, data: account(&body)?, seq }],
        _ => {
            missed.insert("sync", 1);
            vec![NewEntry { event_type, data: sync(&body)?, seq }]
        }
    };
    for letter in &letters {
        *missed.entry(letter.reject.reason.name()).or_default() += 1;
    }
    Ok(Message::Event { event_type, seq, entries, letters, missed, rev })
}

/// Whether a frame has no more CBOR items than [`MAX_ITEMS`]. Items stand one after the other, however they are nested, so
/// that it is enough to read their heads; what is malformed is for the decoder to refuse.
fn has_few_items(mut bytes: &[u8]) -> bool {
    for _ in 0..MAX_ITEMS {
        let Some((&head, rest)) = bytes.split_first() else { return true };
        let (length, rest) = match head & 31 {
            small @ 0..24 => (u64::from(small), rest),
            size @ 24..28 => {
                let Some((argument, rest)) = rest.split_at_checked(1 << (size - 24)) else { return true };
                (argument.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)), rest)
            }
            _ => (0, rest),
        };
        // Bytes and texts: what follows is theirs.
        bytes = if matches!(head >> 5, 2 | 3) {
            let Some(rest) = usize::try_from(length).ok().and_then(|length| rest.get(length..)) else {
                return true;
            };
            rest
        } else {
            rest
        };
    }
    false
}

fn did<'a>(body: &Map<'a>, name: &'static str) -> Result<&'a str, FrameError> {
    let did = text(body, name).ok_or(FrameError::Field(name))?;
    if did.len() <= MAX_DID { Ok(did) } else { Err(FrameError::Long(name)) }
}

/// A text that is not needed: one that is too long is none.
fn short<'a>(body: &Map<'a>, name: &str) -> Option<&'a str> {
    text(body, name).filter(|text| text.len() <= MAX_TEXT)
}

fn identity(body: &Map<'_>) -> Result<String, FrameError> {
    let mut out = Object::new();
    out.text("did", did(body, "did")?);
    // The Python reader writes null where there is none.
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

struct RepoOp<'a> {
    action: &'a str,
    path: &'a str,
    cid: Option<Cid>,
}

fn commit(
    body: &Map<'_>,
    seq: i64,
    wanted: &Collections,
    letters: &mut Vec<NewLetter>,
) -> Result<Vec<NewEntry>, FrameError> {
    let repo = did(body, "repo")?;
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
        if action.len() > MAX_TEXT {
            return Err(FrameError::Long("action"));
        }
        if path.len() > MAX_PATH {
            return Err(FrameError::Long("path"));
        }
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
        tail.optional(name, short(body, name));
    }
    if let Some(Value::Cid(cid)) = get(body, "commit") {
        tail.text("commit", &cid.to_string());
    }
    let tail = tail.close();
    let mut refuse = |op: &RepoOp<'_>, reason: Reason, message: String| {
        let mut out = Object::new();
        out.text("action", op.action);
        out.text("path", op.path);
        let cid = op.cid.map(|cid| cid.to_string());
        if let Some(cid) = &cid {
            out.text("cid", cid);
        }
        letters.push(NewLetter {
            account: repo.to_owned(),
            key: format!("at://{repo}/{} {}", op.path, cid.unwrap_or_default()),
            event_type: "commit",
            seq,
            reject: Reject::new(reason, message),
            op: out.close(),
            data: format!("{{\"repo\":{},{}", quoted(repo), &tail[1..]),
        });
    };
    if kept.len() > MAX_OPS {
        for op in kept.drain(MAX_OPS..) {
            let message = format!("the commit has {} operations, and {MAX_OPS} are allowed", ops.len());
            refuse(&op, Reason::TooLarge, message);
        }
    }

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
    let mut expanded = 0;
    let finish = |mut out: Object| {
        out.json.push(b']');
        // Everything after the first brace of the tail: the same object continues.
        out.json.push(b',');
        out.json.extend_from_slice(&tail.as_bytes()[1..]);
        NewEntry { event_type: "commit", data: out.into_string(), seq }
    };
    for op in kept {
        let start = out.json.len();
        if !empty {
            out.json.push(b',');
        }
        let written = if expanded > MAX_EXPANDED {
            Err((Reason::TooLarge, format!("the commit's records are larger than {MAX_EXPANDED} bytes")))
        } else {
            write_op(&mut out.json, &op, &blocks)
        };
        match written {
            Ok(()) => {
                empty = false;
                expanded += out.json.len() - start;
            }
            Err((reason, message)) => {
                out.json.truncate(start);
                refuse(&op, reason, message);
            }
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

/// Writes an operation as the Python reader does.
fn write_op(
    json: &mut Vec<u8>,
    op: &RepoOp<'_>,
    blocks: &HashMap<Cid, &[u8]>,
) -> Result<(), (Reason, String)> {
    let mut out = Object { json: std::mem::take(json), first: true };
    out.json.push(b'{');
    out.text("action", op.action);
    out.text("path", op.path);
    let mut written = Ok(());
    if op.action != "delete" {
        match op.cid.and_then(|cid| Some((cid, blocks.get(&cid)?))) {
            Some((_, block)) if block.len() > MAX_RECORD => {
                let message = format!("the record has {} bytes, and {MAX_RECORD} are allowed", block.len());
                written = Err((Reason::TooLarge, message));
            }
            Some((cid, block)) => {
                out.text("cid", &cid.to_string());
                out.key("record");
                written = drisl_to_json_into(block, &mut out.json).map_err(|error| {
                    (Reason::Undecodable, format!("the record is not DAG-CBOR that can be read: {error}"))
                });
            }
            None if op.cid.is_none() => {
                written = Err((Reason::MissingBlock, "the operation names no CID".to_owned()));
            }
            None => {
                let message = "the commit's archive lacks the record, or its bytes are not what its CID says";
                written = Err((Reason::MissingBlock, message.to_owned()));
            }
        }
    }
    out.json.push(b'}');
    *json = out.json;
    written
}

fn quoted(text: &str) -> String {
    let mut out = Object { json: Vec::with_capacity(text.len() + 2), first: true };
    write_string(&mut out.json, text);
    out.into_string()
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
