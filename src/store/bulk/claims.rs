//! Handle claims, many in one transaction.

use std::collections::HashSet;

use crate::event::{Event, Op};
use crate::store::batch::{Outcome, outcome, too_few};
use crate::store::call::SqlOp;
use crate::store::{Session, StoreError};

impl Session {
    /// Applies events that claim handles in one transaction: all of them or none, except those that get no outcome,
    /// because the batch has another claim of the account or the handle. The outcomes are in the order of the events.
    ///
    /// # Errors
    ///
    /// Those of [`Session::bulk`].
    pub(in crate::store) async fn claims(
        &self,
        events: &[&Event<'_>],
    ) -> Result<Vec<Option<Outcome>>, StoreError> {
        self.note_epochs(events).await?;
        let mut seen: HashSet<&str> = HashSet::new();
        let mut chosen: Vec<bool> = Vec::with_capacity(events.len());
        for event in events {
            let names = event.ops.iter().filter_map(|op| op.subject.as_deref()).chain([&*event.repo]);
            chosen.push(event.ops.len() == 1 && names.filter(|name| !seen.insert(name)).count() == 0);
        }
        let claims = || events.iter().zip(&chosen).filter(|(_, chosen)| **chosen).map(|(event, _)| event);
        let mut dids: Vec<&str> = claims().map(|event| &*event.repo).collect();
        dids.sort_unstable();
        let ops: Vec<SqlOp<'_>> =
            claims().flat_map(|event| event.ops.iter().map(|op| SqlOp::of(event, op))).collect();
        let rows = self.ask(include_str!("../../../sql/bulk/claims.sql"), &[&dids, &ops]).await?;
        let changed: HashSet<String> =
            rows.first().ok_or_else(too_few)?.get::<_, Vec<String>>(0).into_iter().collect();
        let is_changed = |op: &Op<'_>| {
            changed.contains(&op.uri) || op.subject.as_deref().is_some_and(|handle| changed.contains(handle))
        };
        Ok(events
            .iter()
            .zip(&chosen)
            .map(|(event, chosen)| {
                let changed: Vec<bool> = event.ops.iter().map(is_changed).collect();
                chosen.then(|| outcome(event, &changed))
            })
            .collect())
    }
}
