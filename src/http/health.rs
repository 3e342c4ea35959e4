//! The state of the process in one sentence, for a reader who has never seen it.

use serde::Serialize;

use crate::status::{PipelineStatus, ReaderStatus, State};
use crate::stream::noted::Refill;

/// Entries that wait less long than this are on their way, not waiting.
const BEHIND_SECONDS: f64 = 5.0;
/// A backlog with no acknowledgement for this long counts as stalled.
const NO_PROGRESS_MS: u64 = 30_000;
/// The stream is looked at every second; when that stops, Redis is not answering.
const LOOK_IS_OLD_MS: u64 = 4_000;
/// An event that takes longer than this to become durable is late.
const SLOW_MS: f64 = 5_000.0;
/// A reader that has received nothing for this long, and was not steadily connected either, is stuck.
pub const NOTHING_IN_MS: u64 = 60_000;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Well,
    /// Running, but not keeping up.
    Busy,
    /// Paused by an operator.
    Paused,
    /// A server is down; work resumes by itself.
    Waiting,
    /// Operator action needed.
    Bad,
}

/// The sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Health {
    /// How bad it is.
    pub level: Level,
    /// The topic: while it stays the same, only the sentence's figures change.
    pub about: &'static str,
    /// In words.
    pub sentence: String,
    /// Further detail; empty for none.
    pub detail: String,
}

/// The facts behind the sentence.
#[derive(Debug, Default)]
pub struct Facts<'a> {
    /// Unix milliseconds.
    pub now_ms: u64,
    /// The pipelines of this process.
    pub pipelines: &'a [PipelineStatus],
    /// Its reader.
    pub reader: Option<&'a ReaderStatus>,
    /// The process is about to end.
    pub draining: bool,
    /// When the stream was last looked at.
    pub look_ms: Option<u64>,
    /// Since when the process runs.
    pub started_ms: u64,
    /// When anything was last acknowledged.
    pub last_ack_ms: u64,
    /// Entries not yet delivered; `None` when unknown.
    pub waiting: Option<u64>,
    /// Age of the oldest entry that is not acknowledged.
    pub oldest_seconds: f64,
    /// Events finished per second.
    pub rate: f64,
    /// Frames from the relay per second.
    pub frames: f64,
    /// How many fewer wait than a second before.
    pub shrinking: f64,
    /// 99 of 100 events are durable within this, in milliseconds.
    pub p99_ms: Option<f64>,
    /// The refill in progress, because PostgreSQL lost events.
    pub refill: Option<Refill>,
}

