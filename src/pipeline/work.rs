//! An entry on its way through a pipeline.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::apply::{Context, interpret};
use crate::crash;
use crate::event::Entry;
use crate::event::{Epochs, Event, Reason, Reject, Rejected};
use crate::store::Counts;

/// An entry, its stage, and its rejected operations.
pub(super) struct Work<'a> {
    pub(super) entry: &'a Entry,
    pub(super) stage: Stage<'a>,
    /// Dead letters: of single operations, or of the whole entry.
    pub(super) rejected: Vec<Rejected>,
}

/// An entry's progress.
pub(super) enum Stage<'a> {
    /// No part of it can be applied.
    Refused,
    /// Not in the database yet.
    Open(Event<'a>),
    /// In the database: the number of operations of each kind, and how many of them changed anything.
    Applied(Event<'a>, Counts),
}

impl<'a> Stage<'a> {
    fn into_event(self) -> Option<Event<'a>> {
        match self {
            Self::Refused => None,
            Self::Open(event) | Self::Applied(event, _) => Some(event),
        }
    }
}

impl<'a> Work<'a> {
    /// Interprets an entry.
    pub(super) fn new(entry: &'a Entry, epochs: &Epochs) -> Self {
        let read = catch_unwind(AssertUnwindSafe(|| {
            crash::panic_over("interpret", &entry.data);
            interpret(entry, Context::now(epochs))
        }));
        match read.unwrap_or_else(|panic| Err(panicked(panic.as_ref()))) {
            Ok(mut event) => {
                let rejected = std::mem::take(&mut event.rejected);
                Self { entry, stage: Stage::Open(event), rejected }
            }
            Err(reject) => {
                let mut work = Self { entry, stage: Stage::Refused, rejected: Vec::new() };
                work.reject_all(reject);
                work
            }
        }
    }

    pub(super) fn event(&self) -> Option<&Event<'a>> {
        match &self.stage {
            Stage::Refused => None,
            Stage::Open(event) | Stage::Applied(event, _) => Some(event),
        }
    }

    /// Drops unwanted operations; returns whether any are left.
    pub(super) fn keep(&mut self, wanted: impl FnMut(&crate::event::Op<'_>) -> bool) -> bool {
        match &mut self.stage {
            Stage::Refused => false,
            Stage::Open(event) | Stage::Applied(event, _) => event.keep(wanted),
        }
    }

    /// Rejects the whole entry.
    pub(super) fn reject_all(&mut self, reject: Reject) {
        self.rejected.push(Rejected { reject, op: self.entry.data.clone() });
        self.stage = Stage::Refused;
    }

    /// Whether it still has to be applied. An irrelevant event has no repository, and nothing to apply.
    pub(super) fn is_open(&self) -> bool {
        matches!(&self.stage, Stage::Open(event) if !event.repo.is_empty())
    }

    /// Advances it to another stage.
    pub(super) fn applied(&mut self, counts: Counts) {
        self.change(|event| Stage::Applied(event, counts));
    }

    /// Starts it over, because its commit may be lost.
    pub(super) fn reopen(&mut self) {
        self.change(Stage::Open);
    }

    fn change(&mut self, to: impl FnOnce(Event<'a>) -> Stage<'a>) {
        if let Some(event) = std::mem::replace(&mut self.stage, Stage::Refused).into_event() {
            self.stage = to(event);
        }
    }

    /// Sets aside the operations that the database refuses; the others are retried without them.
    pub(super) fn reject(&mut self, mut bad: Vec<(usize, Reject)>) {
        let Stage::Open(event) = &mut self.stage else { return };
        bad.sort_by_key(|(index, _)| std::cmp::Reverse(*index));
        for (index, reject) in bad {
            if index < event.ops.len() {
                event.ops.remove(index);
                let op = event.sources.remove(index).to_owned();
                self.rejected.push(Rejected { reject, op });
            } else {
                // Not an operation, but the event itself.
                self.reject_all(reject);
                return;
            }
        }
    }
}

/// A panic's message, as the reason for a dead letter.
pub(super) fn panicked(panic: &(dyn std::any::Any + Send)) -> Reject {
    let said = panic.downcast_ref::<String>().map(String::as_str);
    let said = said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    let said: String = said.chars().take(500).collect();
    Reject::new(Reason::Panic, format!("the program panicked: {said}; please report it with this entry"))
}
