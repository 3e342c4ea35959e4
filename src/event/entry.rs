//! An entry of the stream.

use super::EntryId;

/// One entry of the stream. Missing fields are empty; interpreting the entry reports them.
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
    /// Its approximate size in memory, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.data.len() + self.event_type.len() + self.seq.len() + size_of::<Self>()
    }
}
