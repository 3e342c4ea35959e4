//! Datetimes of the AT Protocol (<https://atproto.com/specs/lexicon#datetime>): RFC 3339 with a time zone.

use crate::event::Micros;

/// The moment, in UTC, cut to microseconds; `None` when the text is no datetime.
#[must_use]
pub fn parse(text: &str) -> Option<Micros> {
    let bytes = text.as_bytes();
    // RFC 3339 wants all of these in their places; jiff takes looser forms, which the protocol does not.
    if bytes.len() < 20 || bytes[4] != b'-' || bytes[10] != b'T' || !bytes[..4].iter().all(u8::is_ascii_digit)
    {
        return None;
    }
    let fraction = text.get(19..)?;
    let digits =
        fraction.strip_prefix('.').map_or(0, |rest| rest.bytes().take_while(u8::is_ascii_digit).count());
    // Any number of digits is allowed; nine are nanoseconds and more than PostgreSQL keeps.
    let timestamp: jiff::Timestamp = if digits > 9 {
        format!("{}{}", text.get(..29)?, text.get(20 + digits..)?).parse().ok()?
    } else {
        text.parse().ok()?
    };
    // Nanoseconds, so that times before 1970 are cut downwards like all others.
    let micros = timestamp.as_nanosecond().div_euclid(1000);
    i64::try_from(micros).ok().map(Micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_become_utc_and_nonsense_nothing() {
        let utc = parse("2031-01-01T00:00:00.000Z").unwrap();
        assert_eq!(parse("2031-01-01T05:30:00.000+05:30"), Some(utc));
        assert_eq!(parse("1985-04-12T23:20:50.123456789123Z").unwrap().0, 482_196_050_123_456);
        assert_eq!(parse("1969-12-31T23:59:59.9999999Z"), Some(Micros(-1)));
        assert_eq!(parse("2026-11-21T04:17:51Z").unwrap().0, 1_795_234_671_000_000);
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
    }
}
