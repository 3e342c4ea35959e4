//! Which way each operation of a batch goes.

use std::collections::{HashMap, HashSet};

use super::columns::{has_labels, is_plain};
use crate::event::{Event, Kind, Op};
use crate::store::known::KnownAccounts;

/// How an operation is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// A new record, among the columns of its table.
    Insert,
    /// A record to delete, among others of its table.
    Delete,
    /// A register of its account: a profile or a status.
    Register,
    /// `standpipe.change`, whatever is there.
    Change,
}

/// The events of a batch, and the way of each of their operations. Events without ways are left out.
pub(super) struct Sorted<'e, 'a> {
    events: &'e [&'e Event<'a>],
    ways: Vec<Option<Vec<Way>>>,
}

/// What the look found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Accounts that opted out or were deleted.
    pub(super) accounts: HashSet<String>,
    /// Records with a row or a tombstone.
    pub(super) records: HashSet<String>,
    /// Posts with a gate.
    pub(super) gates: HashSet<String>,
    /// Whether sequence numbers have named epochs: numbers without one must be given theirs.
    pub(super) has_epochs: bool,
}

/// What to look up.
#[derive(Debug, Default)]
pub(super) struct Keys<'e> {
    pub(super) accounts: Vec<&'e str>,
    pub(super) written: Vec<&'e str>,
    pub(super) likes: Vec<&'e str>,
    pub(super) reposts: Vec<&'e str>,
    pub(super) follows: Vec<&'e str>,
    pub(super) posts: Vec<&'e str>,
    pub(super) blocks: Vec<&'e str>,
    pub(super) gates: Vec<&'e str>,
}

impl<'e, 'a> Sorted<'e, 'a> {
    /// Sorts by what the batch itself says.
    pub(super) fn new(events: &'e [&'e Event<'a>]) -> Self {
        let mut records: HashMap<&str, u32> = HashMap::new();
        let mut pairs: HashMap<(Kind, &str, &str), u32> = HashMap::new();
        for event in events {
            for op in &event.ops {
                *records.entry(&op.uri).or_default() += 1;
                if let (Kind::Like | Kind::Repost, Some(subject)) = (op.kind, op.subject.as_deref()) {
                    *pairs.entry((op.kind, &event.repo, subject)).or_default() += 1;
                }
            }
        }
        let way = |event: &Event<'_>, op: &Op<'_>| {
            let once = records.get(&*op.uri) == Some(&1);
            match (op.kind, op.delete, op.subject.as_deref()) {
                (Kind::Like | Kind::Repost | Kind::Follow | Kind::Post, true, _) if once => Way::Delete,
                (Kind::Like | Kind::Repost, false, Some(subject))
                    if once && pairs.get(&(op.kind, &event.repo, subject)) == Some(&1) =>
                {
                    Way::Insert
                }
                (Kind::Follow | Kind::Block, false, Some(_)) if once => Way::Insert,
                (Kind::Post, false, _) if once && is_plain(op) => Way::Insert,
                (Kind::Profile, ..) if once && !has_labels(op) => Way::Register,
                (Kind::Account, _, status) if once && status != Some("deleted") => Way::Register,
                _ => Way::Change,
            }
        };
        let ways = events
            .iter()
            .map(|event| {
                let shared = event.ops.iter().all(|op| is_shared(op.kind));
                shared.then(|| event.ops.iter().map(|op| way(event, op)).collect())
            })
            .collect();
        Self { events, ways }
    }

    /// Sorts again by what is there.
    pub(super) fn settle(&mut self, found: &Found) {
        for (event, ways) in self.events.iter().zip(&mut self.ways) {
            let Some(of_each) = ways else { continue };
            let unplaced =
                found.has_epochs && event.version.seq.as_deref().is_some_and(|seq| !seq.contains('@'));
            let has_gates =
                |op: &Op<'_>| op.kind == Kind::Post && gated(op).any(|post| found.gates.contains(post));
            if unplaced || event.ops.iter().any(has_gates) {
                *ways = None;
                continue;
            }
            let is_known = found.accounts.contains(&*event.repo);
            for (op, way) in event.ops.iter().zip(of_each) {
                match *way {
                    Way::Insert if is_known || found.records.contains(&op.uri) => *way = Way::Change,
                    // Of an account that opted out or was deleted, not everything is shown.
                    Way::Register if is_known => *way = Way::Change,
                    _ => {}
                }
            }
        }
    }

