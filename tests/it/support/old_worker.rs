//! A worker that behaves like the ones before standpipe: it reads only new entries, acknowledges everything,
//! sends one statement after another, changes counters blindly, and leaves neither revisions nor tombstones.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::{Redis, connect};

/// What it has done.
#[derive(Default)]
pub struct Done {
    /// The ids of the entries that it received.
    pub entries: Vec<String>,
    /// Records and accounts that the entries mention.
    pub touched: HashSet<String>,
}

pub struct OldWorker {
    task: JoinHandle<()>,
    stop: CancellationToken,
    pub done: Arc<Mutex<Done>>,
}

impl OldWorker {
    /// One consumer of the group; it reads ten entries at a time.
    pub async fn start(redis: &Redis, stream: &str, group: &str, database: &str) -> Self {
        let (stop, done) = (CancellationToken::new(), Arc::<Mutex<Done>>::default());
        let client = connect(database).await;
        let mut connection = redis.connection().await;
        let (stream, group) = (stream.to_owned(), group.to_owned());
        let task = tokio::spawn({
            let (stop, done) = (stop.clone(), Arc::clone(&done));
            async move {
                while !stop.is_cancelled() {
                    let reply: redis::streams::StreamReadReply = redis::cmd("XREADGROUP")
                        .arg(&["GROUP", &group, "worker-0", "COUNT", "10", "STREAMS", &stream, ">"])
                        .query_async(&mut connection)
                        .await
                        .unwrap();
                    let entries: Vec<_> = reply.keys.into_iter().flat_map(|key| key.ids).collect();
                    if entries.is_empty() {
                        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                    }
                    for entry in entries {
                        let (kind, data): (String, String) =
                            (entry.get("type").unwrap(), entry.get("data").unwrap());
                        let data: Value = serde_json::from_str(&data).unwrap();
                        let touched = apply(&client, &kind, &data).await;
                        {
                            let mut noted = done.lock().unwrap();
                            noted.entries.push(entry.id.clone());
                            noted.touched.extend(touched);
                        }
                        let _: u64 = redis::cmd("XACK")
                            .arg(&[&stream, &group, &entry.id])
                            .query_async(&mut connection)
                            .await
                            .unwrap();
                    }
                }
            }
        });
        Self { task, stop, done }
    }

    /// Stops it once it has finished its entries.
    pub async fn stop(self) -> Done {
        self.stop.cancel();
        self.task.await.unwrap();
        std::mem::take(&mut *self.done.lock().unwrap())
    }
}

/// Applies an entry. The real one logs any error and acknowledges the entry; after a deadlock with us, that would be another one
/// in each run, so this one tries again.
async fn apply(client: &Client, kind: &str, data: &Value) -> Vec<String> {
    loop {
        let (touched, failed) = transaction(client, kind, data).await;
        if failed.is_none_or(|error| error.code() != Some(&SqlState::T_R_DEADLOCK_DETECTED)) {
            return touched;
        }
    }
}

/// One transaction: what the entry mentions, and the first error.
async fn transaction(
    client: &Client,
    kind: &str,
    data: &Value,
) -> (Vec<String>, Option<tokio_postgres::Error>) {
    let mut touched = Vec::new();
    client.batch_execute("BEGIN").await.unwrap();
    let mut failed = None;
    match kind {
        "commit" => {
            let repo = data["repo"].as_str().unwrap();
            for op in data["ops"].as_array().unwrap() {
                let uri = format!("at://{repo}/{}", op["path"].as_str().unwrap());
                failed = failed.or(operation(client, repo, &uri, op).await.err());
                touched.push(uri);
            }
        }
        "identity" => {
            let did = data["did"].as_str().unwrap();
            if let Some(handle) = data["handle"].as_str() {
                let sql = "INSERT INTO users (did, handle) VALUES ($1, $2)
                           ON CONFLICT (did) DO UPDATE SET handle = excluded.handle";
                failed = failed.or(client.execute(sql, &[&did, &handle]).await.err());
            }
            touched.push(did.to_owned());
        }
        _ => touched.extend(data["did"].as_str().map(str::to_owned)),
    }
    client.batch_execute(if failed.is_some() { "ROLLBACK" } else { "COMMIT" }).await.unwrap();
    (touched, failed)
}

