//! Epochs: sequence numbers are meaningful only within their own numbering.
//!
//! An epoch is the time, in milliseconds by Redis's clock, at which an origin's numbering began as far as we know. Our
//! reader begins one on its first start, when a relay starts over, on a change of relay, and when Redis lost the
//! cursor, and names it in every entry. The Python reader names none: its entries belong to the epoch in force at their
//! id.
//!
//! Nor does the Python reader give revisions, by which records are ordered within named epochs. Its entries are placed
//! after everything that our reader had appended before them: at the newest revision until then, with a suffix.

use super::{EntryId, Version};

/// The start of an epoch: the entry from which it is in force, and the newest revision that our reader had appended
/// before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The first entry.
    pub first: EntryId,
    /// The epoch; 0 for none.
    pub epoch: u64,
    /// The revision; empty for none.
    pub rev: String,
}

/// The epochs of a stream, in the order of their first entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Epochs(Vec<Start>);

impl Epochs {
    /// A stream without named epochs.
    pub const UNNAMED: Epochs = Epochs(Vec::new());

    /// Builds it from the starts, in any order.
    #[must_use]
    pub fn new(mut starts: Vec<Start>) -> Self {
        starts.sort_by_key(|start| start.first);
        Self(starts)
    }

    /// All named epochs.
    pub fn named(&self) -> impl Iterator<Item = u64> {
        self.0.iter().map(|start| start.epoch).filter(|epoch| *epoch > 0)
    }

    fn in_force(&self, id: EntryId) -> Option<&Start> {
        self.0.iter().rev().find(|start| start.first <= id)
    }

    /// Gives the version its place: adds the epoch to its number and, if it has no revision, sets its place between
    /// revisions. `named` is the epoch that the entry itself names.
    pub(crate) fn place(&self, version: &mut Version<'_>, named: Option<u64>) {
        let start = self.in_force(version.entry);
        let epoch = named.or(start.map(|start| start.epoch)).unwrap_or(0);
        if epoch == 0 {
            return;
        }
        version.epoch = epoch;
        if let Some(seq) = &mut version.seq {
            *seq = format!("{seq}@{epoch}").into();
        }
    }

    /// The place between revisions for a commit without one, or `None` if no epoch is named.
    pub(crate) fn rev_of(&self, version: &Version<'_>) -> Option<String> {
        let start = self.in_force(version.entry).filter(|_| version.epoch > 0)?;
        // "." sorts before every character of a TID: after the revision itself, before the next one.
        Some(format!("{}.", start.rev))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_without_an_epoch_belongs_to_the_one_in_force() {
        let id = |ms| EntryId { ms, seq: 0 };
        let start = |ms, epoch, rev: &str| Start { first: id(ms), epoch, rev: rev.to_owned() };
        let epochs = Epochs::new(vec![start(20, 15, "3n2samfdihk2n"), start(10, 9, "")]);
        let place = |ms, named| {
            let mut version = Version { rev: None, seq: Some("7".into()), entry: id(ms), epoch: 0 };
            epochs.place(&mut version, named);
            (version.seq.clone().unwrap().into_owned(), epochs.rev_of(&version))
        };
        assert_eq!(place(9, None), ("7".to_owned(), None));
        assert_eq!(place(10, None), ("7@9".to_owned(), Some(".".to_owned())));
        assert_eq!(place(25, None), ("7@15".to_owned(), Some("3n2samfdihk2n.".to_owned())));
        assert_eq!(place(25, Some(12)).0, "7@12");
    }
}
