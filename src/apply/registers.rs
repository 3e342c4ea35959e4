//! Identity and account events: registers of an account rather than records.

use std::borrow::Cow;

use serde::Deserialize;

use super::field::{MAX_NAME, check_did, parse};
use super::json::Text;
use super::{Context, datetime};
use crate::event::Entry;
use crate::event::{Body, Event, Json, Kind, Op, Reason, Reject, Version};

#[derive(Deserialize)]
struct Identity<'a> {
    #[serde(borrow)]
    did: Cow<'a, str>,
    #[serde(borrow, default)]
    handle: Option<Text<'a>>,
    #[serde(default)]
    epoch: Option<u64>,
}

#[derive(Deserialize)]
struct Account<'a> {
    #[serde(borrow)]
    did: Cow<'a, str>,
    active: bool,
    #[serde(borrow, default)]
    status: Option<Text<'a>>,
    #[serde(borrow, default)]
    time: Option<Text<'a>>,
    #[serde(default)]
    epoch: Option<u64>,
}

pub(super) fn identity<'a>(
    entry: &'a Entry,
    mut version: Version<'a>,
    context: Context<'_>,
) -> Result<Event<'a>, Reject> {
    let identity: Identity<'a> = parse(&entry.data)?;
    context.epochs.place(&mut version, identity.epoch);
    // An event without a handle, or with an invalid one, announces that something changed, but not what: it never
    // overwrites a good handle.
    let handle = identity.handle.map(|text| text.0.to_ascii_lowercase()).filter(|handle| is_handle(handle));
    let ops = handle.map(|handle| {
        let mut op = register(Kind::Identity, &identity.did, &version);
        op.subject = Some(Cow::Owned(handle));
        op
    });
    event(entry, version, identity.did, ops)
}

pub(super) fn account<'a>(
    entry: &'a Entry,
    mut version: Version<'a>,
    context: Context<'_>,
) -> Result<Event<'a>, Reject> {
    let account: Account<'a> = parse(&entry.data)?;
    context.epochs.place(&mut version, account.epoch);
    let mut op = register(Kind::Account, &account.did, &version);
    if let Some(time) = account.time.as_ref().and_then(|time| datetime::parse(&time.0)) {
        op.created_at = time;
    }
    // New statuses may appear; only `deleted` matters to us.
    op.subject = account.status.map(|status| status.0).filter(|status| !status.is_empty());
    if op.subject.as_ref().is_some_and(|status| status.chars().count() > 64) {
        return Err(Reject::new(Reason::InvalidField, "`status` is longer than 64 characters"));
    }
    op.body = Some(Body::Json(Json(Cow::Borrowed(if account.active { "true" } else { "false" }))));
    event(entry, version, account.did, Some(op))
}

fn register<'a>(kind: Kind, did: &Cow<'a, str>, version: &Version<'_>) -> Op<'a> {
    let time = version.time();
    Op {
        kind,
        delete: false,
        uri: did.clone().into_owned(),
        cid: None,
        subject: None,
        subject_cid: None,
        created_at: time,
        sort_at: time,
        body: None,
        root: None,
    }
}

fn event<'a>(
    entry: &'a Entry,
    version: Version<'a>,
    did: Cow<'a, str>,
    op: Option<Op<'a>>,
) -> Result<Event<'a>, Reject> {
    check_did(&did)?;
    let ops: Vec<Op<'a>> = op.into_iter().collect();
    Ok(Event {
        event_type: &entry.event_type,
        repo: did,
        version,
        sources: vec![entry.data.as_str(); ops.len()],
        ops,
        mentions: Vec::new(),
        rejected: Vec::new(),
    })
}

/// <https://atproto.com/specs/handle>, without the reserved names that never resolve.
fn is_handle(handle: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
    };
    handle.len() <= MAX_NAME.min(253)
        && handle != "handle.invalid"
        && handle.contains('.')
        && handle.split('.').all(label)
        && handle.rsplit('.').next().is_some_and(|top| !top.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_valid_handles_are_claimed() {
        for good in ["alice.test", "xn--bcher-kva.example", "a.b-c.d1"] {
            assert!(is_handle(good), "{good}");
        }
        for bad in ["handle.invalid", "alice", "-a.test", "a..test", "a.1test", "ä.test", "did:plc:x", ""] {
            assert!(!is_handle(bad), "{bad}");
        }
        let entry = super::super::test_entry("identity", r#"{"did":"did:plc:a"}"#, "4");
        let event = super::super::interpret_now(&entry).unwrap();
        assert!(event.ops.is_empty());
        assert_eq!(event.repo, "did:plc:a");
    }
}
