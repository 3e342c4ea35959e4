//! The recording of a real server through the real binary: `pds-live.frames` over a websocket into Redis and
//! PostgreSQL. The expected result is computed from `pds-live.events.json`, the same frames decoded by
//! another implementation; `python-reader-entries.jsonl` holds the entries that the Python reader made of
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use standpipe_lab::simulate::{Source, read_frames};
use tokio_util::sync::DropGuard;

use crate::support::chain::serve;
use crate::support::model::{self, Event, Kind, Op, Tables, Version};
use crate::support::pooler::PgBouncer;
use crate::support::{
    Postgres, Redis, Signal, Standpipe, connect, execute, query_rows, query_value, wait_for, wait_until,
};

const SOON: Duration = Duration::from_mins(1);
const STREAM: &str = "firehose:events";
const CURSOR: &str = "firehose:cursor";
/// The last frame's number.
const LAST: &str = "145";
/// gone.test, which the recording's last frame deletes. Only its row in `users` remains.
const GONE: &str = "did:plc:zrnd3fgemnjfessp2fpfwpou";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

// ---------------------------------------------------------------------------------------------
// The recording as the other implementation reads it

fn recording() -> Vec<Event> {
    let frames: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(fixture("pds-live.events.json")).unwrap()).unwrap();
    frames.iter().filter_map(event).collect()
}

fn event(frame: &Value) -> Option<Event> {
    let body = &frame["body"];
    let text = |name: &str| body[name].as_str().map(str::to_owned);
    let kind = match frame["header"]["t"].as_str().unwrap() {
        "#commit" => Kind::Commit {
            repo: text("repo").unwrap(),
            ops: body["ops"].as_array().unwrap().iter().map(|op| operation(op, &frame["records"])).collect(),
        },
        "#identity" => Kind::Identity { did: text("did").unwrap(), handle: text("handle") },
        "#account" => Kind::Account {
            did: text("did").unwrap(),
            active: body["active"].as_bool().unwrap(),
            status: text("status"),
            time: text("time"),
        },
        "#sync" => return None,
        other => panic!("the recording has a frame of type {other}"),
    };
    // Every event of the recording has a number, so the stream's ids decide nothing.
    let seq = body["seq"].as_i64();
    Some(Event { version: Version { rev: text("rev"), seq, id: (0, 0) }, kind })
}

fn operation(op: &Value, records: &Value) -> Op {
    let path = op["path"].as_str().unwrap();
    Op {
        action: op["action"].as_str().unwrap().to_owned(),
        path: path.to_owned(),
        cid: op["cid"]["$link"].as_str().map(str::to_owned),
        record: records[path].clone(),
    }
}

fn commits(events: &[Event]) -> impl Iterator<Item = (&Event, &str, &[Op])> {
    events.iter().filter_map(|event| match &event.kind {
        Kind::Commit { repo, ops } => Some((event, repo.as_str(), ops.as_slice())),
        _ => None,
    })
}

/// The records that are live at the end, by URI: simply every operation carried out in the order of the
/// recording.
fn live(events: &[Event]) -> BTreeMap<String, &Value> {
    let mut live = BTreeMap::new();
    for (_, repo, ops) in commits(events) {
        for op in ops {
            let uri = format!("at://{repo}/{}", op.path);
            match op.action.as_str() {
                "delete" => live.remove(&uri),
                _ => live.insert(uri, &op.record),
            };
        }
    }
    live
}

fn table_of(collection: &str) -> &'static str {
    match collection {
        "app.bsky.feed.post" => "posts",
        "app.bsky.feed.like" => "likes",
        "app.bsky.feed.repost" => "reposts",
        "app.bsky.bookmark" => "bookmarks",
        "app.bsky.graph.follow" => "follows",
        "app.bsky.graph.block" => "blocks",
        "app.bsky.actor.profile" => "users",
        "app.bsky.graph.list" => "lists",
        "app.bsky.graph.listitem" => "list_items",
        "app.bsky.graph.listblock" => "list_blocks",
        "app.bsky.graph.starterpack" => "starter_packs",
        "app.bsky.feed.generator" => "feed_generators",
        "app.bsky.labeler.service" => "labeler_services",
        "app.bsky.feed.threadgate" => "thread_gates",
        "app.bsky.feed.postgate" => "post_gates",
        _ => "generic_records",
    }
}

