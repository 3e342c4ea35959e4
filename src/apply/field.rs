//! Reading a record's fields, and refusing bad ones.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::Text;
use super::{datetime, json};
use crate::event::is_did;
use crate::event::{Micros, Op, Reason, Reject};

/// The longest URI (<https://atproto.com/specs/at-uri-scheme>). Other programs' tables may hold less; then the database
/// refuses it.
pub(super) const MAX_URI: usize = 8192;
/// The longest DID, handle or CID that the tables can hold.
pub(super) const MAX_NAME: usize = 255;

/// Sets both times from the record's `createdAt`. If that is missing or not a datetime, the time inside the revision
/// (already in `op`) stays. A record is never sorted after the time of its commit.
pub(super) fn set_created_at(op: &mut Op<'_>, created_at: Option<&RawValue>) {
    let committed = op.created_at;
    if let Some(Text(text)) = created_at.and_then(|raw| serde_json::from_str(raw.get()).ok())
        && let Some(time) = datetime::parse(&text)
    {
        op.created_at = time;
    }
    op.sort_at = Micros(op.created_at.0.min(committed.0));
}

/// Requires the record's CID, which most tables store.
pub(super) fn need_cid(op: &Op<'_>) -> Result<(), Reject> {
    match op.cid {
        Some(_) => Ok(()),
        None => Err(Reject::new(Reason::MissingField, "there is no `cid`")),
    }
}

/// The field, if it has the JSON shape that readers of the table expect.
pub(super) fn shaped<'a>(
    value: Option<&'a RawValue>,
    open: char,
    name: &str,
) -> Result<Option<&'a RawValue>, Reject> {
    match value {
        Some(raw) if !raw.get().starts_with(open) => {
            let what = if open == '{' { "an object" } else { "a list" };
            Err(Reject::new(Reason::InvalidField, format!("`{name}` is not {what}")))
        }
        value => Ok(value),
    }
}

pub(super) fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Reject> {
    serde_json::from_str(text).map_err(|error| reject(&error))
}

pub(super) fn reject(error: &serde_json::Error) -> Reject {
    let message = error.to_string();
    let reason = match error.classify() {
        serde_json::error::Category::Data if message.starts_with("missing field") => Reason::MissingField,
        serde_json::error::Category::Data => Reason::InvalidField,
        _ => Reason::Undecodable,
    };
    Reject::new(reason, message)
}

/// The record paths of <https://atproto.com/specs/repository>: an NSID and a record key.
/// The longest record key (<https://atproto.com/specs/record-key>).
const MAX_RKEY: usize = 512;

pub(super) fn split_path(path: &str) -> Result<(&str, &str), Reject> {
    let key = |c: u8| c.is_ascii_alphanumeric() || b"._:~-".contains(&c);
    match path.split_once('/') {
        Some((collection, rkey))
            if collection.contains('.')
                && collection.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'.' || c == b'-')
                && (1..=MAX_RKEY).contains(&rkey.len())
                && !matches!(rkey, "." | "..")
                && rkey.bytes().all(key) =>
        {
            Ok((collection, rkey))
        }
        _ => Err(Reject::new(
            Reason::InvalidField,
            format!("the path {} is not collection/rkey", json::quote(path)),
        )),
    }
}

pub(super) fn check_did(did: &str) -> Result<(), Reject> {
    if is_did(did) {
        Ok(())
    } else {
        Err(Reject::new(Reason::InvalidField, format!("{} is not a DID", json::quote(&shorten(did)))))
    }
}

pub(super) fn check_uri(uri: &str) -> Result<(), Reject> {
    if uri.starts_with("at://") && uri.len() <= MAX_URI && !uri.contains(char::is_control) {
        Ok(())
    } else {
        Err(Reject::new(Reason::InvalidField, format!("{} is not an at:// URI", json::quote(&shorten(uri)))))
    }
}

pub(super) fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

/// `com.atproto.repo.strongRef`: a record and its version. Old clients left out the CID.
#[derive(Deserialize)]
pub(super) struct StrongRef<'a> {
    #[serde(borrow)]
    uri: Cow<'a, str>,
    #[serde(borrow, default)]
    cid: Option<Text<'a>>,
}

impl<'a> StrongRef<'a> {
    pub(super) fn checked(self) -> Result<(Cow<'a, str>, Option<Cow<'a, str>>), Reject> {
        check_uri(&self.uri)?;
        let cid = self.cid.map(|cid| cid.0);
        if cid.as_ref().is_some_and(|cid| cid.len() > MAX_NAME) {
            return Err(Reject::new(Reason::InvalidField, "the CID is longer than 255 characters"));
        }
        Ok((self.uri, cid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(vectors: &str) -> impl Iterator<Item = &str> {
        vectors.lines().filter(|line| !line.is_empty() && !line.starts_with('#'))
    }

    #[test]
    fn the_official_vectors_for_record_keys_hold() {
        let valid = include_str!("../../tests/fixtures/interop/syntax/recordkey_syntax_valid.txt");
        let invalid = include_str!("../../tests/fixtures/interop/syntax/recordkey_syntax_invalid.txt");
        let path = |key: &str| format!("app.bsky.feed.post/{key}");
        for key in lines(valid) {
            assert!(split_path(&path(key)).is_ok(), "{key}");
        }
        for key in lines(invalid) {
            assert!(split_path(&path(key)).is_err(), "{key}");
        }
        assert!(lines(valid).count() > 5 && lines(invalid).count() > 5);
    }
}
