//! The two paths of our process that every event takes, over the recorded frames, so that their instructions can be
//! counted: see scripts/bench-check.sh.
//!
//!     hot_paths decode PASSES       frames of the relay -> stream entries
//!     hot_paths interpret PASSES    stream entries -> operations

use std::hint::black_box;

use standpipe::apply::{Context, interpret};
use standpipe::config::Role;
use standpipe::event::Entry;
use standpipe::event::{EntryId, Epochs};
use standpipe::origin::relay::decode::{Message, decode};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("which path? decode or interpret")?;
    let passes: u32 = arguments.next().ok_or("how many passes?")?.parse()?;
    let (config, _) = standpipe::config::from_env([("COLLECTIONS", "*")], Role::Reader)?;
    let wanted = config.collections;
    let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pds-live.frames"))?;
    let mut frames = Vec::new();
    let mut rest = file.as_slice();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (frame, after) = after.split_at(u32::from_be_bytes(*length) as usize);
        frames.push(frame);
        rest = after;
    }
    match path.as_str() {
        "decode" => {
            for _ in 0..passes {
                for frame in &frames {
                    let _ = black_box(decode(black_box(frame), &wanted));
                }
            }
        }
        "interpret" => {
            let mut entries = Vec::new();
            for frame in &frames {
                if let Ok(Message::Event { event_type, seq, entries: new, .. }) = decode(frame, &wanted) {
                    entries.extend(new.into_iter().map(|entry| Entry {
                        id: EntryId { ms: 1_763_700_000_000, seq: 0 },
                        event_type: event_type.to_owned(),
                        data: entry.data,
                        seq: seq.to_string(),
                    }));
                }
            }
            let epochs = Epochs::UNNAMED;
            let context = Context::now(&epochs);
            for _ in 0..passes {
                for entry in &entries {
                    let _ = black_box(interpret(black_box(entry), context));
                }
            }
        }
        other => return Err(format!("there is no path {other}: decode or interpret").into()),
    }
    Ok(())
}
