//! Verifications: one account vouches for another's handle.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::field::{check_did, need_cid, parse, set_created_at};
use super::json::{self, Text};
use crate::event::{Op, Reject};

#[derive(Deserialize)]
struct Verification<'a> {
    #[serde(borrow)]
    subject: Cow<'a, str>,
    #[serde(borrow)]
    handle: Text<'a>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct Body<'a> {
    handle: &'a str,
}

pub(super) fn put<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    need_cid(&op)?;
    let verification: Verification<'a> = parse(record.get())?;
    check_did(&verification.subject)?;
    op.body = Some(json::body(&Body { handle: &verification.handle.0 })?);
    op.subject = Some(verification.subject);
    set_created_at(&mut op, verification.created_at);
    Ok(op)
}
