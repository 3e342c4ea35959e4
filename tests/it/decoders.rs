//! Frames and entries from outside: recorded ones decode as in another implementation, and nothing makes the
//! decoders panic.

use std::path::Path;

use proptest::prelude::*;
use serde_json::Value;
use standpipe::apply::{Context, interpret};
use standpipe::config::{self, Collections, Role};
use standpipe::event::Entry;
use standpipe::event::{EntryId, Epochs, Reason};
use standpipe::origin::relay::decode::{Message, decode};
use standpipe_lab::simulate::read_frames;

fn collections(wanted: &str) -> Collections {
    let (config, _) = config::from_env([("COLLECTIONS", wanted)], Role::Tool).unwrap();
    config.collections
}

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn recorded_frames_decode_as_in_another_implementation() {
    let frames = read_frames(&fixture("pds-live.frames")).unwrap();
    let events: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(fixture("pds-live.events.json")).unwrap()).unwrap();
    assert_eq!(frames.len(), events.len());
    let wanted = collections("*");
    let mut records = 0;
    for (frame, event) in frames.iter().zip(&events) {
        let body = &event["body"];
        let Message::Event { event_type, seq, entries, letters, .. } = decode(&frame.bytes, &wanted).unwrap()
        else {
            panic!("{event}");
        };
        assert_eq!(format!("#{event_type}"), event["header"]["t"].as_str().unwrap());
        assert_eq!(Some(seq), body["seq"].as_i64());
        assert_eq!(letters, []);
        let data: Vec<Value> =
            entries.iter().map(|entry| serde_json::from_str(&entry.data).unwrap()).collect();
        if event_type != "commit" {
            for (name, value) in data[0].as_object().unwrap() {
                assert_eq!(value, &body[name], "{name}");
            }
            continue;
        }
        let expected = body["ops"].as_array().unwrap();
        let ops: Vec<&Value> = data.iter().flat_map(|data| data["ops"].as_array().unwrap()).collect();
        assert_eq!(ops.len(), expected.len());
        for (op, expected) in ops.into_iter().zip(expected) {
            assert_eq!(op["action"], expected["action"]);
            assert_eq!(op["path"], expected["path"]);
            assert_eq!(op["cid"], expected["cid"]["$link"]);
            if op["action"] != "delete" {
                records += 1;
                assert_eq!(op["record"], event["records"][op["path"].as_str().unwrap()]);
            }
        }
        for data in &data {
            for name in ["repo", "rev", "since", "time"] {
                assert_eq!(data[name], body[name], "{name}");
            }
            assert_eq!(data["commit"], body["commit"]["$link"]);
            let names: Vec<&str> = data.as_object().unwrap().keys().map(String::as_str).collect();
            assert!(names.contains(&"ops"));
        }
    }
    assert!(records > 250, "{records}");
}

#[test]
fn entries_start_with_the_python_readers_fields() {
    let frames = read_frames(&fixture("pds-live.frames")).unwrap();
    for frame in frames {
        let Message::Event { entries, .. } = decode(&frame.bytes, &collections("*")).unwrap() else {
            continue;
        };
        for entry in entries {
            let start = match entry.event_type {
                "commit" => "{\"repo\":",
                _ => "{\"did\":",
            };
            assert!(entry.data.starts_with(start), "{}", entry.data);
        }
    }
}

#[test]
fn unwanted_collections_are_left_out() {
    let wanted = collections("app.bsky.feed.like");
    let mut kept = 0;
    for frame in read_frames(&fixture("pds-live.frames")).unwrap() {
        let Message::Event { entries, .. } = decode(&frame.bytes, &wanted).unwrap() else { continue };
        for entry in entries.iter().filter(|entry| entry.event_type == "commit") {
            let data: Value = serde_json::from_str(&entry.data).unwrap();
            for op in data["ops"].as_array().unwrap() {
                kept += 1;
                assert!(op["path"].as_str().unwrap().starts_with("app.bsky.feed.like/"));
            }
        }
    }
    assert_eq!(kept, 115);
}

#[test]
fn info_and_error_frames_are_told_apart() {
    let first = |name: &str| {
        let frames = read_frames(&fixture(name)).unwrap();
        decode(&frames[0].bytes, &collections("*")).unwrap()
    };
    assert!(
        matches!(first("info-outdated-cursor.frames"), Message::Info { name, .. } if name == "OutdatedCursor")
    );
    assert!(
        matches!(first("error-future-cursor.frames"), Message::Error { error, .. } if error == "FutureCursor")
    );
    assert!(
        matches!(first("error-consumer-too-slow.frames"), Message::Error { error, .. } if error == "ConsumerTooSlow")
    );
}

