//! A commit's operations with their records.

use std::collections::{HashMap, HashSet};

use shrike::car::SliceReader;
use shrike::cbor::json::drisl_to_json_into;
use shrike::cbor::{Cid, Value};

use super::FrameError;
use super::field::{MAX_TEXT, Map, did, get, short, text};
use super::json::{Object, quoted};
use crate::config::Collections;
use crate::event::{Reason, Reject};
use crate::stream::append::{NewEntry, NewLetter};
use crate::verify::Archive;

/// Commit data beyond this size is split over several entries, so that a batch of entries fits into memory.
const SPLIT: usize = 128 * 1024;
/// Maximum operations of one commit (<https://atproto.com/specs/sync>).
const MAX_OPS: usize = 200;
/// Maximum size of a record's block (<https://atproto.com/specs/repository>: a megabyte, plus some tolerance).
const MAX_RECORD: usize = 1024 * 1024;
/// Maximum size of a commit's records as JSON. The protocol's two megabytes of blocks expand to a few times that,
/// unless many operations name the same block.
const MAX_EXPANDED: usize = 16 * 1024 * 1024;
/// The longest path: an NSID, a slash and a record key.
const MAX_PATH: usize = 317 + 1 + 512;

/// An operation as it stands in a commit.
#[derive(Clone, Copy, Debug)]
pub struct RepoOp<'a> {
    /// create, update or delete.
    pub action: &'a str,
    /// The collection, a slash and the record key.
    pub path: &'a str,
    /// The record after it.
    pub cid: Option<Cid>,
}

/// The entries for operations that come from no frame: `rev` is the revision that they lead to, and the archive has their
/// records. Returns the data of the
/// entries, and how many records cannot be written.
#[must_use]
pub fn entries_of(repo: &str, rev: &str, ops: &[RepoOp<'_>], archive: &Archive<'_>) -> (Vec<String>, usize) {
    let mut tail = Object::new();
    tail.optional("rev", Some(rev));
    let commit = Commit { repo, seq: 0, tail: tail.close() };
    let mut letters = Vec::new();
    let mut data = Vec::new();
    // As many as a commit may have.
    for ops in ops.chunks(MAX_OPS) {
        data.extend(commit.entries(ops, archive.blocks(), &mut letters).into_iter().map(|entry| entry.data));
    }
    (data, letters.len())
}

/// The parts common to all entries and dead letters of one commit.
struct Commit<'a> {
    repo: &'a str,
    seq: i64,
    /// The object that ends each of them.
    tail: String,
}

/// The entries of a commit; parts that can never be applied go to `letters`.
pub(super) fn commit(
    body: &Map<'_>,
    seq: i64,
    wanted: &Collections,
    letters: &mut Vec<NewLetter>,
) -> Result<Vec<NewEntry>, FrameError> {
    let repo = did(body, "repo")?;
    let Some(Value::Array(ops)) = get(body, "ops") else {
        return Err(FrameError::Field("ops"));
    };
    let mut kept = kept(ops, wanted)?;
    if kept.is_empty() {
        return Ok(Vec::new());
    }
    let blocks = match get(body, "blocks") {
        Some(Value::Bytes(car)) => blocks(car),
        _ => HashMap::new(),
    };
    let commit = Commit { repo, seq, tail: tail(body) };
    if kept.len() > MAX_OPS {
        for op in kept.drain(MAX_OPS..) {
            let message = format!("the commit has {} operations; at most {MAX_OPS} are allowed", ops.len());
            letters.push(commit.refused(&op, Reason::TooLarge, message));
        }
    }
    Ok(commit.entries(&kept, &blocks, letters))
}

/// The operations on wanted collections.
fn kept<'a>(ops: &[Value<'a>], wanted: &Collections) -> Result<Vec<RepoOp<'a>>, FrameError> {
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
    if kept.len() > 1 {
        // The last operation on a path wins. Decided here, because a split could separate the two.
        let mut seen = HashSet::with_capacity(kept.len());
        kept.reverse();
        kept.retain(|op| seen.insert(op.path));
        kept.reverse();
    }
    Ok(kept)
}

