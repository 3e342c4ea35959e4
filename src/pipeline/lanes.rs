//! Deals what the pipelines of this process read to lanes, by account: two of them hardly ever write for one account at
//! the same time, and neither waits for the other.

use std::collections::VecDeque;
use std::sync::Mutex;

use crate::event::Entry;
use crate::mutex::lock;
use crate::store::partition::{self, PARTITIONS};

/// Entries that a lane takes at a time: with fewer, each batch's fixed costs weigh more; with more, nothing is gained.
pub(super) const LANE_BATCH: usize = 2000;

/// The lanes, one for each pipeline.
#[derive(Debug)]
pub struct Lanes(Mutex<Vec<Lane>>);

#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Entry>,
    /// Whether its pipeline will look here again before it waits for anything else.
    active: bool,
}

impl Lanes {
    /// As many lanes as pipelines.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self(Mutex::new((0..count).map(|_| Lane::default()).collect()))
    }

    /// Deals entries that the pipeline of lane `own` has read. Returns those that it must work on itself: its own, and
    /// those of lanes whose pipelines are waiting for something to read.
    pub(super) fn deal(&self, own: usize, entries: Vec<Entry>) -> Vec<Entry> {
        let mut lanes = lock(&self.0);
        let count = lanes.len();
        let mut kept = Vec::with_capacity(entries.len());
        for entry in entries {
            // Consecutive partitions, so that processes with other numbers of lanes overlap with few of them.
            let partition = partition::of(repo(&entry)) as usize;
            let lane = partition * count / PARTITIONS as usize;
            match lanes.get_mut(lane) {
                Some(lane_of) if lane != own && lane_of.active => lane_of.waiting.push_back(entry),
                _ => kept.push(entry),
            }
        }
        kept
    }

    /// Takes what is waiting in a lane, whose pipeline will look here again.
    pub(super) fn take(&self, own: usize, most: usize) -> Vec<Entry> {
        let mut lanes = lock(&self.0);
        let Some(lane) = lanes.get_mut(own) else { return Vec::new() };
        lane.active = true;
        let count = lane.waiting.len().min(most);
        lane.waiting.drain(..count).collect()
    }

    /// Takes what is waiting in the fullest lane.
    pub(super) fn help(&self, most: usize) -> Vec<Entry> {
        let mut lanes = lock(&self.0);
        let Some(lane) = lanes.iter_mut().max_by_key(|lane| lane.waiting.len()) else { return Vec::new() };
        let count = lane.waiting.len().min(most);
        lane.waiting.drain(..count).collect()
    }

    /// Puts entries back whose work was interrupted.
    pub(super) fn put_back(&self, own: usize, entries: Vec<Entry>) {
        if let Some(lane) = lock(&self.0).get_mut(own) {
            lane.waiting.extend(entries);
        }
    }

    /// Before its pipeline waits for something to read: nothing more is dealt to the lane. `false` if something is
    /// waiting anywhere.
    pub(super) fn rest(&self, own: usize) -> bool {
        let mut lanes = lock(&self.0);
        let is_empty = lanes.iter().all(|lane| lane.waiting.is_empty());
        if let Some(lane) = lanes.get_mut(own) {
            lane.active = !is_empty;
        }
        is_empty
    }

    /// Before its pipeline stops: nothing more is dealt to the lane. Returns what is waiting there.
    pub(super) fn close(&self, own: usize) -> Vec<Entry> {
        let mut lanes = lock(&self.0);
        let Some(lane) = lanes.get_mut(own) else { return Vec::new() };
        lane.active = false;
        std::mem::take(&mut lane.waiting).into()
    }

    /// Whether there is enough to work on for now.
    pub(super) fn is_full(&self) -> bool {
        lock(&self.0).iter().any(|lane| lane.waiting.len() >= LANE_BATCH)
    }

    /// The entries that are waiting: they are in hand, too.
    pub(super) fn waiting(&self, own: usize) -> Vec<crate::event::EntryId> {
        lock(&self.0)
            .get(own)
            .map(|lane| lane.waiting.iter().map(|entry| entry.id).collect())
            .unwrap_or_default()
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
    use super::*;
    use crate::event::EntryId;

    fn entry(seq: u64, repo: &str) -> Entry {
        let data = format!(r#"{{"repo":"{repo}","ops":[]}}"#);
        Entry { id: EntryId { ms: 1, seq }, event_type: "commit".to_owned(), data, seq: seq.to_string() }
    }

    #[test]
    fn entries_of_an_account_go_to_one_lane_unless_its_pipeline_is_at_rest() {
        let lanes = Lanes::new(4);
        let entries = || (0..200).map(|n| entry(n, &format!("did:plc:{}", n % 20))).collect::<Vec<_>>();
        assert_eq!(lanes.deal(0, entries()).len(), 200, "every other lane is at rest");
        for lane in 0..4 {
            assert!(lanes.take(lane, LANE_BATCH).is_empty());
        }
        let kept = lanes.deal(0, entries());
        assert!(!kept.is_empty() && kept.len() < 200);
        assert!(!lanes.rest(0), "something is waiting");
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
        assert!(lanes.rest(0));
    }
}
