//! Queue -> stream: appends entries, cursor and known losses atomically; and the marks at which the reader waits.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Arrival;
use super::plan::Plan;
use super::reader::{End, Reader};
use crate::config::VerifyMode;
use crate::crash::{self, Point};
use crate::metrics;
use crate::status::State;
use crate::stop::{Stopped, or_stop};
use crate::stream::append::{self, AppendError, Appendix, Budget, Cursor, Move};
use crate::stream::gap::Gap;
use crate::stream::{Stream, is_oom};
use crate::time::now_ms;

/// Maximum size of one append. A longer script would hold up the server, and Redis may exceed its memory limit by this
/// amount, because it checks the limit before a script and not during it.
const APPEND_BYTES: usize = 512 * 1024;
const APPEND_ENTRIES: usize = 500;
/// An append larger than this is split: it is a gathered batch plus one commit that is larger than the batch.
const PIECE_BYTES: usize = 2 * APPEND_BYTES;
/// How often the cursor, the lease and the marks are checked.
const LOOK: Duration = Duration::from_secs(1);
/// Maximum dead letters that the reader keeps per account.
const LETTERS_PER_ACCOUNT: u64 = 100;

/// An arrival on its way to the stream, with the space that it takes in the queue.
pub(super) struct Item {
    pub(super) arrival: Arrival,
    pub(super) _room: OwnedSemaphorePermit,
}

/// Adds waiting items from the queue, up to the size of one append.
fn take_along(items: &mut Vec<Item>, queue: &mut mpsc::Receiver<Item>) {
    let size = |item: &Item| item.arrival.entries.iter().map(|entry| entry.data.len()).sum::<usize>();
    let mut bytes: usize = items.iter().map(size).sum();
    while items.len() < APPEND_ENTRIES && bytes < APPEND_BYTES {
        let Ok(item) = queue.try_recv() else { break };
        bytes += size(&item);
        items.push(item);
    }
}

/// Appends to the stream over one connection.
pub(super) struct Appender<'a> {
    pub(super) reader: &'a Reader,
    pub(super) stream: &'a mut Stream,
    pub(super) cursor: &'a mut Cursor,
    pub(super) plan: &'a Plan,
    /// The server's identity; `None` before the first look.
    pub(super) run_id: Option<String>,
    pub(super) stop: &'a CancellationToken,
}

