//! The websocket message that holds an event.

use bytes::Bytes;
use tokio_tungstenite::tungstenite::{Message as WsMessage, Utf8Bytes};

use crate::metrics;
use crate::output::events;
use crate::output::feed::Notice;
use crate::output::filter::Filter;
use crate::output::jetstream::Message;
use crate::output::messages::Item;

/// How messages are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Version 1.
    Plain,
    /// Version 1 in Zstandard frames, which every Jetstream client can read; the content is not compressed.
    Framed,
    /// Version 2, from this number on.
    Events {
        /// The first number.
        from: u64,
    },
}

impl Format {
    /// One of an item's messages, if it is wanted.
    pub(super) fn of(self, item: &Item, message: &Message, filter: &Filter) -> Option<WsMessage> {
        match self {
            Self::Plain | Self::Framed if !filter.wants(message, message.text.len()) => None,
            Self::Plain => text(message.text.clone()),
            Self::Framed => Some(WsMessage::Binary(zstandard_frame(&message.text).into())),
            Self::Events { from } => {
                let seq = item.numbers.start + message.index as u64;
                if seq < from || !filter.wants(message, 0) {
                    return None;
                }
                let Ok(frame) = events::frame(message, seq) else {
                    // Cannot happen: it is one of ours.
                    metrics::count(metrics::SUBSCRIBERS_UNREADABLE, 1);
                    return None;
                };
                if filter.wants(message, frame.len()) { text(frame) } else { None }
            }
        }
    }
}

/// What a subscriber should know before the first message.
pub(super) fn notice(notice: Notice) -> Option<WsMessage> {
    let (name, message) = match notice {
        Notice::OutdatedCursor => (
            "OutdatedCursor",
            "the stream does not reach back so far: events may be missing before the next one",
        ),
        Notice::FutureCursor => ("FutureCursor", "the cursor is in the future: only new events are sent"),
    };
    events::info(name, message).ok().and_then(text)
}

/// Our own JSON is UTF-8.
pub(super) fn text(text: Bytes) -> Option<WsMessage> {
    Utf8Bytes::try_from(text).ok().map(WsMessage::Text)
}

/// A Zstandard frame with this content, as it is (RFC 8878, 3.1.1: a single segment, its size, and raw blocks).
fn zstandard_frame(content: &[u8]) -> Vec<u8> {
    /// The largest block.
    const BLOCK: usize = 128 << 10;
    let mut frame = Vec::with_capacity(content.len() + 16);
    frame.extend_from_slice(&0xFD2F_B528_u32.to_le_bytes());
    frame.push(0b1010_0000);
    frame.extend_from_slice(&u32::try_from(content.len()).unwrap_or(u32::MAX).to_le_bytes());
    let mut rest = content;
    loop {
        let (block, after) = rest.split_at(rest.len().min(BLOCK));
        let header = u32::from(after.is_empty()) | (block.len() as u32) << 3;
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.extend_from_slice(block);
        rest = after;
        if rest.is_empty() {
            return frame;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::jetstream::compressed::Decompressor;

    #[test]
    fn a_frame_has_its_content() {
        let mut decompressor = Decompressor::new(1 << 20).unwrap();
        for length in [0, 1, 700, (128 << 10) - 1, 128 << 10, (128 << 10) + 1, 300_000] {
            let text = "x".repeat(length);
            assert_eq!(decompressor.text(&zstandard_frame(text.as_bytes())).unwrap(), text, "{length}");
        }
    }
}
