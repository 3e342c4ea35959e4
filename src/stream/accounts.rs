//! What is remembered about accounts for verification, beside the stream: heads and keys, commits whose signature is
//! still to be checked, and repositories that have to be repaired. The reader alone writes them, mostly in the script
//! that appends entries, so a Redis that loses its last second loses both together.

use std::collections::HashMap;
use std::sync::LazyLock;

use redis::{RedisResult, Script};
use serde::{Deserialize, Serialize};

use super::{Keys, Stream};
use crate::event::EntryId;
use crate::verify::known::{Generation, Head, Known, KnownKey, field};

/// The number of hashes that heads and keys are spread over, so that each stays in Redis's compact form.
const BUCKETS: u32 = 1 << 17;
/// Without a memory limit in Redis, so many accounts are remembered: about 470 MB.
const ACCOUNTS: u64 = 5_000_000;
/// The size of one in Redis: 93.9 bytes measured with five million of them, more with fewer (Redis 7.0).
const ACCOUNT_BYTES: u64 = 94;
/// Maximum commits to check, and repositories to repair.
pub(super) const MAX_WAITING: u64 = 1_000_000;
/// Buckets emptied at a time.
const EVICT: usize = 64;

/// A commit whose signature is still to be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unchecked {
    /// What is signed.
    pub hash: [u8; 32],
    /// The signature.
    pub signature: [u8; 64],
}

impl Unchecked {
    fn to_bytes(&self) -> Vec<u8> {
        [&self.hash[..], &self.signature].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (hash, rest) = bytes.split_first_chunk::<32>()?;
        Some(Self { hash: *hash, signature: rest.try_into().ok()? })
    }
}

/// Why a repository has to be repaired.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repair {
    /// `chain`, `sync`, `gap`, `no_key` or the name of a [`crate::verify::Fault`].
    pub reason: String,
    /// The proven revision that revealed it; empty if it is not proven.
    pub rev: String,
    /// When, in milliseconds since 1970. It tells two requests for the same reason apart.
    pub at: u64,
}

/// What an append changes about accounts, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What is now known.
    pub known: Vec<(String, Known)>,
    /// Commits to check; `None` when nothing is left to check about the account.
    pub unchecked: Vec<(String, Option<Unchecked>)>,
    /// Repositories to repair.
    pub repairs: Vec<(String, Repair)>,
    /// Accounts whose handle is to be looked up, with the position that asks for it.
    pub handles: Vec<(String, i64)>,
    /// A new generation of heads.
    pub generation: Option<Generation>,
}

impl Changes {
    /// Adds those of a later commit.
    pub fn append(&mut self, other: &mut Self) {
        self.known.append(&mut other.known);
        self.unchecked.append(&mut other.unchecked);
        self.repairs.append(&mut other.repairs);
        self.handles.append(&mut other.handles);
        self.generation = other.generation.take().or(self.generation);
    }

    /// Adds their keys and arguments to an append.
    pub(super) fn add_to(&self, invocation: &mut redis::ScriptInvocation<'_>, keys: &Keys) {
        invocation.key(&keys.heads).key(&keys.unchecked).key(&keys.repairs).key(&keys.handles);
        let generation = self.generation.map(|Generation { current, lossy }| format!("{current} {lossy}"));
        invocation.arg(generation.unwrap_or_default());
        invocation.arg(MAX_WAITING).arg(self.known.len());
        for (did, known) in &self.known {
            let field = field(did);
            invocation.key(bucket(keys, &field)).arg(field).arg(known.to_bytes());
        }
        invocation.arg(self.unchecked.len());
        for (did, unchecked) in &self.unchecked {
            invocation.arg(did).arg(unchecked.as_ref().map(Unchecked::to_bytes).unwrap_or_default());
        }
        invocation.arg(self.repairs.len());
        for (did, repair) in &self.repairs {
            // Texts and numbers can always be written as JSON.
            invocation.arg(did).arg(serde_json::to_string(repair).unwrap_or_default());
        }
        invocation.arg(self.handles.len());
        for (did, position) in &self.handles {
            invocation.arg(did).arg(*position);
        }
    }
}

/// How much verification has left to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Backlog {
    /// Accounts remembered.
    pub accounts: u64,
    /// Accounts with a commit whose signature is still to be checked.
    pub unchecked: u64,
    /// Repositories to repair that the worker has not taken into its queue.
    pub repairs: u64,
    /// Accounts whose handle is to be looked up.
    pub handles: u64,
}

/// The hash for an account (FNV-1a).
fn bucket(keys: &Keys, field: &[u8]) -> String {
    let hash =
        field.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    format!("{}:{}", keys.heads, hash % BUCKETS)
}