/// The most important statement to make.
#[must_use]
pub fn health(facts: &Facts<'_>) -> Health {
    let say = |level, about, sentence: String, detail: String| Health { level, about, sentence, detail };
    let none = String::new;
    let since = |since_ms: u64| duration(facts.now_ms.saturating_sub(since_ms) as f64 / 1000.0);

    if facts.draining {
        let in_hand: u64 = facts.pipelines.iter().map(|pipeline| pipeline.in_flight).sum();
        let detail = match in_hand {
            0 => none(),
            1 => "1 entry is still in hand.".to_owned(),
            count => format!("{} entries are still in hand.", thousands(count as f64)),
        };
        return say(
            Level::Paused,
            "draining",
            "Draining: finishes the work in hand, then exits.".to_owned(),
            detail,
        );
    }

    // Needs operator action.
    if let Some(halted) = first(facts, |state| matches!(state, State::Halted { .. })) {
        let reason = reason(halted.state);
        return if halted.is_reader {
            say(
                Level::Bad,
                "reader_halted",
                "The reader has stopped; operator action needed.".to_owned(),
                reason,
            )
        } else {
            say(
                Level::Bad,
                "halted",
                format!("Halted {} ago: operator action needed. Nothing is lost.", since(halted.since_ms)),
                reason,
            )
        };
    }

    // Recovers by itself: the pipelines.
    let pipelines = facts.pipelines.len();
    let of_pipelines = |count: usize| match count {
        count if count == pipelines => none(),
        count => format!("{count} of {pipelines} pipelines: "),
    };
    for (about, what, is) in [
        ("postgres", "PostgreSQL", is_waiting_for_postgres as fn(&State) -> bool),
        ("redis", "Redis", is_waiting_for_redis),
    ] {
        let waiting = facts.pipelines.iter().filter(|pipeline| is(&pipeline.state));
        if let Some(oldest) = waiting.clone().min_by_key(|pipeline| pipeline.since_ms) {
            return say(
                Level::Waiting,
                about,
                format!("Waiting for {what} for {}; nothing is lost.", since(oldest.since_ms)),
                of_pipelines(waiting.count()) + &reason(&oldest.state),
            );
        }
    }
    if let Some(reader) = facts.reader.filter(|reader| is_waiting_for_redis(&reader.state)) {
        return say(
            Level::Waiting,
            "redis",
            format!("Waiting for Redis for {}; nothing is lost.", since(reader.since_ms)),
            reason(&reader.state),
        );
    }
    let looked = facts.look_ms.unwrap_or(facts.started_ms);
    if facts.now_ms.saturating_sub(looked) > LOOK_IS_OLD_MS {
        return say(
            Level::Waiting,
            "redis",
            format!("Redis has not answered for {}; nothing is lost.", since(looked)),
            none(),
        );
    }
    if let Some(other) = first(facts, |state| matches!(state, State::WaitingForLease { .. })) {
        let who = if other.is_reader { "Another reader is" } else { "Another process of this name is" };
        return say(
            Level::Waiting,
            "lease",
            format!("{who} at work; waiting for {}.", since(other.since_ms)),
            reason(other.state),
        );
    }

    // Paused by an operator.
    let paused = |state: &State| *state == State::Paused;
    let reader_rests = facts.reader.is_some_and(|reader| paused(&reader.state));
    let resting = facts.pipelines.iter().filter(|pipeline| paused(&pipeline.state)).count();
    if let Some(part) = first(facts, paused) {
        let who = match (reader_rests, resting > 0) {
            (true, true) => "reader and pipelines idle",
            (true, false) if pipelines > 0 => "the reader is idle, the pipelines work",
            (true, false) => "the reader is idle",
            (false, _) if facts.reader.is_some() => "the pipelines are idle, the reader works",
            (false, _) => "the pipelines are idle",
        };
        let detail = match facts.waiting {
            Some(0) | None => "Nothing is lost meanwhile.".to_owned(),
            Some(count) => format!("Nothing is lost meanwhile; {}.", entries_wait(count)),
        };
        return say(
            Level::Paused,
            "paused",
            format!("Paused by an operator {} ago: {who}.", since(part.since_ms)),
            detail,
        );
    }

    if first(facts, |state| *state == State::Starting).is_some() {
        return say(Level::Waiting, "starting", format!("Starting for {}.", since(facts.started_ms)), none());
    }

    // At work: how it goes.
    let idle_since = facts.last_ack_ms.max(facts.started_ms);
    let waits = facts.oldest_seconds > BEHIND_SECONDS && pipelines > 0;
    if waits
        && facts.oldest_seconds * 1000.0 > NO_PROGRESS_MS as f64
        && facts.now_ms.saturating_sub(idle_since) > NO_PROGRESS_MS
    {
        return say(
            Level::Bad,
            "no_progress",
            format!("No progress: entries wait, and nothing was finished for {}.", since(idle_since)),
            format!("The oldest entry has waited for {}.", duration(facts.oldest_seconds)),
        );
    }
    if let Some(reader) = facts.reader.filter(|reader| is_stuck(reader, facts.now_ms)) {
        let detail = reason(&reader.state);
        let sentence = format!("The reader has taken nothing in for {}.", since(reader.taking_in_ms));
        return say(Level::Bad, "reader_stuck", sentence, detail);
    }
    if let Some(refill) = facts.refill {
        return say(
            Level::Waiting,
            "refill",
            format!("Reading again what PostgreSQL had lost, for {}.", since(refill.since_ms)),
            format!(
                "From position {} to {}; until then the tables lack some of it.",
                refill.from, refill.until
            ),
        );
    }
    if let Some(reader) = facts.reader
        && let State::WaitingForRelay { reason } = &reader.state
    {
        let sentence = format!("No relay for {}; received events are safe.", since(reader.since_ms));
        return say(Level::Waiting, "relay", sentence, reason.clone());
    }
    let rate = format!("{} events/s", thousands(facts.rate));
    if let Some(reader) = facts.reader
        && let State::WaitingForRoom { reason } = &reader.state
    {
        let sentence = if pipelines > 0 {
            format!("Busy: {rate}; the reader waits until there is room, nothing is lost.")
        } else {
            "The reader waits until there is room; nothing is lost.".to_owned()
        };
        return say(Level::Busy, "room", sentence, upper(reason));
    }
    if waits {
        let count = facts.waiting.map_or_else(none, |count| format!(", {}", entries_wait(count)));
        let detail = match facts.waiting {
            Some(count) if facts.shrinking > 1.0 => format!(
                "At this pace nothing waits in {}.",
                duration((count as f64 / facts.shrinking).max(1.0))
            ),
            _ => format!("The oldest has waited for {}.", duration(facts.oldest_seconds)),
        };
        let way = if facts.shrinking < -1.0 { "Falling behind" } else { "Catching up" };
        return say(Level::Busy, "behind", format!("{way}: {rate}{count}."), detail);
    }
    if pipelines == 0 {
        let frames = thousands(facts.frames);
        return say(
            Level::Well,
            "well",
            format!("Well: {frames} frames/s from the relay into the stream."),
            none(),
        );
    }
    match facts.p99_ms {
        Some(p99) if facts.rate >= 0.5 && p99 > SLOW_MS => say(
            Level::Busy,
            "behind",
            format!("Slow: {rate}, with high latency."),
            format!("99 of 100 are safe in PostgreSQL within {}.", milliseconds(p99)),
        ),
        Some(p99) if facts.rate >= 0.5 => say(
            Level::Well,
            "well",
            match facts.waiting {
                Some(0) => format!("Well: {rate}, nothing waits."),
                _ => format!("Well: {rate}, nothing waits for long."),
            },
            format!("99 of 100 are safe in PostgreSQL within {}.", milliseconds(p99)),
        ),
        _ => match facts.waiting {
            Some(count) if count > 0 => say(
                Level::Busy,
                "behind",
                format!("Nothing was finished in the last second; {}.", entries_wait(count)),
                format!("The oldest has waited for {}.", duration(facts.oldest_seconds)),
            ),
            _ => say(Level::Well, "well", "Well: no incoming events, nothing waits.".to_owned(), none()),
        },
    }
}

