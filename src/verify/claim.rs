//! What a frame says about a commit, before any of it is believed.

use shrike::cbor::Cid;

/// A `#commit` or `#sync` as its frame states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim<'a> {
    /// The account.
    pub did: &'a str,
    /// The new revision.
    pub rev: &'a str,
    /// The revision before it; `None` for the first commit.
    pub since: Option<&'a str>,
    /// The root of the tree before it, if the frame names one.
    pub prev_data: Option<Cid>,
    /// The commit object, if the frame names one. A `#sync` does not.
    pub commit: Option<Cid>,
    /// The operations; none in a `#sync`.
    pub ops: Vec<ClaimedOp<'a>>,
    /// The archive.
    pub blocks: &'a [u8],
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimedOp<'a> {
    /// create, update or delete.
    pub action: &'a str,
    /// The collection, a slash and the record key.
    pub path: &'a str,
    /// The record after it.
    pub cid: Option<Cid>,
    /// The record before it.
    pub prev: Option<Cid>,
}
