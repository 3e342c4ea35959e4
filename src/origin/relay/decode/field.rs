//! Fields of a decoded message, within the protocol's limits.

use shrike::cbor::Value;

use super::FrameError;

/// Maximum CBOR items in a frame, not counting its blocks; a commit of 200 operations has two thousand.
pub(super) const MAX_ITEMS: usize = 20_000;
/// The longest DID (<https://atproto.com/specs/did>).
const MAX_DID: usize = 2048;
/// The longest other text: revisions, times, handles, states.
pub(super) const MAX_TEXT: usize = 512;

pub(super) type Map<'a> = Vec<(&'a str, Value<'a>)>;

/// Whether a frame has at most [`MAX_ITEMS`] CBOR items. Items follow one another however they are nested, so it is
/// enough to read their heads; malformed input is left for the decoder to refuse.
pub(super) fn has_few_items(mut bytes: &[u8]) -> bool {
    for _ in 0..MAX_ITEMS {
        let Some((&head, rest)) = bytes.split_first() else { return true };
        let (length, rest) = match head & 31 {
            small @ 0..24 => (u64::from(small), rest),
            size @ 24..28 => {
                let Some((argument, rest)) = rest.split_at_checked(1 << (size - 24)) else { return true };
                (argument.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)), rest)
            }
            _ => (0, rest),
        };
        // Byte and text strings: skip their content.
        bytes = if matches!(head >> 5, 2 | 3) {
            let Some(rest) = usize::try_from(length).ok().and_then(|length| rest.get(length..)) else {
                return true;
            };
            rest
        } else {
            rest
        };
    }
    false
}

pub(super) fn get<'m, 'a>(map: &'m Map<'a>, key: &str) -> Option<&'m Value<'a>> {
    map.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
}

pub(super) fn text<'a>(map: &Map<'a>, key: &str) -> Option<&'a str> {
    match get(map, key) {
        Some(Value::Text(text)) => Some(text),
        _ => None,
    }
}

pub(super) fn integer(map: &Map<'_>, key: &str) -> Option<i64> {
    match get(map, key) {
        Some(Value::Unsigned(number)) => i64::try_from(*number).ok(),
        Some(Value::Signed(number)) => Some(*number),
        _ => None,
    }
}

pub(super) fn did<'a>(body: &Map<'a>, name: &'static str) -> Result<&'a str, FrameError> {
    let did = text(body, name).ok_or(FrameError::Field(name))?;
    if did.len() <= MAX_DID { Ok(did) } else { Err(FrameError::Long(name)) }
}

/// An optional text; one that is too long counts as absent.
pub(super) fn short<'a>(body: &Map<'a>, name: &str) -> Option<&'a str> {
    text(body, name).filter(|text| text.len() <= MAX_TEXT)
}
