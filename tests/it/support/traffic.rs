//! The simulated relay's events in the form that the model expects.

use serde_json::Value;
use standpipe::config::{self, Role};
use standpipe::origin::relay::decode::{Message, decode};
use standpipe_lab::simulate::{Network, NetworkOptions};

use super::model::{Event, Kind, Op, Version};

pub fn events(options: &NetworkOptions) -> Vec<Event> {
    let (config, _) = config::from_env([("COLLECTIONS", "*")], Role::Tool).unwrap();
    let mut events = Vec::new();
    for frame in Network::new(options) {
        let Message::Event { entries, seq, .. } = decode(&frame.bytes, &config.collections).unwrap() else {
            continue;
        };
        for entry in entries {
            let data: Value = serde_json::from_str(&entry.data).unwrap();
            // Every event has a number, so the stream's ids decide nothing.
            let version =
                Version { rev: data["rev"].as_str().map(str::to_owned), seq: Some(seq), id: (0, 0) };
            events.extend(kind(entry.event_type, &data).map(|kind| Event { version, kind }));
        }
    }
    events
}

/// The meaning of an entry of this type; `None` if it changes nothing.
pub fn kind(event_type: &str, data: &Value) -> Option<Kind> {
    let text = |name: &str| data[name].as_str().map(str::to_owned);
    Some(match event_type {
        "commit" => Kind::Commit {
            repo: text("repo").unwrap(),
            ops: data["ops"].as_array().unwrap().iter().map(operation).collect(),
        },
        "identity" => Kind::Identity { did: text("did").unwrap(), handle: text("handle") },
        "account" => Kind::Account {
            did: text("did").unwrap(),
            active: data["active"].as_bool().unwrap(),
            status: text("status"),
            time: text("time"),
        },
        _ => return None,
    })
}

fn operation(op: &Value) -> Op {
    let text = |name: &str| op[name].as_str().map(str::to_owned);
    Op {
        action: text("action").unwrap(),
        path: text("path").unwrap(),
        cid: text("cid"),
        record: op["record"].clone(),
    }
}
