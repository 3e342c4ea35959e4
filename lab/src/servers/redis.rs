//! A private Redis.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tokio::time::sleep;

use super::folder::{lock_folder, prepare_folder};
use super::process::{Server, Signal, guarded_command};
use super::user::ServerUser;
use super::{POLL, PORT_TRIES, RECOVERY_DEADLINE, START_DEADLINE, find_on_path, free_port};

/// When Redis flushes its append-only file to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppendFsync {
    /// Before every reply.
    Always,
    /// Once a second: a crash of the machine loses about a second of writes.
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
