//! What each kind of event means: from the text of a stream entry to operations on the database. One file per
//! kind; the SQL that carries the operations out stands in `sql/apply` under the same names.

pub mod datetime;
mod follow;
mod gate;
pub mod json;
mod label;
mod like;
mod list;
mod post;
mod profile;
pub mod python;
mod record;
mod registers;
mod service;
mod verification;

use std::borrow::Cow;
use std::collections::HashSet;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::event::Entry;
#[cfg(test)]
use crate::event::EntryId;
use crate::event::{Epochs, Event, Kind, Micros, Op, Reason, Reject, Rejected, Version, check_rev};
use crate::time::now_ms;
use json::Text;

/// The context for interpreting an entry.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The epochs of the stream.
    pub epochs: &'a Epochs,
    /// The clock, Unix time in milliseconds: revisions ahead of it are refused.
    pub now_ms: u64,
}

impl<'a> Context<'a> {
    /// With the present time.
    #[must_use]
    pub fn now(epochs: &'a Epochs) -> Self {
        Self { epochs, now_ms: now_ms() }
    }
}

/// Reads what an entry says.
///
/// A bad operation is set aside in [`Event::rejected`] and harms no other.
///
/// # Errors
///
/// The whole entry is unreadable: it says neither what it is about nor what to do.
pub fn interpret<'a>(entry: &'a Entry, context: Context<'_>) -> Result<Event<'a>, Reject> {
    let seq = match entry.seq.as_str() {
        "" => None,
        seq if seq.len() <= 18 && seq.bytes().all(|b| b.is_ascii_digit()) => Some(Cow::Borrowed(seq)),
        _ => return Err(Reject::new(Reason::Undecodable, "the field `seq` is not a number")),
    };
    let version = Version { rev: None, seq, entry: entry.id, epoch: 0 };
    match entry.event_type.as_str() {
        "commit" => commit(entry, version, context),
        "identity" => registers::identity(entry, version, context),
        "account" => registers::account(entry, version, context),
        "" => Err(Reject::new(Reason::Undecodable, "the entry has no `type`")),
        // It says that a repository changed without saying how: there is nothing to apply.
        "sync" => Ok(Event {
            event_type: &entry.event_type,
            repo: Cow::Borrowed(""),
            version,
            ops: Vec::new(),
            sources: Vec::new(),
            mentions: Vec::new(),
            rejected: Vec::new(),
        }),
        other => Err(Reject::new(
            Reason::UnknownType,
            format!("the type {} is none of commit, identity, account, sync", json::quote(&shorten(other))),
        )),
    }
}

#[derive(Deserialize)]
struct Commit<'a> {
    #[serde(borrow)]
    repo: Cow<'a, str>,
    #[serde(borrow)]
    ops: Vec<&'a RawValue>,
    #[serde(borrow, default)]
    rev: Option<Text<'a>>,
    #[serde(default)]
    epoch: Option<u64>,
}

#[derive(Deserialize)]
struct CommitOp<'a> {
    #[serde(borrow)]
    action: Text<'a>,
    // A name is taken as it is, and refused with a U+0000 in it: without, it would be another one.
    #[serde(borrow)]
    path: Cow<'a, str>,
    #[serde(borrow, default)]
    cid: Option<Text<'a>>,
    #[serde(borrow, default)]
    record: Option<&'a RawValue>,
}

