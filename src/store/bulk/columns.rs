//! New records as columns: the rows of a batch, table by table, with the changes of counters.

use std::borrow::Cow;
use std::collections::HashSet;

use postgres_types::ToSql;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::sorted::{Sorted, Way};
use super::{Deltas, add};
use crate::event::{Event, Json, Kind, Micros, Op};

/// The length of `notifications.uri`, in characters.
const MAX_NOTIFICATION: usize = 512;
/// The longest DID that a notification can be for, in characters.
const MAX_DID: usize = 255;
/// Of one post, this many accounts are notified that it mentions them.
const MAX_MENTIONS: usize = 50;

/// A statement's parameters.
pub(super) type Columns<'c> = Vec<&'c (dyn ToSql + Sync)>;

/// Defines a table's columns, in the order of its statement's parameters.
macro_rules! columns {
    ($(#[$doc:meta])* $name:ident { $($column:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(super) struct $name<'e> {
            $($column: Vec<$type>,)*
        }

        impl<'e> $name<'e> {
            #[allow(clippy::too_many_arguments, reason = "the columns of a row")]
            fn push(&mut self, $($column: $type,)*) {
                $(self.$column.push($column);)*
            }

            pub(super) fn is_empty(&self) -> bool {
                self.uri.is_empty()
            }

            /// `None` without rows.
            pub(super) fn parameters(&self) -> Option<Columns<'_>> {
                (!self.is_empty()).then(|| vec![$(&self.$column as _,)*])
            }
        }
    };
}

columns! {
    /// Deletes, and what they are older or newer than.
    Versions {
        uri: &'e str,
        rev: Option<&'e str>,
        seq: Option<&'e str>,
        ms: i64,
        sq: i64,
    }
}

columns! {
    /// Likes, or reposts.
    Pointers {
        uri: &'e str,
        user: &'e str,
        subject: &'e str,
        subject_cid: Option<&'e str>,
        via: Option<&'e Json<'e>>,
        created_at: Micros,
        rev: Option<&'e str>,
        seq: Option<&'e str>,
        ms: i64,
        sq: i64,
    }
}

columns! {
    /// Follows, or blocks.
    Relations {
        uri: &'e str,
        account: &'e str,
        subject: &'e str,
        created_at: Micros,
        rev: Option<&'e str>,
        seq: Option<&'e str>,
        ms: i64,
        sq: i64,
    }
}

columns! {
    Posts {
        uri: &'e str,
        cid: Option<&'e str>,
        author: &'e str,
        text: Cow<'e, str>,
        langs: Option<Json<'e>>,
        tags: Json<'e>,
        parent_uri: Option<Cow<'e, str>>,
        parent_cid: Option<Cow<'e, str>>,
        root_uri: Option<Cow<'e, str>>,
        root_cid: Option<Cow<'e, str>>,
        embed: Option<Json<'e>>,
        facets: Option<Json<'e>>,
        created_at: Micros,
        rev: Option<&'e str>,
        seq: Option<&'e str>,
        ms: i64,
        sq: i64,
    }
}

columns! {
    Quotes {
        uri: &'e str,
        cid: Option<&'e str>,
        quoted: &'e str,
        quoted_cid: Option<&'e str>,
        created_at: Micros,
    }
}

columns! {
    FeedItems {
        uri: &'e str,
        post: &'e str,
        originator: &'e str,
        kind: &'static str,
        sort_at: Micros,
        cid: Option<&'e str>,
        created_at: Micros,
    }
}

columns! {
    Notifications {
        uri: String,
        recipient: Cow<'e, str>,
        author: &'e str,
        reason: &'static str,
        about: Option<Cow<'e, str>>,
        cid: Option<&'e str>,
        created_at: Micros,
    }
}

columns! {
    /// The statuses of accounts, as registers.
    Statuses {
        uri: &'e str,
        seq: Option<&'e str>,
        time: Micros,
        ms: i64,
        sq: i64,
    }
}

