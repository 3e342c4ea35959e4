//! Whether a pipeline may run, and its reported state.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::apply::HALTED;
use super::{Names, Pipeline};
use crate::status::State;
use crate::stop::{Stopped, or_stop};

impl Pipeline {
    /// Waits until this process has its consumer names to itself.
    pub(super) async fn wait_for_name(&mut self, stop: &CancellationToken) -> Result<(), Stopped> {
        loop {
            let names = self.names.borrow_and_update().clone();
            match names {
                Names::Ours => return Ok(()),
                // The same for all pipelines, so only one logs it.
                Names::Waiting(state) if self.index > 0 => {
                    self.status.pipeline(self.index, |status| {
                        status.enter(state);
                    });
                }
                Names::Waiting(state) => self.say(state),
            }
            // If the sender is gone, the process is stopping.
            or_stop(stop, self.names.changed()).await?.map_err(|_| Stopped)?;
        }
    }

    /// Removes our consumer from the group if nothing is pending under it, so that the next start with this name need
    /// not wait to find out whether we are still running.
    pub(super) async fn leave(&self) {
        if let Ok(mut stream) = self.redis.connect().await {
            let name = Some(self.consumer.as_str());
            // If this fails, the name stays, and the next start waits until it has been idle.
            let _ = stream.remove_idle_consumers(Duration::ZERO, name).await;
        }
    }

    /// True while an operator has paused us. If the control side is gone, we count as running: nobody could resume us.
    pub(super) fn is_paused(&self) -> bool {
        *self.pause.borrow() && self.pause.has_changed().is_ok()
    }

    /// Waits until resumed. All entries in hand are acknowledged; we keep our names.
    pub(super) async fn rest(&self, stop: &CancellationToken) {
        let (mut pause, mut names) = (self.pause.clone(), self.names.clone());
        self.say(State::Paused);
        tokio::select! {
            _ = pause.wait_for(|paused| !paused) => self.say(State::Running),
            _ = names.wait_for(|names| *names != Names::Ours) => {}
            () = stop.cancelled() => {}
        }
    }

    /// Resolves when a pipeline that waits for its turn must do something else.
    pub(super) async fn interrupted(&self, stop: &CancellationToken) {
        let (mut pause, mut names) = (self.pause.clone(), self.names.clone());
        // Without its other side, nothing changes any more.
        let paused = async {
            if pause.wait_for(|paused| *paused).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let lost = async {
            if names.wait_for(|names| *names != Names::Ours).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = paused => {}
            () = lost => {}
            () = stop.cancelled() => {}
        }
    }

    /// Records the state, and logs it if it is new: an outage is one line, not one per attempt.
    pub(super) fn say(&self, state: State) {
        let mut before = State::default();
        self.status.pipeline(self.index, |status| before = status.enter(state.clone()));
        if std::mem::discriminant(&before) == std::mem::discriminant(&state) {
            return;
        }
        let consumer = &self.consumer;
        match state {
            State::WaitingForRedis { reason } => {
                warn!(consumer, reason, "waiting for Redis; nothing is lost");
            }
            State::WaitingForPostgres { reason } => {
                warn!(
                    consumer,
                    reason, "waiting for PostgreSQL; nothing is lost, and this pipeline stops reading"
                );
            }
            State::Halted { reason } => {
                error!(consumer, reason, "halted: operator action needed; retrying every {HALTED:?}");
            }
            State::Paused => info!(consumer, "paused manually; entries in hand are acknowledged"),
            State::Running if !matches!(before, State::Starting | State::WaitingForLease { .. }) => {
                // At the same level as the outage that it ends.
                warn!(consumer, "running again");
            }
            _ => {}
        }
    }
}
