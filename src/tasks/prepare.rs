//! Before the first entry: brings the database up to date, replays another program's work, and takes the lease on the
//! consumer names, which it keeps until the end.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{schema, takeover};
use crate::config::Config;
use crate::pipeline::{Names, Pipeline};
use crate::status::State;
use crate::store::verdict::Verdict;
use crate::store::{Store, StoreError};
use crate::stream::lease::{self, Lease};
use crate::stream::{Redis, Stream, StreamResult, is_oom};
use crate::time::Backoff;

/// A consumer that sent a read within this time is active: pipelines read every second, the Python worker ten times a second.
const ACTIVE: Duration = Duration::from_secs(3);
/// The lease on the names is renewed this often.
const RENEW: Duration = Duration::from_secs(3);
/// How often to try while another process holds them.
const TRY_AGAIN: Duration = Duration::from_millis(250);

/// Prepares the pipelines of a process.
pub struct Prepare {
    /// The settings.
    pub config: Arc<Config>,
    /// Where the names are leased.
    pub redis: Redis,
    /// The database to bring up to date.
    pub store: Store,
    /// The pipeline that replays.
    pub pipeline: Pipeline,
    /// Tells the pipelines whether the names are ours.
    pub names: watch::Sender<Names>,
}

impl Prepare {
    /// Prepares, then keeps the lease; at `release`, gives it back and ends.
    pub async fn run(self, release: CancellationToken) {
        let token = lease::token(&self.config.consumer_id);
        let work = async {
            self.bring_up_to_date().await;
            self.take_over(&release).await;
            self.keep_names(&token).await;
        };
        release.run_until_cancelled(Box::pin(work)).await;
        if let Ok(mut stream) = self.redis.connect().await {
            // If this fails, the lease expires by itself.
            let _ = stream.release_lease(Lease::Names, &token).await;
        }
    }

    async fn bring_up_to_date(&self) {
        let mut delays = Backoff::default();
        while let Err(error) = schema::bring_up_to_date(&self.store, self.config.auto_migrate).await {
            let reason = error.message;
            self.wait(match error.verdict {
                Verdict::Halt | Verdict::Reject => State::Halted { reason },
                Verdict::Reconnect | Verdict::Retry => State::WaitingForPostgres { reason },
            });
            tokio::time::sleep(delays.pause()).await;
        }
    }

    async fn take_over(&self, stop: &CancellationToken) {
        let mut delays = Backoff::default();
        while let Err(error) = takeover::take_over(&self.redis, &self.store, &self.pipeline, stop).await {
            let reason = format!("{error:#}");
            self.wait(if error.is::<StoreError>() {
                State::WaitingForPostgres { reason }
            } else {
                State::WaitingForRedis { reason }
            });
            tokio::time::sleep(delays.pause()).await;
        }
    }

    /// Keeps two processes with the same `CONSUMER_ID` apart: holds the lease on the names, and waits for consumers
    /// that are active under those names without a lease.
    async fn keep_names(&self, token: &str) {
        let mut delays = Backoff::default();
        loop {
            let Err(error) = self.hold_names(token).await;
            // While Redis is down, nobody else can take the lease either; we find out afterwards who holds it.
            self.names.send_if_modified(|names| match names {
                Names::Ours => false,
                Names::Waiting(state) => {
                    *state = State::WaitingForRedis { reason: error.to_string() };
                    true
                }
            });
            tokio::time::sleep(delays.pause().min(Duration::from_secs(1))).await;
        }
    }

    async fn hold_names(&self, token: &str) -> StreamResult<std::convert::Infallible> {
        let mut stream = self.redis.connect().await?;
        loop {
            let held = Self::holds(&mut stream, token).await?;
            let before = self.names.borrow().clone();
            let active = if held && before != Names::Ours {
                stream.active_consumer(&self.config.consumer_names(), ACTIVE).await?
            } else {
                None
            };
            if held && active.is_none() {
                self.names.send_if_modified(|names| std::mem::replace(names, Names::Ours) != Names::Ours);
                tokio::time::sleep(RENEW).await;
                continue;
            }
            let reason = format!(
                "another process works under CONSUMER_ID={}, or did a moment ago; an unused name is free after 10 s, \
                 and concurrent processes need different names",
                self.config.consumer_id
            );
            if !matches!(&before, Names::Waiting(State::WaitingForLease { .. })) {
                warn!(reason, active, "waiting");
            }
            self.wait(State::WaitingForLease { reason });
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    /// Takes or renews the lease; false while another process holds it.
    async fn holds(stream: &mut Stream, token: &str) -> StreamResult<bool> {
        match stream.take_lease(Lease::Names, token).await {
            // Redis refuses the lease because its memory is full, which only our work can change. It is enough that
            // nobody holds it and nobody is active under our names.
            Err(error) if is_oom(&error) => Ok(stream.lease_life(Lease::Names).await?.is_none()),
            held => held,
        }
    }

    fn wait(&self, reason: State) {
        self.names.send_replace(Names::Waiting(reason));
    }
}
