//! Likes, reposts and bookmarks: an account and the record it points at.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::field::{StrongRef, parse, set_created_at};
use super::json;
use crate::event::{Body, Kind, Op, Reason, Reject};

#[derive(Deserialize)]
struct Pointer<'a> {
    #[serde(borrow)]
    subject: StrongRef<'a>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
    /// The repost through which the post was found.
    #[serde(borrow, default)]
    via: Option<&'a RawValue>,
}

pub(super) fn put<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    let pointer: Pointer<'a> = parse(record.get())?;
    let (subject, cid) = pointer.subject.checked()?;
    op.subject = Some(subject);
    op.subject_cid = cid;
    op.body = pointer.via.map(json::clean).map(Body::Json);
    set_created_at(&mut op, pointer.created_at);
    if op.kind == Kind::Repost && op.cid.is_none() {
        return Err(Reject::new(Reason::MissingField, "there is no `cid`, which the feed item needs"));
    }
    Ok(op)
}
