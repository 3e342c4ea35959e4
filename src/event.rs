//! The common vocabulary: an event is the content of one stream entry, as operations on the database. Pure data;
//! nothing here knows Redis or PostgreSQL.

mod did;
mod entry;
mod epoch;
mod kind;
mod post;
mod task;

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

pub use did::{MAX_DID, is_did};
pub use entry::Entry;
pub use epoch::{Epochs, Start};
pub use kind::Kind;
pub use post::Post;
pub use task::{MAX_ID, Task, is_function};

/// The type of an entry that holds unreadable input from an origin: it becomes a dead letter, with the reason given in its data.
pub const UNUSABLE: &str = "unusable";

/// The id of a stream entry: milliseconds of the server's clock, then a sequence number within them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EntryId {
    /// Unix time in milliseconds.
    pub ms: u64,
    /// Position within the millisecond.
    pub seq: u64,
}

impl EntryId {
    /// The greatest smaller id.
    #[must_use]
    pub fn before(self) -> Self {
        match self.seq.checked_sub(1) {
            Some(seq) => Self { seq, ..self },
            None => Self { ms: self.ms.saturating_sub(1), seq: u64::MAX },
        }
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

/// The text is not `<ms>-<seq>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a stream entry id (<milliseconds>-<sequence>)")]
pub struct InvalidEntryId;

impl FromStr for EntryId {
    type Err = InvalidEntryId;

    fn from_str(text: &str) -> Result<Self, InvalidEntryId> {
        let (ms, seq) = text.split_once('-').ok_or(InvalidEntryId)?;
        Ok(Self {
            ms: ms.parse().map_err(|_| InvalidEntryId)?,
            seq: seq.parse().map_err(|_| InvalidEntryId)?,
        })
    }
}

/// Microseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Micros(pub i64);

/// The order of two events about one record: see `standpipe.newer` in `sql/apply`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version<'a> {
    /// The commit's revision, a TID. For entries of the Python reader, which gives none, a place between our reader's
    /// revisions.
    pub rev: Option<Cow<'a, str>>,
    /// The relay's sequence number, in digits; in a named epoch, followed by `@` and the epoch.
    pub seq: Option<Cow<'a, str>>,
    /// The epoch that the number belongs to; 0 for one without a name.
    pub epoch: u64,
    /// The stream entry that contained it.
    pub entry: EntryId,
}

impl Version<'_> {
    /// Whether its revision is older than this one.
    #[must_use]
    pub fn is_older_than(&self, rev: &str) -> bool {
        self.rev.as_deref().is_some_and(|own| own < rev)
    }

    /// When it was written, as far as this version tells: the time inside the revision, else the stream entry's.
    #[must_use]
    pub fn time(&self) -> Micros {
        self.rev
            .as_deref()
            .and_then(tid_time)
            .unwrap_or(Micros(i64::try_from(self.entry.ms).unwrap_or(i64::MAX / 1000).saturating_mul(1000)))
    }
}

/// The tolerance for revisions ahead of the clock: one further ahead would win over all later events.
const MAX_AHEAD: Micros = Micros(5 * 60 * 1_000_000);

/// Checks that a revision is plausible: a TID (<https://atproto.com/specs/tid>), and at most five minutes ahead of the
/// clock (`now_ms`, Unix time).
///
/// # Errors
///
/// The problem with it.
pub fn check_rev(rev: &str, now_ms: u64) -> Result<(), String> {
    let time = tid_time(rev).ok_or_else(|| "`rev` is not a TID".to_owned())?;
    let now = i64::try_from(now_ms).unwrap_or(i64::MAX / 1000).saturating_mul(1000);
    if time.0 > now.saturating_add(MAX_AHEAD.0) {
        return Err(format!("`rev` {rev} is more than five minutes ahead of the clock"));
    }
    Ok(())
}

/// The microseconds in a TID (<https://atproto.com/specs/tid>).
#[must_use]
pub fn tid_time(tid: &str) -> Option<Micros> {
    i64::try_from(tid_bits(tid)? >> 10).ok().map(Micros)
}

