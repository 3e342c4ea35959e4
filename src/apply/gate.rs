//! Gates: who may reply to a post, and who may quote it.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::field::{parse, set_created_at, shaped};
use super::json::{self, Text};
use crate::event::{Op, Reject};

/// The post that a gate with this key is about: the one under the same key in the same repository.
pub(super) fn post_uri(repo: &str, rkey: &str) -> String {
    format!("at://{repo}/app.bsky.feed.post/{rkey}")
}

/// Whether the record names that post. One that names another has no effect, so it is treated like a delete.
fn names_its_post(op: &mut Op<'_>, post: &str) -> bool {
    op.delete = op.subject.as_deref() != Some(post);
    !op.delete
}

#[derive(Deserialize)]
struct ThreadGate<'a> {
    #[serde(borrow)]
    post: Cow<'a, str>,
    #[serde(borrow, default)]
    allow: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "hiddenReplies")]
    hidden_replies: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Rule<'a> {
    #[serde(borrow, rename = "$type")]
    rule_type: Text<'a>,
    #[serde(borrow)]
    list: Text<'a>,
}

#[derive(Serialize)]
struct ThreadGateBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    allow: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hidden_replies: Option<&'a RawValue>,
    lists: Vec<String>,
}

pub(super) fn put_thread_gate<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    let gate: ThreadGate<'a> = parse(record.get())?;
    if !names_its_post(&mut op, &gate.post) {
        return Ok(op);
    }
    let allow = shaped(gate.allow, '[', "allow")?;
    let rules: Vec<&RawValue> = match allow {
        Some(allow) => parse(allow.get())?,
        None => Vec::new(),
    };
    op.body = Some(json::body(&ThreadGateBody {
        allow,
        hidden_replies: shaped(gate.hidden_replies, '[', "hiddenReplies")?,
        lists: rules
            .into_iter()
            .filter_map(|rule| serde_json::from_str::<Rule<'_>>(rule.get()).ok())
            .filter(|rule| rule.rule_type.0 == "app.bsky.feed.threadgate#listRule")
            .map(|rule| rule.list.0.into_owned())
            .collect(),
    })?);
    set_created_at(&mut op, gate.created_at);
    Ok(op)
}

#[derive(Deserialize)]
struct PostGate<'a> {
    #[serde(borrow)]
    post: Cow<'a, str>,
    #[serde(borrow, default, rename = "embeddingRules")]
    embedding_rules: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "detachedEmbeddingUris")]
    detached_embedding_uris: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

/// The value of the column `embedding_rules`, in the protocol's terms.
#[derive(Serialize)]
struct PostGateBody<'a> {
    #[serde(rename = "embeddingRules")]
    embedding_rules: &'a RawValue,
    #[serde(rename = "detachedEmbeddingUris")]
    detached_embedding_uris: &'a RawValue,
}

pub(super) fn put_post_gate<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    let gate: PostGate<'a> = parse(record.get())?;
    if !names_its_post(&mut op, &gate.post) {
        return Ok(op);
    }
    let none: &RawValue = parse("[]")?;
    op.body = Some(json::body(&PostGateBody {
        embedding_rules: shaped(gate.embedding_rules, '[', "embeddingRules")?.unwrap_or(none),
        detached_embedding_uris: shaped(gate.detached_embedding_uris, '[', "detachedEmbeddingUris")?
            .unwrap_or(none),
    })?);
    set_created_at(&mut op, gate.created_at);
    Ok(op)
}
