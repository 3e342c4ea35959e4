//! The tasks that this process has begun with.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, Instant};

use crate::event::EntryId;

/// More tasks than this do not wait for another attempt at the same time: no new ones are begun then.
const MOST: usize = 5000;

/// Which tasks are being worked on, and which wait for another attempt.
#[derive(Debug, Default)]
pub struct Hand {
    working: HashSet<EntryId>,
    later: BTreeSet<(Instant, EntryId)>,
}

impl Hand {
    /// Somebody works on a task; `false` if somebody did already.
    pub fn begin(&mut self, id: EntryId) -> bool {
        self.later.retain(|(_, later)| *later != id);
        self.working.insert(id)
    }

    /// The work has ended; `again`: when to try again, if it is not finished.
    pub fn end(&mut self, id: EntryId, again: Option<Instant>) {
        self.working.remove(&id);
        if let Some(at) = again {
            self.later.insert((at, id));
        }
    }

    /// Takes a task whose time has come.
    pub fn due(&mut self, now: Instant) -> Option<EntryId> {
        loop {
            let (at, id) = *self.later.first()?;
            if at > now {
                return None;
            }
            self.later.pop_first();
            if self.working.insert(id) {
                return Some(id);
            }
        }
    }

    /// How long until one is due, if so many wait that nothing new is begun.
    pub fn full(&self, now: Instant) -> Option<Duration> {
        let (at, _) = self.later.first().filter(|_| self.later.len() >= MOST)?;
        Some(at.saturating_duration_since(now))
    }

    /// Adds tasks that nobody here knows about. Returns how many.
    pub fn add(&mut self, ids: Vec<EntryId>, now: Instant) -> usize {
        let known: HashSet<EntryId> = self.all().into_iter().collect();
        let new: Vec<EntryId> = ids.into_iter().filter(|id| !known.contains(id)).collect();
        self.later.extend(new.iter().map(|id| (now, *id)));
        new.len()
    }

    /// All of them.
    pub fn all(&self) -> Vec<EntryId> {
        self.working.iter().copied().chain(self.later.iter().map(|(_, id)| *id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_begun_when_its_time_has_come_and_known_until_it_ends() {
        let (now, id) = (Instant::now(), |ms| EntryId { ms, seq: 0 });
        let mut hand = Hand::default();
        assert!(hand.begin(id(1)) && !hand.begin(id(1)));
        hand.end(id(1), Some(now + Duration::from_secs(2)));
        assert_eq!(hand.add(vec![id(1), id(2)], now), 1);
        assert_eq!(hand.due(now), Some(id(2)));
        assert_eq!(hand.due(now), None);
        assert_eq!(hand.due(now + Duration::from_secs(2)), Some(id(1)));
        hand.end(id(1), None);
        assert_eq!(hand.all(), [id(2)]);
    }

    #[test]
    fn when_very_many_wait_nothing_new_is_begun() {
        let now = Instant::now();
        let mut hand = Hand::default();
        hand.add((1..MOST as u64).map(|ms| EntryId { ms, seq: 0 }).collect(), now);
        assert_eq!(hand.full(now), None);
        hand.end(EntryId::default(), Some(now));
        assert_eq!(hand.full(now), Some(Duration::ZERO));
    }
}
