//! The messages of a queue or a topic: each holds what a request to `POST /events` may hold. One that cannot be used becomes an
//! entry that ends as a dead letter, with its content.

use serde_json::json;

use super::ingest::lines::{self, Line, Tasks};
use crate::event::UNUSABLE;

/// A larger message is cut for the dead letters.
const MAX_BODY: usize = 8 << 20;

/// Reads messages.
#[derive(Clone, Debug)]
pub struct Messages {
    /// Where they come from, for the dead letters.
    pub source: String,
    /// Whether there are functions for tasks.
    pub takes_tasks: bool,
}

impl Messages {
    /// Appends what is in a message to the events, and returns whether it could be used. Tasks without an id of their own have that
    /// of the message.
    pub fn read(&self, body: &[u8], id: Option<&str>, events: &mut Vec<Line>) -> bool {
        let tasks = match (self.takes_tasks, id) {
            (false, _) => Tasks::Refused,
            (true, Some(id)) => Tasks::Named(id),
            (true, None) => Tasks::Taken,
        };
        let read = if body.len() > MAX_BODY {
            Err(format!("the message is larger than {} MiB", MAX_BODY >> 20))
        } else {
            lines::read(body, tasks).map_err(|wrong| wrong.to_string())
        };
        match read {
            Ok(lines) => {
                events.extend(lines);
                true
            }
            Err(why) => {
                events.push(self.unusable(body, &why));
                false
            }
        }
    }

    fn unusable(&self, body: &[u8], why: &str) -> Line {
        let mut data = json!({ "error": format!("{}: {why}", self.source), "bytes": body.len() });
        let shown = &body[..body.len().min(MAX_BODY)];
        // JSON writes a control character with six others.
        let is_text = shown.iter().filter(|byte| byte.is_ascii_control()).count() <= shown.len() / 8;
        match std::str::from_utf8(shown) {
            Ok(text) if is_text => data["text"] = text.into(),
            _ => data["base64"] = data_encoding::BASE64.encode(shown).into(),
        }
        Line { event_type: UNUSABLE.into(), is_task: false, did: String::new(), data: data.to_string() }
    }
}
