//! An operator's commands to a running process: pause, resume, change the log level, drain.
//!
//! Nothing here is persisted: after a restart only the environment counts.

use std::fmt;
use std::sync::Mutex;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::config::LogLevel;
use crate::metrics;
use crate::mutex::lock;

/// Changes the log level.
pub type SetLevel = Box<dyn Fn(LogLevel) -> Result<(), String> + Send + Sync>;

/// What to pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The reader: it closes its websocket and keeps its lease.
    Reader,
    /// The pipelines: they acknowledge what they hold and keep their names.
    Pipelines,
    /// Both.
    All,
}

impl Part {
    /// The part with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "reader" => Some(Self::Reader),
            "pipelines" => Some(Self::Pipelines),
            "all" => Some(Self::All),
            _ => None,
        }
    }
}

/// The operator's commands, which the parts watch.
pub struct Control {
    /// Whether the reader is paused.
    reader: watch::Sender<bool>,
    /// Whether the pipelines are paused.
    pipelines: watch::Sender<bool>,
    drain: CancellationToken,
    set_level: Option<SetLevel>,
    /// The level set since the start.
    level: Mutex<Option<LogLevel>>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("reader", &self.reader)
            .field("pipelines", &self.pipelines)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Everything running. `set_level` where the log level can be changed.
    #[must_use]
    pub fn new(set_level: Option<SetLevel>) -> Self {
        Self {
            reader: watch::Sender::new(false),
            pipelines: watch::Sender::new(false),
            drain: CancellationToken::new(),
            set_level,
            level: Mutex::new(None),
        }
    }

    /// Whether the reader is to be paused.
    #[must_use]
    pub fn reader(&self) -> watch::Receiver<bool> {
        self.reader.subscribe()
    }

    /// Whether the pipelines are to be paused.
    #[must_use]
    pub fn pipelines(&self) -> watch::Receiver<bool> {
        self.pipelines.subscribe()
    }

    /// Waits while the pipelines are paused: everything else that changes the database pauses with them.
    pub async fn pipelines_go(&self) {
        let _ = self.pipelines().wait_for(|paused| !paused).await;
    }

    /// Pauses or resumes a part.
    pub fn pause(&self, part: Part, pause: bool) {
        let set = |who: &watch::Sender<bool>, part: &'static str| {
            who.send_if_modified(|paused| std::mem::replace(paused, pause) != pause);
            ::metrics::gauge!(metrics::PAUSED, "part" => part).set(f64::from(u8::from(pause)));
        };
        if part != Part::Pipelines {
            set(&self.reader, "reader");
        }
        if part != Part::Reader {
            set(&self.pipelines, "pipelines");
        }
    }

    /// Changes the log level.
    ///
    /// # Errors
    ///
    /// The log of this process cannot be changed.
    pub fn set_level(&self, level: LogLevel) -> Result<(), String> {
        let set_level = self.set_level.as_ref().ok_or("the log of this process cannot be changed")?;
        set_level(level)?;
        *lock(&self.level) = Some(level);
        info!(%level, "the log level was changed manually");
        Ok(())
    }

    /// The level that was set since the start.
    #[must_use]
    pub fn level(&self) -> Option<LogLevel> {
        *lock(&self.level)
    }

    /// Makes the process drain and exit.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Whether it is doing so.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.drain.is_cancelled()
    }

    /// Resolves when it is to do so.
    pub async fn drain_begun(&self) {
        self.drain.cancelled().await;
    }
}
