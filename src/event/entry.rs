//! An entry of the stream, as every part sees it.

use super::EntryId;

/// One entry of the stream. Fields that are missing are empty; the interpretation says what is wrong with that.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its id.
    pub id: EntryId,
    /// commit, identity, account, sync.
    pub event_type: String,
    /// JSON.
    pub data: String,
    /// The relay's sequence number in digits, or empty.
    pub seq: String,
}

impl Entry {
    /// What it takes of memory, about.
    #[must_use]
    pub fn size(&self) -> usize {
        self.data.len() + self.event_type.len() + self.seq.len() + size_of::<Self>()
    }
}
