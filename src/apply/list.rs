//! Lists, their items, list blocks, and the starter packs made from lists.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::Mention;
use super::field::{check_did, check_uri, need_cid, parse, set_created_at, shaped};
use super::json::{self, Text};
use super::profile::blob_cid;
use crate::event::{Op, Reject};

#[derive(Deserialize)]
struct List<'a> {
    #[serde(borrow)]
    name: Text<'a>,
    #[serde(borrow)]
    purpose: Text<'a>,
    #[serde(borrow, default)]
    description: Option<Text<'a>>,
    #[serde(borrow, default)]
    avatar: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct ListBody<'a> {
    name: &'a str,
    purpose: &'a str,
    description: Option<&'a str>,
    avatar_url: Option<String>,
}

pub(super) fn put<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    need_cid(&op)?;
    let list: List<'a> = parse(record.get())?;
    op.body = Some(json::body(&ListBody {
        name: &list.name.0,
        purpose: &list.purpose.0,
        description: list.description.as_ref().map(|text| &*text.0),
        avatar_url: list.avatar.and_then(blob_cid),
    })?);
    set_created_at(&mut op, list.created_at);
    Ok(op)
}

#[derive(Deserialize)]
struct Item<'a> {
    #[serde(borrow)]
    subject: Cow<'a, str>,
    #[serde(borrow)]
    list: Cow<'a, str>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct ItemBody<'a> {
    list: &'a str,
}

pub(super) fn put_item<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<(Op<'a>, Mention<'a>), Reject> {
    need_cid(&op)?;
    let item: Item<'a> = parse(record.get())?;
    check_did(&item.subject)?;
    check_uri(&item.list)?;
    op.body = Some(json::body(&ItemBody { list: &item.list })?);
    set_created_at(&mut op, item.created_at);
    op.subject = Some(item.subject.clone());
    Ok((op, Some(item.subject)))
}

#[derive(Deserialize)]
struct ListBlock<'a> {
    #[serde(borrow)]
    subject: Cow<'a, str>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

pub(super) fn put_block<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    let block: ListBlock<'a> = parse(record.get())?;
    check_uri(&block.subject)?;
    op.subject = Some(block.subject);
    set_created_at(&mut op, block.created_at);
    Ok(op)
}

#[derive(Deserialize)]
struct StarterPack<'a> {
    #[serde(borrow)]
    name: Text<'a>,
    #[serde(borrow)]
    list: Cow<'a, str>,
    #[serde(borrow, default)]
    description: Option<Text<'a>>,
    #[serde(borrow, default)]
    feeds: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "createdAt")]
    created_at: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Feed<'a> {
    #[serde(borrow)]
    uri: Text<'a>,
}

#[derive(Serialize)]
struct StarterPackBody<'a> {
    name: &'a str,
    description: Option<&'a str>,
    feeds: Vec<String>,
}

pub(super) fn put_starter_pack<'a>(mut op: Op<'a>, record: &'a RawValue) -> Result<Op<'a>, Reject> {
    need_cid(&op)?;
    let pack: StarterPack<'a> = parse(record.get())?;
    check_uri(&pack.list)?;
    let feeds: Vec<&RawValue> = match shaped(pack.feeds, '[', "feeds")? {
        Some(feeds) => parse(feeds.get())?,
        None => Vec::new(),
    };
    op.body = Some(json::body(&StarterPackBody {
        name: &pack.name.0,
        description: pack.description.as_ref().map(|text| &*text.0),
        // Only the URIs, as stored by the old workers; anything but a feed is left out.
        feeds: feeds
            .into_iter()
            .filter_map(|feed| serde_json::from_str::<Feed<'_>>(feed.get()).ok())
            .map(|feed| feed.uri.0.into_owned())
            .collect(),
    })?);
    op.subject = Some(pack.list);
    set_created_at(&mut op, pack.created_at);
    Ok(op)
}
