//! A loop in the style of the Python worker that standpipe replaces, so that ratios mean the same on every machine.
//!
//! Its pipelines read ten entries at a time and work on one after the other: BEGIN, one awaited statement after the
//! other, COMMIT that waits for the disk, one XACK. It does less than the worker did (no Python, no round trip of its pool
//! for every connection that is given back), and like it converges to nothing: it counts blindly, keeps no revisions and
//! no tombstones, and an error is counted and acknowledged.

use std::collections::HashMap;
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde_json::Value;
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;

use super::lab::Lab;
use super::postgres::Connection;
use super::stream::Prepared;
use standpipe::event::Entry;
use standpipe::stream::{Redis, Stream};

/// Entries that are read at a time.
const COUNT: usize = 10;

/// How a run went.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// From the first read to the last acknowledgement.
    pub seconds: f64,
    /// Entries that came to an error (deadlocks, most of all) and were acknowledged all the same.
    pub errors: u64,
}

/// The pipelines, connected.
pub struct Reference {
    pipelines: Vec<Pipeline>,
}

impl Reference {
    /// Fills the stream and connects as many pipelines as the configuration says.
    ///
    /// # Errors
    ///
    /// A server refuses.
    pub async fn open(lab: &mut Lab, prepared: &Prepared, database: &str) -> Result<Self> {
        lab.streams.restore(prepared, &lab.keys).await?;
        Stream::over(lab.streams.connection(), lab.keys.clone()).ensure().await?;
        let redis = Redis::open(&lab.config)?;
        let mut pipelines = Vec::new();
        for index in 0..lab.config.parallel_consumers {
            pipelines.push(Pipeline {
                consumer: format!("reference-{index}"),
                stream: redis.connect().await?,
                database: Connection::open(database).await?,
                statements: HashMap::new(),
            });
        }
        Ok(Self { pipelines })
    }

    /// Works until nothing is left.
    ///
    /// # Errors
    ///
    /// A server is gone.
    pub async fn run(self) -> Result<Done> {
        let began = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for pipeline in self.pipelines {
            tasks.spawn(pipeline.run());
        }
        let mut done = Done { seconds: 0.0, errors: 0 };
        let mut last = began;
        while let Some(ended) = tasks.join_next().await {
            let (errors, at) = ended.context("a pipeline of the reference loop panicked")??;
            done.errors += errors;
            last = last.max(at);
        }
        done.seconds = (last - began).as_secs_f64();
        Ok(done)
    }
}

type Parameter<'a> = &'a (dyn ToSql + Sync);

struct Pipeline {
    consumer: String,
    stream: Stream,
    database: Connection,
    statements: HashMap<&'static str, Statement>,
}

impl Pipeline {
    /// Returns how many errors there were, and when it acknowledged for the last time.
    async fn run(mut self) -> Result<(u64, Instant)> {
        let mut errors = 0;
        let mut last = Instant::now();
        loop {
            let batch = self.stream.read_new(&self.consumer, COUNT, true).await?;
            if batch.entries.is_empty() {
                return Ok((errors, last));
            }
            for entry in batch.entries {
                if let Err(error) = self.entry(&entry).await {
                    // Without an SQLSTATE it is not a refusal: the connection is gone.
                    anyhow::ensure!(error.code().is_some(), "the reference loop: {error}");
                    self.database.batch_execute("ROLLBACK").await?;
                    errors += 1;
                }
                self.stream.acknowledge(&[entry.id]).await?;
                last = Instant::now();
            }
        }
    }

    async fn entry(&mut self, entry: &Entry) -> Result<(), tokio_postgres::Error> {
        let Ok(data) = serde_json::from_str::<Value>(&entry.data) else { return Ok(()) };
        match entry.event_type.as_str() {
            "commit" => {
                self.database.batch_execute("BEGIN").await?;
                let repo = data["repo"].as_str().unwrap_or_default();
                for op in data["ops"].as_array().into_iter().flatten() {
                    self.operation(repo, op).await?;
                }
                self.database.batch_execute("COMMIT").await
            }
            // One statement, and so a transaction of its own.
            "identity" => match (data["did"].as_str(), data["handle"].as_str()) {
                (Some(did), Some(handle)) => self.execute(IDENTITY, &[&did, &handle]).await.map(drop),
                _ => Ok(()),
            },
            // The rest it only reads.
            _ => Ok(()),
        }
    }

