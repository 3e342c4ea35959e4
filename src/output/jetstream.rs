//! The format of a Jetstream, version 1 (<https://github.com/bluesky-social/jetstream>): one JSON message for each operation,
//! identity or account event.

use std::borrow::Cow;
use std::collections::HashSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::event::{Entry, EntryId};
use crate::stream::settled::Settled;

/// The accounts that forbid to collect what they write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forbidden(pub HashSet<String>);

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The account that it is about.
    pub did: String,
    /// The place of its operation in the entry.
    pub index: usize,
    /// commit, identity or account.
    pub kind: &'static str,
    /// The collection; `None` for identity and account events, which everybody gets.
    pub collection: Option<String>,
    /// The JSON text.
    pub text: Bytes,
}

#[derive(Deserialize)]
struct CommitData<'a> {
    repo: String,
    #[serde(borrow, default)]
    ops: Vec<Op<'a>>,
    #[serde(borrow, default)]
    rev: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Op<'a> {
    #[serde(borrow)]
    action: Cow<'a, str>,
    #[serde(borrow)]
    path: Cow<'a, str>,
    #[serde(borrow, default)]
    cid: Option<&'a RawValue>,
    #[serde(borrow, default)]
    record: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct IdentityData<'a> {
    did: String,
    #[serde(borrow, default)]
    handle: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    time: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct AccountData<'a> {
    did: String,
    active: bool,
    #[serde(borrow, default)]
    status: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    time: Option<Cow<'a, str>>,
}

#[derive(Serialize)]
struct Event<'a> {
    did: &'a str,
    time_us: u64,
    kind: &'static str,
    #[serde(flatten)]
    what: What<'a>,
}

/// Under its own name.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum What<'a> {
    Commit(Commit<'a>),
    Identity(Identity<'a>),
    Account(Account<'a>),
}

#[derive(Serialize)]
struct Commit<'a> {
    rev: &'a str,
    operation: &'a str,
    collection: &'a str,
    rkey: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cid: Option<&'a RawValue>,
    /// It could not be applied, and is among the dead letters. Not part of a Jetstream's messages.
    #[serde(rename = "deadLetter", skip_serializing_if = "std::ops::Not::not")]
    dead_letter: bool,
}

#[derive(Serialize)]
struct Identity<'a> {
    did: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    handle: Option<&'a str>,
    seq: u64,
    time: &'a str,
}

#[derive(Serialize)]
struct Account<'a> {
    active: bool,
    did: &'a str,
    seq: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'a str>,
    time: &'a str,
}

/// The time of an entry's messages in microseconds: that of its id, with its place in the millisecond as the last three digits.
/// The same wherever and whenever it is sent; entries beyond the thousandth of a millisecond share the last one's.
#[must_use]
pub fn time_us(id: EntryId) -> u64 {
    id.ms.saturating_mul(1000).saturating_add(id.seq.min(999))
}

/// The place before which everything is older than a cursor in microseconds.
#[must_use]
pub fn before_cursor(cursor: u64) -> EntryId {
    EntryId { ms: cursor / 1000, seq: cursor % 1000 }.before()
}

/// The messages of an entry, and how many operations it has. What accounts forbid to collect is left out, except deletes: it is not
/// in the tables either.
///
/// # Errors
///
/// The entry is not one of ours; it has no messages.
pub fn messages(
    settled: &Settled,
    forbidden: &Forbidden,
) -> Result<(Vec<Message>, usize), serde_json::Error> {
    let Settled { entry, refused } = settled;
    let is_refused = refused.iter().any(|path| path == "*");
    match entry.event_type.as_str() {
        "commit" => commit(entry, refused, forbidden),
        "identity" if !is_refused => Ok((identity(entry)?, 1)),
        "account" if !is_refused => Ok((account(entry)?, 1)),
        _ => Ok((Vec::new(), 1)),
    }
}

fn message(
    entry: &Entry,
    index: usize,
    did: &str,
    collection: Option<&str>,
    what: What<'_>,
) -> Result<Message, serde_json::Error> {
    let kind = match &what {
        What::Commit(_) => "commit",
        What::Identity(_) => "identity",
        What::Account(_) => "account",
    };
    let text = serde_json::to_vec(&Event { did, time_us: time_us(entry.id), kind, what })?;
    Ok(Message {
        did: did.to_owned(),
        index,
        kind,
        collection: collection.map(str::to_owned),
        text: text.into(),
    })
}

fn commit(
    entry: &Entry,
    refused: &[String],
    forbidden: &Forbidden,
) -> Result<(Vec<Message>, usize), serde_json::Error> {
    let CommitData { repo, ops, rev } = serde_json::from_str(&entry.data)?;
    let is_forbidden = forbidden.0.contains(&repo);
    let count = ops.len();
    let mut messages = Vec::with_capacity(count);
    for (index, op) in ops.into_iter().enumerate() {
        let is_delete = op.action == "delete";
        let Some((collection, rkey)) = op.path.split_once('/').filter(|_| is_delete || !is_forbidden) else {
            continue;
        };
        let commit = Commit {
            rev: rev.as_deref().unwrap_or_default(),
            operation: &op.action,
            collection,
            rkey,
            record: op.record.filter(|_| !is_delete),
            cid: op.cid.filter(|cid| !is_delete && cid.get() != "null"),
            dead_letter: refused.iter().any(|path| *path == op.path || path == "*"),
        };
        messages.push(message(entry, index, &repo, Some(collection), What::Commit(commit))?);
    }
    Ok((messages, count))
}

fn identity(entry: &Entry) -> Result<Vec<Message>, serde_json::Error> {
    let IdentityData { did, handle, time } = serde_json::from_str(&entry.data)?;
    let time = time.unwrap_or_else(|| arrived(entry).into());
    let identity = Identity { did: &did, handle: handle.as_deref(), seq: seq(entry), time: &time };
    Ok(vec![message(entry, 0, &did, None, What::Identity(identity))?])
}

