//! The background tasks: one file each, all of one shape. A task does a round and says when the next one is due; an error
//! is retried with growing pauses.
//!
//! - `prepare`: before the first entry: `schema`, `takeover`, then the lease on the consumer names, which it keeps
//! - `janitor`: trims the stream, and looks at it for all parts
//! - `acknowledged`: records in PostgreSQL what was acknowledged, and notices when it has gone back in time
//! - `tombstones`, `purge`: delete what has served its time
//! - `legacy`: the keys of the old application's pages
//! - `progress`: the line in the log

pub mod acknowledged;
pub mod janitor;
pub mod legacy;
pub mod prepare;
pub mod progress;
pub mod purge;
mod schema;
mod takeover;
pub mod tombstones;

use std::time::Duration;

use anyhow::Result;
use tokio_util::sync::CancellationToken;

use crate::time::Backoff;

/// A background task.
pub trait Task: Send {
    /// Does what is due. Returns how long to wait before the next round.
    ///
    /// # Errors
    ///
    /// A server cannot be reached, or refuses. The parts that wait for that server report it; a task that has more to say
    /// says it itself.
    fn round(&mut self) -> impl Future<Output = Result<Duration>> + Send;

    /// What is left to do at the end.
    fn last(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// Runs a task until `end`.
pub async fn run(mut task: impl Task, end: CancellationToken) {
    let mut delays = Backoff::default();
    while !end.is_cancelled() {
        let pause = match task.round().await {
            Ok(pause) => {
                delays.reset();
                pause
            }
            Err(_) => delays.pause(),
        };
        end.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
    task.last().await;
}
