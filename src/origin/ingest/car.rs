//! The records of a repository's archive as lines.

use crate::origin::relay::decode::{RepoOp, entries_of};
use crate::verify::Repository;

/// A repository as lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    /// Whose it is.
    pub did: String,
    /// Its records.
    pub records: usize,
    /// Records that no line can hold, such as those that are not in DAG-CBOR.
    pub unreadable: usize,
    /// The lines, each with a line break.
    pub lines: Vec<u8>,
}

/// Reads an archive as `com.atproto.sync.getRepo` sends it. All records get the repository's revision, so those that are there in a
/// later one stay as they are. Its signature is not checked.
///
/// # Errors
///
/// The archive is cut off or malformed, or something is missing in it.
pub fn read(car: &[u8]) -> Result<Repo, String> {
    let repository = Repository::read_unsigned(car).map_err(|invalid| invalid.message)?;
    let (did, rev) = (&repository.commit.did, &repository.commit.rev);
    let records = repository.records.iter();
    let ops: Vec<RepoOp<'_>> =
        records.map(|(path, cid)| RepoOp { action: "create", path, cid: Some(*cid) }).collect();
    let (entries, unreadable) = entries_of(did, rev, &ops, &repository.archive);
    let lines =
        entries.iter().flat_map(|data| format!("{{\"type\":\"commit\",\"data\":{data}}}\n").into_bytes());
    Ok(Repo { did: did.clone(), records: ops.len(), unreadable, lines: lines.collect() })
}
