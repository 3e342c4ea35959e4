//! Which statement each operation of an event takes: a call of `standpipe.apply`, or of its fast path.
//!
//! - fast, one transaction per event: a single record that is probably new takes the fast path (`new_like`); four or
//!   more operations go to the set functions (`put_likes`), fewer to the functions for one (`put_like`)
//! - together, one transaction for several events: the same, without the fast path
//! - careful: `put_like` alone, which copes with any existing rows

use std::borrow::Cow;
use std::collections::HashSet;

use super::call::{Call, List, SqlOp, SqlSet};
use super::known::KnownAccounts;
use crate::event::{Event, Kind, Op};

fn is_post(uri: &str) -> bool {
    uri.split('/').nth(3) == Some("app.bsky.feed.post")
}

/// The number of operations from which a call uses set statements: for one or two they are more expensive than
/// single-record statements.
const SET: usize = 4;

/// A call, and where each of the operations went.
#[derive(Debug, Default)]
pub(super) struct Planned<'a> {
    pub(super) call: Call<'a>,
    /// The index of the set, or none, and the place in it, or among the others.
    places: Vec<(Option<usize>, usize)>,
}

impl<'a> Planned<'a> {
    /// The call that applies an event with the fast functions, which can be refused if another program left rows under
    /// the same keys, or is writing them at the same time.
    pub(super) fn fast(event: &'a Event<'_>, known: &KnownAccounts) -> Self {
        Self::together(&[event], known).shortened()
    }

    /// The call that applies the operations of `event` for which `chosen` is true, whatever rows exist.
    pub(super) fn careful(
        event: &'a Event<'_>,
        known: &KnownAccounts,
        chosen: impl Fn(usize) -> bool,
    ) -> Self {
        let mut planner = Planner::default();
        planner.add(event, known, chosen);
        planner.finish()
    }

    /// The call that applies several events in one transaction, also with the fast functions.
    pub(super) fn together(events: &[&'a Event<'_>], known: &KnownAccounts) -> Self {
        let operations: usize = events.iter().map(|event| event.ops.len()).sum();
        let mut planner = Planner { by_sets: operations >= SET, ..Planner::default() };
        for event in events {
            planner.add(event, known, |_| true);
        }
        planner.finish()
    }

    /// Takes the fast path of `standpipe.apply_each`, if possible.
    fn shortened(mut self) -> Self {
        let call = &mut self.call;
        if self.places.len() == 1
            && let ([kind @ ("like" | "repost" | "follow" | "post")], [op]) = (&*call.kinds.0, &*call.ops.0)
            && (matches!(*kind, "follow" | "post") || op.body.is_none() && op.subject.is_some_and(is_post))
        {
            call.kind = Some(kind);
            call.record = call.ops.0.pop();
            call.kinds.0.clear();
            call.repos.0.clear();
            if call.locks.0.len() == 1 {
                call.locks.0.clear();
            }
        }
        self
    }

    /// The same call without its locks, which the transaction already holds.
    pub(super) fn locked(mut self) -> Self {
        self.call.locks.0.clear();
        self
    }

    /// The number of answers to this call.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// The answers, in the order of the operations. There must be [`Planned::len`] of them.
    pub(super) fn in_order(&self, answers: &[bool]) -> Vec<bool> {
        let sets = &self.call.sets.0;
        // The function answers for the sets first, one after another.
        let before = |set: Option<usize>| -> usize {
            sets[..set.unwrap_or(sets.len())].iter().map(|set| set.ops.len()).sum()
        };
        self.places.iter().map(|&(set, index)| answers[before(set) + index]).collect()
    }
}

/// Builds a call.
#[derive(Default)]
struct Planner<'a> {
    /// Whether there are enough operations for set statements to be cheaper.
    by_sets: bool,
    planned: Planned<'a>,
    locks: Vec<Lock<'a>>,
    records: HashSet<&'a str>,
    pairs: HashSet<(Kind, &'a str, &'a str)>,
}

