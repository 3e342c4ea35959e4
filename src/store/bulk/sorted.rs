//! Which way each operation of a batch goes.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::columns::mentioned_in;
use crate::event::{Event, Kind, Op};
use crate::store::call::kind_of;
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
    /// A record of a plain kind, or its delete, among others of its kind.
    Plain,
    /// Nothing, because the batch has a newer operation on the same record, which comes later.
    Replaced,
    /// Nothing, because the batch has a newer operation on the same record, which comes earlier.
    Stale,
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
    /// Records with a tombstone; follows and posts with a row.
    pub(super) records: HashSet<String>,
    /// Posts with a gate.
    pub(super) gates: HashSet<String>,
    /// By account, the revision up to which tombstones are gone.
    pub(super) swept: HashMap<String, String>,
    /// Whether sequence numbers have named epochs: numbers without one must be given theirs.
    pub(super) has_epochs: bool,
}

/// What to look up.
#[derive(Debug, Default)]
pub(super) struct Keys<'e> {
    pub(super) accounts: Vec<&'e str>,
    pub(super) written: Vec<&'e str>,
    pub(super) follows: Vec<&'e str>,
    pub(super) posts: Vec<&'e str>,
    pub(super) gates: Vec<&'e str>,
}

impl<'e, 'a> Sorted<'e, 'a> {
    /// Sorts by kind.
    pub(super) fn new(events: &'e [&'e Event<'a>]) -> Self {
        let way = |op: &Op<'_>| match (op.kind, op.delete, op.subject.as_deref()) {
            (Kind::Like | Kind::Repost | Kind::Follow | Kind::Post, true, _) => Way::Delete,
            (Kind::Like | Kind::Repost | Kind::Follow, false, Some(_)) => Way::Insert,
            (Kind::Post, false, _) if op.post().is_some_and(|post| mentioned_in(post).is_some()) => {
                Way::Insert
            }
            (Kind::Profile, ..) => Way::Register,
            (Kind::Account, _, status) if status != Some("deleted") => Way::Register,
            (kind, ..) if is_plain(kind) => Way::Plain,
            _ => Way::Change,
        };
        let ways = events.iter().map(|event| {
            let shared = event.ops.iter().all(|op| is_shared(op.kind));
            shared.then(|| event.ops.iter().map(way).collect())
        });
        Self { events, ways: ways.collect() }
    }

    /// Sorts again by what is there, and by what else is in the batch.
    pub(super) fn settle(&mut self, found: &Found) {
        for (event, ways) in self.events.iter().zip(&mut self.ways) {
            let Some(of_each) = ways else { continue };
            let unplaced =
                found.has_epochs && event.version.seq.as_deref().is_some_and(|seq| !seq.contains('@'));
            let has_gates =
                |op: &Op<'_>| op.kind == Kind::Post && gated(op).any(|post| found.gates.contains(post));
            if unplaced || event.ops.iter().any(has_gates) {
                *ways = None;
            } else if found.accounts.contains(&*event.repo) {
                // Not everything of an account that opted out or was deleted is stored or shown.
                of_each.fill(Way::Change);
            }
        }
        self.merge();
        let mut pairs: HashMap<(Kind, &str, &str), u32> = HashMap::new();
        for (event, op) in self.going(Way::Insert) {
            if let (Kind::Like | Kind::Repost, Some(subject)) = (op.kind, op.subject.as_deref()) {
                *pairs.entry((op.kind, &event.repo, subject)).or_default() += 1;
            }
        }
        let again = |event: &Event<'_>, op: &Op<'_>| {
            let subject = op.subject.as_deref().unwrap_or_default();
            pairs.get(&(op.kind, &event.repo, subject)).is_some_and(|count| *count > 1)
        };
        for (event, ways) in self.events.iter().zip(&mut self.ways) {
            let is_old = found.swept.get(&*event.repo).is_some_and(|rev| event.version.is_older_than(rev));
            for (op, way) in event.ops.iter().zip(ways.iter_mut().flatten()) {
                if *way == Way::Insert && (is_old || found.records.contains(&op.uri) || again(event, op)) {
                    *way = Way::Change;
                }
            }
        }
    }

    /// Of several operations on one record, only the newest has an effect, and the newest delete leaves a tombstone. Where
    /// revisions do not say which is the newest, all of them take the careful way.
    fn merge(&mut self) {
        let mut records: HashMap<&str, Record<'_>> = HashMap::with_capacity(self.events.len());
        let mut place = 0;
        for (event, ways) in self.events.iter().zip(&self.ways) {
            for (op, _) in event.ops.iter().zip(ways.iter().flatten()) {
                let this = Placed { place, rev: event.version.rev.as_deref() };
                records.entry(&op.uri).and_modify(|record| record.add(this, op.delete)).or_insert(Record {
                    newest: this,
                    delete: op.delete.then_some(this),
                    ops: Ops::One,
                });
                place += 1;
            }
        }
        place = 0;
        for (event, ways) in self.events.iter().zip(&mut self.ways) {
            for (op, way) in event.ops.iter().zip(ways.iter_mut().flatten()) {
                if let Some(record) = records.get(&*op.uri)
                    && *way != Way::Change
                {
                    *way = record.way(*way, place);
                }
                place += 1;
            }
        }
    }

    /// The same, but these new records have a row after all.
    pub(super) fn without(&self, present: &HashSet<&str>) -> Self {
        let mut ways = self.ways.clone();
        for (event, ways) in self.events.iter().zip(&mut ways) {
            for (op, way) in event.ops.iter().zip(ways.iter_mut().flatten()) {
                if *way == Way::Insert && present.contains(&*op.uri) {
                    *way = Way::Change;
                }
            }
        }
        Self { events: self.events, ways }
    }

    /// The same in parts of so many events.
    pub(super) fn parts(&self, size: usize) -> impl Iterator<Item = Sorted<'e, 'a>> {
        let ways = self.ways.chunks(size).map(|ways| {
            let mut ways = ways.to_vec();
            for way in ways.iter_mut().flatten().flatten() {
                // The newer operation may be refused.
                if matches!(way, Way::Replaced | Way::Stale) {
                    *way = Way::Change;
                }
            }
            ways
        });
        self.events.chunks(size).zip(ways).map(|(events, ways)| Sorted { events, ways })
    }

    /// The operations of plain kinds, by kind and whether they are deletes.
    pub(super) fn plain(&self) -> BTreeMap<&'static str, Vec<(&'e Event<'a>, &'e Op<'a>)>> {
        let mut plain: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (event, op) in self.going(Way::Plain) {
            plain.entry(kind_of(op)).or_default().push((event, op));
        }
        plain
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
            follows: written(Some(Kind::Follow)),
            posts: written(Some(Kind::Post)),
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

