//! Deals what the pipelines of this process read to lanes, by account: two of them hardly ever write for one account at
//! the same time, and neither waits for the other.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::BATCH_BYTES;
use crate::event::{Entry, EntryId};
use crate::mutex::lock;
use crate::store::partition::{self, PARTITIONS};

/// Entries that a lane takes at a time: with fewer, each batch's fixed costs weigh more; with more, nothing is gained.
pub(super) const LANE_BATCH: usize = 1500;

/// The lanes: those of the first pipelines.
#[derive(Debug)]
pub(super) struct Lanes(Mutex<Vec<Lane>>);

#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Entry>,
    /// Their bytes.
    bytes: usize,
    /// Whether its pipeline will look here.
    open: bool,
}

impl Lane {
    fn push(&mut self, entry: Entry) {
        self.bytes += entry.size();
        self.waiting.push_back(entry);
    }

    /// At most so many, and about as many bytes as a batch may have.
    fn take(&mut self, most: usize) -> Vec<Entry> {
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += entry.size();
            bytes <= BATCH_BYTES
        };
        // One that is larger than that still has to be taken.
        let most = most.min(self.waiting.len());
        if most == 0 {
            return Vec::new();
        }
        let count = self.waiting.iter().take(most).take_while(fits).count().max(1);
        let taken: Vec<Entry> = self.waiting.drain(..count).collect();
        self.bytes -= taken.iter().map(Entry::size).sum::<usize>();
        taken
    }
}

impl Lanes {
    pub(super) fn new(count: usize) -> Self {
        Self(Mutex::new((0..count).map(|_| Lane::default()).collect()))
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        lock(&self.0).len()
    }

    /// From now on, its pipeline looks here before it waits for anything else.
    pub(super) fn open(&self, own: usize) {
        if let Some(lane) = lock(&self.0).get_mut(own) {
            lane.open = true;
        }
    }

    /// Before its pipeline does something else: nothing more is dealt to the lane. Returns what is waiting there.
    pub(super) fn close(&self, own: usize) -> Vec<Entry> {
        let mut lanes = lock(&self.0);
        let Some(lane) = lanes.get_mut(own) else { return Vec::new() };
        lane.open = false;
        lane.bytes = 0;
        std::mem::take(&mut lane.waiting).into()
    }

    /// Deals entries that the pipeline of lane `own` has read. Returns those that it must work on itself: its own, and
    /// those of lanes that are closed.
    pub(super) fn deal(&self, own: usize, entries: Vec<Entry>) -> Vec<Entry> {
        let mut lanes = lock(&self.0);
        let count = lanes.len();
        let mut kept = Vec::with_capacity(entries.len());
        for entry in entries {
            // Consecutive partitions, so that processes with other numbers of lanes overlap with few of them.
            let partition = partition::of(repo(&entry)) as usize;
            let lane = partition * count / PARTITIONS as usize;
            match lanes.get_mut(lane) {
                Some(lane_of) if lane != own && lane_of.open => lane_of.push(entry),
                _ => kept.push(entry),
            }
        }
        kept
    }

    /// Takes what is waiting in a lane.
    pub(super) fn take(&self, own: usize, most: usize) -> Vec<Entry> {
        let mut lanes = lock(&self.0);
        let Some(lane) = lanes.get_mut(own) else { return Vec::new() };
        lane.take(most)
    }

    /// Takes what is waiting in the fullest lane.
    pub(super) fn help(&self, most: usize) -> Vec<Entry> {
        let mut lanes = lock(&self.0);
        let Some(lane) = lanes.iter_mut().max_by_key(|lane| lane.waiting.len()) else { return Vec::new() };
        lane.take(most)
    }

    /// Puts entries back whose work was interrupted. Those of a pipeline without a lane go to another one's.
    pub(super) fn put_back(&self, own: usize, entries: Vec<Entry>) {
        let mut lanes = lock(&self.0);
        let count = lanes.len().max(1);
        if let Some(lane) = lanes.get_mut(own % count) {
            for entry in entries {
                lane.push(entry);
            }
        }
    }

    /// Whether there is enough to work on for now.
    pub(super) fn is_full(&self) -> bool {
        lock(&self.0).iter().any(|lane| lane.waiting.len() >= LANE_BATCH || lane.bytes >= BATCH_BYTES)
    }

    /// The entries that are waiting: they are in hand, too.
    pub(super) fn waiting(&self, own: usize) -> Vec<EntryId> {
        let lanes = lock(&self.0);
        lanes.get(own).map(|lane| lane.waiting.iter().map(|entry| entry.id).collect()).unwrap_or_default()
    }
}

/// The account that an entry is about, without reading all of it. Without one, any lane does.
fn repo(entry: &Entry) -> &str {
    ["\"repo\":\"", "\"did\":\""]
        .iter()
        .find_map(|key| entry.data.split_once(key))
        .and_then(|(_, rest)| rest.split_once('"'))
        .map_or("", |(repo, _)| repo)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn entry(seq: u64, repo: &str) -> Entry {
        let data = format!(r#"{{"repo":"{repo}","ops":[]}}"#);
        Entry { id: EntryId { ms: 1, seq }, event_type: "commit".to_owned(), data, seq: seq.to_string() }
    }

    #[test]
    fn a_lane_of_one_process_overlaps_with_few_of_another() {
        let lane = |partition: usize, count: usize| partition * count / PARTITIONS as usize;
        for (few, many) in [(1, 2), (2, 4), (4, 8), (2, 8)] {
            let of = |wanted: usize| {
                (0..PARTITIONS as usize).filter(move |partition| lane(*partition, many) == wanted)
            };
            for one in 0..many {
                let met: HashSet<usize> = of(one).map(|partition| lane(partition, few)).collect();
                assert_eq!(met.len(), 1, "lane {one} of {many} meets {met:?} of {few}");
            }
        }
    }

    #[test]
    fn entries_of_an_account_go_to_one_lane_unless_it_is_closed() {
        let lanes = Lanes::new(4);
        let entries = || (0..200).map(|n| entry(n, &format!("did:plc:{}", n % 20))).collect::<Vec<_>>();
        assert_eq!(lanes.deal(0, entries()).len(), 200, "every other lane is closed");
        for lane in 0..4 {
            lanes.open(lane);
        }
        let kept = lanes.deal(0, entries());
        assert!(!kept.is_empty() && kept.len() < 200);
        let mut seen: Vec<Vec<String>> = vec![kept.iter().map(|entry| repo(entry).to_owned()).collect()];
        for lane in 1..4 {
            seen.push(lanes.take(lane, LANE_BATCH).iter().map(|entry| repo(entry).to_owned()).collect());
        }
        assert_eq!(seen.iter().map(Vec::len).sum::<usize>(), 200);
        for (lane, repos) in seen.iter().enumerate() {
            for other in seen.iter().skip(lane + 1) {
                assert!(repos.iter().all(|repo| !other.contains(repo)));
            }
        }
        lanes.deal(0, entries());
        let waiting = lanes.close(1);
        assert!(!waiting.is_empty() && lanes.take(1, LANE_BATCH).is_empty());
    }
}
