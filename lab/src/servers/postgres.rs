//! A private PostgreSQL.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokio::time::sleep;
use tokio_postgres::{NoTls, SimpleQueryMessage};

use super::folder::{PrivateFolder, lock_folder, prepare_folder};
use super::process::{Server, Signal, guarded_command, quiet, spawn_for_life};
use super::user::ServerUser;
use super::{POLL, PORT_TRIES, RECOVERY_DEADLINE, START_DEADLINE, find_on_path, free_port};

/// The superuser of a private PostgreSQL.
const POSTGRES_USER: &str = "standpipe";

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
