//! The records that are alive and may be deleted or repeated, as many as fit.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// The last part of a record's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rkey {
    Tid(u64),
    /// The one record of a collection that is named and not numbered.
    Own,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Live {
    pub(super) owner: u32,
    pub(super) collection: &'static str,
    pub(super) rkey: Rkey,
    /// What the record is about: a post's number, an account's, whatever tells two records of an owner apart.
    pub(super) subject: u64,
}

type Key = (u32, &'static str, u64);

impl Live {
    fn key(&self) -> Key {
        (self.owner, self.collection, self.subject)
    }
}

/// At most `capacity` records. When it is full, the one that has been there longest is forgotten: it lives on in the
/// network, and nobody ever deletes it.
pub(super) struct Pool {
    capacity: usize,
    oldest: usize,
    list: Vec<Live>,
    /// How many of the list's records each owner has about each subject.
    keys: HashMap<Key, u32>,
}

impl Pool {
    pub(super) fn new(capacity: usize) -> Self {
        Pool { capacity, oldest: 0, list: Vec::new(), keys: HashMap::new() }
    }

    pub(super) fn contains(&self, owner: u32, collection: &'static str, subject: u64) -> bool {
        self.keys.contains_key(&(owner, collection, subject))
    }

    pub(super) fn insert(&mut self, live: Live) {
        *self.keys.entry(live.key()).or_default() += 1;
        if self.list.len() < self.capacity {
            self.list.push(live);
            return;
        }
        let forgotten = std::mem::replace(&mut self.list[self.oldest], live);
        self.oldest = (self.oldest + 1) % self.capacity;
        self.release(&forgotten);
    }

    /// Any one of the records that `wanted` accepts, if one is found in a few tries.
    pub(super) fn find(&self, rng: &mut fastrand::Rng, wanted: impl Fn(&Live) -> bool) -> Option<usize> {
        if self.list.is_empty() {
            return None;
        }
        (0..4).map(|_| rng.usize(0..self.list.len())).find(|&at| wanted(&self.list[at]))
    }

    pub(super) fn get(&self, at: usize) -> Live {
        self.list[at]
    }

    pub(super) fn remove(&mut self, at: usize) -> Live {
        let live = self.list.swap_remove(at);
        self.release(&live);
        live
    }

    fn release(&mut self, live: &Live) {
        if let Entry::Occupied(mut count) = self.keys.entry(live.key()) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}