/// An operation's place in the batch, and its commit's revision.
#[derive(Clone, Copy)]
struct Placed<'e> {
    place: usize,
    rev: Option<&'e str>,
}

/// The operations on one record.
struct Record<'e> {
    newest: Placed<'e>,
    /// The newest delete.
    delete: Option<Placed<'e>>,
    ops: Ops,
}

/// How many operations there are on a record.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ops {
    One,
    /// Several, in the order of their revisions.
    Ordered,
    /// Several that revisions do not order.
    Unordered,
}

impl<'e> Record<'e> {
    fn add(&mut self, this: Placed<'e>, delete: bool) {
        // With a revision each, and not the same one, this is the order of standpipe.newer.
        let newer = |than: Placed<'e>| match (this.rev, than.rev) {
            (Some(rev), Some(than)) if rev != than => Some(rev > than),
            _ => None,
        };
        if self.ops == Ops::One {
            self.ops = Ops::Ordered;
        }
        match newer(self.newest) {
            Some(true) => self.newest = this,
            Some(false) => {}
            None => self.ops = Ops::Unordered,
        }
        if delete {
            match self.delete.map(newer) {
                None | Some(Some(true)) => self.delete = Some(this),
                Some(Some(false)) => {}
                Some(None) => self.ops = Ops::Unordered,
            }
        }
    }

    fn way(&self, way: Way, place: usize) -> Way {
        let is_kept = self.newest.place == place || self.delete.is_some_and(|delete| delete.place == place);
        match self.ops {
            Ops::One => way,
            Ops::Unordered => Way::Change,
            Ops::Ordered if is_kept => way,
            Ops::Ordered if place < self.newest.place => Way::Replaced,
            Ops::Ordered => Way::Stale,
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

/// Kinds whose row just holds the record's fields: see `sql/apply/41_plain.sql`. Those of services are not shared.
fn is_plain(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Block
            | Kind::List
            | Kind::ListItem
            | Kind::ListBlock
            | Kind::StarterPack
            | Kind::Label
            | Kind::Verification
            | Kind::Record
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
