//! What the tables have to contain: a small, slow and independent oracle.
//!
//! It was written from the design and the contract and shares no code with `src/apply` or `sql/`: no parser, no
//! comparison, no date arithmetic. It never applies anything: it takes all events as a set, finds the newest write of
//! every record and register, and derives the tables from those.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;

use serde_json::{Map, Value, json};
use tokio_postgres::{Client, SimpleQueryMessage};

// ---------------------------------------------------------------------------------------------
// What goes in

/// What orders events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    pub rev: Option<String>,
    pub seq: Option<i64>,
    /// The stream entry's id.
    pub id: (u64, u64),
}

/// An event as its sender meant it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub version: Version,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Commit { repo: String, ops: Vec<Op> },
    Identity { did: String, handle: Option<String> },
    Account { did: String, active: bool, status: Option<String>, time: Option<String> },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Op {
    pub action: String,
    pub path: String,
    pub cid: Option<String>,
    /// `Null` for a delete.
    pub record: Value,
}

// ---------------------------------------------------------------------------------------------
// What comes out

/// A row by the names of its columns: text, numbers and booleans as such, times as [`timestamp`] writes them,
/// `jsonb` as its value, NULL as null.
pub type Row = BTreeMap<&'static str, Value>;

/// Rows by their primary key.
pub type Rows = BTreeMap<String, Row>;

/// Every table that the model covers, by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Tables(pub BTreeMap<&'static str, Rows>);

impl Tables {
    pub fn rows(&self, table: &str) -> &Rows {
        &self.0[table]
    }

    /// What the tables say, without which commit said it, since a repair says it again; and without the counters of what
    /// nothing refers to, since a repair does not know what once did.
    #[must_use]
    pub fn without_versions(mut self) -> Self {
        self.rows_mut("post_aggregations").retain(|_, row| {
            row.iter().any(|(column, count)| column.ends_with("_count") && count.as_i64() != Some(0))
        });
        for row in self.0.values_mut().flat_map(BTreeMap::values_mut) {
            row.retain(|column, _| !matches!(&**column, "commit_rev" | "commit_seq"));
        }
        self
    }

    /// A column of a table, by the rows' keys.
    pub fn values(&self, table: &'static str, column: &str) -> BTreeMap<String, Value> {
        let rows = self.rows(table).iter();
        rows.map(|(key, row)| (key.clone(), row.get(column).cloned().unwrap_or_default())).collect()
    }

    /// Takes over the dates of `other` where these are the ones that were found.
    pub fn accept_dates(&mut self, other: &Tables, found: &Tables) {
        for (table, rows) in &mut self.0 {
            for (key, row) in rows {
                for (column, cell) in
                    row.iter_mut().filter(|(column, _)| matches!(**column, "created_at" | "sort_at"))
                {
                    let cell_of = |tables: &Tables| Some(tables.rows(table).get(key)?.get(column)?.clone());
                    if let Some(theirs) =
                        cell_of(other).filter(|theirs| cell_of(found).as_ref() == Some(theirs))
                    {
                        *cell = theirs;
                    }
                }
            }
        }
    }

    /// What the repositories say, without what only events tell: handles and statuses.
    #[must_use]
    pub fn of_repositories(mut self) -> Self {
        let users = self.rows_mut("users");
        for row in users.values_mut() {
            row.retain(|column, _| *column != "handle" && !column.starts_with("account_"));
        }
        users.retain(|_, row| row.values().any(|value| !value.is_null()));
        self
    }

    pub fn rows_mut(&mut self, table: &str) -> &mut Rows {
        self.0.get_mut(table).unwrap()
    }
}

#[derive(Clone, Copy)]
enum Column {
    Text,
    Int,
    Bool,
    Json,
    Time,
}

use Column::{Bool, Int, Json, Text, Time};

