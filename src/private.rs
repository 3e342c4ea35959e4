//! Private Redis and PostgreSQL servers: started in a folder of their own on a free port of
//! 127.0.0.1, never the machine's own services. The tests, `standpipe demo` and
//! `standpipe bench` use them.
//!
//! What they promise:
//!
//! - `start` returns when the server really answers, and fails with the end of its log.
//! - Started by root they run as an ordinary user (`postgres`, else `nobody`), because
//!   PostgreSQL refuses to run as root.
//! - They end with this process, however it ends. Dropping the value stops the server; if the
//!   process is killed, the kernel sends the server the signal that `setpriv --pdeathsig` asked
//!   for. That signal is tied to the *thread* that started the server, and the threads of an
//!   async runtime come and go, so [`spawn_for_life`] starts everything from one thread that
//!   lives as long as the process.
//! - They have a process group of their own: Ctrl-C at a terminal reaches this process, which
//!   can then finish its work with the servers still there.
//!
//! They ask for no password, so anybody with an account on the machine can connect while
//! they run: nothing worth hiding belongs in them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokio::time::sleep;
use tokio_postgres::{NoTls, SimpleQueryMessage};

/// The time between two looks at a condition that is waited for.
const POLL: Duration = Duration::from_millis(10);
/// How long a server may take to answer after its start.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// How long it may take when it says that it is reading its data back.
const RECOVERY_DEADLINE: Duration = Duration::from_mins(2);
/// How long a server may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// How many ports are tried when somebody else takes the chosen one before the server does.
const PORT_TRIES: u32 = 3;
/// How much of a log is shown in an error.
const LOG_TAIL_BYTES: u64 = 4096;
/// The superuser of a private PostgreSQL.
const POSTGRES_USER: &str = "standpipe";

// ---------------------------------------------------------------------------------------------
// Redis

/// When Redis flushes its append-only file to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppendFsync {
    /// Before every reply.
    Always,
    /// Once a second: a crash of the machine loses up to that much.
    EverySecond,
    /// Whenever the operating system does.
    No,
}

impl AppendFsync {
    fn as_str(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::EverySecond => "everysec",
            Self::No => "no",
        }
    }
}

/// How a [`PrivateRedis`] is started. The default is what production should have: an append-only
/// file flushed every second, no snapshots, no eviction.
#[derive(Debug, Clone)]
pub struct RedisOptions {
    /// The server's program; when none is given, `redis-server` or `valkey-server` from PATH.
    pub program: Option<PathBuf>,
    /// The port; when none is given, a free one.
    pub port: Option<u16>,
    /// Keep an append-only file. Without it everything is gone when the server stops.
    pub append_only: bool,
    /// When that file is flushed.
    pub append_fsync: AppendFsync,
    /// The memory limit in bytes; beyond it writes are refused (`noeviction`).
    pub max_memory: Option<u64>,
    /// More lines for the configuration file, as `redis.conf` has them; they win over ours.
    pub extra: Vec<String>,
}

impl Default for RedisOptions {
    fn default() -> Self {
        Self {
            program: None,
            port: None,
            append_only: true,
            append_fsync: AppendFsync::EverySecond,
            max_memory: None,
            extra: Vec::new(),
        }
    }
}

/// A Redis (or Valkey) server of our own. Dropping it kills the server and waits for its end.
#[derive(Debug)]
pub struct PrivateRedis {
    server: Server,
    options: RedisOptions,
    user: Option<ServerUser>,
    folder: PathBuf,
    port: u16,
    /// Held as long as the value lives.
    _lock: File,
}

impl PrivateRedis {
    /// Starts a server in `folder`, which is created if need be and given to the user that the
    /// server runs as. Returns when it answers.
    ///
    /// # Errors
    /// When no server program or no `setpriv` is found, when the folder cannot be used, or when
    /// the server does not answer within 20 seconds; the error holds the end of its log.
    pub async fn start(folder: &Path, options: RedisOptions) -> Result<Self> {
        let program = match &options.program {
            Some(program) => program.clone(),
            None => find_on_path("redis-server")
                .or_else(|| find_on_path("valkey-server"))
                .context("neither redis-server nor valkey-server was found on PATH; install one of them")?,
        };
        let user = ServerUser::to_run_as()?;
        let folder = prepare_folder(folder, user.as_ref())?;
        let mut redis = Self {
            _lock: lock_folder(&folder, "redis.lock")?,
            server: Server::new("Redis", &program, &folder, folder.join("redis.log"))?,
            port: 0,
            options,
            user,
            folder,
        };
        let mut attempt = 1;
        loop {
            redis.port = redis.options.port.map_or_else(free_port, Ok)?;
            match redis.launch().await {
                Err(_) if redis.may_try_another_port(attempt) => attempt += 1,
                outcome => return outcome.map(|()| redis),
            }
        }
    }

    /// The URL that clients use.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The port on 127.0.0.1; it stays the same over [`Self::start_again`].
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's process id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// The folder with the server's data.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file with the server's log.
    #[must_use]
    pub fn log_file(&self) -> &Path {
        &self.server.log
    }

