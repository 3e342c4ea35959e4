//! The end of a loop that was asked to stop.

use tokio_util::sync::CancellationToken;

/// It is time to stop: what is in hand and not finished stays pending.
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
