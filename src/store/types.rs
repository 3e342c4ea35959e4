//! The apply function's parameters as PostgreSQL takes them.

use std::error::Error;

use bytes::{BufMut as _, BytesMut};
use postgres_types::{IsNull, ToSql, Type, to_sql_checked};

use super::known::KnownAccounts;
use crate::event::{Event, Json, Kind, Micros};

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
#[derive(Debug)]
pub(super) struct Call<'a> {
    repos: Vec<&'a str>,
    handles: Vec<&'a str>,
    dids: Vec<&'a str>,
    ops: Vec<SqlOp<'a>>,
    kinds: Vec<&'static str>,
}

impl<'a> Call<'a> {
    /// The call that applies the operations of `event` for which `chosen` says yes.
    pub(super) fn new(event: &'a Event<'_>, known: &KnownAccounts, chosen: impl Fn(usize) -> bool) -> Self {
        let mut dids: Vec<&str> = Vec::with_capacity(1 + event.mentions.len());
        // Registers write into the account's row, and what they write is lost without one: for them nothing is taken
        // for granted.
        let sure =
            event.ops.iter().any(|op| matches!(op.kind, Kind::Profile | Kind::Identity | Kind::Account));
        dids.extend(
            std::iter::once(&event.repo)
                .chain(&event.mentions)
                .map(|did| &**did)
                .filter(|did| sure || !known.contains(did)),
        );
        dids.sort_unstable();
        dids.dedup();
        let mut call = Self {
            repos: vec![&event.repo],
            handles: Vec::new(),
            dids,
            ops: Vec::with_capacity(event.ops.len()),
            kinds: Vec::with_capacity(event.ops.len()),
        };
        for (_, op) in event.ops.iter().enumerate().filter(|(index, _)| chosen(*index)) {
            if op.kind == Kind::Identity {
                call.handles.extend(op.subject.as_deref());
            }
            call.kinds.push(kind_name(op.delete, op.kind));
            call.ops.push(SqlOp {
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
        call
    }

    /// The parameters in the function's order.
    pub(super) fn parameters(&self) -> [&(dyn ToSql + Sync); 5] {
        [&self.repos, &self.handles, &self.dids, &self.ops, &self.kinds]
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
        // Registers are never deleted: interpretation makes no such operation.
        (true, Kind::Record | Kind::Profile | Kind::Identity | Kind::Account) => "delete record",
    }
}
