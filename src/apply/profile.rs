//! Profiles.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::field::{parse, set_created_at};
use super::json::{self, Text};
use super::label;
use crate::event::{Op, Reject};

#[derive(Deserialize)]
struct Profile<'a> {
    #[serde(borrow, default, rename = "displayName")]
    display_name: Option<Text<'a>>,
    #[serde(borrow, default)]
    description: Option<Text<'a>>,
    #[serde(borrow, default)]
    avatar: Option<&'a RawValue>,
    #[serde(borrow, default)]
    banner: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "pinnedPost")]
    pinned_post: Option<&'a RawValue>,
    #[serde(borrow, default)]
    labels: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

/// The operation's body, for `standpipe.put_profile`.
#[derive(Serialize)]
struct Body<'a> {
    display_name: Option<&'a str>,
    description: Option<&'a str>,
    avatar_url: Option<String>,
    banner_url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pinned_post: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    labels: Vec<String>,
    record: &'a RawValue,
}

pub(super) fn put<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    let profile: Profile<'a> = parse(record.get())?;
    let body = Body {
        display_name: profile.display_name.as_ref().map(|text| &*text.0),
        description: profile.description.as_ref().map(|text| &*text.0),
        avatar_url: profile.avatar.and_then(blob_cid),
        banner_url: profile.banner.and_then(blob_cid),
        pinned_post: profile.pinned_post,
        labels: label::of_self(profile.labels, &op.uri),
        record,
    };
    op.body = Some(json::body(&body)?);
    set_created_at(&mut op, profile.created_at);
    Ok(op)
}

/// The CID of a blob: `{"$type":"blob","ref":{"$link":cid},...}`, or the legacy form `{"cid":cid,"mimeType":...}` that
/// is still in use, or `ref` as a plain string. Anything else is not a picture, but not a reason to refuse a profile.
pub(super) fn blob_cid(blob: &RawValue) -> Option<String> {
    let blob: serde_json::Value = serde_json::from_str(blob.get()).ok()?;
    let link = match &blob["ref"] {
        serde_json::Value::String(link) => link,
        reference => reference["$link"].as_str().or_else(|| blob["cid"].as_str())?,
    };
    Some(link.replace('\0', ""))
}