async fn operation(client: &Client, repo: &str, uri: &str, op: &Value) -> Result<(), tokio_postgres::Error> {
    let (collection, record) = (op["path"].as_str().unwrap().split('/').next().unwrap(), &op["record"]);
    let action = op["action"].as_str().unwrap();
    let cid = op["cid"].as_str().unwrap_or("");
    let subject = record["subject"]["uri"].as_str().or_else(|| record["subject"].as_str()).unwrap_or("");
    client
        .execute(
            "INSERT INTO users (did, handle) VALUES ($1, 'handle.invalid') ON CONFLICT (did) DO NOTHING",
            &[&repo],
        )
        .await?;
    match (action, collection) {
        ("create", "app.bsky.feed.like" | "app.bsky.feed.repost") => {
            let (table, column) = pointer(collection);
            let sql = format!(
                "INSERT INTO {table} (uri, user_did, post_uri, created_at) VALUES ($1, $2, $3, now()) ON CONFLICT DO NOTHING"
            );
            client.execute(&sql, &[&uri, &repo, &subject]).await?;
            count(client, subject, column, 1).await?;
            if table == "reposts" {
                let sql =
                    "INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
                           VALUES ($1, $2, $3, 'repost', now(), $4, now()) ON CONFLICT DO NOTHING";
                client.execute(sql, &[&uri, &subject, &repo, &cid]).await?;
            }
        }
        ("delete", "app.bsky.feed.like" | "app.bsky.feed.repost") => {
            let (table, column) = pointer(collection);
            let sql = format!("DELETE FROM {table} WHERE uri = $1 RETURNING post_uri");
            if let Some(row) = client.query_opt(&sql, &[&uri]).await? {
                count(client, row.get(0), column, -1).await?;
            }
            client.execute("DELETE FROM feed_items WHERE uri = $1", &[&uri]).await?;
        }
        ("create" | "update", "app.bsky.feed.post") => {
            let (parent, root) =
                (record["reply"]["parent"]["uri"].as_str(), record["reply"]["root"]["uri"].as_str());
            let text = record["text"].as_str().unwrap_or("").replace('\0', "");
            let sql = "INSERT INTO posts (uri, cid, author_did, text, parent_uri, root_uri, created_at)
                       VALUES ($1, $2, $3, $4, $5, $6, now()) ON CONFLICT DO NOTHING";
            client.execute(sql, &[&uri, &cid, &repo, &text, &parent, &root]).await?;
            client
                .execute(
                    "INSERT INTO post_aggregations (post_uri) VALUES ($1) ON CONFLICT DO NOTHING",
                    &[&uri],
                )
                .await?;
            let kind = if parent.is_some() { "reply" } else { "post" };
            let sql = "INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
                       VALUES ($1, $1, $2, $3, now(), $4, now()) ON CONFLICT DO NOTHING";
            client.execute(sql, &[&uri, &repo, &kind, &cid]).await?;
            if let Some(parent) = parent {
                count(client, parent, "reply_count", 1).await?;
            }
        }
        ("delete", "app.bsky.feed.post") => {
            client.execute("DELETE FROM feed_items WHERE uri = $1", &[&uri]).await?;
            client.execute("DELETE FROM posts WHERE uri = $1", &[&uri]).await?;
            client.execute("DELETE FROM post_aggregations WHERE post_uri = $1", &[&uri]).await?;
        }
        ("create", "app.bsky.graph.follow" | "app.bsky.graph.block") => {
            let (table, from, to) = relation(collection);
            let sql = format!(
                "INSERT INTO {table} (uri, {from}, {to}, created_at) VALUES ($1, $2, $3, now()) ON CONFLICT DO NOTHING"
            );
            client.execute(&sql, &[&uri, &repo, &subject]).await?;
        }
        ("delete", "app.bsky.graph.follow" | "app.bsky.graph.block") => {
            let (table, ..) = relation(collection);
            client.execute(&format!("DELETE FROM {table} WHERE uri = $1"), &[&uri]).await?;
        }
        // The tests do not need any others.
        _ => {}
    }
    Ok(())
}

async fn count(client: &Client, post: &str, column: &str, by: i32) -> Result<u64, tokio_postgres::Error> {
    let sql = format!("UPDATE post_aggregations SET {column} = {column} + $2 WHERE post_uri = $1");
    client.execute(&sql, &[&post, &by]).await
}

fn pointer(collection: &str) -> (&'static str, &'static str) {
    if collection.ends_with("like") { ("likes", "like_count") } else { ("reposts", "repost_count") }
}

fn relation(collection: &str) -> (&'static str, &'static str, &'static str) {
    if collection.ends_with("follow") {
        ("follows", "follower_did", "following_did")
    } else {
        ("blocks", "blocker_did", "blocked_did")
    }
}
