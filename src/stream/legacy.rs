//! The keys that the old application's pages read: the hash `cluster:metrics`, whose fields count events, and
//! `firehose:status`, JSON that lives for ten seconds.

use super::Stream;
use redis::RedisResult;

const METRICS: &str = "cluster:metrics";
const STATUS: &str = "firehose:status";
/// Both keys.
pub const KEYS: &[&str] = &[METRICS, STATUS];
/// The lifetime of `firehose:status`, in seconds.
const STATUS_LIFE: u64 = 10;

/// The figures written so far.
#[derive(Debug)]
pub struct Legacy {
    /// The relay's URL, without secrets.
    url: String,
    written: Counts,
}

/// Finished events, as the pages name them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// `#commit`.
    pub commits: u64,
    /// `#identity`.
    pub identities: u64,
    /// `#account`.
    pub accounts: u64,
    /// `totalEvents`.
    pub total: u64,
    /// `errors`: those that became dead letters.
    pub errors: u64,
}

/// The reader's state, as the pages show it.
#[derive(Clone, Copy, Debug)]
pub struct ReaderState {
    /// Whether it is receiving events from the relay.
    pub connected: bool,
    /// The position up to which everything is in the stream.
    pub cursor: Option<i64>,
}

impl Stream {
    /// Whether the old application's hash exists.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn has_legacy_keys(&mut self) -> RedisResult<bool> {
        let connection = &mut self.connection;
        redis::cmd("EXISTS").arg(METRICS).query_async(connection).await
    }
}

impl Legacy {
    /// A writer that has written nothing yet. `url` is shown on the pages as the relay.
    #[must_use]
    pub fn new(url: String) -> Self {
        Self { url, written: Counts::default() }
    }

    /// Writes what has changed since the last call.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached or its memory is full; the next call then writes the sum.
    pub async fn write(
        &mut self,
        stream: &mut Stream,
        counts: Counts,
        reader: Option<ReaderState>,
    ) -> RedisResult<()> {
        let mut pipe = redis::pipe();
        pipe.atomic();
        for (field, now, before) in [
            ("#commit", counts.commits, self.written.commits),
            ("#identity", counts.identities, self.written.identities),
            ("#account", counts.accounts, self.written.accounts),
            ("totalEvents", counts.total, self.written.total),
            ("errors", counts.errors, self.written.errors),
        ] {
            if now > before {
                pipe.cmd("HINCRBY").arg(METRICS).arg(field).arg(now - before).ignore();
            }
        }
        if let Some(reader) = reader {
            let text = serde_json::json!({
                "connected": reader.connected,
                "url": self.url,
                "currentCursor": reader.cursor.map(|cursor| cursor.to_string()),
            });
            pipe.cmd("SET").arg(STATUS).arg(text.to_string()).arg("EX").arg(STATUS_LIFE).ignore();
        }
        if pipe.cmd_iter().next().is_some() {
            pipe.query_async::<()>(&mut stream.connection).await?;
        }
        self.written = counts;
        Ok(())
    }
}
