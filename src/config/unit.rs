//! Numbers, durations and sizes, with their units.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use super::read::Wrong;

/// The mark of Redis memory at which the reader slows down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryMark {
    /// A percentage of Redis's `maxmemory`, 1 to 80.
    Percent(u8),
    /// A size in bytes.
    Bytes(u64),
}

impl MemoryMark {
    /// When its memory is full, Redis refuses writes that everything else needs to proceed, so the mark must leave
    /// room.
    const MAX_PERCENT: u8 = 80;

    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        let Some(percent) = text.strip_suffix('%') else {
            // Redis itself needs some megabytes: with a lower mark, the reader would never read.
            return parse_size(text, 4 << 20).map(Self::Bytes);
        };
        match percent.trim().parse::<u8>() {
            Ok(percent @ 1..=Self::MAX_PERCENT) => Ok(Self::Percent(percent)),
            Ok(81..=100) => Err(Wrong::new(
                "is more than 80%: the pipelines need the rest of Redis's memory to continue when the reader stops",
                "write 75%",
            )),
            _ => Err(Wrong::new("is not a percentage from 1% to 80%", "write 75%, or a size such as 512MiB")),
        }
    }
}

impl MemoryMark {
    /// The mark in bytes, for a server with this limit; `None` if there is none.
    #[must_use]
    pub fn bytes(self, max_memory: u64) -> Option<u64> {
        let bytes = match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => max_memory / 100 * u64::from(percent),
        };
        (bytes > 0).then_some(bytes)
    }
}

impl fmt::Display for MemoryMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Bytes(bytes) => f.write_str(&format_size(*bytes)),
        }
    }
}

/// `STREAM_KEEP`: what stays in the stream after it was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKeep {
    /// What is not older than this.
    Time(Duration),
    /// About so many bytes.
    Bytes(u64),
}

impl StreamKeep {
    /// With `SUBSCRIBE=on`, unless something else is set.
    pub(super) const FOR_SUBSCRIBERS: Self = Self::Time(Duration::from_mins(10));

    /// `None` for nothing.
    pub(super) fn parse(text: &str) -> Result<Option<Self>, Wrong> {
        if text == "0" {
            return Ok(None);
        }
        let wrong =
            |wrong: Wrong| Wrong::new(wrong.what, "write a time such as 1h, a size such as 2GiB, or 0");
        if text.ends_with(['B', 'b']) {
            return parse_size(text, 1 << 20).map(|bytes| Some(Self::Bytes(bytes))).map_err(wrong);
        }
        match parse_duration(text).map_err(wrong)? {
            time if time < Duration::from_secs(10) => {
                Err(wrong(Wrong::new("is less than 10s: subscribers that reconnect would miss events", "")))
            }
            time => Ok(Some(Self::Time(time))),
        }
    }
}

impl fmt::Display for StreamKeep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(time) => f.write_str(&duration(time)),
            Self::Bytes(bytes) => f.write_str(&format_size(*bytes)),
        }
    }
}

pub(super) fn yes_or_no(text: &str) -> Result<bool, Wrong> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err(Wrong::new("is neither yes nor no", "write true or false")),
    }
}

/// A whole number in this range.
pub(super) fn whole<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, Wrong>
where
    T: FromStr + PartialOrd + fmt::Display,
{
    move |text| {
        let (low, high) = (range.start(), range.end());
        match text.parse::<T>() {
            Ok(number) if range.contains(&number) => Ok(number),
            Ok(_) => Err(Wrong::new("is out of range", format!("write a whole number from {low} to {high}"))),
            Err(_) => {
                Err(Wrong::new("is not a usable whole number", format!("write one from {low} to {high}")))
            }
        }
    }
}

/// Upper bound for any duration: implausibly long, yet safe to add to an `Instant`.
const LONGEST: Duration = Duration::from_hours(24 * 3650);

/// Zero needs no unit; every caller decides what it means.
fn parse_duration(text: &str) -> Result<Duration, Wrong> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    if text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(Wrong::new("has no unit", format!("{text} what? write {text}s, or use m, h or d")));
    }
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= LONGEST => Ok(duration),
        Ok(_) => Err(Wrong::new("is longer than ten years", "write a shorter time, such as 30d")),
        Err(_) => {
            Err(Wrong::new("is not a duration", "write a number and a unit, such as 30s, 5m, 24h or 30d"))
        }
    }
}

pub(super) fn claim_idle(text: &str) -> Result<Duration, Wrong> {
    match parse_duration(text)? {
        idle if idle < Duration::from_secs(10) => Err(Wrong::new(
            "is less than 10s: a pipeline marks the entries that it works on at least every 3 s, so a \
             shorter time could take over work that is still running",
            "write 10s or more",
        )),
        idle => Ok(idle),
    }
}

pub(super) fn drain_timeout(text: &str) -> Result<Duration, Wrong> {
    match parse_duration(text)? {
        Duration::ZERO => Err(Wrong::new("would cut off work in progress at every stop", "write 25s")),
        timeout => Ok(timeout),
    }
}

