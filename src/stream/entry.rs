//! The entry format: exactly three fields in exactly this order, `type`, `data`, `seq`. The Node.js workers read them
//! by position.

use redis::{FromRedisValue, ParsingError, Value};

use crate::event::{Entry, EntryId};

/// The result of one read of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Entries in the order of the stream.
    pub entries: Vec<Entry>,
    /// Pending ids whose entries somebody trimmed or deleted.
    pub gone: Vec<EntryId>,
}

impl FromRedisValue for Batch {
    // Consumes the reply, while the client's own type would clone it.
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        let mut batch = Self::default();
        let streams = match value {
            Value::Nil => return Ok(batch),
            // RESP2: [[key, entries], ...]; RESP3: {key: entries, ...}
            Value::Array(streams) => streams
                .into_iter()
                .filter_map(|stream| match stream {
                    Value::Array(mut pair) if pair.len() == 2 => pair.pop(),
                    _ => None,
                })
                .collect(),
            Value::Map(streams) => streams.into_iter().map(|(_, entries)| entries).collect::<Vec<_>>(),
            other => return Err(format!("XREADGROUP answered {other:?}").into()),
        };
        for stream in streams {
            batch.extend(stream)?;
        }
        Ok(batch)
    }
}

impl Batch {
    /// Parses a list of `[id, fields]` as returned by XREADGROUP, XRANGE and XCLAIM.
    ///
    /// # Errors
    ///
    /// It is not such a list.
    pub fn extend(&mut self, entries: Value) -> Result<(), ParsingError> {
        let Value::Array(entries) = entries else {
            return Err("a list of entries was expected".into());
        };
        self.entries.reserve(entries.len());
        for entry in entries {
            let Value::Array(mut pair) = entry else {
                continue;
            };
            if pair.len() != 2 {
                return Err("an entry without two parts".into());
            }
            let fields = pair.pop().unwrap_or(Value::Nil);
            let id: EntryId = text(pair.pop().unwrap_or(Value::Nil))
                .parse()
                .map_err(|error: crate::event::InvalidEntryId| ParsingError::from(error.to_string()))?;
            match fields {
                Value::Nil => self.gone.push(id),
                Value::Array(fields) => self.entries.push(from_fields(id, fields)),
                other => return Err(format!("entry {id} has the fields {other:?}").into()),
            }
        }
        Ok(())
    }
}

fn from_fields(id: EntryId, fields: Vec<Value>) -> Entry {
    let mut entry = Entry { id, ..Entry::default() };
    let mut fields = fields.into_iter();
    while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
        if let Value::BulkString(name) = name {
            match name.as_slice() {
                b"type" => entry.event_type = text(value),
                b"data" => entry.data = text(value),
                b"seq" => entry.seq = text(value),
                _ => {}
            }
        }
    }
    entry
}

/// The text of a reply. Bytes that are not UTF-8 become replacement characters: neither we nor the other workers write
/// such an entry, so it is refused, or kept in this readable form.
fn text(value: Value) -> String {
    match value {
        Value::BulkString(bytes) => match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        },
        Value::SimpleString(text) => text,
        Value::Int(number) => number.to_string(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn replies_of_both_protocols_and_deleted_entries_are_parsed() {
        let entries = || {
            Value::Array(vec![
                Value::Array(vec![
                    bulk("5-1"),
                    Value::Array(vec![
                        bulk("type"),
                        bulk("commit"),
                        bulk("data"),
                        bulk("{}"),
                        bulk("seq"),
                        bulk("9"),
                    ]),
                ]),
                Value::Array(vec![bulk("5-2"), Value::Nil]),
            ])
        };
        let resp2 = Value::Array(vec![Value::Array(vec![bulk("key"), entries()])]);
        let resp3 = Value::Map(vec![(bulk("key"), entries())]);
        for reply in [resp2, resp3] {
            let batch = Batch::from_redis_value(reply).unwrap();
            assert_eq!(
                batch.entries,
                [Entry {
                    id: EntryId { ms: 5, seq: 1 },
                    event_type: "commit".into(),
                    data: "{}".into(),
                    seq: "9".into(),
                }]
            );
            assert_eq!(batch.gone, [EntryId { ms: 5, seq: 2 }]);
        }
        assert_eq!(Batch::from_redis_value(Value::Nil).unwrap(), Batch::default());
        assert!(Batch::from_redis_value(Value::Int(3)).is_err());
    }
}
