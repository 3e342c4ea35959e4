//! The health sentence: rules in order of importance; the first that applies wins.

use super::words::{duration, entries_wait, milliseconds, reason, thousands, upper};
use super::{Facts, Health, Level};
use crate::status::{ReaderStatus, State};

/// A backlog younger than this is normal latency.
const BEHIND_SECONDS: f64 = 5.0;
/// The janitor looks at the stream every second; an older look means that Redis is not answering.
const LOOK_IS_OLD_MS: u64 = 4_000;
/// An event that takes longer than this to become durable is late.
const SLOW_MS: f64 = 5_000.0;

/// Most important first.
const RULES: [fn(&Facts) -> Option<Health>; 17] = [
    draining,
    halted,
    handlers_halted,
    waiting_for_postgres,
    waiting_for_redis,
    silent_redis,
    lease,
    paused,
    starting,
    no_progress,
    stuck_reader,
    refill,
    no_relay,
    no_broker,
    no_room,
    behind,
    only_reading,
];

/// The state of the process, by the most important rule that applies.
#[must_use]
pub fn health(facts: &Facts) -> Health {
    RULES.iter().find_map(|rule| rule(facts)).unwrap_or_else(|| at_work(facts))
}

fn say(level: Level, about: &'static str, sentence: impl Into<String>, detail: impl Into<String>) -> Health {
    Health { level, about, sentence: sentence.into(), detail: detail.into() }
}

fn since(facts: &Facts, since_ms: u64) -> String {
    duration(facts.since_ms(since_ms) as f64 / 1000.0)
}

fn draining(facts: &Facts) -> Option<Health> {
    let in_hand: u64 = facts.pipelines.iter().map(|pipeline| pipeline.in_flight).sum();
    let detail = match in_hand {
        0 => String::new(),
        1 => "1 entry is still in hand.".to_owned(),
        count => format!("{} entries are still in hand.", thousands(count as f64)),
    };
    let sentence = "Draining: finishing the work in hand, then exiting.";
    facts.draining.then(|| say(Level::Paused, "draining", sentence, detail))
}

/// Needs operator action.
fn halted(facts: &Facts) -> Option<Health> {
    let halted = longest(facts, |state| matches!(state, State::Halted { .. }))?;
    let (about, sentence) = if halted.is_reader {
        ("reader_halted", "The reader has stopped; operator action needed.".to_owned())
    } else {
        let since = since(facts, halted.since_ms);
        ("halted", format!("Halted {since} ago: operator action needed. Nothing is lost."))
    };
    Some(say(Level::Bad, about, sentence, reason(halted.state)))
}

fn handlers_halted(facts: &Facts) -> Option<Health> {
    let is = |state: &State| matches!(state, State::Halted { .. });
    let halted = facts.handlers.iter().find(|handler| is(&handler.state))?;
    let since = since(facts, halted.since_ms);
    let sentence = format!("Tasks halted {since} ago: operator action needed. Nothing is lost.");
    Some(say(Level::Bad, "halted", sentence, reason(&halted.state)))
}

/// The pipelines that wait for a server.
fn pipelines_wait(
    facts: &Facts,
    about: &'static str,
    server: &str,
    is: impl Fn(&State) -> bool,
) -> Option<Health> {
    let waiting = facts.pipelines.iter().filter(|pipeline| is(&pipeline.state));
    let oldest = waiting.clone().min_by_key(|pipeline| pipeline.since_ms)?;
    let part = match (waiting.count(), facts.pipelines.len()) {
        (count, all) if count == all => String::new(),
        (count, all) => format!("{count} of {all} pipelines: "),
    };
    let sentence = format!("Waiting for {server} for {}; nothing is lost.", since(facts, oldest.since_ms));
    Some(say(Level::Waiting, about, sentence, part + &reason(&oldest.state)))
}