impl<'e> Statuses<'e> {
    pub(super) fn of<'a: 'e>(ops: impl Iterator<Item = (&'e Event<'a>, &'e Op<'a>)>) -> Self {
        let mut statuses = Self::default();
        for (event, op) in ops {
            let (_, seq, ms, sq) = version(event);
            statuses.push(&event.repo, seq, op.created_at, ms, sq);
        }
        statuses
    }
}

impl<'e> Versions<'e> {
    /// Of registers, whose key is the account.
    pub(super) fn of_registers<'a: 'e>(ops: impl Iterator<Item = (&'e Event<'a>, &'e Op<'a>)>) -> Self {
        let mut versions = Self::default();
        for (event, _) in ops {
            let (rev, seq, ms, sq) = version(event);
            versions.push(&event.repo, rev, seq, ms, sq);
        }
        versions
    }

    pub(super) fn of<'a: 'e>(ops: impl Iterator<Item = (&'e Event<'a>, &'e Op<'a>)>) -> Self {
        let mut versions = Self::default();
        for (event, op) in ops {
            let (rev, seq, ms, sq) = version(event);
            versions.push(&op.uri, rev, seq, ms, sq);
        }
        versions
    }
}

/// A version, as columns.
fn version<'e>(event: &'e Event<'_>) -> (Option<&'e str>, Option<&'e str>, i64, i64) {
    let entry = event.version.entry;
    (
        event.version.rev.as_deref(),
        event.version.seq.as_deref(),
        i64::try_from(entry.ms).unwrap_or(i64::MAX),
        i64::try_from(entry.seq).unwrap_or(i64::MAX),
    )
}

/// All new rows of a batch.
#[derive(Debug, Default)]
pub(super) struct Tables<'e> {
    likes: Pointers<'e>,
    reposts: Pointers<'e>,
    follows: Relations<'e>,
    blocks: Relations<'e>,
    posts: Posts<'e>,
    quotes: Quotes<'e>,
    feed_items: FeedItems<'e>,
    notifications: Notifications<'e>,
}

impl<'e> Tables<'e> {
    /// The rows of the operations that are inserted. `others`: likes and reposts that are not counted, because their
    /// account has another one of the same subject.
    pub(super) fn of(sorted: &Sorted<'e, '_>, others: &HashSet<&str>, deltas: &mut Deltas<'e>) -> Self {
        let mut tables = Self::default();
        for (event, op) in sorted.going(Way::Insert) {
            match (op.kind, op.subject.as_deref()) {
                (Kind::Like | Kind::Repost, Some(subject)) => {
                    tables.pointer(event, op, subject);
                    let mut delta = [0; 5];
                    delta[usize::from(op.kind == Kind::Repost)] = i32::from(!others.contains(&*op.uri));
                    add(deltas, Cow::Borrowed(subject), delta);
                }
                (Kind::Follow | Kind::Block, Some(subject)) => tables.relation(event, op, subject),
                _ => tables.post(event, op, deltas),
            }
        }
        tables
    }

    /// The statements that write them.
    pub(super) fn statements(&self) -> Vec<(&'static str, Option<Columns<'_>>)> {
        vec![
            (include_str!("../../../sql/bulk/likes.sql"), self.likes.parameters()),
            (include_str!("../../../sql/bulk/reposts.sql"), self.reposts.parameters()),
            (include_str!("../../../sql/bulk/follows.sql"), self.follows.parameters()),
            (include_str!("../../../sql/bulk/blocks.sql"), self.blocks.parameters()),
            (include_str!("../../../sql/bulk/posts.sql"), self.posts.parameters()),
            (include_str!("../../../sql/bulk/quotes.sql"), self.quotes.parameters()),
            (include_str!("../../../sql/bulk/feed_items.sql"), self.feed_items.parameters()),
            (include_str!("../../../sql/bulk/notifications.sql"), self.notifications.parameters()),
        ]
    }