/// The tables and the columns that events determine. The first column is the key.
const TABLES: &[(&str, &[(&str, Column)])] = &[
    (
        "users",
        &[
            ("did", Text),
            ("handle", Text),
            ("display_name", Text),
            ("description", Text),
            ("avatar_url", Text),
            ("banner_url", Text),
            ("pinned_post", Json),
            ("profile_record", Json),
            ("account_active", Bool),
            ("account_status", Text),
        ],
    ),
    (
        "posts",
        &[
            ("uri", Text),
            ("cid", Text),
            ("author_did", Text),
            ("text", Text),
            ("langs", Json),
            ("tags", Json),
            ("parent_uri", Text),
            ("parent_cid", Text),
            ("root_uri", Text),
            ("root_cid", Text),
            ("embed", Json),
            ("facets", Json),
            ("has_thread_gate", Bool),
            ("has_post_gate", Bool),
            ("violates_thread_gate", Bool),
            ("violates_embedding_rules", Bool),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    ("likes", POINTER),
    ("reposts", POINTER),
    (
        "bookmarks",
        &[
            ("uri", Text),
            ("user_did", Text),
            ("post_uri", Text),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "follows",
        &[
            ("uri", Text),
            ("follower_did", Text),
            ("following_did", Text),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "blocks",
        &[
            ("uri", Text),
            ("blocker_did", Text),
            ("blocked_did", Text),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "lists",
        &[
            ("uri", Text),
            ("cid", Text),
            ("creator_did", Text),
            ("name", Text),
            ("purpose", Text),
            ("description", Text),
            ("avatar_url", Text),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "list_items",
        &[
            ("uri", Text),
            ("cid", Text),
            ("list_uri", Text),
            ("subject_did", Text),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "list_blocks",
        &[
            ("uri", Text),
            ("blocker_did", Text),
            ("list_uri", Text),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "starter_packs",
        &[
            ("uri", Text),
            ("cid", Text),
            ("creator_did", Text),
            ("name", Text),
            ("description", Text),
            ("list_uri", Text),
            ("feeds", Json),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "feed_generators",
        &[
            ("uri", Text),
            ("cid", Text),
            ("creator_did", Text),
            ("did", Text),
            ("display_name", Text),
            ("description", Text),
            ("avatar_url", Text),
            ("like_count", Int),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "labeler_services",
        &[
            ("uri", Text),
            ("cid", Text),
            ("creator_did", Text),
            ("policies", Json),
            ("like_count", Int),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "labels",
        &[
            ("uri", Text),
            ("src", Text),
            ("subject", Text),
            ("val", Text),
            ("neg", Bool),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "verifications",
        &[
            ("uri", Text),
            ("cid", Text),
            ("subject_did", Text),
            ("handle", Text),
            ("verified_at", Time),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "thread_gates",
        &[
            ("post_uri", Text),
            ("owner_did", Text),
            ("allow_mentions", Bool),
            ("allow_following", Bool),
            ("allow_list_members", Bool),
            ("allow_list_uris", Json),
            ("allow", Json),
            ("hidden_replies", Json),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "post_gates",
        &[
            ("post_uri", Text),
            ("embedding_rules", Json),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "notifications",
        &[
            ("uri", Text),
            ("recipient_did", Text),
            ("author_did", Text),
            ("reason", Text),
            ("reason_subject", Text),
            ("cid", Text),
            ("is_read", Bool),
            ("created_at", Time),
        ],
    ),
    (
        "quotes",
        &[
            ("uri", Text),
            ("cid", Text),
            ("post_uri", Text),
            ("quoted_uri", Text),
            ("quoted_cid", Text),
            ("created_at", Time),
        ],
    ),
    (
        "feed_items",
        &[
            ("uri", Text),
            ("post_uri", Text),
            ("originator_did", Text),
            ("type", Text),
            ("sort_at", Time),
            ("cid", Text),
            ("created_at", Time),
        ],
    ),
    (
        "generic_records",
        &[
            ("uri", Text),
            ("cid", Text),
            ("author_did", Text),
            ("record_type", Text),
            ("record", Json),
            ("created_at", Time),
            ("commit_rev", Text),
            ("commit_seq", Text),
        ],
    ),
    (
        "post_aggregations",
        &[
            ("post_uri", Text),
            ("like_count", Int),
            ("repost_count", Int),
            ("reply_count", Int),
            ("bookmark_count", Int),
            ("quote_count", Int),
        ],
    ),
];

const POINTER: &[(&str, Column)] = &[
    ("uri", Text),
    ("user_did", Text),
    ("post_uri", Text),
    ("subject_cid", Text),
    ("via", Json),
    ("created_at", Time),
    ("commit_rev", Text),
    ("commit_seq", Text),
];

/// The names of the tables, in the order in which they are shown.
pub fn table_names() -> impl Iterator<Item = &'static str> {
    TABLES.iter().map(|(name, _)| *name)
}

// ---------------------------------------------------------------------------------------------
// The model

/// A record's write: the last operation of its commit on its path.
struct Write<'a> {
    version: &'a Version,
    repo: &'a str,
    collection: &'a str,
    uri: String,
    /// `None` for a delete.
    put: Option<Put>,
}

/// The contents of a create or update, checked.
struct Put {
    cid: Option<String>,
    record: Map<String, Value>,
    /// The time of the revision or the stream entry.
    committed: i64,
    created_at: i64,
}

/// The tables after these events, which are a set: their order and repetitions do not matter.
///
/// # Panics
/// If the versions of the events contradict each other, so that there is no newest one and no correct result.
pub fn expected<'a>(events: impl IntoIterator<Item = &'a Event>) -> Tables {
    expected_with(events, Dates::Key)
}

/// What the date of a record without a usable one comes from, and after which date none is sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dates {
    /// The record's key or its commit, whichever is earlier.
    Key,
    /// Its commit: the rule of release 0.1.
    Commit,
}

/// The same with this rule for dates.
pub fn expected_with<'a>(events: impl IntoIterator<Item = &'a Event>, dates: Dates) -> Tables {
    let events: Vec<&Event> = events.into_iter().collect();
    let mut tables = Tables(TABLES.iter().map(|(name, _)| (*name, Rows::new())).collect());

    // Every record's newest write.
    let mut records: BTreeMap<String, Vec<Write<'_>>> = BTreeMap::new();
    for event in &events {
        for write in writes(event, dates) {
            records.entry(write.uri.clone()).or_default().push(write);
        }
    }
    let mut counters = Counters::default();
    let mut accounts = BTreeSet::new();
    for write in records.values().flatten() {
        // Any post that was ever referred to has its counters, even if the reference came too late.
        counters.posts.extend(referred_posts(write));
        if let (Some(put), "app.bsky.graph.follow" | "app.bsky.graph.block" | "app.bsky.graph.listitem") =
            (&write.put, write.collection)
        {
            accounts.insert(put.record["subject"].as_str().unwrap().to_owned());
        }
    }
    let deletions = deletions(&events);
    let mut profiles = BTreeMap::new();
    for writes in records.values() {
        let write = newest(writes, |one, other| newer(one.version, other.version));
        let Some(put) = &write.put else { continue };
        if deletions.get(write.repo).is_some_and(|deletion| deletion.takes(write.version)) {
            continue;
        }
        if write.collection == "app.bsky.actor.profile" && write.uri.ends_with("/self") {
            profiles.insert(write.repo.to_owned(), put.record.clone());
            label_self(&mut tables, write, put);
            continue;
        }
        store(&mut tables, &mut counters, write, put);
        notify(tables.rows_mut("notifications"), write, put);
    }
    counters.store(tables.rows_mut("post_aggregations"));
    for table in ["feed_generators", "labeler_services"] {
        for (uri, row) in tables.0.get_mut(table).unwrap() {
            row.insert("like_count", json!(counters.count(uri, "like_count")));
        }
    }
    judge(&mut tables);

    for event in &events {
        accounts.insert(about(event).to_owned());
    }
    let handles = shown_handles(&events);
    let statuses = statuses(&events);
    for did in accounts {
        let profile = profiles.get(&did);
        let field = |name: &str| profile.map_or(Value::Null, |record| or_null(record, name));
        let (active, status) = statuses.get(did.as_str()).cloned().unwrap_or((true, None));
        let row = Row::from([
            ("handle", json!(handles.get(did.as_str()).map_or("handle.invalid", String::as_str))),
            ("display_name", field("displayName")),
            ("description", field("description")),
            ("avatar_url", blob_cid(&field("avatar"))),
            ("banner_url", blob_cid(&field("banner"))),
            ("pinned_post", field("pinnedPost")),
            ("profile_record", profile.map_or(Value::Null, |record| Value::Object(record.clone()))),
            ("account_active", json!(active)),
            ("account_status", json!(status)),
        ]);
        insert(tables.rows_mut("users"), "did", did, row);
    }
    tables
}

/// Whether one version is newer than the other; equal versions are not. By number, then by revision, then by
/// the entry's id; a version that lacks one is older than a version that has it. (Within named epochs the
/// revision comes first; for the events of one relay the order is the same.)
fn newer(one: &Version, other: &Version) -> bool {
    (one.seq, &one.rev, one.id) > (other.seq, &other.rev, other.id)
}

/// The newest item.
fn newest<T>(items: &[T], newer: impl Fn(&T, &T) -> bool) -> &T {
    let best = items.iter().reduce(|best, item| if newer(item, best) { item } else { best }).unwrap();
    assert!(
        !items.iter().any(|item| newer(item, best)),
        "the versions of these events contradict each other: none is the newest"
    );
    best
}

/// The account that an event is about.
fn about(event: &Event) -> &str {
    match &event.kind {
        Kind::Commit { repo, .. } => repo,
        Kind::Identity { did, .. } | Kind::Account { did, .. } => did,
    }
}

fn writes(event: &Event, dates: Dates) -> Vec<Write<'_>> {
    let Kind::Commit { repo, ops } = &event.kind else { return Vec::new() };
    // The last one on a path wins, good or bad: the reader drops the others before they are judged.
    let last: HashMap<&str, &Op> = ops.iter().map(|op| (op.path.as_str(), op)).collect();
    last.into_iter()
        .filter_map(|(path, op)| {
            let (collection, rkey) = path.split_once('/')?;
            if !is_record_key(rkey) || !collection.contains('.') {
                return None;
            }
            let put = match op.action.as_str() {
                "delete" => None,
                "create" | "update" => {
                    // A gate belongs to the post with the same record key. A gate for another post has no
                    // effect.
                    let its_post = format!("at://{repo}/app.bsky.feed.post/{rkey}");
                    let post = op.record["post"].as_str();
                    let is_gate = matches!(collection, THREAD_GATE | POST_GATE);
                    if is_gate && post.is_some_and(|post| post.replace('\0', "") != its_post) {
                        None
                    } else {
                        Some(checked(op, (collection, rkey), &event.version, dates)?)
                    }
                }
                _ => return None,
            };
            Some(Write { version: &event.version, repo, collection, uri: format!("at://{repo}/{path}"), put })
        })
        .collect()
}

fn is_record_key(rkey: &str) -> bool {
    !rkey.is_empty() && rkey.chars().all(|c| c.is_ascii_alphanumeric() || "._:~-".contains(c))
}

/// The contents of an operation; `None` if something that its row needs is missing or impossible.
fn checked(op: &Op, (collection, rkey): (&str, &str), version: &Version, dates: Dates) -> Option<Put> {
    let Value::Object(record) = without_nul(&op.record) else { return None };
    let good = match collection {
        "app.bsky.feed.post" => op.cid.is_some() && is_post(&record),
        "app.bsky.feed.like" | "app.bsky.bookmark" => strong_ref(record.get("subject")?).is_some(),
        "app.bsky.feed.repost" => op.cid.is_some() && strong_ref(record.get("subject")?).is_some(),
        "app.bsky.graph.follow" | "app.bsky.graph.block" => {
            record.get("subject")?.as_str()?.starts_with("did:")
        }
        "app.bsky.actor.profile" if op.path.ends_with("/self") => {
            ["displayName", "description"].iter().all(|name| {
                let value = or_null(&record, name);
                value.is_null() || value.is_string()
            })
        }
        "app.bsky.graph.list" => {
            op.cid.is_some()
                && ["name", "purpose"].iter().all(|name| or_null(&record, name).is_string())
                && is_text_or_none(&record, "description")
        }
        "app.bsky.graph.listitem" => {
            op.cid.is_some() && is_did(record.get("subject")?) && is_at_uri(record.get("list")?)
        }
        "app.bsky.graph.listblock" => is_at_uri(record.get("subject")?),
        "app.bsky.graph.starterpack" => {
            op.cid.is_some()
                && record.get("name")?.is_string()
                && is_at_uri(record.get("list")?)
                && is_text_or_none(&record, "description")
                && is_list_or_none(&record, "feeds")
        }
        "app.bsky.feed.generator" => {
            op.cid.is_some()
                && is_did(record.get("did")?)
                && record.get("displayName")?.is_string()
                && is_text_or_none(&record, "description")
        }
        "app.bsky.labeler.service" => op.cid.is_some() && record.get("policies")?.is_object(),
        "com.atproto.label.label" => {
            (is_did(record.get("uri")?) || is_at_uri(record.get("uri")?))
                && record.get("val")?.is_string()
                && (or_null(&record, "neg").is_null() || or_null(&record, "neg").is_boolean())
        }
        "app.bsky.graph.verification" => {
            op.cid.is_some() && is_did(record.get("subject")?) && record.get("handle")?.is_string()
        }
        THREAD_GATE | POST_GATE => {
            record.get("post")?.is_string()
                && (collection == POST_GATE
                    || ["allow", "hiddenReplies"].iter().all(|name| is_list_or_none(&record, name)))
                && (collection == THREAD_GATE
                    || ["embeddingRules", "detachedEmbeddingUris"]
                        .iter()
                        .all(|name| is_list_or_none(&record, name)))
        }
        _ => op.cid.is_some(),
    };
    let committed = match &version.rev {
        Some(rev) => tid_micros(rev).unwrap(),
        None => i64::try_from(version.id.0).unwrap() * 1000,
    };
    let key = tid_micros(rkey).filter(|_| dates == Dates::Key);
    let committed = key.map_or(committed, |key| key.min(committed));
    let dated = match collection {
        "com.atproto.label.label" if !or_null(&record, "cts").is_null() => "cts",
        _ => "createdAt",
    };
    let created_at = record.get(dated).and_then(Value::as_str).and_then(micros_of).unwrap_or(committed);
    good.then(|| Put { cid: op.cid.clone(), record, committed, created_at })
}

fn is_post(record: &Map<String, Value>) -> bool {
    let is = |name: &str, right: fn(&Value) -> bool| {
        let value = or_null(record, name);
        value.is_null() || right(&value)
    };
    let reply = or_null(record, "reply");
    is("text", Value::is_string)
        && is("langs", Value::is_array)
        && is("tags", Value::is_array)
        && is("facets", Value::is_array)
        && is("embed", Value::is_object)
        && (reply.is_null()
            || (strong_ref(&reply["parent"]).is_some() && strong_ref(&reply["root"]).is_some()))
}

/// The URI, and the CID if it has one.
fn strong_ref(value: &Value) -> Option<(String, Value)> {
    let uri = value["uri"].as_str().filter(|uri| uri.starts_with("at://"))?;
    let cid = &value["cid"];
    (cid.is_null() || cid.is_string()).then(|| (uri.to_owned(), cid.clone()))
}

/// The post that a post quotes. Other records can be embedded in the same way, but do not count as quoted.
fn quoted(record: &Map<String, Value>) -> Option<(String, Value)> {
    let embed = record.get("embed")?;
    let target = match embed["$type"].as_str()? {
        "app.bsky.embed.record" => &embed["record"],
        "app.bsky.embed.recordWithMedia" => &embed["record"]["record"],
        _ => return None,
    };
    strong_ref(target).filter(|(uri, _)| uri.contains("/app.bsky.feed.post/"))
}

fn referred_posts(write: &Write<'_>) -> Vec<String> {
    let Some(put) = &write.put else { return Vec::new() };
    let subject = || put.record.get("subject").and_then(strong_ref).map(|(uri, _)| uri);
    match write.collection {
        "app.bsky.feed.like" | "app.bsky.feed.repost" | "app.bsky.bookmark" => {
            subject().into_iter().collect()
        }
        // These have a counter of their own from the beginning.
        "app.bsky.feed.generator" | "app.bsky.labeler.service" => vec![write.uri.clone()],
        "app.bsky.feed.post" => [write.uri.clone()]
            .into_iter()
            .chain(put.record.get("reply").and_then(|reply| strong_ref(&reply["parent"])).map(|(uri, _)| uri))
            .chain(quoted(&put.record).map(|(uri, _)| uri))
            .collect(),
        _ => Vec::new(),
    }
}

/// Adds the rows of a live record.
fn store(tables: &mut Tables, counters: &mut Counters, write: &Write<'_>, put: &Put) {
    let Put { cid, record, committed, created_at } = put;
    let created = timestamp(*created_at);
    let sort_at = timestamp(*created_at.min(committed));
    let uri = &write.uri;
    let versioned = |row: &mut Row| {
        row.insert("created_at", json!(created));
        row.insert("commit_rev", json!(write.version.rev));
        row.insert("commit_seq", json!(write.version.seq.map(|seq| seq.to_string())));
    };
    match write.collection {
        "app.bsky.feed.post" => {
            let reply = |part: &str| strong_ref(&or_null(record, "reply")[part]);
            let (parent, root) = (reply("parent"), reply("root"));
            let uri_of = |one: &Option<(String, Value)>| json!(one.as_ref().map(|(uri, _)| uri));
            let cid_of = |one: &Option<(String, Value)>| one.clone().map_or(Value::Null, |(_, cid)| cid);
            let or = |name: &str, default: Value| match or_null(record, name) {
                Value::Null => default,
                value => value,
            };
            let mut row = Row::from([
                ("cid", json!(cid)),
                ("author_did", json!(write.repo)),
                ("text", or("text", json!(""))),
                ("langs", or_null(record, "langs")),
                ("tags", or("tags", json!([]))),
                ("parent_uri", uri_of(&parent)),
                ("parent_cid", cid_of(&parent)),
                ("root_uri", uri_of(&root)),
                ("root_cid", cid_of(&root)),
                ("embed", or_null(record, "embed")),
                ("facets", or_null(record, "facets")),
            ]);
            versioned(&mut row);
            insert(tables.rows_mut("posts"), "uri", uri.clone(), row);
            label_self(tables, write, put);
            let item = Row::from([
                ("post_uri", json!(uri)),
                ("originator_did", json!(write.repo)),
                ("type", json!(if parent.is_some() { "reply" } else { "post" })),
                ("sort_at", json!(sort_at)),
                ("cid", json!(cid)),
                ("created_at", json!(created)),
            ]);
            insert(tables.rows_mut("feed_items"), "uri", uri.clone(), item);
            if let Some((parent, _)) = parent {
                counters.add("reply_count", parent, uri);
            }
            if let Some((target, target_cid)) = quoted(record) {
                let row = Row::from([
                    ("cid", json!(cid)),
                    ("post_uri", json!(uri)),
                    ("quoted_uri", json!(target)),
                    ("quoted_cid", target_cid),
                    ("created_at", json!(created)),
                ]);
                insert(tables.rows_mut("quotes"), "uri", uri.clone(), row);
                counters.add("quote_count", target, uri);
            }
        }
        "app.bsky.feed.like" | "app.bsky.feed.repost" | "app.bsky.bookmark" => {
            let (post, post_cid) = strong_ref(&record["subject"]).unwrap();
            let (table, counter) = match write.collection {
                "app.bsky.feed.like" => ("likes", "like_count"),
                "app.bsky.feed.repost" => ("reposts", "repost_count"),
                _ => ("bookmarks", "bookmark_count"),
            };
            counters.add(counter, post.clone(), write.repo);
            let mut row = Row::from([("user_did", json!(write.repo)), ("post_uri", json!(post))]);
            if table != "bookmarks" {
                row.insert("subject_cid", post_cid);
                row.insert("via", or_null(record, "via"));
            }
            versioned(&mut row);
            insert(tables.rows_mut(table), "uri", uri.clone(), row);
            if table == "reposts" {
                let item = Row::from([
                    ("post_uri", json!(post)),
                    ("originator_did", json!(write.repo)),
                    ("type", json!("repost")),
                    ("sort_at", json!(sort_at)),
                    ("cid", json!(cid)),
                    ("created_at", json!(created)),
                ]);
                insert(tables.rows_mut("feed_items"), "uri", uri.clone(), item);
            }
        }
        "app.bsky.graph.follow" | "app.bsky.graph.block" => {
            let (table, from, to) = match write.collection {
                "app.bsky.graph.follow" => ("follows", "follower_did", "following_did"),
                _ => ("blocks", "blocker_did", "blocked_did"),
            };
            let mut row = Row::from([(from, json!(write.repo)), (to, record["subject"].clone())]);
            versioned(&mut row);
            insert(tables.rows_mut(table), "uri", uri.clone(), row);
        }
        THREAD_GATE => {
            let allow = or_null(record, "allow");
            let has = |rule: &str| json!(allow.is_null() || !rules(&allow, rule).is_empty());
            let lists: Vec<&Value> = rules(&allow, "app.bsky.feed.threadgate#listRule")
                .iter()
                .map(|rule| &rule["list"])
                .filter(|list| list.is_string())
                .collect();
            let mut row = Row::from([
                ("owner_did", json!(write.repo)),
                ("allow_mentions", has("app.bsky.feed.threadgate#mentionRule")),
                ("allow_following", has("app.bsky.feed.threadgate#followingRule")),
                ("allow_list_members", has("app.bsky.feed.threadgate#listRule")),
                ("allow_list_uris", json!(lists)),
                ("hidden_replies", or_null(record, "hiddenReplies")),
            ]);
            row.insert("allow", allow);
            versioned(&mut row);
            insert(tables.rows_mut("thread_gates"), "post_uri", gated_post(uri), row);
        }
        POST_GATE => {
            let list = |name: &str| match or_null(record, name) {
                Value::Null => json!([]),
                list => list,
            };
            let rules = json!({"embeddingRules": list("embeddingRules"),
                "detachedEmbeddingUris": list("detachedEmbeddingUris")});
            let mut row = Row::from([("embedding_rules", rules)]);
            versioned(&mut row);
            insert(tables.rows_mut("post_gates"), "post_uri", gated_post(uri), row);
        }
        collection if TABLE_OF.iter().any(|(name, _)| *name == collection) => {
            let (_, table) = TABLE_OF.iter().find(|(name, _)| *name == collection).unwrap();
            let field = |name: &str| or_null(record, name);
            let mut row = match *table {
                "lists" => Row::from([
                    ("creator_did", json!(write.repo)),
                    ("name", field("name")),
                    ("purpose", field("purpose")),
                    ("description", field("description")),
                    ("avatar_url", blob_cid(&field("avatar"))),
                ]),
                "list_items" => Row::from([("list_uri", field("list")), ("subject_did", field("subject"))]),
                "list_blocks" => {
                    Row::from([("blocker_did", json!(write.repo)), ("list_uri", field("subject"))])
                }
                "starter_packs" => Row::from([
                    ("creator_did", json!(write.repo)),
                    ("name", field("name")),
                    ("description", field("description")),
                    ("list_uri", field("list")),
                    (
                        "feeds",
                        items(&field("feeds"))
                            .iter()
                            .map(|feed| feed["uri"].clone())
                            .filter(Value::is_string)
                            .collect(),
                    ),
                ]),
                "feed_generators" => Row::from([
                    ("creator_did", json!(write.repo)),
                    ("did", field("did")),
                    ("display_name", field("displayName")),
                    ("description", field("description")),
                    ("avatar_url", blob_cid(&field("avatar"))),
                ]),
                "labeler_services" => {
                    Row::from([("creator_did", json!(write.repo)), ("policies", field("policies"))])
                }
                "labels" => Row::from([
                    // Whatever the record claims, its source is the repository's owner.
                    ("src", json!(write.repo)),
                    ("subject", field("uri")),
                    ("val", field("val")),
                    ("neg", json!(field("neg") == json!(true))),
                ]),
                _ => Row::from([
                    ("subject_did", field("subject")),
                    ("handle", field("handle")),
                    ("verified_at", json!(created)),
                ]),
            };
            if !matches!(*table, "list_blocks" | "labels") {
                row.insert("cid", json!(cid));
            }
            versioned(&mut row);
            insert(tables.rows_mut(table), "uri", uri.clone(), row);
        }
        collection => {
            let record_type = record.get("$type").and_then(Value::as_str).filter(|name| !name.is_empty());
            let mut row = Row::from([
                ("cid", json!(cid)),
                ("author_did", json!(write.repo)),
                ("record_type", json!(record_type.unwrap_or(collection))),
                ("record", Value::Object(record.clone())),
            ]);
            versioned(&mut row);
            insert(tables.rows_mut("generic_records"), "uri", uri.clone(), row);
        }
    }
}

const THREAD_GATE: &str = "app.bsky.feed.threadgate";
const POST_GATE: &str = "app.bsky.feed.postgate";

/// Collections whose rows mirror their records.
const TABLE_OF: &[(&str, &str)] = &[
    ("app.bsky.graph.list", "lists"),
    ("app.bsky.graph.listitem", "list_items"),
    ("app.bsky.graph.listblock", "list_blocks"),
    ("app.bsky.graph.starterpack", "starter_packs"),
    ("app.bsky.feed.generator", "feed_generators"),
    ("app.bsky.labeler.service", "labeler_services"),
    ("com.atproto.label.label", "labels"),
    ("app.bsky.graph.verification", "verifications"),
];

fn is_did(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.starts_with("did:"))
}

fn is_at_uri(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.starts_with("at://"))
}

fn is_text_or_none(record: &Map<String, Value>, name: &str) -> bool {
    matches!(or_null(record, name), Value::Null | Value::String(_))
}

fn is_list_or_none(record: &Map<String, Value>, name: &str) -> bool {
    matches!(or_null(record, name), Value::Null | Value::Array(_))
}

/// The items of a list; none if it is not a list.
fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The members of a list that have this type.
fn rules<'a>(list: &'a Value, rule_type: &str) -> Vec<&'a Value> {
    items(list).iter().filter(|rule| rule["$type"] == json!(rule_type)).collect()
}

/// The post that a gate applies to.
fn gated_post(gate: &str) -> String {
    gate.replacen("/app.bsky.feed.threadgate/", "/app.bsky.feed.post/", 1).replacen(
        "/app.bsky.feed.postgate/",
        "/app.bsky.feed.post/",
        1,
    )
}

/// The part of an at:// URI that names its owner.
fn owner(uri: &str) -> &str {
    uri.strip_prefix("at://").and_then(|rest| rest.split('/').next()).unwrap_or("")
}

/// Adds the self-labels of a post or profile.
fn label_self(tables: &mut Tables, write: &Write<'_>, put: &Put) {
    let labels = or_null(&put.record, "labels");
    let known = labels["$type"].is_null() || labels["$type"] == json!("com.atproto.label.defs#selfLabels");
    let mut values = Vec::new();
    for value in items(&labels["values"]).iter().filter_map(|label| label["val"].as_str()) {
        let length = value.chars().count();
        let fits = length > 0 && length <= 128 && write.uri.len() + 7 + length <= 8192;
        if known && fits && !values.contains(&value) && values.len() < 10 {
            values.push(value);
        }
    }
    for value in values {
        let row = Row::from([
            ("src", json!(write.repo)),
            ("subject", json!(write.uri)),
            ("val", json!(value)),
            ("neg", json!(false)),
            ("created_at", json!(timestamp(put.created_at))),
            ("commit_rev", json!(write.version.rev)),
            ("commit_seq", json!(write.version.seq.map(|seq| seq.to_string()))),
        ]);
        insert(tables.rows_mut("labels"), "uri", format!("{}#label/{value}", write.uri), row);
    }
}

/// The accounts that facets mention, in order.
fn mentioned(facets: &Value) -> Vec<&str> {
    let mut dids = Vec::new();
    for facet in items(facets) {
        for mention in rules(&facet["features"], "app.bsky.richtext.facet#mention") {
            if let Some(did) = mention["did"].as_str()
                && did.starts_with("did:")
                && !dids.contains(&did)
            {
                dids.push(did);
            }
        }
    }
    dids
}

/// Adds the notifications of a live record.
fn notify(rows: &mut Rows, write: &Write<'_>, put: &Put) {
    let Put { cid, record, committed, created_at } = put;
    let mut told: Vec<(String, String, String, Option<String>)> = Vec::new();
    let mut tell = |ending: &str, whom: &str, reason: &str, about: Option<&str>| {
        told.push((ending.to_owned(), whom.to_owned(), reason.to_owned(), about.map(str::to_owned)));
    };
    match write.collection {
        "app.bsky.graph.follow" => tell("", record["subject"].as_str().unwrap(), "follow", None),
        "app.bsky.feed.like" | "app.bsky.feed.repost" => {
            let reason = write.collection.rsplit('.').next().unwrap();
            let (subject, _) = strong_ref(&record["subject"]).unwrap();
            tell("", owner(&subject), reason, Some(&subject));
            let via = or_null(record, "via");
            if let Some(via) = via["uri"].as_str()
                && owner(via) != owner(&subject)
            {
                tell("/via-repost", owner(via), &format!("{reason}-via-repost"), Some(via));
            }
        }
        "app.bsky.feed.post" => {
            if let Some((parent, _)) = strong_ref(&or_null(record, "reply")["parent"]) {
                tell("/reply", owner(&parent), "reply", Some(&write.uri));
            }
            if let Some((target, _)) = quoted(record) {
                tell("/quote", owner(&target), "quote", Some(&write.uri));
            }
            for did in mentioned(&or_null(record, "facets")).into_iter().take(50) {
                tell(&format!("/mention/{did}"), did, "mention", Some(&write.uri));
            }
        }
        _ => {}
    }
    for (ending, whom, reason, about) in told {
        let key = format!("{}#notification{ending}", write.uri);
        let fits = key.len() <= 512 && about.as_ref().is_none_or(|about| about.chars().count() <= 512);
        if whom.starts_with("did:") && whom != write.repo && fits {
            let row = Row::from([
                ("recipient_did", json!(whom)),
                ("author_did", json!(write.repo)),
                ("reason", json!(reason)),
                ("reason_subject", json!(about)),
                ("cid", json!(cid)),
                ("is_read", json!(false)),
                ("created_at", json!(timestamp(*created_at.min(committed)))),
            ]);
            insert(rows, "uri", key, row);
        }
    }
}

/// Sets the flags of the posts, which depend on gates and on other posts.
fn judge(tables: &mut Tables) {
    let posts = tables.rows("posts").clone();
    let quotes = tables.rows("quotes").clone();
    let (threads, embeds) = (tables.rows("thread_gates").clone(), tables.rows("post_gates").clone());
    for (uri, row) in tables.rows_mut("posts") {
        row.insert("has_thread_gate", json!(threads.contains_key(uri)));
        row.insert("has_post_gate", json!(embeds.contains_key(uri)));
        let author = row["author_did"].as_str().unwrap().to_owned();
        let mut bad_reply = false;
        if let Some(root) = row["root_uri"].as_str()
            && let Some(gate) = threads.get(root)
        {
            let has = |rule: &str| !rules(&gate["allow"], &format!("{THREAD_GATE}#{rule}")).is_empty();
            let let_in = gate["allow"].is_null()
                || author == owner(root)
                // Whether these allow this author is decided when the post is displayed.
                || has("followerRule") || has("followingRule") || has("listRule")
                || has("mentionRule")
                    && posts.get(root).is_some_and(|root| mentioned(&root["facets"]).contains(&author.as_str()));
            bad_reply = !let_in || items(&gate["hidden_replies"]).contains(&json!(uri));
        }
        row.insert("violates_thread_gate", json!(bad_reply));
        let mut bad_quote = false;
        if let Some(quote) = quotes.get(uri)
            && let Some(gate) = quote["quoted_uri"].as_str().and_then(|target| embeds.get(target))
        {
            let said = &gate["embedding_rules"];
            let disabled = !rules(&said["embeddingRules"], "app.bsky.feed.postgate#disableRule").is_empty();
            bad_quote = disabled && author != owner(quote["quoted_uri"].as_str().unwrap())
                || items(&said["detachedEmbeddingUris"]).contains(&json!(uri));
        }
        row.insert("violates_embedding_rules", json!(bad_quote));
    }
}

/// The sets that are counted: an account or post counts once.
#[derive(Default)]
struct Counters {
    posts: BTreeSet<String>,
    sets: BTreeMap<(String, &'static str), BTreeSet<String>>,
}

impl Counters {
    fn add(&mut self, counter: &'static str, post: String, who: &str) {
        self.sets.entry((post, counter)).or_default().insert(who.to_owned());
    }

    fn count(&self, post: &str, counter: &'static str) -> usize {
        self.sets.get(&(post.to_owned(), counter)).map_or(0, BTreeSet::len)
    }

    fn store(&self, rows: &mut Rows) {
        const NAMES: [&str; 5] =
            ["like_count", "repost_count", "reply_count", "bookmark_count", "quote_count"];
        for post in &self.posts {
            let row = NAMES.into_iter().map(|name| (name, json!(self.count(post, name)))).collect();
            insert(rows, "post_uri", post.clone(), row);
        }
    }
}

/// The handles that are shown: the newest claim of each account, as long as no other account has claimed the
/// handle since.
fn shown_handles<'a>(events: &[&'a Event]) -> BTreeMap<&'a str, String> {
    let claims: Vec<(&Version, &str, String)> = events
        .iter()
        .filter_map(|event| match &event.kind {
            Kind::Identity { did, handle: Some(handle) } => {
                let handle = handle.to_lowercase();
                is_handle(&handle).then_some((&event.version, did.as_str(), handle))
            }
            _ => None,
        })
        .collect();
    let mut of_account: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    let mut of_handle: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for claim in &claims {
        of_account.entry(claim.1).or_default().push(claim);
        of_handle.entry(&claim.2).or_default().push(claim);
    }
    of_account
        .into_iter()
        .filter_map(|(did, own)| {
            let (_, _, handle) = newest(&own, |one, other| newer(one.0, other.0));
            let (_, owner, _) = newest(&of_handle[handle.as_str()], |one, other| newer(one.0, other.0));
            (*owner == did).then(|| (did, handle.clone()))
        })
        .collect()
}

fn is_handle(handle: &str) -> bool {
    let labels: Vec<&str> = handle.split('.').collect();
    handle != "handle.invalid"
        && handle.len() <= 253
        && labels.len() >= 2
        && labels.iter().all(|label| {
            (1..=63).contains(&label.len())
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
        && !labels[labels.len() - 1].starts_with(|c: char| c.is_ascii_digit())
}

/// The newest status of each account. Ordered by the relay's numbers, an event without one being older than
/// any; among those without, by the time that the events give, and by the stream if that is the same.
fn statuses<'a>(events: &[&'a Event]) -> BTreeMap<&'a str, (bool, Option<String>)> {
    type Status<'a> = (Option<i64>, (i64, (u64, u64)), bool, Option<&'a str>);
    let mut all: BTreeMap<&str, Vec<Status<'_>>> = BTreeMap::new();
    for event in events {
        if let Kind::Account { did, active, status, time } = &event.kind {
            let entry = i64::try_from(event.version.id.0).unwrap() * 1000;
            let time = time.as_deref().and_then(micros_of).unwrap_or(entry);
            let status = status.as_deref().filter(|status| !status.is_empty());
            all.entry(did).or_default().push((event.version.seq, (time, event.version.id), *active, status));
        }
    }
    let newer = |one: &Status<'_>, other: &Status<'_>| (one.0, one.1) > (other.0, other.1);
    all.into_iter()
        .map(|(did, all)| {
            let (_, _, active, status) = newest(&all, newer);
            (did, (*active, status.map(str::to_owned)))
        })
        .collect()
}

/// The newest deletion of an account, by its number and by its time.
struct Deletion {
    seq: Option<i64>,
    micros: i64,
}

impl Deletion {
    /// Whether a version is older than the deletion.
    fn takes(&self, version: &Version) -> bool {
        if let (Some(seq), Some(deleted)) = (version.seq, self.seq) {
            return seq < deleted;
        }
        let entry = i64::try_from(version.id.0).unwrap() * 1000;
        version.rev.as_deref().and_then(tid_micros).unwrap_or(entry) <= self.micros
    }
}

fn deletions<'a>(events: &[&'a Event]) -> BTreeMap<&'a str, Deletion> {
    let mut all: BTreeMap<&str, Deletion> = BTreeMap::new();
    for event in events {
        let Kind::Account { did, active: false, status: Some(status), time } = &event.kind else { continue };
        if status == "deleted" {
            let entry = i64::try_from(event.version.id.0).unwrap() * 1000;
            let micros = time.as_deref().and_then(micros_of).unwrap_or(entry);
            let newest = all.entry(did).or_insert(Deletion { seq: None, micros });
            newest.seq = newest.seq.max(event.version.seq);
            newest.micros = newest.micros.max(micros);
        }
    }
    all
}