/// Whether the reader receives nothing although it should. Room, Redis and leases have states of their own.
#[must_use]
pub fn is_stuck(reader: &ReaderStatus, now_ms: u64) -> bool {
    matches!(reader.state, State::Starting | State::Running | State::WaitingForRelay { .. })
        && now_ms.saturating_sub(reader.taking_in_ms) > NOTHING_IN_MS
}

/// A part, as far as the sentence is concerned.
struct Part<'a> {
    state: &'a State,
    since_ms: u64,
    is_reader: bool,
}

/// Of the parts in such a state, the one that is so for the longest time.
fn first<'a>(facts: &Facts<'a>, is: impl Fn(&State) -> bool) -> Option<Part<'a>> {
    let pipelines = facts.pipelines.iter().map(|part| Part {
        state: &part.state,
        since_ms: part.since_ms,
        is_reader: false,
    });
    let reader =
        facts.reader.map(|part| Part { state: &part.state, since_ms: part.since_ms, is_reader: true });
    pipelines.chain(reader).filter(|part| is(part.state)).min_by_key(|part| part.since_ms)
}

fn is_waiting_for_postgres(state: &State) -> bool {
    matches!(state, State::WaitingForPostgres { .. })
}

fn is_waiting_for_redis(state: &State) -> bool {
    matches!(state, State::WaitingForRedis { .. })
}

/// The reason in a state, as a sentence begins.
fn reason(state: &State) -> String {
    match state {
        State::WaitingForRedis { reason }
        | State::WaitingForPostgres { reason }
        | State::WaitingForRelay { reason }
        | State::WaitingForRoom { reason }
        | State::WaitingForLease { reason }
        | State::Halted { reason } => upper(reason),
        State::Starting | State::Running | State::Paused | State::Stopped => String::new(),
    }
}

/// A state in the words that stand beside a part.
#[must_use]
pub fn words(state: &State) -> &'static str {
    match state {
        State::Starting => "starting",
        State::Running => "at work",
        State::WaitingForRedis { .. } => "waiting for Redis",
        State::WaitingForPostgres { .. } => "waiting for PostgreSQL",
        State::WaitingForRelay { .. } => "waiting for the relay",
        State::WaitingForRoom { .. } => "waiting for room",
        State::WaitingForLease { .. } => "waiting for the lease",
        State::Paused => "paused manually",
        State::Halted { .. } => "needs operator action",
        State::Stopped => "ended",
    }
}

fn upper(text: &str) -> String {
    let mut characters = text.chars();
    characters
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().collect::<String>() + characters.as_str())
}

fn entries_wait(count: u64) -> String {
    if count == 1 { "1 entry waits".to_owned() } else { format!("{} entries wait", thousands(count as f64)) }
}

