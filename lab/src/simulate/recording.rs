//! Frames from a file.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use bytes::Bytes;
use shrike::cbor::{Decoder, Value};

use super::Frame;

/// What the protocol allows a frame to be, in bytes.
const MAX_FRAME: u64 = 5_000_000;

/// Reads a recorded file: a message's length in four bytes, the most significant first, the message, and so on.
///
/// A frame's `seq` is read from its body. A frame that has none, or that is not CBOR at all, is kept as it is, with
/// `seq` None, so that bad frames can be played too.
///
/// # Errors
/// When the file cannot be read, and when a record is cut off or longer than 5,000,000 bytes; the message names the
/// record's offset.
pub fn read_frames(path: &Path) -> anyhow::Result<Vec<Frame>> {
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut file = std::io::BufReader::new(file);
    let mut frames = Vec::new();
    let mut offset: u64 = 0;
    loop {
        let mut head = Vec::with_capacity(4);
        file.by_ref()
            .take(4)
            .read_to_end(&mut head)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if head.is_empty() {
            return Ok(frames);
        }
        let Ok(head) = <[u8; 4]>::try_from(head) else {
            bail!("{}: the record at offset {offset} is cut off within its length", path.display());
        };
        let length = u64::from(u32::from_be_bytes(head));
        if length > MAX_FRAME {
            bail!(
                "{}: the record at offset {offset} claims {length} bytes, more than {MAX_FRAME}",
                path.display()
            );
        }
        let mut message = Vec::new();
        file.by_ref()
            .take(length)
            .read_to_end(&mut message)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if (message.len() as u64) < length {
            bail!(
                "{}: the record at offset {offset} is cut off: {} of {length} bytes",
                path.display(),
                message.len()
            );
        }
        offset += 4 + length;
        frames.push(Frame { seq: seq_of(&message), bytes: Bytes::from(message) });
    }
}

/// The number in a frame's body, if there is one.
fn seq_of(frame: &[u8]) -> Option<u64> {
    let mut decoder = Decoder::new(frame);
    decoder.decode().ok()?;
    let Value::Map(body) = decoder.decode().ok()? else {
        return None;
    };
    body.into_iter().find_map(|(key, value)| match value {
        Value::Unsigned(seq) if key == "seq" => Some(seq),
        _ => None,
    })
}

/// Whether a frame is an error (`op` -1), after which a relay closes the connection.
pub(super) fn is_error(frame: &[u8]) -> bool {
    let Ok(Value::Map(header)) = Decoder::new(frame).decode() else {
        return false;
    };
    header.into_iter().any(|(key, value)| key == "op" && value == Value::Signed(-1))
}