fn blob_cid(blob: &Value) -> Value {
    match (&blob["ref"], &blob["ref"]["$link"], &blob["cid"]) {
        (Value::String(cid), _, _) | (_, Value::String(cid), _) | (_, _, Value::String(cid)) => json!(cid),
        _ => Value::Null,
    }
}

fn or_null(record: &Map<String, Value>, name: &str) -> Value {
    record.get(name).cloned().unwrap_or(Value::Null)
}

/// PostgreSQL can store every character except this one.
fn without_nul(value: &Value) -> Value {
    match value {
        Value::String(text) => json!(text.replace('\0', "")),
        Value::Array(items) => items.iter().map(without_nul).collect(),
        Value::Object(fields) => Value::Object(
            fields.iter().map(|(name, value)| (name.replace('\0', ""), without_nul(value))).collect(),
        ),
        other => other.clone(),
    }
}

fn insert(rows: &mut Rows, key_column: &'static str, key: String, mut row: Row) {
    row.insert(key_column, json!(key));
    assert!(rows.insert(key, row).is_none(), "two rows with one key");
}

// ---------------------------------------------------------------------------------------------
// Times, in microseconds since 1970

/// The microseconds in a TID.
pub fn tid_micros(tid: &str) -> Option<i64> {
    let digits: Option<Vec<u64>> =
        tid.chars().map(|c| "234567abcdefghijklmnopqrstuvwxyz".find(c).map(|digit| digit as u64)).collect();
    let digits = digits.filter(|digits| digits.len() == 13 && digits[0] < 16)?;
    let number = digits.into_iter().fold(0, |number, digit| number * 32 + digit);
    i64::try_from(number / 1024).ok()
}

