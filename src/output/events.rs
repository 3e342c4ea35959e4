//! The format of a Jetstream, version 2: the messages of `network.bsky.jetstream.subscribeEvents`
//! (<https://github.com/bluesky-social/jetstream>, its lexicon), made from those of version 1.
//!
//! Each message has a number of its own (`seq`), larger than all before it, which a client gives to continue. It is the time in
//! microseconds that version 1 has for the entry, unless the numbers of the entries before it reach further. So it depends only on
//! what is in the stream, and every process counts alike, provided that it begins early enough: [`RUN_UP`].

use std::borrow::Cow;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::jetstream::{Message, time_us};
use crate::event::EntryId;

/// How much earlier to begin to read than the first number that matters. Two million operations that are appended in one moment
/// have numbers that reach so far.
pub const RUN_UP: Duration = Duration::from_secs(2);

/// The name of the endpoint.
pub const NAME: &str = "network.bsky.jetstream.subscribeEvents";

/// Gives numbers to the operations of entries in their order.
#[derive(Debug, Default)]
pub struct Numbers {
    next: u64,
}

impl Numbers {
    /// The numbers of an entry's operations; one without operations has a number, too.
    pub fn of(&mut self, entry: EntryId, operations: usize) -> Range<u64> {
        let first = time_us(entry).max(self.next);
        self.next = first + (operations as u64).max(1);
        first..self.next
    }
}

impl From<u64> for Numbers {
    fn from(next: u64) -> Self {
        Self { next }
    }
}

/// A place so much earlier that numbers after this one are right.
#[must_use]
pub fn run_up(to: EntryId) -> EntryId {
    EntryId { ms: to.ms.saturating_sub(RUN_UP.as_millis() as u64), seq: 0 }.before()
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow)]
    did: Cow<'a, str>,
    time_us: u64,
    #[serde(borrow)]
    commit: Option<Commit<'a>>,
    #[serde(borrow)]
    identity: Option<&'a RawValue>,
    #[serde(borrow)]
    account: Option<&'a RawValue>,
}

#[derive(Deserialize, Serialize)]
struct Commit<'a> {
    #[serde(borrow)]
    rev: Cow<'a, str>,
    #[serde(borrow)]
    operation: Cow<'a, str>,
    #[serde(borrow)]
    collection: Cow<'a, str>,
    #[serde(borrow)]
    rkey: Cow<'a, str>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    cid: Option<&'a RawValue>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    record: Option<&'a RawValue>,
    #[serde(default, rename = "deadLetter", skip_serializing_if = "std::ops::Not::not")]
    dead_letter: bool,
}

/// A frame of `xrpc.v1.json`.
#[derive(Serialize)]
#[serde(tag = "$type", rename_all = "lowercase")]
enum Frame<'a, P> {
    Message { payload: P },
    Error { error: &'a str, message: &'a str },
}

#[derive(Serialize)]
struct Payload<'a> {
    #[serde(rename = "$type")]
    name: String,
    did: Cow<'a, str>,
    seq: u64,
    time: String,
    #[serde(flatten)]
    commit: Option<Commit<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    account: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct Info<'a> {
    #[serde(rename = "$type")]
    kind: String,
    name: &'a str,
    message: &'a str,
}

/// A message with this number.
///
/// # Errors
///
/// The message is not one of ours.
pub fn frame(message: &Message, seq: u64) -> Result<Bytes, serde_json::Error> {
    let Event { did, time_us, commit, identity, account } = serde_json::from_slice(&message.text)?;
    let (name, time) = (format!("{NAME}#{}", message.kind), rfc3339(time_us));
    let payload = Payload { name, did, seq, time, commit, identity, account };
    Ok(serde_json::to_vec(&Frame::Message { payload })?.into())
}

/// A notice about the stream, which has no number: `OutdatedCursor` or `FutureCursor`.
///
/// # Errors
///
/// Never.
pub fn info(name: &str, message: &str) -> Result<Bytes, serde_json::Error> {
    let payload = Info { kind: format!("{NAME}#info"), name, message };
    Ok(serde_json::to_vec(&Frame::Message { payload })?.into())
}

/// The last frame before the end.
///
/// # Errors
///
/// Never.
pub fn error(error: &str, message: &str) -> Result<Bytes, serde_json::Error> {
    let frame: Frame<'_, ()> = Frame::Error { error, message };
    Ok(serde_json::to_vec(&frame)?.into())
}