    fn pointer(&mut self, event: &'e Event<'_>, op: &'e Op<'_>, subject: &'e str) {
        let (rev, seq, ms, sq) = version(event);
        let via = op.body.as_ref();
        let (table, reason, via_reason) = if op.kind == Kind::Like {
            (&mut self.likes, "like", "like-via-repost")
        } else {
            (&mut self.reposts, "repost", "repost-via-repost")
        };
        let cid = op.subject_cid.as_deref();
        table.push(&op.uri, &event.repo, subject, cid, via, op.created_at, rev, seq, ms, sq);
        if op.kind == Kind::Repost {
            let (sort_at, cid) = (op.sort_at, op.cid.as_deref());
            self.feed_items.push(&op.uri, subject, &event.repo, "repost", sort_at, cid, op.created_at);
        }
        let owner = authority(subject);
        self.notify(event, op, "", Cow::Borrowed(owner), reason, Some(Cow::Borrowed(subject)));
        if let Some(via) = via.and_then(uri_of).filter(|via| authority(via) != owner) {
            let recipient = Cow::Owned(authority(&via).to_owned());
            self.notify(event, op, "/via-repost", recipient, via_reason, Some(Cow::Owned(via)));
        }
    }

    fn relation(&mut self, event: &'e Event<'_>, op: &'e Op<'_>, subject: &'e str) {
        let (rev, seq, ms, sq) = version(event);
        let table = if op.kind == Kind::Follow { &mut self.follows } else { &mut self.blocks };
        table.push(&op.uri, &event.repo, subject, op.created_at, rev, seq, ms, sq);
        if op.kind == Kind::Follow {
            self.notify(event, op, "", Cow::Borrowed(subject), "follow", None);
        }
    }

    fn post(&mut self, event: &'e Event<'_>, op: &'e Op<'_>, deltas: &mut Deltas<'e>) {
        let Some(body) = Body::of(op) else { return };
        let (rev, seq, ms, sq) = version(event);
        let kind = if body.parent_uri.is_some() { "reply" } else { "post" };
        let cid = op.cid.as_deref();
        self.feed_items.push(&op.uri, &op.uri, &event.repo, kind, op.sort_at, cid, op.created_at);
        add(deltas, Cow::Borrowed(&op.uri), [0; 5]);
        if let Some(parent) = &body.parent_uri {
            let recipient = Cow::Owned(authority(parent).to_owned());
            self.notify(event, op, "/reply", recipient, "reply", Some(Cow::Borrowed(&op.uri)));
            add(deltas, parent.clone(), [0, 0, 1, 0, 0]);
        }
        if let Some(quoted) = op.subject.as_deref() {
            self.quotes.push(&op.uri, cid, quoted, op.subject_cid.as_deref(), op.created_at);
            let recipient = Cow::Borrowed(authority(quoted));
            self.notify(event, op, "/quote", recipient, "quote", Some(Cow::Borrowed(&op.uri)));
            add(deltas, Cow::Borrowed(quoted), [0, 0, 0, 1, 0]);
        }
        for did in body.facets.and_then(|facets| mentioned(facets.get())).unwrap_or_default() {
            let ending = format!("/mention/{did}");
            self.notify(event, op, &ending, Cow::Owned(did), "mention", Some(Cow::Borrowed(&op.uri)));
        }
        let json = |raw: Option<&'e RawValue>| raw.map(|raw| Json(Cow::Borrowed(raw.get())));
        self.posts.push(
            &op.uri,
            cid,
            &event.repo,
            body.text,
            json(body.langs),
            json(body.tags).unwrap_or(Json(Cow::Borrowed("[]"))),
            body.parent_uri,
            body.parent_cid,
            body.root_uri,
            body.root_cid,
            json(body.embed),
            json(body.facets),
            op.created_at,
            rev,
            seq,
            ms,
            sq,
        );
    }