fn collection(uri: &str) -> &str {
    uri.split('/').nth(3).unwrap()
}

/// Removes an account's records from the tables and from the counters.
fn leave_out(tables: &mut Tables, did: &str) {
    let own = format!("at://{did}/");
    for (table, counter, post, who) in [
        ("likes", "like_count", "post_uri", "user_did"),
        ("reposts", "repost_count", "post_uri", "user_did"),
        ("bookmarks", "bookmark_count", "post_uri", "user_did"),
        ("posts", "reply_count", "parent_uri", "uri"),
        ("quotes", "quote_count", "quoted_uri", "post_uri"),
    ] {
        let counted: BTreeSet<(String, String)> = tables
            .rows(table)
            .values()
            .filter(|row| row["uri"].as_str().unwrap().starts_with(&own))
            .filter_map(|row| Some((row[post].as_str()?.to_owned(), row[who].as_str()?.to_owned())))
            .collect();
        for (post, _) in counted {
            let count =
                tables.rows_mut("post_aggregations").get_mut(&post).unwrap().get_mut(counter).unwrap();
            *count = json!(count.as_i64().unwrap() - 1);
        }
    }
    for (name, rows) in &mut tables.0 {
        if *name != "users" {
            rows.retain(|key, _| !key.starts_with(&own));
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Running the real binary

/// A relay that serves the recording.
struct Relay {
    url: String,
    _stop: DropGuard,
}

impl Relay {
    async fn start() -> Self {
        let frames = read_frames(&fixture("pds-live.frames")).unwrap();
        let (url, stop) = serve(Source::Recording(Arc::from(frames)), None).await;
        Self { url, _stop: stop }
    }
}

/// How the program reaches PostgreSQL.
#[derive(Clone, Copy)]
enum Way {
    Directly,
    /// Through a `PgBouncer` in session mode with its default configuration.
    Pooled,
}

struct Servers {
    redis: Redis,
    database: String,
    pooler: Option<PgBouncer>,
}

impl Servers {
    async fn fresh(way: Way) -> Self {
        Self::on(way, Postgres::shared().await.fresh_database().await).await
    }

    /// An empty Redis for this database.
    async fn on(way: Way, database: String) -> Self {
        let pooler = match way {
            Way::Directly => None,
            Way::Pooled => Some(PgBouncer::start(Postgres::shared().await, "session", "").await),
        };
        Self { redis: Redis::start().await, database, pooler }
    }

    fn start(&self, command: &str, relay: Option<&Relay>, settings: &[(&str, &str)]) -> Standpipe {
        let redis = self.redis.url();
        let database =
            self.pooler.as_ref().map_or_else(|| self.database.clone(), |pooler| pooler.url(&self.database));
        let mut variables = vec![
            ("REDIS_URL", redis.as_str()),
            ("DATABASE_URL", &database),
            ("COLLECTIONS", "*"),
            ("HTTP_ADDR", "off"),
            ("CONSUMER_ID", "recorded"),
            ("VERIFY", "off"),
            ("NOTIFY_WITHIN", "off"),
        ];
        variables.extend(relay.map(|relay| ("RELAY_URL", relay.url.as_str())));
        variables.extend_from_slice(settings);
        Standpipe::start(&[command], &variables)
    }

    /// Runs reader and pipelines until the whole recording is applied and acknowledged, and stops them.
    async fn run(&self, relay: &Relay, settings: &[(&str, &str)]) {
        let mut process = self.start("run", Some(relay), settings);
        wait_until("the last frame to be in the stream", SOON, async || self.cursor().await == LAST).await;
        self.finish(&mut process).await;
    }

    /// Runs pipelines until everything in the stream is applied and acknowledged, and stops them.
    async fn work(&self, settings: &[(&str, &str)]) {
        let mut process = self.start("worker", None, settings);
        self.finish(&mut process).await;
    }

    async fn finish(&self, process: &mut Standpipe) {
        wait_for("everything to be acknowledged", SOON, async || {
            assert!(process.is_running(), "{}", process.output());
            self.acknowledged().await.map_err(|error| format!("{error}\n{}", process.output()))
        })
        .await;
        crate::support::chain::purged(&self.database).await;
        process.signal(Signal::Term);
        assert_eq!(process.wait_exit(SOON).await, 0, "{}", process.output());
    }

    async fn acknowledged(&self) -> Result<(), String> {
        let mut connection = self.redis.connection().await;
        let (stream, groups): (redis::streams::StreamInfoStreamReply, redis::streams::StreamInfoGroupsReply) =
            redis::pipe()
                .atomic()
                .cmd("XINFO")
                .arg(&["STREAM", STREAM])
                .cmd("XINFO")
                .arg(&["GROUPS", STREAM])
                .query_async(&mut connection)
                .await
                .map_err(|error| error.to_string())?;
        match groups.groups.as_slice() {
            [group] if group.pending == 0 && group.last_delivered_id == stream.last_generated_id => Ok(()),
            groups => Err(format!("{groups:?}, last entry {}", stream.last_generated_id)),
        }
    }

    async fn cursor(&self) -> String {
        let cursor: Option<String> =
            redis::cmd("GET").arg(CURSOR).query_async(&mut self.redis.connection().await).await.unwrap();
        cursor.unwrap_or_default()
    }

    async fn dead_letters(&self) -> u64 {
        let key = format!("{STREAM}:dead");
        redis::cmd("XLEN").arg(key).query_async(&mut self.redis.connection().await).await.unwrap()
    }

    /// Appends entries, all at once. `id` is `*` or the id of the entry with this index.
    async fn push(&self, entries: &[[String; 3]], id: impl Fn(usize) -> String) {
        let mut pipe = redis::pipe();
        for (index, [event_type, data, seq]) in entries.iter().enumerate() {
            pipe.cmd("XADD").arg(STREAM).arg(id(index));
            pipe.arg(&["type", event_type, "data", data, "seq", seq]).ignore();
        }
        pipe.query_async::<()>(&mut self.redis.connection().await).await.unwrap();
    }

    async fn tables(&self) -> Tables {
        model::read(&connect(&self.database).await).await
    }

    async fn assert_audited(&self) {
        let finished = Standpipe::run(&["audit"], &[("DATABASE_URL", &self.database)], SOON).await;
        assert_eq!(finished.code, 0, "{}{}", finished.stdout, finished.stderr);
    }

    /// Every row of every table as text, without the given columns. This includes internal tables:
    /// tombstones, handles, the registers of the accounts.
    async fn dump(&self, without: &[&str]) -> BTreeMap<String, Vec<String>> {
        let tables = "SELECT tablename, format('%I.%I', schemaname, tablename) FROM pg_tables
                      WHERE schemaname IN ('public', 'standpipe') AND tablename NOT IN ('migrations', 'tables_before', 'epochs', 'acknowledged')";
        let mut dump = BTreeMap::new();
        for table in query_rows(&self.database, tables).await {
            let [Some(name), Some(table)] = table.as_slice() else { panic!("{table:?}") };
            let sql = format!(
                "SELECT (to_jsonb(t) - '{{{}}}'::text[])::text FROM {table} t ORDER BY 1",
                without.join(",")
            );
            let rows = query_rows(&self.database, &sql).await;
            dump.insert(name.clone(), rows.into_iter().map(|mut row| row.remove(0).unwrap()).collect());
        }
        assert!(dump.len() > 20);
        dump
    }
}

/// The columns that record when and through which entry a row was written. `id` numbers notifications in
/// order of arrival.
const CIRCUMSTANCES: &[&str] = &["id", "indexed_at", "updated_at", "stream_ms", "stream_seq"];

#[track_caller]
fn assert_same_dump(
    what: &str,
    before: &BTreeMap<String, Vec<String>>,
    after: &BTreeMap<String, Vec<String>>,
) {
    assert!(before.keys().eq(after.keys()), "{what}: other tables");
    for (table, before) in before {
        let (before, after): (BTreeSet<_>, BTreeSet<_>) =
            (before.iter().collect(), after[table].iter().collect());
        let gone: Vec<_> = before.difference(&after).take(3).collect();
        let new: Vec<_> = after.difference(&before).take(3).collect();
        assert!(gone.is_empty() && new.is_empty(), "{what}: {table} had {gone:#?}, now has {new:#?}");
    }
}

// ---------------------------------------------------------------------------------------------
// The tests

async fn exactly_the_records_live_at_the_end_of_the_recording_have_rows(way: Way) {
    let events = recording();
    let relay = Relay::start().await;
    let servers = Servers::fresh(way).await;
    servers.run(&relay, &[]).await;
    assert_eq!(servers.dead_letters().await, 0);
    servers.assert_audited().await;
    let found = servers.tables().await;
    assert_eq!(found.rows("users")[GONE]["account_status"], json!("deleted"));

    // First without the model: which records are live, kind by kind. None of the deleted account's records
    // are.
    let live = live(&events);
    let live: BTreeMap<&str, &Value> = live
        .iter()
        .filter(|(uri, _)| !uri.starts_with(&format!("at://{GONE}/")))
        .map(|(uri, record)| (uri.as_str(), *record))
        .collect();
    let kinds: BTreeSet<&str> =
        commits(&events).flat_map(|(_, _, ops)| ops).map(|op| op.path.split('/').next().unwrap()).collect();
    let rows_of = |kind: &str| -> BTreeSet<String> {
        let rows = found.rows(table_of(kind)).iter();
        match table_of(kind) {
            "users" => rows
                .filter(|(_, row)| !row["profile_record"].is_null())
                .map(|(did, _)| format!("at://{did}/app.bsky.actor.profile/self"))
                .collect(),
            // They are keyed by the post they apply to, which has the same record key as they do.
            "thread_gates" | "post_gates" => {
                rows.map(|(post, _)| post.replace("app.bsky.feed.post", kind)).collect()
            }
            _ => rows.map(|(uri, _)| uri.clone()).filter(|uri| collection(uri) == kind).collect(),
        }
    };
    println!("{:32} {:>13} {:>10}", "kind", "expected rows", "found rows");
    let mut wrong = Vec::new();
    for kind in &kinds {
        let expected: BTreeSet<String> =
            live.keys().filter(|uri| collection(uri) == *kind).map(|uri| (*uri).to_owned()).collect();
        let found = rows_of(kind);
        println!("{kind:32} {:>13} {:>10}", expected.len(), found.len());
        if expected != found {
            wrong.push(format!("{kind}: {:?}", expected.symmetric_difference(&found).collect::<Vec<_>>()));
        }
    }

    // Then everything that the model knows: contents, counters, feed items, handles, account states.
    let expected = model::expected(&events);
    for table in ["users", "quotes", "feed_items", "post_aggregations", "labels"] {
        println!("{table:32} {:>13} {:>10}", expected.rows(table).len(), found.rows(table).len());
    }
    for (table, column, value) in [
        ("notifications", "reason", json!("like")),
        ("notifications", "reason", json!("like-via-repost")),
        ("notifications", "reason", json!("repost")),
        ("notifications", "reason", json!("follow")),
        ("notifications", "reason", json!("reply")),
        ("notifications", "reason", json!("mention")),
        ("notifications", "reason", json!("quote")),
        ("posts", "has_thread_gate", json!(true)),
        ("posts", "has_post_gate", json!(true)),
        ("posts", "violates_thread_gate", json!(true)),
        ("posts", "violates_embedding_rules", json!(true)),
    ] {
        let count = |tables: &Tables| tables.rows(table).values().filter(|row| row[column] == value).count();
        let what = if table == "posts" { column.to_owned() } else { format!("{table} {value}") };
        println!("{what:32} {:>13} {:>10}", count(&expected), count(&found));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    model::assert_same("after the recording", &expected, &found);

    // Some values explicitly, in case both are wrong in the same way.
    let text = |uri: &str, column: &str| found.rows("posts")[uri][column].clone();
    let eve = "at://did:plc:5ixs3xm5b4bd55xgfjw5kuqe/app.bsky.feed.post";
    assert_eq!(text(&format!("{eve}/3n2samhsskc2n"), "text"), json!("NUL in text  end"));
    assert_eq!(text(&format!("{eve}/3n2samhx76c2n"), "text"), json!(""));
    assert_eq!(text(&format!("{eve}/3n2samhqzvs2n"), "created_at"), json!("2030-12-31 18:30:00.000000"));
    let alice = "at://did:plc:75etpyow5sotosvyllzeqzjn/app.bsky.feed.post";
    let embed = text(&format!("{alice}/3n2samhcj2s2n"), "embed");
    assert_eq!(embed["images"][0]["alt"], json!("alt \u{201c}text\u{201d}  nul? no: \\u0000"));
    // Alice's gate detaches dan's quote and forbids all others; her thread gate has been deleted again.
    let dans_quote = "at://did:plc:b5uxbetoc3trmnxl2dlmqxoa/app.bsky.feed.post/3n2samh7zxk2n";
    assert_eq!(text(dans_quote, "violates_embedding_rules"), json!(true));
    let gated = format!("{alice}/3n2samh4fqs2n");
    assert_eq!((text(&gated, "has_post_gate"), text(&gated, "has_thread_gate")), (json!(true), json!(false)));
    let told = &found.rows("notifications")[&format!("{dans_quote}#notification/quote")];
    assert_eq!((&told["reason"], &told["reason_subject"]), (&json!("quote"), &json!(dans_quote)));
    let handle = |did: &str| found.rows("users")[did]["handle"].clone();
    // bob became bobby, and then dan took the handle.
    assert_eq!(handle("did:plc:uw7drvxum2kz6dn4yur6qbec"), json!("bobby.test"));
    assert_eq!(handle("did:plc:b5uxbetoc3trmnxl2dlmqxoa"), json!("bob.test"));
}

async fn the_python_readers_entries_give_the_same_rows(way: Way) {
    /// After the recording. All entries have this one millisecond.
    const ENTRY_MS: i64 = 1_795_235_000_000;

    let events = recording();
    let relay = Relay::start().await;
    let frames = Servers::fresh(way).await;
    frames.run(&relay, &[]).await;
    let frames = frames.tables().await;

    let file = std::fs::read_to_string(fixture("python-reader-entries.jsonl")).unwrap();
    let entries: Vec<[String; 3]> = file
        .lines()
        .map(|line| {
            let entry: Value = serde_json::from_str(line).unwrap();
            ["type", "data", "seq"].map(|name| entry[name].as_str().unwrap().to_owned())
        })
        .collect();

    // That reader leaves out operations whose record its library does not know.
    let written: BTreeSet<(String, String)> = entries
        .iter()
        .flat_map(|[_, data, seq]| {
            let data: Value = serde_json::from_str(data).unwrap();
            let ops = data["ops"].as_array().cloned().unwrap_or_default();
            ops.into_iter().map(move |op| (seq.clone(), op["path"].as_str().unwrap().to_owned()))
        })
        .collect();
    let mut lacking = BTreeSet::new();
    for (event, repo, ops) in commits(&events) {
        for op in ops
            .iter()
            .filter(|op| !written.contains(&(event.version.seq.unwrap().to_string(), op.path.clone())))
        {
            assert_eq!(op.action, "create", "{} is an operation that is simply left out below", op.path);
            lacking.insert(format!("at://{repo}/{}", op.path));
        }
    }
    println!("{} entries without these records: {lacking:#?}", entries.len());
    assert_eq!(lacking.len(), 4);

    let mut expected = frames.clone();
    for rows in expected.0.values_mut() {
        rows.retain(|key, _| !lacking.contains(key.split('#').next().unwrap()));
        for row in rows.values_mut() {
            // It writes neither a commit's revision nor an account's status.
            for column in ["commit_rev", "account_status"] {
                if row.contains_key(column) {
                    row.insert(column, Value::Null);
                }
            }
        }
    }
    leave_out(&mut expected, GONE);
    // If a record has no usable date, its row gets the time of its key or of the revision, whichever is earlier; without
    // these it gets the stream entry's, and nothing is sorted after that. A date in the future is kept, except in `sort_at`.
    let time_of = |uri: &str| {
        let key = uri.rsplit('/').next().and_then(model::tid_micros).unwrap_or(i64::MAX);
        model::timestamp(key.min(ENTRY_MS * 1000))
    };
    let live = live(&events);
    let mut undated = Vec::new();
    for (uri, record) in &live {
        let dated = record["createdAt"].as_str().and_then(model::micros_of).is_some();
        let entry_time = time_of(uri);
        for rows in expected.0.values_mut() {
            let Some(row) = rows.get_mut(uri).filter(|row| row.contains_key("created_at")) else { continue };
            if !dated {
                undated.push(uri.clone());
                row.insert("created_at", json!(entry_time));
            }
            if let (true, Value::String(created)) = (row.contains_key("sort_at"), row["created_at"].clone()) {
                row.insert("sort_at", json!(created.min(entry_time.clone())));
            }
        }
        // A notification is sorted like its record, and the self-labels of a post have the date of the post.
        let dated = record["createdAt"].as_str().and_then(model::micros_of).map(model::timestamp);
        let dated = dated.unwrap_or_else(|| entry_time.clone());
        for (key, row) in expected.rows_mut("notifications") {
            if key.split('#').next() == Some(uri) {
                row.insert("created_at", json!(dated.clone().min(entry_time.clone())));
            }
        }
        for (key, row) in expected.rows_mut("labels") {
            if key.split('#').next() == Some(uri) {
                row.insert("created_at", json!(dated));
            }
        }
    }
    undated.dedup();
    println!("without a usable date: {undated:#?}");

    for numbered in [true, false] {
        let entries: Vec<[String; 3]> = entries
            .iter()
            .map(|[event_type, data, seq]| {
                let seq = if numbered { seq.clone() } else { String::new() };
                [event_type.clone(), data.clone(), seq]
            })
            .collect();
        let servers = Servers::fresh(way).await;
        servers.push(&entries, |index| format!("{ENTRY_MS}-{index}")).await;
        servers.work(&[]).await;
        assert_eq!(servers.dead_letters().await, 0);
        servers.assert_audited().await;
        let mut found = servers.tables().await;
        // Without the account's status its deletion is not known.
        assert!(found.rows("posts").values().any(|row| row["author_did"] == GONE));
        leave_out(&mut found, GONE);
        if !numbered {
            // Then only the entries' positions within their millisecond order them.
            for row in expected.0.values_mut().flat_map(BTreeMap::values_mut) {
                if row.contains_key("commit_seq") {
                    row.insert("commit_seq", Value::Null);
                }
            }
        }
        let stripped = strip_types(&mut found, &expected);
        assert!(stripped > 0);
        let what = if numbered { "the Python reader's entries" } else { "the same without numbers" };
        model::assert_same(what, &expected, &found);
    }
}

/// Removes every `$type` that the other tables do not have in the same place: the Python form names the type
/// of every object, the protocol only where there is a choice.
fn strip_types(found: &mut Tables, like: &Tables) -> usize {
    let mut stripped = 0;
    for (table, rows) in &mut found.0 {
        for (key, row) in rows {
            let Some(like) = like.rows(table).get(key) else { continue };
            for (column, value) in row {
                stripped += strip_types_of(value, &like[column]);
            }
        }
    }
    stripped
}

fn strip_types_of(value: &mut Value, like: &Value) -> usize {
    match (value, like) {
        (Value::Array(items), Value::Array(like)) => {
            items.iter_mut().zip(like).map(|(item, like)| strip_types_of(item, like)).sum()
        }
        (Value::Object(fields), Value::Object(like)) => {
            let mut stripped = 0;
            if !like.contains_key("$type") && fields.remove("$type").is_some() {
                stripped += 1;
            }
            for (name, value) in fields {
                stripped += like.get(name).map_or(0, |like| strip_types_of(value, like));
            }
            stripped
        }
        _ => 0,
    }
}

async fn replaying_the_recording_changes_nothing(way: Way) {
    let relay = Relay::start().await;
    let servers = Servers::fresh(way).await;
    servers.run(&relay, &[("PARALLEL_CONSUMERS", "1"), ("BATCH_SIZE", "7")]).await;
    let before = servers.dump(CIRCUMSTANCES).await;
    assert!(before["posts"].len() > 100, "{:?}", before.keys());

    // The same Redis, told to start over: everything is in the stream twice.
    let _: () = redis::cmd("SET")
        .arg(&[CURSOR, "0"])
        .query_async(&mut servers.redis.connection().await)
        .await
        .unwrap();
    servers.run(&relay, &[("PARALLEL_CONSUMERS", "4"), ("BATCH_SIZE", "7")]).await;
    assert_same_dump("after a cursor of 0", &before, &servers.dump(CIRCUMSTANCES).await);

    // A lost Redis: all ids are new, and the batches are different.
    let anew =
        [CIRCUMSTANCES, &["handle_ms", "handle_sq", "status_ms", "status_sq", "ms", "sq", "deleted_seq"]]
            .concat();
    let before = servers.dump(&anew).await;
    let servers = Servers::on(way, servers.database).await;
    servers.run(&relay, &[("PARALLEL_CONSUMERS", "4"), ("BATCH_SIZE", "1")]).await;
    // Everything is read again in a later epoch, and rows without a revision are rewritten.
    let without_epochs = |mut dump: BTreeMap<String, Vec<String>>| {
        for row in dump.values_mut().flatten() {
            while let Some(at) = row.find("@17") {
                row.replace_range(at..at + 14, "");
            }
        }
        dump
    };
    let (before, after) = (without_epochs(before), without_epochs(servers.dump(&anew).await));
    assert_same_dump("after Redis was lost", &before, &after);
    assert_eq!(servers.dead_letters().await, 0);
    servers.assert_audited().await;
}

async fn shuffling_the_recording_changes_nothing(way: Way) {
    let relay = Relay::start().await;
    let servers = Servers::fresh(way).await;
    // Only the reader, so that the whole recording is in the stream.
    let mut reader = servers.start("reader", Some(&relay), &[]);
    wait_until("the last frame to be in the stream", SOON, async || servers.cursor().await == LAST).await;
    reader.signal(Signal::Term);
    assert_eq!(reader.wait_exit(SOON).await, 0, "{}", reader.output());
    let all: redis::streams::StreamRangeReply = redis::cmd("XRANGE")
        .arg(&[STREAM, "-", "+"])
        .query_async(&mut servers.redis.connection().await)
        .await
        .unwrap();
    let mut entries: Vec<[String; 3]> =
        all.ids.iter().map(|entry| ["type", "data", "seq"].map(|name| entry.get(name).unwrap())).collect();
    assert!(entries.len() > 120, "{}", entries.len());
    servers.work(&[]).await;
    let tables = servers.tables().await;
    let dump = servers.dump(CIRCUMSTANCES).await;
    // If a row is rewritten, columns filled from the clock and ids of entries do not matter.
    let anew: Vec<&str> = CIRCUMSTANCES
        .iter()
        .chain(&["handle_ms", "handle_sq", "profile_ms", "profile_sq", "status_ms", "status_sq", "ms", "sq"])
        .copied()
        .collect();
    let forget_clock =
        "UPDATE users SET created_at = '2000-01-01'; UPDATE post_aggregations SET created_at = '2000-01-01'";
    let mut in_order = None;

    let seed = fastrand::u64(..1 << 32);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for settings in [
        [("PARALLEL_CONSUMERS", "4"), ("BATCH_SIZE", "7")],
        [("PARALLEL_CONSUMERS", "4"), ("BATCH_SIZE", "1")],
        [("PARALLEL_CONSUMERS", "1"), ("BATCH_SIZE", "200")],
    ] {
        rng.shuffle(&mut entries);
        let what = format!("seed {seed}, {settings:?}");

        let again = Servers::on(way, servers.database.clone()).await;
        again.push(&entries, |_| "*".to_owned()).await;
        again.work(&settings).await;
        if in_order.is_none() {
            assert_same_dump(&format!("{what}, applied again"), &dump, &again.dump(CIRCUMSTANCES).await);
            execute(&servers.database, forget_clock).await;
            in_order = Some(servers.dump(&anew).await);
        }
        let in_order = in_order.as_ref().unwrap();
        assert_same_dump(&format!("{what}, applied again"), in_order, &again.dump(&anew).await);

        let empty = Servers::fresh(way).await;
        empty.push(&entries, |_| "*".to_owned()).await;
        empty.work(&settings).await;
        assert_eq!(empty.dead_letters().await, 0);
        model::assert_same(&format!("{what}, on an empty database"), &tables, &empty.tables().await);
        execute(&empty.database, forget_clock).await;
        assert_same_dump(&format!("{what}, on an empty database"), in_order, &empty.dump(&anew).await);
        empty.assert_audited().await;
    }
    assert_eq!(
        query_value(&servers.database, "SELECT min(least(like_count, reply_count)) FROM post_aggregations")
            .await,
        "0"
    );
}

macro_rules! both_ways {
    ($($test:ident,)+) => {
        mod directly {
            $(#[tokio::test]
            async fn $test() {
                super::$test(super::Way::Directly).await;
            })+
        }

        mod behind_pgbouncer {
            $(#[tokio::test]
            async fn $test() {
                super::$test(super::Way::Pooled).await;
            })+
        }
    };
}

both_ways! {
    exactly_the_records_live_at_the_end_of_the_recording_have_rows,
    the_python_readers_entries_give_the_same_rows,
    replaying_the_recording_changes_nothing,
    shuffling_the_recording_changes_nothing,
}
