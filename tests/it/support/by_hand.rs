//! A stream in the hands of a test, which takes every step itself.

use standpipe::stream::append::{AppendError, Appended, Appendix, Budget, Move, NewEntry};
use standpipe::stream::{Keys, Stream, janitor};

use super::Redis;
use super::chain::{GROUP, STREAM, redis_command};

/// A stream that the test itself appends to, reads and sweeps: the test decides what happens between two
/// sweeps of the janitor.
pub struct ByHand {
    pub redis: Redis,
    pub ours: Stream,
    pub keys: Keys,
}

pub async fn append(
    stream: &mut Stream,
    believed: Option<i64>,
    position: i64,
    entries: Vec<NewEntry>,
) -> Result<Appended, AppendError> {
    let to = Move { token: ByHand::LEASE, relay: "a relay", epoch: 1, believed, position };
    let budget = Budget { bytes: 1_000_000, per_account: 100 };
    stream.append(to, budget, &Appendix { entries, ..Appendix::default() }).await
}

impl ByHand {
    pub const LEASE: &str = "ours";

    pub async fn start() -> Self {
        let redis = Redis::start().await;
        let key = |name: &str| format!("{STREAM}:{name}");
        let keys = Keys {
            stream: STREAM.to_owned(),
            cursor: key("cursor"),
            relay: key("relay"),
            acked: key("acked"),
            start: key("start"),
            watch: key("watch"),
            epoch: key("epoch"),
            epochs: key("epochs"),
            missed: key("missed"),
            gaps: key("gaps"),
            noted: key("noted"),
            lease: key("lease"),
            consumer_lease: key("consumer_lease"),
            trimmed: key("trimmed"),
            lost: key("lost"),
            dead: key("dead"),
            heads: key("heads"),
            unchecked: key("unchecked"),
            repairs: key("repairs"),
            handles: key("handles"),
            wanted: key("wanted"),
            fed: key("fed"),
            refused: key("refused"),
            group: GROUP.to_owned(),
        };
        let ours = Stream::over(redis.connection().await, keys.clone());
        let by_hand = Self { redis, ours, keys };
        by_hand.afresh().await;
        by_hand
    }

    /// An empty stream with its group, and no memory of what was there before.
    pub async fn afresh(&self) {
        let _: String = redis_command(&self.redis, &["FLUSHALL"]).await;
        let _: String =
            redis_command(&self.redis, &["XGROUP", "CREATE", STREAM, GROUP, "0", "MKSTREAM"]).await;
        let _: String = redis_command(&self.redis, &["SET", &self.keys.lease, Self::LEASE]).await;
    }

    pub async fn append(&mut self, numbers: std::ops::RangeInclusive<i64>) {
        for seq in numbers {
            let believed = self.position(&self.keys.cursor).await;
            let entry = NewEntry { event_type: "commit", data: "{}".to_owned(), seq };
            append(&mut self.ours, believed, seq, vec![entry]).await.unwrap();
        }
    }

    pub async fn deliver(&self, count: &str) {
        let read = ["XREADGROUP", "GROUP", GROUP, "one", "COUNT", count, "STREAMS", STREAM, ">"];
        let _: redis::Value = redis_command(&self.redis, &read).await;
    }

    pub async fn acknowledge_all(&self) {
        loop {
            let some = pending_ids(&self.redis).await;
            if some.is_empty() {
                break;
            }
            for id in &some {
                assert_eq!(redis_command::<u64>(&self.redis, &["XACK", STREAM, GROUP, id]).await, 1);
            }
        }
    }

    pub async fn trim_to(&self, length: &str) -> u64 {
        redis_command(&self.redis, &["XTRIM", STREAM, "MAXLEN", length]).await
    }

    pub async fn position(&self, key: &str) -> Option<i64> {
        redis_command(&self.redis, &["GET", key]).await
    }

    pub async fn cursor(&self) -> Option<i64> {
        self.position(&self.keys.cursor).await
    }

    pub async fn acked(&self) -> Option<i64> {
        self.position(&self.keys.acked).await
    }

    pub async fn sweep(&mut self) -> janitor::Look {
        self.ours.sweep(janitor::Keep::Nothing, None).await.unwrap()
    }
}

/// The ids of the pending entries.
pub async fn pending_ids(redis: &Redis) -> Vec<String> {
    let pending: Vec<(String, String, u64, u64)> =
        redis_command(redis, &["XPENDING", STREAM, GROUP, "-", "+", "100"]).await;
    pending.into_iter().map(|(id, ..)| id).collect()
}
