//! Any set of events, in any order, with any repetitions, cut into any batches over any number of
//! connections, gives the tables that the model predicts.
//!
//! `STANDPIPE_SEED` selects the cases, `STANDPIPE_CASES` sets their number, `STANDPIPE_THEME` their subject.
//! A failure prints the seed of its case and a minimal set of its events that still fails.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::model::{self, Kind, Op, Tables, Version};
use crate::support::pooler::PgBouncer;
use crate::support::{HOSTILE_DEFAULTS, Postgres, connect, old_database, wait_until};
use fastrand::Rng;
use serde_json::{Value, json};
use standpipe::apply::{Context, datetime, interpret};
use standpipe::config::{Role, TransactionMode, from_env};
use standpipe::event::Entry;
use standpipe::event::{EntryId, Epochs, Event};
use standpipe::store::verdict::Verdict;
use standpipe::store::{Fate, Store, audit, migrate, purge};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

const CASES: u64 = 150;
const EVENTS: usize = 60;
const SESSIONS: usize = 3;

// ---------------------------------------------------------------------------------------------
// Applying

/// A migrated database that belongs to the test.
struct Database {
    url: String,
    store: Store,
    client: Client,
    /// The audit needs a transaction, and therefore a client of its own.
    auditor: tokio::sync::Mutex<Client>,
}

impl Database {
    /// A database that standpipe created.
    async fn create() -> Self {
        Self::migrated(Postgres::shared().await.fresh_database().await).await
    }

    /// A database that the old workers created, with their indexes.
    async fn of_old_workers() -> Self {
        // The tables are where the old application puts them, whatever the name of the role.
        let url = Postgres::shared().await.fresh_database().await + "?options=-csearch_path%3Dpublic";
        old_database::create(&url).await;
        Self::migrated(url).await
    }

    async fn migrated(url: String) -> Self {
        Self::migrated_through(&url.clone(), url).await
    }

    /// A database that the store reaches through a different URL than the test.
    async fn migrated_through(through: &str, url: String) -> Self {
        let (config, _) =
            from_env([("DATABASE_URL", through), ("NOTIFY_WITHIN", "off")], Role::Worker).unwrap();
        let store = Store::new(&config).unwrap();
        migrate::migrate(store.session().await.unwrap().client_mut()).await.unwrap();
        let (client, auditor) = (connect(&url).await, connect(&url).await.into());
        Self { url, store, client, auditor }
    }

    /// Resets everything to the state after the migration.
    async fn clear(&self) {
        let sql = "SELECT string_agg(format('%I.%I', schemaname, tablename), ', ') FROM pg_tables
                   WHERE schemaname IN ('public', 'standpipe') AND tablename NOT IN ('migrations', 'tables_before')";
        let tables: String = self.client.query_one(sql, &[]).await.unwrap().get(0);
        self.client.batch_execute(&format!("TRUNCATE {tables}")).await.unwrap();
        // As after a broken connection: the store's knowledge of existing accounts may be wrong.
        self.store.session().await.unwrap().discard();
    }

    /// Applies entries one after another.
    async fn apply(&self, entries: &[Entry]) {
        let queue = Mutex::new(entries.chunks(20).map(<[Entry]>::to_vec).collect());
        apply_batches(&self.store, &queue).await;
    }

