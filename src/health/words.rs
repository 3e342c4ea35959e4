//! The words for states, numbers and times.

use crate::status::State;

/// The reason for a state, capitalised.
pub(super) fn reason(state: &State) -> String {
    match state {
        State::WaitingForRedis { reason }
        | State::WaitingForPostgres { reason }
        | State::WaitingForRelay { reason }
        | State::WaitingForRoom { reason }
        | State::WaitingForBroker { reason }
        | State::WaitingForLease { reason }
        | State::Halted { reason } => upper(reason),
        State::Starting | State::Running | State::Paused | State::Stopped => String::new(),
    }
}

/// A state in the words shown next to a part.
#[must_use]
pub fn state(state: &State) -> &'static str {
    match state {
        State::Starting => "starting",
        State::Running => "running",
        State::WaitingForRedis { .. } => "waiting for Redis",
        State::WaitingForPostgres { .. } => "waiting for PostgreSQL",
        State::WaitingForRelay { .. } => "waiting for the relay",
        State::WaitingForRoom { .. } => "waiting for room",
        State::WaitingForBroker { .. } => "waiting for the broker",
        State::WaitingForLease { .. } => "waiting for the lease",
        State::Paused => "paused manually",
        State::Halted { .. } => "needs operator action",
        State::Stopped => "ended",
    }
}

pub(super) fn upper(text: &str) -> String {
    let mut characters = text.chars();
    characters
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().collect::<String>() + characters.as_str())
}

pub(super) fn entries_wait(count: u64) -> String {
    if count == 1 {
        "1 entry waiting".to_owned()
    } else {
        format!("{} entries waiting", thousands(count as f64))
    }
}

/// 1,234,567; below ten with one decimal.
pub(super) fn thousands(number: f64) -> String {
    if number > 0.0 && number < 9.95 {
        let text = format!("{number:.1}");
        return text.strip_suffix(".0").map_or(text.clone(), str::to_owned);
    }
    let digits = format!("{:.0}", number.max(0.0));
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub(super) fn milliseconds(ms: f64) -> String {
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else if ms < 1000.0 {
        format!("{ms:.0} ms")
    } else if ms < 9950.0 {
        format!("{:.1} s", ms / 1000.0)
    } else {
        duration(ms / 1000.0)
    }
}

/// The two largest units.
pub(super) fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let two = |large: u64, unit: &str, small: u64, part: &str| match small {
        0 => format!("{large} {unit}"),
        small => format!("{large} {unit} {small} {part}"),
    };
    match seconds {
        0 => "less than a second".to_owned(),
        1..60 => format!("{seconds} s"),
        60..3600 => two(seconds / 60, "min", seconds % 60, "s"),
        3600..86_400 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => two(seconds / 86_400, "d", seconds % 86_400 / 3600, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_durations_are_human_readable() {
        assert_eq!(thousands(0.0), "0");
        assert_eq!(thousands(2143.4), "2,143");
        assert_eq!(thousands(1_234_567.0), "1,234,567");
        assert_eq!(thousands(3.0), "3");
        assert_eq!(thousands(3.24), "3.2");
        assert_eq!(duration(12.9), "12 s");
        assert_eq!(duration(185.0), "3 min 5 s");
        assert_eq!(duration(7200.0), "2 h");
        assert_eq!(duration(100_000.0), "1 d 3 h");
    }
}
