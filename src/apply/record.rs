//! Records of collections without a table of their own, stored whole.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::field::{MAX_NAME, need_cid, parse, set_created_at};
use super::json::{self, Text};
use crate::event::{Body, Op, Reason, Reject};

#[derive(Deserialize)]
struct Record<'a> {
    #[serde(borrow, default, rename = "$type")]
    record_type: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

pub(super) fn put<'a>(mut op: Op<'a>, record: &'a RawValue, collection: &str) -> Result<Op<'a>, Reject> {
    need_cid(&op)?;
    let view: Record<'a> = parse(record.get())?;
    let named = view.record_type.and_then(|raw| serde_json::from_str::<Text<'a>>(raw.get()).ok());
    op.subject = Some(match named {
        Some(Text(name)) if !name.is_empty() => name,
        _ => Cow::Owned(collection.to_owned()),
    });
    if op.subject.as_ref().is_some_and(|name| name.chars().count() > MAX_NAME) {
        return Err(Reject::new(Reason::InvalidField, "`$type` is longer than 255 characters"));
    }
    op.body = Some(Body::Json(json::clean(record)));
    set_created_at(&mut op, view.created_at);
    Ok(op)
}
