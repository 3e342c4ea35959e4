//! The entries at which epochs began: stored next to the cursor by the reader, and read by the pipelines for entries
//! that name no epoch.

use std::collections::HashMap;

use redis::RedisResult;

use super::Stream;
use crate::event::{Entry, EntryId, Epochs, Start};

/// Whether an entry names its epoch, which our reader writes last.
#[must_use]
pub fn is_named(entry: &Entry) -> bool {
    let tail = entry.data.len().saturating_sub(32);
    entry.data.as_bytes()[tail..].windows(8).any(|part| part == b"\"epoch\":")
}

impl Stream {
    /// Reads the epochs of the stream.
    ///
    /// # Errors
    ///
    /// Redis cannot be reached.
    pub async fn epochs(&mut self) -> RedisResult<Epochs> {
        let Self { connection, keys } = self;
        let (starts, present): (Vec<String>, HashMap<String, String>) = redis::pipe()
            .cmd("LRANGE")
            .arg(&keys.epochs)
            .arg(0)
            .arg(-1)
            .cmd("HGETALL")
            .arg(&keys.epoch)
            .query_async(connection)
            .await?;
        let mut starts: Vec<Start> = starts.iter().filter_map(|text| start(text)).collect();
        let field = |name: &str| present.get(name).map_or("", String::as_str);
        // Entries after our reader's last one come from another program's reader.
        if let (Ok(last), Ok(epoch)) = (field("last").parse::<EntryId>(), field("id").parse()) {
            let first = EntryId { seq: last.seq + 1, ..last };
            starts.push(Start { first, epoch, rev: field("rev").to_owned() });
        }
        Ok(Epochs::new(starts))
    }
}

/// `<first entry> <epoch> <revision>`, as append.lua and open.lua write it.
fn start(text: &str) -> Option<Start> {
    let mut words = text.split(' ');
    Some(Start {
        first: words.next()?.parse().ok()?,
        epoch: words.next()?.parse().ok()?,
        rev: words.next().unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_recognised_at_the_end_of_an_entry() {
        let entry = |data: &str| Entry { data: data.to_owned(), ..Entry::default() };
        assert!(is_named(&entry(r#"{"repo":"did:plc:a","ops":[],"epoch":1795234668000}"#)));
        assert!(!is_named(&entry(r#"{"repo":"did:plc:a","ops":[]}"#)));
        assert!(!is_named(&entry("")));
        assert!(!is_named(&entry(&format!(r#"{{"epoch":1,"x":"{}"}}"#, "é".repeat(40)))));
    }
}