#[test]
fn a_record_that_does_not_match_its_cid_is_the_only_one_lost() {
    fn count(entries: &[standpipe::stream::append::NewEntry]) -> usize {
        entries
            .iter()
            .map(|entry| serde_json::from_str::<Value>(&entry.data).unwrap()["ops"].as_array().unwrap().len())
            .sum()
    }
    let wanted = collections("*");
    let mut tested = 0;
    for frame in read_frames(&fixture("pds-live.frames")).unwrap() {
        let Message::Event { event_type: "commit", entries, .. } = decode(&frame.bytes, &wanted).unwrap()
        else {
            continue;
        };
        let ops = count(&entries);
        // One byte of a text inside a record block: still valid CBOR, but not what was hashed.
        let Some(at) = frame.bytes.windows(9).rposition(|bytes| bytes == b"2026-11-2") else { continue };
        let mut bytes = frame.bytes.to_vec();
        // The last such text may be the frame's own time, which is not hashed: only those inside blocks
        // count.
        bytes[at] = b'3';
        if let Ok(Message::Event { entries, letters, .. }) = decode(&bytes, &wanted)
            && let [letter] = &*letters
        {
            assert_eq!(letter.reject.reason, Reason::MissingBlock);
            tested += 1;
            assert_eq!(count(&entries) + 1, ops);
        }
    }
    assert!(tested > 20, "{tested} records were tampered with");
}

/// A commit of one repository with `count` posts of about `size` bytes each, as a relay sends it.
fn large_commit(count: usize, size: usize) -> Vec<u8> {
    use shrike::car::{Block, write_all};
    use shrike::cbor::{Cid, Codec, Value, encode_value};
    let text = "x".repeat(size);
    let blocks: Vec<Block> = (0..count)
        .map(|n| {
            let data = encode_value(&Value::Map(vec![
                ("n", Value::Unsigned(n as u64)),
                ("text", Value::Text(&text)),
                ("$type", Value::Text("app.bsky.feed.post")),
            ]))
            .unwrap();
            Block { cid: Cid::compute(Codec::Drisl, &data), data }
        })
        .collect();
    let paths: Vec<String> = (0..count).map(|n| format!("app.bsky.feed.post/{n}")).collect();
    let ops = blocks
        .iter()
        .zip(&paths)
        .map(|(block, path)| {
            Value::Map(vec![
                ("cid", Value::Cid(block.cid)),
                ("path", Value::Text(path)),
                ("action", Value::Text("create")),
            ])
        })
        .collect();
    let car = write_all(&[blocks[0].cid], &blocks).unwrap();
    let mut frame =
        encode_value(&Value::Map(vec![("t", Value::Text("#commit")), ("op", Value::Unsigned(1))])).unwrap();
    frame.extend(
        encode_value(&Value::Map(vec![
            ("ops", Value::Array(ops)),
            ("rev", Value::Text("3n2samfdihk2n")),
            ("seq", Value::Unsigned(9)),
            ("repo", Value::Text("did:plc:aaaaaaaaaaaaaaaaaaaaaaaa")),
            ("blocks", Value::Bytes(&car)),
        ]))
        .unwrap(),
    );
    frame
}

#[test]
fn large_commits_are_split() {
    let frame = large_commit(200, 9_000);
    let Message::Event { entries, .. } = decode(&frame, &collections("*")).unwrap() else {
        panic!("the commit should decode");
    };
    assert!(entries.len() > 10, "{} entries", entries.len());
    let mut paths = Vec::new();
    for entry in &entries {
        assert!(entry.data.len() < 128 * 1024 + 10_000, "{} bytes", entry.data.len());
        let data: Value = serde_json::from_str(&entry.data).unwrap();
        assert_eq!(
            (data["repo"].as_str(), data["rev"].as_str()),
            (Some("did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"), Some("3n2samfdihk2n"))
        );
        paths
            .extend(data["ops"].as_array().unwrap().iter().map(|op| op["path"].as_str().unwrap().to_owned()));
    }
    let expected: Vec<String> = (0..200).map(|n| format!("app.bsky.feed.post/{n}")).collect();
    assert_eq!(paths, expected, "every operation once, in order");
}

/// `make fuzz` tries many more.
fn cases() -> u32 {
    std::env::var("FUZZ_CASES").map_or(3000, |text| text.parse().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_the_decoders_panic(
        which in 0usize..145, cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        length in any::<prop::sample::Index>(), event_type in "(commit|identity|account|sync|x)", json in ".{0,80}",
    ) {
        thread_local! {
            static FRAMES: Vec<bytes::Bytes> =
                read_frames(&fixture("pds-live.frames")).unwrap().into_iter().map(|frame| frame.bytes).collect();
        }
        let wanted = collections("*");
        FRAMES.with(|frames| {
            let mut bytes = frames[which].to_vec();
            for (at, byte) in &cuts {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            // An error or a message: either is fine.
            if let Ok(Message::Event { entries, .. }) = decode(&bytes, &wanted) {
                for entry in entries {
                    let entry = Entry {
                        id: EntryId { ms: 1, seq: 0 },
                        event_type: entry.event_type.to_owned(),
                        // Cut anywhere, even in the middle of an escape.
                        data: entry.data.chars().take(length.index(entry.data.len() + 1)).collect(),
                        seq: entry.seq.to_string(),
                    };
                    let _ = interpret(&entry, Context::now(&Epochs::UNNAMED));
                }
            }
            bytes.truncate(length.index(bytes.len() + 1));
            let _ = decode(&bytes, &wanted);
        });
        let entry = Entry { id: EntryId::default(), event_type, data: json, seq: String::new() };
        let _ = interpret(&entry, Context::now(&Epochs::UNNAMED));
    }
}
