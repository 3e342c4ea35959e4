//! Background work that is done in rounds, as long as a session lasts.

use std::time::Duration;

use crate::stream::StreamResult;

/// The pause after a round that left nothing undone.
const REST: Duration = Duration::from_millis(500);

/// Work in rounds.
pub(super) trait Rounds: Send {
    /// The pause after a round that could not reach everything, and the longest that it grows to: it doubles each time.
    const PAUSES: (Duration, Duration);

    /// Does one round.
    fn round(&mut self) -> impl Future<Output = StreamResult<Reached>> + Send;
}

/// Runs rounds until one fails.
pub(super) async fn run<R: Rounds>(mut work: R) -> StreamResult<()> {
    let (first, longest) = R::PAUSES;
    let mut pause = first;
    loop {
        match work.round().await? {
            Reached::All => {
                pause = first;
                tokio::time::sleep(REST).await;
            }
            Reached::Some => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        }
    }
}

/// How much a round achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reached {
    /// Every server that was asked answered.
    All,
    /// Some could not be reached, or there was no room for what was found.
    Some,
}