    /// The rules are those of `sql/apply/11_notifications.sql`.
    fn notify(
        &mut self,
        event: &'e Event<'_>,
        op: &'e Op<'_>,
        ending: &str,
        recipient: Cow<'e, str>,
        reason: &'static str,
        about: Option<Cow<'e, str>>,
    ) {
        let uri = format!("{}#notification{ending}", op.uri);
        if recipient.starts_with("did:")
            && recipient != event.repo
            && fits(&recipient, MAX_DID)
            && fits(&uri, MAX_NOTIFICATION)
            && about.as_deref().is_none_or(|about| fits(about, MAX_NOTIFICATION))
        {
            let cid = op.cid.as_deref();
            self.notifications.push(uri, recipient, &event.repo, reason, about, cid, op.sort_at);
        }
    }
}

/// A post's fields: see `sql/apply/30_posts.sql`.
#[derive(Deserialize)]
struct Body<'e> {
    #[serde(borrow)]
    text: Cow<'e, str>,
    #[serde(borrow, default)]
    parent_uri: Option<Cow<'e, str>>,
    #[serde(borrow, default)]
    parent_cid: Option<Cow<'e, str>>,
    #[serde(borrow, default)]
    root_uri: Option<Cow<'e, str>>,
    #[serde(borrow, default)]
    root_cid: Option<Cow<'e, str>>,
    #[serde(borrow, default)]
    embed: Option<&'e RawValue>,
    #[serde(borrow, default)]
    langs: Option<&'e RawValue>,
    #[serde(borrow, default)]
    tags: Option<&'e RawValue>,
    #[serde(borrow, default)]
    facets: Option<&'e RawValue>,
    #[serde(borrow, default)]
    labels: Option<&'e RawValue>,
}

impl<'e> Body<'e> {
    fn of(op: &'e Op<'_>) -> Option<Self> {
        serde_json::from_str(&op.body.as_ref()?.0).ok()
    }
}

/// Whether a post can be written as columns: one with labels of its own cannot.
pub(super) fn is_plain(op: &Op<'_>) -> bool {
    let readable = |facets: &RawValue| mentioned(facets.get()).is_some();
    Body::of(op).is_some_and(|body| body.labels.is_none() && body.facets.is_none_or(readable))
}

/// Whether a record may have labels of its own.
pub(super) fn has_labels(op: &Op<'_>) -> bool {
    op.body.as_ref().is_some_and(|body| body.0.contains("\"labels\""))
}

fn authority(uri: &str) -> &str {
    uri.split('/').nth(2).unwrap_or_default()
}

/// Whether a text has at most this many characters.
fn fits(text: &str, most: usize) -> bool {
    text.len() <= most || text.chars().count() <= most
}

/// The URI of the repost through which something was liked or reposted.
fn uri_of(via: &Json<'_>) -> Option<String> {
    let via: Value = serde_json::from_str(&via.0).ok()?;
    let uri = via.get("uri")?.as_str()?;
    uri.starts_with("at://").then(|| uri.to_owned())
}

/// The accounts that facets mention: each once, in order of appearance. Like `standpipe.mentioned`. `None`: they are
/// nested too deeply to be read here.
fn mentioned(facets: &str) -> Option<Vec<String>> {
    const MENTION: &str = "app.bsky.richtext.facet#mention";
    // Without an escape in it, a text that contains the word contains it as it is.
    if !facets.contains(MENTION) && !facets.contains('\\') {
        return Some(Vec::new());
    }
    let facets: Value = serde_json::from_str(facets).ok()?;
    let facets = facets.as_array()?;
    let mut dids: Vec<String> = Vec::new();
    let features = facets.iter().filter_map(|facet| facet.get("features")?.as_array()).flatten();
    for feature in features {
        let did = feature.get("did").and_then(Value::as_str).filter(|did| did.starts_with("did:"));
        if feature.get("$type").and_then(Value::as_str) == Some(MENTION)
            && let Some(did) = did
            && !dids.iter().any(|known| known == did)
        {
            dids.push(did.to_owned());
            if dids.len() == MAX_MENTIONS {
                break;
            }
        }
    }
    Some(dids)
}
