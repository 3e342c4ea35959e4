//! The positions of an origin that keeps them with us: for each partition, the place of the next record. They move in the step
//! that appends the entries; see ingest.lua.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use redis::{RedisResult, Script};

use super::gap::Gap;
use super::lease::Lease;
use super::{Keys, Stream};

/// The partitions that are moved, each from one place to another; `None`: it had none.
pub type Moves = BTreeMap<i32, (Option<i64>, i64)>;

/// The field with what tells the source from another one of the same name.
const SOURCE: &str = "source";

impl Keys {
    /// Where the positions in a Kafka topic are kept.
    #[must_use]
    pub fn kafka(&self, topic: &str) -> String {
        format!("{}:kafka:{topic}", self.stream)
    }
}

impl Stream {
    /// The positions in a topic, and the id of the topic that they belong to; empty for none.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn positions(&mut self, topic: &str) -> RedisResult<(String, BTreeMap<i32, i64>)> {
        let Self { connection, keys } = self;
        let mut all: BTreeMap<String, String> =
            redis::cmd("HGETALL").arg(keys.kafka(topic)).query_async(connection).await?;
        let source = all.remove(SOURCE).unwrap_or_default();
        let places =
            all.iter().filter_map(|(partition, place)| Some((partition.parse().ok()?, place.parse().ok()?)));
        Ok((source, places.collect()))
    }

    /// Sets positions, and records gaps; `false` if the origin's lease is no longer ours, or another process has moved them.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or refuses.
    pub async fn set_positions(
        &mut self,
        topic: &str,
        token: &str,
        source: &str,
        moves: &Moves,
        gaps: &[Gap],
    ) -> RedisResult<bool> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("set_positions.lua")));
        let Self { connection, keys } = self;
        let mut invocation = SCRIPT.key(keys.kafka(topic));
        invocation.key(&keys.missed).key(&keys.gaps).key(keys.of(Lease::Origin));
        invocation.arg(token).arg(source).arg(gaps.len());
        for gap in gaps {
            invocation.arg(serde_json::to_string(gap).unwrap_or_default());
        }
        for (partition, (from, to)) in moves {
            invocation.arg(partition).arg(from.map(|from| from.to_string()).unwrap_or_default()).arg(to);
        }
        invocation.invoke_async(connection).await
    }
}
