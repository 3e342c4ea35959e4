//! What is known about the accounts that were on their way to the stream last.

use std::collections::HashMap;

use crate::verify::known::{Known, KnownKey};

/// Accounts kept in memory: more than can be on their way to the stream, so that what Redis does not know yet is here.
const RECENT: usize = 32 * 1024;

/// What is known about accounts, the most recent ones in memory.
#[derive(Default)]
pub(super) struct Recent {
    new: HashMap<String, Known>,
    old: HashMap<String, Known>,
}

impl Recent {
    pub(super) fn get(&self, did: &str) -> Option<Known> {
        self.new.get(did).or_else(|| self.old.get(did)).copied()
    }

    pub(super) fn set(&mut self, did: &str, known: Known) {
        if self.new.len() >= RECENT {
            self.old = std::mem::take(&mut self.new);
        }
        self.new.insert(did.to_owned(), known);
    }

    /// Notes a key that was looked up.
    pub(super) fn set_key(&mut self, did: &str, key: Option<KnownKey>) {
        if let Some(known) = self.get(did) {
            self.set(did, Known { key, ..known });
        }
    }
}
