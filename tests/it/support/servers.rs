//! Redis and PostgreSQL for tests.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use standpipe_lab::servers::{PostgresOptions, PrivateFolder, PrivatePostgres, PrivateRedis, RedisOptions};
use tokio::sync::OnceCell;

use super::{execute, query_value};

/// A Redis that belongs to the test, in a folder that is removed with it. It dereferences to
/// [`PrivateRedis`].
pub struct Redis {
    // Declared before the folder, so that the server is stopped before its files are removed.
    server: PrivateRedis,
    _folder: PrivateFolder,
}

impl Redis {
    /// An append-only file flushed every second, no memory limit.
    pub async fn start() -> Self {
        Self::start_with(RedisOptions::default()).await
    }

    pub async fn start_with(options: RedisOptions) -> Self {
        let folder = PrivateFolder::create("standpipe-test-redis").unwrap();
        let server = PrivateRedis::start(folder.path(), options).await.unwrap();
        Self { server, _folder: folder }
    }

    /// A new connection.
    pub async fn connection(&self) -> redis::aio::MultiplexedConnection {
        connect_to_redis(self.url()).await.unwrap()
    }
}

/// A connection to a Redis. The library's own limits, a second or less, are for servers of a machine that is not busy
/// with tests.
pub async fn connect_to_redis(
    url: impl redis::IntoConnectionInfo,
) -> redis::RedisResult<redis::aio::MultiplexedConnection> {
    let limit = Some(Duration::from_secs(30));
    let config =
        redis::AsyncConnectionConfig::new().set_connection_timeout(limit).set_response_timeout(limit);
    redis::Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await
}

impl Deref for Redis {
    type Target = PrivateRedis;

    fn deref(&self) -> &PrivateRedis {
        &self.server
    }
}

impl DerefMut for Redis {
    fn deref_mut(&mut self) -> &mut PrivateRedis {
        &mut self.server
    }
}

/// A PostgreSQL: one that all tests of a binary share, each with a database of its own, or one that a test
/// may kill. It dereferences to [`PrivatePostgres`].
pub struct Postgres {
    // Declared before the folder, so that the server is stopped before its files are removed.
    server: PrivatePostgres,
    _folder: PrivateFolder,
    databases: AtomicU32,
}

/// Settings under which a database does not behave as we expect, as SQL literals. `session_replication_role`
/// is refused.
pub const HOSTILE_DEFAULTS: [(&str, &str); 11] = [
    ("default_transaction_isolation", "'repeatable read'"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_read_only", "on"),
    ("statement_timeout", "'50ms'"),
    ("lock_timeout", "'1ms'"),
    ("search_path", "'nowhere'"),
    ("DateStyle", "'SQL, DMY'"),
    ("TimeZone", "'Asia/Kathmandu'"),
    ("synchronous_commit", "off"),
    ("row_security", "on"),
    ("plan_cache_mode", "force_custom_plan"),
];

impl Postgres {
    /// The server that all tests of this binary share. Never kill or pause it.
    ///
    /// It runs without fsync: it is only ever lost together with the machine.
    pub async fn shared() -> &'static Self {
        // A static is never dropped: the server and its folder go away with this process.
        static SHARED: OnceCell<Postgres> = OnceCell::const_new();
        SHARED
            .get_or_init(|| {
                Self::start_with(PostgresOptions { fsync: false, max_connections: 300, ..Self::options() })
            })
            .await
    }

    /// A server of the test's own, as durable as a production server.
    pub async fn start() -> Self {
        Self::start_with(Self::options()).await
    }

    /// A server of the test's own; start from [`Self::options`].
    pub async fn start_with(options: PostgresOptions) -> Self {
        let folder = PrivateFolder::create("standpipe-test-postgres").unwrap();
        let server = PrivatePostgres::start(folder.path(), options).await.unwrap();
        Self { server, _folder: folder, databases: AtomicU32::new(0) }
    }

    /// The default options, with a data folder copied from a cache, because `initdb` takes
    /// seconds.
    pub fn options() -> PostgresOptions {
        PostgresOptions {
            template_cache: Some(Path::new(env!("CARGO_TARGET_TMPDIR")).join("postgres-templates")),
            ..PostgresOptions::default()
        }
    }

    /// Creates an empty database and returns its URL.
    pub async fn fresh_database(&self) -> String {
        self.server.create_database(&self.fresh_name()).await.unwrap()
    }

    /// Creates an empty database that imposes a setting on its connections, and returns its URL.
    pub async fn fresh_database_with(&self, setting: &str, value: &str) -> String {
        let database = self.fresh_database().await;
        let name = database.rsplit('/').next().unwrap();
        let sql = format!("ALTER DATABASE {name} SET {setting} = {value}");
        println!("{sql}");
        execute(&self.url("postgres"), &sql).await;
        let prescribed = "SELECT array_to_string(setconfig, ' ') FROM pg_db_role_setting s, pg_database d
                          WHERE d.oid = setdatabase AND datname = current_database()";
        let prescribed = query_value(&database, prescribed).await;
        assert!(prescribed.starts_with(setting), "{prescribed}");
        database
    }

    /// Creates a database as a copy of another one, to which nobody may be connected, and
    /// returns its URL.
    pub async fn fresh_database_from(&self, template: &str) -> String {
        self.server.create_database_from(&self.fresh_name(), template).await.unwrap()
    }

    fn fresh_name(&self) -> String {
        format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed))
    }
}

impl Deref for Postgres {
    type Target = PrivatePostgres;

    fn deref(&self) -> &PrivatePostgres {
        &self.server
    }
}

impl DerefMut for Postgres {
    fn deref_mut(&mut self) -> &mut PrivatePostgres {
        &mut self.server
    }
}