fn commit<'a>(entry: &'a Entry, mut version: Version<'a>, context: Context<'_>) -> Result<Event<'a>, Reject> {
    let commit: Commit<'_> = parse(&entry.data).map_err(|reject| Reject {
        reason: Reason::Undecodable,
        message: format!("the commit is unreadable: {}", reject.message),
        ..reject
    })?;
    check_did(&commit.repo)?;
    version.rev = commit.rev.map(|rev| rev.0).filter(|rev| !rev.is_empty());
    if let Some(rev) = &version.rev {
        check_rev(rev, context.now_ms).map_err(|message| Reject::new(Reason::InvalidField, message))?;
    }
    context.epochs.place(&mut version, commit.epoch);

    let mut event = Event {
        event_type: &entry.event_type,
        repo: commit.repo,
        version,
        ops: Vec::with_capacity(commit.ops.len()),
        sources: Vec::with_capacity(commit.ops.len()),
        mentions: Vec::new(),
        rejected: Vec::new(),
    };
    // Within one commit the last operation on a path wins.
    let mut seen = HashSet::new();
    let mut ops = Vec::with_capacity(commit.ops.len());
    for raw in commit.ops.iter().rev() {
        let read = parse::<CommitOp<'_>>(raw.get());
        if let Ok(op) = &read
            && commit.ops.len() > 1
            && !seen.insert(op.path.clone().into_owned())
        {
            continue;
        }
        match read.and_then(|op| interpret_op(op, &event.repo, &event.version)) {
            Ok((op, mention)) => {
                event.mentions.extend(mention);
                ops.push((op, raw.get()));
            }
            Err(reject) => event.rejected.push(Rejected { reject, op: raw.get().to_owned() }),
        }
    }
    ops.sort_by_key(|(op, _)| (!op.delete, op.kind));
    (event.ops, event.sources) = ops.into_iter().unzip();
    if event.version.rev.is_none() {
        event.version.rev = context.epochs.rev_of(&event.version).map(Cow::Owned);
    }
    Ok(event)
}

/// An account that an operation speaks of, besides the repository's own.
type Mention<'a> = Option<Cow<'a, str>>;

fn interpret_op<'a>(
    op: CommitOp<'a>,
    repo: &str,
    version: &Version<'_>,
) -> Result<(Op<'a>, Mention<'a>), Reject> {
    let (collection, rkey) = split_path(&op.path)?;
    let kind = match (collection, rkey) {
        ("app.bsky.feed.post", _) => Kind::Post,
        ("app.bsky.feed.like", _) => Kind::Like,
        ("app.bsky.feed.repost", _) => Kind::Repost,
        ("app.bsky.bookmark", _) => Kind::Bookmark,
        ("app.bsky.graph.follow", _) => Kind::Follow,
        ("app.bsky.graph.block", _) => Kind::Block,
        ("app.bsky.actor.profile", "self") => Kind::Profile,
        ("app.bsky.graph.list", _) => Kind::List,
        ("app.bsky.graph.listitem", _) => Kind::ListItem,
        ("app.bsky.graph.listblock", _) => Kind::ListBlock,
        ("app.bsky.graph.starterpack", _) => Kind::StarterPack,
        ("app.bsky.feed.generator", _) => Kind::FeedGenerator,
        ("app.bsky.labeler.service", _) => Kind::LabelerService,
        ("com.atproto.label.label", _) => Kind::Label,
        ("app.bsky.graph.verification", _) => Kind::Verification,
        ("app.bsky.feed.threadgate", _) => Kind::ThreadGate,
        ("app.bsky.feed.postgate", _) => Kind::PostGate,
        _ => Kind::Record,
    };
    let uri = format!("at://{repo}/{}", op.path);
    if uri.len() > MAX_URI {
        return Err(Reject::new(
            Reason::InvalidField,
            format!("the URI is longer than {MAX_URI} characters"),
        ));
    }
    let time = version.time();
    let mut out = Op {
        kind,
        delete: false,
        uri,
        cid: None,
        subject: None,
        subject_cid: None,
        created_at: time,
        sort_at: time,
        body: None,
        root: None,
    };
    if matches!(kind, Kind::ThreadGate | Kind::PostGate) {
        out.subject = Some(Cow::Owned(gate::post_uri(repo, rkey)));
    }
    match &*op.action.0 {
        "delete" => {
            // A profile is a register of its account: deleting it writes nothing into it.
            out.delete = kind != Kind::Profile;
            Ok((out, None))
        }
        "create" | "update" => {
            let record =
                op.record.ok_or_else(|| Reject::new(Reason::MissingField, "there is no `record`"))?;
            if !record.get().starts_with('{') {
                return Err(Reject::new(Reason::InvalidField, "`record` is not an object"));
            }
            out.cid = op.cid.map(|cid| cid.0);
            if out.cid.as_ref().is_some_and(|cid| cid.len() > MAX_NAME) {
                return Err(Reject::new(Reason::InvalidField, "`cid` is longer than 255 characters"));
            }
            // The Python reader writes no revision; in our own entries `py_type` is a field like any other.
            if version.rev.is_none() && python::is_python_form(record.get()) {
                // Rare beside our own entries, so that a tree and owned text are cheap enough.
                let tree = serde_json::from_str(record.get()).map_err(|error| reject(&error))?;
                let normal = RawValue::from_string(python::normalise(tree).to_string())
                    .map_err(|error| reject(&error))?;
                let (op, mention) = put(out, &normal, collection)?;
                return Ok((into_owned(op), mention.map(|did| Cow::Owned(did.into_owned()))));
            }
            put(out, record, collection)
        }
        other => Err(Reject::new(
            Reason::InvalidField,
            format!("the action {} is none of create, update, delete", json::quote(other)),
        )),
    }
}

