//! The CID of a record in the protocol's JSON form: that of its DAG-CBOR (<https://atproto.com/specs/data-model>).

use data_encoding::BASE64_NOPAD;
use serde_json::Value as Json;
use shrike::cbor::{Cid, Codec, Value, encode_value};

/// The bytes and CIDs in a record, which its other form borrows.
#[derive(Default)]
struct Owned {
    bytes: Vec<Vec<u8>>,
}

/// The record's CID.
///
/// # Errors
///
/// It contains what the data model has no form for, in words.
pub(super) fn cid_of(record: &Json) -> Result<String, String> {
    let mut owned = Owned::default();
    collect(record, &mut owned)?;
    let mut bytes = owned.bytes.iter();
    let value = convert(record, &mut bytes)?;
    let encoded = encode_value(&value).map_err(|error| error.to_string())?;
    Ok(Cid::compute(Codec::Drisl, &encoded).to_string())
}

/// `{"$bytes": ...}`, decoded.
fn bytes_of(value: &Json) -> Option<Result<Vec<u8>, String>> {
    let text = value.as_object().filter(|object| object.len() == 1)?.get("$bytes")?.as_str()?;
    // The specification leaves the padding out; some libraries write it.
    let decoded = BASE64_NOPAD.decode(text.trim_end_matches('=').as_bytes());
    Some(decoded.map_err(|error| format!("`$bytes` is not base64: {error}")))
}

fn collect(value: &Json, into: &mut Owned) -> Result<(), String> {
    if let Some(bytes) = bytes_of(value) {
        into.bytes.push(bytes?);
        return Ok(());
    }
    match value {
        Json::Array(items) => items.iter().try_for_each(|item| collect(item, into)),
        Json::Object(fields) => fields.values().try_for_each(|field| collect(field, into)),
        _ => Ok(()),
    }
}

fn convert<'a>(value: &'a Json, bytes: &mut std::slice::Iter<'a, Vec<u8>>) -> Result<Value<'a>, String> {
    Ok(match value {
        Json::Null => Value::Null,
        Json::Bool(bool) => Value::Bool(*bool),
        Json::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => Value::Unsigned(number),
            (None, Some(number)) => Value::Signed(number),
            _ => return Err(format!("{number} is not a whole number, and records contain no others")),
        },
        Json::String(text) => Value::Text(text),
        Json::Array(items) => {
            Value::Array(items.iter().map(|item| convert(item, bytes)).collect::<Result<_, _>>()?)
        }
        Json::Object(fields) => {
            if bytes_of(value).is_some() {
                return Ok(Value::Bytes(bytes.next().map(Vec::as_slice).unwrap_or_default()));
            }
            if let (1, Some(link)) = (fields.len(), fields.get("$link").and_then(Json::as_str)) {
                return link
                    .parse()
                    .map(Value::Cid)
                    .map_err(|_| format!("`$link` is not a CID: {link:.100}"));
            }
            let mut map = Vec::with_capacity(fields.len());
            for (name, field) in fields {
                map.push((name.as_str(), convert(field, bytes)?));
            }
            // The canonical order: shorter names first.
            map.sort_by(|(one, _), (other, _)| (one.len(), one).cmp(&(other.len(), other)));
            Value::Map(map)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that a real server wrote, with the CIDs that it gave.
    #[test]
    fn the_cid_is_the_one_that_a_server_computes() {
        let text = include_str!("../../../tests/fixtures/pds-live.events.json");
        let events: Vec<Json> = serde_json::from_str(text).unwrap();
        let mut compared = 0;
        for event in &events {
            for op in event["body"]["ops"].as_array().into_iter().flatten() {
                let record = &event["records"][op["path"].as_str().unwrap()];
                if let (Some(cid), false) = (op["cid"]["$link"].as_str(), record.is_null()) {
                    assert_eq!(cid_of(record).unwrap(), cid, "{record}");
                    compared += 1;
                }
            }
        }
        assert!(compared > 80, "{compared}");
    }

    #[test]
    fn what_the_data_model_lacks_is_refused() {
        for wrong in
            [r#"{"a":1.5}"#, r#"{"a":{"$link":"x"}}"#, r#"{"a":{"$bytes":"*"}}"#, r#"{"a":{"$bytes":"A"}}"#]
        {
            assert!(cid_of(&serde_json::from_str(wrong).unwrap()).is_err(), "{wrong}");
        }
        let same = |one: &str, other: &str| {
            assert_eq!(
                cid_of(&serde_json::from_str(one).unwrap()),
                cid_of(&serde_json::from_str(other).unwrap())
            );
        };
        same(r#"{"a":{"$bytes":"aGVsbG8="},"bb":1}"#, r#"{"bb":1,"a":{"$bytes":"aGVsbG8"}}"#);
    }
}
