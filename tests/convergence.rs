//! Any set of events, in any order, with any repetitions, cut into any batches over any number of connections, gives
//! the tables that the model says.
//!
//! `STANDPIPE_SEED` chooses the cases and `STANDPIPE_CASES` how many there are. A failure prints the seed of its case
//! and the few events that are left of it when everything that does not matter is taken away.

mod support;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::{Value, json};
use standpipe::apply::{datetime, interpret};
use standpipe::config::{Role, from_env};
use standpipe::event::{EntryId, Event};
use standpipe::store::verdict::Verdict;
use standpipe::store::{Outcome, Store, audit, migrate};
use standpipe::stream::entry::Entry;
use support::model::{self, Kind, Op, Tables, Version};
use support::{Postgres, connect, wait_until};
use tokio_postgres::Client;

const CASES: u64 = 150;
const EVENTS: usize = 60;
const SESSIONS: usize = 3;

// ---------------------------------------------------------------------------------------------
// Applying

/// A migrated database of the test's own.
struct Database {
    url: String,
    store: Store,
    client: Client,
    /// The audit takes a transaction, and so a client of its own.
    auditor: tokio::sync::Mutex<Client>,
}

impl Database {
    /// One that standpipe made.
    async fn create() -> Self {
        Self::migrated(Postgres::shared().await.fresh_database().await).await
    }