    /// Kills the server as a crash would (SIGKILL) and waits until it is gone.
    ///
    /// # Errors
    /// When it is still there after half a minute.
    pub async fn sigkill(&mut self) -> Result<()> {
        self.server.kill_and_wait().await
    }

    /// Stops the server in good order (SIGTERM: it flushes its append-only file) and waits
    /// until it is gone.
    ///
    /// # Errors
    /// When it is still there after half a minute.
    pub async fn stop(&mut self) -> Result<()> {
        self.server.stop_and_wait(Signal::Term).await
    }

    /// Whether it has ended unexpectedly.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.server.reap()?.is_some())
    }

    /// Starts the stopped or killed server again: same folder, same port. Returns when it has
    /// read its data back.
    ///
    /// # Errors
    /// When it runs already, or as [`Self::start`].
    pub async fn start_again(&mut self) -> Result<()> {
        ensure!(self.pid().is_none(), "this Redis is running; stop it before starting it again");
        self.launch().await
    }

    /// Freezes the server (SIGSTOP): connections stay, nothing is answered.
    ///
    /// # Errors
    /// When it does not run, or does not stop.
    pub async fn pause(&mut self) -> Result<()> {
        self.server.pause().await
    }

    /// Resumes a frozen server.
    ///
    /// # Errors
    /// When it does not run.
    pub fn resume(&mut self) -> Result<()> {
        self.server.resume()
    }

    /// The append-only files that hold the newest writes, oldest first: the increments in
    /// `appendonlydir` (Redis 7), or `appendonly.aof` (Redis 6.2). Empty when there is none.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn aof_paths(&self) -> Result<Vec<PathBuf>> {
        let single = self.folder.join("appendonly.aof");
        if single.is_file() {
            return Ok(vec![single]);
        }
        let folder = self.folder.join("appendonlydir");
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let mut increments = Vec::new();
        for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            // appendonly.aof.<sequence>.incr.aof
            if let Some(sequence) = name
                .strip_suffix(".incr.aof")
                .and_then(|rest| rest.rsplit('.').next())
                .and_then(|sequence| sequence.parse::<u64>().ok())
            {
                increments.push((sequence, folder.join(name)));
            }
        }
        increments.sort();
        Ok(increments.into_iter().map(|(_, path)| path).collect())
    }

    /// Cuts up to `bytes` from the end of the append-only file of a stopped server, as a crash
    /// of the machine before the last flush does. Returns how many bytes were really cut; it is
    /// less than asked for when the newest file is shorter.
    ///
    /// # Errors
    /// When the server runs, or has no append-only file.
    pub fn truncate_aof_tail(&self, bytes: u64) -> Result<u64> {
        ensure!(self.pid().is_none(), "the append-only file can only be cut while Redis is stopped");
        let path = self.aof_paths()?.pop().context("this Redis has no append-only file")?;
        let file = OpenOptions::new()
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        let length = file.metadata()?.len();
        let cut = bytes.min(length);
        file.set_len(length - cut)?;
        Ok(cut)
    }

    fn may_try_another_port(&self, attempt: u32) -> bool {
        self.options.port.is_none() && attempt < PORT_TRIES && self.server.lost_its_port()
    }

    async fn launch(&mut self) -> Result<()> {
        let config = self.folder.join("redis.conf");
        fs::write(&config, self.config_file()).with_context(|| format!("writing {}", config.display()))?;
        if let Some(user) = &self.user {
            user.own(&config)?;
        }
        // SIGKILL as the signal of the parent's death also ends a server that is frozen.
        let mut command = guarded_command(&self.server.program, self.user.as_ref(), Signal::Kill)?;
        command.arg(&config).env("LC_ALL", "C").current_dir(&self.folder);
        self.server.launch(command)?;

        let started = Instant::now();
        let mut deadline = START_DEADLINE;
        loop {
            self.server.ensure_alive()?;
            let last = match self.answers().await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if last.to_string().contains("LOADING") {
                deadline = RECOVERY_DEADLINE;
            }
            if started.elapsed() > deadline {
                let error = self.server.failure(&format!("did not answer within {deadline:?} ({last})"));
                self.server.kill_blocking();
                return Err(error);
            }
            sleep(POLL).await;
        }
    }

    /// Asks the server whether it is there, has its data, and is really ours: somebody else's
    /// server may have got the port.
    async fn answers(&self) -> Result<()> {
        let client = redis::Client::open(self.url())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        let _pong: String = redis::cmd("PING").query_async(&mut connection).await?;
        let info: String = redis::cmd("INFO").arg("server").query_async(&mut connection).await?;
        let pid = info
            .lines()
            .find_map(|line| line.strip_prefix("process_id:"))
            .and_then(|pid| pid.trim().parse().ok());
        ensure!(pid == self.pid(), "another Redis answers on port {}", self.port);
        Ok(())
    }

    fn config_file(&self) -> String {
        let options = &self.options;
        let folder = self.folder.to_string_lossy().replace('\\', "\\\\").replace('"', "\\\"");
        let mut lines = vec![
            "bind 127.0.0.1".to_owned(),
            format!("port {}", self.port),
            "daemonize no".to_owned(),
            // To the standard output, which goes to the log file together with what setpriv says.
            "logfile \"\"".to_owned(),
            format!("dir \"{folder}\""),
            "save \"\"".to_owned(),
            format!("appendonly {}", if options.append_only { "yes" } else { "no" }),
            format!("appendfsync {}", options.append_fsync.as_str()),
            "maxmemory-policy noeviction".to_owned(),
        ];
        if let Some(bytes) = options.max_memory {
            lines.push(format!("maxmemory {bytes}"));
        }
        lines.extend(options.extra.iter().cloned());
        lines.join("\n") + "\n"
    }
}