fn waiting_for_postgres(facts: &Facts) -> Option<Health> {
    pipelines_wait(facts, "postgres", "PostgreSQL", |state| matches!(state, State::WaitingForPostgres { .. }))
}

fn waiting_for_redis(facts: &Facts) -> Option<Health> {
    let is = |state: &State| matches!(state, State::WaitingForRedis { .. });
    pipelines_wait(facts, "redis", "Redis", is).or_else(|| {
        let reader = facts.reader.as_ref().filter(|reader| is(&reader.state))?;
        let sentence = format!("Waiting for Redis for {}; nothing is lost.", since(facts, reader.since_ms));
        Some(say(Level::Waiting, "redis", sentence, reason(&reader.state)))
    })
}

/// Noticed before the parts report it.
fn silent_redis(facts: &Facts) -> Option<Health> {
    let looked = facts.look_ms.unwrap_or(facts.started_ms);
    let sentence = || format!("Redis has not answered for {}; nothing is lost.", since(facts, looked));
    (facts.since_ms(looked) > LOOK_IS_OLD_MS).then(|| say(Level::Waiting, "redis", sentence(), ""))
}

fn lease(facts: &Facts) -> Option<Health> {
    let waiting = longest(facts, |state| matches!(state, State::WaitingForLease { .. }))?;
    let who = if waiting.is_reader { "Another reader is" } else { "Another process with this name is" };
    let sentence = format!("{who} active; waiting for {}.", since(facts, waiting.since_ms));
    Some(say(Level::Waiting, "lease", sentence, reason(waiting.state)))
}

/// Paused by an operator.
fn paused(facts: &Facts) -> Option<Health> {
    let is = |state: &State| *state == State::Paused;
    let part = longest(facts, is)?;
    let reader_idle = facts.reader.as_ref().is_some_and(|reader| is(&reader.state));
    let pipelines_idle = facts.pipelines.iter().any(|pipeline| is(&pipeline.state));
    let who = match (reader_idle, pipelines_idle) {
        (true, true) => "reader and pipelines idle",
        (true, false) if !facts.pipelines.is_empty() => "reader idle, pipelines running",
        (true, false) => "reader idle",
        (false, _) if facts.reader.is_some() => "pipelines idle, reader running",
        (false, _) => "pipelines idle",
    };
    let detail = match facts.waiting {
        Some(0) | None => "Nothing is lost.".to_owned(),
        Some(count) => format!("Nothing is lost; {}.", entries_wait(count)),
    };
    let sentence = format!("Paused by an operator {} ago: {who}.", since(facts, part.since_ms));
    Some(say(Level::Paused, "paused", sentence, detail))
}

fn starting(facts: &Facts) -> Option<Health> {
    longest(facts, |state| *state == State::Starting)?;
    let sentence = format!("Starting for {}.", since(facts, facts.started_ms));
    Some(say(Level::Waiting, "starting", sentence, ""))
}

fn no_progress(facts: &Facts) -> Option<Health> {
    let since = since(facts, facts.stalled_since_ms()?);
    Some(say(
        Level::Bad,
        "no_progress",
        format!("No progress: entries are waiting and nothing has finished for {since}."),
        format!("The oldest entry has waited for {}.", duration(facts.oldest_seconds)),
    ))
}

fn stuck_reader(facts: &Facts) -> Option<Health> {
    let reader = facts.stuck_reader()?;
    let sentence = format!("The reader has taken nothing in for {}.", since(facts, reader.taking_in_ms));
    Some(say(Level::Bad, "reader_stuck", sentence, reason(&reader.state)))
}

fn refill(facts: &Facts) -> Option<Health> {
    let refill = facts.refill?;
    Some(say(
        Level::Waiting,
        "refill",
        format!("Re-reading events that PostgreSQL lost, for {}.", since(facts, refill.since_ms)),
        format!("From position {} to {}; the tables are incomplete until then.", refill.from, refill.until),
    ))
}

