//! The apply function's parameters as PostgreSQL takes them.

use std::borrow::Cow;
use std::error::Error;

use bytes::{BufMut as _, BytesMut};
use postgres_types::{IsNull, ToSql, Type, to_sql_checked};

use super::known::KnownAccounts;
use crate::event::{Event, Json, Kind, Micros, Op};

impl ToSql for Micros {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        // PostgreSQL counts from 2000-01-01.
        const EPOCH: i64 = 946_684_800_000_000;
        out.put_i64(self.0.saturating_sub(EPOCH));
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMP
    }

    to_sql_checked!();
}

impl ToSql for Json<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        // The version of jsonb's binary form, then the text.
        out.put_u8(1);
        out.put_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }

    to_sql_checked!();
}

/// `standpipe.op`, field by field.
#[derive(Debug, ToSql)]
#[postgres(name = "op")]
struct SqlOp<'a> {
    repo: &'a str,
    uri: &'a str,
    cid: Option<&'a str>,
    rev: Option<&'a str>,
    seq: Option<&'a str>,
    ms: i64,
    sq: i64,
    subject: Option<&'a str>,
    subject_cid: Option<&'a str>,
    created_at: Micros,
    sort_at: Micros,
    body: Option<&'a Json<'a>>,
}

/// One call of `standpipe.apply`.
#[derive(Debug, Default)]
pub(super) struct Call<'a> {
    /// Sorted, without the `~` of a shared one.
    locks: Vec<Cow<'a, str>>,
    handles: Vec<&'a str>,
    dids: Vec<&'a str>,
    ops: Vec<SqlOp<'a>>,
    kinds: Vec<&'static str>,
}

impl<'a> Call<'a> {
    /// The call that applies the operations of `event` for which `chosen` says yes.
    pub(super) fn new(event: &'a Event<'_>, known: &KnownAccounts, chosen: impl Fn(usize) -> bool) -> Self {
        let mut call = Self::default();
        let mut locks = Vec::new();
        call.add(event, known, &mut locks, chosen);
        call.finish(locks)
    }

    /// The call that applies several events in one transaction, in their order.
    pub(super) fn together(events: &[&'a Event<'_>], known: &KnownAccounts) -> Self {
        let mut call = Self::default();
        let mut locks = Vec::with_capacity(2 * events.len());
        for event in events {
            call.add(event, known, &mut locks, |_| true);
        }
        call.finish(locks)
    }

    fn add(
        &mut self,
        event: &'a Event<'_>,
        known: &KnownAccounts,
        locks: &mut Vec<Lock<'a>>,
        chosen: impl Fn(usize) -> bool,
    ) {
        // Registers write into the account's row, and what they write is lost without one: for them nothing is taken
        // for granted.
        let sure =
            event.ops.iter().any(|op| matches!(op.kind, Kind::Profile | Kind::Identity | Kind::Account));
        self.dids.extend(
            std::iter::once(&event.repo)
                .chain(&event.mentions)
                .map(|did| &**did)
                .filter(|did| sure || !known.contains(did)),
        );
        locks.push(Lock { name: &event.repo, shared: false });
        for (_, op) in event.ops.iter().enumerate().filter(|(index, _)| chosen(*index)) {
            if op.kind == Kind::Identity {
                self.handles.extend(op.subject.as_deref());
            }
            lock_posts(op, locks);
            self.kinds.push(kind_name(op.delete, op.kind));
            self.ops.push(SqlOp {
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

    fn finish(mut self, mut locks: Vec<Lock<'a>>) -> Self {
        self.dids.sort_unstable();
        self.dids.dedup();
        // Of one name the exclusive one comes first, and is enough.
        locks.sort_unstable();
        locks.dedup_by_key(|lock| lock.name);
        self.locks = locks.into_iter().map(Lock::parameter).collect();
        self
    }

    /// The parameters in the function's order.
    pub(super) fn parameters(&self) -> [&(dyn ToSql + Sync); 5] {
        [&self.locks, &self.handles, &self.dids, &self.ops, &self.kinds]
    }
}

/// What a call locks before it reads anything.
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

/// The posts whose gates an operation changes, or depends on: see `sql/apply/31_gates.sql`.
fn lock_posts<'a>(op: &'a Op<'_>, locks: &mut Vec<Lock<'a>>) {
    match op.kind {
        Kind::Post => {
            locks.push(Lock { name: &op.uri, shared: false });
            let referred = op.root.iter().chain(&op.subject);
            // Only posts have gates.
            let posts = referred.filter(|uri| uri.split('/').nth(3) == Some("app.bsky.feed.post"));
            locks.extend(posts.map(|uri| Lock { name: uri, shared: true }));
        }
        Kind::ThreadGate | Kind::PostGate => {
            locks.extend(op.subject.as_deref().map(|post| Lock { name: post, shared: false }));
        }
        _ => {}
    }
}

/// The operation's name in `sql/apply/90_apply.sql`.
fn kind_name(delete: bool, kind: Kind) -> &'static str {
    match (delete, kind) {
        (false, kind) => kind.name(),
        (true, Kind::Post) => "delete post",
        (true, Kind::Like) => "delete like",
        (true, Kind::Repost) => "delete repost",
        (true, Kind::Bookmark) => "delete bookmark",
        (true, Kind::Follow) => "delete follow",
        (true, Kind::Block) => "delete block",
        (true, Kind::List) => "delete list",
        (true, Kind::ListItem) => "delete list_item",
        (true, Kind::ListBlock) => "delete list_block",
        (true, Kind::StarterPack) => "delete starter_pack",
        (true, Kind::FeedGenerator) => "delete feed_generator",
        (true, Kind::LabelerService) => "delete labeler_service",
        (true, Kind::Label) => "delete label",
        (true, Kind::Verification) => "delete verification",
        (true, Kind::ThreadGate) => "delete thread_gate",
        (true, Kind::PostGate) => "delete post_gate",
        // Registers are never deleted: interpretation makes no such operation.
        (true, Kind::Record | Kind::Profile | Kind::Identity | Kind::Account) => "delete record",
    }
}