impl Drop for PrivateRedis {
    fn drop(&mut self) {
        self.server.kill_blocking();
    }
}

// ---------------------------------------------------------------------------------------------
// PostgreSQL

/// How a [`PrivatePostgres`] is started. The default is as durable as a production server.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// The folder with `postgres` and `initdb`. When none is given: PATH, then the newest of
    /// `/usr/lib/postgresql/*/bin`, then what `pg_config --bindir` says.
    pub bin_dir: Option<PathBuf>,
    /// The port; when none is given, a free one.
    pub port: Option<u16>,
    /// A folder that keeps a freshly initialised data folder to copy from, because `initdb` takes
    /// seconds. Several processes may share it.
    pub template_cache: Option<PathBuf>,
    /// PostgreSQL's `fsync`. Without it a crash of the machine (not one of the server) may
    /// destroy the data.
    pub fsync: bool,
    /// PostgreSQL's `max_connections`.
    pub max_connections: u32,
    /// PostgreSQL's `shared_buffers`.
    pub shared_buffers: String,
    /// More settings, name and value; they win over ours.
    pub settings: Vec<(String, String)>,
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self {
            bin_dir: None,
            port: None,
            template_cache: None,
            fsync: true,
            max_connections: 100,
            shared_buffers: "128MB".to_owned(),
            settings: Vec::new(),
        }
    }
}

/// A PostgreSQL server of our own. Dropping it stops the server at once and waits for its end.
#[derive(Debug)]
pub struct PrivatePostgres {
    server: Server,
    options: PostgresOptions,
    user: Option<ServerUser>,
    folder: PathBuf,
    port: u16,
    /// Held as long as the value lives.
    _lock: File,
}

impl PrivatePostgres {
    /// Starts a server in `folder`, which is created if need be and given to the user that the
    /// server runs as; its data is in `data` below it. A data folder that is there already is
    /// used. Returns when a client can log in.
    ///
    /// # Errors
    /// When PostgreSQL or `setpriv` is not found, when the folder cannot be used, or when the server
    /// does not answer in time; the error holds the end of its log.
    pub async fn start(folder: &Path, options: PostgresOptions) -> Result<Self> {
        let bin_dir = match &options.bin_dir {
            Some(bin_dir) => bin_dir.clone(),
            None => find_postgres()?,
        };
        let user = ServerUser::to_run_as()?;
        let folder = prepare_folder(folder, user.as_ref())?;
        let lock = lock_folder(&folder, "postgres.lock")?;
        let data = folder.join("data");
        if !data.join("PG_VERSION").is_file() {
            let (bin_dir, data, user) = (bin_dir.clone(), data.clone(), user.clone());
            let cache = options.template_cache.clone();
            tokio::task::spawn_blocking(move || match cache {
                Some(cache) => copy_template(&bin_dir, &cache, &data, user.as_ref()),
                None => initialise(&bin_dir, &data, user.as_ref()),
            })
            .await
            .context("initialising a PostgreSQL data folder")??;
        }
        let mut postgres = Self {
            server: Server::new("PostgreSQL", &bin_dir.join("postgres"), &data, folder.join("postgres.log"))?,
            _lock: lock,
            port: 0,
            options,
            user,
            folder,
        };
        let mut attempt = 1;
        loop {
            postgres.port = postgres.options.port.map_or_else(free_port, Ok)?;
            match postgres.launch().await {
                Err(_) if postgres.may_try_another_port(attempt) => attempt += 1,
                outcome => return outcome.map(|()| postgres),
            }
        }
    }