/// base32-sortable.
const TID_ALPHABET: &[u8; 32] = b"234567abcdefghijklmnopqrstuvwxyz";

/// A TID as a number (<https://atproto.com/specs/tid>): 13 characters of base32-sortable, a zero bit, 53 bits of
/// microseconds, 10 bits of clock id. Later TIDs are larger numbers.
#[must_use]
pub fn tid_bits(tid: &str) -> Option<u64> {
    if tid.len() != 13 {
        return None;
    }
    let mut bits: u64 = 0;
    for byte in tid.bytes() {
        let digit = TID_ALPHABET.iter().position(|&c| c == byte)?;
        if bits >> 59 != 0 {
            return None;
        }
        bits = (bits << 5) | digit as u64;
    }
    Some(bits)
}

/// The TID of a number.
#[must_use]
pub fn tid_text(bits: u64) -> String {
    (0..13).rev().map(|digit| char::from(TID_ALPHABET[(bits >> (5 * digit) & 31) as usize])).collect()
}

/// JSON text that PostgreSQL's `jsonb` accepts: valid, and without U+0000.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Json<'a>(pub Cow<'a, str>);

/// The fields that only one kind has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body<'a> {
    /// Of all kinds but posts.
    Json(Json<'a>),
    /// Of a post.
    Post(Box<Post<'a>>),
}

/// One change of the database. The meaning of `subject` and `body` for a kind is documented at the top of that kind's
/// file in `sql/apply`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op<'a> {
    /// The kind of record or register.
    pub kind: Kind,
    /// Whether it is a delete, which leaves a tombstone.
    pub delete: bool,
    /// `at://did/collection/rkey`; for identity and account events the DID.
    pub uri: String,
    /// The record's CID.
    pub cid: Option<Cow<'a, str>>,
    /// What the record points at.
    pub subject: Option<Cow<'a, str>>,
    /// The CID of what it points at.
    pub subject_cid: Option<Cow<'a, str>>,
    /// The record's own creation time.
    pub created_at: Micros,
    /// The time to sort it by: the lesser of `created_at` and [`Version::time`].
    pub sort_at: Micros,
    /// Fields specific to the kind.
    pub body: Option<Body<'a>>,
    /// For a reply, the URI of its thread's root.
    pub root: Option<Cow<'a, str>>,
}

impl<'a> Op<'a> {
    /// The body as JSON; a post has none.
    #[must_use]
    pub fn json(&self) -> Option<&Json<'a>> {
        match &self.body {
            Some(Body::Json(json)) => Some(json),
            Some(Body::Post(_)) | None => None,
        }
    }

    /// The body of a post.
    #[must_use]
    pub fn post(&self) -> Option<&Post<'a>> {
        match &self.body {
            Some(Body::Post(post)) => Some(post),
            Some(Body::Json(_)) | None => None,
        }
    }
}

/// Why an operation, or a whole entry, can never be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Reject {
    /// The class, for metrics and filters.
    pub reason: Reason,
    /// The problem, for a person.
    pub message: String,
    /// PostgreSQL's SQLSTATE, if the database refused.
    pub sqlstate: Option<String>,
}

impl Reject {
    /// A refusal by this program.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), sqlstate: None }
    }
}

/// The classes of dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The entry violates the format, or the record's bytes are not DAG-CBOR.
    Undecodable,
    /// The record lacks a field that its row requires.
    MissingField,
    /// A field has the wrong type or an impossible value.
    InvalidField,
    /// The database refused the values.
    Database,
    /// The entry's `type` is unknown.
    UnknownType,
    /// The commit's archive lacks the record, or the record's bytes do not match its CID.
    MissingBlock,
    /// The event is larger than the protocol allows.
    TooLarge,
    /// The operator's own function or trigger refused it.
    Trigger,
    /// The program panicked while processing it.
    Panic,
    /// Its account has not signed it.
    Unproven,
    /// It is older than tombstones that were deleted because of their age, so that nobody knows whether it was deleted.
    TooOld,
    /// A function for tasks refused it, each time that it was tried.
    Handler,
}

