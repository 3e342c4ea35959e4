//! Likes and reposts whose account already has one of the same subject.

use std::collections::HashSet;

use super::sorted::{Sorted, Way};
use crate::event::Kind;
use crate::store::batch::too_few;
use crate::store::{Session, StoreError};

/// What there is of the subjects of new likes and reposts.
#[derive(Default)]
pub(super) struct Others<'e> {
    /// Those that have a row already.
    pub(super) present: HashSet<&'e str>,
    /// Those whose account has another one of the subject, and is counted already.
    pub(super) counted: HashSet<&'e str>,
}

impl Session {
    /// Which new likes and reposts have a row already, and which are not their account's first of the subject.
    pub(super) async fn others<'e>(&self, sorted: &Sorted<'e, '_>) -> Result<Others<'e>, StoreError> {
        let pairs = [Kind::Like, Kind::Repost].map(|kind| {
            let mut pairs: Vec<(&str, &str, &str)> = sorted
                .going(Way::Insert)
                .filter(|(_, op)| op.kind == kind)
                .filter_map(|(event, op)| Some((op.subject.as_deref()?, &*event.repo, op.uri.as_str())))
                .collect();
            pairs.sort_unstable();
            pairs
        });
        let mut others = Others::default();
        if pairs.iter().all(Vec::is_empty) {
            return Ok(others);
        }
        let column = |kind: usize, of: fn(&(&'e str, &'e str, &'e str)) -> &'e str| -> Vec<&str> {
            pairs[kind].iter().map(of).collect()
        };
        let rows = self
            .ask(
                include_str!("../../../sql/bulk/others.sql"),
                &[
                    &column(0, |pair| pair.0),
                    &column(0, |pair| pair.1),
                    &column(1, |pair| pair.0),
                    &column(1, |pair| pair.1),
                ],
            )
            .await?;
        for row in rows {
            let (kind, place, uri): (i32, i32, String) = (row.get(0), row.get(1), row.get(2));
            let pairs = usize::try_from(kind).ok().and_then(|kind| pairs.get(kind));
            let place = usize::try_from(place - 1).ok();
            let pair = pairs.zip(place).and_then(|(pairs, place)| pairs.get(place)).ok_or_else(too_few)?;
            if pair.2 == uri {
                others.present.insert(pair.2)
            } else {
                others.counted.insert(pair.2)
            };
        }
        Ok(others)
    }
}