/// The JSON that every entry of a commit ends with.
fn tail(body: &Map<'_>) -> String {
    let mut tail = Object::new();
    for name in ["rev", "since", "time"] {
        tail.optional(name, short(body, name));
    }
    if let Some(Value::Cid(cid)) = get(body, "commit") {
        tail.text("commit", &cid.to_string());
    }
    tail.close()
}

impl Commit<'_> {
    /// Writes the operations, split into entries where they become too long.
    fn entries(
        &self,
        ops: &[RepoOp<'_>],
        blocks: &HashMap<Cid, &[u8]>,
        letters: &mut Vec<NewLetter>,
    ) -> Vec<NewEntry> {
        let mut entries = Vec::with_capacity(1);
        let mut out = self.head();
        let mut empty = true;
        let mut expanded = 0;
        for op in ops {
            let start = out.json.len();
            if !empty {
                out.json.push(b',');
            }
            let written = if expanded > MAX_EXPANDED {
                Err((Reason::TooLarge, format!("the commit's records are larger than {MAX_EXPANDED} bytes")))
            } else {
                write_op(&mut out.json, op, blocks)
            };
            match written {
                Ok(()) => {
                    empty = false;
                    expanded += out.json.len() - start;
                }
                Err((reason, message)) => {
                    out.json.truncate(start);
                    letters.push(self.refused(op, reason, message));
                }
            }
            if out.json.len() > SPLIT {
                entries.push(self.entry(std::mem::replace(&mut out, self.head())));
                empty = true;
            }
        }
        if !empty {
            entries.push(self.entry(out));
        }
        entries
    }

    fn head(&self) -> Object {
        let mut out = Object::new();
        out.text("repo", self.repo);
        out.key("ops");
        out.json.push(b'[');
        out
    }

    fn entry(&self, mut out: Object) -> NewEntry {
        out.json.push(b']');
        // Without the tail's opening brace, because the same object continues.
        out.json.push(b',');
        out.json.extend_from_slice(&self.tail.as_bytes()[1..]);
        NewEntry { event_type: "commit", data: out.into_string(), seq: self.seq }
    }

    /// The dead letter of an operation.
    fn refused(&self, op: &RepoOp<'_>, reason: Reason, message: String) -> NewLetter {
        let mut out = Object::new();
        out.text("action", op.action);
        out.text("path", op.path);
        let cid = op.cid.map(|cid| cid.to_string());
        if let Some(cid) = &cid {
            out.text("cid", cid);
        }
        NewLetter {
            account: self.repo.to_owned(),
            key: format!("at://{}/{} {}", self.repo, op.path, cid.unwrap_or_default()),
            event_type: "commit",
            seq: self.seq,
            reject: Reject::new(reason, message),
            op: out.close(),
            data: format!("{{\"repo\":{},{}", quoted(self.repo), &self.tail[1..]),
        }
    }
}

/// The blocks of an archive whose bytes match their CIDs. Of a truncated archive, the blocks before the cut.
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
    let mut out = Object::behind(std::mem::take(json));
    out.text("action", op.action);
    out.text("path", op.path);
    let mut written = Ok(());
    if op.action != "delete" {
        match op.cid.and_then(|cid| Some((cid, blocks.get(&cid)?))) {
            Some((_, block)) if block.len() > MAX_RECORD => {
                let message =
                    format!("the record has {} bytes; at most {MAX_RECORD} are allowed", block.len());
                written = Err((Reason::TooLarge, message));
            }
            Some((cid, block)) => {
                out.text("cid", &cid.to_string());
                out.key("record");
                written = drisl_to_json_into(block, &mut out.json).map_err(|error| {
                    (Reason::Undecodable, format!("the record is not readable DAG-CBOR: {error}"))
                });
            }
            None if op.cid.is_none() => {
                written = Err((Reason::MissingBlock, "the operation names no CID".to_owned()));
            }
            None => {
                let message = "the commit's archive lacks the record, or its bytes do not match its CID";
                written = Err((Reason::MissingBlock, message.to_owned()));
            }
        }
    }
    out.json.push(b'}');
    *json = out.json;
    written
}