    /// The URL of a database on this server, as its superuser.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!("postgresql://{POSTGRES_USER}@127.0.0.1:{}/{database}", self.port)
    }

    /// The port on 127.0.0.1; it stays the same over [`Self::start_again`].
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process id of the postmaster, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// The process ids of everything that belongs to this server, the postmaster's among them.
    #[must_use]
    pub fn all_pids(&self) -> Vec<u32> {
        self.server.processes()
    }

    /// The folder that was given to [`Self::start`].
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file with the server's log.
    #[must_use]
    pub fn log_file(&self) -> &Path {
        &self.server.log
    }

    /// Kills the server as a crash would (SIGKILL, the postmaster first, then all its children)
    /// and waits until every one of them is gone.
    ///
    /// # Errors
    /// When one is still there after half a minute.
    pub async fn sigkill(&mut self) -> Result<()> {
        self.server.kill_and_wait().await
    }

    /// Stops the server in good order (SIGINT: transactions are rolled back, a checkpoint is
    /// written) and waits until it is gone.
    ///
    /// # Errors
    /// When it is still there after half a minute.
    pub async fn stop_fast(&mut self) -> Result<()> {
        self.server.stop_and_wait(Signal::Int).await
    }

    /// Whether it has ended unexpectedly.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.server.reap()?.is_some())
    }

    /// Starts the stopped or killed server again: same folder, same port. Returns when a client
    /// can log in, so after crash recovery.
    ///
    /// # Errors
    /// When it runs already, or as [`Self::start`].
    pub async fn start_again(&mut self) -> Result<()> {
        ensure!(self.pid().is_none(), "this PostgreSQL is running; stop it before starting it again");
        self.launch().await
    }

    /// Freezes the postmaster and all its children (SIGSTOP): connections stay, new ones are
    /// accepted by the kernel, nothing is answered.
    ///
    /// # Errors
    /// When the server does not run, or does not stop.
    pub async fn pause(&mut self) -> Result<()> {
        self.server.pause().await
    }

    /// Resumes a frozen server.
    ///
    /// # Errors
    /// When it does not run.
    pub fn resume(&mut self) -> Result<()> {
        self.server.resume()
    }

    /// Creates an empty database and returns its URL.
    ///
    /// # Errors
    /// When the server refuses, for instance because there is one of that name.
    pub async fn create_database(&self, name: &str) -> Result<String> {
        self.administer(&format!("CREATE DATABASE {}", quoted(name))).await?;
        Ok(self.url(name))
    }

    /// Creates a database as a copy of another one, to which nobody may be connected, and
    /// returns its URL.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn create_database_from(&self, name: &str, template: &str) -> Result<String> {
        self.administer(&format!("CREATE DATABASE {} TEMPLATE {}", quoted(name), quoted(template))).await?;
        Ok(self.url(name))
    }

    fn may_try_another_port(&self, attempt: u32) -> bool {
        self.options.port.is_none() && attempt < PORT_TRIES && self.server.lost_its_port()
    }

    async fn launch(&mut self) -> Result<()> {
        // At SIGQUIT the postmaster ends at once, takes its children with it and removes its
        // shared memory. SIGKILL would leave both behind: a child that is busy only notices
        // the postmaster's death when it next waits for something.
        let mut command = guarded_command(&self.server.program, self.user.as_ref(), Signal::Quit)?;
        command.arg("-D").arg(&self.server.home).current_dir(&self.folder);
        for (name, value) in self.settings() {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        // Messages in English whatever the machine speaks, because we look into them.
        command.env("LC_ALL", "C").env_remove("PGDATA").env_remove("PGPORT");
        self.server.launch(command)?;

        let started = Instant::now();
        let mut deadline = START_DEADLINE;
        loop {
            self.server.ensure_alive()?;
            let last = match self.answers().await {
                Ok(()) => return Ok(()),
                Err(error) => format!("{error:#}"),
            };
            // SQLSTATE 57P03 while the log is replayed after a crash.
            if last.contains("starting up") || last.contains("not yet accepting connections") {
                deadline = RECOVERY_DEADLINE;
            }
            if started.elapsed() > deadline {
                let error = self.server.failure(&format!("did not answer within {deadline:?} ({last})"));
                self.end_at_once();
                return Err(error);
            }
            sleep(POLL).await;
        }
    }

    /// Logs in and makes sure that the server is ours: somebody else's may have got the port.
    async fn answers(&self) -> Result<()> {
        let messages = self.administer("SHOW data_directory").await?;
        let ours = messages.iter().any(|message| match message {
            SimpleQueryMessage::Row(row) => {
                row.get(0).is_some_and(|path| Path::new(path) == self.server.home)
            }
            _ => false,
        });
        ensure!(ours, "another PostgreSQL answers on port {}", self.port);
        Ok(())
    }

    async fn administer(&self, sql: &str) -> Result<Vec<SimpleQueryMessage>> {
        let (client, connection) =
            tokio_postgres::connect(&self.url("postgres"), NoTls).await.map_err(describe)?;
        tokio::select! {
            answer = client.simple_query(sql) => answer.map_err(describe),
            end = connection => Err(match end {
                Ok(()) => anyhow!("the connection was closed"),
                Err(error) => describe(error),
            }),
        }
    }

    fn settings(&self) -> Vec<(String, String)> {
        let options = &self.options;
        let mut settings: Vec<(String, String)> = [
            ("port", self.port.to_string()),
            ("listen_addresses", "127.0.0.1".to_owned()),
            // No socket file: its path may be no longer than 107 bytes, and it would have to be
            // cleaned up after a crash.
            ("unix_socket_directories", String::new()),
            ("max_connections", options.max_connections.to_string()),
            ("shared_buffers", options.shared_buffers.clone()),
            ("fsync", if options.fsync { "on" } else { "off" }.to_owned()),
            // Segments in the data folder, so that a killed server leaves nothing in /dev/shm.
            ("dynamic_shared_memory_type", "mmap".to_owned()),
            ("timezone", "UTC".to_owned()),
            ("log_timezone", "UTC".to_owned()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        settings.extend(options.settings.iter().cloned());
        settings
    }

    /// SIGQUIT, which also removes the shared memory; SIGKILL when that does not help.
    fn end_at_once(&mut self) {
        if self.pid().is_some() {
            self.server.quit_blocking(Signal::Quit, Duration::from_secs(8));
        }
        self.server.kill_blocking();
        self.remove_shared_memory();
    }

    /// A killed postmaster leaves a small System V segment behind, whose number is in the
    /// seventh line of its pid file. The next start in the same folder removes it; when there is
    /// none, we do, because a machine has room for a few thousand of them.
    fn remove_shared_memory(&self) {
        let Ok(pid_file) = fs::read_to_string(self.server.home.join("postmaster.pid")) else {
            return;
        };
        if let Some(segment) = pid_file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
            // Best effort: without ipcrm it stays, and nothing else depends on it.
            let _ = quiet(Command::new("ipcrm").arg("-m").arg(segment)).status();
        }
    }
}

impl Drop for PrivatePostgres {
    fn drop(&mut self) {
        self.end_at_once();
    }
}

/// Shows what the server said: the error's own text is only "db error".
fn describe(error: tokio_postgres::Error) -> anyhow::Error {
    match error.as_db_error() {
        Some(said) => anyhow!("{} (SQLSTATE {})", said.message(), said.code().code()),
        None => error.into(),
    }
}

fn quoted(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

/// The folder that holds both `initdb` and `postgres`, links resolved.
fn find_postgres() -> Result<PathBuf> {
    let complete = |folder: &Path| folder.join("initdb").is_file() && folder.join("postgres").is_file();
    if let Some(folder) = find_on_path("initdb")
        .and_then(|initdb| fs::canonicalize(initdb).ok())
        .and_then(|initdb| initdb.parent().map(Path::to_path_buf))
        .filter(|folder| complete(folder))
    {
        return Ok(folder);
    }
    // Debian and Ubuntu keep the server's programs off the PATH.
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .filter(|(_, folder)| complete(folder))
        .collect();
    versions.sort();
    if let Some((_, folder)) = versions.pop() {
        return Ok(folder);
    }
    Command::new("pg_config")
        .arg("--bindir")
        .output()
        .ok()
        .map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
        .filter(|folder| complete(folder))
        .context(
            "PostgreSQL was not found: no initdb on PATH, nothing in /usr/lib/postgresql/*/bin, \
             no pg_config that knows; install the package postgresql",
        )
}

/// Runs `initdb`, as the user that the server will run as.
fn initialise(bin_dir: &Path, data: &Path, user: Option<&ServerUser>) -> Result<()> {
    let parent = data.parent().context("a data folder has a parent")?;
    let mut command = guarded_command(&bin_dir.join("initdb"), user, Signal::Kill)?;
    command
        .arg("-D")
        .arg(data)
        .args(["--auth=trust", "-U", POSTGRES_USER, "--no-sync", "-E", "UTF8", "--locale=C"])
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .env_remove("PGDATA")
        .current_dir(parent)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = spawn_for_life(command).and_then(Child::wait_with_output).context("starting initdb")?;
    if !output.status.success() {
        bail!(
            "initdb failed ({}):\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Copies the cached data folder of this version of PostgreSQL and this user to `data`; the
/// first caller makes it, the others wait for it.
fn copy_template(bin_dir: &Path, cache: &Path, data: &Path, user: Option<&ServerUser>) -> Result<()> {
    let version = Command::new(bin_dir.join("postgres"))
        .arg("--version")
        .output()
        .context("asking postgres for its version")?;
    let mut name: String = String::from_utf8_lossy(&version.stdout)
        .trim()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .collect();
    name.push_str(&user.map_or(String::new(), |user| format!("-for-{}", user.name)));

    fs::create_dir_all(cache).with_context(|| format!("creating {}", cache.display()))?;
    let template = cache.join(&name);
    let lock_path = cache.join(format!("{name}.lock"));
    let lock = File::create(&lock_path).with_context(|| format!("creating {}", lock_path.display()))?;
    // Released when the file is closed, also by our death.
    lock.lock().context("waiting for the lock on the template")?;
    if !template.is_dir() {
        // Made elsewhere, because the cache may lie where only root can go, and moved into
        // place in one step, so that nobody ever copies half of it.
        let scratch = PrivateFolder::create("standpipe-initdb")?;
        let folder = prepare_folder(scratch.path(), user)?;
        initialise(bin_dir, &folder.join("data"), user)?;
        let half = cache.join(format!("{name}.half"));
        if half.exists() {
            fs::remove_dir_all(&half)?;
        }
        copy_folder(&folder.join("data"), &half)?;
        fs::rename(&half, &template)?;
    }
    drop(lock);
    copy_folder(&template, data)
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let output = Command::new("cp").arg("-a").arg(from).arg(to).output().context("starting cp")?;
    ensure!(
        output.status.success(),
        "copying {} to {}: {}",
        from.display(),
        to.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// What both have in common

/// The processes of one server. The main one is our child; the others are found by what they
/// run and where, because PostgreSQL's children outlive a killed postmaster for a moment.
#[derive(Debug)]
struct Server {
    name: &'static str,
    program: PathBuf,
    /// The program with links resolved, as `/proc/<pid>/exe` shows it.
    executable: PathBuf,
    /// The working directory of all the server's processes.
    home: PathBuf,
    log: PathBuf,
    /// Where in the log the current run begins.
    log_start: u64,
    child: Option<Child>,
}

impl Server {
    fn new(name: &'static str, program: &Path, home: &Path, log: PathBuf) -> Result<Self> {
        let executable =
            fs::canonicalize(program).with_context(|| format!("looking for {}", program.display()))?;
        Ok(Self {
            name,
            program: program.to_path_buf(),
            executable,
            home: home.to_path_buf(),
            log,
            log_start: 0,
            child: None,
        })
    }

    fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn launch(&mut self, mut command: Command) -> Result<()> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("opening {}", self.log.display()))?;
        self.log_start = log.metadata()?.len();
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child =
            spawn_for_life(command).with_context(|| format!("starting {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Fails when the server has ended by itself.
    fn ensure_alive(&mut self) -> Result<()> {
        match self.reap()? {
            Some(status) => Err(self.failure(&format!("ended while it was starting ({status})"))),
            None => Ok(()),
        }
    }

    fn reap(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else {
            return Ok(None);
        };
        let status = child.try_wait().with_context(|| format!("waiting for {}", self.name))?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status)
    }

    fn failure(&self, what: &str) -> anyhow::Error {
        anyhow!("{} {what}; the end of {}:\n{}", self.name, self.log.display(), self.log_tail())
    }

    fn log_tail(&self) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(&self.log)?;
            let length = file.metadata()?.len();
            let start = self.log_start.max(length.saturating_sub(LOG_TAIL_BYTES));
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_else(|error| format!("(the log cannot be read: {error})"))
    }

    fn lost_its_port(&self) -> bool {
        self.pid().is_none() && self.log_tail().contains("Address already in use")
    }

    /// The processes of this server, the main one first; those that are ending are not among them.
    fn processes(&self) -> Vec<u32> {
        let belongs = |pid: &u32| {
            let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}"));
            link("cwd").is_ok_and(|cwd| cwd == self.home)
                && link("exe").is_ok_and(|exe| exe == self.executable)
        };
        let running = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| Some(*pid) != self.pid() && belongs(pid));
        self.pid().into_iter().chain(running).collect()
    }

    /// Whether every process is gone, those in `seen` included, to which those found now are
    /// added. Looking alone is not enough: a process that is ending loses its name and its
    /// working directory before it lets go of its sockets and its shared memory.
    fn gone(&mut self, seen: &mut Vec<u32>) -> Result<bool> {
        seen.extend(self.processes());
        self.reap()?;
        seen.retain(|pid| !matches!(state(*pid), None | Some('Z' | 'X')));
        Ok(self.child.is_none() && seen.is_empty())
    }

    async fn stop_and_wait(&mut self, signal: Signal) -> Result<()> {
        let pid = self.pid().with_context(|| format!("this {} is not running", self.name))?;
        let mut seen = self.processes();
        self.resume()?;
        send_signal(signal, &[pid])?;
        let started = Instant::now();
        while !self.gone(&mut seen)? {
            if started.elapsed() > STOP_DEADLINE {
                return Err(self.failure(&format!("did not stop within {STOP_DEADLINE:?}")));
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    async fn kill_and_wait(&mut self) -> Result<()> {
        let mut seen = self.kill_all()?;
        let started = Instant::now();
        while !self.gone(&mut seen)? {
            ensure!(
                started.elapsed() < STOP_DEADLINE,
                "{} survived SIGKILL for {STOP_DEADLINE:?}",
                self.name
            );
            sleep(POLL).await;
            // A child that was being born at the first round.
            self.kill_all()?;
        }
        Ok(())
    }

    /// Kills all processes, the main one first, and returns which they were.
    fn kill_all(&mut self) -> Result<Vec<u32>> {
        let processes = self.processes();
        if let Some(child) = &mut self.child {
            child.kill().with_context(|| format!("killing {}", self.name))?;
        }
        let main = self.pid();
        let others: Vec<u32> = processes.iter().copied().filter(|pid| Some(*pid) != main).collect();
        send_signal(Signal::Kill, &others)?;
        Ok(processes)
    }

    /// The way out for `Drop`, where nothing can be awaited and no error reported.
    fn kill_blocking(&mut self) {
        let mut seen = Vec::new();
        let started = Instant::now();
        while let Ok(killed) = self.kill_all() {
            seen.extend(killed);
            if self.gone(&mut seen).unwrap_or(true) || started.elapsed() > STOP_DEADLINE {
                return;
            }
            std::thread::sleep(POLL);
        }
    }

    fn quit_blocking(&mut self, signal: Signal, deadline: Duration) {
        let Some(pid) = self.pid() else {
            return;
        };
        let mut seen = self.processes();
        let started = Instant::now();
        let sent = self.resume().is_ok() && send_signal(signal, &[pid]).is_ok();
        while sent && !self.gone(&mut seen).unwrap_or(true) && started.elapsed() < deadline {
            std::thread::sleep(POLL);
        }
    }

    async fn pause(&mut self) -> Result<()> {
        let pid = self.pid().with_context(|| format!("this {} is not running", self.name))?;
        // The main process first: once it stands still there are no new ones.
        for pids in [vec![pid], self.processes()] {
            send_signal(Signal::Stop, &pids)?;
            let started = Instant::now();
            while !pids.iter().all(|pid| matches!(state(*pid), None | Some('T' | 'Z' | 'X'))) {
                ensure!(started.elapsed() < STOP_DEADLINE, "{} does not react to SIGSTOP", self.name);
                sleep(POLL).await;
            }
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        ensure!(self.pid().is_some(), "this {} is not running", self.name);
        send_signal(Signal::Continue, &self.processes())?;
        Ok(())
    }
}

/// The state of a process as the kernel gives it: `T` stopped by a signal, `Z` ended and not
/// collected by its parent yet, and so on; `None` when it is not there.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "pid (name) state ...", where the name may hold anything, brackets and spaces too.
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// The signals that are sent to servers, and to the program under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM.
    Term,
    /// SIGINT, what Ctrl-C sends.
    Int,
    /// SIGQUIT.
    Quit,
    /// SIGKILL.
    Kill,
    /// SIGSTOP.
    Stop,
    /// SIGCONT.
    Continue,
}

impl Signal {
    fn as_str(self) -> &'static str {
        match self {
            Self::Term => "TERM",
            Self::Int => "INT",
            Self::Quit => "QUIT",
            Self::Kill => "KILL",
            Self::Stop => "STOP",
            Self::Continue => "CONT",
        }
    }
}

/// Sends a signal to processes; those that are gone already are passed over.
///
/// The shell's built-in `kill` does it: the call itself would need `unsafe`, and the program of
/// that name is missing from small images.
///
/// # Errors
/// When there is no shell.
pub fn send_signal(signal: Signal, pids: &[u32]) -> io::Result<()> {
    if pids.is_empty() {
        return Ok(());
    }
    let mut command = Command::new("sh");
    command.args(["-c", "kill -s \"$@\"", "sh", signal.as_str()]);
    command.args(pids.iter().map(u32::to_string));
    quiet(&mut command).status().map(|_| ())
}

fn quiet(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())
}

/// A command that runs `program` as the given user and gets `at_our_death` when the thread that
/// started it ends; to be started by [`spawn_for_life`].
///
/// `setpriv` does both, because the kernel forgets the death signal when the user changes.
fn guarded_command(program: &Path, user: Option<&ServerUser>, at_our_death: Signal) -> Result<Command> {
    let setpriv =
        find_on_path("setpriv").context("setpriv was not found on PATH; install the package util-linux")?;
    let mut command = Command::new(setpriv);
    command.arg("--pdeathsig").arg(at_our_death.as_str());
    if let Some(user) = user {
        command
            .arg(format!("--reuid={}", user.uid))
            .arg(format!("--regid={}", user.gid))
            .arg("--clear-groups");
    }
    command.arg("--").arg(program);
    Ok(command)
}

/// A command that runs `program` as we are and is killed when this process ends; to be started
/// by [`spawn_for_life`].
///
/// # Errors
/// When `setpriv` (package util-linux) is not found.
pub fn command_for_life(program: &Path) -> Result<Command> {
    guarded_command(program, None, Signal::Kill)
}

struct SpawnRequest {
    command: Command,
    reply: mpsc::SyncSender<io::Result<Child>>,
}

/// Starts a command from a thread that lives as long as this process. The kernel sends the
/// parent-death signal when the *thread* that started the child ends, and neither a test's
/// thread nor a runtime's worker lives as long as the process does.
///
/// # Errors
/// When the command cannot be started.
pub fn spawn_for_life(command: Command) -> io::Result<Child> {
    static KEEPER: OnceLock<mpsc::Sender<SpawnRequest>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (requests, inbox) = mpsc::channel::<SpawnRequest>();
        let thread = std::thread::Builder::new().name("server-keeper".to_owned()).spawn(move || {
            for mut request in inbox {
                // The asker waits for the answer, so there is always somebody to take it.
                let _ = request.reply.send(request.command.spawn());
            }
        });
        // Without the thread the inbox is gone as well, and every request below says so.
        drop(thread);
        requests
    });
    let (reply, answer) = mpsc::sync_channel(1);
    keeper
        .send(SpawnRequest { command, reply })
        .map_err(|_| io::Error::other("the thread that starts servers is gone"))?;
    answer.recv().map_err(|_| io::Error::other("the thread that starts servers is gone"))?
}

/// The user that servers run as when we are root.
#[derive(Debug, Clone)]
struct ServerUser {
    name: String,
    uid: u32,
    gid: u32,
}

impl ServerUser {
    /// `None` when we are an ordinary user: the servers run as we do.
    fn to_run_as() -> Result<Option<Self>> {
        let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("Uid:"))
            .and_then(|ids| ids.split_whitespace().nth(1))
            .context("/proc/self/status has no Uid line")?;
        if effective != "0" {
            return Ok(None);
        }
        let passwd = fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
        let find = |wanted: &str| {
            passwd.lines().find_map(|line| {
                let fields: Vec<&str> = line.split(':').collect();
                match fields[..] {
                    [name, _, uid, gid, ..] if name == wanted => {
                        Some(Self { name: name.to_owned(), uid: uid.parse().ok()?, gid: gid.parse().ok()? })
                    }
                    _ => None,
                }
            })
        };
        find("postgres")
            .or_else(|| find("nobody"))
            .map(Some)
            .context("started by root, servers run as the user postgres or nobody, and there is neither")
    }

    fn own(&self, path: &Path) -> Result<()> {
        chown(path, Some(self.uid), Some(self.gid))
            .with_context(|| format!("giving {} to {}", path.display(), self.name))
    }

    /// Whether this user may go through a folder.
    fn may_enter(&self, folder: &fs::Metadata) -> bool {
        let bit = if folder.uid() == self.uid {
            0o100
        } else if folder.gid() == self.gid {
            0o010
        } else {
            0o001
        };
        folder.mode() & bit != 0
    }
}

/// Creates the folder if need be, gives it to the user that the server runs as, and returns its
/// full path with links resolved, which is how `/proc` and PostgreSQL show it.
fn prepare_folder(folder: &Path, user: Option<&ServerUser>) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let folder = fs::canonicalize(folder).with_context(|| format!("looking at {}", folder.display()))?;
    let Some(user) = user else {
        return Ok(folder);
    };
    for parent in folder.ancestors().skip(1) {
        let metadata = fs::metadata(parent).with_context(|| format!("looking at {}", parent.display()))?;
        ensure!(
            user.may_enter(&metadata),
            "started by root, the server runs as {}, which may not enter {}; choose a folder below /tmp, or start \
             this as an ordinary user",
            user.name,
            parent.display()
        );
    }
    user.own(&folder)?;
    Ok(folder)
}

/// Makes sure that one folder serves one server at a time: two would ruin its data, and the end
/// of one would take the other's processes with it. Released when the file is closed, so also
/// when this process dies.
fn lock_folder(folder: &Path, name: &str) -> Result<File> {
    let path = folder.join(name);
    let lock = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    lock.try_lock()
        .with_context(|| format!("the folder {} is in use by another private server", folder.display()))?;
    Ok(lock)
}

/// A fresh folder for private servers below the system's folder for temporary files. It is
/// removed when the value is dropped, and also when this process ends in any other way.
#[derive(Debug)]
pub struct PrivateFolder {
    path: PathBuf,
    sweeper: Child,
}

impl PrivateFolder {
    /// Creates the folder `<prefix>-<random>`.
    ///
    /// # Errors
    /// When it cannot be created, or no shell can be started.
    pub fn create(prefix: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("{prefix}-{:016x}", fastrand::u64(..)));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("creating {}", path.display()))?;
        // Others may go through it, because servers started by root run as somebody else; set
        // apart from the creation, where the umask would have a say.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o711))?;
        let path = fs::canonicalize(&path)?;
        // Its standard input ends when we do. Servers may still be writing at that moment, so
        // it tries more than once.
        let script = "while read -r line; do :; done; for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do \
                      [ -e \"$0\" ] || exit 0; rm -rf -- \"$0\"; sleep 1; done";
        let sweeper = Command::new("sh")
            .args(["-c", script])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .spawn()
            .context("starting a shell")?;
        Ok(Self { path, sweeper })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        // An error cannot be reported here; the sweeper tries again.
        let _ = fs::remove_dir_all(&self.path);
        drop(self.sweeper.stdin.take());
        let _ = self.sweeper.wait();
    }
}

/// A port of 127.0.0.1 that is not in use.
///
/// It lies below the range from which the kernel takes the ports of outgoing connections. A port
/// inside that range can be taken by any client while the server is down, even by one that
/// tries to connect to it (which then talks to itself), and the server could not come back.
///
/// # Errors
/// When no port can be bound.
pub fn free_port() -> Result<u16> {
    let first_ephemeral = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse::<u16>().ok())
        .unwrap_or(32768);
    if first_ephemeral > 12_000 {
        for _ in 0..100 {
            let port = fastrand::u16(10_000..first_ephemeral);
            if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
                return Ok(port);
            }
        }
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    Ok(listener.local_addr()?.port())
}

fn find_on_path(program: &str) -> Option<PathBuf> {
    // PATH is not a setting of ours, so it is not read with the configuration.
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(program)).find(|candidate| {
        fs::metadata(candidate).is_ok_and(|found| found.is_file() && found.mode() & 0o111 != 0)
    })
}
