//! Before our first entry, replays what another program left in the group: at the first start on its database, and
//! whenever such a program works alongside us.

use anyhow::Result;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::pipeline::Pipeline;
use crate::store::{Store, takeover};
use crate::stream::{Redis, is_nogroup};

/// Replays once, through `pipeline`, which reads nothing new.
pub(super) async fn take_over(
    redis: &Redis,
    store: &Store,
    pipeline: &Pipeline,
    stop: &CancellationToken,
) -> Result<()> {
    let due = takeover::is_due(store.session().await?.client()).await?;
    let mut stream = redis.connect().await?;
    // Without a group there is nothing to replay; the first reader creates one.
    let others = match stream.has_others().await {
        Ok(others) => others,
        Err(error) if is_nogroup(&error) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if (due || others)
        && let count @ 1.. = pipeline.take_over(stop).await?
    {
        info!(entries = count, "replayed entries that another program left pending");
    }
    if due {
        takeover::done(store.session().await?.client()).await?;
    }
    Ok(())
}
