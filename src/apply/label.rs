//! Labels: label records, and the self-labels of posts and profiles.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::field::{MAX_URI, parse, set_created_at, shorten};
use super::json::{self, Text, quote};
use crate::event::{Op, Reason, Reject};

#[derive(Deserialize)]
struct Label<'a> {
    #[serde(borrow)]
    uri: Cow<'a, str>,
    #[serde(borrow)]
    val: Text<'a>,
    #[serde(default)]
    neg: Option<bool>,
    #[serde(borrow, default)]
    cts: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct Body<'a> {
    val: &'a str,
    neg: bool,
}

/// A label record. Its `src` is ignored: the owner of a repository is the source of its records.
pub(super) fn put<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    let label: Label<'a> = parse(record.get())?;
    let named = ["at://", "did:"].iter().any(|start| label.uri.starts_with(start));
    if !named || label.uri.len() > MAX_URI || label.uri.contains(char::is_control) {
        let message = format!("`uri` is neither a record nor an account: {}", quote(&shorten(&label.uri)));
        return Err(Reject::new(Reason::InvalidField, message));
    }
    op.body = Some(json::body(&Body { val: &label.val.0, neg: label.neg.unwrap_or(false) })?);
    op.subject = Some(label.uri);
    set_created_at(&mut op, label.cts.or(label.created_at));
    Ok(op)
}

#[derive(Deserialize)]
struct SelfLabels<'a> {
    #[serde(borrow, default, rename = "$type")]
    labels_type: Option<Text<'a>>,
    #[serde(borrow)]
    values: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct SelfLabel<'a> {
    #[serde(borrow)]
    val: Text<'a>,
}

/// The longest value that the table can hold, and the number that one record may have
/// (com.atproto.label.defs#selfLabels).
const MAX_VALUE: usize = 128;
const MAX_VALUES: usize = 10;

/// The distinct values in `com.atproto.label.defs#selfLabels`. Values that are invalid or too long are left out: they
/// are not a reason to refuse the record.
pub(super) fn of_self(labels: Option<&RawValue>, uri: &str) -> Vec<String> {
    let mut out = Vec::new();
    let Some(labels) = labels.and_then(|raw| serde_json::from_str::<SelfLabels<'_>>(raw.get()).ok()) else {
        return out;
    };
    if labels.labels_type.is_some_and(|name| name.0 != "com.atproto.label.defs#selfLabels") {
        return out;
    }
    for value in labels.values {
        let Ok(SelfLabel { val: Text(val) }) = serde_json::from_str(value.get()) else { continue };
        let length = val.chars().count();
        let fits = (1..=MAX_VALUE).contains(&length) && uri.len() + "#label/".len() + length <= MAX_URI;
        if fits && out.len() < MAX_VALUES && !out.iter().any(|other| *other == val) {
            out.push(val.into_owned());
        }
    }
    out
}
