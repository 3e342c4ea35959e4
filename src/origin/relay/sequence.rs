//! Whether a sequence number can follow the ones before it.
//!
//! A relay that starts over, or another one behind the same name, counts from elsewhere, and may ignore a cursor that it
//! does not know. Several numbers far from the last one are such a reset; a single one is an error, and must not become
//! the cursor.

use std::time::Duration;

use tokio::time::Instant;

/// The greatest number that everything in the chain can represent exactly (Lua uses doubles).
const MAX: i64 = (1 << 53) - 1;
/// Further back than any relay repeats events.
const FAR_BACK: i64 = 10_000;
/// Further ahead than a relay advances in weeks.
const FAR_AHEAD: i64 = 1_000_000_000;
/// This many out-of-range numbers in a row are a reset.
const IN_A_ROW: usize = 3;
/// Fewer are a reset, too, if nothing else arrives for this long.
pub const QUIET: Duration = Duration::from_secs(2);
/// Numbers a little below the last one are repeats, unless it would take them much longer than this to reach it.
const CATCH_UP: Duration = Duration::from_secs(5);

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It follows, or is a repeat.
    Follows,
    /// Its number is not a position: the frame is refused.
    Impossible,
    /// Its number is out of range. The frame is set aside until more is known.
    Elsewhere,
    /// The numbering has restarted.
    Reset,
}

/// The sequence numbers of one connection.
#[derive(Debug)]
pub struct Sequence {
    /// The greatest number accepted.
    high: Option<i64>,
    /// The last out-of-range number, and how many there were in a row.
    elsewhere: Option<(i64, usize)>,
    /// Since when all numbers have been below the greatest, and the first of them.
    low: Option<(Instant, i64)>,
}

impl Sequence {
    /// Starts after the position that the relay was asked for.
    #[must_use]
    pub fn new(from: Option<i64>) -> Self {
        Self { high: from.filter(|from| *from > 0), elsewhere: None, low: None }
    }

    /// Judges the next number.
    pub fn judge(&mut self, seq: i64, now: Instant) -> Place {
        if !(0..=MAX).contains(&seq) {
            return Place::Impossible;
        }
        let Some(high) = self.high else {
            self.high = Some(seq);
            return Place::Follows;
        };
        if seq < high - FAR_BACK || seq > high.saturating_add(FAR_AHEAD) {
            let row = match self.elsewhere {
                Some((last, row)) if (seq - last).abs() < FAR_BACK => row + 1,
                _ => 1,
            };
            self.elsewhere = Some((seq, row));
            return if row >= IN_A_ROW { Place::Reset } else { Place::Elsewhere };
        }
        self.elsewhere = None;
        if seq >= high {
            self.high = Some(seq);
            self.low = None;
            return Place::Follows;
        }
        let (since, first) = *self.low.get_or_insert((now, seq));
        if now.duration_since(since) > CATCH_UP && high - seq > 20 * (seq - first).max(1) {
            return Place::Reset;
        }
        Place::Follows
    }

    /// How many frames are set aside.
    #[must_use]
    pub fn set_aside(&self) -> usize {
        self.elsewhere.map_or(0, |(_, row)| row)
    }

    /// The greatest number accepted.
    #[must_use]
    pub fn high(&self) -> Option<i64> {
        self.high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(sequence: &mut Sequence, numbers: &[i64]) -> Vec<Place> {
        let now = Instant::now();
        numbers.iter().map(|seq| sequence.judge(*seq, now)).collect()
    }

    #[test]
    fn repeats_and_forward_jumps_follow() {
        let mut sequence = Sequence::new(Some(5_000));
        assert_eq!(judge(&mut sequence, &[5_000, 4_990, 5_001, 5_900_000, 5_900_001]), [Place::Follows; 5]);
    }

    #[test]
    fn numbers_that_stay_far_below_or_above_are_a_reset() {
        use Place::{Elsewhere, Reset};
        for start in [1, 90_000_000_000_000] {
            let mut sequence = Sequence::new(Some(9_000_000_000));
            assert_eq!(
                judge(&mut sequence, &[start, start + 1, start + 2]),
                [Elsewhere, Elsewhere, Reset],
                "{start}"
            );
        }
    }

    #[test]
    fn a_single_absurd_number_is_not_a_reset() {
        let mut sequence = Sequence::new(Some(100));
        assert_eq!(
            judge(&mut sequence, &[i64::MAX, -1, 1 << 50, 101, 102]),
            [Place::Impossible, Place::Impossible, Place::Elsewhere, Place::Follows, Place::Follows]
        );
        assert_eq!(sequence.high(), Some(102));
    }

    #[test]
    fn low_numbers_that_do_not_catch_up_are_a_reset() {
        let mut sequence = Sequence::new(Some(5_000));
        let now = Instant::now();
        assert_eq!(sequence.judge(1, now), Place::Follows);
        assert_eq!(sequence.judge(2, now + Duration::from_secs(6)), Place::Reset);
        // A relay that repeats earlier events catches up soon.
        let mut sequence = Sequence::new(Some(5_000));
        assert_eq!(sequence.judge(1_000, now), Place::Follows);
        assert_eq!(sequence.judge(3_000, now + Duration::from_secs(6)), Place::Follows);
    }
}