    /// The same in parts of so many events.
    pub(super) fn parts(&self, size: usize) -> impl Iterator<Item = Sorted<'e, 'a>> {
        let ways = self.ways.chunks(size).map(<[_]>::to_vec);
        self.events.chunks(size).zip(ways).map(|(events, ways)| Sorted { events, ways })
    }

    /// The number of events, with those that are left out.
    pub(super) fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether there is nothing to do.
    pub(super) fn is_empty(&self) -> bool {
        self.ways.iter().all(Option::is_none)
    }

    /// The events, with the ways of those that are not left out.
    pub(super) fn events(&self) -> impl Iterator<Item = (&'e Event<'a>, Option<&[Way]>)> {
        self.events.iter().copied().zip(self.ways.iter().map(Option::as_deref))
    }

    /// The events that are not left out.
    pub(super) fn applied(&self) -> Vec<&'e Event<'a>> {
        self.events().filter(|(_, ways)| ways.is_some()).map(|(event, _)| event).collect()
    }

    /// The operations that go this way.
    pub(super) fn going(&self, which: Way) -> impl Iterator<Item = (&'e Event<'a>, &'e Op<'a>)> {
        self.events().flat_map(move |(event, ways)| {
            let ops = event.ops.iter().zip(ways.unwrap_or_default());
            ops.filter(move |(_, way)| **way == which).map(move |(op, _)| (event, op))
        })
    }

    /// The accounts whose repositories are written, in order.
    pub(super) fn repos(&self) -> Vec<&'e str> {
        sorted(self.applied().into_iter().map(|event| &*event.repo))
    }

    /// The accounts that may have no row yet, in order. Registers write into the account's row, and would be lost
    /// without one: for them, it is not assumed to exist.
    pub(super) fn new_accounts(&self, known: &KnownAccounts) -> Vec<&'e str> {
        sorted(self.applied().into_iter().flat_map(|event| {
            let sure = event.ops.iter().any(|op| matches!(op.kind, Kind::Profile | Kind::Account));
            let dids = std::iter::once(&event.repo).chain(&event.mentions).map(|did| &**did);
            dids.filter(move |did| sure || !known.contains(did))
        }))
    }

    /// What has to be looked up, in order.
    pub(super) fn keys(&self) -> Keys<'e> {
        let written = |kind: Option<Kind>| {
            let chosen = move |op: &Op<'_>| kind.is_none_or(|kind| op.kind == kind);
            sorted(self.going(Way::Insert).filter(move |(_, op)| chosen(op)).map(|(_, op)| &*op.uri))
        };
        Keys {
            accounts: self.repos(),
            written: written(None),
            likes: written(Some(Kind::Like)),
            reposts: written(Some(Kind::Repost)),
            follows: written(Some(Kind::Follow)),
            posts: written(Some(Kind::Post)),
            blocks: written(Some(Kind::Block)),
            gates: sorted(
                self.applied()
                    .into_iter()
                    .flat_map(|event| &event.ops)
                    .filter(|op| op.kind == Kind::Post)
                    .flat_map(gated),
            ),
        }
    }
}

fn sorted<'e>(keys: impl Iterator<Item = &'e str>) -> Vec<&'e str> {
    let mut keys: Vec<&str> = keys.collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// Whether events with operations of this kind can share a transaction. The others need locks of their own, or write
/// after the counters.
fn is_shared(kind: Kind) -> bool {
    !matches!(
        kind,
        Kind::Identity | Kind::ThreadGate | Kind::PostGate | Kind::FeedGenerator | Kind::LabelerService
    )
}

/// The posts whose gates apply to a post: itself, its root, and the one that it quotes.
pub(super) fn gated<'e>(op: &'e Op<'_>) -> impl Iterator<Item = &'e str> {
    std::iter::once(&*op.uri).chain(op.root.as_deref()).chain(op.subject.as_deref())
}

/// Whether the record with this URI copies its like count.
pub(super) fn has_copied_count(uri: &str) -> bool {
    matches!(uri.split('/').nth(3), Some("app.bsky.feed.generator" | "app.bsky.labeler.service"))
}
