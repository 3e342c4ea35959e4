//! A program under test as a child process.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is a failed test")]

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::bench::machine;
use crate::servers::{Signal, command_for_life, send_signal, spawn_for_life};
use tempfile::TempDir;

use crate::wait::wait_for;

/// A running program. It is killed when the value is dropped, and when the test process
/// ends in any other way.
pub struct Program {
    child: Child,
    folder: TempDir,
    command_line: String,
}

/// What is left of a program that has ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The exit code, or 128 + the number of the signal that ended it, as a shell says it.
    pub code: i32,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

/// Starts `binary <arguments>` with these variables and nothing else in its environment but PATH.
///
/// # Errors
///
/// It cannot be started.
pub fn spawn<K: AsRef<str>, V: AsRef<str>>(
    binary: &Path,
    arguments: &[&str],
    variables: &[(K, V)],
    stdout: File,
    stderr: File,
) -> anyhow::Result<Child> {
    let mut command = command_for_life(binary)?;
    command
        .args(arguments)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .envs(variables.iter().map(|(name, value)| (name.as_ref(), value.as_ref())))
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        // So that Ctrl-C at our own process is not also a signal to this one: it ends when we do.
        .process_group(0);
    Ok(spawn_for_life(command)?)
}

impl Program {
    /// Starts `binary <arguments>` with these variables and nothing else in its environment but PATH.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start<K: AsRef<str>, V: AsRef<str>>(
        binary: &Path,
        arguments: &[&str],
        variables: &[(K, V)],
    ) -> Self {
        let name = binary.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let command_line = [&[name.as_str()][..], arguments].concat().join(" ");
        let folder = tempfile::Builder::new().prefix("standpipe-test-run-").tempdir().unwrap();
        let output =
            |name: &str| File::options().create(true).append(true).open(folder.path().join(name)).unwrap();
        let child = spawn(binary, arguments, variables, output("stdout"), output("stderr")).unwrap();
        Self { child, folder, command_line }
    }

    /// Waits for its end, and returns that with everything it wrote.
    ///
    /// # Panics
    /// At the deadline, with everything it wrote.
    pub async fn finish(mut self, deadline: Duration) -> Finished {
        let code = self.wait_exit(deadline).await;
        Finished { code, stdout: self.stdout(), stderr: self.stderr() }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When there is no shell.
    pub fn signal(&self, signal: Signal) {
        send_signal(signal, &[self.pid()]).unwrap();
    }

    /// Whether it has not ended.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end and returns the exit code, or 128 + the number of the signal that ended
    /// it.
    ///
    /// # Panics
    /// At the deadline, with everything it wrote.
    pub async fn wait_exit(&mut self, deadline: Duration) -> i32 {
        let what = format!("`{}` to end", self.command_line);
        let status = wait_for(&what, deadline, async || {
            self.child.try_wait().unwrap().ok_or_else(|| format!("it runs; its output:\n{}", self.output()))
        })
        .await;
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
    }

    /// Waits until it has written a line that contains `pattern`, and returns that line.
    ///
    /// # Panics
    /// At the deadline, or when it ends before, with everything it wrote.
    pub async fn wait_for_line(&mut self, pattern: &str, deadline: Duration) -> String {
        let what = format!("a line with {pattern:?} from `{}`", self.command_line);
        wait_for(&what, deadline, async || {
            // The end first: what it wrote last must not be missed.
            let ended = self.child.try_wait().unwrap();
            let output = self.output();
            if let Some(line) = output.lines().find(|line| line.contains(pattern)) {
                return Ok(line.to_owned());
            }
            if let Some(status) = ended {
                panic!("{what}: it has ended ({status}); its output:\n{output}");
            }
            Err(format!("its output:\n{output}"))
        })
        .await
    }

    /// What it wrote to its standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.read("stdout")
    }

    /// What it wrote to its standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.read("stderr")
    }

    /// What it wrote so far: first all of its standard output, then all of its standard error.
    #[must_use]
    pub fn output(&self) -> String {
        self.stdout() + &self.stderr()
    }

    /// The lines of [`Self::output`].
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.output().lines().map(str::to_owned).collect()
    }

    /// Processor time it has used so far, in user space and in the kernel.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn cpu_seconds(&self) -> f64 {
        machine::cpu(self.pid()).expect("it has ended").own
    }

    /// Memory that it holds now (resident set).
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn rss_bytes(&self) -> u64 {
        let status = self.proc("status");
        let kibibytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has ended");
        kibibytes.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
    }

    fn proc(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.pid())).unwrap()
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.path().join(name)).unwrap()).into_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let running = self.is_running();
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A failed test's reader wants to know what the program said.
        if std::thread::panicking() {
            let state = if running { "running" } else { "ended" };
            eprintln!("output of `{}` ({state}):\n{}", self.command_line, self.output());
        }
    }
}
