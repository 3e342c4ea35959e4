//! Readiness: whether work gets in and out, with every problem found.

use serde::Serialize;

use super::{Facts, NO_PROGRESS_MS};
use crate::status::State;

/// The servers' answers just now; `None` where a server answered, or is not used.
#[derive(Debug, Default)]
pub struct Answers {
    /// Redis's error.
    pub redis: Option<String>,
    /// PostgreSQL's error.
    pub postgres: Option<String>,
}

/// The result of the readiness check.
#[derive(Debug, Serialize)]
pub struct Readiness {
    /// Ready.
    pub ready: bool,
    /// Not ready only because an operator paused it.
    pub only_paused: bool,
    /// Every problem, for people.
    pub reasons: Vec<String>,
}

/// Every problem found.
#[must_use]
pub fn readiness(facts: &Facts, answers: Answers) -> Readiness {
    let (mut reasons, mut paused) = (Vec::new(), Vec::new());
    reasons.extend(answers.redis.map(|error| format!("Redis: {error}")));
    reasons.extend(answers.postgres.map(|error| format!("PostgreSQL: {error}")));
    pipelines(facts, &mut reasons, &mut paused);
    handlers(facts, &mut reasons);
    if let (Some(since), true) = (facts.stalled_since_ms(), paused.is_empty()) {
        reasons.push(format!(
            "no progress: the oldest entry has waited for {:.0} s and nothing has finished for {} s",
            facts.oldest_seconds,
            facts.since_ms(since) / 1000
        ));
    }
    if let Some(refill) = facts.refill {
        reasons.push(format!(
            "PostgreSQL lost acknowledged events: re-reading from {} to {}",
            refill.from, refill.until
        ));
    }
    reader(facts, &mut reasons, &mut paused);
    brokers(facts, &mut reasons);
    let only_paused = reasons.is_empty() && !paused.is_empty();
    reasons.append(&mut paused);
    Readiness { ready: reasons.is_empty(), only_paused, reasons }
}

fn pipelines(facts: &Facts, reasons: &mut Vec<String>, paused: &mut Vec<String>) {
    for pipeline in &facts.pipelines {
        let name = &pipeline.consumer;
        match &pipeline.state {
            State::Halted { reason } => reasons.push(format!("{name} is halted: {reason}")),
            State::Starting => reasons.push(format!("{name} is starting")),
            State::Paused => paused.push(format!("{name} is paused manually")),
            State::WaitingForLease { reason } if facts.since_ms(pipeline.since_ms) > NO_PROGRESS_MS => {
                reasons.push(format!("{name} waits: {reason}"));
            }
            _ => {}
        }
    }
}

fn handlers(facts: &Facts, reasons: &mut Vec<String>) {
    if let Some(State::Halted { reason }) = facts
        .handlers
        .iter()
        .map(|handler| &handler.state)
        .find(|state| matches!(state, State::Halted { .. }))
    {
        reasons.push(format!("tasks are halted: {reason}"));
    }
}

fn reader(facts: &Facts, reasons: &mut Vec<String>, paused: &mut Vec<String>) {
    let Some(reader) = &facts.reader else { return };
    let away_ms = facts.since_ms(reader.connected_ms);
    match &reader.state {
        State::Halted { reason } => reasons.push(format!("the reader has stopped: {reason}")),
        State::WaitingForRelay { reason } if !reader.connected && away_ms > NO_PROGRESS_MS => {
            reasons.push(format!("no relay for {} s: {reason}", away_ms / 1000));
        }
        State::Paused => paused.push("the reader is paused manually".to_owned()),
        State::WaitingForLease { reason } if facts.since_ms(reader.since_ms) > NO_PROGRESS_MS => {
            reasons.push(format!("the reader waits: {reason}"));
        }
        state if facts.stuck_reader().is_some() => {
            let why = match state {
                State::WaitingForRelay { reason } => format!(": {reason}"),
                _ => String::new(),
            };
            let seconds = facts.since_ms(reader.taking_in_ms) / 1000;
            reasons.push(format!("the reader has taken nothing in for {seconds} s{why}"));
        }
        _ => {}
    }
}

fn brokers(facts: &Facts, reasons: &mut Vec<String>) {
    for (state, since_ms, [what, _]) in facts.brokers() {
        let away_ms = facts.since_ms(since_ms);
        if let State::WaitingForBroker { reason } = state
            && away_ms > NO_PROGRESS_MS
        {
            reasons.push(format!("cannot {what} for {} s: {reason}", away_ms / 1000));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{PipelineStatus, ReaderStatus};

    fn facts(pipeline: State, reader: State) -> Facts {
        Facts {
            now_ms: 100_000,
            last_ack_ms: 99_900,
            pipelines: vec![PipelineStatus {
                consumer: "c-0".to_owned(),
                state: pipeline,
                ..Default::default()
            }],
            reader: Some(ReaderStatus { state: reader, taking_in_ms: 99_000, ..Default::default() }),
            ..Facts::default()
        }
    }

    #[test]
    fn only_paused_is_set_only_when_nothing_else_is_wrong() {
        let paused = readiness(&facts(State::Paused, State::Running), Answers::default());
        assert!(!paused.ready && paused.only_paused, "{paused:?}");
        let halted = State::Halted { reason: "no right to write".to_owned() };
        let both = readiness(&facts(State::Paused, halted), Answers::default());
        assert!(!both.ready && !both.only_paused, "{both:?}");
        assert_eq!(both.reasons, ["the reader has stopped: no right to write", "c-0 is paused manually"]);
        assert!(readiness(&facts(State::Running, State::Running), Answers::default()).ready);
    }

    #[test]
    fn server_errors_are_listed_first() {
        let answers = Answers { redis: Some("connection refused".to_owned()), postgres: None };
        let said = readiness(&facts(State::Starting, State::Running), answers);
        assert_eq!(said.reasons, ["Redis: connection refused", "c-0 is starting"]);
    }
}
