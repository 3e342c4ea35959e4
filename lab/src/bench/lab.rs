//! The private servers together, and what a piece of work costs them.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::BenchOptions;
use super::machine;
use super::postgres::Postgres;
use super::stream::Streams;
use crate::servers::{PrivateFolder, PrivateRedis, RedisOptions, free_port};
use standpipe::config::{self, Config, Role};
use standpipe::stream::Keys;

/// How often connections are counted.
const SAMPLE: Duration = Duration::from_millis(50);
/// Settings that override the environment: addresses, names, and the varied ones.
const OURS: &[&str] = &[
    "RELAY_URL",
    "REDIS_URL",
    "DATABASE_URL",
    "REDIS_STREAM_KEY",
    "REDIS_CURSOR_KEY",
    "REDIS_CONSUMER_GROUP",
    "CONSUMER_ID",
    "HTTP_ADDR",
    "COLLECTIONS",
    "TRANSACTION",
    "NOTIFICATIONS",
    "NOTIFY_WITHIN",
    "AUTO_MIGRATE",
];

/// The environment of a child process.
pub type Variables = Vec<(String, String)>;

/// Everything that is worked with.
pub struct Lab {
    /// The streams.
    pub streams: Streams,
    /// The tables.
    pub postgres: Postgres,
    /// The defaults, with what the environment changes of them.
    pub config: Config,
    /// The keys of the stream.
    pub keys: Keys,
    /// Settings that the environment changes.
    pub tuning: Variables,
    redis: PrivateRedis,
    // Last, so that the servers are stopped before their files are removed.
    folder: PrivateFolder,
}

/// The cost of a piece of work.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Processor seconds of all of PostgreSQL's processes.
    pub postgres_cpu: f64,
    /// Processor seconds of Redis.
    pub redis_cpu: f64,
    /// Bytes of write-ahead log.
    pub wal_bytes: f64,
    /// Processor seconds of everything that is neither one of the servers nor this process.
    pub other_cpu: f64,
    /// How long it took, what comes before and after the time that is quoted included.
    pub seconds: f64,
    /// The most connections that there were to the database.
    pub connections: u64,
}

impl Lab {
    /// Starts the servers.
    ///
    /// # Errors
    ///
    /// One of them cannot be started, or the environment has a variable that cannot be used.
    pub async fn start(options: &BenchOptions) -> Result<Self> {
        let tuning: Variables = config::VARIABLES
            .iter()
            .filter(|variable| !OURS.contains(&variable.name))
            .filter_map(|variable| {
                let value = std::env::var_os(variable.name)?.into_string().ok()?;
                Some((variable.name.to_owned(), value))
            })
            .collect();
        let folder = PrivateFolder::create("standpipe-bench")?;
        let redis_options = RedisOptions {
            // A rewrite of the file falls into this run or into that one.
            extra: vec!["auto-aof-rewrite-percentage 0".to_owned()],
            ..RedisOptions::default()
        };
        let redis = PrivateRedis::start(&folder.path().join("redis"), redis_options).await?;
        let postgres = Postgres::start(&folder.path().join("postgres"), &options.postgres_settings).await?;
        let mut variables = tuning.clone();
        variables.extend([
            ("REDIS_URL".to_owned(), redis.url()),
            ("DATABASE_URL".to_owned(), postgres.url("postgres")),
            ("COLLECTIONS".to_owned(), "*".to_owned()),
            // What is made up happened long ago.
            ("NOTIFY_WITHIN".to_owned(), "off".to_owned()),
        ]);
        let (config, _) = config::from_env(variables, Role::Worker)?;
        Ok(Self {
            streams: Streams::open(&redis.url()).await?,
            postgres,
            keys: Keys::new(&config),
            config,
            tuning,
            redis,
            folder,
        })
    }

    /// Where files can be put.
    #[must_use]
    pub fn folder(&self) -> &PrivateFolder {
        &self.folder
    }

    /// The URL of Redis.
    #[must_use]
    pub fn redis_url(&self) -> String {
        self.redis.url()
    }

    /// The environment of a process of ours: the defaults, what our own environment changes of them, and `special`.
    ///
    /// # Errors
    ///
    /// There is no free port.
    pub fn variables(&self, special: &[(&str, &str)]) -> Result<Variables> {
        let mut variables = self.tuning.clone();
        let addresses = [
            ("REDIS_URL", self.redis.url()),
            ("HTTP_ADDR", format!("127.0.0.1:{}", free_port()?)),
            ("CONSUMER_ID", "bench".to_owned()),
            ("VERIFY", "off".to_owned()),
            ("NOTIFY_WITHIN", "off".to_owned()),
        ];
        variables.extend(addresses.map(|(name, value)| (name.to_owned(), value)));
        for (name, value) in special {
            variables.retain(|(other, _)| other != name);
            variables.push(((*name).to_owned(), (*value).to_owned()));
        }
        Ok(variables)
    }

    /// Processor seconds that Redis has used.
    #[must_use]
    pub fn redis_cpu(&self) -> f64 {
        self.redis.pid().and_then(machine::cpu).map_or(0.0, |cpu| cpu.own + cpu.ended_children)
    }

    /// Does a piece of work; returns what came of it and what it cost the servers.
    ///
    /// # Errors
    ///
    /// Those of the work.
    pub async fn metered<T>(&self, work: impl Future<Output = Result<T>>) -> Result<(T, Cost)> {
        let own_cpu = || machine::cpu(std::process::id()).map_or(0.0, |cpu| cpu.own);
        let (began, busy, own) = (Instant::now(), machine::busy(), own_cpu());
        let mut cost = Cost {
            postgres_cpu: -self.postgres.cpu(),
            redis_cpu: -self.redis_cpu(),
            wal_bytes: -self.postgres.wal().await?,
            other_cpu: 0.0,
            seconds: 0.0,
            connections: 0,
        };
        let mut work = std::pin::pin!(work);
        let mut most = 0;
        let done = loop {
            most = most.max(self.postgres.connections().await?);
            tokio::select! {
                done = &mut work => break done?,
                () = tokio::time::sleep(SAMPLE) => {}
            }
        };
        cost.connections = most;
        cost.wal_bytes += self.postgres.wal().await?;
        cost.redis_cpu += self.redis_cpu();
        cost.postgres_cpu += self.postgres.cpu();
        cost.seconds = began.elapsed().as_secs_f64();
        cost.other_cpu = machine::busy() - busy - (own_cpu() - own) - cost.postgres_cpu - cost.redis_cpu;
        Ok((done, cost))
    }
}
