//! Accounts whose row is known to exist, so that not every event has to check.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, BuildHasherDefault, Hasher, RandomState};
use std::sync::Mutex;

use crate::mutex::lock;

/// Accounts per generation: 16 bytes each, twice.
const GENERATION: usize = 100_000;

/// A bounded set of accounts, in two generations: the older one is dropped when the younger is full. Holds 64-bit
/// hashes, which for this few accounts do not collide in practice.
#[derive(Debug, Default)]
pub(super) struct KnownAccounts {
    hasher: RandomState,
    generations: Mutex<(Hashes, Hashes)>,
    /// Epochs that the database knows.
    epochs: Mutex<HashSet<u64>>,
}

type Hashes = HashSet<u64, BuildHasherDefault<Hashed>>;

/// A hasher for keys that are hashes already.
#[derive(Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn write(&mut self, bytes: &[u8]) {
        // Only called with numbers.
        for byte in bytes {
            self.0 = (self.0 << 8) | u64::from(*byte);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl KnownAccounts {
    pub(super) fn contains(&self, did: &str) -> bool {
        let hash = self.hasher.hash_one(did);
        let generations = lock(&self.generations);
        generations.0.contains(&hash) || generations.1.contains(&hash)
    }

    /// Only for accounts whose row is durable.
    pub(super) fn insert<'a>(&self, dids: impl IntoIterator<Item = &'a str>) {
        let mut generations = lock(&self.generations);
        for did in dids {
            let hash = self.hasher.hash_one(did);
            if generations.0.contains(&hash) || generations.1.contains(&hash) {
                continue;
            }
            if generations.0.len() >= GENERATION {
                generations.1 = std::mem::take(&mut generations.0);
            }
            generations.0.insert(hash);
        }
    }

    /// Forgets everything: after a connection broke, another server may answer.
    pub(super) fn clear(&self) {
        *lock(&self.generations) = Default::default();
        lock(&self.epochs).clear();
    }

    /// Those of these epochs that the database may not know.
    pub(super) fn new_epochs(&self, epochs: impl IntoIterator<Item = u64>) -> Vec<u64> {
        let known = lock(&self.epochs);
        let mut new: Vec<u64> =
            epochs.into_iter().filter(|epoch| *epoch > 0 && !known.contains(epoch)).collect();
        new.sort_unstable();
        new.dedup();
        new
    }

    pub(super) fn insert_epochs(&self, epochs: &[u64]) {
        lock(&self.epochs).extend(epochs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_set_of_known_accounts_is_bounded_and_keeps_the_newer_ones() {
        let known = KnownAccounts::default();
        for n in 0..3 * GENERATION {
            known.insert([&*format!("did:plc:{n}")]);
        }
        let generations = lock(&known.generations);
        assert!(generations.0.len() + generations.1.len() <= 2 * GENERATION);
        drop(generations);
        assert!(known.contains(&format!("did:plc:{}", 3 * GENERATION - 1)));
        assert!(!known.contains("did:plc:0"));
        known.clear();
        assert!(!known.contains(&format!("did:plc:{}", 3 * GENERATION - 1)));
    }
}
