//! Where a session starts.

use std::sync::atomic::AtomicBool;

use crate::stream::append::Cursor;
use crate::stream::gap::Gap;

/// A new numbering: the position to read from, and the gap before it.
#[derive(Clone, Debug)]
pub(super) struct Restart {
    pub(super) from: Option<i64>,
    pub(super) gap: Gap,
}

/// A session's starting point.
pub(super) struct Plan {
    /// The origin that the positions belong to.
    pub(super) origin: String,
    /// The position to ask for; `None` starts from now.
    pub(super) from: Option<i64>,
    pub(super) epoch: u64,
    /// The gap before the first arrival.
    pub(super) gap: Option<Gap>,
    /// Whether something has been appended.
    pub(super) appended: AtomicBool,
}

impl Plan {
    /// Where to start, and in which epoch. A new epoch begins wherever the numbering may have changed: on a first
    /// start, after a reset, on a change of relay, and if Redis lost the cursor.
    ///
    /// `acked` is the last known position before the lowest unacknowledged one, `restart` a new numbering that has begun.
    pub(super) fn new(
        origin: String,
        cursor: &mut Cursor,
        acked: &mut Option<i64>,
        restart: Option<&Restart>,
    ) -> Self {
        let new = |from, gap| (from, cursor.next_epoch, gap);
        let elsewhere =
            cursor.relay.as_ref().filter(|before| **before != origin && cursor.position.is_some());
        let (from, epoch, gap) = if let Some(restart) = restart {
            new(restart.from, Some(restart.gap.clone()))
        } else if let Some(before) = elsewhere {
            // The other relay's positions are meaningless here.
            *acked = None;
            let reason = format!(
                "the cursor belongs to {before}, not to {origin}: the events between the two are unknown; continuing \
                 from now"
            );
            new(None, Some(Gap::new(reason, None)))
        } else {
            cursor.is_current = cursor.position.is_some();
            match (cursor.position, cursor.epoch) {
                (Some(position), Some(epoch)) => (Some(position), epoch, None),
                // Written by a reader without epochs, in the current numbering.
                (Some(position), None) => (Some(position), cursor.next_epoch, None),
                (None, _) if acked.is_some() => (*acked, cursor.next_epoch, None),
                (None, Some(_)) => {
                    let reason = "the cursor is gone from Redis; continuing from the relay's live position";
                    (None, cursor.next_epoch, Some(Gap::new(reason, None)))
                }
                (None, None) => (None, cursor.next_epoch, None),
            }
        };
        Self { origin, from, epoch, gap, appended: AtomicBool::new(false) }
    }
}
