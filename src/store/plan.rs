//! Which statement each event takes: a call of `standpipe.apply`, or of its fast path.
//!
//! - fast, one transaction per event: a single record that is probably new takes the fast path (`new_like`)
//! - careful: `put_like`, which copes with any existing rows

use std::borrow::Cow;

use super::call::{Call, List, SqlOp, kind_of};
use super::known::KnownAccounts;
use crate::event::{Event, Kind, Op};

fn is_post(uri: &str) -> bool {
    uri.split('/').nth(3) == Some("app.bsky.feed.post")
}

/// The call that applies an event with the fast path of `standpipe.apply_each`, if possible. It can be refused if another
/// program left rows under the same keys, or is writing them at the same time.
pub(super) fn fast<'a>(event: &'a Event<'_>, known: &KnownAccounts) -> Call<'a> {
    let mut call = careful(&[event], known);
    if let ([kind @ ("like" | "repost" | "follow" | "post")], [op]) = (&*call.kinds.0, &*call.ops.0)
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
    call
}

/// The call that applies the operations of events in one transaction, whatever rows exist.
pub(super) fn careful<'a>(events: &[&'a Event<'_>], known: &KnownAccounts) -> Call<'a> {
    let mut call = Call::default();
    let mut locks = Vec::new();
    for event in events {
        // Registers write into the account's row, and would be lost without one: for them, the row is not assumed to
        // exist.
        let sure =
            event.ops.iter().any(|op| matches!(op.kind, Kind::Profile | Kind::Identity | Kind::Account));
        let dids = std::iter::once(&event.repo).chain(&event.mentions).map(|did| &**did);
        call.dids.0.extend(dids.filter(|did| sure || !known.contains(did)));
        call.repos.0.push(&event.repo);
        locks.push(Lock { name: &event.repo, shared: false });
        for op in &event.ops {
            if op.kind == Kind::Identity {
                call.handles.0.extend(op.subject.as_deref());
            }
            lock_posts(op, &mut locks);
            call.kinds.0.push(kind_of(op));
            call.ops.0.push(SqlOp::of(event, op));
        }
    }
    for names in [&mut call.repos.0, &mut call.dids.0] {
        names.sort_unstable();
        names.dedup();
    }
    // Of several locks with one name, the exclusive one sorts first, and suffices.
    locks.sort_unstable();
    locks.dedup_by_key(|lock| lock.name);
    call.locks = List(locks.into_iter().map(Lock::parameter).collect());
    call
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::{Context, interpret};
    use crate::event::Entry;
    use crate::event::{EntryId, Epochs};

    #[test]
    fn a_single_new_record_takes_the_fast_path() {
        let data = r#"{"repo":"did:plc:a","rev":"3n2samfdihk2n","ops":[{"action":"create",
            "path":"app.bsky.feed.like/1","cid":"c","record":{"subject":
            {"uri":"at://did:plc:b/app.bsky.feed.post/1","cid":"c"},"createdAt":"2026-01-01T00:00:00Z"}}]}"#;
        let id = EntryId { ms: 1, seq: 0 };
        let entry = Entry { id, event_type: "commit".to_owned(), data: data.to_owned(), seq: "1".to_owned() };
        let event = interpret(&entry, Context::now(&Epochs::UNNAMED)).unwrap();
        let call = fast(&event, &KnownAccounts::default());
        assert_eq!(call.kind, Some("like"));
        assert!(call.record.is_some() && call.ops.0.is_empty() && call.locks.0.is_empty());
    }
}