impl<'a> Planner<'a> {
    fn add(&mut self, event: &'a Event<'_>, known: &KnownAccounts, chosen: impl Fn(usize) -> bool) {
        // Registers write into the account's row, and would be lost without one: for them, the row is not assumed to
        // exist.
        let sure =
            event.ops.iter().any(|op| matches!(op.kind, Kind::Profile | Kind::Identity | Kind::Account));
        self.planned.call.dids.0.extend(
            std::iter::once(&event.repo)
                .chain(&event.mentions)
                .map(|did| &**did)
                .filter(|did| sure || !known.contains(did)),
        );
        self.planned.call.repos.0.push(&event.repo);
        self.locks.push(Lock { name: &event.repo, shared: false });
        for (_, op) in event.ops.iter().enumerate().filter(|(index, _)| chosen(*index)) {
            if op.kind == Kind::Identity {
                self.planned.call.handles.0.extend(op.subject.as_deref());
            }
            lock_posts(op, &mut self.locks);
            let kind = if op.delete { op.kind.delete_name() } else { op.kind.name() };
            let set = self.fits(&event.repo, op).then(|| self.set(kind));
            let ops = if let Some(index) = set {
                &mut self.planned.call.sets.0[index].ops
            } else {
                self.planned.call.kinds.0.push(kind);
                &mut self.planned.call.ops.0
            };
            self.planned.places.push((set, ops.len()));
            ops.push(SqlOp {
                repo: &event.repo,
                uri: &op.uri,
                cid: op.cid.as_deref(),
                rev: event.version.rev.as_deref(),
                seq: event.version.seq.as_deref(),
                ms: i64::try_from(event.version.entry.ms).unwrap_or(i64::MAX),
                sq: i64::try_from(event.version.entry.seq).unwrap_or(i64::MAX),
                subject: op.subject.as_deref(),
                subject_cid: op.subject_cid.as_deref(),
                created_at: op.created_at,
                sort_at: op.sort_at,
                body: op.body.as_ref(),
            });
        }
    }

    /// The set of a kind, created if there is none.
    fn set(&mut self, kind: &'static str) -> usize {
        let sets = &mut self.planned.call.sets.0;
        sets.iter().position(|set| set.kind == kind).unwrap_or_else(|| {
            sets.push(SqlSet { kind, ops: Vec::new() });
            sets.len() - 1
        })
    }

    /// Whether an operation can be part of a set: see the set functions' requirements.
    fn fits(&mut self, repo: &'a str, op: &'a Op<'_>) -> bool {
        if !self.by_sets {
            return false;
        }
        match (op.kind, op.delete) {
            (Kind::ThreadGate | Kind::PostGate, _) => {
                // A post of the same commit is written after its gate, so the gate need not rewrite the post's row.
                self.records.extend(op.subject.as_deref());
                false
            }
            (Kind::Like | Kind::Repost | Kind::Follow | Kind::Post, true)
            | (Kind::Follow | Kind::Post | Kind::Profile, false) => self.records.insert(&op.uri),
            (Kind::Account, false) => {
                op.subject.as_deref() != Some("deleted") && self.pairs.insert((op.kind, repo, ""))
            }
            (Kind::Identity, false) => op.subject.as_deref().is_some_and(|handle| {
                self.pairs.insert((op.kind, repo, "")) && self.pairs.insert((op.kind, "", handle))
            }),
            (Kind::Like | Kind::Repost, false) => {
                op.body.is_none()
                    && self.records.insert(&op.uri)
                    && op.subject.as_deref().is_none_or(|subject| self.pairs.insert((op.kind, repo, subject)))
            }
            _ => false,
        }
    }

    fn finish(self) -> Planned<'a> {
        let Self { mut planned, mut locks, .. } = self;
        for names in [&mut planned.call.repos.0, &mut planned.call.dids.0] {
            names.sort_unstable();
            names.dedup();
        }
        // Of several locks with one name, the exclusive one sorts first, and suffices.
        locks.sort_unstable();
        locks.dedup_by_key(|lock| lock.name);
        planned.call.locks = List(locks.into_iter().map(Lock::parameter).collect());
        planned
    }
}

