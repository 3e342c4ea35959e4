//! What a frame says about a commit, for verification.

use shrike::cbor::{Cid, Decoder, Value};

use super::field::{Map, get, has_few_items, text};
use crate::verify::{Claim, ClaimedOp};

/// A frame that can be verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claimed<'a> {
    /// A `#commit`.
    Commit(Claim<'a>),
    /// A `#sync`.
    Sync(Claim<'a>),
    /// An `#identity`: the account's document may have changed.
    Identity(&'a str),
}

impl<'a> Claimed<'a> {
    /// The account.
    #[must_use]
    pub fn did(&self) -> &'a str {
        match self {
            Self::Commit(claim) | Self::Sync(claim) => claim.did,
            Self::Identity(did) => did,
        }
    }
}

/// The claim in a frame; `None` if the frame is of another type, or is not readable at all: [`super::decode`] refuses
/// that.
#[must_use]
pub fn claim(frame: &[u8]) -> Option<Claimed<'_>> {
    if !has_few_items(frame) {
        return None;
    }
    let mut decoder = Decoder::new(frame);
    let (Value::Map(header), Value::Map(body)) = (decoder.decode().ok()?, decoder.decode().ok()?) else {
        return None;
    };
    match text(&header, "t")? {
        "#commit" => read(&body, "repo").map(Claimed::Commit),
        "#sync" => read(&body, "did").map(Claimed::Sync),
        "#identity" => text(&body, "did").map(Claimed::Identity),
        _ => None,
    }
}

fn read<'a>(body: &Map<'a>, did: &str) -> Option<Claim<'a>> {
    let ops = match get(body, "ops") {
        Some(Value::Array(ops)) => ops.iter().map(operation).collect::<Option<_>>()?,
        _ => Vec::new(),
    };
    let blocks = match get(body, "blocks") {
        Some(Value::Bytes(blocks)) => *blocks,
        _ => &[],
    };
    Some(Claim {
        did: text(body, did)?,
        rev: text(body, "rev").unwrap_or_default(),
        since: text(body, "since"),
        prev_data: cid(body, "prevData"),
        commit: cid(body, "commit"),
        ops,
        blocks,
    })
}

fn operation<'a>(op: &Value<'a>) -> Option<ClaimedOp<'a>> {
    let Value::Map(op) = op else { return None };
    Some(ClaimedOp {
        action: text(op, "action")?,
        path: text(op, "path")?,
        cid: cid(op, "cid"),
        prev: cid(op, "prev"),
    })
}

fn cid(map: &Map<'_>, name: &str) -> Option<Cid> {
    match get(map, name) {
        Some(Value::Cid(cid)) => Some(*cid),
        _ => None,
    }
}