/// The TID of this moment.
pub fn tid(micros: i64) -> String {
    let number = u64::try_from(micros).unwrap() * 1024;
    (0..13)
        .rev()
        .map(|place| char::from(b"234567abcdefghijklmnopqrstuvwxyz"[(number >> (5 * place) & 31) as usize]))
        .collect()
}

/// The moment that a datetime of the protocol names, truncated to microseconds; `None` if it is not one:
/// `YYYY-MM-DDTHH:MM:SS`, perhaps a fraction, and `Z` or `+HH:MM` or `-HH:MM`, but not `-00:00`.
pub fn micros_of(text: &str) -> Option<i64> {
    let mut rest = text;
    let mut number = |digits: usize, before: &str| {
        rest = rest.strip_prefix(before)?;
        let (digits, after) = rest.split_at_checked(digits)?;
        rest = after;
        digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<i64>().ok())?
    };
    let (year, month, day) = (number(4, "")?, number(2, "-")?, number(2, "-")?);
    let (hour, minute, second) = (number(2, "T")?, number(2, ":")?, number(2, ":")?);
    let mut micros = 0;
    if let Some(after) = rest.strip_prefix('.') {
        let end = after.find(|c: char| !c.is_ascii_digit())?;
        if end == 0 {
            return None;
        }
        for place in 0..6 {
            let digit = after.as_bytes()[..end].get(place).map_or(0, |byte| i64::from(byte - b'0'));
            micros = micros * 10 + digit;
        }
        rest = &after[end..];
    }
    let offset = if rest == "Z" {
        0
    } else {
        let sign = if rest.starts_with('-') { -1 } else { 1 };
        let (hours, minutes) = rest.strip_prefix(['+', '-'])?.split_once(':')?;
        if hours.len() != 2 || minutes.len() != 2 {
            return None;
        }
        let (hours, minutes): (i64, i64) = (hours.parse().ok()?, minutes.parse().ok()?);
        if hours > 23 || minutes > 59 || rest == "-00:00" {
            return None;
        }
        sign * (hours * 60 + minutes) * 60
    };
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=days).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    Some(
        (((days_before(year, month) + day - 1) * 24 + hour) * 60 + minute) * 60_000_000
            + (second - offset) * 1_000_000
            + micros,
    )
}

