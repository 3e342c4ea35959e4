//! The real program with clients that send it events, and no relay.

use std::net::SocketAddr;

use serde_json::Value;
use standpipe_lab::servers::{AppendFsync, RedisOptions};

use super::chain::{Program, RUN, STREAM, Variables, redis_command};
use super::{Postgres, Redis, free_port, http_post, wait_until};

/// `INGEST_TOKEN`.
pub const TOKEN: &str = "a-token-of-some-length";

/// A Redis and a database without a relay, and where the program is to listen.
pub struct House {
    pub redis: Redis,
    pub database: String,
    pub http: SocketAddr,
}

impl House {
    pub async fn start(options: RedisOptions) -> Self {
        let redis = Redis::start_with(options).await;
        let database = Postgres::shared().await.fresh_database().await;
        Self { redis, database, http: format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap() }
    }

    pub fn variables(&self) -> Variables {
        Variables::new()
            .with("REDIS_URL", self.redis.url())
            .with("DATABASE_URL", &self.database)
            .with("HTTP_ADDR", self.http.to_string())
            .with("INGEST_TOKEN", TOKEN)
            .with("STREAM_KEEP", "1h")
    }

    /// A worker, its tables, and a stream to append to.
    pub async fn worker(&self) -> Program {
        let program = Program::start("worker", &self.variables()).await;
        is_ready(&program).await;
        program
    }

    pub async fn length(&self) -> u64 {
        redis_command(&self.redis, &["XLEN", STREAM]).await
    }

    /// Sends a request once.
    pub async fn post(&self, path: &str, key: Option<&str>, body: &str) -> anyhow::Result<(u16, Value)> {
        let key = key.map(|key| format!("Idempotency-Key: {key}\r\n")).unwrap_or_default();
        let headers = format!("Authorization: Bearer {TOKEN}\r\n{key}");
        let (code, text) = http_post(self.http, path, &headers, body.as_bytes()).await?;
        Ok((code, serde_json::from_str(&text)?))
    }
}

pub async fn is_ready(program: &Program) {
    wait_until("the program to be ready", RUN, async || program.readiness().await.0 == 200).await;
}

/// A Redis that has every write on its disk before it answers.
pub fn at_once() -> RedisOptions {
    RedisOptions { append_fsync: AppendFsync::Always, ..RedisOptions::default() }
}