/// Fills in what the record says.
fn put<'a>(op: Op<'a>, record: &'a RawValue, collection: &str) -> Result<(Op<'a>, Mention<'a>), Reject> {
    match op.kind {
        Kind::Post => post::put(op, record).map(|op| (op, None)),
        Kind::Like | Kind::Repost | Kind::Bookmark => like::put(op, record).map(|op| (op, None)),
        Kind::Follow | Kind::Block => follow::put(op, record),
        Kind::Profile => profile::put(op, record).map(|op| (op, None)),
        Kind::List => list::put(op, record).map(|op| (op, None)),
        Kind::ListItem => list::put_item(op, record),
        Kind::ListBlock => list::put_block(op, record).map(|op| (op, None)),
        Kind::StarterPack => list::put_starter_pack(op, record).map(|op| (op, None)),
        Kind::FeedGenerator => service::put_feed_generator(op, record).map(|op| (op, None)),
        Kind::LabelerService => service::put_labeler(op, record).map(|op| (op, None)),
        Kind::Label => label::put(op, record).map(|op| (op, None)),
        Kind::Verification => verification::put(op, record).map(|op| (op, None)),
        Kind::ThreadGate => gate::put_thread_gate(op, record).map(|op| (op, None)),
        Kind::PostGate => gate::put_post_gate(op, record).map(|op| (op, None)),
        Kind::Record | Kind::Identity | Kind::Account => {
            record::put(op, record, collection).map(|op| (op, None))
        }
    }
}

fn into_owned(op: Op<'_>) -> Op<'static> {
    let own = |text: Option<Cow<'_, str>>| text.map(|text| Cow::Owned(text.into_owned()));
    Op {
        kind: op.kind,
        delete: op.delete,
        uri: op.uri,
        cid: own(op.cid),
        subject: own(op.subject),
        subject_cid: own(op.subject_cid),
        created_at: op.created_at,
        sort_at: op.sort_at,
        body: op.body.map(|json| crate::event::Json(Cow::Owned(json.0.into_owned()))),
        root: own(op.root),
    }
}

/// The longest URI (<https://atproto.com/specs/at-uri-scheme>). Tables of other programs may hold less; then the database
/// says so.
const MAX_URI: usize = 8192;
/// The longest DID, handle or CID that the tables hold.
const MAX_NAME: usize = 255;

/// Sets both times from the record's `createdAt`: one that is missing or not a datetime is the time inside the revision
/// (already in `op`); nothing is sorted after the moment it was committed.
fn set_created_at(op: &mut Op<'_>, created_at: Option<&RawValue>) {
    let committed = op.created_at;
    if let Some(Text(text)) = created_at.and_then(|raw| serde_json::from_str(raw.get()).ok())
        && let Some(time) = datetime::parse(&text)
    {
        op.created_at = time;
    }
    op.sort_at = Micros(op.created_at.0.min(committed.0));
}

/// Most tables keep the record's CID and cannot do without.
fn need_cid(op: &Op<'_>) -> Result<(), Reject> {
    match op.cid {
        Some(_) => Ok(()),
        None => Err(Reject::new(Reason::MissingField, "there is no `cid`")),
    }
}

/// The field, when it has the JSON shape that readers of the table expect.
fn shaped<'a>(value: Option<&'a RawValue>, open: char, name: &str) -> Result<Option<&'a RawValue>, Reject> {
    match value {
        Some(raw) if !raw.get().starts_with(open) => {
            let what = if open == '{' { "an object" } else { "a list" };
            Err(Reject::new(Reason::InvalidField, format!("`{name}` is not {what}")))
        }
        value => Ok(value),
    }
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Reject> {
    serde_json::from_str(text).map_err(|error| reject(&error))
}