impl Stream {
    /// What is known about accounts.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn known<'d>(&mut self, dids: &[&'d str]) -> RedisResult<HashMap<&'d str, Known>> {
        if dids.is_empty() {
            return Ok(HashMap::new());
        }
        let Self { connection, keys } = self;
        let mut pipe = redis::pipe();
        for did in dids {
            let field = field(did);
            pipe.hget(bucket(keys, &field), field);
        }
        let found: Vec<Option<Vec<u8>>> = pipe.query_async(connection).await?;
        let known = |bytes: Option<Vec<u8>>| bytes.map(|bytes| Known::from_bytes(&bytes)).unwrap_or_default();
        Ok(dids.iter().copied().zip(found.into_iter().map(known)).collect())
    }

    /// Some of the commits to check, and where to continue; 0 at the end.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn unchecked(&mut self, cursor: u64) -> RedisResult<(u64, Vec<(String, Unchecked)>)> {
        let (next, found) =
            super::page::<Vec<u8>>(&mut self.connection, &self.keys.unchecked, cursor).await?;
        let found = found.into_iter().filter_map(|(did, bytes)| Some((did, Unchecked::from_bytes(&bytes)?)));
        Ok((next, found.collect()))
    }

    /// A commit has been checked: notes the account's key, if there is one, and the repair that is needed, if one is.
    /// Does nothing if a later commit is to be checked by now.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn checked(
        &mut self,
        did: &str,
        unchecked: &Unchecked,
        key: Option<KnownKey>,
        repair: Option<&Repair>,
    ) -> RedisResult<bool> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("checked.lua")));
        let Self { connection, keys } = self;
        let field = field(did);
        // Only the key's part.
        let known = Known { key, ..Known::default() }.to_bytes();
        SCRIPT
            .key(&keys.unchecked)
            .key(&keys.repairs)
            .key(&keys.heads)
            .key(bucket(keys, &field))
            .key(&keys.missed)
            .arg(did)
            .arg(unchecked.to_bytes())
            .arg(field)
            .arg(known)
            .arg(repair.map(|repair| serde_json::to_string(repair).unwrap_or_default()).unwrap_or_default())
            .arg(MAX_WAITING)
            .invoke_async(connection)
            .await
    }

    /// Some of the repositories to repair, with the reason as it is kept; and where to continue, 0 at the end.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn repairs(&mut self, cursor: u64) -> RedisResult<(u64, Vec<(String, Repair, String)>)> {
        let (next, found) = super::page::<String>(&mut self.connection, &self.keys.repairs, cursor).await?;
        let read = |(did, text): (String, String)| {
            // Whatever else may be there: a repair costs nothing but the look.
            let repair = serde_json::from_str(&text).unwrap_or(Repair {
                reason: "unknown".to_owned(),
                rev: String::new(),
                at: 0,
            });
            (did, repair, text)
        };
        Ok((next, found.into_iter().map(read).collect()))
    }

    /// A repository to repair has been noted in the database.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn take_repair(&mut self, did: &str, text: &str) -> RedisResult<()> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("take_repair.lua")));
        let Self { connection, keys } = self;
        SCRIPT.key(&keys.repairs).arg(did).arg(text).invoke_async(connection).await
    }

    /// Appends the entries of a repair, all or none, and returns the last one's id; `None` if the stream has no room for
    /// them, or is not there. `seq`: the reader's last event when the repository was fetched. What came since is newer.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or refuses.
    pub async fn append_repair(
        &mut self,
        entries: &[String],
        seq: &str,
        max_length: u64,
    ) -> RedisResult<Option<EntryId>> {
        self.append_own(("", ""), ("commit", seq), entries, max_length).await
    }

    /// Appends what a relay's list says of accounts, as it was when the reader had read everything up to `seq`. Returns whether
    /// there was room.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or refuses.
    pub async fn append_statuses(
        &mut self,
        entries: &[String],
        seq: &str,
        max_length: u64,
    ) -> RedisResult<bool> {
        Ok(self.append_own(("", ""), ("account", seq), entries, max_length).await?.is_some())
    }

    /// The place of an entry that would be appended now: the id of the last one, and the number of the reader's last event. An
    /// empty stream gives the present time.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn place(&mut self) -> RedisResult<(EntryId, String)> {
        type Answers = (Vec<(String, redis::Value)>, (u64, u64), Option<String>);
        let Self { connection, keys } = self;
        let (last, (seconds, micros), seq): Answers = redis::pipe()
            .cmd("XREVRANGE")
            .arg(&keys.stream)
            .arg(&["+", "-", "COUNT", "1"])
            .cmd("TIME")
            .get(&keys.cursor)
            .query_async(connection)
            .await?;
        let now = EntryId { ms: seconds * 1000 + micros / 1000, seq: 0 };
        let last = last.first().and_then(|(id, _)| id.parse().ok()).unwrap_or(now);
        Ok((last.max(now), seq.unwrap_or_default()))
    }

    /// Some of the accounts whose handle is to be looked up, each with a mark of what asked for it; and where to continue, 0
    /// at the end.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn handles_wanted(&mut self, cursor: u64) -> RedisResult<(u64, Vec<(String, String)>)> {
        super::page(&mut self.connection, &self.keys.handles, cursor).await
    }

    /// A handle has been looked up: appends the entry with what was found, if anything was. Does nothing if something else
    /// asked for it by now, or if the stream has no room: `false` if an entry was not appended.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or refuses.
    pub async fn handle_looked_up(
        &mut self,
        wanted: (&str, &str),
        entry: Option<String>,
        max_length: u64,
    ) -> RedisResult<bool> {
        let last = self.append_own(wanted, ("identity", ""), entry.as_slice(), max_length).await?;
        Ok(last.is_some() || entry.is_none())
    }

    async fn append_own(
        &mut self,
        done: (&str, &str),
        (event_type, seq): (&str, &str),
        entries: &[String],
        max_length: u64,
    ) -> RedisResult<Option<EntryId>> {
        static SCRIPT: LazyLock<Script> =
            LazyLock::new(|| Script::new(concat!(include_str!("own.lua"), include_str!("append_own.lua"))));
        let Self { connection, keys } = self;
        let last: String = SCRIPT
            .key(&keys.stream)
            .key(&keys.cursor)
            .key(&keys.watch)
            .key(&keys.epoch)
            .key(&keys.handles)
            .arg(max_length)
            .arg(done.0)
            .arg(done.1)
            .arg(seq)
            .arg(event_type)
            .arg(entries)
            .invoke_async(connection)
            .await?;
        Ok(last.parse().ok())
    }

    /// Makes a repository's commit its account's head, unless the account has one. Returns the one that it has now.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or refuses.
    pub async fn adopt_head(&mut self, did: &str, head: Head, generation: Generation) -> RedisResult<Head> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("adopt.lua")));
        let Self { connection, keys } = self;
        let field = field(did);
        let known = Known { head: Some(head), generation: generation.current as u8, key: None };
        let now: Vec<u8> = SCRIPT
            .key(&keys.heads)
            .key(bucket(keys, &field))
            .arg(field)
            .arg(known.to_bytes())
            .invoke_async(connection)
            .await?;
        Ok(Known::from_bytes(&now).head.unwrap_or(head))
    }

    /// How much there is to do.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn verification_backlog(&mut self) -> RedisResult<Backlog> {
        let Self { connection, keys } = self;
        let (accounts, unchecked, repairs, handles): (Option<u64>, u64, u64, u64) = redis::pipe()
            .get(&keys.heads)
            .hlen(&keys.unchecked)
            .hlen(&keys.repairs)
            .hlen(&keys.handles)
            .query_async(connection)
            .await?;
        Ok(Backlog { accounts: accounts.unwrap_or(0), unchecked, repairs, handles })
    }

    /// Forgets some accounts, chosen at random, if there are more than `max_memory`, the server's limit in bytes, has room
    /// for. What is forgotten is verified anew from its next commit on.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn forget_accounts(&mut self, max_memory: u64) -> RedisResult<()> {
        static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("forget.lua")));
        let Self { connection, keys } = self;
        // A quarter of the limit.
        let most = if max_memory == 0 { ACCOUNTS } else { max_memory / 4 / ACCOUNT_BYTES };
        let count: Option<u64> = redis::cmd("GET").arg(&keys.heads).query_async(connection).await?;
        let Some(count) = count else {
            // From now on, repairs note heads, too.
            return redis::cmd("SET").arg(&keys.heads).arg(0).arg("NX").query_async(connection).await;
        };
        if count <= most {
            return Ok(());
        }
        let mut invocation = SCRIPT.prepare_invoke();
        invocation.key(&keys.heads);
        for _ in 0..EVICT {
            invocation.key(format!("{}:{}", keys.heads, fastrand::u32(..BUCKETS)));
        }
        invocation.invoke_async(connection).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_to_check_survives_redis() {
        let unchecked = Unchecked { hash: [1; 32], signature: [2; 64] };
        assert_eq!(Unchecked::from_bytes(&unchecked.to_bytes()), Some(unchecked));
        assert_eq!(Unchecked::from_bytes(b"something else"), None);
    }
}