impl Reason {
    /// Every class.
    pub const ALL: [Reason; 12] = [
        Reason::Undecodable,
        Reason::MissingField,
        Reason::InvalidField,
        Reason::Database,
        Reason::UnknownType,
        Reason::MissingBlock,
        Reason::TooLarge,
        Reason::Trigger,
        Reason::Panic,
        Reason::Unproven,
        Reason::TooOld,
        Reason::Handler,
    ];

    /// The name in metrics and dead letters.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Reason::Undecodable => "undecodable",
            Reason::MissingField => "missing_field",
            Reason::InvalidField => "invalid_field",
            Reason::Database => "database",
            Reason::UnknownType => "unknown_type",
            Reason::MissingBlock => "missing_block",
            Reason::TooLarge => "too_large",
            Reason::Trigger => "trigger",
            Reason::Panic => "panic",
            Reason::Unproven => "unproven",
            Reason::TooOld => "too_old",
            Reason::Handler => "handler",
        }
    }
}

/// A message for a broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// What it is routed by.
    pub key: String,
    /// What tells it from others.
    pub id: String,
    /// JSON.
    pub body: Vec<u8>,
}

/// An operation that can never be applied, with its original text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Why.
    pub reject: Reject,
    /// The operation as JSON.
    pub op: String,
}

/// The contents of one stream entry.
#[derive(Clone, Debug)]
pub struct Event<'a> {
    /// commit, identity, account, sync or an unknown word.
    pub event_type: &'a str,
    /// The repository that it is about; empty if there is nothing to do.
    pub repo: Cow<'a, str>,
    /// Its version, which orders it.
    pub version: Version<'a>,
    /// Valid operations: deletes first, grouped by kind, no two on the same record.
    pub ops: Vec<Op<'a>>,
    /// The original operations, by their index in `ops`: kept for a dead letter, in case the database refuses one.
    pub sources: Vec<&'a str>,
    /// Accounts that must have a row, besides the repository's own.
    pub mentions: Vec<Cow<'a, str>>,
    /// Operations that can never be applied.
    pub rejected: Vec<Rejected>,
}

impl Event<'_> {
    /// Whether it claims a handle for an account.
    #[must_use]
    pub fn claims_handle(&self) -> bool {
        self.ops.iter().any(|op| op.kind == Kind::Identity)
    }

    /// Keeps only these operations; `false` if none are left.
    pub fn keep(&mut self, mut wanted: impl FnMut(&Op<'_>) -> bool) -> bool {
        let sources = std::mem::take(&mut self.sources);
        for (op, source) in std::mem::take(&mut self.ops).into_iter().zip(sources) {
            if wanted(&op) {
                self.ops.push(op);
                self.sources.push(source);
            }
        }
        !self.ops.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tid_holds_microseconds() {
        // 3n2samfdihk2n is a revision of the recorded server, written at 2026-11-21T04:17:48.73xZ.
        let time = tid_time("3n2samfdihk2n").unwrap();
        assert_eq!(time.0 / 1_000_000, 1_795_234_668);
        assert_eq!(tid_text(tid_bits("3n2samfdihk2n").unwrap()), "3n2samfdihk2n");
        assert_eq!(tid_time("too short"), None);
        assert_eq!(tid_time("zzzzzzzzzzzzz"), None);
        assert_eq!(tid_time("3n2samfdihk2!"), None);
    }

    #[test]
    fn entry_ids_are_ordered_by_both_parts() {
        let id = |text: &str| text.parse::<EntryId>().unwrap();
        assert!(id("1-2") < id("1-10"));
        assert!(id("9-0") < id("10-0"));
        assert_eq!(id("5-7").to_string(), "5-7");
        assert!("5".parse::<EntryId>().is_err());
    }
}