impl Appender<'_> {
    /// Queue -> stream, until the queue is closed and empty.
    pub(super) async fn run(
        mut self,
        mut queue: mpsc::Receiver<Item>,
        settled: watch::Sender<Option<i64>>,
    ) -> Result<(), End> {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Repeats of events already in the stream do not move the cursor back.
        let mut position = self.plan.from;
        let mut items = Vec::new();
        loop {
            tokio::select! {
                item = queue.recv() => match item {
                    Some(item) => items.push(item),
                    None => return Ok(()),
                },
                _ = look.tick() => {
                    self.look().await?;
                    continue;
                }
            }
            take_along(&mut items, &mut queue);
            let last = items.iter().map(|item| item.arrival.position).max().unwrap_or_default();
            position = Some(position.map_or(last, |before| before.max(last)));
            let mut length = 0;
            let pieces = in_pieces(gather(&mut items, self.plan.epoch));
            let count = pieces.len();
            for (number, what) in pieces.into_iter().enumerate() {
                let to = if number + 1 == count {
                    position.unwrap_or(last)
                } else {
                    // Until the last piece is in, all of them must be sent again. Another relay's numbers are
                    // meaningless.
                    self.cursor.position.filter(|_| self.cursor.is_current).unwrap_or(what.entries[0].seq - 1)
                };
                let Some(appended) = self.append(&what, to).await? else { return Ok(()) };
                self.reader.note(&what, appended);
                length = appended.length;
            }
            items.clear();
            settled.send_replace(position);
            ::metrics::gauge!(metrics::CURSOR).set(position.unwrap_or_default() as f64);
            self.reader.status.reader(|reader| {
                reader.cursor = position;
                reader.taking_in_ms = now_ms();
                if reader.state != State::Running {
                    reader.enter(State::Running);
                }
            });
            if length >= self.reader.config.max_stream_len {
                self.look().await?;
            }
        }
    }

    /// Appends one piece and moves the cursor, as soon as there is room; `None` when it is time to stop.
    async fn append(&mut self, what: &Appendix, position: i64) -> Result<Option<append::Appended>, End> {
        let budget =
            Budget { bytes: self.reader.config.dead_letter_max_bytes, per_account: LETTERS_PER_ACCOUNT };
        loop {
            let to = Move {
                token: &self.reader.token,
                relay: &self.plan.origin,
                epoch: self.plan.epoch,
                believed: self.cursor.position,
                position,
            };
            match self.stream.append(to, budget, what).await {
                Ok(appended) => {
                    crash::at(Point::AfterAppend);
                    self.cursor.position = Some(position);
                    self.cursor.is_current = true;
                    self.plan.appended.store(true, Ordering::Relaxed);
                    return Ok(Some(appended));
                }
                Err(AppendError::Redis(error)) if is_oom(&error) => {
                    // Refused before anything was written.
                    let reason = "Redis refuses writes: its memory is full";
                    if self.reader.wait_for_room(reason, self.stop).await.is_err() {
                        return Ok(None);
                    }
                    self.look().await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Checks that Redis is still the same server, and waits while the stream or the memory is at its mark.
    async fn look(&mut self) -> Result<(), End> {
        let mut waiting = false;
        loop {
            let gauge = self.stream.gauge(&self.reader.token).await?;
            if self.run_id.get_or_insert_with(|| gauge.run_id.clone()) != &gauge.run_id {
                return Err(AppendError::CursorMoved.into());
            }
            if self.reader.config.verify != VerifyMode::Off {
                self.stream.forget_accounts(gauge.max_memory).await?;
            }
            if !gauge.lease {
                return Err(AppendError::LeaseLost.into());
            }
            if gauge.cursor != self.cursor.position.map(|position| position.to_string()) {
                return Err(AppendError::CursorMoved.into());
            }
            // Positions of another numbering are meaningless here.
            let same = gauge.relay.as_ref().is_none_or(|relay| *relay == self.plan.origin);
            if self.cursor.is_current && same {
                self.cursor.acked = gauge.acked.or(self.cursor.acked);
            }
            let Some(reason) = self.reader.full(&gauge, waiting) else {
                if waiting {
                    self.reader.enter(State::Running);
                }
                return Ok(());
            };
            waiting = true;
            if self.reader.wait_for_room(&reason, self.stop).await.is_err() {
                return Ok(());
            }
        }
    }
}

impl Reader {
    /// Counts everything appended besides entries.
    fn note(&self, what: &Appendix, appended: append::Appended) {
        if let Some(gap) = &what.gap {
            self.note_gap(gap);
        }
        for (class, count) in &what.missed {
            metrics::missed(class, *count);
        }
        metrics::count(metrics::RELAY_BAD_RECORDS, what.letters.len() as u64);
        if appended.letters > 0 {
            for letter in &what.letters {
                metrics::dead_letter(letter.reject.reason);
            }
        }
        if appended.refused > 0 {
            metrics::missed("no_room", appended.refused);
        }
    }

    fn note_gap(&self, gap: &Gap) {
        warn!(
            reason = gap.reason,
            after = gap.after,
            until = gap.until,
            events = gap.size(),
            "gap: the relay no longer has some events"
        );
        metrics::count(metrics::RELAY_GAPS, 1);
        self.status.reader(|reader| reader.gaps += 1);
    }

    /// The mark that is reached, if any. While waiting, the threshold is a little lower, to avoid flapping.
    fn full(&self, gauge: &append::Gauge, waiting: bool) -> Option<String> {
        let margin = |mark: u64| if waiting { mark - mark / 20 } else { mark };
        let length = self.config.max_stream_len;
        if gauge.length >= margin(length) {
            return Some(format!(
                "{} entries in the stream cannot be trimmed yet (REDIS_MAX_STREAM_LEN={length})",
                gauge.length
            ));
        }
        let memory = self.config.memory_mark.bytes(gauge.max_memory);
        if memory.is_some_and(|mark| gauge.used_memory >= margin(mark)) {
            return Some(format!(
                "Redis uses {} MiB of memory (REDIS_MEMORY_MARK={})",
                gauge.used_memory >> 20,
                self.config.memory_mark
            ));
        }
        None
    }

    /// Waits a moment, and records that the reader is waiting.
    async fn wait_for_room(&self, reason: &str, stop: &CancellationToken) -> Result<(), Stopped> {
        let mut first = false;
        self.status.reader(|reader| {
            first = !matches!(reader.state, State::WaitingForRoom { .. });
            reader.enter(State::WaitingForRoom { reason: reason.to_owned() });
        });
        if first {
            info!(reason, "the reader waits for room; the relay keeps new events");
        }
        let began = Instant::now();
        let waited = or_stop(stop, tokio::time::sleep(Duration::from_millis(200))).await;
        metrics::totals::backpressure(began.elapsed());
        waited
    }
}

/// Combines the items' contents, in order, and adds the epoch to every entry.
fn gather(items: &mut [Item], epoch: u64) -> Appendix {
    let mut what = Appendix::default();
    for Item { arrival: item, .. } in items {
        for mut entry in item.entries.drain(..) {
            // The data always ends with a brace. The epoch goes last, where the pipelines look for it.
            entry.data.pop();
            entry.data.push_str(",\"epoch\":");
            entry.data.push_str(&epoch.to_string());
            entry.data.push('}');
            what.entries.push(entry);
        }
        what.letters.append(&mut item.letters);
        for (class, count) in &item.missed {
            *what.missed.entry(class).or_default() += count;
        }
        if item.rev > what.rev {
            what.rev = std::mem::take(&mut item.rev);
        }
        what.gap = what.gap.take().or(item.gap.take());
        what.accounts.append(&mut item.accounts);
    }
    what
}

/// Splits an append that is too large. A gap goes with the first piece, which may begin an epoch; counts, which must
/// not be added twice, go with the last, which moves the cursor.
fn in_pieces(mut what: Appendix) -> Vec<Appendix> {
    if what.entries.iter().map(|entry| entry.data.len()).sum::<usize>() <= PIECE_BYTES {
        return vec![what];
    }
    let mut pieces = Vec::new();
    let mut bytes = 0;
    let mut entries = Vec::new();
    for entry in std::mem::take(&mut what.entries) {
        if !entries.is_empty() && bytes + entry.data.len() > PIECE_BYTES {
            let (rev, gap) = (what.rev.clone(), what.gap.take());
            pieces.push(Appendix { entries: std::mem::take(&mut entries), rev, gap, ..Appendix::default() });
            bytes = 0;
        }
        bytes += entry.data.len();
        entries.push(entry);
    }
    pieces.push(Appendix { entries, ..what });
    pieces
}
