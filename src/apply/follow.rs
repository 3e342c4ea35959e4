//! Follows and blocks: an account pointing at another.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::Mention;
use super::field::{check_did, parse, set_created_at};
use crate::event::{Op, Reject};

#[derive(Deserialize)]
struct Relation<'a> {
    #[serde(borrow)]
    subject: Cow<'a, str>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

pub(super) fn put<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<(Op<'a>, Mention<'a>), Reject> {
    let relation: Relation<'a> = parse(record.get())?;
    check_did(&relation.subject)?;
    let mention = Some(relation.subject.clone());
    op.subject = Some(relation.subject);
    set_created_at(&mut op, relation.created_at);
    Ok((op, mention))
}
