//! Stopping a loop.

use tokio_util::sync::CancellationToken;

/// It is time to stop: entries in hand that are not finished stay pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped")]
pub struct Stopped;

/// Waits for the future, unless it is time to stop before that.
///
/// # Errors
///
/// [`Stopped`].
pub async fn or_stop<T>(stop: &CancellationToken, future: impl Future<Output = T>) -> Result<T, Stopped> {
    stop.run_until_cancelled(future).await.ok_or(Stopped)
}