fn no_relay(facts: &Facts) -> Option<Health> {
    let ReaderStatus { state: State::WaitingForRelay { reason }, since_ms, .. } = facts.reader.as_ref()?
    else {
        return None;
    };
    let sentence = format!("No relay for {}; received events are safe.", since(facts, *since_ms));
    Some(say(Level::Waiting, "relay", sentence, reason))
}

fn no_broker(facts: &Facts) -> Option<Health> {
    let is = |state: &State| matches!(state, State::WaitingForBroker { .. });
    let (state, since_ms, [what, kept]) = facts.brokers().find(|(state, ..)| is(state))?;
    let sentence = format!("Unable to {what} for {}; {kept}.", since(facts, since_ms));
    Some(say(Level::Waiting, "broker", sentence, reason(state)))
}

fn no_room(facts: &Facts) -> Option<Health> {
    let ReaderStatus { state: State::WaitingForRoom { reason }, .. } = facts.reader.as_ref()? else {
        return None;
    };
    let sentence = if facts.pipelines.is_empty() {
        "The reader waits until there is room; nothing is lost.".to_owned()
    } else {
        format!("Busy: {}; the reader waits until there is room, nothing is lost.", pace(facts))
    };
    Some(say(Level::Busy, "room", sentence, upper(reason)))
}

fn behind(facts: &Facts) -> Option<Health> {
    if facts.pipelines.is_empty() || facts.oldest_seconds <= BEHIND_SECONDS {
        return None;
    }
    let count = facts.waiting.map_or_else(String::new, |count| format!(", {}", entries_wait(count)));
    let detail = match facts.waiting {
        Some(count) if facts.shrinking > 1.0 => {
            format!("At this pace, caught up in {}.", duration((count as f64 / facts.shrinking).max(1.0)))
        }
        _ => format!("The oldest has waited for {}.", duration(facts.oldest_seconds)),
    };
    let way = if facts.shrinking < -1.0 { "Falling behind" } else { "Catching up" };
    Some(say(Level::Busy, "behind", format!("{way}: {}{count}.", pace(facts)), detail))
}

/// A healthy process without pipelines.
fn only_reading(facts: &Facts) -> Option<Health> {
    let frames = thousands(facts.frames);
    let sentence = || format!("Healthy: {frames} frames/s from the relay into the stream.");
    facts.pipelines.is_empty().then(|| say(Level::Well, "well", sentence(), ""))
}

/// A process with pipelines, if no other rule applies.
fn at_work(facts: &Facts) -> Health {
    let within = |p99| format!("99% of events are safe in PostgreSQL within {}.", milliseconds(p99));
    match (facts.p99_ms.filter(|_| facts.rate >= 0.5), facts.waiting) {
        (Some(p99), _) if p99 > SLOW_MS => {
            say(Level::Busy, "behind", format!("Slow: {}, with high latency.", pace(facts)), within(p99))
        }
        (Some(p99), waiting) => {
            let long = if waiting == Some(0) { "" } else { " for long" };
            say(Level::Well, "well", format!("Healthy: {}, nothing waiting{long}.", pace(facts)), within(p99))
        }
        (None, Some(count)) if count > 0 => say(
            Level::Busy,
            "behind",
            format!("Nothing finished in the last second; {}.", entries_wait(count)),
            format!("The oldest has waited for {}.", duration(facts.oldest_seconds)),
        ),
        (None, _) => say(Level::Well, "well", "Healthy: no incoming events, nothing waiting.", ""),
    }
}

fn pace(facts: &Facts) -> String {
    format!("{} events/s", thousands(facts.rate))
}

/// A reader or pipeline, reduced to what the sentence needs.
struct Part<'a> {
    state: &'a State,
    since_ms: u64,
    is_reader: bool,
}