/// A lock that a call takes before it reads anything.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Lock<'a> {
    name: &'a str,
    shared: bool,
}

impl<'a> Lock<'a> {
    fn parameter(self) -> Cow<'a, str> {
        if self.shared { Cow::Owned(format!("~{}", self.name)) } else { Cow::Borrowed(self.name) }
    }
}

/// Locks the posts whose gates an operation changes or depends on: see `sql/apply/31_gates.sql`.
fn lock_posts<'a>(op: &'a Op<'_>, locks: &mut Vec<Lock<'a>>) {
    match op.kind {
        Kind::Post => {
            locks.push(Lock { name: &op.uri, shared: false });
            let referred = op.root.iter().chain(&op.subject);
            // Only posts have gates.
            let posts = referred.filter(|uri| is_post(uri));
            locks.extend(posts.map(|uri| Lock { name: uri, shared: true }));
        }
        Kind::ThreadGate | Kind::PostGate => {
            locks.extend(op.subject.as_deref().map(|post| Lock { name: post, shared: false }));
        }
        _ => {}
    }
}

/// The locks for applying an event, as parameters.
pub(super) fn locks_of<'a>(event: &'a Event<'_>) -> impl Iterator<Item = Cow<'a, str>> {
    let mut locks = vec![Lock { name: &event.repo, shared: false }];
    for op in &event.ops {
        lock_posts(op, &mut locks);
    }
    locks.into_iter().map(Lock::parameter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::{Context, interpret};
    use crate::event::Entry;
    use crate::event::{EntryId, Epochs};

    fn like(rkey: &str, post: &str) -> String {
        format!(
            r#"{{"action":"create","path":"app.bsky.feed.like/{rkey}","cid":"c","record":{{"subject":
            {{"uri":"at://did:plc:b/app.bsky.feed.post/{post}","cid":"c"}},"createdAt":"2026-01-01T00:00:00Z"}}}}"#
        )
    }

    fn entry(ops: &[String]) -> Entry {
        let data = format!(r#"{{"repo":"did:plc:a","rev":"3n2samfdihk2n","ops":[{}]}}"#, ops.join(","));
        Entry { id: EntryId { ms: 1, seq: 0 }, event_type: "commit".to_owned(), data, seq: "1".to_owned() }
    }

    #[test]
    fn answers_are_restored_to_the_order_of_the_operations() {
        // Nine likes, two of them of the same post; and a delete, which comes first and is a set of its own.
        let mut ops: Vec<_> = (0..8).map(|n| like(&n.to_string(), &n.to_string())).collect();
        ops.push(like("again", "7"));
        ops.push(r#"{"action":"delete","path":"app.bsky.feed.like/gone"}"#.to_owned());
        let entry = entry(&ops);
        let event = interpret(&entry, Context::now(&Epochs::UNNAMED)).unwrap();
        let plan = Planned::fast(&event, &KnownAccounts::default());
        assert_eq!(plan.call.kind, None, "it is more than one record");
        let sizes: Vec<_> = plan.call.sets.0.iter().map(|set| set.ops.len()).collect();
        assert_eq!((&*sizes, plan.call.ops.0.len()), (&[1, 8][..], 1));
        let answers: Vec<bool> = (0..10).map(|n| n == 0 || n == 9).collect();
        let in_order = plan.in_order(&answers);
        for ((op, answer), place) in event.ops.iter().zip(&in_order).zip(&plan.places) {
            assert_eq!(*answer, place.0 != Some(1), "{}", op.uri);
            assert!(*answer || !op.delete);
        }
    }

    #[test]
    fn a_single_new_record_takes_the_fast_path() {
        let entry = entry(&[like("1", "1")]);
        let event = interpret(&entry, Context::now(&Epochs::UNNAMED)).unwrap();
        let plan = Planned::fast(&event, &KnownAccounts::default());
        assert_eq!(plan.call.kind, Some("like"));
        assert!(plan.call.record.is_some() && plan.call.ops.0.is_empty() && plan.call.locks.0.is_empty());
        assert_eq!(plan.in_order(&[true]), [true]);
    }
}