    /// One that the old workers had made, with their indexes.
    async fn of_old_workers() -> Self {
        // The tables are where the old application has them, whatever the role is called.
        let url = Postgres::shared().await.fresh_database().await + "?options=-csearch_path%3Dpublic";
        let fixture = |name: &str| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
            let text = std::fs::read_to_string(path).unwrap();
            let lines = text.lines().skip(1);
            lines.map(|line| line.split('\t').map(str::to_owned).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        let mut columns = BTreeMap::<String, Vec<String>>::new();
        for line in fixture("existing-database.tsv") {
            let [table, name, kind, rest @ ..] = line.as_slice() else { panic!("{line:?}") };
            let null = rest.first().map_or("", String::as_str);
            let default = rest.get(1).filter(|default| !default.is_empty() && !default.contains("nextval"));
            let default = default.map(|default| format!("DEFAULT {default}")).unwrap_or_default();
            columns.entry(table.clone()).or_default().push(format!("{name} {kind} {default} {null}"));
        }
        let mut sql = String::new();
        for (table, columns) in columns {
            write!(sql, "CREATE TABLE {table} ({});", columns.join(", ")).unwrap();
        }
        for line in fixture("existing-indexes.tsv") {
            let [table, name, definition] = line.as_slice() else { panic!("{line:?}") };
            let unique = if definition.starts_with("UNIQUE ") { "UNIQUE" } else { "" };
            let definition = definition.trim_start_matches("UNIQUE ");
            write!(sql, "CREATE {unique} INDEX {name} ON {table} {definition};").unwrap();
        }
        connect(&url).await.batch_execute(&sql).await.unwrap();
        Self::migrated(url).await
    }

    async fn migrated(url: String) -> Self {
        let (config, _) = from_env([("DATABASE_URL", url.as_str())], Role::Worker).unwrap();
        let store = Store::new(&config).unwrap();
        migrate::migrate(store.session().await.unwrap().client_mut()).await.unwrap();
        let (client, auditor) = (connect(&url).await, connect(&url).await.into());
        Self { url, store, client, auditor }
    }

    /// As after the migration.
    async fn clear(&self) {
        let sql = "SELECT string_agg(format('%I.%I', schemaname, tablename), ', ') FROM pg_tables
                   WHERE schemaname IN ('public', 'standpipe') AND tablename NOT IN ('migrations', 'tables_before')";
        let tables: String = self.client.query_one(sql, &[]).await.unwrap().get(0);
        self.client.batch_execute(&format!("TRUNCATE {tables}")).await.unwrap();
        // As after a connection that broke: what the store knows of the accounts there may not be so.
        self.store.session().await.unwrap().discard();
    }

    /// Applies entries one after the other.
    async fn apply(&self, entries: &[Entry]) {
        let queue = Mutex::new(entries.chunks(20).map(<[Entry]>::to_vec).collect());
        apply_batches(&self.store, &queue).await;
    }

    /// Applies batches on several connections at a time, as pipelines do.
    async fn apply_in_parallel(&self, batches: Vec<Vec<Entry>>) {
        let (store, queue) = (self.store.clone(), Arc::new(Mutex::new(VecDeque::from(batches))));
        let tasks: Vec<_> = (0..SESSIONS)
            .map(|_| {
                let (store, queue) = (store.clone(), Arc::clone(&queue));
                tokio::spawn(async move { apply_batches(&store, &queue).await })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    }

    async fn tables(&self) -> Tables {
        model::read(&self.client).await
    }

    /// What the audit has to say.
    async fn audit(&self) -> Vec<String> {
        let findings = audit::audit(&mut *self.auditor.lock().await).await.unwrap();
        findings.iter().filter(|finding| finding.count > 0).map(ToString::to_string).collect()
    }
}

/// Takes batches until there are none, and applies each as a pipeline does: what lost to others again, what the
/// database refuses set aside.
async fn apply_batches(store: &Store, queue: &Mutex<VecDeque<Vec<Entry>>>) {
    loop {
        let Some(batch) = queue.lock().unwrap().pop_front() else { return };
        let session = store.session().await.unwrap();
        let mut open: Vec<Event<'_>> = batch
            .iter()
            .filter_map(|entry| interpret(entry).ok())
            .filter(|event| !event.repo.is_empty())
            .collect();
        let mut done = Vec::new();
        while !open.is_empty() {
            let results = session.apply(&open.iter().collect::<Vec<_>>()).await;
            let mut again = Vec::new();
            for (mut event, result) in open.into_iter().zip(results) {
                match result {
                    Ok(Outcome::Rejected(mut bad)) => {
                        bad.sort_by_key(|(index, _)| std::cmp::Reverse(*index));
                        for (index, _) in bad {
                            event.ops.remove(index);
                            event.sources.remove(index);
                        }
                        again.push(event);
                    }
                    Ok(Outcome::Applied(_)) => done.push(event),
                    Err(error) if error.verdict == Verdict::Retry => again.push(event),
                    Err(error) => panic!("{:?}: {error}", error.verdict),
                }
            }
            open = again;
        }
        session.flush(&done.iter().collect::<Vec<_>>()).await.unwrap();
    }
}

// ---------------------------------------------------------------------------------------------
// From the model's events to entries

/// An entry, and what it says to the model: nothing, when the program has to set it aside.
#[derive(Clone, Debug)]
struct Sent {
    entry: Entry,
    event: Option<model::Event>,
}

fn sent(event: model::Event, extra_ops: &[String]) -> Sent {
    let Version { rev, seq, id } = &event.version;
    let (event_type, data) = match &event.kind {
        Kind::Commit { repo, ops } => {
            let mut list: Vec<String> = ops.iter().map(|op| op_json(op).to_string()).collect();
            list.extend_from_slice(extra_ops);
            // Written by hand: an operation may be JSON that no tree can hold.
            let rev = rev.as_ref().map(|rev| format!(r#","rev":"{rev}""#)).unwrap_or_default();
            ("commit", format!(r#"{{"repo":"{repo}","ops":[{}]{rev}}}"#, list.join(",")))
        }
        Kind::Identity { did, handle } => ("identity", json!({"did": did, "handle": handle}).to_string()),
        Kind::Account { did, active, status, time } => {
            let mut data = json!({"did": did, "active": active});
            for (name, value) in [("status", status), ("time", time)] {
                if let Some(value) = value {
                    data[name] = json!(value);
                }
            }
            ("account", data.to_string())
        }
    };
    let entry = Entry {
        id: EntryId { ms: id.0, seq: id.1 },
        event_type: event_type.to_owned(),
        data,
        seq: seq.map(|seq| seq.to_string()).unwrap_or_default(),
    };
    Sent { entry, event: Some(event) }
}

fn op_json(op: &Op) -> Value {
    let mut out = json!({"action": op.action, "path": op.path});
    if let Some(cid) = &op.cid {
        out["cid"] = json!(cid);
    }
    if op.action != "delete" {
        out["record"] = op.record.clone();
    }
    out
}

// ---------------------------------------------------------------------------------------------
// Making up events

/// How the events of a set can be ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// All commits have revisions, all events the relay's numbers.
    Revisions,
    /// All have the relay's numbers, as from the Python reader.
    Numbers,
    /// Only the stream's ids.
    Stream,
    /// Each event has what it has. One order all the same, as from one relay.
    Mixed,
}

/// What most operations of a set are about, so that they meet each other.
const THEMES: [&[&str]; 6] = [
    &[
        "app.bsky.feed.post",
        "app.bsky.feed.post",
        "app.bsky.feed.post",
        "app.bsky.feed.like",
        "app.bsky.feed.like",
        "app.bsky.feed.like",
        "app.bsky.feed.repost",
        "app.bsky.feed.repost",
        "app.bsky.bookmark",
        "app.bsky.graph.follow",
        "app.bsky.graph.block",
        "app.bsky.actor.profile",
        "com.example.thing",
    ],
    &["app.bsky.feed.like"],
    &["app.bsky.feed.post"],
    &["app.bsky.feed.repost", "app.bsky.bookmark"],
    &["app.bsky.actor.profile", "com.example.thing"],
    &["app.bsky.graph.follow", "app.bsky.graph.block"],
];

const DIDS: [&str; 4] = ["did:plc:aaaa", "did:plc:bbbb", "did:web:c.example", "did:plc:dddd"];
const HANDLES: [&str; 3] = ["a.test", "b.test", "c-3.example.test"];
const START_MS: u64 = 1_795_234_668_000;

struct Maker {
    rng: Rng,
    order: Order,
    theme: &'static [&'static str],
    /// How many of a hundred events are commits; the others are about identities and account states.
    commits: u32,
    accounts: usize,
    /// How far each account's clock is off, in microseconds: revisions are only ordered within a repository.
    skews: Vec<i64>,
    ms: u64,
    sq: u64,
    seq: i64,
    made: usize,
}

impl Maker {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let order = [Order::Revisions, Order::Numbers, Order::Stream, Order::Mixed][rng.usize(..4)];
        let theme = THEMES[[0, 0, 0, 0, 0, 1, 2, 3, 4, 5][rng.usize(..10)]];
        let commits = [78, 78, 78, 5][rng.usize(..4)];
        let accounts = rng.usize(3..=4);
        let skews = DIDS.iter().map(|_| [0, -3_600_000_000, 86_400_000_000 * 400][rng.usize(..3)]).collect();
        Self { rng, order, theme, commits, accounts, skews, ms: START_MS, sq: 0, seq: 960, made: 0 }
    }

    /// The events in their order.
    fn events(&mut self) -> Vec<Sent> {
        (0..EVENTS).flat_map(|_| self.event()).collect()
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.u32(..100) < percent
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.rng.usize(..of.len())].clone()
    }

    fn account(&mut self) -> usize {
        self.rng.usize(..self.accounts)
    }

    fn did(&mut self) -> String {
        DIDS[self.account()].to_owned()
    }

    /// The next place in the order, for an event about this account.
    fn next_version(&mut self, account: usize, commit: bool) -> Version {
        self.made += 1;
        if self.chance(60) {
            // Room between the ids for repetitions of the same event.
            self.sq += 10;
        } else {
            self.ms += self.rng.u64(1..4000);
            self.sq = 0;
        }
        self.seq += self.rng.i64(1..4);
        let (rev, seq) = match self.order {
            Order::Revisions => (true, true),
            Order::Numbers => (false, true),
            Order::Stream => (false, false),
            Order::Mixed => self.one(&[(true, true), (false, true), (false, false)]),
        };
        let micros = i64::try_from(self.ms * 1000 + self.sq / 10).unwrap() + self.skews[account];
        Version {
            rev: (rev && commit).then(|| model::tid(micros)),
            seq: seq.then_some(self.seq),
            id: (self.ms, self.sq),
        }
    }

    fn event(&mut self) -> Vec<Sent> {
        let account = self.account();
        let did = DIDS[account].to_owned();
        if self.chance(self.commits) {
            return self.commit(account, did);
        }
        vec![match self.rng.u32(..28) {
            0..16 => {
                let version = self.next_version(account, false);
                let handle = match self.rng.u32(..10) {
                    0 => None,
                    1 => Some("handle.invalid".to_owned()),
                    2 => Some(self.one(&["no handle", "a.1test", "single", "-a.test", ""]).to_owned()),
                    3 => Some(self.one(&HANDLES).to_uppercase()),
                    _ => Some(self.one(&HANDLES).to_owned()),
                };
                sent(model::Event { version, kind: Kind::Identity { did, handle } }, &[])
            }
            16..25 => {
                let version = self.next_version(account, false);
                let status = |word: &str| Some(word.to_owned());
                let (active, status) = match self.rng.u32(..6) {
                    0 => (false, status("deactivated")),
                    1 => (false, status("takendown")),
                    2 => (false, status("deleted")),
                    3 => (false, None),
                    4 => (true, status("")),
                    _ => (true, None),
                };
                // Without it the time is the entry's, and one order is kept.
                let time = self.chance(50).then(|| iso(version.id.0));
                sent(model::Event { version, kind: Kind::Account { did, active, status, time } }, &[])
            }
            _ => self.foreign_entry(account),
        }]
    }

    fn commit(&mut self, account: usize, repo: String) -> Vec<Sent> {
        let version = self.next_version(account, true);
        let count = if self.chance(65) { 1 } else { self.rng.usize(0..6) };
        let mut ops: Vec<Op> = (0..count).map(|_| self.op(&repo)).collect();
        let extra = if self.chance(4) { vec![self.refused_op()] } else { Vec::new() };
        let mut rest = Vec::new();
        if version.seq.is_some() && self.chance(30) {
            // The reader splits a large commit over several entries, after it has dropped all but the last operation
            // on each path: both have the commit's revision and number.
            let mut seen = HashSet::new();
            ops.reverse();
            ops.retain(|op| seen.insert(op.path.clone()));
            ops.reverse();
            if ops.len() > 1 {
                rest = ops.split_off(self.rng.usize(1..ops.len()));
            }
        }
        let mut entries = vec![sent(
            model::Event { version: version.clone(), kind: Kind::Commit { repo: repo.clone(), ops } },
            &extra,
        )];
        if !rest.is_empty() {
            let version = Version { id: (version.id.0, version.id.1 + 5), ..version };
            entries.push(sent(model::Event { version, kind: Kind::Commit { repo, ops: rest } }, &[]));
        }
        entries
    }

    /// An entry that changes nothing: unreadable, or of a type that nobody asked for. Even its account is unknown.
    fn foreign_entry(&mut self, account: usize) -> Sent {
        let version = self.next_version(account, false);
        let (event_type, data, seq) = self.one(&[
            ("commit", "{", ""),
            ("commit", r#"{"repo":"did:plc:zzzz"}"#, ""),
            ("commit", r#"{"repo":"nobody","ops":[]}"#, ""),
            ("commit", r#"{"repo":"did:plc:zzzz","ops":[]}"#, "five"),
            ("identity", r#"{"did":"did:plc:zzzz","handle":7}"#, ""),
            ("account", r#"{"did":"did:plc:zzzz"}"#, ""),
            ("sync", r#"{"did":"did:plc:zzzz","rev":"3n2samfdihk2n"}"#, ""),
            ("tomorrow", r#"{"did":"did:plc:zzzz"}"#, ""),
        ]);
        let entry = Entry {
            id: EntryId { ms: version.id.0, seq: version.id.1 },
            event_type: event_type.to_owned(),
            data: data.to_owned(),
            seq: seq.to_owned(),
        };
        Sent { entry, event: None }
    }

    /// An operation that only the database refuses, on a path of its own, and that no JSON tree can hold.
    fn refused_op(&mut self) -> String {
        let deep = "[".repeat(20_000) + &"]".repeat(20_000);
        let value = self.one(&[r#""\ud800""#, "1e999999", &deep]).to_owned();
        format!(
            r#"{{"action":"create","path":"com.example.refused/{}","cid":"bafyx","record":{{"x":{value}}}}}"#,
            self.made
        )
    }

    fn op(&mut self, repo: &str) -> Op {
        let theme = if self.chance(90) { self.theme } else { THEMES[0] };
        let collection = self.one(theme);
        let rkey = match collection {
            "app.bsky.actor.profile" if self.chance(90) => "self",
            _ => self.one(&["1", "2", "weird:~_.-key"]),
        };
        let action = match self.rng.u32(..100) {
            0..48 => "create",
            48..66 => "update",
            66..98 => "delete",
            _ => "forget",
        };
        let path = if self.chance(1) {
            self.one(&["nonsense", "app.bsky.feed.post/", "app.bsky.feed.post/a b"]).to_owned()
        } else {
            format!("{collection}/{rkey}")
        };
        let mut record = if action == "delete" { Value::Null } else { self.record(collection, repo) };
        if action != "delete" && self.chance(5) {
            self.spoil(&mut record);
        }
        // Every version of a record has its own.
        let cid =
            (action != "delete" && self.chance(98)).then(|| format!("bafy{}x{}", self.made, self.rng.u8(..)));
        Op { action: action.to_owned(), path, cid, record }
    }

    fn record(&mut self, collection: &str, repo: &str) -> Value {
        let mut record = match collection {
            "app.bsky.feed.post" => self.post(repo),
            "app.bsky.feed.like" | "app.bsky.feed.repost" | "app.bsky.bookmark" => {
                let mut record = json!({"subject": self.post_ref()});
                if self.chance(20) {
                    record["via"] =
                        self.one(&[json!({"uri": "at://did:plc:bbbb/app.bsky.feed.repost/1"}), Value::Null]);
                }
                record
            }
            "app.bsky.graph.follow" | "app.bsky.graph.block" => json!({"subject": self.did_or_stranger()}),
            "app.bsky.actor.profile" => self.profile(),
            _ => {
                json!({"n": self.rng.i64(-3..3), "a\u{0}b": ["x\u{0}y", null, true, {"deep": {}}], "bytes": {"$bytes": "AQIDBA"}})
            }
        };
        if self.chance(70) {
            record["$type"] = json!(collection);
        }
        if let Some(created_at) = self.created_at() {
            record["createdAt"] = created_at;
        }
        record
    }

    /// Somebody of the set, or somebody of whom nothing else is heard.
    fn did_or_stranger(&mut self) -> String {
        if self.chance(15) { "did:plc:stranger".to_owned() } else { self.did() }
    }

    /// A post of few, whether it is ever written or not; sometimes another record.
    fn post_uri(&mut self) -> String {
        match self.rng.u32(..20) {
            0 => "at://did:plc:stranger/app.bsky.feed.post/never".to_owned(),
            1 => format!("at://{}/app.bsky.feed.generator/1", self.did()),
            _ => format!("at://{}/app.bsky.feed.post/{}", self.did(), self.rng.u8(1..=2)),
        }
    }

    fn post_ref(&mut self) -> Value {
        let mut one = json!({"uri": self.post_uri()});
        match self.rng.u32(..10) {
            0 => {}
            1 => one["cid"] = Value::Null,
            _ => one["cid"] = json!(format!("bafyref{}", self.rng.u8(..3))),
        }
        one
    }

    fn post(&mut self, repo: &str) -> Value {
        let texts = [
            json!("hello"),
            json!("NUL \u{0}\\u0000 \u{0}"),
            json!(""),
            json!("\u{202e}ü🏳️‍🌈\u{7}"),
            Value::Null,
        ];
        let mut post = json!({});
        if self.chance(90) {
            post["text"] = self.one(&texts);
        }
        if self.chance(45) {
            let own = json!({"uri": format!("at://{repo}/app.bsky.feed.post/1"), "cid": "bafyown"});
            let parent = if self.chance(15) { own } else { self.post_ref() };
            post["reply"] = json!({"parent": parent, "root": self.post_ref()});
        }
        let media = json!({"$type": "app.bsky.embed.images", "images": [{"alt": "a\u{0}b\\u0000"}]});
        if self.chance(50) {
            let target = self.post_ref();
            post["embed"] = match self.rng.u32(..6) {
                0 => media,
                1 => {
                    json!({"$type": "app.bsky.embed.recordWithMedia", "media": media, "record": {"record": target}})
                }
                2 => json!({"$type": "app.bsky.embed.record", "record": {"uri": 5}}),
                _ => json!({"$type": "app.bsky.embed.record", "record": target}),
            };
        }
        for (name, values) in [
            ("langs", [json!(["en", "d\u{0}e"]), json!([]), Value::Null]),
            ("tags", [json!(["one", "zwei\u{0}"]), json!([]), Value::Null]),
            ("facets", [json!([{"index": {"byteStart": 0, "byteEnd": 3}}]), json!([]), Value::Null]),
        ] {
            if self.chance(30) {
                post[name] = self.one(&values);
            }
        }
        post
    }

    fn profile(&mut self) -> Value {
        let mut profile = json!({"displayName": format!("name {}\u{0}", self.made)});
        for (name, values) in [
            ("description", vec![json!("first\nsecond"), json!(""), Value::Null]),
            (
                "avatar",
                vec![
                    json!({"$type": "blob", "ref": {"$link": "bafkavatar"}, "size": 1}),
                    json!({"cid": "bafkold", "mimeType": "image/png"}),
                    json!({"ref": "bafkplain"}),
                    json!(7),
                ],
            ),
            ("banner", vec![json!({"$type": "blob", "ref": {"$link": "bafkbanner"}}), Value::Null]),
            (
                "pinnedPost",
                vec![json!({"uri": "at://did:plc:aaaa/app.bsky.feed.post/1", "cid": "b"}), Value::Null],
            ),
        ] {
            if self.chance(40) {
                profile[name] = self.one(&values);
            }
        }
        profile
    }

    fn created_at(&mut self) -> Option<Value> {
        match self.rng.u32(..12) {
            0 => None,
            1 => Some(self.one(&[
                json!("yesterday"),
                json!(""),
                json!(5),
                json!("2026-13-01T00:00:00Z"),
                Value::Null,
            ])),
            2 => Some(json!("2031-01-01T00:00:00.000+05:30")),
            3 => Some(json!("1985-04-12T23:20:50.123456789123-11:59")),
            4 => Some(json!("1969-12-31T23:59:59.9999999Z")),
            _ => {
                let ms = START_MS - self.rng.u64(..1_000_000);
                Some(json!(iso(ms)))
            }
        }
    }

    /// Takes away what its row needs, if it needs anything.
    fn spoil(&mut self, record: &mut Value) {
        match self.rng.u32(..6) {
            0 => *record = json!([]),
            1 => record["subject"] = json!(5),
            2 => record["subject"] = json!({"cid": "bafy"}),
            3 => record["text"] = json!(["no", "text"]),
            4 => record["reply"] = json!({"parent": {"uri": "https://example.com"}}),
            _ => {
                record["embed"] = json!("nothing");
                record["displayName"] = json!(5);
                record["subject"] = Value::Null;
            }
        }
    }

    /// The entries in another order, some of them more than once, in batches.
    fn disorder(&mut self, sent: &[Sent]) -> Vec<Vec<Entry>> {
        let mut entries = Vec::new();
        for one in sent {
            entries.push(one.entry.clone());
            while self.chance(20) {
                entries.push(self.repetition(one));
            }
        }
        self.rng.shuffle(&mut entries);
        let mut batches = Vec::new();
        // Small ones meet each other most.
        let most = self.one(&[1, 4, 12, 40]);
        while !entries.is_empty() {
            let count = self.rng.usize(1..=most).min(entries.len());
            batches.push(entries.split_off(entries.len() - count));
        }
        batches
    }

    /// The same entry delivered again; or, where it can be told by its revision or number, appended again.
    fn repetition(&mut self, one: &Sent) -> Entry {
        let mut entry = one.entry.clone();
        let version = one.event.as_ref().map(|event| &event.version);
        if version.is_some_and(|version| version.rev.is_some() || version.seq.is_some()) && self.chance(30) {
            entry.id = match self.order {
                Order::Revisions if version.is_some_and(|version| version.rev.is_some()) => {
                    EntryId { ms: START_MS + self.rng.u64(..1_000_000_000), seq: self.rng.u64(..20) }
                }
                // Beside the first one: the stream's id still stands in for what some entries lack.
                _ => EntryId { ms: entry.id.ms, seq: entry.id.seq + self.rng.u64(1..5) },
            };
        }
        entry
    }
}

/// A datetime as most clients write it.
fn iso(ms: u64) -> String {
    let text = model::timestamp(i64::try_from(ms * 1000).unwrap());
    format!("{}Z", text[..text.len() - 3].replace(' ', "T"))
}

// ---------------------------------------------------------------------------------------------
// The property

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_order_repetition_batching_and_parallelism_gives_the_tables_of_the_model() {
    hold(&Database::create().await, CASES).await;
}

/// Holds the library against the model.
async fn hold(database: &Database, cases: u64) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let first = number("STANDPIPE_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    let cases = number("STANDPIPE_CASES").unwrap_or(cases);
    println!("STANDPIPE_SEED={first} STANDPIPE_CASES={cases}");
    let began = Instant::now();
    let (mut events, mut rows) = (0, 0);
    for seed in first..first + cases {
        let mut maker = Maker::new(seed);
        let sent = maker.events();
        let expected = model::expected(sent.iter().filter_map(|one| one.event.as_ref()));

        let in_order: Vec<Entry> = sent.iter().map(|one| one.entry.clone()).collect();
        database.clear().await;
        database.apply(&in_order).await;
        check(database, seed, "in order", &sent, &in_order, &expected).await;

        let batches = maker.disorder(&sent);
        let disordered = batches.concat();
        database.clear().await;
        database.apply_in_parallel(batches).await;
        check(database, seed, "in disorder", &sent, &disordered, &expected).await;

        events += in_order.len() + disordered.len();
        rows += expected.0.values().map(BTreeMap::len).sum::<usize>();
    }
    println!("{cases} cases, {events} events, {rows} rows in {:.1?}", began.elapsed());
}

/// Panics where the tables are not as expected, with as few events as show it.
async fn check(
    database: &Database,
    seed: u64,
    how: &str,
    sent: &[Sent],
    entries: &[Entry],
    expected: &Tables,
) {
    let lines = model::differences(expected, &database.tables().await);
    let audit = database.audit().await;
    if lines.is_empty() && audit.is_empty() {
        return;
    }
    let mut report = format!(
        "STANDPIPE_SEED={seed} STANDPIPE_CASES=1: {how}, {}\n{}",
        model::summary(&lines),
        audit.join("\n")
    );
    let least = shrink(database, sent, entries).await;
    if least.is_empty() {
        report.push_str(
            "\nOne after the other, in the order of their batches, the same entries show no difference.",
        );
    } else {
        let lines = differences_of(database, sent, &least).await;
        write!(report, "\nThese entries, one after the other, are enough ({}):", model::summary(&lines))
            .unwrap();
        for entry in &least {
            write!(report, "\n  {} {} seq {:?} {}", entry.id, entry.event_type, entry.seq, entry.data)
                .unwrap();
        }
    }
    panic!("{report}");
}

/// The fewest of these entries, in their order, that still give wrong tables; none, if even all of them give the right
/// ones.
async fn shrink(database: &Database, sent: &[Sent], entries: &[Entry]) -> Vec<Entry> {
    if differences_of(database, sent, entries).await.is_empty() {
        return Vec::new();
    }
    let mut least = entries.to_vec();
    let mut size = least.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at < least.len() {
            let mut fewer = least.clone();
            fewer.drain(at..(at + size).min(least.len()));
            if differences_of(database, sent, &fewer).await.is_empty() {
                at += size;
            } else {
                least = fewer;
            }
        }
        size /= 2;
    }
    least
}

/// How the tables after these entries differ from what they have to be after these entries.
async fn differences_of(database: &Database, sent: &[Sent], entries: &[Entry]) -> Vec<String> {
    database.clear().await;
    database.apply(entries).await;
    // A repetition may have an id of its own, when a number says what it repeats.
    let same = |one: &Entry, other: &Entry| {
        one.data == other.data && one.seq == other.seq && (one.id == other.id || !one.seq.is_empty())
    };
    let events = sent
        .iter()
        .filter(|one| entries.iter().any(|entry| same(entry, &one.entry)))
        .filter_map(|one| one.event.as_ref());
    model::differences(&model::expected(events), &database.tables().await)
}

// ---------------------------------------------------------------------------------------------
// Single cases.

/// An entry of the stream at this place within one millisecond.
fn entry(place: u64, event_type: &str, seq: &str, data: &Value) -> Entry {
    Entry {
        id: EntryId { ms: START_MS, seq: place },
        event_type: event_type.to_owned(),
        data: data.to_string(),
        seq: seq.to_owned(),
    }
}

const POST: &str = "at://did:plc:bbbb/app.bsky.feed.post/1";

/// The tables after these entries, first in this order and then in the opposite one.
async fn both_ways(database: &Database, entries: &[Entry]) -> (Tables, Tables) {
    database.clear().await;
    database.apply(entries).await;
    let forwards = database.tables().await;
    database.clear().await;
    database.apply(&entries.iter().rev().cloned().collect::<Vec<_>>()).await;
    (forwards, database.tables().await)
}

/// Interleavings like this one are too narrow for the cases above to meet: it is forced.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handle_taken_while_its_owner_is_written_has_one_owner() {
    let database = Database::create().await;
    let claim = |place: u64, did: &str, handle: &str| {
        vec![entry(place, "identity", &place.to_string(), &json!({"did": did, "handle": handle}))]
    };
    database.apply(&[claim(10, DIDS[0], "a.test"), claim(11, DIDS[1], "b.test")].concat()).await;

    // Somebody holds up the row of a.test's owner.
    let client = connect(&database.url).await;
    client
        .batch_execute(&format!("BEGIN; SELECT FROM users WHERE did = '{}' FOR UPDATE", DIDS[0]))
        .await
        .unwrap();
    let start = |batch: Vec<Entry>| {
        let (store, queue) = (database.store.clone(), Mutex::new(VecDeque::from([batch])));
        tokio::spawn(async move { apply_batches(&store, &queue).await })
    };
    let held_up = async |count: i64| {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
        wait_until(&format!("{count} to be held up"), Duration::from_secs(20), async || {
            database.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == count
        })
        .await;
    };
    // The other account takes the handle and wants to write there; then an old event of the owner comes, which has
    // to write what the owner shows now, and may not believe what it saw before the taking.
    let taking = start(claim(13, DIDS[1], "a.test"));
    held_up(1).await;
    let late = start(claim(5, DIDS[0], "c.test"));
    held_up(2).await;
    client.batch_execute("COMMIT").await.unwrap();
    taking.await.unwrap();
    late.await.unwrap();

    let tables = database.tables().await;
    let shown = |did: &str| tables.rows("users")[did]["handle"].clone();
    assert_eq!((shown(DIDS[0]), shown(DIDS[1])), (json!("handle.invalid"), json!("a.test")));
}

#[tokio::test]
async fn a_post_is_stored_where_the_old_workers_left_its_quote_behind() {
    let database = Database::of_old_workers().await;
    database.clear().await;
    let uri = "at://did:plc:aaaa/app.bsky.feed.post/q";
    database
        .client
        .batch_execute(&format!(
            "INSERT INTO quotes (uri, cid, post_uri, quoted_uri, created_at) VALUES ('{uri}', 'b', '{uri}', '{POST}', now())"
        ))
        .await
        .unwrap();
    let op = json!({"action": "create", "path": "app.bsky.feed.post/q", "cid": "bafyq", "record": {
        "text": "look", "embed": {"$type": "app.bsky.embed.record", "record": {"uri": POST, "cid": "bafypost"}}}});
    database.apply(&[entry(1, "commit", "1", &json!({"repo": "did:plc:aaaa", "ops": [op]}))]).await;
    let tables = database.tables().await;
    assert!(tables.rows("posts").contains_key(uri), "the post is not there");
}

#[tokio::test]
async fn the_tables_are_in_the_public_schema_whatever_the_role_is_called() {
    let url = Postgres::shared().await.fresh_database().await;
    let client = connect(&url).await;
    // What the old application has.
    client
        .batch_execute("CREATE TABLE public.user_settings (user_did varchar(255) PRIMARY KEY)")
        .await
        .unwrap();
    let _database = Database::migrated(url).await;
    let sql = "SELECT string_agg(DISTINCT schemaname, ' ') FROM pg_tables WHERE tablename IN ('posts', 'user_settings')";
    let schemas: String = client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(schemas, "public");
}

#[tokio::test]
async fn a_record_without_date_appended_twice_has_one_date_in_every_order() {
    let database = Database::create().await;
    let post = json!({"action": "create", "path": "app.bsky.feed.post/1", "cid": "b", "record": {"text": "undated"}});
    let first = entry(1, "commit", "7", &json!({"repo": "did:plc:aaaa", "ops": [post]}));
    // The Python reader lost its connection and took up again a little before where it was.
    let mut second = first.clone();
    second.id.ms += 5000;
    let (forwards, backwards) = both_ways(&database, &[first, second]).await;
    model::assert_same("backwards", &forwards, &backwards);
}

#[tokio::test]
async fn two_commits_with_one_revision_give_the_same_in_every_order() {
    let database = Database::create().await;
    let post = |place, text: &str| {
        let op = json!({"action": "update", "path": "app.bsky.feed.post/1", "cid": text, "record": {"text": text}});
        let data = json!({"repo": "did:plc:aaaa", "rev": "3n2samfdihk2n", "ops": [op]});
        entry(place, "commit", &place.to_string(), &data)
    };
    let (forwards, backwards) = both_ways(&database, &[post(1, "one"), post(2, "two")]).await;
    model::assert_same("backwards", &forwards, &backwards);
}

#[tokio::test]
async fn a_record_that_says_py_type_is_kept_as_it_is() {
    let database = Database::create().await;
    let record = json!({"$type": "com.example.thing", "py_type": "com.example.other", "snake_case": 1, "nothing": null});
    let op = json!({"action": "create", "path": "com.example.thing/1", "cid": "b", "record": record});
    let data = json!({"repo": "did:plc:aaaa", "rev": "3n2samfdihk2n", "ops": [op]});
    database.apply(&[entry(1, "commit", "1", &data)]).await;
    let tables = database.tables().await;
    let row = &tables.rows("generic_records")["at://did:plc:aaaa/com.example.thing/1"];
    assert_eq!(row["record"], record);
    assert_eq!(row["record_type"], json!("com.example.thing"));
}

/// From the syntax tests that the protocol's authors publish for datetimes.
#[test]
fn datetimes_are_read_as_the_protocol_says() {
    let texts = [
        "1985-04-12T23:20:50.123Z",
        "1985-04-12T23:20:50.123456Z",
        "1985-04-12T23:20:50.12345678912345Z",
        "1985-04-12T23:20:50Z",
        "1985-04-12T23:20:50.0Z",
        "1985-04-12T23:20:50.123+00:00",
        "1985-04-12T23:20:50.123-07:00",
        "1985-04-12T23:20:50.123+01:45",
        "0985-04-12T23:20:50.123-07:00",
        "0001-01-01T00:00:00.000Z",
        "9999-12-31T23:59:59.999Z",
        "2024-02-29T12:00:00Z",
        "2100-02-28T23:59:59.999999999-23:59",
        // Not these.
        "1985-04-12T23:20:50.123-00:00",
        "1985-04-12T23:20:50.123z",
        "1985-04-12t23:20:50.123Z",
        "1985-04-12 23:20:50.123Z",
        "1985-04-12_23:20:50.123Z",
        "1985-04-12T23:20:50.123",
        "1985-04-12T23:20:50.123+00",
        "1985-04-12T23:20:50.123+0000",
        "1985-04-12T23:20:50.123+00:0",
        "1985-04-12T23:20:50.123+00:00:15",
        "1985-04-12T23:20:50,123Z",
        "1985-04-12T23:20:50.Z",
        "1985-04-12T232050.123456789Z",
        "1985-0412T23:20:50.123Z",
        "1985-04-12T23:20Z            ",
        "1985-04-12T23:20:5Z",
        "1985-4-12T23:20:50.123Z",
        "+001985-04-12T23:20:50.123Z",
        "-001985-04-12T23:20:50.123Z",
        "01985-04-12T23:20:50.123Z",
        "1985-02-29T12:00:00Z",
        "1985-04-31T12:00:00Z",
        "1985-00-12T23:20:50.123Z",
        "1985-04-12T24:00:00.000Z",
        "1985-04-12T23:99:50.123Z",
        "1985-04-12T23:20:50.123Z[Europe/Berlin]",
        "1985-04-12T23:20:50.123+02:00[Europe/Berlin]",
        "1985-04-12T23:20:50.123Z ",
        " 1985-04-12T23:20:50.123Z",
    ];
    let wrong: Vec<String> = texts
        .iter()
        .map(|text| (text, model::micros_of(text), datetime::parse(text).map(|micros| micros.0)))
        .filter(|(_, right, is)| right != is)
        .map(|(text, right, is)| format!("{text:?} is {is:?}, should be {right:?}"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
