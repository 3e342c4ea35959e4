//! Tasks: messages for the operator's own functions.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Entry, UNUSABLE};

/// The most bytes of a task's id.
pub const MAX_ID: usize = 256;
/// PostgreSQL cuts longer names.
const MAX_NAME: usize = 63;
/// The types that are not names of functions: those of events, and those that only look like them.
const OURS: [&str; 6] = ["commit", "identity", "account", "sync", "info", UNUSABLE];

/// A message that a function handles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The name of the function.
    pub function: String,
    /// What tells it from others for the same function. The sender's, else that of its entry.
    pub id: String,
    /// JSON.
    pub data: String,
}

/// The data of a task's entry.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(default)]
    id: Option<String>,
    #[serde(borrow)]
    data: &'a RawValue,
}

/// Whether tasks can have this type: it is a name that needs no quotes in PostgreSQL, and not one of ours.
#[must_use]
pub fn is_function(name: &str) -> bool {
    name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        && !OURS.contains(&name)
}

impl Task {
    /// The data of an entry for a task; `data` is JSON.
    #[must_use]
    pub fn message(id: Option<&str>, data: &str) -> String {
        match id {
            Some(id) => format!(r#"{{"id":{},"data":{data}}}"#, serde_json::Value::from(id)),
            None => format!(r#"{{"data":{data}}}"#),
        }
    }

    /// The task in an entry.
    ///
    /// # Errors
    ///
    /// The entry was not appended by this program: the problem with it.
    pub fn of(entry: &Entry) -> Result<Self, String> {
        let message: Message<'_> =
            serde_json::from_str(&entry.data).map_err(|error| format!("this is not a task: {error}"))?;
        if !is_function(&entry.event_type) {
            return Err("its type is not a name that a function for tasks can have".to_owned());
        }
        Ok(Self {
            function: entry.event_type.clone(),
            id: message.id.unwrap_or_else(|| entry.id.to_string()),
            data: message.data.get().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EntryId;

    #[test]
    fn a_task_without_an_id_has_that_of_its_entry() {
        let entry = |data: String| Entry {
            id: EntryId { ms: 7, seq: 1 },
            event_type: "resize".to_owned(),
            data,
            seq: String::new(),
        };
        let data = r#"{"width":3.00000000000000000001}"#;
        let task = Task::of(&entry(Task::message(Some("\"a"), data))).unwrap();
        assert_eq!((task.function.as_str(), task.id.as_str(), task.data.as_str()), ("resize", "\"a", data));
        assert_eq!(Task::of(&entry(Task::message(None, data))).unwrap().id, "7-1");
        assert!(Task::of(&entry("{}".to_owned())).is_err());
    }

    #[test]
    fn only_plain_names_are_functions() {
        for name in ["resize", "_a1", "send_mail"] {
            assert!(is_function(name), "{name}");
        }
        for name in ["", "commit", "sync", "Resize", "a-b", "a.b", "1a", "unusable", "é", &"a".repeat(64)] {
            assert!(!is_function(name), "{name}");
        }
    }
}