    /// Applies batches on several connections at once, as pipelines do.
    async fn apply_in_parallel(&self, batches: Vec<Vec<Entry>>) {
        let (store, queue) = (self.store.clone(), Arc::new(Mutex::new(VecDeque::from(batches))));
        let tasks: Vec<_> = (0..SESSIONS)
            .map(|_| {
                let (store, queue) = (store.clone(), Arc::clone(&queue));
                tokio::spawn(async move { apply_batches(&store, &queue).await })
            })
            .collect();
        // Deleted accounts are purged meanwhile, as in a worker.
        let done = Arc::new(AtomicBool::new(false));
        let purging = tokio::spawn({
            let (store, done) = (self.store.clone(), Arc::clone(&done));
            async move {
                while !done.load(Ordering::SeqCst) {
                    purge_all(&store).await;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        });
        for task in tasks {
            task.await.unwrap();
        }
        // An interrupted purge would continue in the server and interfere with the next step of the test.
        done.store(true, Ordering::SeqCst);
        purging.await.unwrap();
    }

    async fn tables(&self) -> Tables {
        purge_all(&self.store).await;
        model::read(&self.client).await
    }

    /// The audit's findings.
    async fn audit(&self) -> Vec<String> {
        let findings = audit::audit(&mut *self.auditor.lock().await).await.unwrap();
        findings.iter().filter(|finding| finding.count > 0).map(ToString::to_string).collect()
    }
}

/// Removes the records of deleted accounts.
async fn purge_all(store: &Store) {
    let session = store.session().await.unwrap();
    while let Some(deletion) = purge::next(session.client()).await.unwrap() {
        match purge::purge(session.client(), &deletion).await {
            Ok(_) => {}
            Err(error) if error.verdict == Verdict::Retry => {}
            Err(error) => panic!("{:?}: {error}", error.verdict),
        }
    }
}

/// Takes batches until there are none and applies each as a pipeline does: events that lost to others are
/// retried, and operations that the database refuses are set aside.
async fn apply_batches(store: &Store, queue: &Mutex<VecDeque<Vec<Entry>>>) {
    loop {
        let Some(batch) = queue.lock().unwrap().pop_front() else { return };
        let session = store.session().await.unwrap();
        let mut open: Vec<Event<'_>> = batch
            .iter()
            .filter_map(|entry| interpret(entry, Context::now(&Epochs::UNNAMED)).ok())
            .filter(|event| !event.repo.is_empty())
            .collect();
        let mut done = Vec::new();
        // Both transaction modes, unless one is asked for.
        let bulk = std::env::var("STANDPIPE_BULK").map_or(batch.len() % 2 == 0, |forced| forced == "1");
        let mut mode = if bulk { TransactionMode::Batch } else { TransactionMode::Event };
        while !open.is_empty() {
            let sent: Vec<&Event<'_>> = open.iter().collect();
            let fates = session.apply(&sent, mode).await;
            let fates = fates.unwrap_or_else(|error| panic!("{:?}: {error}", error.verdict));
            assert_eq!(fates.len(), open.len());
            let mut again = Vec::new();
            for (mut event, fate) in open.into_iter().zip(fates) {
                match fate {
                    Fate::Applied(_) => done.push(event),
                    Fate::Lost(_) => again.push(event),
                    Fate::Rejected(mut bad) => {
                        bad.sort_by_key(|(index, _)| std::cmp::Reverse(*index));
                        for (index, _) in bad {
                            event.ops.remove(index);
                            event.sources.remove(index);
                        }
                        again.push(event);
                    }
                }
            }
            open = again;
            mode = TransactionMode::Event;
        }
        session.flush(&done.iter().collect::<Vec<_>>()).await.unwrap();
    }
}

// ---------------------------------------------------------------------------------------------
// From the model's events to entries

/// An entry, and what it means to the model: nothing, if the program has to set it aside.
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
            // Put together as text: an operation may be JSON that no tree can represent.
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
    /// Some have revisions and some do not, all from one relay: our reader and the Python reader take turns.
    Mixed,
}

/// What most operations of a set are about, so that they interact.
const THEMES: [&[&str]; 10] = [
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
        "app.bsky.feed.threadgate",
        "app.bsky.feed.postgate",
        "app.bsky.graph.list",
        "app.bsky.graph.listitem",
        "app.bsky.graph.listblock",
        "app.bsky.graph.starterpack",
        "app.bsky.feed.generator",
        "app.bsky.labeler.service",
        "com.atproto.label.label",
        "app.bsky.graph.verification",
        "com.example.thing",
    ],
    &["app.bsky.feed.like"],
    &["app.bsky.feed.post"],
    &["app.bsky.feed.repost", "app.bsky.bookmark"],
    &["app.bsky.actor.profile", "com.example.thing"],
    &["app.bsky.graph.follow", "app.bsky.graph.block"],
    // Replies, quotes, and the gates that allow them.
    &[
        "app.bsky.feed.post",
        "app.bsky.feed.post",
        "app.bsky.feed.post",
        "app.bsky.feed.threadgate",
        "app.bsky.feed.postgate",
    ],
    // A counter that is kept in two places.
    &[
        "app.bsky.feed.like",
        "app.bsky.feed.like",
        "app.bsky.feed.like",
        "app.bsky.feed.generator",
        "app.bsky.labeler.service",
    ],
    &[
        "app.bsky.graph.list",
        "app.bsky.graph.listitem",
        "app.bsky.graph.listblock",
        "app.bsky.graph.starterpack",
    ],
    &[
        "com.atproto.label.label",
        "app.bsky.graph.verification",
        "app.bsky.actor.profile",
        "app.bsky.feed.post",
    ],
];

const ROOTS: [&str; 2] = ["at://did:plc:aaaa/app.bsky.feed.post/1", "at://did:plc:bbbb/app.bsky.feed.post/2"];
const DIDS: [&str; 4] = ["did:plc:aaaa", "did:plc:bbbb", "did:web:c.example", "did:plc:dddd"];
const HANDLES: [&str; 3] = ["a.test", "b.test", "c-3.example.test"];
const START_MS: u64 = 1_795_234_668_000;

