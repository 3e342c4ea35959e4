//! The second look after the commit: posts and gates that were written at the same time did not see each other.

use std::collections::HashSet;

use super::sorted;
use crate::event::{Event, Kind};
use crate::store::{Session, StoreError};

impl Session {
    /// Judges posts once more after they are committed, because a gate and a post that it applies to may not have seen
    /// each other. Also posts that were there before: the process may have ended in between.
    pub(in crate::store) async fn judge_posts(&self, events: &[&Event<'_>]) -> Result<(), StoreError> {
        let posts = || events.iter().flat_map(|event| &event.ops).filter(|op| op.kind == Kind::Post);
        let mut uris: Vec<&str> = posts().flat_map(sorted::gated).collect();
        if uris.is_empty() {
            return Ok(());
        }
        uris.sort_unstable();
        uris.dedup();
        let rows = self.ask(include_str!("../../../sql/bulk/gates.sql"), &[&uris]).await?;
        let gates: HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
        for op in posts().filter(|op| sorted::gated(op).any(|post| gates.contains(post))) {
            self.ask(
                include_str!("../../../sql/bulk/judge_post.sql"),
                &[&op.uri, &op.root.as_deref(), &op.subject.as_deref()],
            )
            .await?;
        }
        Ok(())
    }

    /// The other side: gates, after they are committed.
    pub(in crate::store) async fn judge_gates(&self, events: &[&Event<'_>]) -> Result<(), StoreError> {
        let ops = events.iter().flat_map(|event| &event.ops);
        for op in ops.filter(|op| matches!(op.kind, Kind::ThreadGate | Kind::PostGate)) {
            if let Some(post) = op.subject.as_deref() {
                self.ask(include_str!("../../../sql/bulk/judge_gate.sql"), &[&post]).await?;
            }
        }
        Ok(())
    }
}
