//! The positions of an origin that keeps them with us: for each partition, the place of the next record. They move in the step
//! that appends the entries; see ingest.lua.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use redis::{RedisResult, Script};

use super::gap::Gap;
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

    /// Sets positions, and says why: what is between is a gap.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or refuses.
    pub async fn set_positions(
        &mut self,
        topic: &str,
        source: &str,
        places: &BTreeMap<i32, i64>,
        gaps: &[Gap],
    ) -> RedisResult<()> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("set_positions.lua")));
        let Self { connection, keys } = self;
        let mut invocation = SCRIPT.key(keys.kafka(topic));
        invocation.key(&keys.missed).key(&keys.gaps).arg(source).arg(gaps.len());
        for gap in gaps {
            invocation.arg(serde_json::to_string(gap).unwrap_or_default());
        }
        for (partition, place) in places {
            invocation.arg(partition).arg(place);
        }
        invocation.invoke_async(connection).await
    }
}
