//! The processes of a server: started so that they end with us, signalled, frozen, found again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use tokio::time::sleep;

use super::user::ServerUser;
use super::{LOG_TAIL_BYTES, POLL, STOP_DEADLINE, find_on_path};

/// The processes of one server. The main one is our child; the others are found by what they
/// run and where, because PostgreSQL's children outlive a killed postmaster for a moment.
#[derive(Debug)]
pub(super) struct Server {
    name: &'static str,
    pub(super) program: PathBuf,
    /// The program with links resolved, as `/proc/<pid>/exe` shows it.
    executable: PathBuf,
    /// The working directory of all the server's processes.
    pub(super) home: PathBuf,
    pub(super) log: PathBuf,
    /// Where in the log the current run begins.
    log_start: u64,
    child: Option<Child>,
}

impl Server {
    pub(super) fn new(name: &'static str, program: &Path, home: &Path, log: PathBuf) -> Result<Self> {
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

    pub(super) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    pub(super) fn launch(&mut self, mut command: Command) -> Result<()> {
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
    pub(super) fn ensure_alive(&mut self) -> Result<()> {
        match self.reap()? {
            Some(status) => Err(self.failure(&format!("ended while it was starting ({status})"))),
            None => Ok(()),
        }
    }

    pub(super) fn reap(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else {
            return Ok(None);
        };
        let status = child.try_wait().with_context(|| format!("waiting for {}", self.name))?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status)
    }

    pub(super) fn failure(&self, what: &str) -> anyhow::Error {
        anyhow!("{} {what}; the end of {}:\n{}", self.name, self.log.display(), self.log_tail())
    }

    pub(super) fn log_tail(&self) -> String {
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

    pub(super) fn lost_its_port(&self) -> bool {
        self.pid().is_none() && self.log_tail().contains("Address already in use")
    }

    /// The processes of this server, the main one first; those that are ending are not among them.
    pub(super) fn processes(&self) -> Vec<u32> {
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
    pub(super) fn gone(&mut self, seen: &mut Vec<u32>) -> Result<bool> {
        seen.extend(self.processes());
        self.reap()?;
        seen.retain(|pid| !matches!(state(*pid), None | Some('Z' | 'X')));
        Ok(self.child.is_none() && seen.is_empty())
    }

    pub(super) async fn stop_and_wait(&mut self, signal: Signal) -> Result<()> {
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

    pub(super) async fn kill_and_wait(&mut self) -> Result<()> {
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
    pub(super) fn kill_all(&mut self) -> Result<Vec<u32>> {
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
    pub(super) fn kill_blocking(&mut self) {
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

    pub(super) fn quit_blocking(&mut self, signal: Signal, deadline: Duration) {
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

    pub(super) async fn pause(&mut self) -> Result<()> {
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

    pub(super) fn resume(&mut self) -> Result<()> {
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

pub(super) fn quiet(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())
}

/// A command that runs `program` as the given user and gets `at_our_death` when the thread that
/// started it ends; to be started by [`spawn_for_life`].
///
/// `setpriv` does both, because the kernel forgets the death signal when the user changes.
pub(super) fn guarded_command(
    program: &Path,
    user: Option<&ServerUser>,
    at_our_death: Signal,
) -> Result<Command> {
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
