//! Where entries come from: an origin behind three verbs (`open`, `next`, `settled`), and the reader, which appends what it
//! yields to the stream.
//!
//! - `relay`: `com.atproto.sync.subscribeRepos`
//! - `reader`: one session after the other: lease, cursor, origin
//! - `append`: queue -> stream, and the marks at which that slows down

mod append;
pub mod reader;
pub mod relay;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::stream::append::{NewEntry, NewLetter};
use crate::stream::gap::Gap;

pub use reader::Reader;

/// Something that entries come from.
///
/// The reader keeps the lease, the cursor and the queue; an origin only connects and reads. What the status and the page
/// show of it, the origin reports itself: `frames` and `last_frame_ms` of [`crate::status::ReaderStatus`] for whatever it
/// receives, and `taking_in_ms` while it is steadily connected and there is nothing to receive.
pub trait Origin: Send {
    /// What it is called, `host` or `host:port`: a position means something only together with it.
    fn name(&self) -> String;

    /// Connects. The first arrival is the one behind `from`: `None` is from now on, `Some(0)` from the oldest that there is.
    /// It may send the one at `from` once more.
    fn open(&mut self, from: Option<i64>) -> impl Future<Output = Result<(), OriginError>> + Send;

    /// The next arrival. Cancel-safe: what was dropped while it waited is not lost.
    fn next(&mut self) -> impl Future<Output = Result<Arrival, OriginError>> + Send;

    /// Everything up to `position` is in the stream, whatever has become of it behind that: the moment to acknowledge upstream.
    /// Called as the stream grows and once more at the end, so that a position may come again.
    fn settled(&mut self, position: i64) -> impl Future<Output = Result<(), OriginError>> + Send {
        let _ = position;
        std::future::ready(Ok(()))
    }

    /// Disconnects in good order.
    fn close(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// What arrived, and its position.
#[derive(Clone, Debug, Default)]
pub struct Arrival {
    /// Positions grow by one or more; one that was there before is a repeat.
    pub position: i64,
    /// What goes into the stream, in this order. `data` is a JSON object that ends with its brace; `seq` a position.
    pub entries: Vec<NewEntry>,
    /// What can never be applied.
    pub letters: Vec<NewLetter>,
    /// What is missing from the tables because it could not be used, by reason.
    pub missed: BTreeMap<&'static str, u64>,
    /// Its newest revision, or empty.
    pub rev: String,
    /// In front of it.
    pub gap: Option<Gap>,
}

/// Why nothing more arrives.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OriginError {
    /// It cannot be reached, or ended the connection. It is tried again.
    #[error("relay: {reason}")]
    Away {
        /// In words.
        reason: String,
        /// How long it asks us to wait.
        retry_after: Option<Duration>,
    },
    /// Its positions begin anew: it is read from its oldest event, in a new epoch.
    #[error("{0}")]
    Reset(String),
    /// The position is in its future.
    #[error("{0}")]
    Future(String),
    /// Operator action needed.
    #[error("{0}")]
    Operator(String),
}

impl OriginError {
    /// It is tried again after the usual time.
    pub fn away(reason: impl Into<String>) -> Self {
        Self::Away { reason: reason.into(), retry_after: None }
    }
}
