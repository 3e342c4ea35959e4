//! Trims acknowledged entries, and records the state of the stream for all parts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tracing::{error, info, warn};

use super::Task;
use crate::config::Config;
use crate::metrics;
use crate::mutex::lock;
use crate::status::Status;
use crate::stream::janitor::Keep;
use crate::stream::{Redis, Stream};
use crate::time::now_ms;

/// Consumers with nothing pending are removed after being idle for this long.
const FORGET_CONSUMERS: Duration = Duration::from_hours(1);
/// The time between rounds, and between rounds while there is more to trim.
const ROUND: Duration = Duration::from_secs(1);
const MORE: Duration = Duration::from_millis(50);

/// One per process.
pub struct Janitor {
    redis: Redis,
    config: Arc<Config>,
    status: Arc<Status>,
    stream: Option<Stream>,
    /// When idle consumers were last removed.
    cleaned: Option<Instant>,
    /// Whether another program works in the group.
    beside: bool,
    /// Whether an error of the script has been logged.
    said: bool,
    /// Whether Redis is short of memory.
    short: bool,
}

impl Janitor {
    /// A janitor that has seen nothing yet.
    #[must_use]
    pub fn new(config: Arc<Config>, redis: Redis, status: Arc<Status>) -> Self {
        Self { redis, config, status, stream: None, cleaned: None, beside: false, said: false, short: false }
    }

    /// What is kept now: next to nothing while memory is short, so that it never stops the reader.
    async fn keep(&mut self, stream: &mut Stream) -> Result<Keep> {
        let Some(keep) = self.config.keeps() else { return Ok(Keep::Nothing) };
        let memory = stream.memory().await?;
        let mark = self.config.memory_mark.bytes(memory.max);
        // A little below the reader's mark, and with a margin to avoid flapping.
        let share = if self.short { 17 } else { 19 };
        let short = mark.is_some_and(|mark| memory.used >= mark / 20 * share);
        if std::mem::replace(&mut self.short, short) != short {
            if short {
                warn!(
                    used = memory.used,
                    mark, "Redis is short of memory: entries are not kept for subscribers (STREAM_KEEP)"
                );
            } else {
                info!("entries are kept again");
            }
        }
        Ok(if short { Keep::Moments } else { Keep::Some(keep) })
    }

    async fn sweep(&mut self, stream: &mut Stream) -> Result<Duration> {
        let keep = self.keep(stream).await?;
        let look = match stream.sweep(keep, self.config.out_max_lag).await {
            Ok(look) => look,
            Err(error) => {
                // Outages are logged by the parts that wait; errors of the script itself are logged here.
                if error.code() == Some("ERR") && !std::mem::replace(&mut self.said, true) {
                    error!(%error, "the janitor cannot read the stream: nothing is trimmed");
                }
                return Err(error.into());
            }
        };
        metrics::look(&look);
        let pause = if look.trimmed > 0 || look.skipped > 0 { MORE } else { ROUND };
        let missing = !look.exists || !look.group;
        *lock(&self.status.stream) = Some((look, now_ms()));
        if missing {
            metrics::note_ensured(stream.ensure().await?);
            return Ok(pause);
        }
        if !self.status.pipelines.is_empty() {
            let others = stream.has_others().await?;
            if std::mem::replace(&mut self.beside, others) != others {
                info!(others, "another program works in the consumer group, or holds entries there");
            }
        }
        let mut of_tasks = stream.of_tasks();
        if self.config.handlers.is_some() {
            let tasks = of_tasks.count_tasks().await?;
            metrics::tasks(tasks);
            *lock(&self.status.tasks_seen) = Some(tasks);
        }
        if self.cleaned.is_none_or(|at| at.elapsed() > FORGET_CONSUMERS / 6) {
            self.cleaned = Some(Instant::now());
            stream.forget_refused().await?;
            let count = stream.remove_idle_consumers(FORGET_CONSUMERS, None).await?;
            // There may be no such group.
            let _ = of_tasks.remove_idle_consumers(FORGET_CONSUMERS, None).await;
            if count > 0 {
                info!(count, "removed consumers that were idle for an hour");
            }
        }
        Ok(pause)
    }
}

impl Task for Janitor {
    const NAME: &'static str = "janitor";

    async fn round(&mut self) -> Result<Duration> {
        let mut stream = self.redis.reuse(&mut self.stream).await?;
        let pause = self.sweep(&mut stream).await?;
        self.stream = Some(stream);
        Ok(pause)
    }
}
