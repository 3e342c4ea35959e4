//! A new origin is one file: this one feeds entries through the real reader and the real pipelines into the real tables.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use standpipe::config::{Role, from_env};
use standpipe::control::Control;
use standpipe::origin::{Arrival, Origin, OriginError, Reader};
use standpipe::status::{Settings, Status};
use standpipe::stream::Redis as Connector;
use standpipe::stream::append::NewEntry;
use tokio_util::sync::CancellationToken;

use crate::support::chain::{Program, SOON, Variables, redis_command};
use crate::support::{Postgres, Redis, query_value, wait_for};

/// A list of posts that grows by one whenever it is asked, up to `end`; its positions are their numbers.
struct List {
    at: i64,
    end: i64,
    broken: bool,
    settled: Arc<AtomicI64>,
    /// Where each connection began.
    opened: tokio::sync::mpsc::UnboundedSender<Option<i64>>,
}

impl Origin for List {
    fn name(&self) -> String {
        "list.test".to_owned()
    }

    async fn open(&mut self, from: Option<i64>) -> Result<(), OriginError> {
        self.opened.send(from).unwrap();
        self.at = from.unwrap_or(0);
        Ok(())
    }

    async fn next(&mut self) -> Result<Arrival, OriginError> {
        if self.at == self.end {
            std::future::pending::<()>().await;
        }
        if self.at == 50 && !std::mem::replace(&mut self.broken, true) {
            return Err(OriginError::away("the connection breaks halfway"));
        }
        self.at += 1;
        let data = format!(
            r#"{{"repo":"did:plc:aaaa","ops":[{{"action":"create","path":"app.bsky.feed.post/{0}","cid":"c{0}","record":{{"text":"{0}","createdAt":"2026-01-01T00:00:00Z"}}}}]}}"#,
            self.at
        );
        let entries = vec![NewEntry { event_type: "commit", data, seq: self.at }];
        Ok(Arrival { position: self.at, entries, ..Arrival::default() })
    }

    async fn settled(&mut self, position: i64) -> Result<(), OriginError> {
        self.settled.fetch_max(position, Ordering::SeqCst);
        Ok(())
    }
}

fn reader(variables: &Variables) -> Reader {
    let (config, _) = from_env(variables.iter().cloned(), Role::Reader).unwrap();
    let connector = Connector::open(&config).unwrap();
    let status = Arc::new(Status::new(Some("list.test".to_owned()), Vec::new(), Settings::default()));
    Reader::new(Arc::new(config), connector, status, Control::new(None).reader()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_origin_needs_no_change_outside_its_file() {
    let redis = Redis::start().await;
    let database = Postgres::shared().await.fresh_database().await;
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("DATABASE_URL", &database);
    let worker = Program::start("worker", &variables).await;

    let (opened, mut opens) = tokio::sync::mpsc::unbounded_channel();
    let settled = Arc::new(AtomicI64::new(0));
    let list = List { at: 0, end: 100, broken: false, settled: Arc::clone(&settled), opened };
    let stop = CancellationToken::new();
    let reading = tokio::spawn(reader(&variables).run(list, stop.clone()));

    wait_for("the tables", SOON, async || {
        match query_value(&database, "SELECT count(*) FROM pg_class WHERE relname = 'posts'").await.as_str() {
            "1" => Ok(()),
            _ => Err("not yet"),
        }
    })
    .await;
    wait_for("all posts", SOON, async || {
        match query_value(&database, "SELECT count(*) FROM posts").await.as_str() {
            "100" => Ok(()),
            count => Err(count.to_owned()),
        }
    })
    .await;
    wait_for("the origin to be told that they are in the stream", SOON, async || {
        match settled.load(Ordering::SeqCst) {
            100 => Ok(()),
            position => Err(position),
        }
    })
    .await;
    stop.cancel();
    reading.await.unwrap();
    assert_eq!(opens.recv().await.unwrap(), None);
    assert_eq!(opens.recv().await.unwrap(), Some(50), "after the break it goes on where the stream is");
    let cursor: String = redis_command(&redis, &["GET", "firehose:cursor"]).await;
    let name: String = redis_command(&redis, &["GET", "firehose:cursor:relay"]).await;
    assert_eq!((cursor.as_str(), name.as_str()), ("100", "list.test"));
    drop(worker);
}

/// Forty posts that can all be read at once; then it is time to stop.
struct Burst {
    list: List,
    stop: CancellationToken,
}

impl Origin for Burst {
    fn name(&self) -> String {
        self.list.name()
    }

    async fn open(&mut self, from: Option<i64>) -> Result<(), OriginError> {
        self.list.open(from).await
    }

    async fn next(&mut self) -> Result<Arrival, OriginError> {
        if self.list.at == 40 {
            self.stop.cancel();
            std::future::pending::<()>().await;
        }
        self.list.next().await
    }

    async fn settled(&mut self, position: i64) -> Result<(), OriginError> {
        self.list.settled(position).await
    }
}

/// An origin that acknowledges upstream would be sent again what it was not told about.
#[tokio::test(flavor = "multi_thread")]
async fn an_origin_is_told_what_was_appended_while_the_reader_stopped() {
    let redis = Redis::start().await;
    let variables = Variables::new().with("REDIS_URL", redis.url());
    let (opened, _opens) = tokio::sync::mpsc::unbounded_channel();
    let settled = Arc::new(AtomicI64::new(0));
    let stop = CancellationToken::new();
    // All of it is read at once, and none of it is in the stream when the reader is told to stop.
    let list = List { at: 0, end: i64::MAX, broken: true, settled: Arc::clone(&settled), opened };
    reader(&variables).run(Burst { list, stop: stop.clone() }, stop).await;
    assert_eq!(redis_command::<u64>(&redis, &["XLEN", "firehose:events"]).await, 40);
    assert_eq!(settled.load(Ordering::SeqCst), 40);
}
