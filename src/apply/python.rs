//! Records as the Python reader writes them, turned into the protocol's JSON form.
//!
//! Its library turns a known record into a model and serialises that: attribute names in snake case, the model's type
//! as `py_type`, absent fields as null, and a blob's CID as hexadecimal bytes. Fields that the library does not know
//! (those of other clients) stay as received.

use serde_json::{Map, Value};

/// Whether a record's JSON text has the Python form.
#[must_use]
pub fn is_python_form(record: &str) -> bool {
    record.contains("\"py_type\"")
}

/// The record in the protocol's JSON form. Every object that the library had a model for has a `$type`, even where the
/// protocol leaves it out.
#[must_use]
pub fn normalise(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(normalise).collect()),
        Value::Object(mut object) => {
            let Some(model) = object.remove("py_type") else {
                return Value::Object(
                    object.into_iter().map(|(key, value)| (key, normalise(value))).collect(),
                );
            };
            let is_blob = model == "blob";
            let mut out = Map::new();
            out.insert("$type".to_owned(), model);
            for (key, value) in object {
                match value {
                    Value::Null => {}
                    Value::String(text) if is_blob && key == "ref" => {
                        let link = hex_cid(&text).unwrap_or(text);
                        out.insert(key, serde_json::json!({ "$link": link }));
                    }
                    value => {
                        out.entry(camel_case(&key)).or_insert_with(|| normalise(value));
                    }
                }
            }
            Value::Object(out)
        }
        other => other,
    }
}

fn camel_case(key: &str) -> String {
    let mut out = String::with_capacity(key.len());
    let mut upper = false;
    for c in key.chars() {
        if c == '_' && !out.is_empty() {
            upper = true;
        } else if upper {
            out.extend(c.to_uppercase());
            upper = false;
        } else {
            out.push(c);
        }
    }
    out
}

/// The base32 form of a CID given as hexadecimal bytes.
fn hex_cid(text: &str) -> Option<String> {
    if text.len() != 72 || !text.is_ascii() {
        return None;
    }
    let bytes: Vec<u8> =
        (0..36).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16)).collect::<Result<_, _>>().ok()?;
    shrike::cbor::Cid::from_bytes(&bytes).ok().map(|cid| cid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_records_are_converted_to_the_protocol_form() {
        let python = serde_json::json!({
            "avatar": {"mime_type": "image/png", "size": 84, "py_type": "blob",
                "ref": "01551220968c7baa65ab1a2d901508b3c290b4caf2ce2ba9b82d5726f3adc6958aea7a47"},
            "display_name": "Alice", "labels": null, "x-custom": {"keep_me": [1, null]},
            "py_type": "app.bsky.actor.profile", "$type": "app.bsky.actor.profile"
        });
        let expected = serde_json::json!({
            "$type": "app.bsky.actor.profile", "displayName": "Alice", "x-custom": {"keep_me": [1, null]},
            "avatar": {"$type": "blob", "mimeType": "image/png", "size": 84,
                "ref": {"$link": "bafkreiewrr52uznldiwzafiiwpbjbngk6lhcxknyfvlsn45ny2kyv2t2i4"}}
        });
        assert_eq!(normalise(python), expected);
    }
}
