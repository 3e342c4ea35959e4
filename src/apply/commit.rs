//! A commit: its operations on records, each read by its kind.

use std::borrow::Cow;
use std::collections::HashSet;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::field::{MAX_NAME, MAX_URI, check_did, parse, reject, split_path};
use super::json::{self, Text};
use super::{Context, Mention, gate, put, python};
use crate::event::{
    Body, Entry, Event, Json, Kind, Op, Reason, Reject, Rejected, Version, check_rev, tid_time,
};

#[derive(Deserialize)]
struct Commit<'a> {
    #[serde(borrow)]
    repo: Cow<'a, str>,
    #[serde(borrow)]
    ops: Vec<&'a RawValue>,
    #[serde(borrow, default)]
    rev: Option<Text<'a>>,
    #[serde(default)]
    epoch: Option<u64>,
}

#[derive(Deserialize)]
struct CommitOp<'a> {
    #[serde(borrow)]
    action: Text<'a>,
    // A name is taken verbatim, and refused if it contains U+0000: without that, it would be another name.
    #[serde(borrow)]
    path: Cow<'a, str>,
    #[serde(borrow, default)]
    cid: Option<Text<'a>>,
    #[serde(borrow, default)]
    record: Option<&'a RawValue>,
}

pub(super) fn commit<'a>(
    entry: &'a Entry,
    mut version: Version<'a>,
    context: Context<'_>,
) -> Result<Event<'a>, Reject> {
    let commit: Commit<'_> = parse(&entry.data).map_err(|reject| Reject {
        reason: Reason::Undecodable,
        message: format!("the commit is unreadable: {}", reject.message),
        ..reject
    })?;
    check_did(&commit.repo)?;
    version.rev = commit.rev.map(|rev| rev.0).filter(|rev| !rev.is_empty());
    if let Some(rev) = &version.rev {
        check_rev(rev, context.now_ms).map_err(|message| Reject::new(Reason::InvalidField, message))?;
    }
    context.epochs.place(&mut version, commit.epoch);

    let mut event = Event {
        event_type: &entry.event_type,
        repo: commit.repo,
        version,
        ops: Vec::with_capacity(commit.ops.len()),
        sources: Vec::with_capacity(commit.ops.len()),
        mentions: Vec::new(),
        rejected: Vec::new(),
    };
    // Within one commit the last operation on a path wins.
    let mut seen = HashSet::new();
    let mut ops = Vec::with_capacity(commit.ops.len());
    for raw in commit.ops.iter().rev() {
        let read = parse::<CommitOp<'_>>(raw.get());
        if let Ok(op) = &read
            && commit.ops.len() > 1
            && !seen.insert(op.path.clone().into_owned())
        {
            continue;
        }
        match read.and_then(|op| interpret_op(op, &event.repo, &event.version)) {
            Ok((op, mention)) => {
                event.mentions.extend(mention);
                ops.push((op, raw.get()));
            }
            Err(reject) => event.rejected.push(Rejected { reject, op: raw.get().to_owned() }),
        }
    }
    ops.sort_by_key(|(op, _)| (!op.delete, op.kind.rank()));
    (event.ops, event.sources) = ops.into_iter().unzip();
    if event.version.rev.is_none() {
        event.version.rev = context.epochs.rev_of(&event.version).map(Cow::Owned);
    }
    Ok(event)
}

fn interpret_op<'a>(
    op: CommitOp<'a>,
    repo: &str,
    version: &Version<'_>,
) -> Result<(Op<'a>, Mention<'a>), Reject> {
    let (collection, rkey) = split_path(&op.path)?;
    let kind = Kind::of(collection, rkey);
    let uri = format!("at://{repo}/{}", op.path);
    if uri.len() > MAX_URI {
        return Err(Reject::new(
            Reason::InvalidField,
            format!("the URI is longer than {MAX_URI} characters"),
        ));
    }
    // A record's key, where it is a TID, is the same however late the record arrives; the revision of a repair is not.
    let time = tid_time(rkey).map_or(version.time(), |named| named.min(version.time()));
    let mut out = Op {
        kind,
        delete: false,
        uri,
        cid: None,
        subject: None,
        subject_cid: None,
        created_at: time,
        sort_at: time,
        body: None,
        root: None,
    };
    if matches!(kind, Kind::ThreadGate | Kind::PostGate) {
        out.subject = Some(Cow::Owned(gate::post_uri(repo, rkey)));
    }
    match &*op.action.0 {
        "delete" => {
            // A profile is a register of its account: a delete writes an empty value into it.
            out.delete = kind != Kind::Profile;
            Ok((out, None))
        }
        "create" | "update" => write(out, op.cid, op.record, collection, version),
        other => Err(Reject::new(
            Reason::InvalidField,
            format!("the action {} is not create, update or delete", json::quote(other)),
        )),
    }
}

/// An operation that writes a record.
fn write<'a>(
    mut op: Op<'a>,
    cid: Option<Text<'a>>,
    record: Option<&'a RawValue>,
    collection: &str,
    version: &Version<'_>,
) -> Result<(Op<'a>, Mention<'a>), Reject> {
    let record = record.ok_or_else(|| Reject::new(Reason::MissingField, "there is no `record`"))?;
    if !record.get().starts_with('{') {
        return Err(Reject::new(Reason::InvalidField, "`record` is not an object"));
    }
    op.cid = cid.map(|cid| cid.0);
    if op.cid.as_ref().is_some_and(|cid| cid.len() > MAX_NAME) {
        return Err(Reject::new(Reason::InvalidField, "`cid` is longer than 255 characters"));
    }
    // The Python reader writes no revision; in our own entries, `py_type` is an ordinary field.
    if version.rev.is_none() && python::is_python_form(record.get()) {
        // Rare compared with our own entries, so a tree and owned text are cheap enough.
        let tree = serde_json::from_str(record.get()).map_err(|error| reject(&error))?;
        let normal =
            RawValue::from_string(python::normalise(tree).to_string()).map_err(|error| reject(&error))?;
        let (op, mention) = put(op, &normal, collection)?;
        return Ok((into_owned(op), mention.map(|did| Cow::Owned(did.into_owned()))));
    }
    put(op, record, collection)
}

fn into_owned(op: Op<'_>) -> Op<'static> {
    let own = |text: Option<Cow<'_, str>>| text.map(|text| Cow::Owned(text.into_owned()));
    Op {
        kind: op.kind,
        delete: op.delete,
        uri: op.uri,
        cid: own(op.cid),
        subject: own(op.subject),
        subject_cid: own(op.subject_cid),
        created_at: op.created_at,
        sort_at: op.sort_at,
        body: op.body.map(|body| match body {
            Body::Json(json) => Body::Json(Json(Cow::Owned(json.0.into_owned()))),
            Body::Post(post) => Body::Post(Box::new(post.into_owned())),
        }),
        root: own(op.root),
    }
}
