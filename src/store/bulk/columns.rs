//! New records as columns: the rows of a batch, table by table, with the changes of counters.

use std::borrow::Cow;
use std::collections::HashSet;

use postgres_types::ToSql;
use serde_json::Value;

use super::sorted::{Sorted, Way};
use super::{Deltas, add};
use crate::event::{Event, Json, Kind, Micros, Op, Post};

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
    Follows {
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
        text: &'e str,
        langs: Option<&'e Json<'e>>,
        tags: &'e Json<'e>,
        parent_uri: Option<&'e str>,
        parent_cid: Option<&'e str>,
        root_uri: Option<&'e str>,
        root_cid: Option<&'e str>,
        embed: Option<&'e Json<'e>>,
        facets: Option<&'e Json<'e>>,
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
        arrived: i64,
    }
}

columns! {
    /// The labels that posts and profiles have of their own.
    Labels {
        uri: String,
        source: &'e str,
        subject: &'e str,
        value: Cow<'e, str>,
        created_at: Micros,
        rev: Option<&'e str>,
        seq: Option<&'e str>,
        ms: i64,
        sq: i64,
    }
}

impl<'e> Labels<'e> {
    /// Of profiles.
    pub(super) fn of_profiles(profiles: &[(&'e Event<'_>, &'e Op<'_>)]) -> Self {
        let mut labels = Self::default();
        for (event, op) in profiles {
            // Without an escape in it, a body that has labels contains the word as it is.
            let body = op.json().filter(|body| body.0.contains("labels"));
            let body: Option<Value> = body.and_then(|body| serde_json::from_str(&body.0).ok());
            let values = body.as_ref().and_then(|body| body.get("labels")?.as_array());
            for value in values.into_iter().flatten().filter_map(Value::as_str) {
                labels.add(event, op, Cow::Owned(value.to_owned()));
            }
        }
        labels
    }

    fn add(&mut self, event: &'e Event<'_>, op: &'e Op<'_>, value: Cow<'e, str>) {
        let (rev, seq, ms, sq) = version(event);
        let uri = format!("{}#label/{value}", op.uri);
        self.push(uri, &event.repo, &op.uri, value, op.created_at, rev, seq, ms, sq);
    }

    /// Their keys.
    pub(super) fn uris(&self) -> &Vec<String> {
        &self.uri
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
    follows: Follows<'e>,
    posts: Posts<'e>,
    quotes: Quotes<'e>,
    feed_items: FeedItems<'e>,
    notifications: Notifications<'e>,
    labels: Labels<'e>,
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
                (Kind::Follow, Some(subject)) => tables.follow(event, op, subject),
                _ => {
                    if let Some(post) = op.post() {
                        tables.post(event, op, post, deltas);
                    }
                }
            }
        }
        // A counter row exists as soon as anything refers to the post.
        for (_, op) in sorted.going(Way::Replaced).chain(sorted.going(Way::Stale)) {
            count_post(op, 0, deltas);
            if let (Kind::Like | Kind::Repost, Some(subject)) = (op.kind, op.subject.as_deref()) {
                add(deltas, Cow::Borrowed(subject), [0; 5]);
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
            (include_str!("../../../sql/bulk/posts.sql"), self.posts.parameters()),
            (include_str!("../../../sql/bulk/quotes.sql"), self.quotes.parameters()),
            (include_str!("../../../sql/bulk/feed_items.sql"), self.feed_items.parameters()),
            (include_str!("../../../sql/bulk/notifications.sql"), self.notifications.parameters()),
            (include_str!("../../../sql/bulk/labels.sql"), self.labels.parameters()),
        ]
    }

    fn pointer(&mut self, event: &'e Event<'_>, op: &'e Op<'_>, subject: &'e str) {
        let (rev, seq, ms, sq) = version(event);
        let via = op.json();
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

    fn follow(&mut self, event: &'e Event<'_>, op: &'e Op<'_>, subject: &'e str) {
        let (rev, seq, ms, sq) = version(event);
        self.follows.push(&op.uri, &event.repo, subject, op.created_at, rev, seq, ms, sq);
        self.notify(event, op, "", Cow::Borrowed(subject), "follow", None);
    }

    fn post(&mut self, event: &'e Event<'_>, op: &'e Op<'_>, post: &'e Post<'_>, deltas: &mut Deltas<'e>) {
        const NO_TAGS: &Json<'static> = &Json(Cow::Borrowed("[]"));
        let (rev, seq, ms, sq) = version(event);
        let cid = op.cid.as_deref();
        let parent = post.parent_uri.as_deref();
        let kind = if parent.is_some() { "reply" } else { "post" };
        self.feed_items.push(&op.uri, &op.uri, &event.repo, kind, op.sort_at, cid, op.created_at);
        count_post(op, 1, deltas);
        let about = || Some(Cow::Borrowed(&*op.uri));
        if let Some(parent) = parent {
            self.notify(event, op, "/reply", Cow::Borrowed(authority(parent)), "reply", about());
        }
        if let Some(quoted) = op.subject.as_deref() {
            self.quotes.push(&op.uri, cid, quoted, op.subject_cid.as_deref(), op.created_at);
            self.notify(event, op, "/quote", Cow::Borrowed(authority(quoted)), "quote", about());
        }
        for did in mentioned_in(post).unwrap_or_default() {
            self.notify(event, op, &format!("/mention/{did}"), Cow::Owned(did), "mention", about());
        }
        for label in &post.labels {
            self.labels.add(event, op, Cow::Borrowed(label));
        }
        self.posts.push(
            &op.uri,
            cid,
            &event.repo,
            &post.text,
            post.langs.as_ref(),
            post.tags.as_ref().unwrap_or(NO_TAGS),
            parent,
            post.parent_cid.as_deref(),
            op.root.as_deref(),
            post.root_cid.as_deref(),
            post.embed.as_ref(),
            post.facets.as_ref(),
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
            let (_, _, ms, _) = version(event);
            self.notifications.push(uri, recipient, &event.repo, reason, about, cid, op.sort_at, ms);
        }
    }
}

/// The counters that change with a post.
fn count_post<'e>(op: &'e Op<'_>, one: i32, deltas: &mut Deltas<'e>) {
    let Some(post) = op.post() else { return };
    add(deltas, Cow::Borrowed(&*op.uri), [0; 5]);
    if let Some(parent) = &post.parent_uri {
        add(deltas, Cow::Borrowed(&**parent), [0, 0, one, 0, 0]);
    }
    if let Some(quoted) = &op.subject {
        add(deltas, Cow::Borrowed(&**quoted), [0, 0, 0, one, 0]);
    }
}

/// The accounts that a post mentions. `None`: its facets are nested too deeply to be read here.
pub(super) fn mentioned_in(post: &Post<'_>) -> Option<Vec<String>> {
    post.facets.as_ref().map_or(Some(Vec::new()), |facets| mentioned(&facets.0))
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