pub(super) fn tombstone_retention(text: &str) -> Result<Duration, Wrong> {
    match parse_duration(text)? {
        Duration::ZERO => Err(Wrong::new("would let a late create bring a deleted record back", "write 30d")),
        retention => Ok(retention),
    }
}

pub(super) fn statement_timeout(text: &str) -> Result<Duration, Wrong> {
    let right = "write a time from 100ms to 24h";
    match parse_duration(text)? {
        Duration::ZERO => {
            Err(Wrong::new("means no limit in PostgreSQL: a stuck statement would block its pipeline", right))
        }
        timeout if timeout < Duration::from_millis(100) => {
            Err(Wrong::new("is so short that ordinary work would be cancelled and retried endlessly", right))
        }
        timeout if timeout > Duration::from_hours(24) => Err(Wrong::new("is longer than 24h", right)),
        timeout => Ok(timeout),
    }
}

pub(super) fn results(text: &str) -> Result<Duration, Wrong> {
    match parse_duration(text)? {
        time if time < Duration::from_mins(1) => {
            Err(Wrong::new("is so short that a message that comes twice would be handled twice", "write 30d"))
        }
        time => Ok(time),
    }
}

pub(super) fn out_max_lag(text: &str) -> Result<Duration, Wrong> {
    match parse_duration(text)? {
        lag if lag < Duration::from_secs(10) => Err(Wrong::new(
            "is so short that a brief delay would make an output skip entries",
            "write 10s or more, or hold",
        )),
        lag => Ok(lag),
    }
}

pub(super) fn notify_within(text: &str) -> Result<Option<Duration>, Wrong> {
    if text.eq_ignore_ascii_case("off") {
        return Ok(None);
    }
    match parse_duration(text)? {
        within if within < Duration::from_mins(1) => Err(Wrong::new(
            "is so short that a moment of waiting would cost notifications",
            "write 7d, or off; NOTIFICATIONS=false writes none at all",
        )),
        within => Ok(Some(within)),
    }
}

pub(super) fn idle_timeout(text: &str) -> Result<Option<Duration>, Wrong> {
    if text.eq_ignore_ascii_case("off") {
        return Ok(None);
    }
    match parse_duration(text)? {
        Duration::ZERO => Ok(None),
        timeout if timeout < Duration::from_secs(1) => {
            Err(Wrong::new("is so short that the reader would reconnect endlessly", "write 60s, or off"))
        }
        timeout => Ok(Some(timeout)),
    }
}

const SIZE_UNITS: [(&str, u64); 7] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("B", 1),
];

/// A pebibyte: more than any Redis holds, and far from where a sum of sizes would overflow.
const LARGEST: u64 = 1 << 50;

/// A size of at least `least` bytes.
pub(super) fn size_from(least: u64) -> impl Fn(&str) -> Result<u64, Wrong> {
    move |text| parse_size(text, least)
}

pub(super) fn parse_size(text: &str, least: u64) -> Result<u64, Wrong> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if unit.is_empty() && digits > 0 {
        return Err(Wrong::new("has no unit", format!("{text} what? write {text}B or {text}MiB")));
    }
    let size = SIZE_UNITS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(unit.trim()))
        .and_then(|(_, bytes)| number.parse::<u64>().ok()?.checked_mul(*bytes));
    match size {
        Some(size) if size < least => {
            Err(Wrong::new("is too small", format!("write {} or more", format_size(least))))
        }
        Some(size) if size <= LARGEST => Ok(size),
        Some(_) => Err(Wrong::new("is too large", "write a size such as 512MiB")),
        None => Err(Wrong::new(
            "is not a size",
            "write a whole number and B, KiB, MiB, GiB, KB, MB or GB, such as 512MiB",
        )),
    }
}

/// Shows a switch.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "every setting is shown by reference")]
pub(super) fn on_off(on: &bool) -> String {
    if *on { "on" } else { "off" }.to_owned()
}

/// In the format of [`humantime`].
pub(super) fn duration(duration: &Duration) -> String {
    humantime::format_duration(*duration).to_string()
}

#[expect(clippy::ref_option, reason = "every setting is shown by reference")]
pub(super) fn or_off(time: &Option<Duration>) -> String {
    time.as_ref().map_or_else(|| "off".to_owned(), duration)
}

#[expect(clippy::ref_option, reason = "every setting is shown by reference")]
pub(super) fn or_hold(time: &Option<Duration>) -> String {
    time.as_ref().map_or_else(|| "hold".to_owned(), duration)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "every setting is shown by reference")]
pub(super) fn size(bytes: &u64) -> String {
    format_size(*bytes)
}

/// In the largest binary unit that needs no fraction.
pub(super) fn format_size(bytes: u64) -> String {
    let unit = SIZE_UNITS[..3].iter().rev().find(|(_, unit)| bytes > 0 && bytes.is_multiple_of(*unit));
    match unit {
        Some((name, unit)) => format!("{}{name}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

/// `None` when it is off.
pub(super) fn http_addr(text: &str) -> Result<Option<SocketAddr>, Wrong> {
    if text.eq_ignore_ascii_case("off") {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        Wrong::new(
            "is not an IP address with a port",
            "write 127.0.0.1:9464, 0.0.0.0:9464 for all interfaces, or off",
        )
    })
}
