//! Datetimes of the AT Protocol (<https://atproto.com/specs/lexicon#datetime>): what RFC 3339 and ISO 8601 have in common,
//! with a time zone.

use jiff::civil::{Date, date};

use crate::event::Micros;

/// The time in UTC, truncated to microseconds; `None` if the text is not a datetime.
#[must_use]
pub fn parse(text: &str) -> Option<Micros> {
    // YYYY-MM-DDTHH:MM:SS, then a fraction of any length, then Z or an offset.
    let (fixed, rest) = text.split_at_checked(19)?;
    let bytes = fixed.as_bytes();
    let separators = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if separators.iter().any(|&(at, byte)| bytes[at] != byte) {
        return None;
    }
    let number = |from: usize, to: usize| digits(fixed.get(from..to)?);
    let day = Date::new(
        i16::try_from(number(0, 4)?).ok()?,
        i8::try_from(number(5, 7)?).ok()?,
        i8::try_from(number(8, 10)?).ok()?,
    )
    .ok()?;
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    // A leap second counts as the last second of its minute.
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (micros, zone) = match rest.strip_prefix('.') {
        None => (0, rest),
        Some(rest) => {
            let length = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (fraction, zone) = rest.split_at(length);
            // PostgreSQL keeps microseconds.
            let micros = format!("{:0<6}", fraction.get(..6).unwrap_or(fraction));
            if length == 0 {
                return None;
            }
            (digits(&micros)?, zone)
        }
    };
    let days = day.duration_since(date(1970, 1, 1)).as_hours() / 24;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second.min(59) - offset(zone)?;
    // The protocol has no dates before the year 0.
    (seconds >= YEAR_ZERO).then_some(Micros(seconds * 1_000_000 + micros))
}

/// 0000-01-01T00:00:00Z in Unix time.
const YEAR_ZERO: i64 = -62_167_219_200;

/// Seconds east of UTC; "-00:00" is forbidden.
fn offset(zone: &str) -> Option<i64> {
    if zone == "Z" {
        return Some(0);
    }
    let sign = match zone.as_bytes().first()? {
        b'+' => 1,
        b'-' if zone != "-00:00" => -1,
        _ => return None,
    };
    let (hours, minutes) = zone.get(1..)?.split_once(':')?;
    if hours.len() != 2 || minutes.len() != 2 {
        return None;
    }
    let (hours, minutes) = (digits(hours)?, digits(minutes)?);
    (hours < 24 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
}

fn digits(text: &str) -> Option<i64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_converted_to_utc_and_invalid_dates_give_none() {
        let utc = parse("2031-01-01T00:00:00.000Z").unwrap();
        assert_eq!(parse("2031-01-01T05:30:00.000+05:30"), Some(utc));
        assert_eq!(parse("1985-04-12T23:20:50.123456789123Z").unwrap().0, 482_196_050_123_456);
        assert_eq!(parse("1969-12-31T23:59:59.9999999Z"), Some(Micros(-1)));
        assert_eq!(parse("2026-11-21T04:17:51Z").unwrap().0, 1_795_234_671_000_000);
        assert_eq!(parse("9999-12-31T23:59:59.5Z").unwrap().0, 253_402_300_799_500_000);
        assert_eq!(parse("1970-01-01T00:00:00.1Z"), Some(Micros(100_000)));
        for bad in [
            "yesterday",
            "",
            "2026-11-21",
            "2026-11-21T04:17:51",
            "2026-13-21T04:17:51Z",
            "2026-11-21 04:17:51Z",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        for bad in [
            "2026-02-30T00:00:00Z",
            "2026-11-21T24:00:00Z",
            "0000-01-01T00:00:00+01:00",
            "2026-11-21T04:17:51.Z",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(parse("2026-11-21T04:17:51-00:00"), None);
        assert_eq!(parse("ü026-11-21T04:17:51Zaaaaaaaaa"), None);
    }
    #[test]
    fn the_official_vectors_hold() {
        let lines = |vectors: &'static str| {
            vectors.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect::<Vec<_>>()
        };
        let valid = lines(include_str!("../../tests/fixtures/interop/syntax/datetime_syntax_valid.txt"));
        let invalid = lines(include_str!("../../tests/fixtures/interop/syntax/datetime_syntax_invalid.txt"));
        let impossible =
            lines(include_str!("../../tests/fixtures/interop/syntax/datetime_parse_invalid.txt"));
        assert!(valid.len() > 20 && invalid.len() > 20 && impossible.len() > 5);
        for text in valid {
            assert!(parse(text).is_some(), "{text}");
        }
        for text in invalid.into_iter().chain(impossible) {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
