//! The private PostgreSQL: databases to start from, and what the server has used.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls};
use tokio_util::task::AbortOnDropHandle;

use super::{distance, machine};
use crate::servers::{PostgresOptions, PrivatePostgres};
use standpipe::store::migrate;

/// The database that is measured; a new one for every run.
const RUN: &str = "bench_run";
/// How long a server process may take to leave a database that it is to be copied from.
const LEAVING: Duration = Duration::from_secs(10);
/// The server's settings that are reported.
const TOLD: &str = "SELECT name || '=' || current_setting(name) FROM pg_settings
    WHERE name = ANY ($1) OR source = 'command line' AND name <> ALL ($2) ORDER BY name";

/// A connection that is closed when it is dropped.
pub struct Connection {
    client: Client,
    _task: AbortOnDropHandle<()>,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn open(url: &str) -> Result<Self> {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.context("PostgreSQL")?;
        let task = tokio::spawn(async move {
            // The next query reports the error.
            let _ = connection.await;
        });
        // The superuser has the name of our own schema, which would come first.
        client.batch_execute("SET search_path TO public").await?;
        Ok(Self { client, _task: AbortOnDropHandle::new(task) })
    }
}

impl Deref for Connection {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

/// The server.
pub struct Postgres {
    admin: Connection,
    server: PrivatePostgres,
    version: i32,
}

impl Postgres {
    /// Starts it, with settings on top of those of the private server.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub async fn start(folder: &Path, settings: &[(String, String)]) -> Result<Self> {
        let options = PostgresOptions { settings: settings.to_vec(), ..PostgresOptions::default() };
        let server = PrivatePostgres::start(folder, options).await?;
        let admin = Connection::open(&server.url("postgres")).await?;
        let row = admin.query_one("SELECT current_setting('server_version_num')::integer", &[]).await?;
        Ok(Self { admin, server, version: row.get(0) })
    }

    /// The URL of a database.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        self.server.url(database)
    }

    /// Makes a database to start from: what `sql` makes first, brought up to date by our own migrations.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn make_template(&self, name: &str, sql: &str) -> Result<()> {
        let url = self.server.create_database(name).await?;
        let mut connection = Connection::open(&url).await?;
        connection.batch_execute(sql).await.context("making the tables")?;
        migrate::migrate_and_say(&mut connection.client, &mut |_| {}).await?;
        connection.batch_execute("VACUUM ANALYZE").await?;
        Ok(())
    }

    /// Makes a database as a copy of another, instead of one of that name.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn copy(&self, name: &str, template: &str) -> Result<()> {
        self.admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await?;
        // As files, not through the log: that would be large for a large database.
        let strategy = if self.version >= 150_000 { "STRATEGY file_copy" } else { "" };
        let sql = format!("CREATE DATABASE {name} TEMPLATE {template} {strategy}");
        let began = Instant::now();
        loop {
            match self.admin.batch_execute(&sql).await {
                Ok(()) => return Ok(()),
                Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) && began.elapsed() < LEAVING => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => return Err(error).context("copying a database"),
            }
        }
    }

    /// A fresh database like `template`, everything on disk; returns its URL. The one before is gone then.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn fresh(&self, template: &str) -> Result<String> {
        self.copy(RUN, template).await?;
        self.admin.batch_execute("CHECKPOINT").await?;
        Ok(self.server.url(RUN))
    }

    /// The URL of the database that is measured, as from `round_trip` away.
    ///
    /// # Errors
    ///
    /// No port is free.
    pub fn far_url(&self, round_trip: Duration) -> Result<String> {
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, self.server.port()));
        let port = distance::far(server, round_trip)?;
        Ok(self.server.url(RUN).replace(&format!(":{}/", self.server.port()), &format!(":{port}/")))
    }

    /// Makes every flush of the log to the disk take so much longer, for the database that is measured.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn slow_down_flushes(&self, by: Duration) -> Result<()> {
        // Meant to let more commits take part in a flush; without the condition that others are running it is a delay.
        let sql = format!(
            "ALTER DATABASE {RUN} SET commit_delay = {}; ALTER DATABASE {RUN} SET commit_siblings = 0",
            by.as_micros()
        );
        Ok(self.admin.batch_execute(&sql).await?)
    }

    /// How many connections there are to the database that is measured.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn connections(&self) -> Result<u64> {
        let sql =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'";
        let statement = self.admin.prepare(sql).await?;
        let count: i64 = self.admin.query_one(&statement, &[&RUN]).await?.get(0);
        Ok(count.unsigned_abs())
    }

    /// Where the write-ahead log ends, in bytes.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn wal(&self) -> Result<f64> {
        let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8";
        Ok(self.admin.query_one(sql, &[]).await?.get(0))
    }

    /// Processor seconds of all its processes, those that have ended included.
    #[must_use]
    pub fn cpu(&self) -> f64 {
        let running: f64 =
            self.server.all_pids().into_iter().filter_map(machine::cpu).map(|cpu| cpu.own).sum();
        let ended = self.server.pid().and_then(machine::cpu).map_or(0.0, |cpu| cpu.ended_children);
        running + ended
    }

    /// Its version and those of its settings that matter here.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn describe(&self) -> Result<(String, Vec<String>)> {
        let version: String = self
            .admin
            .query_one("SELECT split_part(current_setting('server_version'), ' ', 1)", &[])
            .await?
            .get(0);
        let told = [
            "autovacuum",
            "fsync",
            "full_page_writes",
            "max_wal_size",
            "shared_buffers",
            "synchronous_commit",
            "track_commit_timestamp",
            "wal_compression",
        ];
        // These say where it lives, not how it works.
        let untold = [
            "dynamic_shared_memory_type",
            "data_directory",
            "listen_addresses",
            "port",
            "unix_socket_directories",
            "log_timezone",
            "TimeZone",
        ];
        let rows = self.admin.query(TOLD, &[&&told[..], &&untold[..]]).await?;
        Ok((version, rows.iter().map(|row| row.get(0)).collect()))
    }

    /// How long one small transaction takes that waits for the disk: the median of some, in milliseconds.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn flush_ms(&self) -> Result<f64> {
        let statement = self.admin.prepare("SELECT pg_logical_emit_message(true, 'bench', '')").await?;
        let mut times = Vec::new();
        for _ in 0..101 {
            let began = Instant::now();
            self.admin.query_one(&statement, &[]).await?;
            times.push(began.elapsed().as_secs_f64() * 1000.0);
        }
        times.sort_unstable_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}
