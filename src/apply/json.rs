//! JSON from records, in a form that PostgreSQL accepts: U+0000, which neither `text` nor `jsonb` can hold, is left
//! out.

use std::borrow::Cow;
use std::fmt;

use serde::Serialize;
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde_json::value::RawValue;

use crate::event::{Body, Json, Reason, Reject};

/// A string without U+0000, borrowed from the input if it has no escapes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text<'a>(pub Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Text<'de>, E> {
                // A borrowed string had no escapes, and JSON allows no raw U+0000.
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Text<'de>, E> {
                self.visit_string(text.to_owned())
            }

            fn visit_string<E: Error>(self, mut text: String) -> Result<Text<'de>, E> {
                if text.contains('\0') {
                    text.retain(|c| c != '\0');
                }
                Ok(Text(Cow::Owned(text)))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

/// JSON text as received, without U+0000.
#[must_use]
pub fn clean(raw: &RawValue) -> Json<'_> {
    Json(without_nul(raw.get()))
}

/// Leaves out every `\u0000` escape. An escaped backslash before `u0000` is text and stays.
#[must_use]
pub fn without_nul(json: &str) -> Cow<'_, str> {
    if !json.contains("\\u0000") {
        return Cow::Borrowed(json);
    }
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("\\u0000") {
            rest = after;
        } else {
            // A backslash is consumed together with the character that it escapes, so that `\\u0000` is read correctly.
            let end = 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// An operation's body.
///
/// # Errors
///
/// It cannot be written as JSON.
pub fn body(value: &impl Serialize) -> Result<Body<'static>, Reject> {
    let text = serde_json::to_string(value).map_err(|error| {
        Reject::new(Reason::InvalidField, format!("the record cannot be written as JSON: {error}"))
    })?;
    Ok(Body::Json(Json(match without_nul(&text) {
        Cow::Borrowed(_) => Cow::Owned(text),
        Cow::Owned(clean) => Cow::Owned(clean),
    })))
}

/// A JSON string literal.
#[must_use]
pub fn quote(text: &str) -> String {
    serde_json::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nul_characters_are_removed_and_everything_else_is_kept() {
        assert_eq!(without_nul(r#"{"a":"x\u0000y"}"#), r#"{"a":"xy"}"#);
        assert_eq!(without_nul(r#""no: \\u0000 \\\u0000""#), r#""no: \\u0000 \\""#);
        assert_eq!(without_nul(r#""ü\n\u0000\u0041""#), r#""ü\n\u0041""#);
        assert!(matches!(without_nul(r#"{"a":1}"#), Cow::Borrowed(_)));
        let text: Text = serde_json::from_str(r#""NUL \u0000 end""#).unwrap();
        assert_eq!(text.0, "NUL  end");
        let text: Text = serde_json::from_str(r#""plain""#).unwrap();
        assert!(matches!(text.0, Cow::Borrowed("plain")));
    }
}
