//! Feed generators and labelers: what an account offers to others.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::field::{check_did, need_cid, parse, set_created_at, shaped};
use super::json::{self, Text};
use super::profile::blob_cid;
use crate::event::{Op, Reject};

#[derive(Deserialize)]
struct FeedGenerator<'a> {
    #[serde(borrow)]
    did: Cow<'a, str>,
    #[serde(borrow, rename = "displayName")]
    display_name: Text<'a>,
    #[serde(borrow, default)]
    description: Option<Text<'a>>,
    #[serde(borrow, default)]
    avatar: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct FeedGeneratorBody<'a> {
    display_name: &'a str,
    description: Option<&'a str>,
    avatar_url: Option<String>,
}

pub(super) fn put_feed_generator<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    need_cid(&op)?;
    let generator: FeedGenerator<'a> = parse(record.get())?;
    check_did(&generator.did)?;
    op.body = Some(json::body(&FeedGeneratorBody {
        display_name: &generator.display_name.0,
        description: generator.description.as_ref().map(|text| &*text.0),
        avatar_url: generator.avatar.and_then(blob_cid),
    })?);
    op.subject = Some(generator.did);
    set_created_at(&mut op, generator.created_at);
    Ok(op)
}

#[derive(Deserialize)]
struct Labeler<'a> {
    #[serde(borrow)]
    policies: &'a RawValue,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct LabelerBody<'a> {
    policies: Option<&'a RawValue>,
}

pub(super) fn put_labeler<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    need_cid(&op)?;
    let labeler: Labeler<'a> = parse(record.get())?;
    let policies = shaped(Some(labeler.policies), '{', "policies")?;
    op.body = Some(json::body(&LabelerBody { policies })?);
    set_created_at(&mut op, labeler.created_at);
    Ok(op)
}
