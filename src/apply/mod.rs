//! Interprets each kind of event: turns the text of a stream entry into operations on the database, which `sql/apply`
//! carries out. Kinds that are read the same way share a file.
//!
//! | kinds | read in | applied in |
//! |---|---|---|
//! | post | `post` | `30_posts.sql` |
//! | like, repost, bookmark | `like` | `20_pointers.sql` |
//! | follow | `follow` | `40_follows.sql` |
//! | thread gate, post gate | `gate` | `31_gates.sql` |
//! | profile; identity, account | `profile`; `registers` | `60_users.sql` |
//! | block; list, list item, list block, starter pack | `follow`; `list` | `41_plain.sql` |
//! | feed generator, labeler service | `service` | `41_plain.sql` |
//! | label; verification; every other record | `label`; `verification`; `record` | `41_plain.sql` |

mod commit;
pub mod datetime;
mod field;
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

use serde_json::value::RawValue;

use self::field::shorten;
#[cfg(test)]
use crate::event::EntryId;
use crate::event::{Entry, Epochs, Event, Kind, Op, Reason, Reject, UNUSABLE, Version};
use crate::time::now_ms;

/// The context for interpreting an entry.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The epochs of the stream.
    pub epochs: &'a Epochs,
    /// The current Unix time in milliseconds: revisions ahead of it are refused.
    pub now_ms: u64,
}

impl<'a> Context<'a> {
    /// A context with the current time.
    #[must_use]
    pub fn now(epochs: &'a Epochs) -> Self {
        Self { epochs, now_ms: now_ms() }
    }
}

/// Interprets an entry.
///
/// A bad operation is set aside in [`Event::rejected`] and does not affect the others.
///
/// # Errors
///
/// The whole entry is unreadable.
pub fn interpret<'a>(entry: &'a Entry, context: Context<'_>) -> Result<Event<'a>, Reject> {
    let seq = match entry.seq.as_str() {
        "" => None,
        seq if seq.len() <= 18 && seq.bytes().all(|b| b.is_ascii_digit()) => Some(Cow::Borrowed(seq)),
        _ => return Err(Reject::new(Reason::Undecodable, "the field `seq` is not a number")),
    };
    let version = Version { rev: None, seq, entry: entry.id, epoch: 0 };
    match entry.event_type.as_str() {
        "commit" => commit::commit(entry, version, context),
        "identity" => registers::identity(entry, version, context),
        "account" => registers::account(entry, version, context),
        "" => Err(Reject::new(Reason::Undecodable, "the entry has no `type`")),
        // It announces that a repository changed, but not how: there is nothing to apply.
        "sync" => Ok(Event {
            event_type: &entry.event_type,
            repo: Cow::Borrowed(""),
            version,
            ops: Vec::new(),
            sources: Vec::new(),
            mentions: Vec::new(),
            rejected: Vec::new(),
        }),
        UNUSABLE => Err(Reject::new(Reason::Undecodable, unusable(&entry.data))),
        other => Err(Reject::new(
            Reason::UnknownType,
            format!("the type {} is not commit, identity, account or sync", json::quote(&shorten(other))),
        )),
    }
}

/// Why an origin could not read something.
fn unusable(data: &str) -> String {
    #[derive(serde::Deserialize)]
    struct Unusable {
        error: String,
    }
    match serde_json::from_str::<Unusable>(data) {
        Ok(unusable) => unusable.error.chars().take(500).collect(),
        Err(_) => "it cannot be read".to_owned(),
    }
}

/// An account that an operation mentions, besides the repository's own.
type Mention<'a> = Option<Cow<'a, str>>;

/// Fills in the operation from the record.
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

/// Like [`interpret`], in a stream without named epochs and with the current time.
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
    fn missing_fields_bad_json_and_unknown_types_get_distinct_reasons() {
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
    fn invalid_dates_fall_back_to_the_revision_and_future_dates_do_not_affect_sorting() {
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
