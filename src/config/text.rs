//! Settings that are plain or optional texts.

use std::fmt;

use super::read::Wrong;

/// A Redis key or group: any text that is not obviously something else.
pub(super) fn key(text: &str) -> Result<String, Wrong> {
    let right = "write a name such as firehose:events";
    if text.contains("://") {
        return Err(Wrong::new("is a URL", right));
    }
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(Wrong::new("contains a blank or a control character", right));
    }
    if text.len() > 256 {
        return Err(Wrong::new("is longer than 256 bytes", right));
    }
    Ok(text.to_owned())
}

pub(super) fn consumer_id(text: &str) -> Result<String, Wrong> {
    key(text).map_err(|Wrong { what, .. }| Wrong::new(what, "write a name that stays the same over restarts"))
}

/// A schema of PostgreSQL.
pub(super) fn schema(text: &str) -> Result<String, Wrong> {
    let right = "write a name such as handlers";
    let is_plain = text.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        && text.len() <= 63;
    if !is_plain {
        return Err(Wrong::new("is not a name of lower case letters, digits and _", right));
    }
    if text == "standpipe" || text == "public" || text.starts_with("pg_") || text == "information_schema" {
        return Err(Wrong::new("is a schema whose functions are not for messages", right));
    }
    Ok(text.to_owned())
}

/// Any text.
#[expect(clippy::unnecessary_wraps, reason = "the shape of every reading")]
pub(super) fn any(text: &str) -> Result<String, Wrong> {
    Ok(text.to_owned())
}

/// `None` for an empty text.
pub(super) fn optional<T>(
    parse: impl Fn(&str) -> Result<T, Wrong>,
) -> impl Fn(&str) -> Result<Option<T>, Wrong> {
    unless("", parse)
}

/// `None` for this word.
pub(super) fn unless<T>(
    word: &str,
    parse: impl Fn(&str) -> Result<T, Wrong>,
) -> impl Fn(&str) -> Result<Option<T>, Wrong> {
    move |text| if text == word { Ok(None) } else { parse(text).map(Some) }
}

/// Shows the value, or this word if there is none.
pub(super) fn or<T: fmt::Display>(word: &str) -> impl Fn(&Option<T>) -> String {
    move |value| value.as_ref().map_or_else(|| word.to_owned(), ToString::to_string)
}
