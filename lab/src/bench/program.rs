//! The real binary as a child process, configured by its environment alone.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::machine;
use crate::program::spawn;
use crate::servers::{Signal, send_signal};

/// How long it may take to exit after the signal: longer than a drain.
const STOP_DEADLINE: Duration = Duration::from_secs(40);
/// How much of its output is shown when something goes wrong.
const LOG_TAIL: usize = 4096;

/// A running `standpipe`. It is killed when the value is dropped, and when this process ends in any other way.
pub struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts `standpipe <command>` with these variables and nothing else in its environment but PATH.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(command: &str, variables: &[(String, String)], folder: &Path) -> Result<Self> {
        let log = folder.join(format!("{command}.log"));
        let out = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let child = spawn(&standpipe()?, &[command], variables, out.try_clone()?, out)
            .with_context(|| format!("starting standpipe {command}"))?;
        Ok(Self { child, log })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Processor seconds that it has used since its start.
    #[must_use]
    pub fn cpu(&self) -> f64 {
        machine::cpu(self.pid()).map_or(0.0, |cpu| cpu.own)
    }

    /// The most memory that it had resident, in bytes.
    #[must_use]
    pub fn peak_memory(&self) -> u64 {
        machine::peak_memory(self.pid()).unwrap_or(0)
    }

    /// # Errors
    ///
    /// It has ended.
    pub fn ensure_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("standpipe has ended ({status}):\n{}", self.said()),
        }
    }

    /// The end of what it said.
    #[must_use]
    pub fn said(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&text[text.len().saturating_sub(LOG_TAIL)..]).into_owned()
    }

    /// Ends it in good order.
    ///
    /// # Errors
    ///
    /// It does not end, or not well.
    pub async fn stop(mut self) -> Result<()> {
        send_signal(Signal::Term, &[self.pid()])?;
        let began = Instant::now();
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("standpipe ended badly ({status}):\n{}", self.said()),
                None if began.elapsed() > STOP_DEADLINE => {
                    bail!("standpipe did not end within {STOP_DEADLINE:?}:\n{}", self.said())
                }
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }
}

/// The program under test: it is built into the folder of this one.
fn standpipe() -> Result<PathBuf> {
    let program = std::env::current_exe().context("looking for this program")?.with_file_name("standpipe");
    ensure!(program.is_file(), "{} is missing: cargo build --release", program.display());
    Ok(program)
}

impl Drop for Program {
    fn drop(&mut self) {
        // Nothing to be done about a failure: the kernel ends it with us.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
