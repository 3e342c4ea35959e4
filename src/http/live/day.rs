//! The page's history: one point per second, and the last day by the minute.

use std::collections::VecDeque;

/// A day.
const MINUTES: usize = 1_440;

/// The columns of a history point.
pub const COLUMNS: [&str; 10] = [
    "time_ms",
    "events_per_second",
    "frames_per_second",
    "p50_ms",
    "p99_ms",
    "waiting",
    "pending",
    "oldest_seconds",
    "memory_bytes",
    "level",
];

/// Values in the order of [`COLUMNS`].
pub type Point = [Option<f64>; COLUMNS.len()];

/// Columns averaged over a minute. The others keep the maximum, so that the worst second stays visible.
const MEANS: [&str; 3] = ["events_per_second", "frames_per_second", "p50_ms"];

/// The last day, one point per minute: at most about 300 kB.
#[derive(Debug, Default)]
pub struct Day {
    minutes: VecDeque<Point>,
    /// The points of the current minute.
    minute: Vec<Point>,
}

impl Day {
    /// Adds a second's point.
    pub fn add(&mut self, point: Point) {
        let minute = |point: &Point| point[0].map(|ms| (ms / 60_000.0).floor());
        if self.minute.first().is_some_and(|first| minute(first) != minute(&point)) {
            if self.minutes.len() == MINUTES {
                self.minutes.pop_front();
            }
            self.minutes.extend(one(&self.minute));
            self.minute.clear();
        }
        // Ends the minute even if the clock stands still.
        if self.minute.len() < 120 {
            self.minute.push(point);
        }
    }

    /// Every minute, including the current one so far.
    pub fn points(&self) -> Vec<Point> {
        self.minutes.iter().copied().chain(one(&self.minute)).collect()
    }
}

/// Merges points into one, at the time of the last.
fn one(points: &[Point]) -> Option<Point> {
    let mut whole = *points.last()?;
    for (place, name) in COLUMNS.iter().enumerate().skip(1) {
        let known = move || points.iter().filter_map(move |point| point[place]);
        let most = known().reduce(f64::max);
        whole[place] = if MEANS.contains(name) {
            most.map(|_| tidy(known().sum::<f64>() / known().count() as f64))
        } else {
            most
        };
    }
    Some(whole)
}

/// Three digits are enough to read, and shorter to send.
pub fn tidy(number: f64) -> f64 {
    let unit = if number.abs() >= 100.0 { 1.0 } else { 100.0 };
    (number * unit).round() / unit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(second: u64, rate: f64, p99: Option<f64>) -> Point {
        let mut point: Point = [None; COLUMNS.len()];
        (point[0], point[1], point[4]) = (Some(second as f64 * 1000.0), Some(rate), p99);
        point
    }

    #[test]
    fn a_minute_keeps_its_mean_rate_and_worst_latency() {
        let mut day = Day::default();
        for second in 60..150 {
            let p99 = (second == 70).then_some(900.0);
            day.add(point(second, if second < 90 { 100.0 } else { 300.0 }, p99));
        }
        // The first minute is complete, the second is not.
        assert_eq!(day.points(), [point(119, 200.0, Some(900.0)), point(149, 300.0, None)]);
    }

    #[test]
    fn the_history_of_a_day_is_bounded() {
        let mut day = Day::default();
        for minute in 0..3_000 {
            day.add(point(minute * 60, minute as f64, None));
        }
        let points = day.points();
        assert_eq!(points.len(), MINUTES + 1);
        assert_eq!(points.last(), Some(&point(2_999 * 60, 2_999.0, None)));
        for _ in 0..1_000 {
            day.add(point(3_000 * 60, 1.0, None));
        }
        assert!(day.minute.len() <= 120);
        assert!(Day::default().points().is_empty());
    }
}