/// 1,234,567; below ten with one decimal.
fn thousands(number: f64) -> String {
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

fn milliseconds(ms: f64) -> String {
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
fn duration(seconds: f64) -> String {
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

    fn pipeline(state: State, since_ms: u64) -> PipelineStatus {
        PipelineStatus { state, since_ms, ..PipelineStatus::default() }
    }

    fn facts<'a>(pipelines: &'a [PipelineStatus], reader: Option<&'a ReaderStatus>) -> Facts<'a> {
        Facts {
            now_ms: 100_000,
            look_ms: Some(99_900),
            last_ack_ms: 99_900,
            pipelines,
            reader,
            ..Facts::default()
        }
    }

    #[test]
    fn numbers_and_times_are_written_for_people() {
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

    #[test]
    fn an_outage_is_told_with_its_length_and_its_reason() {
        let pipelines = [
            pipeline(State::WaitingForPostgres { reason: "connection refused".to_owned() }, 88_000),
            pipeline(State::Running, 10_000),
        ];
        let said = health(&facts(&pipelines, None));
        assert_eq!(said.level, Level::Waiting);
        assert_eq!(said.sentence, "Waiting for PostgreSQL for 12 s; nothing is lost.");
        assert_eq!(said.detail, "1 of 2 pipelines: Connection refused");
    }

    #[test]
    fn what_needs_a_hand_comes_before_everything_that_mends_itself() {
        let pipelines = [
            pipeline(State::WaitingForRedis { reason: String::new() }, 1_000),
            pipeline(State::Halted { reason: "no right to write".to_owned() }, 95_000),
            pipeline(State::Paused, 2_000),
        ];
        let said = health(&facts(&pipelines, None));
        assert_eq!((said.level, said.about), (Level::Bad, "halted"));
        assert_eq!(said.detail, "No right to write");
    }

    #[test]
    fn a_pause_says_who_rests() {
        let rests = [pipeline(State::Paused, 40_000)];
        let works = [pipeline(State::Running, 40_000)];
        let reader =
            |state| ReaderStatus { taking_in_ms: 99_000, state, since_ms: 39_000, ..ReaderStatus::default() };
        let (paused, running) = (reader(State::Paused), reader(State::Running));
        let both = health(&facts(&rests, Some(&paused)));
        assert_eq!(both.sentence, "Paused by an operator 1 min 1 s ago: reader and pipelines idle.");
        let pipelines = health(&facts(&rests, Some(&running)));
        assert_eq!(
            pipelines.sentence,
            "Paused by an operator 1 min ago: the pipelines are idle, the reader works."
        );
        let only_reader = health(&facts(&works, Some(&paused)));
        assert_eq!(
            only_reader.sentence,
            "Paused by an operator 1 min 1 s ago: the reader is idle, the pipelines work."
        );
    }

    #[test]
    fn work_is_told_with_its_pace() {
        let pipelines = [pipeline(State::Running, 1_000)];
        let well = Facts { rate: 2143.0, waiting: Some(0), p99_ms: Some(48.2), ..facts(&pipelines, None) };
        assert_eq!(health(&well).sentence, "Well: 2,143 events/s, nothing waits.");
        assert_eq!(health(&well).detail, "99 of 100 are safe in PostgreSQL within 48 ms.");
        let behind = Facts {
            waiting: Some(120_000),
            oldest_seconds: 40.0,
            rate: 2143.0,
            shrinking: 1000.0,
            ..facts(&pipelines, None)
        };
        assert_eq!(health(&behind).sentence, "Catching up: 2,143 events/s, 120,000 entries wait.");
        assert_eq!(health(&behind).detail, "At this pace nothing waits in 2 min.");
        let halted = Facts { waiting: Some(4_609), oldest_seconds: 3.4, ..facts(&pipelines, None) };
        assert_eq!(health(&halted).sentence, "Nothing was finished in the last second; 4,609 entries wait.");
        let worse = Facts { shrinking: -500.0, ..behind };
        assert_eq!(health(&worse).sentence, "Falling behind: 2,143 events/s, 120,000 entries wait.");
        let stuck = Facts { oldest_seconds: 90.0, last_ack_ms: 50_000, ..facts(&pipelines, None) };
        assert_eq!(health(&stuck).about, "no_progress");
        assert_eq!(health(&facts(&pipelines, None)).level, Level::Well);
    }

    #[test]
    fn a_redis_that_does_not_answer_is_found_before_the_parts_say_so() {
        let pipelines = [pipeline(State::Running, 1_000)];
        let said = health(&Facts { look_ms: Some(90_000), ..facts(&pipelines, None) });
        assert_eq!(said.sentence, "Redis has not answered for 10 s; nothing is lost.");
    }
}
