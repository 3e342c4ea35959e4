//! The apply function's parameters in PostgreSQL's binary form.

use std::borrow::Cow;
use std::error::Error;

use bytes::{BufMut as _, BytesMut};
use postgres_types::{IsNull, ToSql, Type, to_sql_checked};

use crate::event::{Body, Event, Json, Micros, Op};

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

/// A body as `jsonb`.
#[derive(Debug)]
pub(super) struct SqlBody<'a> {
    body: &'a Body<'a>,
    /// Of a post, the root of its thread.
    root: Option<&'a str>,
}

impl ToSql for SqlBody<'_> {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        match self.body {
            Body::Json(json) => json.to_sql(ty, out),
            Body::Post(post) => {
                out.put_u8(1);
                post.write_json(self.root, out.writer())?;
                Ok(IsNull::No)
            }
        }
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }

    to_sql_checked!();
}

/// `standpipe.op`, field by field.
#[derive(Debug, ToSql)]
#[postgres(name = "op")]
pub(super) struct SqlOp<'a> {
    pub(super) repo: &'a str,
    pub(super) uri: &'a str,
    pub(super) cid: Option<&'a str>,
    pub(super) rev: Option<&'a str>,
    pub(super) seq: Option<&'a str>,
    pub(super) ms: i64,
    pub(super) sq: i64,
    pub(super) subject: Option<&'a str>,
    pub(super) subject_cid: Option<&'a str>,
    pub(super) created_at: Micros,
    pub(super) sort_at: Micros,
    pub(super) body: Option<SqlBody<'a>>,
}

impl<'a> SqlOp<'a> {
    pub(super) fn of(event: &'a Event<'_>, op: &'a Op<'_>) -> Self {
        Self {
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
            body: op.body.as_ref().map(|body| SqlBody { body, root: op.root.as_deref() }),
        }
    }
}

/// The name of an operation's kind in `standpipe.change`.
pub(super) fn kind_of(op: &Op<'_>) -> &'static str {
    if op.delete { op.kind.delete_name() } else { op.kind.name() }
}

/// The parameter `sets`, which only version 0.1 gives.
#[derive(Debug, Default)]
pub(super) struct NoSets;

impl ToSql for NoSets {
    fn to_sql(&self, _: &Type, _: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        Ok(IsNull::Yes)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// A list that is sent as NULL when empty: an empty array costs PostgreSQL more.
#[derive(Debug)]
pub(super) struct List<T>(pub(super) Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: ToSql> ToSql for List<T> {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        if self.0.is_empty() { Ok(IsNull::Yes) } else { self.0.to_sql(ty, out) }
    }

    fn accepts(ty: &Type) -> bool {
        Vec::<T>::accepts(ty)
    }

    to_sql_checked!();
}

/// The parameters of `standpipe.apply`, and `standpipe.call`, field by field.
#[derive(Debug, Default, ToSql)]
#[postgres(name = "call")]
pub(super) struct Call<'a> {
    /// For `apply_each` only, together with `record`; then only locks and accounts are set besides.
    pub(super) kind: Option<&'static str>,
    pub(super) record: Option<SqlOp<'a>>,
    /// Sorted without regard to the `~` that marks a shared lock.
    pub(super) locks: List<Cow<'a, str>>,
    pub(super) repos: List<&'a str>,
    pub(super) handles: List<&'a str>,
    pub(super) dids: List<&'a str>,
    pub(super) sets: NoSets,
    pub(super) ops: List<SqlOp<'a>>,
    pub(super) kinds: List<&'static str>,
}

impl Call<'_> {
    /// The parameters in the function's order.
    pub(super) fn parameters(&self) -> [&(dyn ToSql + Sync); 7] {
        [&self.locks, &self.repos, &self.handles, &self.dids, &self.sets, &self.ops, &self.kinds]
    }
}