fn account(entry: &Entry) -> Result<Vec<Message>, serde_json::Error> {
    let AccountData { did, active, status, time } = serde_json::from_str(&entry.data)?;
    let time = time.unwrap_or_else(|| arrived(entry).into());
    let account = Account { active, did: &did, seq: seq(entry), status: status.as_deref(), time: &time };
    Ok(vec![message(entry, 0, &did, None, What::Account(account))?])
}

/// The relay's number; 0 for what came from no relay.
fn seq(entry: &Entry) -> u64 {
    entry.seq.parse().unwrap_or(0)
}

/// For events that do not say when they happened.
fn arrived(entry: &Entry) -> String {
    let ms = i64::try_from(entry.id.ms).unwrap_or_default();
    jiff::Timestamp::from_millisecond(ms).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(event_type: &str, data: &str) -> Settled {
        let id = EntryId { ms: 1_795_234_668_730, seq: 4 };
        let entry = Entry { id, event_type: event_type.into(), data: data.into(), seq: "1409752997".into() };
        Settled { entry, refused: Vec::new() }
    }

    fn texts(settled: &Settled) -> Vec<String> {
        let (messages, _) = messages(settled, &Forbidden::default()).unwrap();
        messages.iter().map(|message| String::from_utf8(message.text.to_vec()).unwrap()).collect()
    }

    const COMMIT: &str = r#"{"repo":"did:plc:eygmaihciaxprqvxpfvl6flk","ops":[
        {"action":"create","path":"app.bsky.feed.like/3l3qo2vuowo2b","cid":"bafyreidwaivazkwu67xztlmuobx35hs2lnfh3kolmgfmucldvhd3sgzcqi",
         "record":{"$type":"app.bsky.feed.like","a":1}},
        {"action":"delete","path":"app.bsky.graph.follow/3l3qo2vuowo2c","cid":null}],
        "rev":"3l3qo2vutsw2b","since":null,"time":"2024-09-05T06:11:04.870Z"}"#;

    #[test]
    fn an_operation_becomes_a_message_as_a_jetstream_writes_it() {
        assert_eq!(
            texts(&settled("commit", COMMIT)),
            [
                concat!(
                    r#"{"did":"did:plc:eygmaihciaxprqvxpfvl6flk","time_us":1795234668730004,"kind":"commit","commit":{"#,
                    r#""rev":"3l3qo2vutsw2b","operation":"create","collection":"app.bsky.feed.like","rkey":"3l3qo2vuowo2b","#,
                    r#""record":{"$type":"app.bsky.feed.like","a":1},"#,
                    r#""cid":"bafyreidwaivazkwu67xztlmuobx35hs2lnfh3kolmgfmucldvhd3sgzcqi"}}"#
                ),
                concat!(
                    r#"{"did":"did:plc:eygmaihciaxprqvxpfvl6flk","time_us":1795234668730004,"kind":"commit","commit":{"#,
                    r#""rev":"3l3qo2vutsw2b","operation":"delete","collection":"app.bsky.graph.follow","rkey":"3l3qo2vuowo2c"}}"#
                ),
            ]
        );
    }

    #[test]
    fn identity_and_account_events_become_messages() {
        let identity = r#"{"did":"did:plc:a","handle":"a.test","time":"2024-09-05T06:11:04.870Z"}"#;
        assert_eq!(
            texts(&settled("identity", identity)),
            [concat!(
                r#"{"did":"did:plc:a","time_us":1795234668730004,"kind":"identity","identity":{"did":"did:plc:a","#,
                r#""handle":"a.test","seq":1409752997,"time":"2024-09-05T06:11:04.870Z"}}"#
            )]
        );
        let account = r#"{"did":"did:plc:a","active":false,"status":"takendown"}"#;
        assert_eq!(
            texts(&settled("account", account)),
            [concat!(
                r#"{"did":"did:plc:a","time_us":1795234668730004,"kind":"account","account":{"active":false,"did":"did:plc:a","#,
                r#""seq":1409752997,"status":"takendown","time":"2026-11-21T04:17:48.73Z"}}"#
            )]
        );
        assert!(texts(&settled("sync", "{}")).is_empty());
        assert!(messages(&settled("account", "no JSON"), &Forbidden::default()).is_err());
    }

    #[test]
    fn what_was_refused_is_labelled_and_what_is_forbidden_left_out() {
        let mut refused = settled("commit", COMMIT);
        refused.refused = vec!["app.bsky.feed.like/3l3qo2vuowo2b".to_owned()];
        let labelled: Vec<bool> =
            texts(&refused).iter().map(|text| text.contains(r#""deadLetter":true"#)).collect();
        assert_eq!(labelled, [true, false]);
        let forbidden = Forbidden(HashSet::from(["did:plc:eygmaihciaxprqvxpfvl6flk".to_owned()]));
        let (left, count) = messages(&settled("commit", COMMIT), &forbidden).unwrap();
        assert_eq!(count, 2, "what is left out counts");
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].collection.as_deref(), Some("app.bsky.graph.follow"));
    }

    #[test]
    fn a_cursor_begins_with_the_entry_whose_time_it_is() {
        for id in [EntryId { ms: 5, seq: 0 }, EntryId { ms: 5, seq: 17 }, EntryId { ms: 5, seq: 999 }] {
            let place = before_cursor(time_us(id));
            assert!(place < id && id.before() <= place, "{id}");
        }
        let late = EntryId { ms: 5, seq: 4000 };
        assert!(before_cursor(time_us(late)) < EntryId { ms: 5, seq: 999 });
    }
}