struct Maker {
    rng: Rng,
    order: Order,
    theme: &'static [&'static str],
    /// How many events in a hundred are commits; the others are about identities and account states.
    commits: u32,
    /// How many references in a hundred are to the feed generators and labelers of the set.
    services: u32,
    /// Whether the theme is gates: then most references are to two root posts.
    gates: bool,
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
        let theme = [0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 7, 8, 9][rng.usize(..16)];
        let theme = THEMES[number("STANDPIPE_THEME").map_or(theme, |theme| usize::try_from(theme).unwrap())];
        let commits = [78, 78, 78, 5][rng.usize(..4)];
        let accounts = rng.usize(3..=4);
        let skews = DIDS.iter().map(|_| [0, -3_600_000_000, 86_400_000_000 * 4][rng.usize(..3)]).collect();
        let services = if theme == THEMES[7] { 80 } else { 5 };
        let gates = theme == THEMES[6];
        Self {
            rng,
            order,
            theme,
            commits,
            services,
            gates,
            accounts,
            skews,
            ms: START_MS,
            sq: 0,
            seq: 960,
            made: 0,
        }
    }

    /// The events, in order.
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
            // Leave room between the ids for repetitions of the same event.
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
            Order::Mixed => self.one(&[(true, true), (false, true)]),
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
                    // Here a deletion would be ordered by number in some places and by time in others.
                    2 if !matches!(self.order, Order::Mixed) => (false, status("deleted")),
                    3 => (false, None),
                    4 => (true, status("")),
                    _ => (true, None),
                };
                // Without it the entry's time is used, which keeps the same order.
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
            // The reader drops all but the last operation on each path, then splits a large commit into
            // several entries, which all have the commit's revision and number.
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

    /// An entry that changes nothing: unreadable, or of a type that is not wanted. Not even its account
    /// becomes known.
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

    /// An operation that only the database refuses, on a path of its own, in JSON that no tree can represent.
    fn refused_op(&mut self) -> String {
        let deep = "[".repeat(20_000) + &"]".repeat(20_000);
        let value = self.one(&[r#""\ud800""#, "1e999999", &deep]).to_owned();
        let made = self.made;
        if self.chance(20) {
            // Longer than the column.
            let name = "n".repeat(300);
            return format!(
                r#"{{"action":"create","path":"app.bsky.graph.list/refused{made}","cid":"bafyx","record":{{"name":"{name}","purpose":"x"}}}}"#
            );
        }
        format!(
            r#"{{"action":"create","path":"com.example.refused/{made}","cid":"bafyx","record":{{"x":{value}}}}}"#
        )
    }

    fn op(&mut self, repo: &str) -> Op {
        let theme = if self.chance(90) { self.theme } else { THEMES[0] };
        let collection = self.one(theme);
        let rkey = match collection {
            "app.bsky.actor.profile" if self.chance(90) => "self",
            "app.bsky.labeler.service" if self.chance(60) => "self",
            "app.bsky.feed.generator" => self.one(&["1", "2"]),
            _ if self.gates && repo == DIDS[0] => self.one(&["1", "1", "2"]),
            _ if self.gates && repo == DIDS[1] => self.one(&["2", "2", "1"]),
            _ => self.one(&["1", "2", "weird:~_.-key"]),
        };
        // Long enough that values derived from the URI exceed their columns.
        let long = "k".repeat(500 - format!("at://{repo}/{collection}/").len());
        let rkey = if self.chance(1) { &long } else { rkey };
        let deletes = if self.gates { 15 } else { 32 };
        let action = match self.rng.u32(..100) {
            n if n < deletes => "delete",
            0..80 => "create",
            80..98 => "update",
            _ => "forget",
        };
        let path = if self.chance(1) {
            self.one(&["nonsense", "app.bsky.feed.post/", "app.bsky.feed.post/a b"]).to_owned()
        } else {
            format!("{collection}/{rkey}")
        };
        let mut record = if action == "delete" { Value::Null } else { self.record(collection, repo, rkey) };
        if action != "delete" && self.chance(5) {
            self.spoil(&mut record);
        }
        // Every version of a record has its own CID.
        let cid =
            (action != "delete" && self.chance(98)).then(|| format!("bafy{}x{}", self.made, self.rng.u8(..)));
        Op { action: action.to_owned(), path, cid, record }
    }

    fn record(&mut self, collection: &str, repo: &str, rkey: &str) -> Value {
        let mut record = match collection {
            "app.bsky.feed.post" => self.post(repo),
            "app.bsky.feed.like" | "app.bsky.feed.repost" | "app.bsky.bookmark" => {
                let mut record = json!({"subject": self.post_ref()});
                if self.chance(20) {
                    record["via"] = self.via();
                }
                record
            }
            "app.bsky.graph.follow" | "app.bsky.graph.block" => json!({"subject": self.did_or_stranger()}),
            "app.bsky.actor.profile" => self.profile(),
            "app.bsky.feed.threadgate" => self.thread_gate(repo, rkey),
            "app.bsky.feed.postgate" => self.post_gate(repo, rkey),
            "app.bsky.graph.list" | "app.bsky.feed.generator" => {
                let mut record = json!({"name": format!("name {}\u{0}", self.made), "displayName": "feed\u{0}",
                    "purpose": "app.bsky.graph.defs#modlist", "did": self.did_or_stranger()});
                self.decorate(&mut record);
                record
            }
            "app.bsky.graph.listitem" => {
                json!({"subject": self.did_or_stranger(), "list": "at://did:plc:aaaa/app.bsky.graph.list/1"})
            }
            "app.bsky.graph.listblock" => json!({"subject": "at://did:plc:aaaa/app.bsky.graph.list/1"}),
            "app.bsky.graph.starterpack" => {
                let mut record = json!({"name": "pack", "list": "at://did:plc:aaaa/app.bsky.graph.list/2"});
                self.decorate(&mut record);
                if self.chance(50) {
                    record["feeds"] =
                        json!([{"uri": "at://did:plc:aaaa/app.bsky.feed.generator/1"}, 5, {"uri": 5}]);
                }
                record
            }
            "app.bsky.labeler.service" => {
                self.one(&[json!({"policies": {"labelValues": ["s\u{0}pam"]}}), json!({"policies": {}})])
            }
            "com.atproto.label.label" => {
                let mut record = json!({"src": self.did(), "uri": self.post_uri(), "val": "spam"});
                if self.chance(30) {
                    record["uri"] = json!(self.did());
                }
                if self.chance(50) {
                    record["neg"] = self.one(&[json!(true), json!(false), Value::Null]);
                }
                if self.chance(50) {
                    record["cts"] =
                        self.one(&[json!("2026-01-02T03:04:05Z"), json!("some time"), Value::Null]);
                }
                record
            }
            "app.bsky.graph.verification" => {
                json!({"subject": self.did_or_stranger(), "handle": "a.test", "displayName": "A"})
            }
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

    /// An account of the set, or one that appears nowhere else.
    fn did_or_stranger(&mut self) -> String {
        if self.chance(15) { "did:plc:stranger".to_owned() } else { self.did() }
    }

    /// One of a few posts, whether it is ever written or not; sometimes another record.
    fn post_uri(&mut self) -> String {
        if self.chance(self.services) {
            let service = self.one(&["feed.generator/1", "feed.generator/2", "labeler.service/self"]);
            return format!("at://{}/app.bsky.{service}", self.did());
        }
        if self.gates && self.chance(60) {
            return self.one(&ROOTS).to_owned();
        }
        match self.rng.u32(..20) {
            0 => "at://did:plc:stranger/app.bsky.feed.post/never".to_owned(),
            1 => "at://alice.test/app.bsky.feed.post/1".to_owned(),
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
        if self.chance(if self.gates { 65 } else { 45 }) {
            let own = json!({"uri": format!("at://{repo}/app.bsky.feed.post/1"), "cid": "bafyown"});
            let parent = if self.chance(15) { own } else { self.post_ref() };
            // Most threads start with one of two posts, which may themselves be replies.
            let root = match self.rng.u32(..10) {
                0..4 => json!({"uri": ROOTS[0]}),
                4..8 => json!({"uri": ROOTS[1], "cid": "bafyroot"}),
                _ => self.post_ref(),
            };
            post["reply"] = json!({"parent": parent, "root": root});
        }
        let media = json!({"$type": "app.bsky.embed.images", "images": [{"alt": "a\u{0}b\\u0000"}]});
        if self.chance(if self.gates { 75 } else { 50 }) {
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
        if self.chance(if self.gates { 70 } else { 40 }) {
            post["facets"] = self.facets();
        }
        if self.chance(25) {
            post["labels"] = self.labels();
        }
        post
    }

    /// Mentions: of oneself, of the same account twice, of too many accounts, and things that only look like
    /// mentions.
    fn facets(&mut self) -> Value {
        let mention = |did: &str| json!({"$type": "app.bsky.richtext.facet#mention", "did": did});
        if self.chance(5) {
            let many: Vec<Value> = (0..60).map(|n| mention(&format!("did:plc:many{n}"))).collect();
            return json!([{"index": {}, "features": many}]);
        }
        let (features, kinds) = if self.gates { (2..6, 40) } else { (1..4, 12) };
        let features: Vec<Value> = (0..self.rng.usize(features))
            .map(|_| match self.rng.u32(..kinds) {
                0 => json!({"$type": "app.bsky.richtext.facet#link", "uri": "https://example.com", "did": "did:plc:aaaa"}),
                1 => mention("alice.test"),
                2 => json!({"$type": "app.bsky.richtext.facet#mention", "did": 5}),
                3 => json!("did:plc:aaaa"),
                4 => mention(&format!("did:plc:{}", "x".repeat(480))),
                5 => mention("did:plc:stranger"),
                _ => mention(&self.did()),
            })
            .collect();
        let again = features[0].clone();
        match self.rng.u32(..8) {
            0 => json!([{"features": again}, 5, null, {"features": features}]),
            1 => json!([{"features": features}, {"features": [again]}]),
            _ => json!([{"index": {"byteStart": 0, "byteEnd": 3}, "features": features}]),
        }
    }

    fn labels(&mut self) -> Value {
        let value = |val: &str| json!({"val": val});
        let mut values: Vec<Value> = (0..self.rng.usize(0..4))
            .map(|_| match self.rng.u32(..8) {
                0 => value(&"ü".repeat(129)),
                1 => self.one(&[value(""), json!({"val": 5}), json!("porn"), Value::Null]),
                2 => value("nu\u{0}dity"),
                _ => value(self.one(&["porn", "sexual", "nudity", "!no-unauthenticated"])),
            })
            .collect();
        if self.chance(5) {
            values.extend((0..15).map(|n| value(&format!("label{n}"))));
        }
        let known = self.rng.usize(2..=5);
        self.one(
            &[
                json!({"$type": "com.atproto.label.defs#selfLabels", "values": values}),
                json!({"values": values}),
                json!({"$type": "com.example.other", "values": values}),
                json!({"$type": "com.atproto.label.defs#selfLabels", "values": "porn"}),
                json!([]),
            ][..known],
        )
    }

    /// Where a like or repost came from: someone's repost, one's own, the author's own, or nonsense.
    fn via(&mut self) -> Value {
        match self.rng.u32(..10) {
            0 => self.one(&[
                Value::Null,
                json!("at://did:plc:bbbb/app.bsky.feed.repost/1"),
                json!({"uri": 5}),
                json!({"uri": "https://did:plc:bbbb/"}),
                json!({"uri": "at://alice.test/app.bsky.feed.repost/1"}),
                json!({"uri": format!("at://did:plc:bbbb/app.bsky.feed.repost/{}", "x".repeat(600))}),
            ]),
            _ => json!({"uri": format!("at://{}/app.bsky.feed.repost/1", self.did()), "cid": "bafyvia"}),
        }
    }

    /// The post that a gate applies to: usually its own.
    fn gated(&mut self, repo: &str, rkey: &str) -> Value {
        match self.rng.u32(..20) {
            0 => json!(format!("at://{repo}/app.bsky.feed.post/other")),
            1 => json!(format!("at://did:plc:else/app.bsky.feed.post/{rkey}")),
            _ => json!(format!("at://{repo}/app.bsky.feed.post/{rkey}")),
        }
    }

    fn thread_gate(&mut self, repo: &str, rkey: &str) -> Value {
        let mut gate = json!({"post": self.gated(repo, rkey)});
        let rule = |name: &str| json!({"$type": format!("app.bsky.feed.threadgate#{name}")});
        let list = |list: Value| json!({"$type": "app.bsky.feed.threadgate#listRule", "list": list});
        match self.rng.u32(..if self.gates { 16 } else { 10 }) {
            0 => {}
            1 => gate["allow"] = Value::Null,
            2 | 3 => gate["allow"] = json!([]),
            4..7 | 10.. => gate["allow"] = json!([rule("mentionRule")]),
            7 => {
                gate["allow"] = self.one(&[json!([rule("rule of tomorrow")]), json!([5, "mentionRule", {}])]);
            }
            _ => {
                let all = [
                    rule("mentionRule"),
                    rule("followerRule"),
                    rule("followingRule"),
                    list(json!("at://did:plc:aaaa/app.bsky.graph.list/1")),
                    list(json!(5)),
                ];
                gate["allow"] = (0..self.rng.usize(1..4)).map(|_| self.one(&all)).collect();
            }
        }
        if self.chance(40) {
            let hidden: Vec<String> = (0..self.rng.usize(0..3)).map(|_| self.post_uri()).collect();
            gate["hiddenReplies"] =
                self.one(&[json!(hidden), json!(hidden), json!([5, hidden]), Value::Null]);
        }
        gate
    }

    fn post_gate(&mut self, repo: &str, rkey: &str) -> Value {
        let mut gate = json!({"post": self.gated(repo, rkey)});
        let disabled = json!([{"$type": "app.bsky.feed.postgate#disableRule"}]);
        if self.chance(70) {
            gate["embeddingRules"] = self.one(&[
                disabled.clone(),
                disabled,
                json!([]),
                json!([{"$type": "other"}, 5]),
                Value::Null,
            ]);
        }
        if self.chance(50) {
            let detached: Vec<String> = (0..self.rng.usize(0..3)).map(|_| self.post_uri()).collect();
            gate["detachedEmbeddingUris"] = self.one(&[json!(detached), json!(detached), Value::Null]);
        }
        gate
    }

    /// Adds optional fields.
    fn decorate(&mut self, record: &mut Value) {
        for (name, values) in [
            ("description", vec![json!("first\nsec\u{0}ond"), json!(""), Value::Null]),
            (
                "avatar",
                vec![
                    json!({"$type": "blob", "ref": {"$link": "bafkavatar"}, "size": 1}),
                    json!({"cid": "bafkold", "mimeType": "image/png"}),
                    json!({"ref": "bafkplain"}),
                    json!(7),
                ],
            ),
        ] {
            if self.chance(40) {
                record[name] = self.one(&values);
            }
        }
    }

    fn profile(&mut self) -> Value {
        let mut profile = json!({"displayName": format!("name {}\u{0}", self.made)});
        self.decorate(&mut profile);
        if self.chance(30) {
            profile["labels"] = self.labels();
        }
        for (name, values) in [
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

    /// Breaks or removes fields that the record's row may need.
    fn spoil(&mut self, record: &mut Value) {
        match self.rng.u32(..9) {
            0 => *record = json!([]),
            1 => record["subject"] = json!(5),
            2 => record["subject"] = json!({"cid": "bafy"}),
            3 => record["text"] = json!(["no", "text"]),
            4 => record["reply"] = json!({"parent": {"uri": "https://example.com"}}),
            5 => {
                let needed =
                    ["subject", "list", "name", "purpose", "did", "policies", "uri", "val", "handle", "post"];
                let name = self.one(&needed);
                if let Some(fields) = record.as_object_mut() {
                    fields.remove(name);
                }
            }
            6 => {
                for name in ["list", "did", "uri", "policies", "post", "name"] {
                    record[name] = json!(5);
                }
            }
            7 => {
                for name in ["description", "feeds", "neg", "allow", "embeddingRules", "handle"] {
                    record[name] = json!({"no": "list"});
                }
            }
            _ => {
                record["embed"] = json!("nothing");
                record["displayName"] = json!(5);
                record["subject"] = Value::Null;
            }
        }
    }

    /// The entries in a different order, some of them more than once, in batches.
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
        // Small batches interact most.
        let most = self.one(&[1, 4, 12, 40]);
        while !entries.is_empty() {
            let count = self.rng.usize(1..=most).min(entries.len());
            batches.push(entries.split_off(entries.len() - count));
        }
        batches
    }

    /// The same entry delivered again or, if its revision or number identifies it, appended again.
    fn repetition(&mut self, one: &Sent) -> Entry {
        let mut entry = one.entry.clone();
        let version = one.event.as_ref().map(|event| &event.version);
        if version.is_some_and(|version| version.rev.is_some() || version.seq.is_some()) && self.chance(30) {
            entry.id = match self.order {
                Order::Revisions if version.is_some_and(|version| version.rev.is_some()) => {
                    EntryId { ms: START_MS + self.rng.u64(..1_000_000_000), seq: self.rng.u64(..20) }
                }
                // Right next to the first: the stream's id still replaces what some entries lack.
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
async fn tables_match_the_model_for_any_order_repetition_batching_and_parallelism() {
    hold(&Database::create().await, CASES).await;
}

/// Settings that a database imposes on its connections do not affect us.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_match_the_model_under_every_hostile_default() {
    for (setting, value) in HOSTILE_DEFAULTS {
        let database = Postgres::shared().await.fresh_database_with(setting, value).await;
        hold(&Database::migrated(database).await, CASES / 15).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_match_the_model_behind_pgbouncer() {
    let postgres = Postgres::shared().await;
    for more in ["", "ignore_startup_parameters = options,extra_float_digits"] {
        let database = postgres.fresh_database().await;
        let pooler = PgBouncer::start(postgres, "session", more).await;
        hold(&Database::migrated_through(&pooler.url(&database), database).await, CASES / 10).await;
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Compares the library with the model.
async fn hold(database: &Database, cases: u64) {
    let first = number("STANDPIPE_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    // Each test takes its share of `STANDPIPE_CASES`.
    let cases = number("STANDPIPE_CASES").map_or(cases, |all| (all * cases / CASES).max(1));
    println!("STANDPIPE_SEED={first} STANDPIPE_CASES={cases}");
    let began = Instant::now();
    let (mut events, mut rows, mut met) = (0, 0, BTreeMap::<String, usize>::new());
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
        for what in remarkable(&expected) {
            *met.entry(what).or_default() += 1;
        }
    }
    println!("{met:#?}");
    if cases >= CASES && number("STANDPIPE_THEME").is_none() {
        let never: Vec<_> = REMARKABLE.iter().filter(|what| !met.contains_key(**what)).collect();
        assert!(never.is_empty(), "the cases never came to {never:?}");
    }
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    let deadlocks: i64 = database.client.query_one(deadlocks, &[]).await.unwrap().get(0);
    println!("{cases} cases, {events} events, {rows} rows, {deadlocks} deadlocks in {:.1?}", began.elapsed());
}

/// What the cases have to cover in order to prove anything.
const REMARKABLE: &[&str] = &[
    "feed_generators liked",
    "labeler_services liked",
    "labels by record",
    "labels by self of app.bsky.actor.profile",
    "labels by self of app.bsky.feed.post",
    "list_blocks",
    "list_items",
    "lists",
    "notifications follow",
    "notifications like",
    "notifications like-via-repost",
    "notifications mention",
    "notifications quote",
    "notifications reply",
    "notifications repost",
    "notifications repost-via-repost",
    "post_gates",
    "posts has_post_gate",
    "posts has_thread_gate",
    "posts violates_embedding_rules",
    "posts violates_thread_gate",
    "replies that a mention lets in",
    "starter_packs",
    "thread_gates",
    "thread_gates without a post",
    "verifications",
];

fn remarkable(tables: &Tables) -> Vec<String> {
    let mut found = Vec::new();
    for (table, rows) in &tables.0 {
        for (key, row) in rows {
            match *table {
                "posts" => {
                    found.extend(
                        [
                            "has_post_gate",
                            "has_thread_gate",
                            "violates_embedding_rules",
                            "violates_thread_gate",
                        ]
                        .iter()
                        .filter(|flag| row[**flag] == json!(true))
                        .map(|flag| format!("posts {flag}")),
                    );
                    let root = row["root_uri"].as_str().unwrap_or_default();
                    let gate = tables.rows("thread_gates").get(root);
                    let mentions = json!([{"$type": "app.bsky.feed.threadgate#mentionRule"}]);
                    let own = root.starts_with(&format!("at://{}/", row["author_did"].as_str().unwrap()));
                    if gate.is_some_and(|gate| gate["allow"] == mentions)
                        && !own
                        && row["violates_thread_gate"] == json!(false)
                    {
                        found.push("replies that a mention lets in".to_owned());
                    }
                }
                "notifications" => found.push(format!("notifications {}", row["reason"].as_str().unwrap())),
                "labels" => match key.split_once("#label/") {
                    Some((subject, _)) => {
                        found.push(format!("labels by self of {}", subject.split('/').nth(3).unwrap()));
                    }
                    None => found.push("labels by record".to_owned()),
                },
                "feed_generators" | "labeler_services" if row["like_count"] != json!(0) => {
                    found.push(format!("{table} liked"));
                }
                "thread_gates" if !tables.rows("posts").contains_key(key) => {
                    found.push("thread_gates without a post".to_owned());
                }
                _ => {}
            }
            if REMARKABLE.contains(table) {
                found.push((*table).to_owned());
            }
        }
    }
    found
}

/// Panics if the tables are not as expected, with a minimal set of events that shows it.
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

/// A minimal subset of these entries, in order, that still gives wrong tables; empty if all of them together
/// give the right ones.
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

/// How the tables differ from what they have to be after these entries.
async fn differences_of(database: &Database, sent: &[Sent], entries: &[Entry]) -> Vec<String> {
    database.clear().await;
    database.apply(entries).await;
    // A repetition may have an id of its own if a number identifies what it repeats.
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

/// A stream entry at this position within one millisecond.
fn entry(place: u64, event_type: &str, seq: &str, data: &Value) -> Entry {
    Entry {
        id: EntryId { ms: START_MS, seq: place },
        event_type: event_type.to_owned(),
        data: data.to_string(),
        seq: seq.to_owned(),
    }
}

const POST: &str = "at://did:plc:bbbb/app.bsky.feed.post/1";

/// The tables after these entries, applied first in this order and then in reverse.
async fn both_ways(database: &Database, entries: &[Entry]) -> (Tables, Tables) {
    database.clear().await;
    database.apply(entries).await;
    let forwards = database.tables().await;
    database.clear().await;
    database.apply(&entries.iter().rev().cloned().collect::<Vec<_>>()).await;
    (forwards, database.tables().await)
}

/// An interleaving like this is too narrow for the cases above to hit, so it is forced.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handle_claimed_while_its_owner_is_being_written_has_one_owner() {
    let database = Database::create().await;
    let claim = |place: u64, did: &str, handle: &str| {
        vec![entry(place, "identity", &place.to_string(), &json!({"did": did, "handle": handle}))]
    };
    database.apply(&[claim(10, DIDS[0], "a.test"), claim(11, DIDS[1], "b.test")].concat()).await;

    // Lock the row of a.test's owner.
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
    // The other account claims the handle and wants to write that row; then an old event of the owner
    // arrives, which has to write what the owner shows now and must not rely on what it saw before the claim.
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

/// A transaction that holds a generator's row already holds its counter's row: a like and a new version of
/// the generator never deadlock, and the later one copies the counter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_feed_generator_updated_while_it_is_liked_shows_the_right_count() {
    let generator = "at://did:plc:aaaa/app.bsky.feed.generator/1";
    let database = Database::create().await;
    let create = |place: u64, name: &str| {
        let record = json!({"did": "did:web:feed.example", "displayName": name});
        let op =
            json!({"action": "update", "path": "app.bsky.feed.generator/1", "cid": name, "record": record});
        vec![entry(place, "commit", &place.to_string(), &json!({"repo": "did:plc:aaaa", "ops": [op]}))]
    };
    let like = |place: u64, repo: &str| {
        let op = json!({"action": "create", "path": "app.bsky.feed.like/1", "cid": "bafylike",
            "record": {"subject": {"uri": generator, "cid": "bafy"}}});
        vec![entry(place, "commit", &place.to_string(), &json!({"repo": repo, "ops": [op]}))]
    };
    database.apply(&create(1, "first")).await;
    for like_first in [true, false] {
        let place = if like_first { 10 } else { 20 };
        let client = connect(&database.url).await;
        let hold = format!("BEGIN; SELECT FROM post_aggregations WHERE post_uri = '{generator}' FOR UPDATE");
        client.batch_execute(&hold).await.unwrap();
        let who = if like_first { DIDS[1] } else { DIDS[2] };
        let mut batches = vec![create(place, &format!("version {place}")), like(place + 1, who)];
        if like_first {
            batches.reverse();
        }
        let mut tasks = Vec::new();
        for batch in batches {
            let (store, queue) = (database.store.clone(), Mutex::new(VecDeque::from([batch])));
            tasks.push(tokio::spawn(async move { apply_batches(&store, &queue).await }));
            wait_until("it to be held up", Duration::from_secs(20), async || {
                let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
                let waiting: i64 = database.client.query_one(sql, &[]).await.unwrap().get(0);
                usize::try_from(waiting).unwrap() == tasks.len()
            })
            .await;
        }
        client.batch_execute("COMMIT").await.unwrap();
        for task in tasks {
            // A deadlock would surface here, after a second.
            task.await.unwrap();
        }
        let tables = database.tables().await;
        let row = &tables.rows("feed_generators")[generator];
        assert_eq!(row["display_name"], json!(format!("version {place}")));
        assert_eq!(row["like_count"], json!(if like_first { 1 } else { 2 }));
    }
    let sql = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(database.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 0);
}

fn commit(place: u64, repo: &str, ops: &[Value]) -> Entry {
    entry(place, "commit", &place.to_string(), &json!({"repo": repo, "ops": ops}))
}

#[tokio::test]
async fn nothing_new_is_stored_for_an_account_that_opted_out() {
    let database = Database::create().await;
    let post =
        json!({"action": "create", "path": "app.bsky.feed.post/1", "cid": "b", "record": {"text": "old"}});
    let like = json!({"action": "create", "path": "app.bsky.feed.like/1", "cid": "b", "record": {"subject": {"uri": POST}}});
    database.apply(&[commit(1, "did:plc:aaaa", &[post, like.clone()])]).await;
    let sql = "INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ('did:plc:aaaa', true), ('did:plc:bbbb', false)";
    database.client.batch_execute(sql).await.unwrap();
    let before = database.tables().await;

    // One of every kind.
    let mut maker = Maker::new(1);
    let kinds: HashSet<&str> = THEMES.concat().into_iter().collect();
    let ops: Vec<Value> = kinds
        .into_iter()
        .map(|collection| {
            let record = maker.record(collection, "did:plc:aaaa", "9");
            let rkey = if collection == "app.bsky.actor.profile" { "self" } else { "9" };
            json!({"action": "create", "path": format!("{collection}/{rkey}"), "cid": "b9", "record": record})
        })
        .collect();
    let update =
        json!({"action": "update", "path": "app.bsky.feed.post/1", "cid": "c", "record": {"text": "new"}});
    database.apply(&[commit(2, "did:plc:aaaa", &ops), commit(3, "did:plc:aaaa", &[update])]).await;
    let mut after = database.tables().await;
    // Accounts that the records mention get rows; those do not concern this account.
    after.rows_mut("users").retain(|did, _| before.rows("users").contains_key(did));
    model::assert_same("after it was forbidden", &before, &after);

    // Its deletions still apply, and it has a handle like everybody else.
    let unlike = json!({"action": "delete", "path": "app.bsky.feed.like/1"});
    let handle = entry(5, "identity", "5", &json!({"did": "did:plc:aaaa", "handle": "a.test"}));
    database.apply(&[commit(4, "did:plc:aaaa", &[unlike]), handle, commit(6, "did:plc:bbbb", &[like])]).await;
    let tables = database.tables().await;
    let likes: Vec<&String> = tables.rows("likes").keys().collect();
    assert_eq!(likes, ["at://did:plc:bbbb/app.bsky.feed.like/1"]);
    assert_eq!(tables.rows("users")["did:plc:aaaa"]["handle"], json!("a.test"));
}

#[tokio::test]
async fn a_notification_stays_read_while_its_recipient_stays_the_same() {
    let database = Database::create().await;
    let reply = |place: u64, to: &str| {
        let parent = json!({"uri": format!("at://{to}/app.bsky.feed.post/1")});
        let record = json!({"text": "yes", "reply": {"parent": parent, "root": parent}});
        let op = json!({"action": "update", "path": "app.bsky.feed.post/r", "cid": format!("c{place}"), "record": record});
        commit(place, "did:plc:aaaa", &[op])
    };
    let key = "at://did:plc:aaaa/app.bsky.feed.post/r#notification/reply";
    database.apply(&[reply(1, "did:plc:bbbb")]).await;
    database.client.batch_execute("UPDATE notifications SET is_read = true").await.unwrap();
    for (place, to, read) in [(2, "did:plc:bbbb", true), (3, "did:web:c.example", false)] {
        database.apply(&[reply(place, to)]).await;
        let tables = database.tables().await;
        let row = &tables.rows("notifications")[key];
        assert_eq!((&row["recipient_did"], &row["is_read"]), (&json!(to), &json!(read)));
        assert_eq!(row["cid"], json!(format!("c{place}")));
    }
    database.apply(&[reply(4, "did:plc:aaaa")]).await;
    assert!(database.tables().await.rows("notifications").is_empty());
}

#[tokio::test]
async fn the_notifications_table_is_untouched_when_notifications_are_off() {
    let database = Database::create().await;
    let (config, _) =
        from_env([("DATABASE_URL", database.url.as_str()), ("NOTIFICATIONS", "false")], Role::Worker)
            .unwrap();
    let silent = Store::new(&config).unwrap();
    let follow = |place: u64, action: &str, rkey: &str| {
        let path = format!("app.bsky.graph.follow/{rkey}");
        let record = json!({"subject": "did:plc:bbbb"});
        commit(
            place,
            "did:plc:aaaa",
            &[json!({"action": action, "path": path, "cid": "b", "record": record})],
        )
    };
    database.apply(&[follow(1, "create", "1")]).await;
    let before = database.tables().await.rows("notifications").clone();
    assert_eq!(before.len(), 1);
    let queue = Mutex::new(VecDeque::from([vec![follow(2, "delete", "1"), follow(3, "create", "2")]]));
    apply_batches(&silent, &queue).await;
    let tables = database.tables().await;
    assert_eq!(*tables.rows("notifications"), before);
    assert_eq!(tables.rows("follows").len(), 1);
}

#[tokio::test]
async fn a_post_is_stored_despite_a_quote_left_behind_by_the_old_workers() {
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

/// Rows without a record that collide with the rows written for new records.
#[tokio::test]
async fn a_leftover_row_under_the_same_key_does_not_block_a_record() {
    const LEFT: &str = "
        INSERT INTO notifications (uri, recipient_did, author_did, reason, created_at)
        SELECT 'at://did:plc:aaaa/app.bsky.' || key || '/3#notification', 'did:plc:left', 'did:plc:left', 'like', now()
        FROM unnest('{feed.like, feed.repost, graph.follow}'::text[]) key;
        INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
        SELECT 'at://did:plc:aaaa/app.bsky.feed.' || key || '/3', '', 'did:plc:left', 'post', now(), '', now()
        FROM unnest('{post, repost}'::text[]) key";
    const REFUSED: &str =
        "SELECT standpipe.notify_one(jsonb_populate_record(NULL::standpipe.op, jsonb_build_object(
        'repo', 'did:plc:aaaa', 'uri', 'at://did:plc:aaaa/app.bsky.feed.like/3', 'sort_at', now())),
        'did:plc:b3', 'like', NULL)";
    let database = Database::create().await;
    let ops: Vec<Value> = (0..5)
        .flat_map(|n| {
            let subject = json!({"uri": format!("at://did:plc:b{n}/app.bsky.feed.post/1"), "cid": "c"});
            let date = "2026-01-01T00:00:00Z";
            [
                ("app.bsky.feed.like", json!({"subject": subject, "createdAt": date})),
                ("app.bsky.feed.repost", json!({"subject": subject, "createdAt": date})),
                ("app.bsky.graph.follow", json!({"subject": format!("did:plc:b{n}"), "createdAt": date})),
                ("app.bsky.feed.post", json!({"text": "new", "createdAt": date})),
            ]
            .map(|(collection, record)| {
                json!({"action": "create", "path": format!("{collection}/{n}"), "cid": "b", "record": record})
            })
        })
        .collect();
    let one_commit = vec![commit(1, "did:plc:aaaa", &ops)];
    let commits: Vec<Entry> =
        (1..).zip(&ops).map(|(place, op)| commit(place, "did:plc:aaaa", std::slice::from_ref(op))).collect();
    let (odd, even) = (commits[1..].to_vec(), commits.clone());
    // Sent in sets, one by one, and in one transaction: see apply_batches.
    for (way, entries) in [("one commit", one_commit), ("events", odd), ("a batch", even)] {
        database.clear().await;
        database.apply(&entries).await;
        let undisturbed = database.tables().await;
        assert_eq!(undisturbed.rows("reposts").len(), 5, "{way}");
        database.clear().await;
        database.client.batch_execute(LEFT).await.unwrap();
        let refused = database.client.batch_execute(REFUSED).await.unwrap_err();
        assert_eq!(refused.code(), Some(&SqlState::UNIQUE_VIOLATION), "it is not in the way: {refused:?}");
        database.apply(&entries).await;
        model::assert_same(way, &undisturbed, &database.tables().await);
        assert_eq!(database.audit().await, Vec::<String>::new(), "{way}");
    }
}

#[tokio::test]
async fn tables_are_created_in_the_public_schema_whatever_the_role_name() {
    let url = Postgres::shared().await.fresh_database().await;
    let client = connect(&url).await;
    // A table of the old application.
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
async fn an_undated_record_appended_twice_gets_the_same_date_in_either_order() {
    let database = Database::create().await;
    let post = json!({"action": "create", "path": "app.bsky.feed.post/1", "cid": "b", "record": {"text": "undated"}});
    let first = entry(1, "commit", "7", &json!({"repo": "did:plc:aaaa", "ops": [post]}));
    // The Python reader lost its connection and resumed slightly before where it was.
    let mut second = first.clone();
    second.id.ms += 5000;
    let (forwards, backwards) = both_ways(&database, &[first, second]).await;
    model::assert_same("backwards", &forwards, &backwards);
}

#[tokio::test]
async fn two_commits_with_the_same_revision_give_the_same_result_in_either_order() {
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
async fn a_protocol_record_with_a_py_type_field_is_stored_unchanged() {
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
fn datetimes_are_parsed_as_the_protocol_specifies() {
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
        // These are invalid.
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
