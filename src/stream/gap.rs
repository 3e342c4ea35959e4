//! Known losses: gaps that an origin left, and frames or parts of them that could not be used. Kept in Redis, so that
//! every process and `standpipe check` can report them.

use std::collections::BTreeMap;

use redis::RedisResult;
use serde::{Deserialize, Serialize};

use super::Stream;
use crate::verify::known::Generation;

/// The events of a gap that is not just a few.
const WIDE: u64 = 100;

/// A range of events that never arrived.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// When it was found.
    pub time: String,
    /// Why, in words.
    pub reason: String,
    /// The last position before it, if known.
    pub after: Option<i64>,
    /// The first position behind it.
    pub until: Option<i64>,
}

impl Gap {
    /// A gap found now.
    #[must_use]
    pub fn new(reason: impl Into<String>, after: Option<i64>) -> Self {
        Self { time: jiff::Timestamp::now().to_string(), reason: reason.into(), after, until: None }
    }

    /// Whether it is so wide that many accounts may lack something. What they lack is repaired after everything else.
    #[must_use]
    pub fn is_wide(&self) -> bool {
        self.size().is_none_or(|size| size > WIDE)
    }

    /// The number of positions that it spans, if both ends are known and belong to the same numbering.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        let (after, until) = (self.after?, self.until?);
        u64::try_from(until.checked_sub(after)?.checked_sub(1)?).ok()
    }
}

/// The classes of losses other than gaps, as named in metrics and the status.
pub const MISSED: [&str; 9] = [
    "undecodable",
    "missing_block",
    "too_large",
    "sync",
    "frame",
    "no_handle",
    "no_room",
    "withheld",
    "broken_chain",
];

/// Known gaps and losses.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Missed {
    /// Gaps so far.
    pub gaps: u64,
    /// The last of them.
    pub last_gap: Option<Gap>,
    /// Counts of events that could not be used, by class; see [`MISSED`].
    pub by_reason: BTreeMap<String, u64>,
}

impl Stream {
    /// Reads the known losses.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn missed(&mut self) -> RedisResult<Missed> {
        let Self { connection, keys } = self;
        let (mut by_reason, last): (BTreeMap<String, u64>, Vec<String>) = redis::pipe()
            .cmd("HGETALL")
            .arg(&keys.missed)
            .cmd("LRANGE")
            .arg(&keys.gaps)
            .arg(0)
            .arg(0)
            .query_async(connection)
            .await?;
        let gaps = by_reason.remove("gap").unwrap_or(0);
        let last_gap = last.first().and_then(|text| serde_json::from_str(text).ok());
        Ok(Missed { gaps, last_gap, by_reason })
    }

    /// The gaps that there have been, and the newest revision that was ever appended; empty for none.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn generation(&mut self) -> RedisResult<(Generation, String)> {
        let Self { connection, keys } = self;
        let (current, lossy, newest): (Option<u64>, Option<u64>, Option<String>) = redis::cmd("HMGET")
            .arg(&keys.epoch)
            .arg(&["generation", "lossy", "rev"])
            .query_async(connection)
            .await?;
        let generation = Generation { current: current.unwrap_or(0), lossy: lossy.unwrap_or(0) };
        Ok((generation, newest.unwrap_or_default()))
    }
}
