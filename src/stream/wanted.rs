//! The accounts that the reader keeps with `WANTED_DIDS=tracked`: the fields of a hash that the worker fills from
//! `standpipe.repos`. It also has an empty field, once everything that was there at first is in it.

use std::collections::HashSet;

use redis::{AsyncCommands as _, RedisResult};

use super::Stream;

/// Says that all are there.
const COMPLETE: &str = "";

impl Stream {
    /// The wanted ones of these accounts; `None` while not all are there.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn wanted<'d>(&mut self, dids: &[&'d str]) -> RedisResult<Option<HashSet<&'d str>>> {
        let found = self.are_tracked([COMPLETE].iter().chain(dids)).await?;
        let Some((true, found)) = found.split_first() else { return Ok(None) };
        Ok(Some(dids.iter().zip(found).filter_map(|(did, found)| found.then_some(*did)).collect()))
    }

    /// Adds accounts, and returns those that were not there.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or refuses.
    pub async fn track<'d>(&mut self, dids: &'d [String]) -> RedisResult<Vec<&'d str>> {
        if dids.is_empty() {
            return Ok(Vec::new());
        }
        let found = self.are_tracked(dids).await?;
        let new: Vec<&str> =
            dids.iter().zip(found).filter_map(|(did, found)| (!found).then_some(did.as_str())).collect();
        if !new.is_empty() {
            let Self { connection, keys } = self;
            let fields: Vec<(&str, u8)> = new.iter().map(|did| (*did, 1)).collect();
            let () = connection.hset_multiple(&keys.wanted, &fields).await?;
        }
        Ok(new)
    }

    /// How many accounts there are; `None` while not all are there.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn tracked(&mut self) -> RedisResult<Option<u64>> {
        let is_complete = self.are_tracked([COMPLETE]).await?.first() == Some(&true);
        let Self { connection, keys } = self;
        let count: u64 = redis::cmd("HLEN").arg(&keys.wanted).query_async(connection).await?;
        Ok(is_complete.then(|| count.saturating_sub(1)))
    }

    /// All are there: the reader may begin.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached, or refuses.
    pub async fn tracking_is_complete(&mut self) -> RedisResult<()> {
        let Self { connection, keys } = self;
        redis::cmd("HSET").arg(&keys.wanted).arg(COMPLETE).arg(1).query_async(connection).await
    }

    async fn are_tracked(
        &mut self,
        members: impl IntoIterator<Item = impl AsRef<str>>,
    ) -> RedisResult<Vec<bool>> {
        let Self { connection, keys } = self;
        let mut ask = redis::cmd("HMGET");
        ask.arg(&keys.wanted);
        for member in members {
            ask.arg(member.as_ref());
        }
        let found: Vec<Option<u8>> = ask.query_async(connection).await?;
        Ok(found.into_iter().map(|found| found.is_some()).collect())
    }
}
