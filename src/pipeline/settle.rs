//! Acknowledges durable entries, buries those that cannot be applied, and counts both.

use std::collections::BTreeMap;

use super::Pipeline;
use super::work::{Stage, Work};
use crate::crash::{self, Point};
use crate::event::{EntryId, Kind};
use crate::metrics;
use crate::stream::dead_letters::Buried;
use crate::stream::{Stream, StreamResult};
use crate::time::now_ms;

impl Pipeline {
    /// Settles entries that are all durable or rejected.
    pub(super) async fn acknowledge(&self, stream: &mut Stream, done: &[Work<'_>]) -> StreamResult<()> {
        let good: Vec<EntryId> =
            done.iter().filter(|work| work.rejected.is_empty()).map(|work| work.entry.id).collect();
        stream.acknowledge(&good).await?;
        let mut finished = good.len() as u64;
        for work in done.iter().filter(|work| !work.rejected.is_empty()) {
            crash::at(Point::BeforeDeadLetter);
            match stream.bury(work.entry, &work.rejected, self.dead_letter_budget).await? {
                Buried::Done => {
                    crash::at(Point::AfterDeadLetter);
                    finished += 1;
                    self.status.pipeline(self.index, |status| status.dead_letters += 1);
                    for letter in &work.rejected {
                        metrics::dead_letter(letter.reject.reason);
                    }
                }
                Buried::Already => finished += 1,
                Buried::Full => metrics::count(metrics::DEAD_LETTERS_FULL, 1),
            }
        }
        let now = now_ms();
        let seconds = ::metrics::histogram!(metrics::EVENT_SECONDS);
        // Summed up first, because looking up a counter by its labels costs more than counting.
        let mut types: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut operations: BTreeMap<Kind, (u32, u32)> = BTreeMap::new();
        for work in done {
            let took = now.saturating_sub(work.entry.id.ms);
            seconds.record(took as f64 / 1000.0);
            self.status.latency.add(took);
            self.status.count(&work.entry.event_type, !work.rejected.is_empty());
            *types.entry(metrics::type_label(&work.entry.event_type)).or_default() += 1;
            if let Stage::Applied(_, kinds) = &work.stage {
                for (kind, total, applied) in kinds {
                    let sum = operations.entry(*kind).or_default();
                    *sum = (sum.0 + total, sum.1 + applied);
                }
            }
        }
        for (event_type, count) in types {
            ::metrics::counter!(metrics::ENTRIES, "type" => event_type).increment(count);
        }
        for (kind, (total, applied)) in operations {
            metrics::operations(kind, total, applied);
        }
        self.status.acknowledged(self.index, finished);
        Ok(())
    }
}