/// Of the parts in such a state, the one that has been in it the longest.
fn longest(facts: &Facts, is: impl Fn(&State) -> bool) -> Option<Part<'_>> {
    let pipelines = facts.pipelines.iter().map(|part| Part {
        state: &part.state,
        since_ms: part.since_ms,
        is_reader: false,
    });
    let reader = facts.reader.as_ref().map(|part| Part {
        state: &part.state,
        since_ms: part.since_ms,
        is_reader: true,
    });
    pipelines.chain(reader).filter(|part| is(part.state)).min_by_key(|part| part.since_ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::PipelineStatus;

    fn pipeline(state: State, since_ms: u64) -> PipelineStatus {
        PipelineStatus { state, since_ms, ..PipelineStatus::default() }
    }

    fn facts(pipelines: &[PipelineStatus], reader: Option<&ReaderStatus>) -> Facts {
        Facts {
            now_ms: 100_000,
            look_ms: Some(99_900),
            last_ack_ms: 99_900,
            pipelines: pipelines.to_vec(),
            reader: reader.cloned(),
            ..Facts::default()
        }
    }

    #[test]
    fn an_outage_is_reported_with_its_duration_and_reason() {
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
    fn a_halt_outranks_outages_that_recover_by_themselves() {
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
    fn a_pause_reports_which_parts_are_idle() {
        let rests = [pipeline(State::Paused, 40_000)];
        let works = [pipeline(State::Running, 40_000)];
        let reader =
            |state| ReaderStatus { taking_in_ms: 99_000, state, since_ms: 39_000, ..ReaderStatus::default() };
        let (paused, running) = (reader(State::Paused), reader(State::Running));
        let both = health(&facts(&rests, Some(&paused)));
        assert_eq!(both.sentence, "Paused by an operator 1 min 1 s ago: reader and pipelines idle.");
        let pipelines = health(&facts(&rests, Some(&running)));
        assert_eq!(pipelines.sentence, "Paused by an operator 1 min ago: pipelines idle, reader running.");
        let only_reader = health(&facts(&works, Some(&paused)));
        assert_eq!(
            only_reader.sentence,
            "Paused by an operator 1 min 1 s ago: reader idle, pipelines running."
        );
    }

    #[test]
    fn progress_is_reported_with_its_rate() {
        let pipelines = [pipeline(State::Running, 1_000)];
        let well = Facts { rate: 2143.0, waiting: Some(0), p99_ms: Some(48.2), ..facts(&pipelines, None) };
        assert_eq!(health(&well).sentence, "Healthy: 2,143 events/s, nothing waiting.");
        assert_eq!(health(&well).detail, "99% of events are safe in PostgreSQL within 48 ms.");
        let behind = Facts {
            waiting: Some(120_000),
            oldest_seconds: 40.0,
            rate: 2143.0,
            shrinking: 1000.0,
            ..facts(&pipelines, None)
        };
        assert_eq!(health(&behind).sentence, "Catching up: 2,143 events/s, 120,000 entries waiting.");
        assert_eq!(health(&behind).detail, "At this pace, caught up in 2 min.");
        let halted = Facts { waiting: Some(4_609), oldest_seconds: 3.4, ..facts(&pipelines, None) };
        assert_eq!(health(&halted).sentence, "Nothing finished in the last second; 4,609 entries waiting.");
        let worse = Facts { shrinking: -500.0, ..behind };
        assert_eq!(health(&worse).sentence, "Falling behind: 2,143 events/s, 120,000 entries waiting.");
        let stuck = Facts { oldest_seconds: 90.0, last_ack_ms: 50_000, ..facts(&pipelines, None) };
        assert_eq!(health(&stuck).about, "no_progress");
        assert_eq!(health(&facts(&pipelines, None)).level, Level::Well);
    }

    #[test]
    fn a_silent_redis_is_reported_before_the_parts_notice() {
        let pipelines = [pipeline(State::Running, 1_000)];
        let said = health(&Facts { look_ms: Some(90_000), ..facts(&pipelines, None) });
        assert_eq!(said.sentence, "Redis has not answered for 10 s; nothing is lost.");
    }
}