fn reject(error: &serde_json::Error) -> Reject {
    let message = error.to_string();
    let reason = match error.classify() {
        serde_json::error::Category::Data if message.starts_with("missing field") => Reason::MissingField,
        serde_json::error::Category::Data => Reason::InvalidField,
        _ => Reason::Undecodable,
    };
    Reject::new(reason, message)
}

/// The record paths of <https://atproto.com/specs/repository>: an NSID and a record key.
fn split_path(path: &str) -> Result<(&str, &str), Reject> {
    let key = |c: u8| c.is_ascii_alphanumeric() || b"._:~-".contains(&c);
    match path.split_once('/') {
        Some((collection, rkey))
            if collection.contains('.')
                && collection.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'.' || c == b'-')
                && !rkey.is_empty()
                && rkey.bytes().all(key) =>
        {
            Ok((collection, rkey))
        }
        _ => Err(Reject::new(
            Reason::InvalidField,
            format!("the path {} is not collection/rkey", json::quote(path)),
        )),
    }
}

fn check_did(did: &str) -> Result<(), Reject> {
    let ok = did.len() <= MAX_NAME
        && did.strip_prefix("did:").and_then(|rest| rest.split_once(':')).is_some_and(|(method, id)| {
            !method.is_empty()
                && method.bytes().all(|c| c.is_ascii_lowercase())
                && !id.is_empty()
                && id.bytes().all(|c| c.is_ascii_alphanumeric() || b"._:%-".contains(&c))
        });
    if ok {
        Ok(())
    } else {
        Err(Reject::new(Reason::InvalidField, format!("{} is not a DID", json::quote(&shorten(did)))))
    }
}

fn check_uri(uri: &str) -> Result<(), Reject> {
    if uri.starts_with("at://") && uri.len() <= MAX_URI && !uri.contains(char::is_control) {
        Ok(())
    } else {
        Err(Reject::new(Reason::InvalidField, format!("{} is not an at:// URI", json::quote(&shorten(uri)))))
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

/// `com.atproto.repo.strongRef`: a record and its version. Clients of old left the CID out.
#[derive(Deserialize)]
struct StrongRef<'a> {
    #[serde(borrow)]
    uri: Cow<'a, str>,
    #[serde(borrow, default)]
    cid: Option<Text<'a>>,
}

impl<'a> StrongRef<'a> {
    fn checked(self) -> Result<(Cow<'a, str>, Option<Cow<'a, str>>), Reject> {
        check_uri(&self.uri)?;
        let cid = self.cid.map(|cid| cid.0);
        if cid.as_ref().is_some_and(|cid| cid.len() > MAX_NAME) {
            return Err(Reject::new(Reason::InvalidField, "the CID is longer than 255 characters"));
        }
        Ok((self.uri, cid))
    }
}

/// As [`interpret`], in a stream without named epochs and with the present time.
#[cfg(test)]
fn interpret_now(entry: &Entry) -> Result<Event<'_>, Reject> {
    interpret(entry, Context::now(&Epochs::UNNAMED))
}

