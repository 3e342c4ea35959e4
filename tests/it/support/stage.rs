//! The real program between a relay that sends a frame when it is told to, and accounts that sign.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use super::chain::{CURSOR, Chain, Program, RUN, STREAM, Variables, network, redis_command};
use super::scripted::{Op, ScriptedRelay, create, post, rev};
use super::signed::{Plc, Signed};
use super::{Postgres, query_rows, wait_for, wait_until};

/// Everything that a test needs.
pub struct Stage {
    pub chain: Chain,
    pub plc: Plc,
    pub program: Program,
    pub variables: Variables,
    /// The last frame that the relay may send.
    allowed: watch::Sender<i64>,
    _relay: ScriptedRelay,
}

impl Stage {
    pub async fn start(plc: Plc, frames: Vec<(i64, Vec<u8>)>, settings: &[(&'static str, &str)]) -> Self {
        Self::start_on(Postgres::shared().await.fresh_database().await, plc, frames, settings).await
    }

    /// The same with this database.
    pub async fn start_on(
        database: String,
        plc: Plc,
        frames: Vec<(i64, Vec<u8>)>,
        settings: &[(&'static str, &str)],
    ) -> Self {
        let (allowed, gate) = watch::channel(0);
        let frames = Arc::new(frames);
        let relay = ScriptedRelay::start(move |mut connection| {
            let (frames, mut gate) = (Arc::clone(&frames), gate.clone());
            async move {
                for (seq, frame) in frames.iter() {
                    if connection.cursor.is_some_and(|cursor| *seq <= cursor) {
                        continue;
                    }
                    if gate.wait_for(|allowed| allowed >= seq).await.is_err() || !connection.send(frame).await
                    {
                        return;
                    }
                }
                connection.stay().await;
            }
        })
        .await;
        let chain = Chain::with_database(&network(1), None, database).await;
        let mut variables: Variables = chain
            .variables()
            .with("RELAY_URL", relay.url())
            .with("PLC_URL", plc.url())
            .with("VERIFY", "on")
            // The accounts' server is on this machine.
            .with("ALLOW_PRIVATE_ADDRESSES", "yes");
        for (name, value) in settings {
            variables = variables.with(name, (*value).to_owned());
        }
        let program = Program::start("run", &variables).await;
        Self { chain, plc, program, variables, allowed, _relay: relay }
    }

    /// Lets the relay send so many more frames, and waits until they are applied.
    pub async fn send(&mut self, count: usize) {
        self.allowed.send_modify(|allowed| *allowed += i64::try_from(count).unwrap());
        let expected = self.allowed.borrow().to_string();
        wait_for(&format!("the cursor to be {expected}"), RUN, async || {
            let cursor: Option<String> = redis_command(&self.chain.redis, &["GET", CURSOR]).await;
            if cursor.as_deref() == Some(&expected) { Ok(()) } else { Err(format!("{cursor:?}")) }
        })
        .await;
        self.applied().await;
    }

    /// Lets the relay send so many more frames.
    pub fn allow(&self, count: i64) {
        self.allowed.send_modify(|allowed| *allowed += count);
    }

    /// Waits until everything in the stream is applied.
    pub async fn applied(&self) {
        wait_until("everything to be applied", RUN, async || self.chain.look().await.is_drained()).await;
    }

    pub async fn unchecked(&self) -> u64 {
        redis_command(&self.chain.redis, &["HLEN", &format!("{STREAM}:unchecked")]).await
    }

    pub async fn all_checked(&self) {
        wait_until("every signature to be checked", RUN, async || self.unchecked().await == 0).await;
    }

    /// The reason for which each account's repository has to be repaired, as the reader noted it. Only with
    /// `REPAIR_CONCURRENCY=0` does it stay in the queue.
    pub async fn repairs(&self) -> BTreeMap<String, String> {
        wait_until("the queue to be in the database", RUN, async || {
            let left: u64 = redis_command(&self.chain.redis, &["HLEN", &format!("{STREAM}:repairs")]).await;
            left == 0
        })
        .await;
        let rows = query_rows(&self.chain.database, "SELECT did, reason FROM standpipe.repos").await;
        rows.into_iter().map(|row| (row[0].clone().unwrap(), row[1].clone().unwrap())).collect()
    }

    /// Waits until the queue says this about an account.
    pub async fn repo_is(&self, did: &str, state: &str) {
        wait_for(&format!("{did} to be {state}"), RUN, async || {
            let sql = format!("SELECT state, message FROM standpipe.repos WHERE did = '{did}'");
            let rows = query_rows(&self.chain.database, &sql).await;
            if rows.first().is_some_and(|row| row[0].as_deref() == Some(state)) {
                Ok(())
            } else {
                Err(format!("{rows:?}"))
            }
        })
        .await;
        self.applied().await;
    }

    pub async fn texts(&self) -> Vec<String> {
        let rows = query_rows(&self.chain.database, "SELECT text FROM posts ORDER BY text").await;
        rows.into_iter().map(|mut row| row.remove(0).unwrap()).collect()
    }

    pub async fn verified(&self, result: &str) -> f64 {
        self.program.metric_with("standpipe_verified_commits_total", &format!("\"{result}\"")).await
    }
}

/// The frames of a relay, numbered from 1; each has the revision of its number.
#[derive(Default)]
pub struct Frames(pub Vec<(i64, Vec<u8>)>);

impl Frames {
    pub fn push(&mut self, frame: impl FnOnce(i64, &str) -> Vec<u8>) {
        let seq = i64::try_from(self.0.len()).unwrap() + 1;
        let frame = frame(seq, &rev(u64::try_from(seq).unwrap()));
        self.0.push((seq, frame));
    }

    pub fn commit(&mut self, account: &mut Signed, ops: &[Op]) {
        self.push(|seq, rev| account.commit(seq, rev, ops));
    }
}

pub fn path(name: &str) -> String {
    format!("app.bsky.feed.post/{name}")
}

/// A post whose text is its key.
pub fn write(name: &str) -> Op {
    create(&path(name), &post(name))
}