    async fn operation(&mut self, repo: &str, op: &Value) -> Result<(), tokio_postgres::Error> {
        let path = op["path"].as_str().unwrap_or_default();
        let uri = format!("at://{repo}/{path}");
        let collection = path.split('/').next().unwrap_or_default();
        if op["action"] == "delete" {
            return self.delete(&uri, collection).await;
        }
        let (record, cid) = (&op["record"], op["cid"].as_str().unwrap_or_default());
        let at = created_at(record);
        match collection {
            "app.bsky.feed.like" => {
                let subject = record["subject"]["uri"].as_str().unwrap_or_default();
                self.ensure_user(repo).await?;
                self.execute(LIKE, &[&uri, &repo, &subject, &at]).await?;
                self.execute(LIKED, &[&subject]).await?;
                self.notify(&uri, owner(subject), repo, "like", Some(subject), cid, at).await
            }
            "app.bsky.feed.repost" => {
                let subject = record["subject"]["uri"].as_str().unwrap_or_default();
                self.ensure_user(repo).await?;
                self.execute(REPOST, &[&uri, &repo, &subject, &at]).await?;
                self.execute(REPOSTED, &[&subject]).await?;
                self.execute(FEED_ITEM, &[&uri, &subject, &repo, &"repost", &at, &cid]).await?;
                self.notify(&uri, owner(subject), repo, "repost", Some(subject), cid, at).await
            }
            "app.bsky.feed.post" => self.post(&uri, repo, cid, record, at).await,
            "app.bsky.graph.follow" => {
                let subject = record["subject"].as_str().unwrap_or_default();
                self.ensure_user(repo).await?;
                self.ensure_user(subject).await?;
                self.execute(FOLLOW, &[&uri, &repo, &subject, &at]).await?;
                self.notify(&uri, subject, repo, "follow", None, cid, at).await
            }
            "app.bsky.graph.block" => {
                let subject = record["subject"].as_str().unwrap_or_default();
                self.ensure_user(repo).await?;
                self.ensure_user(subject).await?;
                self.execute(BLOCK, &[&uri, &repo, &subject, &at]).await.map(drop)
            }
            "app.bsky.actor.profile" => {
                let (name, description) = (record["displayName"].as_str(), record["description"].as_str());
                self.execute(PROFILE, &[&repo, &name, &description, &record.to_string()]).await.map(drop)
            }
            _ => {
                let parameters: [Parameter<'_>; 6] =
                    [&uri, &cid, &repo, &collection, &record.to_string(), &at];
                self.execute(RECORD, &parameters).await.map(drop)
            }
        }
    }

    async fn post(
        &mut self,
        uri: &str,
        repo: &str,
        cid: &str,
        record: &Value,
        at: SystemTime,
    ) -> Result<(), tokio_postgres::Error> {
        self.ensure_user(repo).await?;
        let text = record["text"].as_str().unwrap_or_default().replace('\0', "");
        let (parent, root) =
            (record["reply"]["parent"]["uri"].as_str(), record["reply"]["root"]["uri"].as_str());
        let json = |value: &Value| (!value.is_null()).then(|| value.to_string());
        let (embed, facets) = (json(&record["embed"]), json(&record["facets"]));
        let post: [Parameter<'_>; 9] = [&uri, &cid, &repo, &text, &parent, &root, &embed, &facets, &at];
        self.execute(POST, &post).await?;
        self.execute(COUNTERS, &[&uri]).await?;
        let kind = if parent.is_some() { "reply" } else { "post" };
        self.execute(FEED_ITEM, &[&uri, &uri, &repo, &kind, &at, &cid]).await?;
        if let Some(parent) = parent {
            self.execute(REPLIED, &[&parent]).await?;
            self.notify(uri, owner(parent), repo, "reply", Some(parent), cid, at).await?;
        }
        Ok(())
    }

    async fn delete(&mut self, uri: &str, collection: &str) -> Result<(), tokio_postgres::Error> {
        match collection {
            "app.bsky.feed.post" => {
                self.execute(DELETE_POST, &[&uri]).await?;
                self.execute(DELETE_FEED_ITEM, &[&uri]).await.map(drop)
            }
            "app.bsky.feed.like" => {
                if let Some(post) = self.subject_of(LIKE_SUBJECT, uri).await? {
                    self.execute(DELETE_LIKE, &[&uri]).await?;
                    self.execute(UNLIKED, &[&post]).await?;
                }
                Ok(())
            }
            "app.bsky.feed.repost" => {
                if let Some(post) = self.subject_of(REPOST_SUBJECT, uri).await? {
                    self.execute(DELETE_REPOST, &[&uri]).await?;
                    self.execute(DELETE_FEED_ITEM, &[&uri]).await?;
                    self.execute(UNREPOSTED, &[&post]).await?;
                }
                Ok(())
            }
            "app.bsky.graph.follow" => self.execute(DELETE_FOLLOW, &[&uri]).await.map(drop),
            "app.bsky.graph.block" => self.execute(DELETE_BLOCK, &[&uri]).await.map(drop),
            _ => self.execute(DELETE_RECORD, &[&uri]).await.map(drop),
        }
    }

    async fn ensure_user(&mut self, did: &str) -> Result<(), tokio_postgres::Error> {
        if self.execute(HAS_USER, &[&did]).await? == 0 {
            self.execute(USER, &[&did]).await?;
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "the columns of one row")]
    async fn notify(
        &mut self,
        uri: &str,
        recipient: &str,
        author: &str,
        reason: &str,
        subject: Option<&str>,
        cid: &str,
        at: SystemTime,
    ) -> Result<(), tokio_postgres::Error> {
        if recipient == author {
            return Ok(());
        }
        let key = format!("{uri}#notification");
        self.execute(NOTIFY, &[&key, &recipient, &author, &reason, &subject, &cid, &at]).await.map(drop)
    }

    async fn subject_of(
        &mut self,
        sql: &'static str,
        uri: &str,
    ) -> Result<Option<String>, tokio_postgres::Error> {
        let statement = self.statement(sql).await?;
        Ok(self.database.query_opt(&statement, &[&uri]).await?.map(|row| row.get(0)))
    }

    async fn execute(
        &mut self,
        sql: &'static str,
        parameters: &[Parameter<'_>],
    ) -> Result<u64, tokio_postgres::Error> {
        let statement = self.statement(sql).await?;
        self.database.execute(&statement, parameters).await
    }

    /// Prepared once per connection, as the Python worker's driver does.
    async fn statement(&mut self, sql: &'static str) -> Result<Statement, tokio_postgres::Error> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.database.prepare(sql).await?;
        self.statements.insert(sql, statement.clone());
        Ok(statement)
    }
}

/// The account whose record a URI names.
fn owner(uri: &str) -> &str {
    uri.split('/').nth(2).unwrap_or_default()
}

fn created_at(record: &Value) -> SystemTime {
    let said = record["createdAt"].as_str().and_then(|text| text.parse::<Timestamp>().ok());
    said.map_or_else(SystemTime::now, SystemTime::from)
}

const HAS_USER: &str = "SELECT did FROM users WHERE did = $1";
const USER: &str = "INSERT INTO users (did, handle) VALUES ($1, 'handle.invalid') ON CONFLICT DO NOTHING";
const LIKE: &str = "INSERT INTO likes (uri, user_did, post_uri, created_at) VALUES ($1, $2, $3, $4)
    ON CONFLICT DO NOTHING";
const LIKED: &str = "UPDATE post_aggregations SET like_count = like_count + 1 WHERE post_uri = $1";
const REPOST: &str = "INSERT INTO reposts (uri, user_did, post_uri, created_at) VALUES ($1, $2, $3, $4)
    ON CONFLICT DO NOTHING";
const REPOSTED: &str = "UPDATE post_aggregations SET repost_count = repost_count + 1 WHERE post_uri = $1";
const FEED_ITEM: &str =
    "INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
    VALUES ($1, $2, $3, $4, $5, $6, $5) ON CONFLICT DO NOTHING";
const POST: &str =
    "INSERT INTO posts (uri, cid, author_did, text, parent_uri, root_uri, embed, facets, created_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7::text::jsonb, $8::text::jsonb, $9) ON CONFLICT DO NOTHING";
const COUNTERS: &str = "INSERT INTO post_aggregations (post_uri) VALUES ($1) ON CONFLICT DO NOTHING";
const REPLIED: &str = "UPDATE post_aggregations SET reply_count = reply_count + 1 WHERE post_uri = $1";
const FOLLOW: &str =
    "INSERT INTO follows (uri, follower_did, following_did, created_at) VALUES ($1, $2, $3, $4)
    ON CONFLICT DO NOTHING";
const BLOCK: &str = "INSERT INTO blocks (uri, blocker_did, blocked_did, created_at) VALUES ($1, $2, $3, $4)
    ON CONFLICT DO NOTHING";
const PROFILE: &str = "INSERT INTO users (did, handle, display_name, description, profile_record)
    VALUES ($1, 'handle.invalid', $2, $3, $4::text::jsonb)
    ON CONFLICT (did) DO UPDATE SET display_name = excluded.display_name, description = excluded.description,
        profile_record = excluded.profile_record";
const RECORD: &str = "INSERT INTO generic_records (uri, cid, author_did, record_type, record, created_at)
    VALUES ($1, $2, $3, $4, $5::text::jsonb, $6) ON CONFLICT DO NOTHING";
const NOTIFY: &str = "INSERT INTO notifications
        (uri, recipient_did, author_did, reason, reason_subject, cid, created_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING";
const IDENTITY: &str = "INSERT INTO users (did, handle) VALUES ($1, $2)
    ON CONFLICT (did) DO UPDATE SET handle = excluded.handle";
const DELETE_POST: &str = "DELETE FROM posts WHERE uri = $1";
const DELETE_FEED_ITEM: &str = "DELETE FROM feed_items WHERE uri = $1";
const LIKE_SUBJECT: &str = "SELECT post_uri FROM likes WHERE uri = $1";
const DELETE_LIKE: &str = "DELETE FROM likes WHERE uri = $1";
const UNLIKED: &str =
    "UPDATE post_aggregations SET like_count = greatest(like_count - 1, 0) WHERE post_uri = $1";
const REPOST_SUBJECT: &str = "SELECT post_uri FROM reposts WHERE uri = $1";
const DELETE_REPOST: &str = "DELETE FROM reposts WHERE uri = $1";
const UNREPOSTED: &str =
    "UPDATE post_aggregations SET repost_count = greatest(repost_count - 1, 0) WHERE post_uri = $1";
const DELETE_FOLLOW: &str = "DELETE FROM follows WHERE uri = $1";
const DELETE_BLOCK: &str = "DELETE FROM blocks WHERE uri = $1";
const DELETE_RECORD: &str = "DELETE FROM generic_records WHERE uri = $1";