/// An entry; for tests of the kinds.
#[cfg(test)]
fn test_entry(event_type: &str, data: &str, seq: &str) -> Entry {
    Entry {
        id: EntryId { ms: 1_763_700_000_000, seq: 3 },
        event_type: event_type.to_owned(),
        data: data.to_owned(),
        seq: seq.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit_of(ops: &str) -> Entry {
        test_entry(
            "commit",
            &format!(r#"{{"repo":"did:plc:aaaaaaaaaaaaaaaaaaaaaaaa","rev":"3n2samfdihk2n","ops":[{ops}]}}"#),
            "7",
        )
    }

    const LIKE: &str = r#"{"action":"create","path":"app.bsky.feed.like/3n2samhxtok2n","cid":"bafy",
        "record":{"$type":"app.bsky.feed.like","subject":{"cid":"bafy2","uri":"at://did:plc:b/app.bsky.feed.post/1"},
        "createdAt":"2026-11-21T04:17:51.287Z"}}"#;

    #[test]
    fn a_bad_operation_harms_only_itself() {
        let entry = commit_of(&format!(
            r#"{LIKE},{{"action":"create","path":"app.bsky.feed.like/2","cid":"x","record":{{"subject":5}}}},
            {{"action":"delete","path":"app.bsky.feed.post/x"}},{{"action":"create","path":"nonsense"}}"#
        ));
        let event = interpret_now(&entry).unwrap();
        assert_eq!(
            event.ops.iter().map(|op| (op.delete, op.kind)).collect::<Vec<_>>(),
            [(true, Kind::Post), (false, Kind::Like)]
        );
        let reasons: Vec<_> = event.rejected.iter().map(|r| r.reject.reason).collect();
        assert_eq!(reasons, [Reason::InvalidField, Reason::InvalidField]);
    }

    #[test]
    fn within_one_commit_the_last_operation_on_a_path_wins() {
        let entry =
            commit_of(&format!(r#"{LIKE},{{"action":"delete","path":"app.bsky.feed.like/3n2samhxtok2n"}}"#));
        let event = interpret_now(&entry).unwrap();
        assert_eq!(event.ops.len(), 1);
        assert!(event.ops[0].delete);
    }

    #[test]
    fn missing_fields_and_foreign_types_have_their_own_verdicts() {
        let entry = commit_of(r#"{"action":"create","path":"app.bsky.feed.like/2","cid":"x","record":{}}"#);
        let event = interpret_now(&entry).unwrap();
        assert_eq!(event.rejected[0].reject.reason, Reason::MissingField);
        assert_eq!(interpret_now(&test_entry("commit", "{", "1")).unwrap_err().reason, Reason::Undecodable);
        assert_eq!(interpret_now(&test_entry("commit", "{}", "1")).unwrap_err().reason, Reason::Undecodable);
        assert!(interpret_now(&test_entry("sync", "{}", "1")).unwrap().ops.is_empty());
        assert_eq!(interpret_now(&test_entry("tree", "{}", "1")).unwrap_err().reason, Reason::UnknownType);
        assert!(interpret_now(&test_entry("commit", "{}", "one")).is_err());
    }

    #[test]
    fn impossible_dates_come_from_the_revision_and_future_ones_are_not_sorted_by() {
        let with = |created: &str| {
            let entry = commit_of(&LIKE.replace("\"2026-11-21T04:17:51.287Z\"", created));
            let event = interpret_now(&entry).unwrap();
            (event.ops[0].created_at, event.ops[0].sort_at, event.version.time())
        };
        let (created, sort, rev) = with("\"yesterday\"");
        assert_eq!((created, sort), (rev, rev));
        let (created, sort, rev) = with("5");
        assert_eq!((created, sort), (rev, rev));
        let (created, sort, rev) = with("\"2031-01-01T00:00:00Z\"");
        assert!(created > rev && sort == rev);
        let (created, sort, _) = with("\"1985-04-12T23:20:50.123Z\"");
        assert_eq!(created, sort);
    }
}