/// With six digits after the point, as the format has it.
fn rfc3339(time_us: u64) -> String {
    const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(6));
    let time = i64::try_from(time_us).ok().and_then(|us| Timestamp::from_microsecond(us).ok());
    PRINTER.timestamp_to_string(&time.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Entry;
    use crate::output::jetstream::{Forbidden, messages};
    use crate::stream::settled::Settled;

    #[test]
    fn numbers_grow_and_do_not_depend_on_where_one_begins() {
        // A burst of 2,500 operations in one millisecond reaches into the third one.
        let mut entries: Vec<(u64, u64, usize)> = (0..50).map(|seq| (1000, seq, 50)).collect();
        entries.extend([(1001, 0, 1), (1002, 0, 0), (1003, 0, 3), (2000, 7, 2)]);
        let next = |numbers: &mut Numbers, (ms, seq, count)| numbers.of(EntryId { ms, seq }, count);
        let of = |entries: &[(u64, u64, usize)]| {
            let mut numbers = Numbers::default();
            entries.iter().map(|entry| next(&mut numbers, *entry)).collect::<Vec<_>>()
        };
        let all = of(&entries);
        assert_eq!(all[0], 1_000_000..1_000_050);
        assert_eq!(all[49], 1_002_450..1_002_500);
        assert_eq!(
            all[50..52],
            [1_002_500..1_002_501, 1_002_501..1_002_502],
            "an entry without operations has a place, too"
        );
        assert_eq!(all[52..], [1_003_000..1_003_003, 2_000_007..2_000_009]);
        assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert_eq!(of(&entries[52..]), all[52..]);
        let mut later = Numbers::from(all[49].end);
        assert_eq!(next(&mut later, entries[50]), all[50]);
    }

    #[test]
    fn a_message_is_written_as_version_2_has_it() {
        let text = |event_type: &str, data: &str| {
            let id = EntryId { ms: 1_795_234_668_730, seq: 4 };
            let entry = Entry { id, event_type: event_type.into(), data: data.into(), seq: "17".into() };
            let (messages, _) =
                messages(&Settled { entry, refused: vec!["a.b/2".into()] }, &Forbidden::default()).unwrap();
            let frames: Vec<String> = messages
                .iter()
                .map(|message| String::from_utf8(frame(message, 99).unwrap().into()).unwrap())
                .collect();
            frames.join("\n")
        };
        let commit = r#"{"repo":"did:plc:a","rev":"3l3qo2vutsw2b","ops":[
            {"action":"create","path":"a.b/1","cid":"bafy","record":{"text":"\u00e4\"\\"}},
            {"action":"delete","path":"a.b/2"}]}"#;
        assert_eq!(
            text("commit", commit),
            concat!(
                r#"{"$type":"message","payload":{"$type":"network.bsky.jetstream.subscribeEvents#commit","did":"did:plc:a","seq":99,"#,
                r#""time":"2026-11-21T04:17:48.730004Z","rev":"3l3qo2vutsw2b","operation":"create","collection":"a.b","rkey":"1","#,
                r#""cid":"bafy","record":{"text":"\u00e4\"\\"}}}"#,
                "\n",
                r#"{"$type":"message","payload":{"$type":"network.bsky.jetstream.subscribeEvents#commit","did":"did:plc:a","seq":99,"#,
                r#""time":"2026-11-21T04:17:48.730004Z","rev":"3l3qo2vutsw2b","operation":"delete","collection":"a.b","rkey":"2","#,
                r#""deadLetter":true}}"#
            )
        );
        let identity = r#"{"did":"did:plc:a","handle":"a.test","time":"2024-09-05T06:11:04.870Z"}"#;
        assert_eq!(
            text("identity", identity),
            concat!(
                r#"{"$type":"message","payload":{"$type":"network.bsky.jetstream.subscribeEvents#identity","did":"did:plc:a","seq":99,"#,
                r#""time":"2026-11-21T04:17:48.730004Z","identity":{"did":"did:plc:a","handle":"a.test","seq":17,"#,
                r#""time":"2024-09-05T06:11:04.870Z"}}}"#
            )
        );
        let said = error("ConsumerTooSlow", "why").unwrap();
        assert_eq!(said, r#"{"$type":"error","error":"ConsumerTooSlow","message":"why"}"#);
        let said = info("OutdatedCursor", "why").unwrap();
        let payload = r#"{"$type":"network.bsky.jetstream.subscribeEvents#info","name":"OutdatedCursor","message":"why"}"#;
        assert_eq!(said, format!(r#"{{"$type":"message","payload":{payload}}}"#));
    }
}
