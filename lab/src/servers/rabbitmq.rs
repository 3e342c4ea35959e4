//! A private RabbitMQ.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::folder::{lock_folder, prepare_folder};
use super::process::{Server, Signal, guarded_command};
use super::user::ServerUser;
use super::{POLL, free_port};

/// Erlang takes its time on a busy machine.
const START_DEADLINE: Duration = Duration::from_mins(2);

/// A RabbitMQ server of our own, with the plugins for consistent hashing and for management, and its port mapper. Dropping it
/// kills both and waits for their end.
#[derive(Debug)]
pub struct PrivateRabbitMq {
    server: Server,
    mapper: Server,
    user: Option<ServerUser>,
    folder: PathBuf,
    port: u16,
    management: u16,
    distribution: u16,
    mapping: u16,
    /// Held as long as the value lives.
    _lock: File,
}

/// The first entry in `folder` whose name starts with `prefix`.
fn only(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("looking into {}", folder.display()))?;
    let mut found = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    found.next().map(|entry| entry.path()).with_context(|| format!("no {prefix}* in {}", folder.display()))
}

impl PrivateRabbitMq {
    /// Starts a server in `folder`, which is created if need be and given to the user that the server runs as. `unpacked` is where
    /// the packages of RabbitMQ and Erlang are unpacked; they are copied, because that user may not be able to read them there.
    /// Returns when it answers.
    ///
    /// # Errors
    /// When there are no such packages or no `setpriv`, when the folder cannot be used, or when the server does not answer within
    /// two minutes; the error holds the end of its log.
    pub async fn start(folder: &Path, unpacked: &Path) -> Result<Self> {
        let user = ServerUser::to_run_as()?;
        let folder = prepare_folder(folder, user.as_ref())?;
        let root = folder.join("root");
        let copied = Command::new("cp").arg("-r").arg(unpacked).arg(&root).status().context("cp")?;
        ensure!(copied.success(), "{} cannot be copied", unpacked.display());
        let erlang = root.join("usr/lib/erlang");
        let erl = erlang.join("bin/erl");
        let script = fs::read_to_string(&erl).with_context(|| format!("reading {}", erl.display()))?;
        // Debian's script has its path hard-coded.
        let there = format!("ROOTDIR={}", erlang.display());
        fs::write(&erl, script.replace("ROOTDIR=/usr/lib/erlang", &there))?;
        let programs = only(&erlang, "erts-")?.join("bin");
        let home = folder.join("home");
        fs::create_dir(&home)?;
        if let Some(user) = &user {
            user.own(&home)?;
        }
        let mut rabbit = Self {
            _lock: lock_folder(&folder, "rabbitmq.lock")?,
            server: Server::new("RabbitMQ", &programs.join("beam.smp"), &home, folder.join("rabbitmq.log"))?,
            mapper: Server::new("epmd", &programs.join("epmd"), &folder, folder.join("epmd.log"))?,
            user,
            folder,
            port: free_port()?,
            management: free_port()?,
            distribution: free_port()?,
            mapping: free_port()?,
        };
        rabbit.launch().await.map(|()| rabbit)
    }

    /// The port of AMQP on 127.0.0.1; it stays the same over [`Self::start_again`].
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port of its management page and API on 127.0.0.1.
    #[must_use]
    pub fn management(&self) -> u16 {
        self.management
    }

    /// Kills the server as a crash would (SIGKILL) and waits until it is gone.
    ///
    /// # Errors
    /// When it is still there after half a minute.
    pub async fn sigkill(&mut self) -> Result<()> {
        self.server.kill_and_wait().await
    }

    /// Starts the killed server again: same folder, same ports. Returns when it answers.
    ///
    /// # Errors
    /// When it runs already, or as [`Self::start`].
    pub async fn start_again(&mut self) -> Result<()> {
        ensure!(self.server.pid().is_none(), "this RabbitMQ is running; kill it before starting it again");
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

    async fn launch(&mut self) -> Result<()> {
        let home = self.server.home.clone();
        // The port mapper first: the server would start one of its own, which would outlive it.
        if self.mapper.pid().is_none() {
            let mut command = guarded_command(&self.mapper.program, self.user.as_ref(), Signal::Kill)?;
            command
                .args(["-address", "127.0.0.1", "-port", &self.mapping.to_string()])
                .current_dir(&self.folder);
            self.mapper.launch(command)?;
        }
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.mapping)).await.is_err() {
            self.mapper.ensure_alive()?;
            ensure!(began.elapsed() < START_DEADLINE, "the port mapper does not listen");
            sleep(POLL).await;
        }
        fs::write(
            home.join("rabbitmq.conf"),
            format!(
                "listeners.tcp.1 = 127.0.0.1:{}\nmanagement.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {}\n\
                 log.console = true\ncollect_statistics_interval = 500\n",
                self.port, self.management
            ),
        )?;
        fs::write(
            home.join("enabled_plugins"),
            "[rabbitmq_management,rabbitmq_consistent_hash_exchange].\n",
        )?;
        self.server.launch(self.command(&home)?)?;
        let began = Instant::now();
        // The management page is the last to listen.
        while TcpStream::connect(("127.0.0.1", self.port)).await.is_err()
            || TcpStream::connect(("127.0.0.1", self.management)).await.is_err()
        {
            self.server.ensure_alive()?;
            if began.elapsed() > START_DEADLINE {
                let error = self.server.failure(&format!("did not answer within {START_DEADLINE:?}"));
                self.server.kill_blocking();
                return Err(error);
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    fn command(&self, home: &Path) -> Result<Command> {
        let root = self.folder.join("root/usr/lib");
        let script = only(&root.join("rabbitmq/lib"), "rabbitmq_server-")?.join("sbin/rabbitmq-server");
        let mut command = guarded_command(Path::new("/bin/sh"), self.user.as_ref(), Signal::Kill)?;
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .arg(script)
            .current_dir(home)
            .env("PATH", format!("{}:{path}", root.join("erlang/bin").display()))
            .env("HOME", home)
            .env("LC_ALL", "C.UTF-8")
            // So that the script execs the server instead of starting it as a child.
            .env("RUNNING_UNDER_SYSTEMD", "1")
            .env("RABBITMQ_NODENAME", format!("p{}@localhost", self.port))
            .env("RABBITMQ_BASE", home)
            .env("RABBITMQ_MNESIA_BASE", home.join("mnesia"))
            .env("RABBITMQ_LOG_BASE", home.join("log"))
            .env("RABBITMQ_PID_FILE", home.join("pid"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", home.join("enabled_plugins"))
            .env("RABBITMQ_CONFIG_FILE", home.join("rabbitmq.conf"))
            .env("RABBITMQ_CONF_ENV_FILE", home.join("none"))
            .env("RABBITMQ_DIST_PORT", self.distribution.to_string())
            .env("ERL_EPMD_PORT", self.mapping.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
            );
        Ok(command)
    }
}

impl Drop for PrivateRabbitMq {
    fn drop(&mut self) {
        self.server.kill_blocking();
        self.mapper.kill_blocking();
    }
}
