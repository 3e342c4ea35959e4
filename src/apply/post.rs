//! Posts: text, what they reply to, what they quote.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::field::{StrongRef, need_cid, parse, set_created_at, shaped};
use super::json::{self, Text};
use super::label;
use crate::event::{Body, Op, Reject};

#[derive(Deserialize)]
struct Post<'a> {
    /// Required by the lexicon, but a post without it is stored with an empty text, as by the old workers.
    #[serde(borrow, default)]
    text: Option<Text<'a>>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
    #[serde(borrow, default)]
    reply: Option<Reply<'a>>,
    #[serde(borrow, default)]
    embed: Option<&'a RawValue>,
    #[serde(borrow, default)]
    langs: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tags: Option<&'a RawValue>,
    #[serde(borrow, default)]
    facets: Option<&'a RawValue>,
    #[serde(borrow, default)]
    labels: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Reply<'a> {
    #[serde(borrow)]
    root: StrongRef<'a>,
    #[serde(borrow)]
    parent: StrongRef<'a>,
}

pub(super) fn put<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    need_cid(&op)?;
    let post: Post<'a> = parse(record.get())?;
    let (parent, root) = match post.reply {
        Some(reply) => {
            let (parent, root) = (reply.parent.checked()?, reply.root.checked()?);
            ((Some(parent.0), parent.1), (Some(root.0), root.1))
        }
        None => ((None, None), (None, None)),
    };
    if let Some((uri, cid)) = post.embed.and_then(quoted) {
        op.subject = Some(uri);
        op.subject_cid = cid;
    }
    op.root = root.0;
    let json = |value: Option<&'a RawValue>| value.map(json::clean);
    op.body = Some(Body::Post(Box::new(crate::event::Post {
        text: post.text.map_or(Cow::Borrowed(""), |text| text.0),
        parent_uri: parent.0,
        parent_cid: parent.1,
        root_cid: root.1,
        embed: json(shaped(post.embed, '{', "embed")?),
        langs: json(shaped(post.langs, '[', "langs")?),
        tags: json(shaped(post.tags, '[', "tags")?),
        facets: json(shaped(post.facets, '[', "facets")?),
        labels: label::of_self(post.labels, &op.uri),
    })));
    set_created_at(&mut op, post.created_at);
    Ok(op)
}

#[derive(Deserialize)]
struct RecordEmbed<'a> {
    #[serde(borrow, rename = "$type")]
    embed_type: Text<'a>,
    #[serde(borrow)]
    record: &'a RawValue,
}

#[derive(Deserialize)]
struct Wrapped<'a> {
    #[serde(borrow)]
    record: StrongRef<'a>,
}

/// The post that an embed quotes. Feeds, lists and starter packs are embedded in the same way but are not quotes.
fn quoted(embed: &RawValue) -> Option<(Cow<'_, str>, Option<Cow<'_, str>>)> {
    let outer: RecordEmbed<'_> = serde_json::from_str(embed.get()).ok()?;
    let strong_ref: StrongRef<'_> = match &*outer.embed_type.0 {
        "app.bsky.embed.record" => serde_json::from_str(outer.record.get()).ok()?,
        "app.bsky.embed.recordWithMedia" => {
            serde_json::from_str::<Wrapped<'_>>(outer.record.get()).ok()?.record
        }
        _ => return None,
    };
    let (uri, cid) = strong_ref.checked().ok()?;
    (uri.split('/').nth(3) == Some("app.bsky.feed.post")).then_some((uri, cid))
}