/// Days from 1970-01-01 to the first of a month, for the years 0 to 9999.
fn days_before(year: i64, month: i64) -> i64 {
    // Days before a year, counted from year 0, which is a leap year.
    let before = |year: i64| {
        let last = year - 1;
        if year <= 0 { 0 } else { year * 365 + last / 4 - last / 100 + last / 400 + 1 }
    };
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let months = [31, 28 + i64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    before(year) - before(1970) + months.iter().take(usize::try_from(month - 1).unwrap()).sum::<i64>()
}

/// The moment in UTC as `to_char` writes it for [`read`].
pub fn timestamp(micros: i64) -> String {
    let (days, rest) = (micros.div_euclid(86_400_000_000), micros.rem_euclid(86_400_000_000));
    let mut year = 1970 + days.div_euclid(366);
    while days_before(year + 1, 1) <= days {
        year += 1;
    }
    let month = (1..=12).rev().find(|month| days_before(year, *month) <= days).unwrap();
    let day = days - days_before(year, month) + 1;
    let (seconds, micros) = (rest / 1_000_000, rest % 1_000_000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}")
}

// ---------------------------------------------------------------------------------------------
// What the database contains

/// The tables as they are in the database.
pub async fn read(client: &Client) -> Tables {
    let mut tables = BTreeMap::new();
    for (name, columns) in TABLES {
        let list: Vec<String> = columns
            .iter()
            .map(|(column, kind)| match kind {
                Time => format!("to_char({column}, 'YYYY-MM-DD HH24:MI:SS.US')"),
                // Without the epoch that the number belongs to, which is chosen by the reader.
                _ if *column == "commit_seq" => format!("split_part({column}, '@', 1)"),
                _ => format!("{column}::text"),
            })
            .collect();
        let sql = format!("SELECT {} FROM {name}", list.join(", "));
        let mut rows = Rows::new();
        for message in client.simple_query(&sql).await.unwrap() {
            let SimpleQueryMessage::Row(found) = message else { continue };
            let row: Row = columns
                .iter()
                .enumerate()
                .map(|(index, (column, kind))| (*column, cell(*kind, found.get(index))))
                .collect();
            rows.insert(found.get(0).unwrap().to_owned(), row);
        }
        tables.insert(*name, rows);
    }
    Tables(tables)
}

fn cell(kind: Column, text: Option<&str>) -> Value {
    match (kind, text) {
        (_, None) => Value::Null,
        (Text | Time, Some(text)) => json!(text),
        (Int | Bool | Json, Some(text)) => serde_json::from_str(text).unwrap(),
    }
}

// ---------------------------------------------------------------------------------------------
// The difference

/// The differences between two states of the tables, one line each; empty if there are none.
pub fn differences(expected: &Tables, found: &Tables) -> Vec<String> {
    let mut lines = Vec::new();
    for table in table_names() {
        let (expected, found) = (expected.rows(table), found.rows(table));
        let keys: BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
        for key in keys {
            match (expected.get(key), found.get(key)) {
                (Some(row), None) => {
                    lines.push(format!("{table} {key}: is missing, should be {}", show(row)));
                }
                (None, Some(row)) => lines.push(format!("{table} {key}: should not be, is {}", show(row))),
                (Some(expected), Some(found)) => {
                    for (column, right) in expected {
                        let is = &found[column];
                        if is != right {
                            lines.push(format!("{table} {key}: {column} is {is}, should be {right}"));
                        }
                    }
                }
                (None, None) => unreachable!("the key comes from one of the two"),
            }
        }
    }
    lines
}

fn show(row: &Row) -> String {
    let mut out = String::new();
    for (column, value) in row.iter().filter(|(_, value)| !value.is_null()) {
        write!(out, "{}{column}={value}", if out.is_empty() { "" } else { " " }).unwrap();
    }
    out
}

/// # Panics
/// If the two differ, with the first differences.
#[track_caller]
pub fn assert_same(what: &str, expected: &Tables, found: &Tables) {
    let lines = differences(expected, found);
    assert!(lines.is_empty(), "{what}: {}", summary(&lines));
}

/// The first differences, and how many there are.
pub fn summary(lines: &[String]) -> String {
    let mut out = format!("{} differences", lines.len());
    for line in lines.iter().take(12) {
        write!(out, "\n  {line}").unwrap();
    }
    out
}
