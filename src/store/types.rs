//! The apply function's parameters as PostgreSQL takes them.

use std::error::Error;

use bytes::{BufMut as _, BytesMut};
use postgres_types::{IsNull, ToSql, Type, to_sql_checked};

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
    sections: Vec<&'static str>,
    sizes: Vec<i32>,
    deletes: i32,
}

impl<'a> Call<'a> {
    /// The call that applies the operations of `event` for which `chosen` says yes.
    pub(super) fn new(event: &'a Event<'_>, chosen: impl Fn(usize) -> bool) -> Self {
        let mut call = Self {
            repos: vec![&event.repo],
            handles: Vec::new(),
            dids: Vec::with_capacity(1 + event.mentions.len()),
            ops: Vec::with_capacity(event.ops.len()),
            sections: Vec::with_capacity(1),
            sizes: Vec::with_capacity(1),
            deletes: 0,
        };
        call.dids.push(&event.repo);
        call.dids.extend(event.mentions.iter().map(|did| &**did));
        call.dids.sort_unstable();
        call.dids.dedup();
        let mut last = None;
        for (_, op) in event.ops.iter().enumerate().filter(|(index, _)| chosen(*index)) {
            if op.kind == Kind::Identity {
                call.handles.extend(op.subject.as_deref());
            }
            call.deletes += i32::from(op.delete);
            if last != Some((op.delete, op.kind)) {
                last = Some((op.delete, op.kind));
                call.sections.push(section(op.delete, op.kind));
                call.sizes.push(0);
            }
            if let Some(size) = call.sizes.last_mut() {
                *size += 1;
            }
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
    pub(super) fn parameters(&self) -> [&(dyn ToSql + Sync); 7] {
        [&self.repos, &self.handles, &self.dids, &self.ops, &self.sections, &self.sizes, &self.deletes]
    }
}

/// The section's name in `sql/apply/90_apply.sql`.
fn section(delete: bool, kind: Kind) -> &'static str {
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
