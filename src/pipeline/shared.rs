//! What the pipelines of a process have in common: the entries that they hold, the lanes, and whose turn it is to read.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::{MutexGuard, watch};

use super::lanes::Lanes;
use crate::config::{Config, TransactionMode};
use crate::event::EntryId;

/// After a read that did not fill a batch, the next one waits so long for more entries: each batch has costs of its own.
/// An entry that arrives after a longer silence does not wait.
const LINGER: Duration = Duration::from_millis(2);

/// What pipelines share.
#[derive(Debug)]
pub struct Shared {
    /// The entries that they hold.
    pub(super) in_hand: Mutex<HashSet<EntryId>>,
    /// Where events share transactions.
    pub(super) lanes: Option<Lanes>,
    /// Whether another program works in the group. It takes no locks and leaves no revisions, so each event then has its
    /// own transaction.
    pub(super) others: AtomicBool,
    turn: tokio::sync::Mutex<Pace>,
    /// Whether reads return few entries.
    quiet: watch::Sender<bool>,
}

/// How the previous read went.
#[derive(Debug, Default)]
struct Pace {
    /// It returned something, but less than there was room for.
    lingers: bool,
}

/// The right to read new entries. Only one pipeline has it: with few events, the others would take single ones.
pub(super) struct Turn<'s> {
    pace: MutexGuard<'s, Pace>,
    quiet: &'s watch::Sender<bool>,
}

impl Shared {
    /// For the pipelines of a process.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let lanes = match config.transaction {
            TransactionMode::Batch => Some(Lanes::new(lane_count(config.parallel_consumers))),
            TransactionMode::Event => None,
        };
        Self {
            in_hand: Mutex::default(),
            lanes,
            others: AtomicBool::new(false),
            turn: tokio::sync::Mutex::default(),
            quiet: watch::channel(true).0,
        }
    }

    /// Waits for the turn.
    pub(super) async fn turn(&self) -> Turn<'_> {
        Turn { pace: self.turn.lock().await, quiet: &self.quiet }
    }

    /// Waits for the turn, and until reads return few entries.
    pub(super) async fn quiet_turn(&self) -> Turn<'_> {
        let mut quiet = self.quiet.subscribe();
        loop {
            // We hold the sender: it is there.
            let _ = quiet.wait_for(|quiet| *quiet).await;
            let turn = self.turn().await;
            if *self.quiet.borrow() {
                return turn;
            }
        }
    }

    /// The turn, if nobody has it.
    pub(super) fn turn_now(&self) -> Option<Turn<'_>> {
        self.turn.try_lock().ok().map(|pace| Turn { pace, quiet: &self.quiet })
    }
}

impl Turn<'_> {
    /// Before a read: lets entries gather if they come in small numbers.
    pub(super) async fn linger(&mut self) {
        if std::mem::take(&mut self.pace.lingers) {
            tokio::time::sleep(LINGER).await;
        }
    }

    /// After a read.
    pub(super) fn note(&mut self, entries: usize, room: usize) {
        self.pace.lingers = (1..room).contains(&entries);
        self.quiet.send_if_modified(|quiet| std::mem::replace(quiet, entries < room) != (entries < room));
    }
}

/// How many pipelines have a lane where events share transactions: as many as there are processors, at least two, in
/// powers of two. More cost the database more and are no faster. The others read while there is little to do.
fn lane_count(pipelines: usize) -> usize {
    let processors = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    let most = pipelines.min(processors);
    1 << most.max(1).ilog2()
}
